"""The account of the lossy stage: as a dictionary for programs, as lines and a table for people, as a picture."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from burnish.passes import pipeline
from burnish.passes.simulated import LABEL
from burnish.tools import terminal
from burnish.tools.lossy_doubt import doubt

if TYPE_CHECKING:
    from burnish.backends.fx.healing import Healed
    from burnish.passes.lossy import Edit
    from burnish.passes.search import Judgement, Plan
    from burnish.tools.lossy import Lossy


def as_dict(found: Lossy) -> dict[str, Any]:
    """Everything that is known about the lossy stage, in plain types."""
    budget, search = found.budget, found.found
    return {
        "edits": [_edit_as_dict(found, edit) for edit in found.edits],
        "proposed": len(found.scores),
        "measure": None
        if found.measure is None
        else {
            "name": found.measure.name,
            "because": found.reason,
            "higher_is_better": found.measure.higher_is_better,
        },
        "samples": {
            "fitted": found.fitted,
            "held_out": found.held_out,
            "how": found.how,
            "observed": 0 if found.book is None else found.book.samples,
            "seconds_each": _seconds_each(found),
        },
        "notes": dict(found.notes),
        "warning": found.warning,
        "doubt": None if (unsure := doubt(found)) is None else asdict(unsure),
        "simulated": found.model.metadata_props.get(LABEL),
        "budget": {
            "drop": None if budget.drop is None else str(budget.drop),
            "size": None if budget.size is None else str(budget.size),
            "latency": None if budget.latency is None else str(budget.latency),
            "objective": budget.objective,
            "allowed": None if search is None else search.allowed,
        },
        "original": None if found.judged is None else found.judged.original,
        "before_healing": None if found.healed is None else _judgement(found.result),
        "result": _judgement(found.final or found.result),
        "healed": None if found.healed is None else _healed_as_dict(found.healed),
        "weights": _weights(found),
        "time": _time(found),
        "plans": [] if search is None else [_plan_as_dict(plan) for plan in search.plans],
        "frontier": [{"saving": saving, "error": error, "drop": drop} for saving, error, drop in found.frontier],
    }


def _weights(found: Lossy) -> dict[str, float] | None:
    """Bytes of weights of the original, of the edited model, and what the edits by their own accounts leave of them."""
    if found.found is None or found.budget.objective != "size":
        return None
    predicted = found.whole - found.found.plan.saving
    return {"before": found.whole, "after": float(pipeline.constant_bytes(found.model)), "predicted": predicted}


def _time(found: Lossy) -> dict[str, float | str] | None:
    """Seconds of a run of the original and what the edits save of it by their own timings, and where that was."""
    if found.found is None or not found.timed_in:
        return None
    return {"timed_in": found.timed_in, "before": found.whole, "saved": found.found.plan.saving}


def _edit_as_dict(found: Lossy, edit: Edit) -> dict[str, Any]:
    score = found.scores.get(edit.key)
    return {
        "pass": edit.spec,
        "site": edit.site,
        "option": edit.option,
        "parameters": edit.savings.parameters,
        "bytes": edit.savings.bytes,
        "multiply_adds": edit.savings.macs,
        "seconds": edit.savings.seconds,
        "error": None if score is None else score.error,
        "drop": None if score is None else score.drop,
        "kernel": found.kernels.get(edit.key),
        "layer_error": found.errors.get(edit.key),
    }


def _seconds_each(found: Lossy) -> float | None:
    """How long it took to observe the model on a sample."""
    return None if found.book is None or not found.book.samples else found.book.seconds / found.book.samples


def _observed(found: Lossy) -> str:
    each = _seconds_each(found)
    return "" if each is None else f"; observed in {1e3 * each:.3g} ms each"


def _judgement(one: Judgement | None) -> dict[str, float] | None:
    return None if one is None else {"metric": one.metric, "drop": one.drop, "spread": one.spread, "rows": one.rows}


def _plan_as_dict(plan: Plan) -> dict[str, Any]:
    return {
        "edits": list(plan.key),
        "error": plan.error,
        "saving": plan.saving,
        "fitted": _judgement(plan.fitted),
        "held_out": _judgement(plan.held_out),
    }


def lines(found: Lossy) -> list[str]:
    """What was done and what it cost, a line each."""
    by_pass = Counter(edit.spec for edit in found.edits)
    chosen = ", ".join(f"{spec} {count}" for spec, count in by_pass.items())
    of = f" of {len(found.scores)}" if found.scores else ""
    none = ": the model is within the budget as it is" if found.found is not None and not found.edits else ""
    shown = [f"edits     {len(found.edits)}{of}" + (f": {chosen}" if chosen else none)]
    if found.kernels:
        kernels = Counter(kernel or "none of their own" for kernel in found.kernels.values())
        shown.append("kernels   " + ", ".join(f"{kernel} {count}" for kernel, count in kernels.most_common()))
    if errors := {edit.site: found.errors[edit.key] for edit in found.edits if edit.key in found.errors}:
        worst, middle = max(errors, key=errors.__getitem__), statistics.median(errors.values())
        shown.append(f"layers    error {middle:.2g} in the middle, at most {errors[worst]:.2g}: {worst}")
    if (simulated := found.model.metadata_props.get(LABEL)) is not None:
        shown.insert(0, f"note      simulated: {simulated}")
    if found.warning is not None:
        shown.insert(0, f"note      {found.warning}")
    shown += [f"note      {terminal.count(count, 'layer')} {note}" for note, count in found.notes.items()]
    if found.judged is None or found.measure is None:
        return [*shown, "loss      not measured: there are no samples; give some with `--data`"]
    shown.append(f"measure   {found.measure.name}: {found.reason}")
    shown.append(f"samples   {found.how}{_observed(found)}")
    if found.healed is not None:
        shown.append(f"unhealed  {_loss(found, found.result)}")
        shown.append(f"healed    {_healing(found.healed)}")
        if found.healed.frozen:
            count = terminal.count(len(found.healed.frozen), "node")
            shown.append(f"note      {count} kept the integers that they read: {found.healed.frozen[0]}")
    shown.append(f"loss      {_loss(found, found.final or found.result)}")
    if found.timed_in and found.found is not None:
        saved, how = found.found.plan.saving, "timed together" if found.found.plan.whole else "each timed alone"
        shown.append(
            f"time      {1e3 * found.whole:.4g} ms a run {found.timed_in}; the edits, {how}, save"
            f" {1e3 * saved:.3g} ms ({100 * saved / (found.whole or 1):.3g} %)"
        )
    weights = _weights(found)
    if weights is not None and found.edits:
        before, after, predicted = (terminal.size(round(number)) for number in weights.values())
        shown.append(f"weights   {before} -> {after}, predicted {predicted}")
    if (unsure := doubt(found)) is not None:
        shown.append(f"note      {unsure.why}")
    wanted, latency = found.budget.latency, found.latency
    if wanted is not None and latency is not None and latency.ratio > wanted.number:
        span = f"{100 * latency.ratio:.3g} % ({100 * latency.low:.3g} to {100 * latency.high:.3g} %)"
        shown.append(f"note      {wanted} of the time was wanted; what is written was measured to take {span}")
    return shown


def why_nothing(found: Lossy) -> str:
    """Why a search made no edit although some may be lost."""
    if found.budget.objective == "size" and found.frontier and not any(saving for saving, _, _ in found.frontier):
        return "none of the edits makes the model smaller; what makes it faster is searched with `--objective latency`"
    tried = [plan for plan in found.found.plans if plan.edits and plan.held_out] if found.found is not None else []
    if not tried:
        return "no edit stays within the budget on the samples that edits are fitted to"
    least = min(tried, key=lambda plan: plan.held_out.drop if plan.held_out is not None else 0.0)
    if least.held_out is not None and least.held_out.spread == float("inf"):
        samples = terminal.count(found.held_out, "held-out sample")
        return f"{samples} cannot tell how sure a measured drop is: give more, twenty or more in all"
    if any(plan.whole and plan.saving <= 0 for plan in tried if _holds(found, plan)):
        return "the edits that stay within the budget save no time together: the model with all of them was timed"
    return f"no plan holds on the held-out samples; the nearest: {_loss(found, least.held_out)}"


def _holds(found: Lossy, plan: Plan) -> bool:
    allowed = None if found.found is None else found.found.allowed
    return plan.held_out is not None and allowed is not None and plan.held_out.sure <= allowed


def _healed_as_dict(healed: Healed) -> dict[str, Any]:
    names = ("written", "before", "after", "trained", "steps", "seconds", "ended", "history", "improved", "frozen")
    return {name: getattr(healed, name) for name in names}


def _healing(healed: Healed) -> str:
    if not healed.improved:
        return (
            f"nothing: {healed.steps} steps made its loss on held-out rows no smaller ({healed.before:.4g}):"
            f" {healed.ended}"
        )
    return (
        f"loss on held-out rows {healed.before:.4g} -> {healed.after:.4g}, {terminal.count(healed.steps, 'step')},"
        f" {healed.trained:,} numbers trained, {healed.seconds:.0f} s: {healed.ended}"
    )


def _loss(found: Lossy, judged: Judgement | None) -> str:
    assert found.measure is not None and found.judged is not None
    original, allowed = found.judged.original, found.budget.drop
    where = "on the held-out samples"
    if judged is None:
        return f"{found.measure.name} {original:.4g} {where}; nothing was changed"
    relative = allowed is not None and allowed.relative and original
    unit, sign = (100 / abs(original), " %") if relative else (1.0, "")
    drop, spread = judged.drop * unit, judged.spread * unit
    said = f"a drop of {drop:.3g}{sign} (standard error {spread:.2g}{sign})"
    limit = f", allowed {allowed}" if allowed is not None else ""
    return f"{found.measure.name} {original:.4g} -> {judged.metric:.4g} {where}: {said}{limit}"


def show_plan(found: Lossy, name: str | None = None) -> None:
    """Print the edits (of one pass where it is named) with what each does, alone where it was scored, and saves."""
    columns: dict[str, Callable[[Edit], str]] = {
        "pass": lambda edit: edit.spec,
        "site": lambda edit: edit.site,
        "option": lambda edit: edit.option,
        ">layer error": lambda edit: f"{found.errors[edit.key]:.3g}" if edit.key in found.errors else "",
        ">error": lambda edit: f"{found.scores[edit.key].error:.3g}" if edit.key in found.scores else "",
        ">drop": lambda edit: f"{found.scores[edit.key].drop:.3g}" if edit.key in found.scores else "",
        ">saves": lambda edit: terminal.size(edit.savings.bytes),
        ">ms": lambda edit: "" if edit.savings.seconds is None else f"{edit.savings.seconds * 1e3:.3f}",
        "kernel": lambda edit: found.kernels.get(edit.key, ""),
    }
    edits = [edit for edit in found.edits if name in (None, edit.spec.partition("{")[0])]
    rows = [[cell(edit) for cell in columns.values()] for edit in edits]
    filled = [any(row[place] for row in rows) for place in range(len(columns))]
    if rows:
        title = "Edits, each measured alone" if found.scores else "Edits"
        kept = [[cell for cell, there in zip(row, filled, strict=True) if there] for row in (list(columns), *rows)]
        terminal.show(terminal.table(title, kept[0], kept[1:]), terminal.out())


def plot(found: Lossy) -> Any:
    """What the measured plans save against what they lose, and the front that the edits alone predict."""
    from burnish.tools import plots

    figure, axes = plots.figure(8.0, 4.6)
    measure = found.measure.name if found.measure is not None else "metric"
    whole = found.whole or 1.0
    plans = found.found.plans if found.found is not None else []
    highest = 0.0
    for index, (name, where) in enumerate((("fitting samples", "fitted"), ("held-out samples", "held_out"))):
        points = [
            (100 * plan.saving / whole, one.drop, one.spread)
            for plan in plans
            if (one := getattr(plan, where)) is not None and one.drop < float("inf")
        ]
        if points:
            x, y, spread = zip(*sorted(points), strict=True)
            highest = max(highest, *y)
            axes.errorbar(
                x, y, spread, fmt=plots.MARKS[index], color=plots.COLORS[index], capsize=2, label=f"measured, {name}"
            )
    if found.frontier:
        near = [(100 * saving / whole, drop) for saving, _, drop in found.frontier if drop <= 1.5 * highest]
        axes.plot(
            [one for one, _ in near],
            [one for _, one in near],
            color=plots.GREY,
            linewidth=1,
            label="predicted: the sum of the edits alone",
        )
    if found.found is not None and found.found.allowed is not None:
        axes.axhline(found.found.allowed, color=plots.GREY, linewidth=1, linestyle="--", label="allowed")
    what = "size" if found.budget.objective == "size" else "time"
    axes.set(xlabel=f"saved, % of the {what}", ylabel=f"drop of {measure}", title="What each plan saves and loses")
    axes.legend(loc="upper left")
    return figure
