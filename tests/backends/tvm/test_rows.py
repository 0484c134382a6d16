"""Weighted sums of rows that indices pick are one kernel that stores no picked row."""

from __future__ import annotations

import re

import numpy as np
import onnx_ir as oir
import pytest
from compiled_operators import agree, graph, held, random

pytest.importorskip("tvm")

_PICKED = np.random.default_rng(3)


def _kernels(model: oir.Model) -> tuple[list[str], int]:
    """The blocks of a model's kernels before they are scheduled, and how many kernels have a schedule after."""
    from tvm import tirx

    from burnish.backends.tvm import compiling
    from burnish.backends.tvm.lowering import lower
    from burnish.backends.tvm.target import parse

    target = parse("llvm")
    module = compiling.fused(lower(model).module, target)
    kernels = [one for one in module.functions.values() if isinstance(one, tirx.PrimFunc)]
    found = [name for one in kernels for name in re.findall(r'sblock\("(\w+)"\)', one.script())]
    after = compiling.scheduled(module, target).functions.values()
    return found, sum(bool(one.attrs and "tirx.is_scheduled" in one.attrs) for one in after)


def _indices(*shape: int) -> np.ndarray:
    return _PICKED.integers(-37, 37, shape)


@pytest.mark.parametrize("width", [48, 12, 19])
def test_picked_rows_are_not_stored(width: int) -> None:
    """Sums over one axis and over heads too, kept axes, a product of matrices; static and dynamic, negative indices."""
    text = f"""g (float[37, {width}] t, int64[n, 5] i, float[n, 5] w, int64[n, 2, 3] j, float[n, 2, 3, 1] v,
        float[n, 1, 5] m) => (float[n, {width}] a, float[n, 1, 1, {width}] b, float[n, 1, {width}] c) {{
        last = Constant<value = int64[1] {{-1}}>()  one = Constant<value = int64[1] {{-2}}>()
        two = Constant<value = int64[2] {{1, 2}}>()
        r = Gather<axis=0>(t, i)  u = Unsqueeze(w, last)  p = Mul(r, u)  e = ReduceSum<keepdims=0>(p, one)  a = Relu(e)
        s = Gather<axis=0>(t, j)  q = Mul(v, s)  b = ReduceSum<keepdims=1>(q, two)
        g = Gather<axis=0>(t, i)  c = MatMul(m, g) }}"""
    model = held(graph(text), {"t": random(37, width)})
    feeds = [
        {"i": _indices(n, 5), "w": random(n, 5), "j": _indices(n, 2, 3), "v": random(n, 2, 3, 1), "m": random(n, 1, 5)}
        for n in (1, 7)
    ]
    agree(model, *feeds)
    blocks, scheduled = _kernels(model)
    assert ("gather" in blocks) == (width == 19)
    assert blocks.count("bag") == scheduled == (0 if width == 19 else 3)


def test_halves_are_summed_in_float32() -> None:
    text = """g (float16[37, 16] t, int64[4, 5] i, float16[4, 5, 1] w) => (float16[4, 16] y) {
        one = Constant<value = int64[1] {1}>()
        r = Gather<axis=0>(t, i)  p = Mul(r, w)  y = ReduceSum<keepdims=0>(p, one) }"""
    model = held(graph(text), {"t": random(37, 16).astype(np.float16)})
    agree(model, {"i": _indices(4, 5), "w": random(4, 5, 1).astype(np.float16)})
    blocks, scheduled = _kernels(model)
    assert blocks.count("bag") == scheduled == 1 and "gather" not in blocks


def test_other_sums_keep_their_rows() -> None:
    """Rows that something else reads, weights of columns, sums over the columns, columns that are picked."""
    text = """g (float[37, 16] t, int64[4, 5] i, float[4, 5, 1] w, float[16] f, float[1, 1, 1] h)
        => (float[4, 16] a, float[4, 5, 16] ra, float[4, 16] b, float[4, 5] c, float[37, 4] d, float[4, 16] e) {
        one = Constant<value = int64[1] {1}>()  two = Constant<value = int64[1] {2}>()
        r = Gather<axis=0>(t, i)  p = Mul(r, w)  a = ReduceSum<keepdims=0>(p, one)  ra = Neg(r)
        r2 = Gather<axis=0>(t, i)  p2 = Mul(r2, f)  b = ReduceSum<keepdims=0>(p2, one)
        r3 = Gather<axis=0>(t, i)  p3 = Mul(r3, w)  c = ReduceSum<keepdims=0>(p3, two)
        i4 = Mod(i, two)  r4 = Gather<axis=1>(t, i4)  p4 = Mul(r4, h)  d = ReduceSum<keepdims=0>(p4, two)
        r5 = Gather<axis=0>(t, i)  p5 = Mul(r5, h)  e = ReduceSum<keepdims=0>(p5, one) }"""
    model = held(graph(text), {"t": random(37, 16), "f": random(16), "h": random(1, 1, 1)})
    agree(model, {"i": np.abs(_indices(4, 5)) % 37, "w": random(4, 5, 1)})
    assert "bag" not in _kernels(model)[0]
