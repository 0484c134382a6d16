"""What `check` says of real changes: each is named at the right place, and what changes nothing is not mentioned."""

from __future__ import annotations

import onnx
import onnx_ir as oir
import pytest

from burnish.tools.check.check import check
from burnish.tools.check.difference import Report, Verdict
from burnish.tools.check.take import Request, take
from burnish.tools.check.tolerances import Tolerances

BODY = """
<ir_version: 10, opset_import: ["": 20]>
g (float[N,4] x, float[N,4] y) => (float[N,4] z)
<float[4,4] w = {1,2,3,4, 0,1,0,1, 2,0,2,0, 1,1,1,2}, float[4] b = {0.5,0.25,-1,2}, float[4] g = {1,2,1,2}>
{
  [linear] a = MatMul (x, w)
  [bias] c = Add (a, b)
  [norm] d = LayerNormalization <axis = -1, epsilon = 0.00001> (c, g, b)
  [act] e = Relu (d)
  [gate] f = Mul (e, y)
  [sum] z = Add (f, x)
}
"""


def model(text: str) -> oir.Model:
    """A model of ONNX text."""
    proto = onnx.parser.parse_model(text)
    onnx.checker.check_model(proto)
    return oir.serde.deserialize_model(proto)


def report(
    old: str, new: str, tolerances: Tolerances | None = None, *, run: bool = True, at_hand: bool = False
) -> Report:
    """What check finds in the second of two models."""
    before = model(old)
    request = Request(run=run)
    return check(model(new), take(before, request), request, tolerances, before if at_hand else None)


def said(found: Report, verdict: Verdict = Verdict.REGRESSION) -> list[str]:
    """The sentences of one verdict."""
    return [one.message for one in found.differences if one.verdict is verdict]


@pytest.mark.parametrize(
    ("old", "new", "sentences"),
    [
        ("epsilon = 0.00001", "epsilon = 0.000001", [
            "`epsilon` of LayerNormalization `norm` (block 0) is now 1e-06, was 1e-05"]),
        ("Relu (d)", "Gelu (d)", ["block 0: Relu is now Gelu"]),
        ("Relu (d)", "LeakyRelu <alpha = 0.5> (d)", ["block 0: Relu is now LeakyRelu alpha=0.5"]),
        ("b = {0.5,0.25,-1,2}", "b = {0.5,0.25,-1,2.001}", [
            "the weights of Add `bias` (block 0) moved by about 4e-4 of their norm",
            "the weights of LayerNormalization `norm` (block 0) moved by about 3e-4 of their norm",
        ]),
        ("float[N,4] x", "float[2,4] x", ["input `x`: dimension `N` is now fixed at 2"]),
        ("Mul (e, y)", "Mul (e, e)", ["Mul `gate` (block 0) now reads Relu where it read `y`"]),
    ],
)  # fmt: skip
def test_says(old: str, new: str, sentences: list[str]) -> None:
    assert said(report(BODY, BODY.replace(old, new))) == sentences
