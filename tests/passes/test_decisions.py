"""A run that rounds layers before a decision inside the model says so; how models end is no matter."""

from __future__ import annotations

import pytest
from integer_models import model_of

from burnish.passes import catalog, decisions
from burnish.passes.base import Outcome
from burnish.passes.lossy import LossyPass

WHOLE = """g (float[N, 8, 8, 8] x) => ({outputs}) <float[8, 8, 3, 3] a, float[8, 8, 3, 3] b, float[8, 8, 3, 3] c,
    float zero = {{0.0}}, float[12, 8] codes, float[8, 8] w, int64[1] k = {{1}}> {{
  p = Conv <pads = [1, 1, 1, 1]> (x, a)
  q = Conv <pads = [1, 1, 1, 1]> (p, b)
  {body}
}}"""

Y = "float[N, 8, 8, 8] y"
LAST = "y = Conv <pads = [1, 1, 1, 1]> (t, c)"


@pytest.mark.parametrize(
    ("outputs", "body", "told"),
    [
        (Y, f"t = Round (q) {LAST}", {"Round": 2}),
        (Y, f"s = Sign (q) f = Floor (s) t = Add (s, f) {LAST}", {"Sign": 2}),
        (Y, f"m = Greater (q, zero) t = Where (m, x, zero) {LAST}", {"Greater": 2}),
        (Y, f"m = Greater (q, zero) t = Where (m, p, zero) {LAST}", {"Greater": 1}),
        (Y, f"i = Cast <to = 7> (q) t = Cast <to = 1> (i) {LAST}", {"Cast": 2}),
        (Y, f"r = Round (q) t = Add (r, q) {LAST}", {}),
        (Y, f"t = Cast <to = 1> (q) {LAST}", {}),
        (Y, "y = Round (q)", {}),
        ("int64[N, 1, 8, 8] y", "y = ArgMax <axis = 1> (q)", {}),
        ("float[N, 1, 8, 8] y", "i = ArgMax <axis = 1> (q) y = Cast <to = 1> (i)", {}),
        ("float[N, 1, 8, 8] y, int64[N, 1, 8, 8] i", "y, i = TopK <axis = 1> (q, k)", {}),
        ("float[N, 1, 8, 8, 8] y", "i = ArgMax <axis = 1> (q) h = Gather (codes, i) y = MatMul (h, w)", {"ArgMax": 2}),
        (
            "float[N, 1, 8, 8, 8] y",
            "v, i = TopK <axis = 1> (q, k) h = Gather (codes, i) y = MatMul (h, w)",
            {"TopK": 2},
        ),
    ],
)
def test_layers_before_a_decision_between_layers_are_told(outputs: str, body: str, told: dict[str, int]) -> None:
    model = model_of(WHOLE.format(outputs=outputs, body=body))
    (one,) = catalog.parse("quantize-weights{bits=8,convolutions=true,rounding=mse,embeddings=false}")
    assert isinstance(one, LossyPass)
    edits = one.asked(model, Outcome(""))
    assert len(edits) >= 2
    found = decisions.notes(model, edits)
    assert {note.split("`")[1]: count for note, count in found.items()} == told
