"""Plans measured against the original."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from remove_one import RemoveOne

from burnish.backends.ort.session import executor
from burnish.frontends import load
from burnish.ir.samples import Sample
from burnish.passes.judging import Judged
from burnish.passes.measure_choice import measure
from burnish.passes.pipeline import Pipeline
from burnish.passes.recipes import NORMAL_FORM

DEMO = Path(__file__).resolve().parents[2] / "tools" / "demo"


def test_edits_that_cannot_be_made_together_lose_everything_and_end_no_search() -> None:
    model = Pipeline(NORMAL_FORM).rewrite(load(DEMO / "digits_resnet.onnx")).model
    images = np.random.default_rng(0).random((4, 1, 8, 8), np.float32)
    samples = [Sample(f"s{i}", {"image": one[None]}) for i, one in enumerate(images)]
    one = RemoveOne()
    judged = Judged(model, samples, measure("agreement", model).measure, executor(), [one])
    assert judged([]).drop == 0
    assert judged([one.edit_out("block 0")]).drop == float("inf")
