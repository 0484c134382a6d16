"""What a scout leaves out would not have been chosen, and it looks at less than everything."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest

from burnish.passes.lossy import Edit, Savings
from burnish.passes.scouting import Scout
from burnish.passes.selection import select

ORDERS = {"factors": 30, "first": 40, "second": 40}


def edit(spec: str, site: str, option: str, saved: int) -> Edit:
    """An edit of one site."""
    return Edit(spec, site, option, frozenset({site}), Savings(saved // 4, saved))


def saved(one: Edit) -> float:
    """What counts."""
    return float(one.savings.bytes)


def run(edits: Sequence[Edit], errors: dict[str, float], allowed: float = float("inf")) -> Scout:
    """A scout that has seen these edits, each of which drops the metric by ten times its error."""
    scout = Scout(saved, ORDERS, allowed)
    scout.run(edits, lambda some: [(errors[one.key], 10 * errors[one.key]) for one in some])
    assert {*scout.found, *scout.reasons} == {one.key for one in edits}
    assert not set(scout.found) & set(scout.reasons)
    return scout


@pytest.mark.parametrize("seed", range(8))
def test_the_choice_is_the_same_as_among_all_edits(seed: int) -> None:
    random = np.random.default_rng(seed)
    edits, errors = [], {}
    for site in range(8):
        steps = np.cumsum(random.lognormal(-4, 1.5, 4))
        for number, error in enumerate(steps):
            one = edit("factors", f"layer {site}", f"rank {4 - number}", 100 + 200 * number)
            edits.append(one)
            errors[one.key] = float(error)
        for number, error in enumerate(np.cumsum(random.lognormal(-6, 1.5, 3))):
            one = edit("first", f"layer {site}", f"int{8 >> number}", 650 + 130 * number)
            edits.append(one)
            errors[one.key] = float(error)
    scout = run(edits, errors)
    seen = [one for one in edits if one.key in scout.found]
    assert len(seen) < len(edits)
    for budget in np.geomspace(0.01, sum(errors.values()), 12):
        whole, part = (select(some, errors, saved, budget=float(budget)) for some in (edits, seen))
        assert part.saved == pytest.approx(whole.saved)


def test_harsher_edits_are_not_measured_where_a_milder_one_loses_far_too_much() -> None:
    edits = [
        edit("first", "layer", "int2", 900),
        edit("first", "layer", "int8", 700),
        edit("first", "layer", "int4", 800),
    ]
    errors = dict(zip((one.key for one in edits), (0.3, 0.001, 0.2), strict=True))
    assert "int2" in next(iter(run(edits, errors, allowed=0.5).reasons))
    assert not run(edits, errors, allowed=1.0).reasons


def test_of_two_edits_of_one_order_that_save_the_same_the_first_is_measured() -> None:
    edits = [
        edit("first", "layer", "int8", 1000),
        edit("second", "layer", "int8", 990),
        edit("factors", "layer", "r", 1000),
    ]
    scout = run(edits, {one.key: 0.1 for one in edits})
    assert list(scout.reasons.values()) == ["`first` saves the same there"]
    apart = [edits[0], edit("second", "layer", "int8", 900)]
    assert not run(apart, {one.key: 0.1 for one in apart}).reasons
