"""Fused attention keeps the meaning of every mask: a block in three spellings, under every target and opset."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as oir
import pytest
from golden import parse_graph
from laws import OrtRunner, rewrite

from burnish.backends.reference.runner import ReferenceRunner
from burnish.passes.exact.fuse_attention import FuseAttention

BATCH, LENGTH = 2, 6
LOWEST = -3.4028234663852886e38

EAGER = "a = MatMul (q2, k2)  b = Mul (a, c)  d = Add (b, m)  p = Softmax <axis = -1> (d)"
SDPA = """r = Sqrt (c)  q3 = Mul (q2, r)  k3 = Mul (k2, r)  a = MatMul (q3, k3)  d = Add (a, m)
  e = Softmax <axis = -1> (d)  n = IsNaN (e)  p = Where (n, zero, e)"""
CHOSEN = "a = MatMul (q2, k2)  b = Mul (a, c)  d = Where (keep, b, low)  p = Softmax <axis = -1> (d)"
SPELLINGS = {"eager": EAGER, "sdpa": SDPA, "chosen": CHOSEN}


def masks() -> dict[str, np.ndarray]:
    """int64 [batch, keys] by kind."""
    found = {kind: np.ones((BATCH, LENGTH), np.int64) for kind in ("ones", "left", "right", "holes", "nothing")}
    found["left"][0, :3] = 0
    found["right"][0, 4:] = 0
    found["holes"][0, 1::2] = 0
    found["holes"][1, 2] = 0
    found["nothing"][0] = 0
    return found


def block(spelling: str, low: float, opset: int, rows: str) -> oir.Model:
    """Attention over projections of x, the scores masked by an int64 mask; `rows` is S or 1."""
    expand = "keep = Expand (k0, full)" if rows == "S" else "keep = Identity (k0)"
    source = f"""<opset_import: ["": {opset}]>
g (float[B,S,8] x, int64[B,S] mask) => (float[B,S,8] y)
<float[8,8] wq, float[8,8] wk, float[8,8] wv, float c = {{0.5}}, float zero = {{0.0}}, float low = {{{low}}},
 int64 none = {{0}}, int64[4] sh = {{0, 0, 2, 4}}, int64[3] so = {{0, 0, 8}},
 int64[2] axes = {{1, 2}}, int64[1] one = {{1}}>
{{
  q0 = MatMul (x, wq)  k00 = MatMul (x, wk)  v0 = MatMul (x, wv)
  q1 = Reshape (q0, sh)  q2 = Transpose <perm = [0, 2, 1, 3]> (q1)
  k1 = Reshape (k00, sh)  k2 = Transpose <perm = [0, 2, 3, 1]> (k1)
  v1 = Reshape (v0, sh)  v2 = Transpose <perm = [0, 2, 1, 3]> (v1)
  allowed = Greater (mask, none)  k0 = Unsqueeze (allowed, axes)
  length = Shape <start = 1, end = 2> (x)  full = Concat <axis = 0> (one, one, length, one)
  {expand}
  m = Where (keep, zero, low)
  {SPELLINGS[spelling]}
  o = MatMul (p, v2)
  o1 = Transpose <perm = [0, 2, 1, 3]> (o)  y = Reshape (o1, so)
}}"""
    proto = parse_graph(source)
    inferred = onnx.shape_inference.infer_shapes(proto, strict_mode=True, data_prop=True)
    return oir.from_proto(inferred)


CASES = [
    (spelling, low, opset, rows, target)
    for spelling in SPELLINGS
    for low in (LOWEST, float("-inf"), -1e9)
    for rows in ("S", "1")
    for opset, target in ((17, "ort-cpu"), (17, "ort-cuda"), (23, "onnx"), (23, "ort-cpu"), (23, "ort-cuda"))
    if not (spelling == "chosen" and low == -1e9)
]


@pytest.mark.parametrize(("spelling", "low", "opset", "rows", "target"), CASES)
def test_every_mask_means_the_same(spelling: str, low: float, opset: int, rows: str, target: str) -> None:
    """Fused or refused with a reason, the outputs agree on every mask, NaN for NaN, in ONNX Runtime and in float64."""
    before = block(spelling, low, opset, rows)
    after, outcome = rewrite(FuseAttention(target=target, slower=True), before)  # type: ignore[arg-type]
    refused = low == float("-inf") and spelling != "sdpa" and opset == 23 and target != "ort-cuda"
    assert outcome.rewritten == (0 if refused else 1), outcome.skipped
    x = np.random.default_rng(7).standard_normal((BATCH, LENGTH, 8)).astype(np.float32) * 3
    for optimize in (False, True):
        old, new = OrtRunner(before, optimize), OrtRunner(after, optimize)
        for kind, mask in masks().items():
            feeds = {"x": x, "mask": mask}
            expected, found = old.run(feeds)["y"], new.run(feeds)["y"]
            np.testing.assert_allclose(found, expected, rtol=2e-5, atol=2e-6, err_msg=kind, equal_nan=True)
    if low == float("-inf") and spelling != "sdpa":
        return
    for kind, mask in masks().items():
        feeds = {"x": x, "mask": mask}
        exact = [np.asarray(ReferenceRunner(model).run(feeds)["y"], np.float64) for model in (before, after)]
        np.testing.assert_allclose(exact[1], exact[0], rtol=1e-9, atol=1e-9, err_msg=kind)
