"""Selecting edits: what trying all combinations finds, whatever the order, and a front that rises."""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Iterator

import numpy as np
import pytest

from burnish.ir.errors import InputError
from burnish.passes.lossy import Edit, Savings
from burnish.passes.selection import Selection, UnreachableError, frontier, select, together

Pairs = dict[tuple[str, str], float]


def edit(name: str, bytes: int, *claims: str) -> Edit:
    return Edit("p", name, "drop", frozenset(claims), Savings(bytes=bytes))


def saving(one: Edit) -> float:
    return one.savings.bytes


def drawn(seed: int) -> tuple[list[Edit], dict[str, float], Pairs]:
    """A small problem: overlapping claims, equal numbers, tiny and huge errors, negative ones, pairs."""
    rng = np.random.default_rng(seed)
    count, nodes = int(rng.integers(1, 11)), int(rng.integers(1, 8))
    edits = [
        edit(f"{i:02}", int(rng.integers(-1, 9) if seed % 2 else rng.integers(0, 10**8)),
             *(f"n{n}" for n in rng.choice(nodes, int(rng.integers(0, 3)))))
        for i in range(count)
    ]  # fmt: skip
    sizes = rng.integers(0, 5, count) if seed % 3 == 0 else np.exp(rng.normal(0, 4 if seed % 3 == 1 else 1, count))
    errors = {one.key: float(size) for one, size in zip(edits, sizes, strict=True)}
    if seed % 7 == 0:
        errors[edits[0].key] *= -1
    if seed % 11 == 0:
        errors[edits[-1].key] = math.inf
    pairs: Pairs = {}
    for a, b in itertools.combinations(range(count), 2):
        if seed % 4 == 0 and rng.random() < 0.2:
            pairs[edits[b].key, edits[a].key] = float(rng.normal()) if seed % 8 else float(rng.integers(0, 3))
    return edits, errors, pairs


def combinations(edits: list[Edit], errors: dict[str, float], pairs: Pairs) -> Iterator[tuple[float, float]]:
    """Savings and error of everything that can be done."""
    for flags in itertools.product((False, True), repeat=len(edits)):
        chosen = [one for one, flag in zip(edits, flags, strict=True) if flag]
        claims = [claim for one in chosen for claim in one.claims]
        keys = {one.key for one in chosen}
        if len(claims) == len(set(claims)):
            parts = [errors[key] for key in keys] + [extra for (a, b), extra in pairs.items() if {a, b} <= keys]
            if math.isfinite(sum(parts)):
                yield math.fsum(saving(one) for one in chosen), math.fsum(parts)


def check(found: Selection, edits: list[Edit], errors: dict[str, float], pairs: Pairs) -> None:
    """The numbers are those of the edits, which do not exclude each other and are in the given order."""
    keys = [one.key for one in found.edits]
    assert keys == [one.key for one in edits if one.key in set(keys)]
    claims = [claim for one in found.edits for claim in one.claims]
    assert len(claims) == len(set(claims)) and found.gap <= 1e-6
    assert found.saved == math.fsum(saving(one) for one in found.edits)
    parts = [errors[key] for key in keys] + [extra for (a, b), extra in pairs.items() if a in keys and b in keys]
    assert found.error == pytest.approx(math.fsum(parts), rel=1e-12, abs=1e-300)


def near(one: tuple[float, float], other: tuple[float, float]) -> bool:
    return all(math.isclose(a, b, rel_tol=1e-6, abs_tol=1e-8) for a, b in zip(one, other, strict=True))


SEEDS = [*range(25), *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(25, 400))]


@pytest.mark.parametrize("seed", SEEDS)
def test_nothing_better_is_found_by_trying_everything(seed: int) -> None:
    edits, errors, pairs = drawn(seed)
    every = list(combinations(edits, errors, pairs))
    costs, gains = sorted(cost for _, cost in every), sorted(gain for gain, _ in every)
    rng = np.random.default_rng(seed)
    for budget in {0.0, costs[-1], float(rng.choice(costs)), float(rng.choice(costs)) * 0.9, math.inf}:
        allowed = [one for one in every if one[1] <= budget * (1 + 1e-12 if budget > 0 else 1)]
        if not allowed:
            with pytest.raises(UnreachableError):
                select(edits, errors, saving, budget=budget, pairs=pairs)
            continue
        found = select(edits, errors, saving, budget=budget, pairs=pairs)
        check(found, edits, errors, pairs)
        assert near((found.saved, found.error), max(allowed, key=lambda one: (one[0], -one[1])))
    for target in {0.0, gains[-1], float(rng.choice(gains)), float(rng.choice(gains)) * 0.9}:
        found = select(edits, errors, saving, target=target, pairs=pairs)
        check(found, edits, errors, pairs)
        reached = [one for one in every if one[0] >= target]
        assert near((found.saved, found.error), min(reached, key=lambda one: (one[1], -one[0])))


@pytest.mark.parametrize("seed", range(12))
def test_the_order_of_the_edits_does_not_matter_even_where_all_are_equal(seed: int) -> None:
    edits, errors, pairs = drawn(seed)
    edits += [edit(f"same {i}", 5, f"s{i % 3}") for i in range(6)]
    errors |= {one.key: 1.0 for one in edits[-6:]}
    found = select(edits, errors, saving, budget=4.0, pairs=pairs)
    turned = select(edits[::-1], errors, saving, budget=4.0, pairs={(b, a): extra for (a, b), extra in pairs.items()})
    assert set(turned.edits) == set(found.edits)


def in_company(seed: int) -> tuple[list[Edit], dict[str, float], dict[frozenset[str], float]]:
    """Edits with an option or two each, most of which save less than nothing alone; some sets of them save more."""
    rng = np.random.default_rng(seed)
    edits = [
        edit(f"{i:02} {option}", int(rng.integers(-4, 3)), f"n{i}")
        for i in range(int(rng.integers(2, 9)))
        for option in range(1 + (seed % 3 == 0 and i % 2))
    ]
    errors = {one.key: float(np.exp(rng.normal())) for one in edits}
    joint: dict[frozenset[str], float] = {}
    for _ in range(int(rng.integers(1, 9))):
        some = rng.choice(len(edits), int(rng.integers(1, min(5, len(edits) + 1))), replace=False)
        joint[frozenset(edits[i].key for i in some)] = float(rng.integers(1, 7))
    joint[frozenset({edits[0].key, "another that was left out"})] = 100.0
    return edits, errors, joint


@pytest.mark.parametrize("seed", SEEDS)
def test_what_edits_save_only_together_is_found_as_by_trying_everything(seed: int) -> None:
    edits, errors, joint = in_company(seed)
    every = []
    for flags in itertools.product((False, True), repeat=len(edits)):
        chosen = [one for one, flag in zip(edits, flags, strict=True) if flag]
        claims = [claim for one in chosen for claim in one.claims]
        if len(claims) == len(set(claims)):
            saved = math.fsum(map(saving, chosen)) + together(chosen, joint)
            every.append((saved, math.fsum(errors[one.key] for one in chosen)))
    rng = np.random.default_rng(seed)
    for budget in (0.0, float(rng.choice([cost for _, cost in every])), math.inf):
        found = select(edits, errors, saving, budget=budget, joint=joint)
        allowed = [one for one in every if one[1] <= budget * (1 + 1e-12)]
        assert near((found.saved, found.error), max(allowed, key=lambda one: (one[0], -one[1])))
        assert found.saved == pytest.approx(math.fsum(map(saving, found.edits)) + together(found.edits, joint))
    target = float(rng.choice([saved for saved, _ in every]))
    found = select(edits, errors, saving, target=target, joint=joint)
    assert near((found.saved, found.error), min((o for o in every if o[0] >= target), key=lambda o: (o[1], -o[0])))


def test_hundreds_of_edits_that_save_together_are_chosen_among_in_seconds() -> None:
    edits, errors = network(210, 3, 3)
    first = {int(one.site): one for one in edits if one.site.isdigit() and one.option == "0"}
    joint = {frozenset({first[i].key, first[i + 1].key}): 0.7 * saving(first[i]) for i in range(209)}
    alone = {one.key: saving(one) * (0.4 if one in first.values() else 1.0) for one in edits}
    start = time.perf_counter()
    found = select(edits, errors, lambda one: alone[one.key], budget=0.05, joint=joint)
    assert time.perf_counter() - start < 60 and found.gap < 0.01
    assert found.saved >= select(edits, errors, lambda one: alone[one.key], budget=0.05).saved


def network(layers: int, ranks: int, seed: int) -> tuple[list[Edit], dict[str, float]]:
    """Several ranks for each layer, and blocks of seven layers that can go as a whole."""
    rng = np.random.default_rng(seed)
    edits: list[Edit] = []
    errors: dict[str, float] = {}
    for layer in range(layers):
        size, weight = int(rng.integers(10**5, 10**7)), math.exp(rng.normal(-5, 1.5))
        for rank in range(ranks):
            part = (rank + 1) / (ranks + 1)
            edits.append(Edit("f", f"{layer:03}", f"{rank}", frozenset([f"n{layer}"]), Savings(bytes=int(size * part))))
            errors[edits[-1].key] = weight * part**2 * math.exp(rng.normal(0, 0.1))
    for block in range(layers // 7):
        nodes = [f"n{layer}" for layer in range(7 * block, 7 * block + 7)]
        edits.append(edit(f"block {block:02}", int(rng.integers(10**7, 4 * 10**7)), *nodes, f"x{block}"))
        errors[edits[-1].key] = math.exp(rng.normal(-3, 1))
    return edits, errors


def test_a_thousand_edits_are_chosen_among_in_seconds() -> None:
    edits, errors = network(210, 5, 0)
    assert len(edits) > 1000
    start = time.perf_counter()
    found = select(edits, errors, saving, budget=0.05)
    assert time.perf_counter() - start < 20
    check(found, edits, errors, {})
    assert found.error <= 0.05


def test_more_room_never_saves_less_and_a_higher_target_never_costs_less() -> None:
    edits, errors = network(28, 4, 1)
    last = Selection((), 0.0, 0.0)
    for budget in (0.0, 0.001, 0.01, 0.03, 0.1, 1.0, math.inf):
        found = select(edits, errors, saving, budget=budget)
        assert found.saved >= last.saved and found.error <= budget
        back = select(edits, errors, saving, target=found.saved)
        assert back.saved >= found.saved and back.error == pytest.approx(found.error, rel=1e-5, abs=1e-12)
        fewer = select(edits[::2], errors, saving, budget=budget)
        assert fewer.saved <= found.saved
        last = found


def test_the_front_rises_from_nothing_to_everything() -> None:
    edits, errors = network(21, 4, 2)
    front = frontier(edits, errors, saving, points=12)
    assert front[0].edits == () and len(front) > 8
    assert front[-1].saved == select(edits, errors, saving, budget=math.inf).saved
    for one, two in itertools.pairwise(front):
        assert one.saved < two.saved and one.error < two.error
        assert two.error <= select(edits, errors, saving, target=two.saved).error * 1.001
    assert [one.edits for one in frontier([], {}, saving)] == [()]


def test_a_target_out_of_reach_says_what_is_in_reach() -> None:
    edits = [edit("a", 100, "n"), edit("b", 70, "n"), edit("c", 30, "m"), edit("d", 500, "z")]
    errors = {edits[0].key: 3.0, edits[1].key: 1.0, edits[2].key: 1.0, edits[3].key: math.nan}
    with pytest.raises(UnreachableError, match="is 130, not 200") as caught:
        select(edits, errors, saving, target=200)
    assert caught.value.exit_code == 1 and caught.value.nearest is not None and caught.value.hint
    assert {one.site for one in caught.value.nearest.edits} == {"a", "c"}
    with pytest.raises(UnreachableError, match="within an error of 2 is 100, not 120") as caught:
        select(edits, errors, saving, budget=2, target=120)
    assert caught.value.nearest is not None and caught.value.nearest.saved == 100
    assert select(edits, errors, saving, budget=4, target=120).saved == 130
    with pytest.raises(UnreachableError, match="not even to change nothing"):
        select(edits, errors, saving, budget=-1)


def test_a_saving_that_is_no_number_is_refused() -> None:
    one = edit("a", 1)
    with pytest.raises(InputError, match="no number") as caught:
        select([one], {one.key: 1.0}, lambda _: math.nan, budget=1)
    assert one.key in str(caught.value.place)
    with pytest.raises(ValueError, match="neither"):
        select([one], {one.key: 1.0}, saving)


def test_pairs_that_rule_each_other_out_are_never_both_taken() -> None:
    edits = [edit("a", 5), edit("b", 4), edit("c", 3)]
    errors = dict.fromkeys((one.key for one in edits), 1.0)
    pairs = {(edits[0].key, edits[1].key): math.inf}
    assert {one.site for one in select(edits, errors, saving, budget=9, pairs=pairs).edits} == {"a", "c"}


def test_savings_in_proportion_to_errors_are_not_searched_for_ever() -> None:
    rng = np.random.default_rng(0)
    edits = [edit(f"{i:03}", int(rng.integers(10**5, 10**7)), f"n{i}") for i in range(300)]
    errors = {one.key: saving(one) * 1e-9 for one in edits}
    start = time.perf_counter()
    found = select(edits, errors, saving, budget=0.5)
    assert time.perf_counter() - start < 60 and found.gap <= 1e-5
    assert found.error <= 0.5 * (1 + 1e-9) and found.saved > 0.49999e9


def test_nothing_is_printed(capfd: pytest.CaptureFixture[str]) -> None:
    edits, errors = network(70, 7, 2)
    select(edits, errors, saving, budget=0.05)
    assert capfd.readouterr().out == ""
