"""Attention layers whose attention is one operator, of the standard or of ONNX Runtime."""

from __future__ import annotations

import numpy as np
import onnx_ir as oir
import pytest
from attention_laws import check_scale, check_writes, layer_of, outputs
from golden import parse_graph

CONTRIB = '<ir_version: 10, opset_import: ["": 20, "com.microsoft": 1]>'
OPERATORS = {
    "Attention of three axes": """<ir_version: 11, opset_import: ["": 23]>
        g (float[B, S, 8] x, float[B, 1, P, 4] k0, float[B, 1, P, 4] v0)
            => (float[B, S, 8] y, float[B, 1, T, 4] k1, float[B, 1, T, 4] v1)
            <float[8, 12] wq, float[8, 4] wk, float[8, 4] wv, float[12, 8] wo> {
          q = MatMul (x, wq)  k = MatMul (x, wk)  v = MatMul (x, wv)
          a, k1, v1 = Attention <q_num_heads = 3, kv_num_heads = 1, is_causal = 1> (q, k, v, , k0, v0)
          y = MatMul (a, wo)
        }""",
    "Attention of four axes": """<ir_version: 11, opset_import: ["": 23]>
        g (float[B, S, 8] x) => (float[B, S, 8] y)
            <float[8, 24] w, float[24] b, float[8, 8] wo, int64[4] split = {0, 0, 6, 4}, int64[3] join = {0, 0, 8},
             int64[3] parts = {2, 2, 2}> {
          m = MatMul (x, w)  n = Add (m, b)  r = Reshape (n, split)  t = Transpose <perm = [0, 2, 1, 3]> (r)
          q, k, v = Split <axis = 1> (t, parts)
          a = Attention <scale = 0.3, softcap = 5.0> (q, k, v)
          u = Transpose <perm = [0, 2, 1, 3]> (a)  j = Reshape (u, join)  y = MatMul (j, wo)
        }""",
    "MultiHeadAttention": CONTRIB
    + """
        g (float[B, S, 8] x) => (float[B, S, 8] y)
            <float[8, 8] wq, float[8, 8] wk, float[8, 8] wv, float[8, 8] wo, float[24] b> {
          q = MatMul (x, wq)  k = MatMul (x, wk)  v = MatMul (x, wv)
          a = com.microsoft.MultiHeadAttention <num_heads = 2> (q, k, v, b)
          y = MatMul (a, wo)
        }""",
    "MultiHeadAttention, packed": CONTRIB
    + """
        g (float[B, S, 8] x) => (float[B, S, 8] y)
            <float[8, 24] w, float[8, 8] wo, int64[5] split = {0, 0, 2, 3, 4}> {
          m = MatMul (x, w)  r = Reshape (m, split)
          a = com.microsoft.MultiHeadAttention <num_heads = 2, unidirectional = 1> (r)
          y = MatMul (a, wo)
        }""",
    "MultiHeadAttention with a cache": CONTRIB
    + """
        g (float[B, S, 8] x, float[B, 2, P, 4] k0, float[B, 2, P, 4] v0)
            => (float[B, S, 8] y, float[B, 2, T, 4] k1, float[B, 2, T, 4] v1)
            <float[8, 8] wq, float[8, 8] wk, float[8, 8] wv, float[8, 8] wo> {
          q = MatMul (x, wq)  k = MatMul (x, wk)  v = MatMul (x, wv)
          a, k1, v1 = com.microsoft.MultiHeadAttention <num_heads = 2> (q, k, v, , , , k0, v0)
          y = MatMul (a, wo)
        }""",
    "GroupQueryAttention": CONTRIB
    + """
        g (float[B, S, 8] x, int32[B, 1] lengths, int32 total, float[B, 1, P, 16] k0, float[B, 1, P, 16] v0)
            => (float[B, S, 8] y, float[B, 1, T, 16] k1, float[B, 1, T, 16] v1)
            <float[8, 64] w, float[32, 8] wo, float[16, 8] cos, float[16, 8] sin> {
          q = MatMul (x, w)
          a, k1, v1 = com.microsoft.GroupQueryAttention
              <num_heads = 2, kv_num_heads = 1, do_rotary = 1, local_window_size = 3>
              (q, , , k0, v0, lengths, total, cos, sin)
          y = MatMul (a, wo)
        }""",
    "contrib Attention": CONTRIB
    + """
        g (float[B, S, 8] x, float[2, B, 2, P, 4] past)
            => (float[B, S, 8] y, float[2, B, 2, T, 4] present)
            <float[8, 24] w, float[24] b, float[8, 8] wo, float[8] bo> {
          a, present = com.microsoft.Attention <num_heads = 2, unidirectional = 1> (x, w, b, , past)
          m = MatMul (a, wo)  y = Add (m, bo)
        }""",
}


def model_of(name: str) -> oir.Model:
    return oir.from_proto(parse_graph(OPERATORS[name]))


def feeds_of(model: oir.Model) -> dict[str, np.ndarray]:
    random = np.random.default_rng(0)
    sizes = {"B": 2, "S": 5, "P": 0, "T": 5}
    feeds = {}
    for value in model.graph.inputs:
        shape = [size if isinstance(size, int) else sizes[str(size.value)] for size in value.shape or ()]
        if value.dtype == oir.DataType.INT32:
            feeds[value.name or ""] = np.full(shape, 4 if shape else 5, np.int32)
        else:
            feeds[value.name or ""] = random.standard_normal(shape).astype(np.float32)
    return feeds


@pytest.mark.parametrize("name", [name for name in OPERATORS if name != "MultiHeadAttention, packed"])
def test_a_layer_around_an_operator_is_read_and_written(name: str) -> None:
    model = model_of(name)
    layer = layer_of(model)
    assert (layer.source, layer.memory, layer.result.name) == (model.graph.inputs[0], model.graph.inputs[0], "y")
    assert not layer.cross
    check_scale(model.clone(), feeds_of(model))
    check_writes(model, feeds_of(model), elements=layer.rotary is None, residual=False)


def test_packed_heads_of_an_operator_that_the_cpu_lacks_are_read() -> None:
    model = model_of("MultiHeadAttention, packed")
    layer = layer_of(model)
    weight = np.asarray(model.graph.initializers["w"].const_value.numpy()).T.reshape(2, 3, 4, 8)  # type: ignore[union-attr]
    read = layer.read()
    for place, found in enumerate((read.query, read.key, read.value)):
        np.testing.assert_array_equal(found, weight[:, place])


def test_what_operators_say_of_themselves() -> None:
    found = {name: layer_of(model_of(name)) for name in OPERATORS}
    sizes = [(one.heads, one.kv_heads, one.head_size) for one in found.values()]
    assert sizes == [(3, 1, 4), (2, 2, 4), (2, 2, 4), (2, 2, 4), (2, 2, 4), (2, 1, 16), (2, 2, 4)]
    assert [one.causal for one in found.values()] == [True, False, False, True, False, True, True]
    assert [one.packed for one in found.values()] == [False, True, False, True, False, True, True]
    assert found["Attention of four axes"].softcap == 5.0
    assert found["Attention of four axes"].scale == pytest.approx(0.3)
    assert found["GroupQueryAttention"].window == 3
    turned = found["GroupQueryAttention"].rotary
    assert turned is not None
    assert turned.dims == 16
    kinds = {name: (one.cache.kind, one.cache.form) for name, one in found.items() if one.cache}
    cached = ["Attention of three axes", "MultiHeadAttention with a cache", "GroupQueryAttention", "contrib Attention"]
    assert kinds == dict.fromkeys(cached, ("kv", "append"))
    packed = found["contrib Attention"].cache
    assert packed.value is not None
    assert packed.value.past_axes == ("packed", "batch", "heads", "past", "size")
    assert (packed.value.index, [one.name for one in packed.past]) == ((1,), ["past"])


def test_the_window_of_an_operator_counts_the_query_itself() -> None:
    model = model_of("GroupQueryAttention")
    feeds = feeds_of(model)
    before = outputs(model, feeds)[0]
    for distance, seen in ((2, True), (3, False)):
        moved = {**feeds, "x": feeds["x"].copy()}
        moved["x"][:, 4 - distance] += 1.0
        assert bool(np.abs(outputs(model, moved)[0][:, 4] - before[:, 4]).max() > 1e-4) == seen
