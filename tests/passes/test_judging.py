"""Plans measured against the original."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from remove_one import RemoveOne

from burnish.backends.ort.session import executor
from burnish.frontends import load
from burnish.ir.errors import InputError
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


@pytest.mark.parametrize("name", ["accuracy", "agreement", "divergence"])
def test_nothing_is_measured_against_what_is_no_number(name: str) -> None:
    """Integers hold no NaN: a model on integers would be right where the original is not."""
    model = Pipeline(NORMAL_FORM).rewrite(load(DEMO / "digits_resnet.onnx")).model
    images = np.zeros((2, 1, 8, 8), np.float32)
    images[1, 0, :4] = np.inf
    samples = [Sample(f"s{i}", {"image": one[None]}, np.zeros(1, np.int64)) for i, one in enumerate(images)]
    with pytest.raises(InputError, match="output `logits` of the original holds NaN") as error:
        Judged(model, samples, measure(name, model, samples).measure, executor())
    assert error.value.place == "sample `s1`" and error.value.exit_code == 2
