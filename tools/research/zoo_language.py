"""Small transformers language models with random weights, one for each family of layers (see `zoo_families.py`).

Decoders take `position_ids` [batch, seq]: those that transformers makes itself have batch 1, which the
RotaryEmbedding operator refuses. Widths, heads and vocabularies differ from each other and between families wherever
the architecture lets them, so that a table that mixes two of them up is seen to be wrong.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from burnish.tools.research.zoo_random import Network, cached_decoder
from burnish.tools.research.zoo_wrappers import EncoderDecoder, EncoderOutputs, PositionedDecoder, UncachedDecoder

VOCABULARY = 500


def bert(attention: str) -> Network:
    """Post-norm encoder of 4 layers: ids, mask and token types [batch, seq] to hidden states and pooled first token."""
    from transformers import BertConfig, BertModel

    config = BertConfig(
        vocab_size=VOCABULARY,
        hidden_size=48,
        num_hidden_layers=4,
        num_attention_heads=4,
        intermediate_size=160,
        max_position_embeddings=64,
        attn_implementation=attention,
    )
    ids, mask = _ids(), _mask()
    inputs = ("input_ids", "attention_mask", "token_type_ids")
    outputs = ("last_hidden_state", "pooler_output")
    axes = {name: {0: "batch", 1: "seq"} for name in (*inputs, outputs[0])} | {outputs[1]: {0: "batch"}}
    return Network(EncoderOutputs(BertModel(config)), (ids, mask, torch.zeros_like(ids)), inputs, outputs, axes)


def gpt2(attention: str) -> Network:
    """Pre-norm decoder of 4 layers with one [in, out] matrix for query, key and value, and the embedding as head."""
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        vocab_size=VOCABULARY, n_positions=64, n_embd=48, n_layer=4, n_head=3, attn_implementation=attention
    )
    return _uncached(UncachedDecoder(GPT2LMHeadModel(config)), positions=False)


def llama(attention: str, cached: bool) -> Network:
    """Decoder of 4 layers with 6 heads of size 8 in 2 groups, rotary positions and RMS norms."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=48,
        intermediate_size=112,
        num_hidden_layers=4,
        num_attention_heads=6,
        num_key_value_heads=2,
        max_position_embeddings=128,
        tie_word_embeddings=False,
        attn_implementation=attention,
    )
    model = LlamaForCausalLM(config)
    return cached_decoder(model, 4, 2, 8) if cached else _uncached(PositionedDecoder(model))


def gemma2(attention: str) -> Network:
    """4 layers, every second one global, the others with a window of 6 tokens; soft caps; norms before and after."""
    from transformers import Gemma2Config, Gemma2ForCausalLM

    config = Gemma2Config(
        vocab_size=VOCABULARY,
        hidden_size=48,
        intermediate_size=112,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        query_pre_attn_scalar=24,
        sliding_window=6,
        max_position_embeddings=128,
        attn_implementation=attention,
    )
    return _uncached(PositionedDecoder(Gemma2ForCausalLM(config)))


def gemma3(attention: str) -> Network:
    """6 layers, each third one global, the others with a window of 6 tokens and a rotary base of their own; with cache;
    norms of query and key; norms before and after."""
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig

    kinds = ["sliding_attention", "sliding_attention", "full_attention"] * 2
    config = Gemma3TextConfig(
        vocab_size=VOCABULARY,
        hidden_size=48,
        intermediate_size=112,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=1,
        head_dim=16,
        query_pre_attn_scalar=16,
        sliding_window=6,
        layer_types=kinds,
        max_position_embeddings=128,
        attn_implementation=attention,
    )
    return cached_decoder(Gemma3ForCausalLM(config), 6, 1, 16)


def qwen3(attention: str) -> Network:
    """4 layers with RMS norms of query and key over the head, a head size that is not width / heads, and a cache."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    config = Qwen3Config(
        vocab_size=VOCABULARY,
        hidden_size=40,
        intermediate_size=112,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=128,
        tie_word_embeddings=True,
        attn_implementation=attention,
    )
    return cached_decoder(Qwen3ForCausalLM(config), 4, 2, 16)


def phi(attention: str) -> Network:
    """4 layers whose attention and MLP read one LayerNorm and add to one residual; half of each head is rotated."""
    from transformers import PhiConfig, PhiForCausalLM

    config = PhiConfig(
        vocab_size=VOCABULARY,
        hidden_size=48,
        intermediate_size=160,
        num_hidden_layers=4,
        num_attention_heads=3,
        partial_rotary_factor=0.5,
        max_position_embeddings=128,
        attn_implementation=attention,
    )
    return _uncached(PositionedDecoder(PhiForCausalLM(config)))


def t5(attention: str) -> Network:
    """Encoder of 3 and decoder of 3 layers, relative position bias shared by the layers, attention without scale and
    wider than the residual stream."""
    from transformers import T5Config, T5ForConditionalGeneration

    config = T5Config(
        vocab_size=VOCABULARY,
        d_model=48,
        d_kv=16,
        d_ff=112,
        num_layers=3,
        num_decoder_layers=3,
        num_heads=4,
        attn_implementation=attention,
    )
    inputs = ("input_ids", "attention_mask", "decoder_input_ids")
    axes = {name: {0: "batch", 1: "seq"} for name in inputs[:2]}
    axes |= {name: {0: "batch", 1: "target"} for name in ("decoder_input_ids", "logits")}
    target = torch.randint(0, VOCABULARY, (2, 5))
    module = EncoderDecoder(T5ForConditionalGeneration(config))
    return Network(module, (_ids(), _mask(), target), inputs, ("logits",), axes)


def mixtral(attention: str, experts: str) -> Network:
    """3 layers of attention and 4 experts, of which each token takes 2; `experts` is transformers' name for how they
    run: "batched_mm" gathers the experts' weights for each token, "eager" loops over the experts."""
    from transformers import MixtralConfig, MixtralForCausalLM

    config = MixtralConfig(
        vocab_size=VOCABULARY,
        hidden_size=48,
        intermediate_size=80,
        num_hidden_layers=3,
        num_attention_heads=6,
        num_key_value_heads=2,
        num_local_experts=4,
        num_experts_per_tok=2,
        max_position_embeddings=128,
        sliding_window=None,
        attn_implementation=attention,
        experts_implementation=experts,
    )
    return _uncached(PositionedDecoder(MixtralForCausalLM(config)))


def _ids() -> Tensor:
    return torch.randint(3, VOCABULARY, (2, 9))


def _mask() -> Tensor:
    mask = torch.ones(2, 9, dtype=torch.int64)
    mask[1, 7:] = 0
    return mask


def _uncached(module: nn.Module, positions: bool = True) -> Network:
    """`module` with input_ids, attention_mask and, where asked for, position_ids, to logits."""
    inputs: dict[str, Any] = {"input_ids": _ids(), "attention_mask": _mask()}
    if positions:
        inputs["position_ids"] = torch.arange(9).repeat(2, 1)
    axes = {name: {0: "batch", 1: "seq"} for name in (*inputs, "logits")}
    return Network(module, tuple(inputs.values()), tuple(inputs), ("logits",), axes)
