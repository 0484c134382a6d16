"""What a scout leaves out would not have been chosen, and it looks at less than everything."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest

from burnish.passes.lossy import Edit, Savings
from burnish.passes.scouting import PILOTS, Scout
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


def many(harm: float, rank: float) -> tuple[list[Edit], dict[str, float]]:
    """Forty layers with two numbers of bits and three ranks each, and the layers in pairs with a rank for both."""
    random = np.random.default_rng(3)
    edits, errors = [], {}
    for site in range(40):
        scale = float(random.lognormal(-6, 0.7))
        for number, option in enumerate(("int8", "int4")):
            edits.append(edit("first", f"layer {site}", option, 700 + 150 * number))
            errors[edits[-1].key] = scale * (1, 16 * harm)[number]
        for number in range(3):
            edits.append(edit("factors", f"layer {site}", f"rank {3 - number}", 150 + 250 * number))
            errors[edits[-1].key] = scale * rank * 4**number
    for site in range(0, 40, 2):
        both = frozenset({f"layer {site}", f"layer {site + 1}"})
        one = Edit("factors", f"layer {site} + layer {site + 1}", "rank 3", both, Savings(200, 800))
        edits.append(one)
        errors[one.key] = 2 * rank * max(errors[edit("first", name, "int8", 0).key] for name in both)
    return edits, errors


def test_of_many_layers_some_tell_that_a_pass_is_of_no_use() -> None:
    edits, errors = many(1.0, 5.0)
    scout = run(edits, errors)
    assert len([key for key in scout.found if key.startswith("factors")]) <= PILOTS
    seen = [one for one in edits if one.key in scout.found]
    for budget in np.geomspace(0.001, sum(errors.values()), 8):
        whole, part = (select(some, errors, saved, budget=float(budget)) for some in (edits, seen))
        assert part.saved == pytest.approx(whole.saved)


def test_where_one_of_some_layers_has_use_for_an_edit_all_are_measured() -> None:
    edits, errors = many(1.0, 0.5)
    scout = run(edits, errors)
    assert all(one.key in scout.found for one in edits if one.option == "rank 3" and "+" not in one.site)


def test_edits_that_lose_far_too_much_at_some_layers_are_not_measured_at_others() -> None:
    edits, errors = many(1000.0, 5.0)
    scout = run(edits, errors, allowed=10 * min(errors[one.key] for one in edits if one.option == "int4") / 3.01)
    assert sum(one.option == "int4" and one.key in scout.found for one in edits) == PILOTS
