"""Views of layers: what they read is what the layer computes, and what they write is what it computes afterwards."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as oir
import pytest
from golden import name_nodes, parse_graph

from burnish.backends.reference.runner import ReferenceRunner
from burnish.ir.views.convolution import convolutions
from burnish.ir.views.linear import find_linear, linears
from burnish.ir.views.norm import norms
from burnish.ir.walk import walk

LINEAR = {
    "MatMul": "<float[5, 4] w> { y = MatMul (x, w) }",
    "MatMul and Add": "<float[5, 4] w, float[4] b> { a = MatMul (x, w) y = Add (a, b) }",
    "Add and MatMul, bias of two axes": "<float[5, 4] w, float[1, 4] b> { a = MatMul (x, w) y = Add (b, a) }",
    "one number as bias": "<float[5, 4] w, float b = {0.5}> { a = MatMul (x, w) y = Add (a, b) }",
    "weight behind Transpose": "<float[4, 5] w> { t = Transpose <perm = [1, 0]> (w) y = MatMul (x, t) }",
    "weight behind Cast": "<float16[5, 4] w> { t = Cast <to = 1> (w) y = MatMul (x, t) }",
    "weight behind Reshape": "<float[20] w, int64[2] s = {-1, 4}> { t = Reshape (w, s) y = MatMul (x, t) }",
    "weight in a Constant": "{ t = Constant <value = float[5, 1] {1, 2, 3, 4, 5}> () a = MatMul (x, t) y = Expand (a, s) }",  # noqa: E501
    "weight of int8": "<int8[5, 4] w = {1, -2, 3, 4, 5, 6, 7, 8, -9, 1, 2, 3, 4, 5, 6, 7, 8, 9, 1, 2}, float[4] s, int8[4] z = {1, 0, 2, 0}>"  # noqa: E501
    " { t = DequantizeLinear <axis = 1> (w, s, z) y = MatMul (x, t) }",
    "Gemm": "<float[5, 4] w, float[4] b> { y = Gemm (x, w, b) }",
    "Gemm without bias": "<float[5, 4] w> { y = Gemm <alpha = 0.5> (x, w) }",
    "Gemm, transposed and scaled": "<float[4, 5] w, float[1, 4] b> { y = Gemm <alpha = 2.0, beta = 0.5, transB = 1> (x, w, b) }",  # noqa: E501
    "Gemm, no use for its bias": "<float[5, 4] w, float[4] b> { y = Gemm <beta = 0.0> (x, w, b) }",
}


def model_of(text: str) -> oir.Model:
    proto = onnx.shape_inference.infer_shapes(parse_graph(text), strict_mode=True)
    model = oir.from_proto(proto)
    name_nodes(model)
    return model


def run(model: oir.Model, x: np.ndarray) -> np.ndarray:
    return next(iter(ReferenceRunner(model).run({"x": x}).values()))


@pytest.mark.parametrize("spelling", LINEAR)
def test_linear_reads_and_writes(spelling: str) -> None:
    body = LINEAR[spelling].replace("{ t = Constant", "<int64[2] s = {1, 4}> { t = Constant")
    model = model_of(f"g (float[3, 5] x) => (float[3, 4] y) {body}")
    (layer,) = linears(model)
    random = np.random.default_rng(0)
    x = random.standard_normal((3, 5)).astype(np.float32)
    weight, bias = layer.weight(), layer.bias()
    assert weight.shape == (layer.out_features, layer.in_features)
    expected = x @ weight.T + (0 if bias is None else bias)
    np.testing.assert_allclose(np.broadcast_to(expected, (3, 4)), run(model, x), rtol=1e-6, atol=1e-6)
    for new_bias in (random.standard_normal(layer.out_features), None):
        new_weight = random.standard_normal(weight.shape)
        layer = layer.write(model, new_weight, new_bias)
        oir.to_proto(model)
        expected = x @ new_weight.T + (0 if new_bias is None else new_bias)
        stored = 1e-3 if "Cast" in spelling else 1e-6
        np.testing.assert_allclose(np.broadcast_to(expected, (3, 4)), run(model, x), rtol=stored, atol=stored)


def test_linear_of_blocked_int4() -> None:
    model = model_of(
        "g (float[3, 4] x) => (float[3, 2] y) <float[2, 2] s> { y = MatMul (x, t)"
        " c = Constant <value = int8[4, 2] {1, 2, 3, 4, 5, 6, 7, -8}> ()"
        " t = DequantizeLinear <axis = 0, block_size = 2> (c, s) }".replace("{ y = MatMul (x, t)", "{").replace(
            "(c, s) }", "(c, s) y = MatMul (x, t) }"
        )
    )
    (layer,) = linears(model)
    x = np.random.default_rng(0).standard_normal((3, 4)).astype(np.float32)
    np.testing.assert_allclose(x @ layer.weight().T, run(model, x), rtol=1e-6)
    assert layer.read_only == "its weight is quantized"


def test_a_shared_weight_is_untied_for_the_writer_only() -> None:
    model = model_of("g (float[3, 4] x) => (float[3, 4] y) <float[4, 4] w> { a = MatMul (x, w) y = MatMul (a, w) }")
    first, second = linears(model)
    assert first.shared == [second.node]
    old = second.weight()
    first.write(model, np.eye(4), None)
    x = np.random.default_rng(0).standard_normal((3, 4)).astype(np.float32)
    np.testing.assert_allclose(run(model, x), x @ old.T, rtol=1e-6)


@pytest.mark.parametrize(
    "body",
    [
        "<float[4, 3] w> { y = MatMul (w, x) }",
        "<float[5, 4] w, float[3, 4] b> { y = Gemm (x, w, b) }",
        "<float[2, 5, 4] w> { y = MatMul (x, w) }",
    ],
)
def test_what_is_no_linear_layer(body: str) -> None:
    shape = "3, 4" if "w, x" in body else "3, 5"
    model = oir.from_proto(parse_graph(f"g (float[{shape}] x) => (float y) {body}"))
    assert [find_linear(node) for node in walk(model)] == [None]


@pytest.mark.parametrize(
    "body",
    [
        "<float[6, 2, 3, 3] w, float[6] b> { y = Conv <group = 2, pads = [1, 1, 1, 1]> (x, w, b) }",
        "<float[4, 3, 3, 3] w> { y = ConvTranspose <group = 2, strides = [2, 1]> (x, w) }",
    ],
)
def test_convolution_writes_what_it_reads(body: str) -> None:
    model = model_of(f"g (float[1, 4, 5, 5] x) => (float[1, 6, A, B] y) {body}")
    (layer,) = convolutions(model)
    assert layer.weight().shape == (6, 2, 3, 3)
    assert (layer.in_channels, layer.out_channels) == (4, 6)
    x = np.random.default_rng(0).standard_normal((1, 4, 5, 5)).astype(np.float32)
    before = run(model, x)
    layer = layer.write(model, layer.weight() * 2, None if layer.bias() is None else layer.bias() * 2)
    np.testing.assert_allclose(run(model, x), before * 2, rtol=1e-6)
    shift = np.arange(6.0)
    layer.write(model, np.zeros_like(layer.weight()), shift)
    np.testing.assert_allclose(run(model, x)[0, :, 0, 0], shift)


NORMS = {
    "tensorflow": (
        "layer",
        "{ m = ReduceMean (x, k) d = Sub (x, m) s = Mul (d, d) v = ReduceMean (s, k) e = Add (v, eps)"
        " q = Sqrt (e) r = Reciprocal (q) f = Mul (r, g1) a = Mul (x, f) b1 = Mul (m, f) c = Sub (b, b1) y = Add (a, c) }",  # noqa: E501
    ),
    "torch script": (
        "layer",
        "{ m = ReduceMean (x, k) d = Sub (x, m) s = Pow (d, two) v = ReduceMean (s, k)"
        " e = Add (v, eps) q = Sqrt (e) n = Div (d, q) a = Mul (n, g1) y = Add (a, b) }",
    ),
    "paddle, subtracted twice": (
        "layer",
        "{ m = ReduceMean (x, k) d = Sub (x, m) d2 = Sub (x, m) s = Pow (d, two)"
        " v = ReduceMean (s, k) e = Add (eps, v) q = Sqrt (e) n = Div (d2, q) a = Mul (g1, n) y = Add (b, a) }",
    ),
    "root mean square": (
        "rms",
        "{ s = Pow (x, two) v = ReduceMean (s, k) e = Add (v, eps) q = Sqrt (e)"
        " r = Reciprocal (q) n = Mul (x, r) y = Mul (n, g1) }",
    ),
    "power of minus a half": (
        "rms",
        "{ s = Mul (x, x) v = ReduceMean (s, k) e = Add (v, eps) r = Pow (e, h) n = Mul (r, x) y = Mul (g1, n) }",
    ),
    "one operator": ("layer", "{ y = LayerNormalization <epsilon = 0.001> (x, g1, b) }"),
}


@pytest.mark.parametrize("spelling", NORMS)
def test_norm_computes_what_it_says(spelling: str) -> None:
    kind, body = NORMS[spelling]
    model = model_of(
        "g (float[3, 8] x) => (float[3, 8] y) <float[8] g1, float[8] b, float eps = {0.001}, float two = {2.0},"
        f" float h = {{-0.5}}, int64[1] k = {{-1}}> {body}"
    )
    (norm,) = norms(model)
    x = np.random.default_rng(0).standard_normal((3, 8))
    centred = x - x.mean(-1, keepdims=True) if norm.kind == "layer" else x
    scaled = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + norm.epsilon)
    np.testing.assert_allclose(run(model, x), scaled * norm.gain(8) + norm.offset(8), rtol=1e-6)
    assert (norm.kind, norm.axes, norm.outside_reader, norm.output.name) == (kind, (-1,), None, "y")
    assert {id(node) for node in norm.nodes} == {id(node) for node in walk(model)}
