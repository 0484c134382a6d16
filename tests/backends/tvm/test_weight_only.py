"""Products with quantized weights are one kernel that unpacks them where they are multiplied."""

from __future__ import annotations

import re
from typing import Any

import ml_dtypes
import numpy as np
import onnx_ir as oir
import pytest
from compiled_operators import agree, bytes_of, graph, held, random

pytest.importorskip("tvm")


def _fused(model: oir.Model) -> tuple[Any, Any]:
    """A model's kernels before and after scheduling for a processor."""
    from burnish.backends.tvm import compiling
    from burnish.backends.tvm.lowering import lower
    from burnish.backends.tvm.target import parse

    target = parse("llvm")
    module = compiling.fused(lower(model).module, target)
    return module, compiling.scheduled(module, target)


def _scheduled(module: Any) -> int:
    return sum(bool(one.attrs and "tirx.is_scheduled" in one.attrs) for one in module.functions.values())


def _whole_weights(module: Any, elements: int) -> int:
    """Buffers in kernels that hold a whole weight, when each is as small as it can be."""
    import tvm
    from tvm import tirx
    from tvm.s_tir import transform

    steps = "LowerInitBlock PlanAndUpdateBufferAllocationLocation ConvertBlocksToOpaque CompactBufferAllocation".split()
    compacted = tvm.transform.Sequential([getattr(transform, one)() for one in steps])
    count = 0
    for function in module.functions.values():
        if isinstance(function, tirx.PrimFunc):
            text = compacted(tvm.IRModule({"main": function.without_attr("op_pattern")}))["main"].script()
            for shape in re.findall(r"alloc_buffer\((.*)\)", re.sub(r'"\w+"|int64', "", text)):
                count += int(np.prod([int(size) for size in re.findall(r"\d+", shape)])) == elements
    return count


def _weight(kind: str, rows: int, columns: int) -> dict[str, np.ndarray]:
    dtype = {"int8": np.int8, "uint8": np.uint8, "int4": ml_dtypes.int4, "uint4": ml_dtypes.uint4}[kind]
    return {"q": bytes_of(rows, columns, dtype=dtype)}


@pytest.mark.parametrize("rows", ["1", "6", "n"])
def test_weights_along_the_depth(rows: str) -> None:
    """Gemm with transB, MatMul behind a Transpose, a batch of sequences, MatMulNBits; scales of rows and of blocks."""
    text = f"""g (float[{rows}, 64] x, float[2, {rows}, 64] b, int8[12, 64] q, float[12] s, int4[12, 64] f,
        float[12, 2] fs, uint4[12, 64] u, uint4[12, 2] uz, float[12] c, uint8[12, 2, 16] w, float[24] ws)
        => (float[{rows}, 12] y, float[2, {rows}, 12] t, float[{rows}, 12] y4, float[{rows}, 12] yu,
        float[{rows}, 12] yw) {{
        d = DequantizeLinear<axis=0>(q, s)  y = Gemm<transB=1>(x, d, c)
        dt = Transpose<perm=[1, 0]>(d)  t = MatMul(b, dt)
        df = DequantizeLinear<axis=1, block_size=32>(f, fs)  g4 = Gemm<transB=1, alpha=0.5>(x, df)  y4 = Relu(g4)
        du = DequantizeLinear<axis=-1, block_size=32>(u, fs, uz)  yu = Gemm<transB=1>(x, du)
        yw = com.microsoft.MatMulNBits<K=64, N=12, bits=4, block_size=32>(x, w, ws) }}"""
    scale = lambda *shape: np.abs(random(*shape)) * 0.1 + 0.05  # noqa: E731
    arrays = _weight("int8", 12, 64) | {
        "s": scale(12), "f": bytes_of(12, 64, dtype=ml_dtypes.int4), "fs": scale(12, 2), "c": random(12),
        "u": bytes_of(12, 64, dtype=ml_dtypes.uint4), "uz": bytes_of(12, 2, dtype=ml_dtypes.uint4),
        "w": bytes_of(12, 2, 16, dtype=np.uint8), "ws": scale(24),
    }  # fmt: skip
    model = held(graph(text, 21), arrays)
    many = 5 if rows == "n" else int(rows)
    agree(model, {"x": random(many, 64), "b": random(2, many, 64)})
    before, after = _fused(model)
    assert _scheduled(before) == 0 and _scheduled(after) == 5
    assert _whole_weights(before, 12 * 64) == 5 and _whole_weights(after, 12 * 64) == 0


@pytest.mark.parametrize("rows", ["1", "7", "n"])
def test_weights_along_the_width(rows: str) -> None:
    """MatMul as it is written; a weight for the tensor, for columns, and for blocks of rows."""
    text = f"""g (float[{rows}, 24] x, int8[24, 96] q, float s, int8 z, float[96] sc, uint8[24, 96] u, float[3, 96] sb,
        uint8[3, 96] zb) => (float[{rows}, 96] y, float[{rows}, 96] yc, float[{rows}, 96] yb) {{
        d = DequantizeLinear(q, s, z)  y = MatMul(x, d)
        dc = DequantizeLinear<axis=1>(q, sc)  yc = MatMul(x, dc)
        db = DequantizeLinear<axis=0, block_size=8>(u, sb, zb)  yb = MatMul(x, db) }}"""
    arrays = _weight("int8", 24, 96) | {
        "s": np.float32(0.03), "z": np.int8(-3), "sc": np.abs(random(96)) + 0.1, "u": bytes_of(24, 96, dtype=np.uint8),
        "sb": np.abs(random(3, 96)) + 0.1, "zb": bytes_of(3, 96, dtype=np.uint8),
    }  # fmt: skip
    model = held(graph(text, 21), arrays)
    agree(model, {"x": random(5 if rows == "n" else int(rows), 24)})
    before, after = _fused(model)
    assert _scheduled(after) == 3
    assert _whole_weights(before, 24 * 96) == 3 and _whole_weights(after, 24 * 96) == 0


def test_odd_sizes_and_other_factors_stay_plain_loops() -> None:
    text = """g (float[n, 37] x, int8[37, 19] q, float[19] s, float[n, 19] a, float[19, 19] o)
        => (float[n, 19] y, float[n, 19] v, float[n, 19] p) {
        d = DequantizeLinear<axis=1>(q, s)  y = MatMul(x, d)
        do = DequantizeLinear<axis=1>(q, s)  two = MatMul(x, do)  v = Add(two, a)  p = MatMul(a, o) }"""
    model = held(graph(text, 21), _weight("int8", 37, 19) | {"s": np.abs(random(19)) + 0.1, "o": random(19, 19)})
    agree(model, {"x": random(3, 37), "a": random(3, 19)})
    _, after = _fused(model)
    assert _scheduled(after) == 0


def test_without_tuning_such_products_are_tried_alone() -> None:
    from burnish.backends.tvm.pieces import Pieces
    from burnish.ir.inference import Inference

    text = """g (float[n, 64] x, int8[64, 64] q, float[64] s, float[64, 64] o, uint8[64, 2, 16] w, float[128] ws)
        => (float[n, 64] y) { d = DequantizeLinear<axis=1>(q, s)  a = MatMul(x, d)  b = MatMul(a, o)  c = Softmax(b)
        y = com.microsoft.MatMulNBits<K=64, N=64, bits=4, block_size=32>(c, w, ws) }"""
    arrays = {"o": random(64, 64), "w": bytes_of(64, 2, 16), "ws": random(128), "s": random(64)}
    model = held(graph(text, 21), _weight("int8", 64, 64) | arrays)
    found = Pieces(model, Inference(model)).light(set(model.graph))
    assert [[node.op_type for node in one] for one in found] == [["DequantizeLinear", "MatMul"], ["MatMulNBits"]]
