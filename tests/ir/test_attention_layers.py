"""Attention layers: what the view reads is what the module has, and what it writes is what the model then computes."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import onnx_ir as oir
import pytest
from attention_modules import LAYERS, export

from burnish.backends.ort.session import executor
from burnish.ir.text import text
from burnish.ir.views.attention_layer import AttentionLayer, Heads, attention_layers
from burnish.passes import recipes
from burnish.passes.pipeline import Pipeline


def layer_of(model: oir.Model) -> AttentionLayer:
    (found,) = attention_layers(model)
    assert isinstance(found, AttentionLayer), getattr(found, "reason", "")
    return found


def normal(model: oir.Model) -> oir.Model:
    return Pipeline(list(recipes.NORMAL_FORM)).rewrite(model).model


def outputs(model: oir.Model, feeds: dict[str, np.ndarray]) -> list[np.ndarray]:
    runner = executor()(model)
    try:
        return list(runner.run(feeds).values())
    finally:
        runner.close()


def permuted(heads: Heads, groups: int, *, elements: bool) -> Heads:
    """The same layer with its heads, and the elements of its values, in another order; `elements`: of queries too."""
    assert heads.key is not None and heads.value is not None
    random = np.random.default_rng(1)
    order = np.roll(np.arange(groups), 1)
    each = heads.query.shape[0] // groups
    queries = (order[:, None] * each + np.roll(np.arange(each), 1)).reshape(-1)
    within = random.permutation(heads.value.shape[1])
    inner = random.permutation(heads.query.shape[1]) if elements else np.arange(heads.query.shape[1])

    def moved(bias: np.ndarray | None, rows: np.ndarray, columns: np.ndarray) -> np.ndarray | None:
        return None if bias is None else bias[rows][:, columns]

    return Heads(
        heads.query[queries][:, inner], heads.key[order][:, inner], heads.value[order][:, within],
        heads.output[:, queries][:, :, within],
        moved(heads.query_bias, queries, inner), moved(heads.key_bias, order, inner),
        moved(heads.value_bias, order, within), heads.output_bias,
    )  # fmt: skip


def check_writes(model: oir.Model, feeds: dict[str, np.ndarray], elements: bool, heads_differ: bool = False) -> None:
    """Writing what was read changes nothing; other orders of heads compute the same; other weights something else."""
    before, expected = text(model), outputs(model, feeds)
    layer = layer_of(model)
    read = layer.read()
    layer.write(model, read)
    assert text(model) == before
    if not heads_differ:
        layer.write(model, permuted(read, layer.kv_heads, elements=elements))
        assert text(model) != before
        for one, other in zip(outputs(model, feeds), expected, strict=True):
            np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-5)
    layer = layer_of(model)
    layer.write(
        model, replace(read, value=2 * read.value, value_bias=None if read.value_bias is None else 2 * read.value_bias)
    )  # noqa: E501
    x = next(iter(feeds.values()))
    bias = 0.0 if read.output_bias is None else read.output_bias
    for one, other in zip(outputs(model, feeds), expected, strict=True):
        np.testing.assert_allclose(one - x - bias, 2 * (other - x - bias), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", LAYERS)
def test_a_layer_of_torch_is_read_and_written(name: str) -> None:
    proto, feeds, truth = export(name)
    raw = oir.from_proto(proto)
    models = [normal(raw)]
    if name != "normed":  # whose norm is read only where all shapes are declared
        models.append(raw)
    for model in models:
        layer = layer_of(model)
        read = layer.read()
        for one in ("query", "key", "value", "output", "query_bias"):
            found, wanted = getattr(read, one), getattr(truth, one)
            assert (found is None) == (wanted is None)
            if found is not None:
                np.testing.assert_array_equal(found, wanted)
        assert (layer.heads, layer.kv_heads, layer.head_size) == (4, truth.key.shape[0], 6)
        assert layer.scale == pytest.approx(6**-0.5)
        assert not layer.cache
        facts = dict(truth.facts)
        assert layer.cross == facts.pop("cross", False)
        assert layer.packed == facts.pop("packed", False)
        assert layer.softcap == pytest.approx(facts.pop("softcap", 0.0))
        turned = layer.rotary
        assert (turned.dims if turned is not None else 0) == facts.pop("turns", 0)
        assert turned is None or turned.interleaved == facts.pop("interleaved")
        norm = layer.query_norm
        assert (norm.per_head if norm is not None else None) == facts.pop("per_head", None)
        assert len(layer.mask) == facts.pop("masks", len(layer.mask))
        check_writes(model, feeds, elements=turned is None and norm is None, heads_differ=name == "windows")
