"""Weights in few bits inside branches: ONNX Runtime multiplies what is stored."""

from __future__ import annotations

import numpy as np
import onnx_ir as oir
import pytest
from golden import parse_graph, prepare
from laws import OrtRunner

from burnish.ir.walk import walk
from burnish.passes import catalog, lossy
from burnish.passes.base import Outcome
from burnish.passes.lossy import LossyPass

SOURCE = """
g (bool c, KIND[N, 64] x) => (KIND[N, 64] y) <KIND[64, 64] v, KIND[64, 64] w> {
  y = If (c) <
    then_branch = a () => (KIND[N, 64] p) { s = Sigmoid (x)  t = MatMul (s, v)  u = Sigmoid (t)  p = MatMul (u, w) },
    else_branch = b () => (KIND[N, 64] q) { q = Neg (x) }
  >
}"""


@pytest.mark.parametrize("kind", ["float", "float16"])
@pytest.mark.parametrize("activations", ["int8", "float"])
@pytest.mark.parametrize("bits", [4, 8])
def test_what_is_stored_in_a_branch_is_what_runs(kind: str, activations: str, bits: int) -> None:
    """Sigmoids have no kernel for halves: ONNX Runtime puts casts around them, and on scales where it likes to."""
    one = catalog.make("quantize-weights", {"bits": bits, "activations": activations})
    assert isinstance(one, LossyPass)
    model = prepare(parse_graph(SOURCE.replace("KIND", kind)), one)
    edits = one.asked(model, Outcome(""))
    after = lossy.apply(model, edits, [one])[0]
    left = {node.op_type for node in walk(after)} & {"MatMul", "MatMulNBits"}
    assert left == {"MatMul" if (kind, activations) == ("float16", "int8") else "MatMulNBits"}
    x = np.random.default_rng(0).standard_normal((4, 64)).astype(oir.DataType[kind.upper()].numpy())
    found, wanted = (
        OrtRunner(each, optimize=True).run({"c": np.array(True), "x": x})["y"].astype(float) for each in (after, model)
    )
    assert np.linalg.norm(found - wanted) < (0.15 if bits == 4 else 0.02) * np.linalg.norm(wanted)
