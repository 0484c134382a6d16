"""How edits that round values are timed: without the conversions that vanish between neighbours."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx_ir as oir
import pytest
from integer_models import GATED, HARD, RESIDUAL, kernels, model_of, proposed, samples_of
from laws import OrtRunner

from burnish.backends.ort.kernel_times import KernelTimes
from burnish.backends.ort.observe import OrtObserver
from burnish.ir.errors import InputError
from burnish.ir.text import text
from burnish.ir.walk import walk
from burnish.passes import latency, lossy
from burnish.passes.base import Outcome
from burnish.passes.budget import Budget, budget
from burnish.passes.difference import change
from burnish.passes.integer_flow import flow, regions
from burnish.passes.latency import Work
from burnish.passes.layers import layers
from burnish.passes.likeness import Likeness
from burnish.passes.lossy import Edit
from burnish.passes.score_store import Store
from burnish.passes.search import Judgement, Search
from burnish.tools import lossy_scores
from burnish.tools.lossy_context import context_for
from burnish.tools.lossy_times import WholeTimes


class Kept:
    """A timer that keeps what it is to time."""

    def __init__(self) -> None:
        self.works: list[Work] = []

    def __call__(self, first: Work, others: Sequence[Work]) -> list[float | str]:
        self.works += [first, *others]
        return [1.0 for _ in (first, *others)]


def parts(model: oir.Model, edit: Edit) -> list[Work]:
    """What is timed of one edit: before, after without conversions, and with each of them."""
    one, _, _ = proposed(model, samples_of(model, 2))
    timer = Kept()
    latency.timed(model, [edit], [one], timer, OrtObserver(model), samples_of(model)[0].feeds)
    return timer.works


def test_a_convolution_between_others_is_timed_on_integers_alone(tmp_path: Path) -> None:
    model = model_of(RESIDUAL)
    _, edits, _ = proposed(model, samples_of(model))
    before, after, *_ = parts(model, edits[1])
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
    first, last = (parts(model, edit)[1].model.graph for edit in (edits[0], edits[-1]))
    assert [value.dtype for value in first.inputs] == [oir.DataType.FLOAT]
    assert [value.dtype for value in last.outputs] == [oir.DataType.FLOAT]


ROW = """g (float[1, 8, 6, 6] x) => (float[1, 8, 6, 6] y)
<float[8, 8, 1, 1] w0, float[8, 8, 1, 1] w1, float[8, 8, 1, 1] w2, float[8, 8, 1, 1] w3> {
  c0 = Conv (x, w0)  r0 = Relu (c0)  c1 = Conv (r0, w1)  r1 = Relu (c1)
  c2 = Conv (r1, w2)  r2 = Relu (c2)  y = Conv (r2, w3)
}"""


def priced(first: Work, others: Sequence[Work]) -> list[float | str]:
    """10 for a convolution, 3 on integers, and 4 for each of its ends that is converted."""

    def seconds(work: Work) -> float:
        (node,) = (node for node in work.model.graph if node.op_type == "Conv")
        above = node.inputs[0]
        if above is None or above.producer() is None:
            return 10.0
        ends = (*work.model.graph.inputs, *work.model.graph.outputs)
        return 3.0 + 4.0 * sum(value.dtype == oir.DataType.FLOAT for value in ends)

    return [seconds(work) for work in (first, *others)]


@pytest.mark.parametrize(("room", "count", "saved"), [(0.01, 0, 0.0), (0.02, 2, 6.0), (0.03, 3, 13.0), (0.9, 4, 20.0)])
def test_layers_that_pay_only_beside_each_other_are_found(room: float, count: int, saved: float) -> None:
    model = model_of(ROW)
    one, edits, _ = proposed(model, samples_of(model))
    found = latency.timed(model, edits, [one], priced, OrtObserver(model), samples_of(model)[0].feeds)
    quick = latency.faster(found)
    seconds = lossy_scores.saving(Budget(objective="latency"))
    assert len(quick) == 4 and all(seconds(edit) < 0 < (edit.savings.seconds or 0) for edit in quick)

    class Judge:
        original = 1.0

        def __call__(self, chosen: Sequence[Edit]) -> Judgement:
            return Judgement(1 - 0.01 * len(chosen), 0.01 * len(chosen), 0.0)

    errors = {edit.key: 1.0 for edit in quick}
    limits = budget(max_drop=room + 1e-9, objective="latency")
    search = Search(quick, errors, seconds, 40.0, limits, Judge(), Judge(), joint=found.together)
    plan = search.run().plan
    keys = [edit.key for edit in edits]
    places = [keys.index(edit.key) for edit in plan.edits]
    assert (len(places), plan.saving) == (count, saved)
    assert all(after == before + 1 for before, after in itertools.pairwise(places))
    edited = lossy.apply(model, plan.edits, [one])[0]
    assert len(walk(edited, "QuantizeLinear")) == count + bool(count)


def chain() -> oir.Model:
    """24 convolutions with names so that the order of values differs from layer to layer."""
    convolutions = [
        f"  {'z' if at % 2 else 'a'}{at} = Conv ({'x' if at == 0 else f'r{at - 1}'}, w{at})" for at in range(24)
    ]
    relus = [f"  {f'r{at}' if at < 23 else 'y'} = Relu ({'z' if at % 2 else 'a'}{at})" for at in range(24)]
    weights = ", ".join(f"float[8, 8, 1, 1] w{at}" for at in range(24))
    body = "\n".join(f"{one}\n{two}" for one, two in zip(convolutions, relus, strict=True))
    return model_of(f"g (float[1, 8, 6, 6] x) => (float[1, 8, 6, 6] y)\n<{weights}> {{\n{body}\n}}")


def test_what_is_looked_at_for_a_layer_does_not_grow_with_the_model() -> None:
    model = chain()
    parts = regions(model.graph, layers(model))
    assert len(parts) == 25 and all(len(nodes) <= 2 >= len(own) for nodes, own in parts)


@pytest.mark.parametrize("source", [RESIDUAL, GATED, HARD], ids=["residual", "gated", "hard"])
def test_a_value_is_not_converted_where_the_layers_that_it_names_alone_are_on_integers(source: str) -> None:
    model = model_of(source)
    one, edits, _ = proposed(model, samples_of(model))
    found = layers(model)
    for edit in edits:
        for value, sites in edit.unconverted.items():
            some = [found[name] for name in (edit.site, *sites)]
            assert value in flow(model.graph, some).unconverted(found[edit.site])
    untimed = one.propose(model, context_for(model, samples_of(model)), Outcome(""))
    assert [edit.site for edit in untimed] == [edit.site for edit in edits]
    assert not any(edit.unconverted for edit in untimed)


def test_like_layers_are_looked_at_once_with_what_they_convert(monkeypatch: pytest.MonkeyPatch) -> None:
    model = chain()
    one, edits, _ = proposed(model, samples_of(model))
    given = (model, edits, [one], priced, OrtObserver(model), samples_of(model)[0].feeds)
    likeness = Likeness(model)
    assert len({likeness.of(edit) for edit in edits}) < 20
    found = latency.timed(*given)
    monkeypatch.setattr(Likeness, "of", lambda self, edit: edit.key)
    each = latency.timed(*given)
    assert [edit.savings for edit in found.edits] == [edit.savings for edit in each.edits]
    assert found.together == each.together and len(found.together) == 23


def test_layers_are_not_like_where_a_constant_beside_them_makes_other_nodes() -> None:
    """Integers are made behind a Clip from 0 on, and before one from below 0 on."""
    layers = "\n".join(
        f"  c{at} = Conv ({'x' if at == 0 else f't{at - 1}'}, w{at})\n  r{at} = Clip (c{at}, l{at}, h{at})\n"
        f"  {f't{at}' if at < 15 else 'y'} = Tanh (r{at})"
        for at in range(16)
    )
    held = ", ".join(f"float[8, 8, 1, 1] w{at}, float l{at}, float h{at}" for at in range(16))
    model = model_of(f"g (float[1, 8, 6, 6] x) => (float[1, 8, 6, 6] y)\n<{held}> {{\n{layers}\n}}")
    for at in range(16):
        for name, number in ((f"l{at}", -6 * (at % 2)), (f"h{at}", 6)):
            model.graph.initializers[name].const_value = oir.tensor(np.array(number, np.float32), name=name)
    one, edits, _ = proposed(model, samples_of(model))
    made = [walk(lossy.apply(model, [edit], [one])[0], "QuantizeLinear") for edit in edits[6:9]]
    before = [[node.inputs[0].producer().op_type for node in some] for some in made]  # type: ignore[union-attr]
    kinds = [Likeness(model).of(edit) for edit in edits[6:9]]
    assert before == [["Tanh", "Clip"], ["Tanh", "Conv"], ["Tanh", "Clip"]]
    assert kinds[0] == kinds[2] != kinds[1]


def test_whole_models_are_timed_beside_the_one_without_edits_and_not_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = model_of(ROW)
    one, edits, _ = proposed(model, samples_of(model))

    def lower(made: oir.Model) -> oir.Model:
        if len(walk(made, "QuantizeLinear")) == 2:
            raise InputError("two are not lowered")
        return made

    given = (model, [one], samples_of(model)[0], lower, "ort-cpu", Store(tmp_path / "scores.sqlite"))
    found = WholeTimes(*given)([[], edits[:1], edits, edits[1:]])
    nothing, refused, *saved = found
    assert nothing == 0.0 and refused == -math.inf and all(map(math.isfinite, saved))
    monkeypatch.setattr(KernelTimes, "_measure", None)
    assert WholeTimes(*given)([[], edits[:1], edits, edits[1:]]) == found


def test_what_takes_no_conversion_is_named_with_all_that_this_takes(tmp_path: Path) -> None:
    """The three layers that keep the residual sum on integers leave one conversion before them and one behind."""
    model = model_of(RESIDUAL)
    one, edits, _ = proposed(model, samples_of(model))
    by_site = {edit.site: edit for edit in edits}
    beside = by_site["Conv_0"].unconverted["r0"]
    assert beside == {"Conv_2", "Conv_4"} == by_site["Conv_10"].unconverted["k"]
    found = kernels(lossy.apply(model, [by_site[site] for site in sorted(beside | {"Conv_0"})], [one])[0], tmp_path)
    assert (found["QLinearConv"], found["QuantizeLinear"], found["DequantizeLinear"]) == (3, 1, 1)


def test_a_node_between_new_ones_only_is_on_both_sides() -> None:
    model = model_of(RESIDUAL)
    one, edits, _ = proposed(model, samples_of(model))
    found = change(model, lossy.apply(model, edits[:1], [one])[0])
    assert found.removed is not None and found.added is not None
    assert "Clip(" in text(found.removed.model) and "Clip(" in text(found.added.model)
