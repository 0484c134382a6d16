"""The best choice of things under a limit, some of which exclude each other, found exactly.

First the relaxation is solved, in which a thing may be taken in part. It bounds what any choice is worth that takes
what the relaxation leaves, or the reverse: its value and that thing's reduced cost. What cannot be otherwise in a best
choice is settled so (Dantzig, Fulkerson and Johnson, 1954); the core that is left (Balas and Zemel, 1980) is searched
by the branch and bound of HiGHS. A pair that costs more or less than its two things gets a variable of its own.
"""

from __future__ import annotations

import ctypes
import math
import os
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

_ROWS = 1e3
"""What a limit is scaled to: HiGHS lets a constraint be missed by 1e-6."""

_LEAST = 1e-9
"""The part of the largest cost below which a limit counts as that part when rows are scaled: as good as nothing."""

_GOAL = 1e6
"""What the best value is scaled to: HiGHS stops within 1e-6 of the bound."""

_CORE = 40
"""Things that are left open at first."""

_NODES = 300
"""Nodes of the search after which the best so far is taken: the same on every machine, as a time would not be."""

_DONE, _INFEASIBLE = 0, 2
"""What SciPy says of a search."""

_ONE = threading.Lock()
"""Standard output is taken away by one at a time."""

_EQUAL = 1e-6
"""What is known to be within this part of the best counts as the best."""

SLACK = 1e-9
"""The part of a limit by which rounding may exceed it."""


@dataclass(frozen=True)
class Choice:
    """Things that can be taken together.

    Attributes:
        taken: their places.
        gain, cost: the sums over them, pairs included.
        gap: how much better another could be at most, as a part of what was looked for; 0 when there is none.
    """

    taken: frozenset[int]
    gain: float
    cost: float
    gap: float = 0.0


class Knapsack:
    """Things to choose among.

    Args:
        gain, cost: float64 [things], finite.
        groups: places of things of which one at most can be taken.
        pairs: what two things together cost more than each alone; a < b, not 0.
        joint: what several things gain when all of them are taken, beyond each alone; above 0, of two things or more.
        ties: float64 [things], 0 to 1: of equally good choices the one is taken whose sum is least.
    """

    def __init__(
        self,
        gain: np.ndarray,
        cost: np.ndarray,
        groups: Sequence[frozenset[int]],
        pairs: Mapping[tuple[int, int], float],
        joint: Mapping[frozenset[int], float],
        ties: np.ndarray,
    ) -> None:
        self.gain, self.cost, self.groups, self.pairs = gain, cost, groups, pairs
        self.joint, self.ties = joint, ties
        self.adds = bool((cost >= 0).all()) and all(extra >= 0 for extra in pairs.values())
        """Whether none makes room for another, so that one that alone costs too much is out."""

    def most_gain(self, budget: float) -> Choice | None:
        """The largest gain of all that cost no more than `budget`, and of those the least cost; None when none does."""
        paired = {place for some in (*self.pairs, *self.joint) for place in some}
        wanted = [
            place
            for place in range(len(self.gain))
            if place in paired or self.cost[place] < 0 or self.gain[place] > 0
            if not self.adds or self.cost[place] <= budget
        ]
        return _System(self, wanted).search(by_cost=False, budget=budget, floor=-math.inf)

    def least_cost(self, floor: float, gap: float = 0.0) -> Choice | None:
        """The least cost of all that gain `floor` or more, and of those the largest gain; None when nothing does.

        Args:
            floor: the smallest gain.
            gap: be content with what is known to be within that part of the best.
        """
        return _System(self, range(len(self.gain))).search(by_cost=True, budget=math.inf, floor=floor, gap=gap)

    def choice(self, taken: frozenset[int]) -> Choice:
        """The sums over what is taken, rounded once."""
        costs = [float(self.cost[place]) for place in taken]
        costs += [extra for (a, b), extra in self.pairs.items() if a in taken and b in taken]
        gains = [float(self.gain[place]) for place in taken]
        gains += [extra for some, extra in self.joint.items() if some <= taken]
        return Choice(taken, math.fsum(gains), math.fsum(costs))


class _System:
    """Variables and constraints: a variable for each open thing, then one for each pair of such, and each joint gain.

    Args:
        knapsack: what is chosen from.
        places: the things that are open.
        settled: those that are taken anyway; all others are left.
    """

    def __init__(self, knapsack: Knapsack, places: Sequence[int], settled: frozenset[int] = frozenset()) -> None:
        self.knapsack, self.places, self.settled = knapsack, list(places), settled
        column = {place: at for at, place in enumerate(places)}
        self.cost = [float(knapsack.cost[place]) for place in places]
        self.gain = [float(knapsack.gain[place]) for place in places]
        rows: list[tuple[dict[int, float], float]] = []
        for group in knapsack.groups:
            held = [column[place] for place in sorted(group) if place in column]
            room = 0.0 if group & settled else 1.0
            if len(held) > room:
                rows.append((dict.fromkeys(held, 1.0), room))
        for (one, other), extra in knapsack.pairs.items():
            if one in column and other in column:
                at = len(self.cost)
                self.cost.append(extra)
                self.gain.append(0.0)
                if extra > 0:
                    rows.append(({column[one]: 1.0, column[other]: 1.0, at: -1.0}, 1.0))
                else:
                    rows.extend(({at: 1.0, column[place]: -1.0}, 0.0) for place in (one, other))
            elif (one in column and other in settled) or (other in column and one in settled):
                self.cost[column[one if one in column else other]] += extra
        for some, extra in knapsack.joint.items():
            left = [column[place] for place in sorted(some - settled) if place in column]
            if len(left) < len(some - settled):
                continue
            if len(left) == 1:
                self.gain[left[0]] += extra
            elif left:
                rows.extend(({len(self.gain): 1.0, at: -1.0}, 0.0) for at in left)
                self.cost.append(0.0)
                self.gain.append(extra)
        self.rows = rows
        self.base = knapsack.choice(settled)

    def search(self, *, by_cost: bool, budget: float, floor: float, gap: float = 0.0) -> Choice | None:
        """The best choice within the limits; None when there is none."""
        relaxed = self._relaxed(by_cost, budget, floor)
        if relaxed is None:
            return None
        bound, margin, reduced, values = relaxed
        order = np.argsort(np.abs(reduced), kind="stable")
        size = max(_CORE, int((np.abs(reduced) <= margin).sum()))
        while True:
            opened = {self.places[at] for at in order[:size]}
            taken = frozenset(self.places[at] for at in order[size:] if values[at] > 0.5)
            core = _System(self.knapsack, sorted(opened), taken)
            best = core.solve(by_cost, budget, floor, near=bound, gap=gap)
            needed = len(order)
            if best is not None:
                away = (best.cost if by_cost else -best.gain) - bound
                needed = int((np.abs(reduced) <= away + margin).sum())
                cut = best.gap > gap
                if size < needed and 0 < away and (cut or away <= max(gap, _EQUAL) * abs(bound)):
                    return replace(best, gap=away / (abs(bound) or away))
            if needed <= size:
                return best if best is None or gap else core.settle(best, by_cost, budget, floor)
            size = min(needed, 2 * size)

    def settle(self, best: Choice, by_cost: bool, budget: float, floor: float) -> Choice:
        """Of all choices that are as good, the best in the other number; the first by `ties` of those."""
        if by_cost:
            again = self.solve(False, best.cost, floor, near=best.gain, ties=True)
        else:
            again = self.solve(True, budget, best.gain, near=best.cost, ties=True)
        return best if again is None else replace(again, gap=best.gap)

    def _relaxed(
        self, by_cost: bool, budget: float, floor: float
    ) -> tuple[float, float, np.ndarray, np.ndarray] | None:
        """The bound, how far it may be off, the reduced cost of each thing and how much of it is taken."""
        from scipy.optimize import linprog

        goal = np.array(self.cost) if by_cost else -np.array(self.gain)
        if not self.places:
            return 0.0, 0.0, np.zeros(0), np.zeros(0)
        scale = _GOAL / (float(np.abs(goal).sum()) or 1.0)
        matrix, highest = self._matrix(budget, floor)
        while True:
            found = linprog(goal * scale, A_ub=matrix, b_ub=highest, bounds=(0, 1), method="highs")
            if found.status == _INFEASIBLE:
                return None
            if found.status != _DONE:
                return -math.inf, 0.0, np.zeros(len(self.places)), np.zeros(len(self.places))
            if not 1e-9 < abs(found.fun) < _GOAL / 1e3:
                break
            scale *= _GOAL / abs(found.fun)
        reduced = (found.lower.marginals + found.upper.marginals)[: len(self.places)] / scale
        return float(found.fun) / scale, 1e-3 / scale, np.asarray(reduced), found.x[: len(self.places)]

    def solve(
        self, by_cost: bool, budget: float, floor: float, *, near: float, gap: float = 0.0, ties: bool = False
    ) -> Choice | None:
        """The best choice within the limits, None when there is none.

        Args:
            by_cost: the least cost is looked for, else the largest gain.
            budget, floor: limits of cost and gain; infinite ones are none.
            near: about what the best is.
            gap: the part of the best that another may be better by.
            ties: of equally good choices take the first.
        """
        if not self.places:
            fits = self.base.cost <= budget + abs(budget) * SLACK and self.base.gain >= floor - abs(floor) * SLACK
            return self.base if fits else None
        goal = np.array(self.cost) if by_cost else -np.array(self.gain)
        goal = goal * (_GOAL / (abs(near) or float(np.abs(goal).max()) or 1.0))
        if ties:
            goal[: len(self.places)] += 1e-4 * self.knapsack.ties[self.places]
        highest, lowest = budget, floor
        while True:
            with _ONE, _silent():
                found = self._searched(goal, highest, lowest, gap)
            if found is None:
                return None
            over, under = found.cost - budget, floor - found.gain
            if not (over > abs(budget) * SLACK or under > abs(floor) * SLACK):
                return found
            highest, lowest = highest - 2 * max(over, 0.0), lowest + 2 * max(under, 0.0)

    def _searched(self, goal: np.ndarray, budget: float, floor: float, gap: float) -> Choice | None:
        from scipy.optimize import Bounds, LinearConstraint, milp

        matrix, highest = self._matrix(budget, floor)
        found = milp(
            goal,
            integrality=np.arange(len(goal)) < len(self.places),
            bounds=Bounds(0, 1),
            constraints=[] if matrix is None else LinearConstraint(matrix, ub=highest),
            options={"mip_rel_gap": max(gap, _EQUAL), "node_limit": _NODES, "presolve": False},
        )
        if found.x is None:
            return None
        taken = {place for place, value in zip(self.places, found.x, strict=False) if value > 0.5}
        choice = self.knapsack.choice(self.settled | taken)
        return choice if found.status == _DONE and not gap else replace(choice, gap=float(found.mip_gap))

    def _matrix(self, budget: float, floor: float) -> tuple[Any, np.ndarray | None]:
        """The constraints, sparse [rows, variables], and what a row may add up to; None where there are none."""
        from scipy.sparse import csr_array

        rows = list(self.rows)
        limits = ((np.array(self.cost), budget, self.base.cost), (-np.array(self.gain), -floor, -self.base.gain))
        for values, limit, base in limits:
            if math.isfinite(limit):
                largest = float(np.abs(values).max(initial=0.0)) or 1.0
                scale = _ROWS / (max(abs(limit), _LEAST * largest) if limit else largest)
                rows.append(({at: value * scale for at, value in enumerate(values.tolist())}, (limit - base) * scale))
        if not rows:
            return None, None
        places = [(line, column, value) for line, (row, _) in enumerate(rows) for column, value in row.items()]
        lines, columns, numbers = zip(*places, strict=True)
        matrix = csr_array((numbers, (lines, columns)), shape=(len(rows), len(self.cost)))
        return matrix, np.array([highest for _, highest in rows])


@contextmanager
def _silent() -> Iterator[None]:
    """Nothing is written to standard output meanwhile: HiGHS 1.8 prints there when it mends a solution."""
    try:
        kept = os.dup(1)
    except OSError:
        yield
        return
    library = ctypes.CDLL("msvcrt" if os.name == "nt" else None)
    library.fflush(None)
    with open(os.devnull, "wb") as nowhere:
        os.dup2(nowhere.fileno(), 1)
    try:
        yield
    finally:
        library.fflush(None)
        os.dup2(kept, 1)
        os.close(kept)
