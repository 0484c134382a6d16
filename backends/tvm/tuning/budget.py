"""How much may be spent on tuning, and how it is shared among kernels."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from burnish.ir.errors import InputError

_SPELLED = re.compile(r"(\d{1,6}(?:\.\d{1,3})?)(m?)\Z")
LEAST = 8
"""Candidates, or seconds, below which a kernel is not tuned at all."""


@dataclass(frozen=True)
class Budget:
    """Candidates that may be tried in all, or seconds that may be spent; what a database holds already counts.

    Attributes:
        amount: candidates or seconds.
        timed: whether they are seconds.
    """

    amount: float
    timed: bool = False

    def __str__(self) -> str:
        return f"{self.amount / 60:g} minutes" if self.timed else f"{self.amount:g} trials"


def parse(text: str) -> Budget:
    """The budget that `200` (trials) or `5m` (minutes) names.

    Raises:
        InputError: it is neither, or nothing.
    """
    match = _SPELLED.match(text.strip())
    if match is None or float(match[1]) <= 0 or (not match[2] and "." in match[1]):
        raise InputError(
            "this is no budget", place=f"--tune {text}", hint="`--tune 200` for trials, `--tune 5m` for minutes"
        )
    return Budget(float(match[1]) * 60, True) if match[2] else Budget(float(match[1]))


def shares(budget: Budget, costs: Sequence[float]) -> list[float]:
    """The part of a budget that each kernel gets: some for each, the rest by cost.

    Trials are whole eights. A budget that is too small for all goes to the kernels that cost most; the others get 0.

    Args:
        budget: what there is.
        costs: of each kernel, in any unit.
    """
    order = sorted(range(len(costs)), key=lambda index: -costs[index])
    chosen = order[: int(budget.amount // LEAST)]
    total = sum(costs[index] for index in chosen)
    rest = budget.amount - LEAST * len(chosen)
    parts = [0.0] * len(costs)
    for index in chosen:
        part = LEAST + rest * costs[index] / total
        parts[index] = part if budget.timed else part // LEAST * LEAST
    return parts


def filled(amount: float, floors: Sequence[float], costs: Sequence[float]) -> list[float]:
    """Parts in proportion to the costs, but none below its floor; together the amount, where the floors leave some.

    Args:
        amount: what there is.
        floors: of each part.
        costs: of each, in any unit.
    """
    fixed: set[int] = set()
    while True:
        free = [index for index in range(len(costs)) if index not in fixed]
        rest = amount - sum(floors[index] for index in fixed)
        total = sum(costs[index] for index in free)
        low = [index for index in free if total <= 0 or rest * costs[index] / total < floors[index]]
        if not low:
            return [floors[index] if index in fixed else rest * cost / total for index, cost in enumerate(costs)]
        fixed.update(low)
