"""Which edits to make: the most that can be saved within an error, or the least error for what is to be saved.

The errors of edits made alone are added up (LAPTOP-Diff, arXiv:2404.11098, rests on that; for squared errors and KL
divergences it holds while they are small and independent), and so are savings. What is left is a knapsack with a
constraint for every claim that several edits have; it is solved exactly.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from burnish.ir.errors import BudgetError, InputError
from burnish.passes.knapsack import SLACK, Choice, Knapsack
from burnish.passes.lossy import Edit

Pairs = Mapping[tuple[str, str], float]
"""By the keys of two edits: the error of both together less the sum of those of each alone."""

Joint = Mapping[frozenset[str], float]
"""By the keys of edits: what is saved when all of them are made, beyond the sum of what each saves alone."""


_FRONT = 1e-3
"""How near to the least error the points of a front are, as a part of it."""


@dataclass(frozen=True)
class Selection:
    """Edits that can be made together.

    Attributes:
        edits: in the order in which they were given.
        saved: the sum of their savings.
        error: the sum of their errors, and of what their pairs add.
        gap: how much better another choice could be at most, as a part of what was looked for; 0 when there is none.
    """

    edits: tuple[Edit, ...]
    saved: float
    error: float
    gap: float = 0.0


class UnreachableError(BudgetError):
    """The target cannot be reached, or not within the budget. Exit code 1.

    Attributes:
        nearest: what saves most within the budget; None when nothing is within it.
    """

    def __init__(self, cause: str, nearest: Selection | None, hint: str | None = None) -> None:
        super().__init__(cause, hint=hint)
        self.nearest = nearest


def select(
    edits: Sequence[Edit],
    errors: Mapping[str, float],
    saving: Callable[[Edit], float],
    *,
    budget: float | None = None,
    target: float | None = None,
    pairs: Pairs | None = None,
    joint: Joint | None = None,
) -> Selection:
    """The edits that save most within `budget`; or, with a `target` alone, those of the least error that save as much.

    With both, they save most within the budget, and at least the target. Of equally good choices it is that of the
    least error, or the largest saving. The result does not depend on the order of the edits.

    Args:
        edits: any edits of one model. Two with a claim in common are never both chosen.
        errors: the error of each alone, by its key; one that is not finite is never chosen.
        saving: what is saved: bytes, parameters, seconds.
        budget: the largest sum of errors.
        target: the smallest sum of savings.
        pairs: what pairs add to the sum of errors, or take from it.
        joint: what sets of two edits or more add to the sum of savings; above 0.

    Raises:
        UnreachableError: no choice is within the limits.
        InputError: a saving is no number.
    """
    problem = _Problem(edits, errors, saving, pairs or {}, joint or {})
    if budget is None:
        if target is None:
            raise ValueError("neither a budget nor a target is given")
        return problem.least_error(target)
    return problem.most_saved(budget, -math.inf if target is None else target)


def frontier(
    edits: Sequence[Edit],
    errors: Mapping[str, float],
    saving: Callable[[Edit], float],
    *,
    points: int = 20,
    pairs: Pairs | None = None,
    joint: Joint | None = None,
) -> list[Selection]:
    """What the least error is for savings from none to all that can be saved, none of them worse in both than another.

    Args:
        edits, errors, saving, pairs, joint: as for `select`.
        points: how many targets are tried, evenly spaced.

    Returns:
        Choices of rising savings and errors, each within a thousandth of the least error for what it saves. The first
        is to do nothing, unless an edit lessens the error.
    """
    problem = _Problem(edits, errors, saving, pairs or {}, joint or {})
    most = problem.most_saved(math.inf, -math.inf).saved
    found = [problem.least_error(most * step / points, _FRONT) for step in range(points + 1)]
    kept: list[Selection] = []
    for one in reversed(found):
        if not kept or (one.error < kept[-1].error and one.saved < kept[-1].saved):
            kept.append(one)
    return kept[::-1]


class _Problem:
    """The edits that can be chosen at all, in the order of their keys, as a knapsack."""

    def __init__(
        self,
        edits: Sequence[Edit],
        errors: Mapping[str, float],
        saving: Callable[[Edit], float],
        pairs: Pairs,
        joint: Joint,
    ) -> None:
        savings = {edit.key: float(saving(edit)) for edit in edits}
        wrong = next((key for key, number in savings.items() if not math.isfinite(number)), None)
        if wrong is not None:
            raise InputError(f"what it saves is no number: {savings[wrong]}", place=f"edit `{wrong}`")
        self.given = list(edits)
        possible = {edit.key: edit for edit in reversed(edits) if math.isfinite(errors[edit.key])}
        self.edits = [possible[key] for key in sorted(possible)]
        place = {edit.key: index for index, edit in enumerate(self.edits)}
        both = {(place[a], place[b]): extra for (a, b), extra in pairs.items() if a in place and b in place}
        known = {(min(pair), max(pair)): extra for pair, extra in sorted(both.items())}
        self.knapsack = Knapsack(
            np.array([savings[edit.key] for edit in self.edits]),
            np.array([errors[edit.key] for edit in self.edits]),
            _exclusions([edit.claims for edit in self.edits], [p for p, extra in known.items() if extra == math.inf]),
            {pair: extra for pair, extra in known.items() if math.isfinite(extra) and extra},
            {frozenset(place[key] for key in some): joint[some] for some in _ordered(joint) if some <= place.keys()},
            np.array([_weight(edit.key) for edit in self.edits]),
        )

    def most_saved(self, budget: float, target: float) -> Selection:
        """The largest savings within a budget, and of those the least error."""
        within = "" if math.isinf(budget) else f" within an error of {budget:.4g}"
        found = self.knapsack.most_gain(budget)
        if found is None:
            raise UnreachableError(f"there is nothing{within}, not even to change nothing", None)
        if found.gain < target - abs(target) * SLACK:
            raise UnreachableError(
                f"the most that can be saved{within} is {found.gain:.6g}, not {target:.6g}",
                self._selection(found),
                hint="ask for less" + ("" if math.isinf(budget) else ", or allow a larger error"),
            )
        return self._selection(found)

    def least_error(self, target: float, gap: float = 0.0) -> Selection:
        """The least error for a target, and of those the largest savings; or what is within a gap of it."""
        found = self.knapsack.least_cost(target, gap)
        return self.most_saved(math.inf, target) if found is None else self._selection(found)

    def _selection(self, choice: Choice) -> Selection:
        keys = {self.edits[place].key for place in choice.taken}
        return Selection(tuple(edit for edit in self.given if edit.key in keys), choice.gain, choice.cost, choice.gap)


def together(edits: Sequence[Edit], joint: Joint) -> float:
    """What edits save together beyond the sum of what each saves alone."""
    keys = {edit.key for edit in edits}
    return math.fsum(extra for some, extra in joint.items() if some <= keys)


def _exclusions(claims: Sequence[frozenset[str]], apart: Sequence[tuple[int, int]]) -> list[frozenset[int]]:
    """Sets of edits of which one at most can be made, in a fixed order, none of them inside another."""
    holders: dict[str, set[int]] = {}
    for index, names in enumerate(claims):
        for name in names:
            holders.setdefault(name, set()).add(index)
    sets = {frozenset(group) for group in holders.values() if len(group) > 1} | {frozenset(pair) for pair in apart}
    kept: list[frozenset[int]] = []
    by_member: dict[int, list[frozenset[int]]] = {}
    for group in sorted(sets, key=lambda group: (-len(group), sorted(group))):
        rarest = min(group, key=lambda member: (len(by_member.get(member, ())), member))
        if not any(group <= other for other in by_member.get(rarest, ())):
            kept.append(group)
            for member in group:
                by_member.setdefault(member, []).append(group)
    return kept


def _ordered(joint: Joint) -> list[frozenset[str]]:
    """The sets in an order of their own: constraints are the same whatever order edits have."""
    return sorted(joint, key=sorted)


def _weight(key: str) -> float:
    """A number of 0 to 1 that is the same for a key on every machine."""
    return int.from_bytes(hashlib.blake2b(key.encode(), digest_size=6).digest()) / 2**48
