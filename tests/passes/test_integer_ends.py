"""How edits that round values are timed: without the conversions that vanish between neighbours."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx_ir as oir
import pytest
from integer_models import GATED, RESIDUAL, kernels, model_of, proposed, samples_of
from laws import OrtRunner

from burnish.backends.ort.observe import OrtObserver
from burnish.ir.text import text
from burnish.passes import latency, lossy
from burnish.passes.difference import change
from burnish.passes.latency import Work
from burnish.passes.lossy import Edit


class Kept:
    """A timer that keeps what it is to time."""

    def __init__(self) -> None:
        self.works: list[Work] = []

    def __call__(self, first: Work, others: Sequence[Work]) -> list[float | str]:
        self.works += [first, *others]
        return [1.0 for _ in (first, *others)]


def parts(model: oir.Model, edit: Edit) -> list[Work]:
    """What is timed of one edit: before and after."""
    one, _, _ = proposed(model, samples_of(model, 2))
    timer = Kept()
    latency.timed(model, [edit], [one], timer, OrtObserver(model), samples_of(model)[0].feeds)
    return timer.works


def test_a_convolution_between_others_is_timed_on_integers_alone(tmp_path: Path) -> None:
    model = model_of(RESIDUAL)
    _, edits, _ = proposed(model, samples_of(model))
    before, after = parts(model, edits[1])
    assert [node.op_type for node in before.model.graph] == ["Conv", "Relu"]
    (given,), (array,) = after.model.graph.inputs, after.feeds.values()
    assert given.dtype == oir.DataType.UINT8 and array.dtype == np.uint8 and array.shape == (2, 16, 16, 8)
    assert [value.dtype for value in after.model.graph.outputs] == [oir.DataType.UINT8]
    assert set(kernels(after.model, tmp_path)) == {"QLinearConv"}
    runner = OrtRunner(after.model, optimize=True)
    assert [one.shape for one in runner.run(after.feeds).values()] == [(2, 16, 16, 8)]


@pytest.mark.parametrize("source", [RESIDUAL, GATED], ids=["residual", "gated"])
def test_the_ends_of_the_model_are_converted(source: str) -> None:
    model = model_of(source)
    _, edits, _ = proposed(model, samples_of(model))
    assert "x" not in edits[0].unconverted
    first, last = (parts(model, edit)[-1].model.graph for edit in (edits[0], edits[-1]))
    assert [value.dtype for value in first.inputs] == [oir.DataType.FLOAT]
    assert [value.dtype for value in last.outputs] == [oir.DataType.FLOAT]


def test_a_node_between_new_ones_only_is_on_both_sides() -> None:
    model = model_of(RESIDUAL)
    one, edits, _ = proposed(model, samples_of(model))
    found = change(model, lossy.apply(model, edits[:1], [one])[0])
    assert found.removed is not None and found.added is not None
    assert "Clip(" in text(found.removed.model) and "Clip(" in text(found.added.model)
