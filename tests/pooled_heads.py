"""Models with fewer heads of keys and values, and such whose heads are alike."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import onnx_ir as oir
import pytest
from laws import make_samples

from burnish.ir.samples import Sample
from burnish.ir.views.attention_layer import AttentionLayer, Heads
from burnish.passes import catalog
from burnish.passes.base import Outcome
from burnish.passes.kv_heads import Turn
from burnish.passes.kv_layers import KeyLayers
from burnish.passes.lossy import LossyPass

SLOW = pytest.mark.slow
CACHED = "llama-kv-dynp llama-kv-op23 llama-kv-dynp-fuse genai-llama genai-mha qwen-dynp".split()
MORE = """
    llama-kv-ts llama-kv-eager llama-kv-dyn llama-kv-ts-ort qwen-op23 qwen-ts qwen-dynp-fuse genai-qwen genai-moe
    genai-window
""".split()
UNCACHED = "gpt2-ts gpt2-op23 phi-dynp".split()
FAMILIES = "gpt2-dynp-ort gpt2-eager phi-ts phi-op23 phi-dynp-fuse llama-nocache-dynp-fuse gemma-dynp".split()
ENCODERS = "bert-s-ts bert-s-op23 vit-timm-ts vit-timm-dynp-fuse t5-ts".split()


def parsed(options: str) -> LossyPass:
    (one,) = catalog.parse(f"pool-kv-heads{{{options}}}" if options else "pool-kv-heads")
    assert isinstance(one, LossyPass)
    return one


def fewer(model: oir.Model, options: str) -> oir.Model:
    """A copy with fewer heads of keys and values."""
    after = model.clone()
    parsed(options).rewrite(after, Outcome("pool-kv-heads"))
    return after


def caches(model: oir.Model) -> list[oir.Value]:
    return [value for value in model.graph.inputs if value.shape is not None and len(value.shape) == 4]


def heads_of(model: oir.Model) -> list[int]:
    return [one.layer.kv_heads for one in KeyLayers(model).layers]


def alike(layer: AttentionLayer, turn: Turn, groups: int, how: str, random: np.random.Generator) -> Heads:
    """Weights whose heads are the same up to what queries and outputs can make up for."""
    heads = layer.read()
    assert heads.key is not None and heads.value is not None
    members = np.repeat(np.arange(groups), layer.kv_heads // groups)
    if how == "fit" and not turn.fixed:
        members = random.permutation(members)
    parts = {name: getattr(heads, name) for name in ("key", "value", "key_bias", "value_bias")}
    parts = {name: None if one is None else one[:groups][members].copy() for name, one in parts.items()}
    for head in range(layer.kv_heads if how == "fit" else 0):
        for name, size in (("key", layer.head_size), ("value", layer.value_size)):
            through = random.standard_normal((size, size)) + 2 * np.eye(size)
            if name == "key":
                through = np.eye(size) if turn.normed else turned(through, turn, random)
            for part in (parts[name], parts[f"{name}_bias"]):
                if part is not None:
                    part[head] = through @ part[head]
    return replace(heads, **parts)


def turned(through: np.ndarray, turn: Turn, random: np.random.Generator) -> np.ndarray:
    """A matrix that may stand between the projection of keys and their rotary embedding."""
    if not turn.pairs.size:
        return through
    found, rest = np.zeros_like(through), np.setdiff1d(np.arange(len(through)), turn.pairs)
    found[np.ix_(rest, rest)] = through[np.ix_(rest, rest)]
    for a, b in turn.pairs.T:
        real, imaginary = random.standard_normal(2)
        found[a, a] = found[b, b] = real
        found[b, a], found[a, b] = imaginary, -imaginary
    return found


def sample(model: oir.Model) -> Sample:
    """A text of six tokens after empty caches, or what is made up for a model of something else."""
    ids = np.random.default_rng(3).integers(1, 100, (1, 6))
    known = {"input_ids": ids, "attention_mask": np.ones_like(ids), "position_ids": np.arange(6)[None]}
    empty = {str(v.name): np.zeros((1, v.shape[1], 0, v.shape[3]), np.float32) for v in caches(model) if v.shape}
    made = next(iter(make_samples(model))).feeds
    text = "input_ids" in made
    names = [str(value.name) for value in model.graph.inputs]
    told = {**known, **empty}
    return Sample("text", {name: told.get(name, np.zeros_like(ids)) if text else made[name] for name in names})
