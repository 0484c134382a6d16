"""Whether the held-out samples are enough to tell the budget that was asked for, and how many would be."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from burnish.passes.search import Judgement, rows_needed
from burnish.tools import terminal

if TYPE_CHECKING:
    from burnish.tools.lossy import Lossy


@dataclass(frozen=True)
class Doubt:
    """Why the held-out samples cannot tell what is asked.

    Attributes:
        why: one sentence.
        held_out: how many there are: rows, of a metric that counts such, else samples; groups where these are known.
        needed: how many would tell, if what they show is right.
    """

    why: str
    held_out: int
    needed: int


def doubt(found: Lossy) -> Doubt | None:
    """Whether there are too few held-out samples; None where they do, or where more would not help."""
    search, final = found.found, found.final or found.result
    if search is None or search.allowed is None:
        return None
    if found.edits:
        return None if final is None else _written(found, final, search.allowed)
    tried = [plan.held_out for plan in search.plans if plan.edits and plan.held_out is not None]
    return None if not tried else _unsure(found, min(tried, key=lambda one: one.sure), search.allowed)


def _written(found: Lossy, final: Judgement, allowed: float) -> Doubt | None:
    """Of a model that is written: it changes no held-out row, or loses more than is allowed with its error.

    A metric that counts rows is a share of them, and so is what is allowed.
    """
    if not final.untouched:
        return None if final.sure <= allowed else _unsure(found, final, allowed)
    needed = rows_needed(allowed)
    if final.rows >= needed:
        return None
    said = (
        f"none of {terminal.count(final.rows, _unit(found, 'row'))} changes, which leaves it open whether up to"
        f" {100 * final.chance:.2g} % of others do (with 68 % certainty): {needed} would tell {100 * allowed:.2g} %"
    )
    return Doubt(said, final.rows, needed)


def _unit(found: Lossy, otherwise: str) -> str:
    """What is counted: groups, where the samples tell theirs."""
    grouped = found.judged is not None and any(one.groups is not None for one in found.judged.samples)
    return f"held-out {'group' if grouped else otherwise}"


def _unsure(found: Lossy, judged: Judgement, allowed: float) -> Doubt | None:
    """Of a plan that loses less than is allowed, but not with its standard error."""
    room = allowed - max(judged.drop, 0.0)
    if room <= 0 or not math.isfinite(judged.spread):
        return None
    assert found.judged is not None
    have, unit = (judged.rows, "row") if judged.rows else (len(set(found.judged.groups)), "sample")
    needed = math.ceil(have * (judged.spread / room) ** 2)
    if needed <= have:
        return None
    said = f"{terminal.count(have, _unit(found, unit))} cannot tell the budget: with such losses about {needed} would"
    return Doubt(said, have, needed)
