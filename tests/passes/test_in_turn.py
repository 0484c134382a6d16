"""Convolutions that are rounded in turn make up for what those before them lost, where it holds on other samples."""

from __future__ import annotations

import tracemalloc
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import onnx_ir as oir
import pytest
from integer_models import model_of

from burnish.backends.ort.session import executor
from burnish.ir.samples import Sample
from burnish.ir.text import fingerprint
from burnish.passes import catalog, lossy
from burnish.passes.base import Outcome
from burnish.passes.in_turn import Both, in_turn
from burnish.passes.layers import layers
from burnish.passes.lossy import LossyPass
from burnish.passes.trying import Tried
from burnish.tools.lossy_context import context_for

TWO = """g (float[N, 6, 8, 8] x) => (float[N, 4, 6, 6] y) <float[12, 6, 1, 1] a, float[4, 12, 3, 3] b, float[4] c> {
  p = Conv (x, a)
  q = Relu (p)
  y = Conv (q, b, c)
}"""
"""Two convolutions; the second reads what the first computes."""

DEEP = """g (float[N, 8, 8, 8] x) => (float[N, 8, 8, 8] y)
    <float[24, 8, 1, 1] a, float[24, 1, 3, 3] b, float[8, 24, 1, 1] c, float[24, 8, 3, 3] d, float[8, 24, 1, 1] e,
    float[8] f> {
  p = Conv (x, a)
  q = Relu (p)
  r = Conv <pads = [1, 1, 1, 1], group = 24> (q, b)
  s = Relu (r)
  t = Conv (s, c)
  u = Conv <pads = [1, 1, 1, 1]> (t, d)
  v = Relu (u)
  y = Conv (v, e, f)
}"""


WIDE = """g (float[N, 48, 8, 8] x) => (float[N, 4, 6, 6] y) <float[48, 48, 1, 1] a, float[4, 48, 3, 3] b> {
  p = Conv (x, a)
  y = Conv (p, b)
}"""

BROAD = """g (float[N, 8, 112, 112] x) => (float[N, 8, 112, 112] y) <float[8, 8, 1, 1] a, float[8, 8, 1, 1] b> {
  p = Conv (x, a)
  y = Conv (p, b)
}"""
"""What its convolutions read takes more than a quarter of a MiB, and less than half."""


def pictures(count: int, seed: int, channels: int = 6) -> list[Sample]:
    """Smooth ones: neighbours are alike, so that positions are many and what they tell is little."""
    rng = np.random.default_rng(seed)
    rough = rng.standard_normal((count, 1, channels, 8, 8))
    return [Sample(f"{seed} {i}", {"x": one}) for i, one in enumerate(rough.cumsum(3).cumsum(4).astype(np.float32))]


def second(
    model: oir.Model, first: np.ndarray, count: int, centred: bool, samples: Sequence[Sample] = ()
) -> tuple[Both, np.ndarray]:
    """What the second of `TWO` reads, on some pictures, where the weight of the first is another; and its weight."""
    images = {name: layer for name, layer in layers(model).items() if layer.groups == 1}
    name = list(images)[-1]

    def make() -> oir.Model:
        made = model.clone()
        made.graph.initializers["a"].const_value = oir.tensor(first.astype(np.float32), name="a")
        return made

    context = context_for(model, samples or pictures(count, 0))
    found = in_turn(model, {name: images[name]}, context, 1 << 30, make, Outcome(""), {name} if centred else ())
    ((_, seen),) = found
    assert isinstance(seen, Both)
    return seen, images[name].weight()


def outputs(model: oir.Model, samples: Sequence[Sample]) -> np.ndarray:
    runner = executor()(model)
    found = np.concatenate([runner.run(sample.feeds)["y"] for sample in samples])
    runner.close()
    return found


def written(model: oir.Model, **weights: np.ndarray) -> oir.Model:
    made = model.clone()
    for name, array in weights.items():
        made.graph.initializers[name].const_value = oir.tensor(array.astype(np.float32), name=name)
    return made


@pytest.mark.parametrize("centred", [False, True])
def test_what_the_weights_can_undo_is_undone(centred: bool) -> None:
    model = model_of(TWO)
    exact = model.graph.initializers["a"].const_value.numpy()  # type: ignore[union-attr]
    seen, weight = second(model, 0.8 * exact, 12, centred)
    assert seen.damping < 1e-2
    bias = model.graph.initializers["c"].const_value.numpy()  # type: ignore[union-attr]
    moved = seen.target(weight)
    shift = seen.shift(weight, moved)
    assert (shift is None) is not centred
    found = written(model, a=0.8 * exact, b=moved, c=bias if shift is None else bias + shift)
    unseen = pictures(8, 1)
    wanted, after, before = (outputs(one, unseen) for one in (model, found, written(model, a=0.8 * exact)))
    assert np.linalg.norm(after - wanted) < 0.2 * np.linalg.norm(before - wanted)


@pytest.mark.parametrize("count", [2, 4, 32])
def test_no_move_is_made_that_other_samples_do_not_bear_out(count: int) -> None:
    model = model_of(TWO)
    exact = model.graph.initializers["a"].const_value.numpy()  # type: ignore[union-attr]
    rng = np.random.default_rng(0)
    first = exact + 0.02 * np.abs(exact).max() * rng.standard_normal(exact.shape)
    seen, weight = second(model, first, count, False)
    unseen = pictures(32, 1)
    wanted = outputs(model, unseen)
    errors = [
        np.linalg.norm(outputs(written(model, a=first, b=one.target(weight)), unseen) - wanted)
        for one in (seen, replace(seen, damping=np.inf), replace(seen, damping=1e-9))
    ]
    assert errors[0] <= 1.02 * errors[1] and errors[0] <= 1.1 * errors[2]


def made(model: oir.Model, samples: Sequence[Sample], searched: bool, spec: str = "quantize-static") -> oir.Model:
    (one,) = catalog.parse(spec)
    assert isinstance(one, LossyPass)
    edits = one.propose(model, replace(context_for(model, samples), searched=searched), Outcome(""))
    assert not searched or not any(name.startswith("shift ") for edit in edits for name in edit.payload)
    return lossy.apply(model, edits, [one])[0]


@pytest.mark.parametrize("bits", [7, 8])
def test_integers_in_turn_lose_no_more_than_at_once_and_are_the_same_each_time(bits: int) -> None:
    model, samples, unseen = model_of(DEEP), pictures(16, 0, 8), pictures(16, 1, 8)
    wanted, spec = outputs(model, unseen), f"quantize-static{{weight_bits={bits}}}"
    once, turned, again = (made(model, samples, searched, spec) for searched in (True, False, False))
    assert fingerprint(turned) == fingerprint(again)
    errors = [np.linalg.norm(outputs(one, unseen) - wanted) for one in (once, turned)]
    assert errors[1] < 1.02 * errors[0]


def test_a_bias_takes_up_what_outputs_are_off_in_the_mean() -> None:
    model = model_of(TWO)
    exact, bias = (model.graph.initializers[name].const_value.numpy() for name in "ac")  # type: ignore[union-attr]
    first = exact + 0.1 * np.abs(exact).max() * np.random.default_rng(0).standard_normal(exact.shape)
    seen, weight = second(model, first, 8, True)
    rounded = np.round(8 * weight) / 8
    shift = seen.shift(weight, rounded)
    samples = pictures(8, 0)
    wanted, after, left = (
        outputs(one, samples).mean((0, 2, 3))
        for one in (model, written(model, a=first, b=rounded, c=bias + shift), written(model, a=first, b=rounded))
    )
    assert np.abs(after - wanted).max() < 1e-3 * np.abs(left - wanted).max()


def test_what_is_the_same_everywhere_moves_nothing() -> None:
    model = model_of(TWO)
    exact = model.graph.initializers["a"].const_value.numpy()  # type: ignore[union-attr]
    same = [Sample(str(i), {"x": np.ones((1, 6, 8, 8), np.float32)}) for i in range(4)]
    seen, weight = second(model, 0.8 * exact, 0, True, same)
    assert np.allclose(seen.target(weight), weight, rtol=1e-2)


@pytest.mark.parametrize("count", [1, 2, 3])
def test_few_samples_leave_none_to_judge_by(count: int) -> None:
    assert not any("shift" in name for name in _payload(model_of(DEEP), pictures(count, 0, 8)))


def test_one_sample_has_no_halves() -> None:
    seen, _ = second(model_of(TWO), model_of(TWO).graph.initializers["a"].const_value.numpy(), 1, True)  # type: ignore[union-attr]
    assert seen.damping == 1e-3


def _payload(model: oir.Model, samples: Sequence[Sample]) -> set[str]:
    one = catalog.make("quantize-static")
    assert isinstance(one, LossyPass)
    return {name for edit in one.propose(model, context_for(model, samples), Outcome("")) for name in edit.payload}


@pytest.mark.parametrize("centred", [False, True])
def test_statistics_stay_within_the_limit(centred: bool) -> None:
    model = model_of(WIDE)
    name, layer = list(layers(model).items())[-1]
    context, centre = context_for(model, pictures(4, 0, 48)), {name} if centred else ()

    def seen(limit: int) -> type:
        ((_, found),) = in_turn(model, {name: layer}, context, limit, model.clone, Outcome(""), centre)  # type: ignore[arg-type]
        return type(found)

    kinds = {seen(1 << 40)}
    for limit in (20 << 20, 28 << 20, 36 << 20, 44 << 20):
        tracemalloc.start()
        kinds.add(seen(limit))
        most = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert most <= limit
    assert kinds == {Both, np.ndarray}


@pytest.mark.parametrize(("limit", "count"), [(1 << 30, 8), (3 * 4 * 4 * 6 * 6, 3), (1, 1)])
def test_versions_are_compared_on_as_many_samples_as_have_room(limit: int, count: int) -> None:
    model, samples = model_of(TWO), pictures(8, 0)
    other = written(model, c=np.ones(4))
    found = []
    for tried in (
        Tried(model, context_for(model, samples), limit=limit),
        Tried(model, context_for(model, samples[:count])),
    ):
        tried.run({"other": lambda: other})
        found.append(tried.value("other"))
    assert found[0] == found[1]


@pytest.mark.parametrize(
    "spec", ["quantize-static{memory=1}", "quantize-weights{bits=4,convolutions=true,rounding=gptq,memory=1}"]
)
def test_what_cannot_be_seen_twice_at_once_is_rounded_for_the_original(spec: str) -> None:
    model, rng, outcome = model_of(BROAD), np.random.default_rng(0), Outcome("")
    model.opset_imports[""] = 21
    samples = [Sample(str(i), {"x": rng.standard_normal((1, 8, 112, 112)).astype(np.float32)}) for i in range(4)]
    (one,) = catalog.parse(spec)
    assert isinstance(one, LossyPass)
    edits = one.propose(model, context_for(model, samples), outcome)
    assert [any("levels" in name for name in edit.payload) for edit in edits] == [True, True]
    assert outcome.notes and all("cannot be observed together" in note for note in outcome.notes)


def test_weights_that_a_search_chooses_from_count_on_no_others() -> None:
    model, samples = model_of(DEEP), pictures(6, 0, 8)
    model.opset_imports[""] = 21
    context = replace(context_for(model, samples), searched=True)
    found: list[dict[str, np.ndarray]] = []
    for bits in ("bits=4,", ""):
        (one,) = catalog.parse(f"quantize-weights{{{bits}convolutions=true,rounding=gptq}}")
        assert isinstance(one, LossyPass)
        edits = [edit for edit in one.propose(model, context, Outcome("")) if edit.option == "int4 per channel"]
        found.append({edit.site: edit.payload["levels"] for edit in edits})
    assert len(found[0]) == 5 and found[0].keys() == found[1].keys()
    assert all(np.array_equal(levels, found[1][site]) for site, levels in found[0].items())
