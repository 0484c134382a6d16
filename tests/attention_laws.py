"""What must hold of every attention layer that is read and written."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import onnx_ir as oir

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


def check_scale(model: oir.Model, feeds: dict[str, np.ndarray]) -> None:
    """Writing the scale there is changes nothing; twice the scale is what twice the queries give."""
    before = text(model)
    other = model.clone()
    layer = layer_of(model)
    layer.write_scale(model, layer.scale)
    assert text(model) == before
    layer.write_scale(model, 2 * layer.scale)
    changed = layer_of(model)
    np.testing.assert_allclose(changed.scale, 2 * layer.scale, rtol=1e-6)
    assert changed.softcap == layer.softcap
    if layer.query_norm is not None:
        return
    twin = layer_of(other)
    read = twin.read()
    bias = None if read.query_bias is None else 2 * read.query_bias
    twin.write(other, replace(read, query=2 * read.query, query_bias=bias))
    np.testing.assert_allclose(outputs(model, feeds)[0], outputs(other, feeds)[0], rtol=1e-4, atol=1e-5)


def check_writes(
    model: oir.Model, feeds: dict[str, np.ndarray], elements: bool, heads_differ: bool = False, residual: bool = True
) -> None:
    """Writing what was read changes nothing; other orders of heads compute the same; other weights something else.

    Args:
        model: with one attention layer, whose result is the first output, `residual`: added to the first input.
        feeds: its inputs.
        elements: the elements of queries and keys can be put into another order too.
        heads_differ: something else than the layer's weights is not the same for all heads.
        residual: see `model`.
    """
    before, expected = text(model), outputs(model, feeds)[0]
    layer = layer_of(model)
    read = layer.read()
    layer.write(model, read)
    assert text(model) == before
    if not heads_differ:
        layer.write(model, permuted(read, layer.kv_heads, elements=elements))
        assert text(model) != before
        np.testing.assert_allclose(outputs(model, feeds)[0], expected, rtol=1e-4, atol=1e-5)
    layer = layer_of(model)
    assert read.value is not None
    doubled = None if read.value_bias is None else 2 * read.value_bias
    layer.write(model, replace(read, value=2 * read.value, value_bias=doubled))
    kept = next(iter(feeds.values())) if residual else np.zeros(())
    kept = kept + (0.0 if read.output_bias is None else read.output_bias)
    np.testing.assert_allclose(outputs(model, feeds)[0] - kept, 2 * (expected - kept), rtol=1e-3, atol=1e-4)
