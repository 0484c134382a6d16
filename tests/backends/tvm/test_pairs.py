"""A product with two factors is one kernel that keeps the middle to itself."""

from __future__ import annotations

import re
from typing import Any

import onnx_ir as oir
import pytest
from compiled_operators import agree, graph, held, random

pytest.importorskip("tvm")


def _fused(model: oir.Model) -> tuple[set[str], int]:
    """The blocks that compute in a model's kernels, and how many of these get a schedule."""
    from tvm import tirx

    from burnish.backends.tvm import compiling
    from burnish.backends.tvm.lowering import lower
    from burnish.backends.tvm.target import parse

    target = parse("llvm")
    module = compiling.fused(lower(model).module, target)
    found: set[str] = set()
    for one in module.functions.values():
        if isinstance(one, tirx.PrimFunc):
            blocks = re.findall(r'sblock\("(\w+)"\)', one.script())
            found.update(blocks)
    after: Any = compiling.scheduled(module, target).functions.values()
    scheduled = sum(bool(one.attrs and "tirx.is_scheduled" in one.attrs) for one in after)
    return found - {"root", "T_reshape"}, scheduled


@pytest.mark.parametrize("rows", [1, 6, 67, "n"])
def test_the_middle_is_not_written(rows: int | str) -> None:
    """With a bias and a function behind it, without, with leading axes, and as Gemm."""
    text = f"""g (float[{rows}, 37] x, float[2, {rows}, 37] z) => (float[{rows}, 48] y, float[2, {rows}, 48] b,
        float[{rows}, 48] g) {{
        m = MatMul(x, a)  p = MatMul(m, c)  q = Add(p, d)  y = Relu(q)
        k = MatMul(z, a)  b = MatMul(k, c)
        h = Gemm(x, a)  g = Gemm(h, c, d) }}"""
    text = text.replace("z)", "z, float[37, 16] a, float[16, 48] c, float[48] d)", 1)
    model = held(graph(text), {"a": random(37, 16), "c": random(16, 48), "d": random(48)})
    many = (1, 5, 130) if rows == "n" else (rows,)
    agree(model, *({"x": random(n, 37), "z": random(2, n, 37)} for n in many))
    blocks, scheduled = _fused(model)
    assert {"matmul", "middle", "bias"} < blocks and scheduled == 3


def test_other_products_stay_two_kernels() -> None:
    """Odd sizes, a middle that is read twice, that has a bias or a function behind it, that is wider than the ends."""
    text = """g (float[n, 37] x, float[37, 15] a, float[15, 48] c, float[37, 16] e, float[16, 48] f, float[16] s,
        float[37, 64] v, float[64, 48] w) => (float[n, 48] y1, float[n, 16] m2, float[n, 48] y2, float[n, 48] y3,
        float[n, 48] y4, float[n, 48] y5) {
        m1 = MatMul(x, a)  y1 = MatMul(m1, c)
        r2 = MatMul(x, e)  m2 = Neg(r2)  y2 = MatMul(r2, f)
        m3 = MatMul(x, e)  t3 = Add(m3, s)  y3 = MatMul(t3, f)
        m4 = MatMul(x, e)  t4 = Relu(m4)  y4 = MatMul(t4, f)
        m5 = MatMul(x, v)  y5 = MatMul(m5, w) }"""
    sizes = {"a": (37, 15), "c": (15, 48), "e": (37, 16), "f": (16, 48), "s": (16,), "v": (37, 64), "w": (64, 48)}
    model = held(graph(text), {name: random(*size) for name, size in sizes.items()})
    agree(model, {"x": random(5, 37)})
    blocks, scheduled = _fused(model)
    assert "middle" not in blocks and scheduled == 0


def test_without_tuning_pairs_are_tried_alone() -> None:
    from burnish.backends.tvm.pieces import Pieces
    from burnish.ir.inference import Inference

    text = """g (float[n, 64] x, float[64, 16] a, float[16, 48] c, float[48, 48] o) => (float[n, 48] y) {
        m = MatMul(x, a)  p = MatMul(m, c)  s = Softmax(p)  y = MatMul(s, o) }"""
    model = held(graph(text), {"a": random(64, 16), "c": random(16, 48), "o": random(48, 48)})
    found = Pieces(model, Inference(model)).light(set(model.graph))
    assert [[node.outputs[0].name for node in one] for one in found] == [["m", "p"]]
