"""The account of an `optimize` run: as a dictionary for programs, as tables for people."""

from __future__ import annotations

import json
import math
import textwrap
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from burnish.ir import origin
from burnish.ir.errors import InputError
from burnish.passes.pipeline import Step
from burnish.tools import choosing, compiled, lossy_report, terminal, whole_file
from burnish.tools.api import Result

if TYPE_CHECKING:
    from rich.console import Console


def merged(steps: list[Step]) -> list[Step]:
    """One step per pass, in order of first appearance: later rounds of the same pass are added to the first.

    What a pass left alone is what its last round left alone.
    """
    found: dict[str, Step] = {}
    for step in steps:
        first = found.get(step.spec)
        if first is None:
            outcome = type(step.outcome)(step.outcome.name)
            found[step.spec] = first = Step(
                step.spec, outcome, 0.0, (step.nodes[0],) * 2, (step.bytes[0],) * 2, step.undone
            )
        first.seconds += step.seconds
        first.nodes = (first.nodes[0], first.nodes[1] + step.nodes[1] - step.nodes[0])
        first.bytes = (first.bytes[0], first.bytes[1] + step.bytes[1] - step.bytes[0])
        first.outcome.rewritten += step.outcome.rewritten
        first.outcome.changed_ops.update(step.outcome.changed_ops)
        first.outcome.changed_bytes += step.outcome.changed_bytes
        first.outcome.changed_nodes += step.outcome.changed_nodes
        first.outcome.skipped = step.outcome.skipped
    return list(found.values())


def as_dict(result: Result) -> dict[str, Any]:
    """Everything that is known about a run, in plain types."""
    check, (latency, timed) = result.proof.verification, result.timing
    return {
        "target": result.target,
        "recipe": result.recipe,
        "files": [str(path) for path in result.files],
        "bytes": {"before": result.sizes[0], "after": result.sizes[1]},
        "passes": [_pass_as_dict(step) for step in merged(result.steps)],
        "lossy": None if result.lossy is None else lossy_report.as_dict(result.lossy),
        "undone": result.undone,
        "notes": list(origin.notes(result.model)),
        "unverified": result.proof.unverified,
        "verification": None
        if check is None
        else {
            "holds": check.holds,
            "samples": check.samples,
            "refused_by_the_original": [{"sample": name, "reason": reason} for name, reason in check.refused],
            "outputs": [
                {"name": c.output, "relative_error": c.error, "allowed": c.tolerance, "sample": c.sample}
                for c in check.outputs
            ],
            "float64": {"relative_error": check.replay, "note": check.replay_note},
            "unseen": check.unseen,
        },
        "latency": None
        if latency is None
        else {
            "ratio": latency.ratio,
            "low": latency.low,
            "high": latency.high,
            "rounds": latency.rounds,
            "sample": timed,
        },
        "compiled": None if result.compiled is None else compiled.as_dict(result.compiled),
    }


def write(result: Result, path: str | Path) -> None:
    """Write everything that is known about a run: as a page for people where the name ends in `.html`, else as JSON.

    Of numbers that JSON lacks it says `infinite` or `nan`.

    Raises:
        InputError: when the file cannot be written, or the page needs the original model and the result lacks it.
    """
    from burnish.tools.page import render

    if render.is_called_page(path):
        from burnish.tools.page import optimize_page

        if result.original is None:
            raise InputError("the result does not hold the original model", place=str(path), hint="use `optimize`")
        render.write(optimize_page.optimize_page(result, result.original), path)
        return
    text = json.dumps(_valid(as_dict(result)), indent=2, allow_nan=False) + "\n"
    whole_file.write(path, text)


def _valid(thing: Any) -> Any:
    """The same without numbers that JSON has no word for."""
    if isinstance(thing, dict):
        return {key: _valid(one) for key, one in thing.items()}
    if isinstance(thing, (list, tuple)):
        return [_valid(one) for one in thing]
    if isinstance(thing, float) and not math.isfinite(thing):
        return "nan" if math.isnan(thing) else "infinite" if thing > 0 else "-infinite"
    return thing


def draw(result: Result, path: str | Path) -> None:
    """Draw what the measured plans of a search save and lose, as `.svg` or `.png`.

    Raises:
        InputError: nothing was searched, or the picture cannot be written.
        MissingPackageError: matplotlib is not installed.
    """
    from burnish.tools import plots

    if result.lossy is None or result.lossy.found is None:
        raise InputError("nothing was searched, so there is nothing to draw", place=str(path), hint="give a `max_drop`")
    with plots.style():
        plots.save(lossy_report.plot(result.lossy), str(path))


def _pass_as_dict(step: Step) -> dict[str, Any]:
    outcome = step.outcome
    reasons: Counter[tuple[str, str]] = Counter()
    amounts: Counter[tuple[str, str]] = Counter()
    for skip in outcome.skipped:
        reasons[skip.op, skip.reason] += 1
        amounts[skip.op, skip.reason] += skip.bytes
    return {
        "pass": step.spec,
        "eligible": outcome.eligible,
        "matched": outcome.matched,
        "changed": outcome.rewritten,
        "changed_by_op": dict(sorted(outcome.changed_ops.items())),
        "changed_bytes": outcome.changed_bytes,
        "skipped": [
            {"op": op, "reason": reason, "sites": count, "bytes": amounts[op, reason]}
            for (op, reason), count in reasons.most_common()
        ],
        "nodes": {"before": step.nodes[0], "after": step.nodes[1]},
        "constants": {"before": step.bytes[0], "after": step.bytes[1]},
        "cpu_seconds": round(step.seconds, 4),
        "undone": step.undone,
    }


def show(result: Result, console: Console | None = None, *, plan: bool = False) -> None:
    """Print what changed, what it was verified against, and what came of it; to stdout by default.

    Args:
        result: the run.
        console: where to print.
        plan: print every lossy edit too.
    """
    from rich.table import Table

    console = console or terminal.out()
    table = Table("pass", "eligible", "matched", "changed", "nodes", "left alone because", box=None, pad_edge=False)
    table.columns[0].overflow = "fold"
    steps = merged(result.steps)
    for step in steps:
        outcome = step.outcome
        if not (outcome.rewritten or outcome.skipped or step.undone):
            continue
        common = Counter(skip.reason for skip in outcome.skipped).most_common(1)
        why = f"undone: {step.undone}" if step.undone else f"{common[0][0]} ({common[0][1]})" if common else ""
        change = step.nodes[1] - step.nodes[0]
        cells = (step.spec, outcome.eligible, outcome.matched, outcome.rewritten, f"{change:+d}" if change else "", why)
        table.add_row(*(str(cell) for cell in cells))
    terminal.show(table, console)
    quiet = sum(1 for step in steps if not (step.outcome.rewritten or step.outcome.skipped or step.undone))
    if quiet:
        console.print(f"{quiet} further pass{'es' * (quiet != 1)} found no site")
    if steps:
        console.print(f"nodes     {steps[0].nodes[0]} -> {sum(len(g) for g in _graphs(result))}")
    before, after = result.sizes
    if before is not None and after is not None:
        console.print(f"size      {terminal.size(before)} -> {terminal.size(after)}")
    if result.lossy is not None:
        for line in lossy_report.lines(result.lossy):
            console.print(line)
    for line in (*(f"note      {note}" for note in origin.notes(result.model)), *proof_lines(result)):
        console.print(line)
    if result.compiled is not None:
        for line in compiled.lines(result.compiled):
            console.print(line)
    for path in result.files[:1]:
        console.print(f"written   {path if result.compiled is None else path.parent}")
    if plan and result.lossy is not None:
        lossy_report.show_plan(result.lossy)


def proof_lines(result: Result) -> list[str]:
    """What was verified and timed, a line each."""
    check, (latency, timed), count = result.proof.verification, result.timing, terminal.count
    if check is None:
        return [f"verified  nothing: {result.proof.unverified}"]
    worst = check.worst
    lines = []
    if worst is not None:
        lines.append(
            f"verified  {count(len(check.outputs), 'output')} on {count(len(check.samples), 'sample')}:"
            f" largest relative error {worst.error:.1e} (allowed {worst.tolerance:.0e})"
            f" in `{worst.output}` on {worst.sample}"
        )
    if check.replay is not None:
        lines.append(f"float64   largest relative error {check.replay:.1e} (allowed 1e-09)")
    elif check.replay_note:
        lines.append(f"float64   {check.replay_note}")
    if check.unseen:
        names = ", ".join(f"`{name}`" for name in check.unseen)
        lines.append(f"unseen    {names}: empty or NaN throughout on every sample, so nothing is known about it")
    if check.refused:
        reason = textwrap.shorten(check.refused[0][1], 160, placeholder=" ...")
        lines.append(f"refused   {count(len(check.refused), 'sample')} by the original itself: {reason}")
    if latency is not None:
        span = f"{latency.low:.3f} to {latency.high:.3f}"
        lines.append(
            f"latency   {latency.ratio:.3f}x of the original ({span}), {latency.words},"
            f" {latency.rounds} paired rounds on {timed}"
        )
    return lines


def why(result: Result, name: str, console: Console | None = None) -> None:
    """Print every site that a pass left alone, with the reason and the bytes of parameters there.

    For `regions`, which is no pass, print where the parts of a compiled model run.
    """
    from rich.table import Table

    console = console or terminal.out()
    if name == "regions":
        made = result.compiled
        choosing.table(None if made is None else made.manifest, console)
        for line in [] if made is None else compiled.lines(made):
            console.print(line)
        return
    steps = [step for step in merged(result.steps) if step.outcome.name == name]
    if not steps:
        listed = any(spec.partition("{")[0] == name for spec in result.recipe)
        console.print(f"`{name}` did not run: {'BURNISH_LIMIT was reached' if listed else 'it is not in the recipe'}")
    for step in steps:
        outcome = step.outcome
        console.print(
            f"{step.spec}: {outcome.eligible} eligible, {outcome.matched} matched, {outcome.rewritten} changed"
        )
        if step.undone:
            console.print(f"undone: {step.undone}")
        table = Table("site", "parameters", "reason", box=None, pad_edge=False)
        for skip in outcome.skipped:
            table.add_row(skip.node, terminal.size(skip.bytes), skip.reason)
        if outcome.skipped:
            terminal.show(table, console)
    if result.lossy is not None:
        lossy_report.show_plan(result.lossy, name)


def _graphs(result: Result) -> list[Any]:
    from burnish.ir.walk import graphs

    return list(graphs(result.model))
