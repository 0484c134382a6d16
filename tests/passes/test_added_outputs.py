"""A convolution that the model gives out and adds to something: however it is stored, both outputs are right."""

from __future__ import annotations

import numpy as np
import pytest
from integer_models import model_of
from lossy_laws import check_edits, proposals

from burnish.backends.ort.session import executor
from burnish.ir.samples import Sample
from burnish.passes import catalog, lossy
from burnish.passes.base import Outcome
from burnish.passes.lossy import LossyPass
from burnish.tools.lossy_context import context_for

WHOLE = """g (float[N, 8, 6, 6] x) => (float[N, 8, 6, 6] y, float[N, 8, 6, 6] t)
    <float[8, 8, 3, 3] v, float[8, 8, 3, 3] w, float[8] b> {{
  a = Conv <pads = [1, 1, 1, 1]> (x, v, b)
  t = Conv <pads = [1, 1, 1, 1]> (a, w, b)
  {added}
}}"""


@pytest.mark.parametrize("added", ["y = Add (t, x)", "s = Add (a, t) y = Relu (s)"])
@pytest.mark.parametrize(
    ("spec", "most"),
    [
        ("quantize-static", 0.03),
        ("quantize-static{per_channel=false,rounding=nearest}", 0.03),
        ("quantize-dynamic{convolutions=true}", 0.03),
        ("cast-half", 1e-3),
        ("cast-half{stored=true}", 1e-3),
    ],
)
def test_both_outputs_are_right(spec: str, most: float, added: str) -> None:
    model = model_of(WHOLE.format(added=added))
    rng = np.random.default_rng(0)
    samples = [Sample(str(i), {"x": rng.standard_normal((1, 8, 6, 6)).astype(np.float32)}) for i in range(4)]
    (one,) = catalog.parse(spec)
    assert isinstance(one, LossyPass)
    check_edits(one, model, *proposals(one, model))
    edits = one.propose(model, context_for(model, samples), Outcome(""))
    assert [edit.site for edit in edits] == ["Conv_0", "Conv_1"]
    for chosen in (edits, edits[:1], edits[1:]):
        after, _ = lossy.apply(model, chosen, [one])
        runners = [executor()(model), executor()(after), executor(level="off")(after)]
        wanted, *found = (runner.run(samples[0].feeds) for runner in runners)
        for name, array in wanted.items():
            for other in found:
                assert np.linalg.norm(other[name] - array) < most * np.linalg.norm(array)
