"""Quantized numbers and packed weights, compiled by TVM, are those of ONNX Runtime."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
from compiled_operators import agree, bytes_of, graph, held, nodes, random

pytest.importorskip("tvm")


def test_quantizing_rounds_half_to_even_and_saturates() -> None:
    model = nodes(
        "float[n] x, float s, uint8 z, int8 zi, float[n,3] m, float[3] c, int8[3] cz, float[n,4] b",
        {
            "uint8[n] a": "QuantizeLinear(x, s, z)",
            "int8[n] i": "QuantizeLinear(x, s, zi)",
            "uint8[n] plain": "QuantizeLinear(x, s)",
            "float[n] back": "DequantizeLinear(a, s, z)",
            "int8[n,3] columns": "QuantizeLinear<axis=1>(m, c, cz)",
            "float[n,3] again": "DequantizeLinear<axis=-1>(columns, c, cz)",
            "uint8[n] y": "Identity(a)",
        },
    )
    x = np.array([0.25, 0.75, 1.25, -0.25, 1e9, -1e9, 3.3, 7.25], np.float32)
    given = dict(x=x, s=np.float32(0.5), z=np.uint8(3), zi=np.int8(-3), m=random(8, 3), b=random(8, 4))
    agree(model, given | dict(c=np.array([0.1, 0.02, 1], np.float32), cz=np.array([0, 5, -7], np.int8)))


def test_blocks_of_a_weight_have_their_own_scale() -> None:
    text = """g (float[n, 8] x, int8[8, 6] q, float[2, 6] s, int8[2, 6] z, int4[8, 6] f, uint4[8, 6] u, uint4[2, 6] uz)
        => (float[n, 6] y, float[n, 6] y4, float[n, 6] yu) {
        w = DequantizeLinear<axis=0, block_size=4>(q, s, z)  y = MatMul(x, w)
        w4 = DequantizeLinear<axis=0, block_size=4>(f, s)  y4 = MatMul(x, w4)
        wu = DequantizeLinear<axis=0, block_size=4>(u, s, uz)  yu = MatMul(x, wu) }"""
    scales = np.abs(random(2, 6)) + 0.1
    arrays = {
        "q": bytes_of(8, 6, dtype=np.int8), "s": scales, "z": bytes_of(2, 6, dtype=np.int8),
        "f": bytes_of(8, 6, dtype=ml_dtypes.int4), "u": bytes_of(8, 6, dtype=ml_dtypes.uint4),
        "uz": bytes_of(2, 6, dtype=ml_dtypes.uint4),
    }  # fmt: skip
    agree(held(graph(text, 21), arrays), {"x": random(3, 8)})


def test_packed_weights_are_parameters_of_half_the_size() -> None:
    from burnish.backends.tvm.lowering import lower

    text = "g (float[n, 16] x, int4[16, 15] f, float s) => (float[n, 15] y) {"
    text += " w = DequantizeLinear(f, s)  y = MatMul(x, w) }"
    weight = bytes_of(16, 15, dtype=ml_dtypes.int4)
    model = held(graph(text, 21), {"f": weight, "s": np.float32(0.3)})
    (array,) = lower(model).arrays()
    assert array.dtype == np.uint8 and array.shape == (120,)
    agree(model, {"x": random(2, 16)})


def test_products_of_integers() -> None:
    model = graph(
        """g (uint8[n,5] a, int8[5,4] b, uint8 az, int8[4] bz, uint8[1,2,6,6] i, int8[3,2,3,3] k, float s, float[4] t,
              float r, uint8 z, float[n,5] x, int8 kz)
           => (int32[n,4] y, int32[1,3,4,4] c, int32[1,3,6,6] p, uint8[n,4] q, uint8[1,3,6,6] v, uint8[n,5] d, float ds,
               uint8 dz) {
           y = MatMulInteger(a, b, az, bz)  c = ConvInteger(i, k, az)  p = ConvInteger<pads=[1,1,1,1]>(i, k, az)
           q = QLinearMatMul(a, s, az, b, t, bz, r, z)
           v = QLinearConv<pads=[1,1,1,1]>(i, s, az, k, s, kz, r, z)  d, ds, dz = DynamicQuantizeLinear(x) }"""
    )
    agree(
        model,
        dict(
            a=bytes_of(3, 5), b=bytes_of(5, 4, dtype=np.int8), az=np.uint8(120), bz=np.array([1, -2, 3, 0], np.int8),
            i=bytes_of(1, 2, 6, 6), k=bytes_of(3, 2, 3, 3, dtype=np.int8), s=np.float32(0.02), r=np.float32(0.7),
            t=np.array([0.01, 0.02, 0.03, 0.04], np.float32), z=np.uint8(100), x=random(3, 5), kz=np.int8(0),
        ),
    )  # fmt: skip


@pytest.mark.parametrize("bits", [4, 8])
def test_products_with_weights_of_a_few_bits(bits: int) -> None:
    packed, zeros = 16 * bits // 8, 6 * (2 if bits == 4 else 3)
    text = f"""g (float[b, n, 40] x, uint8[6, 3, {packed}] w, float[18] s, uint8[{zeros}] z, float[6] c)
        => (float[b, n, 6] y, float[b, n, 6] v) {{
        y = com.microsoft.MatMulNBits<K=40, N=6, bits={bits}, block_size=16>(x, w, s)
        v = com.microsoft.MatMulNBits<K=40, N=6, bits={bits}, block_size=16>(x, w, s, z, , c) }}"""
    arrays = {
        "w": bytes_of(6, 3, packed),
        "s": np.abs(random(18)),
        "z": bytes_of(zeros),
        "c": random(6),
    }
    agree(held(graph(text), arrays), {"x": random(2, 3, 40)}, {"x": random(1, 1, 40)}, within=10)


def test_rows_of_a_packed_table() -> None:
    text = """g (int64[n] i, uint8[7, 16] d, int4[7, 32] f, float[7, 2] s, uint8[7, 1] z)
        => (float[n, 32] y, float[n, 32] v, float[n, 32] w) {
        y = com.microsoft.GatherBlockQuantized<block_size=16, quantize_axis=1>(d, i, s)
        v = com.microsoft.GatherBlockQuantized<block_size=16, quantize_axis=1>(d, i, s, z)
        w = com.microsoft.GatherBlockQuantized<block_size=16, quantize_axis=1>(f, i, s) }"""
    arrays = {
        "d": bytes_of(7, 16), "f": bytes_of(7, 32, dtype=ml_dtypes.int4), "s": np.abs(random(7, 2)), "z": bytes_of(7, 1)
    }  # fmt: skip
    agree(held(graph(text, 21), arrays), {"i": np.array([0, 6, 3, -1])})
