"""Networks with seeded random weights, one for each family of layers that exporters spell differently.

`build(family, attention)` gives a `Network`: the module in evaluation mode, example inputs, and the names and dynamic
axes of its inputs and outputs. The weights are scaled so that signals keep their size through the depth and attention
is neither uniform nor one-hot; norms and biases get distinct values, so no two parameters are equal by accident.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from burnish.tools.research.zoo_wrappers import CachedDecoder, EncoderOutputs

FAMILIES = ("cnn", "bert", "vit", "llama")
LLAMA_LAYERS, LLAMA_KV_HEADS, LLAMA_HEAD = 6, 4, 64


@dataclass(frozen=True)
class Network:
    """A module and what an exporter has to know of it; `axes` maps each input and output to its named axes."""

    module: nn.Module
    inputs: tuple[Tensor, ...]
    input_names: tuple[str, ...]
    output_names: tuple[str, ...]
    axes: dict[str, dict[int, str]]


def build(family: str, attention: str) -> Network:
    """The network of a family of `FAMILIES`; `attention` is "sdpa" or "eager" (ignored by "cnn")."""
    torch.manual_seed(0)
    network = {"cnn": _cnn, "bert": _bert, "vit": _vit, "llama": _llama}[family](attention)
    randomize(network.module)
    network.module.eval()
    return network


def randomize(module: nn.Module) -> None:
    """Draw every parameter and statistic anew, in the order of their names, from seed 0."""
    generator = torch.Generator().manual_seed(0)

    def normal(tensor: Tensor, mean: float, deviation: float) -> None:
        tensor.copy_(mean + deviation * torch.randn(tensor.shape, generator=generator))

    with torch.no_grad():
        for name, parameter in sorted(module.named_parameters()):
            if parameter.ndim >= 2 and "embed" not in name:
                gain = 1.5 if any(key in name for key in ("query", "key", "qkv", "q_proj", "k_proj")) else 1.0
                normal(parameter, 0.0, gain / parameter[0].numel() ** 0.5)
            elif parameter.ndim >= 2:
                normal(parameter, 0.0, 0.5)
            else:
                normal(parameter, 0.0 if name.endswith("bias") else 1.0, 0.1)
        for name, buffer in sorted(module.named_buffers()):
            if name.endswith("running_mean"):
                normal(buffer, 0.0, 0.1)
            elif name.endswith("running_var"):
                buffer.copy_(0.5 + torch.rand(buffer.shape, generator=generator))


class _ConvNorm(nn.Sequential):
    def __init__(self, before: int, after: int, size: int, stride: int = 1) -> None:
        convolution = nn.Conv2d(before, after, size, stride, size // 2, bias=False)
        super().__init__(convolution, nn.BatchNorm2d(after))


class _Residual(nn.Module):
    def __init__(self, before: int, after: int, stride: int) -> None:
        super().__init__()
        self.first = _ConvNorm(before, after, 3, stride)
        self.second = _ConvNorm(after, after, 3)
        self.shortcut = _ConvNorm(before, after, 1, stride) if stride != 1 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.second(F.relu(self.first(x))) + self.shortcut(x)


class ResidualNet(nn.Module):
    """18 convolutions and 19 batch norms; the last norm stands between an addition and a ReLU and cannot be folded."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = _ConvNorm(3, 48, 3)
        plan = [(48, 48, 1), (48, 48, 1), (48, 96, 2), (96, 96, 1), (96, 192, 2), (192, 192, 1), (192, 320, 2)]
        self.blocks = nn.ModuleList(_Residual(*step) for step in plan)
        self.norm = nn.BatchNorm2d(320)
        self.head = nn.Linear(320, 100)

    def forward(self, image: Tensor) -> Tensor:
        x = self.stem(image)
        for block in self.blocks:
            x = block(F.relu(x))
        x = F.relu(self.norm(x))
        return self.head(x.mean((2, 3)))


def _cnn(attention: str) -> Network:
    axes = {"image": {0: "batch"}, "logits": {0: "batch"}}
    return Network(ResidualNet(), (torch.randn(2, 3, 64, 64),), ("image",), ("logits",), axes)


class _VitAttention(nn.Module):
    """Self-attention with one matrix for query, key and value and the fused operator, or with three and plain ones."""

    def __init__(self, width: int, heads: int, fused: bool) -> None:
        super().__init__()
        self.heads, self.fused = heads, fused
        if fused:
            self.qkv = nn.Linear(width, 3 * width)
        else:
            self.query, self.key, self.value = (nn.Linear(width, width) for _ in range(3))
        self.project = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, width = x.shape
        size = width // self.heads
        if self.fused:
            q, k, v = self.qkv(x).reshape(batch, tokens, 3, self.heads, size).permute(2, 0, 3, 1, 4).unbind(0)
            y = F.scaled_dot_product_attention(q, k, v)
        else:
            q, k, v = (
                layer(x).reshape(batch, tokens, self.heads, size).transpose(1, 2)
                for layer in (self.query, self.key, self.value)
            )
            y = (q * size**-0.5 @ k.transpose(-2, -1)).softmax(-1) @ v
        return self.project(y.transpose(1, 2).reshape(batch, tokens, width))


class _VitBlock(nn.Module):
    def __init__(self, width: int, heads: int, fused: bool) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width, eps=1e-6), nn.LayerNorm(width, eps=1e-6)
        self.attention = _VitAttention(width, heads, fused)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class VisionTransformer(nn.Module):
    """Pre-norm vision transformer with a class token and learnt positions."""

    def __init__(self, fused: bool, size: int = 64, patch: int = 8, width: int = 192, layers: int = 6) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, width, patch, patch)
        self.class_embedding = nn.Parameter(torch.zeros(1, 1, width))
        self.position_embedding = nn.Parameter(torch.zeros(1, (size // patch) ** 2 + 1, width))
        self.blocks = nn.Sequential(*(_VitBlock(width, width // 64, fused) for _ in range(layers)))
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.head = nn.Linear(width, 100)

    def forward(self, image: Tensor) -> Tensor:
        x = self.patches(image).flatten(2).transpose(1, 2)
        x = torch.cat([self.class_embedding.expand(x.shape[0], -1, -1), x], 1) + self.position_embedding
        return self.head(self.norm(self.blocks(x))[:, 0])


def _vit(attention: str) -> Network:
    axes = {"image": {0: "batch"}, "logits": {0: "batch"}}
    module = VisionTransformer(fused=attention == "sdpa")
    return Network(module, (torch.randn(2, 3, 64, 64),), ("image",), ("logits",), axes)


def _bert(attention: str) -> Network:
    from transformers import BertConfig, BertModel

    config = BertConfig(
        vocab_size=20_000,
        hidden_size=256,
        num_hidden_layers=6,
        num_attention_heads=4,
        intermediate_size=1024,
        attn_implementation=attention,
    )
    ids = torch.randint(0, 20_000, (2, 9))
    mask = torch.ones(2, 9, dtype=torch.int64)
    mask[1, :3] = 0
    inputs = ("input_ids", "attention_mask", "token_type_ids")
    outputs = ("last_hidden_state", "pooler_output")
    axes = {name: {0: "batch", 1: "seq"} for name in (*inputs, outputs[0])} | {outputs[1]: {0: "batch"}}
    return Network(EncoderOutputs(BertModel(config)), (ids, mask, torch.zeros_like(ids)), inputs, outputs, axes)


def cached_decoder(model: Any, layers: int, kv_heads: int, head: int) -> Network:
    """`model` with inputs input_ids, attention_mask, position_ids and past_key_values.i.key|value
    [batch, kv_heads, past, head], and outputs logits and present.i.key|value."""
    past_names = tuple(f"past_key_values.{layer}.{kind}" for layer in range(layers) for kind in ("key", "value"))
    present_names = tuple(name.replace("past_key_values", "present") for name in past_names)
    mask = torch.ones(2, 12, dtype=torch.int64)
    mask[1, :2] = 0
    positions = (mask.cumsum(1) - 1).clamp(min=0)[:, 5:].contiguous()
    past = [torch.randn(2, kv_heads, 5, head) for _ in past_names]
    axes = {"input_ids": {0: "batch", 1: "seq"}, "attention_mask": {0: "batch", 1: "total"}}
    axes |= {"position_ids": {0: "batch", 1: "seq"}, "logits": {0: "batch", 1: "seq"}}
    axes |= {name: {0: "batch", 2: "past"} for name in past_names}
    axes |= {name: {0: "batch", 2: "total"} for name in present_names}
    ids = torch.randint(3, min(1000, model.config.vocab_size), (2, 7))
    inputs = ("input_ids", "attention_mask", "position_ids", *past_names)
    return Network(CachedDecoder(model), (ids, mask, positions, *past), inputs, ("logits", *present_names), axes)


def _llama(attention: str) -> Network:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=8_000,
        hidden_size=512,
        intermediate_size=1408,
        num_hidden_layers=LLAMA_LAYERS,
        num_attention_heads=8,
        num_key_value_heads=LLAMA_KV_HEADS,
        head_dim=LLAMA_HEAD,
        max_position_embeddings=2048,
        tie_word_embeddings=False,
        attn_implementation=attention,
    )
    return cached_decoder(LlamaForCausalLM(config), LLAMA_LAYERS, LLAMA_KV_HEADS, LLAMA_HEAD)
