"""The heads of attention layers of exported models in another order: the models compute what they did."""

from __future__ import annotations

import numpy as np
import onnx_ir as oir
import pytest

from burnish.backends.ort.session import executor
from burnish.frontends.synthesis import synthesise, usable
from burnish.ir.text import text
from burnish.ir.views.attention_layer import AttentionLayer, Heads, attention_layers
from burnish.passes import recipes
from burnish.passes.pipeline import Pipeline
from burnish.tools.research import structures

FEW = (
    "bert-s-dynp-fuse", "bert-s-op23", "gpt2-dyn", "gemma-ts", "llama-kv-dynp-fuse", "mixtral-op23", "phi-op23",
    "qwen-ts-ort", "swin-dynp", "t5-dynp-sim", "unet-ts", "vit-timm-eager", "genai-window", "tf-bert", "a6-ppocr-rec",
)  # fmt: skip
FAST = pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[] if name in FEW else [pytest.mark.slow])
        for name in structures.names()
        if "smollm2" not in name
    ],
)


def reordered(layer: AttentionLayer, random: np.random.Generator, biased: bool) -> Heads:
    """The same layer in another order: of heads, unless a bias or a cache tells them apart, and of their elements."""
    read = layer.read()
    assert read.key is not None
    assert read.value is not None
    groups, each = layer.kv_heads, layer.heads // layer.kv_heads
    fixed = biased or bool(layer.cache)
    order = np.arange(groups) if fixed else random.permutation(groups)
    within = np.arange(each) if biased else random.permutation(each)
    queries = (order[:, None] * each + within).reshape(-1)
    turned = layer.rotary is not None or layer.query_norm is not None or bool(layer.cache)
    inner = np.arange(layer.head_size) if turned else random.permutation(layer.head_size)
    values = np.arange(layer.value_size) if layer.cache else random.permutation(layer.value_size)

    def moved(bias: np.ndarray | None, rows: np.ndarray, columns: np.ndarray) -> np.ndarray | None:
        return None if bias is None else bias[rows][:, columns]

    return Heads(
        read.query[queries][:, inner], read.key[order][:, inner], read.value[order][:, values],
        read.output[:, queries][:, :, values],
        moved(read.query_bias, queries, inner), moved(read.key_bias, order, inner),
        moved(read.value_bias, order, values), read.output_bias,
    )  # fmt: skip


@FAST
def test_heads_in_another_order_compute_the_same(name: str) -> None:
    model = Pipeline(list(recipes.NORMAL_FORM)).rewrite(oir.from_proto(structures.load(name))).model
    layers = [found for found in attention_layers(model) if isinstance(found, AttentionLayer)]
    if not layers:
        return
    before = text(model)
    run = executor(level="basic", lean=True)(model)
    kept, _ = usable(synthesise(model, settings=1)[:3], run)
    expected = [run.run(sample.feeds) for sample in kept]
    run.close()
    random = np.random.default_rng(0)
    for layer in layers:
        layer.write(model, layer.read())
    assert text(model) == before
    written = [layer for layer in layers if all(one is None or one.read_only is None for one in layer.projections)]
    for layer in written:
        layer.write(model, reordered(layer, random, biased=name.startswith(("swin", "t5"))))
    assert not written or text(model) != before or all(layer.heads == layer.kv_heads for layer in written)
    run = executor(level="basic", lean=True)(model)
    for sample, outputs in zip(kept, expected, strict=True):
        found = run.run(sample.feeds)
        for output, value in outputs.items():
            np.testing.assert_allclose(found[output], value, rtol=1e-3, atol=1e-4 * np.abs(value).max(initial=1.0))
    run.close()
