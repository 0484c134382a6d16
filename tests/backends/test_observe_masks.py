"""Observing with a mask: padding does not count, and a mask whose rows cannot be told is not guessed."""

from __future__ import annotations

import re

import numpy as np
import pytest
from observed import Rows, masked, named, parsed, seen

from burnish.backends.ort.observe import OrtObserver
from burnish.ir.errors import InputError
from burnish.ir.inference import Inference
from burnish.ir.samples import Sample
from burnish.passes.reducers import Moments, Range
from burnish.passes.sites import Keep, Site, aligned


@pytest.mark.parametrize("name", ["x", "y", "r", "z"])
def test_padding_does_not_count_whatever_the_sizes(name: str) -> None:
    model, data = masked()
    value, facts = named(model, name), Inference(model)
    keep = aligned(value, -1, named(model, "mask"), facts)
    assert isinstance(keep, Keep) and keep.axes == ((0, 1) if name in "xy" else (0,))
    observer = OrtObserver(model)
    wanted = {"kept": Site(value, keep), "all": Site(value)}
    found = observer.observe(wanted, Moments(), data)
    rows = observer.observe({"all": Site(value)}, Rows(), data)
    left = [
        array.reshape(-1, array.shape[-1])[sample.feeds["mask"].reshape(-1) == 1]
        for array, sample in zip(seen(rows, "all"), data, strict=True)
    ]
    kept, everything = found["kept"], found["all"]
    assert isinstance(kept, Moments) and isinstance(everything, Moments)
    np.testing.assert_allclose(kept.mean, np.concatenate(left).mean(0), rtol=1e-6)
    assert kept.rows == len(np.concatenate(left)) < everything.rows


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("s", r"the axes of `mask` \[batch, seq\] and `s` .* do not match"),
        ("u", "do not match"),
    ],
)
def test_a_mask_whose_rows_cannot_be_told_is_not_guessed(name: str, reason: str) -> None:
    model, _ = masked()
    why = aligned(named(model, name), -1, named(model, "mask"), Inference(model))
    assert isinstance(why, str) and re.search(reason, why)


def test_a_mask_that_fits_in_two_ways_is_not_guessed() -> None:
    model = parsed("g (float[4, 4, 3] x, float[4] mask) => (float[4, 4, 3] y) { y = Relu (x) }")
    why = aligned(named(model, "y"), -1, named(model, "mask"), Inference(model))
    assert why == "the axes of `mask` [4] and `y` [4, 4, 3] can be matched in 2 ways"


def test_an_additive_mask_of_rank_4_masks_keys() -> None:
    model = parsed("g (float[b, 1, 1, s] m, float[b, h, q, s] x) => (float[b, h, q, s] y) { y = Add (x, m) }")
    keep = aligned(named(model, "x"), 2, named(model, "m"), Inference(model), additive=True)
    assert keep == Keep("m", (0, 3), (0, 3), 1, True)
    mask = np.array([0, -1e9, 0], np.float32).reshape(1, 1, 1, 3)
    sample = Sample("one", {"m": mask, "x": np.arange(12, dtype=np.float32).reshape(1, 2, 2, 3)})
    found = OrtObserver(model).observe({"x": Site(named(model, "x"), keep)}, Range(axis=-1), [sample])["x"]
    assert isinstance(found, Range) and found.absmax is not None and found.absmax.tolist() == [9, 0, 11]


def test_a_mask_that_covers_a_past_counts_from_its_end() -> None:
    model = parsed(
        "g (int64[b, s] ids, int64[b, t] mask, float[b, p, 2] past)"
        " => (float[b, s, 2] x, float[n, 2] r, float[b, q, 2] z)"
        " <float[5, 2] table = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9}, int64[2] flat = {-1, 2}>"
        " { x = Gather (table, ids)  r = Reshape (x, flat)  z = Concat <axis = 1> (past, x) }"
    )
    mask, ids, facts = named(model, "mask"), named(model, "ids"), Inference(model)
    feeds = {
        "ids": np.array([[1, 2], [3, 4]]),
        "mask": np.array([[0, 1, 1, 1, 1], [0, 0, 0, 0, 1]]),
        "past": np.zeros((2, 3, 2), np.float32),
    }
    for name in "xr":
        assert isinstance(aligned(named(model, name), -1, mask, facts), str)
        keep = aligned(named(model, name), -1, mask, facts, tail=ids)
        assert isinstance(keep, Keep) and keep.tail
        found = OrtObserver(model).observe({name: Site(named(model, name), keep)}, Rows(), [Sample("one", feeds)])
        assert seen(found, name)[0].reshape(-1, 2).tolist() == [[2, 3], [4, 5], [8, 9]]
    assert isinstance(aligned(named(model, "z"), -1, mask, facts, tail=ids), str)
    short = Sample("short", {**feeds, "mask": np.ones((2, 1), np.int64)})
    with pytest.raises(InputError, match="does not fit"):
        OrtObserver(model).observe({"x": Site(named(model, "x"), Keep("mask", (0, 1), tail=True))}, Rows(), [short])


def test_a_value_without_positions_counts_whole() -> None:
    model = parsed(
        "g (float[b, s, 3] x, int64[b, s] m, float[b, k, 3] other) => (float[b, 3] y, float[b, k, 3] z)"
        " <int64[1] one = {1}> { y = ReduceSum <keepdims = 0> (x, one)  z = Relu (other) }"
    )
    facts = Inference(model)
    assert aligned(named(model, "y"), -1, named(model, "m"), facts) is None
    assert isinstance(aligned(named(model, "z"), -1, named(model, "m"), facts), str)


def test_torch_masks_padding_and_says_what_it_cannot_show() -> None:
    pytest.importorskip("torch")
    from burnish.backends.fx.observe import FxObserver

    model, data = masked()
    keep = aligned(named(model, "r"), -1, named(model, "mask"), Inference(model))
    assert isinstance(keep, Keep)
    wanted = {"r": Site(named(model, "r"), keep), "x": Site(named(model, "x")), "ids": Site(named(model, "ids"))}
    reducers = {"r": Moments(), "x": Moments(), "ids": Moments(axis=None)}
    ours, theirs = (one.observe(wanted, reducers, data) for one in (OrtObserver(model), FxObserver(model)))
    for key, one in ours.items():
        other = theirs[key]
        assert isinstance(one, Moments) and isinstance(other, Moments) and one.rows == other.rows
        np.testing.assert_allclose(other.mean, one.mean, rtol=1e-6)
    shapes = parsed(
        "g (float[n, 2] x) => (float[n, 2] y, float[m, k] z) { i = Identity (x) y = Relu (i) j = Identity (y)"
        "  s = Shape (j)  z = Reshape (j, s) }"
    )
    sample = Sample("one", {"x": np.ones((3, 2), np.float32)})
    both = {name: Site(named(shapes, name)) for name in "yj"}
    found = FxObserver(shapes).observe(both, Moments(axis=None), [sample])
    assert [reducer.rows for reducer in found.values() if isinstance(reducer, Moments)] == [6, 6]
    with pytest.raises(InputError, match="no tensors: `s`|no value `s` to watch"):
        FxObserver(shapes).observe({"s": Site(named(shapes, "s"))}, Moments(), [sample])
