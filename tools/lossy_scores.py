"""The scores of edits alone, and in pairs: what a search chooses by."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

from burnish.passes import catalog
from burnish.passes.budget import Budget
from burnish.passes.lossy import Edit
from burnish.passes.plan import Plan as Todo
from burnish.passes.scoring import Scorer
from burnish.passes.scouting import Scout
from burnish.passes.search import OnStep, neighbours
from burnish.tools.lossy import Scored
from burnish.tools.lossy_judges import Fitting


def saving(budget: Budget, *, beside: bool = False) -> Callable[[Edit], float]:
    """What an edit alone saves of what is to become small: seconds or bytes; or where edits beside it are made."""
    if budget.objective == "latency":
        return _beside_others if beside else _seconds
    return _bytes


def _bytes(edit: Edit) -> float:
    return float(edit.savings.bytes)


def _seconds(edit: Edit) -> float:
    return (edit.savings.seconds or 0.0) - edit.savings.conversions


def _beside_others(edit: Edit) -> float:
    return edit.savings.seconds or 0.0


def alone(
    edits: Sequence[Edit], judge: Fitting, name: str, todo: Todo, slack: float, on_step: OnStep
) -> dict[str, Scored]:
    """By key, what each edit does alone; of those that were not worth measuring, why.

    Args:
        edits: of all passes, in their order.
        judge: measures them.
        name: the measure that is their error.
        todo: the passes, and what is allowed.
        slack: so many times the allowed drop may a plan lose before it is healed.
        on_step: progress.
    """
    drop = todo.budget.drop
    allowed = math.inf if drop is None else drop.of(judge.original) * slack
    scout = Scout(saving(todo.budget, beside=True), {catalog.spec(one): one.order for one in todo.lossy}, allowed)
    refusals: dict[str, str] = {}

    def measured(some: Sequence[Edit]) -> list[tuple[float, float]]:
        done, total = len(refusals), len(edits) - len(scout.reasons)
        scores = judge.alone(some, lambda now, _: on_step("scoring edits", done + now, total))
        refusals.update({edit.key: one.reason or "" for edit, one in zip(some, scores, strict=True)})
        return [(one.values[name], judge.drop(one.values[judge.name])) for one in scores]

    scout.run(edits, measured)
    left_out = {key: Scored(math.inf, math.inf, reason, measured=False) for key, reason in scout.reasons.items()}
    scored = {key: Scored(*one, refusals[key]) for key, one in scout.found.items()}
    return {edit.key: (scored | left_out)[edit.key] for edit in edits}


def pairs(
    edits: Sequence[Edit], scores: Mapping[str, Scored], scorer: Scorer, name: str, on_step: OnStep
) -> dict[tuple[str, str], float]:
    """What edits beside each other add to the sum of their errors, or take from it."""
    if not edits:
        return {}
    beside = neighbours([edit for edit in edits if math.isfinite(scores[edit.key].error)])
    found = scorer.scores(beside, lambda done, total: on_step("scoring pairs of edits", done, total))
    return {
        (one.key, other.key): score.values[name] - scores[one.key].error - scores[other.key].error
        for (one, other), score in zip(beside, found, strict=True)
    }
