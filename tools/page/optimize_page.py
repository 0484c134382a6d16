"""The report of an `optimize` run as a page."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

import onnx_ir as oir

import burnish
from burnish.ir import concrete, origin
from burnish.passes.base import Skip
from burnish.passes.pipeline import Step
from burnish.tools import compiled, report, terminal
from burnish.tools.api import Result
from burnish.tools.page import lossy_section
from burnish.tools.page.alignment import pair, parts_of
from burnish.tools.page.charts import change, cost_charts
from burnish.tools.page.costs import Costs, costs
from burnish.tools.page.graphs import graphs
from burnish.tools.page.parts import Entry, Figure, Page, Section, State, Table, name

_SITES = 6
"""Sites that are named for each reason to leave them alone."""


def optimize_page(result: Result, original: oir.Model) -> Page:
    """What `optimize` did, for people.

    Args:
        result: of the run.
        original: the model as it was read.
    """
    opened = concrete.open_dims(original, result.dims)
    dims = {**result.dims, **dict.fromkeys(opened, 1)}
    before, after = costs(original, dims), costs(result.model, dims)
    sized = _sized(original, dims)
    pairs = pair(parts_of(before.segments), parts_of(after.segments))
    charts = cost_charts(pairs, before, after, sized)
    sections = [
        Section("Before and after", "compared", _compared(result, before, after, sized)),
        Section("Graph", "graph", (graphs(pairs, "before", "after"),), (_HOW,)),
        Section("Layers", "layers", tuple(charts)),
        *lossy_section.sections(result.lossy),
        Section("Passes", "passes", _passes(result), _passes_lead(result)),
        Section("Proof", "proof", _proof(result)),
    ]
    source = Path(result.source).name if result.source else original.graph.name or "model"
    state, mark = _outcome(result)
    return Page(
        title=name(source),
        kind="optimize",
        state=state,
        mark=mark,
        summary=_summary(result, before, after, source),
        figures=tuple(_figures(result, before, after)),
        sections=tuple(one for one in sections if one.parts or one.lead),
        foot=(
            f"Made by burnish {burnish.__version__} for the target {result.target}.",
            *(f"Written: {path}" for path in result.files),
        ),
    )


_HOW = (
    "Each line is a node: its operator, what it reads, its attributes. A node that is read is called by its operator, a"
    " weight by its dtype and shape, and `entry` is what a block reads from the block before it. Blocks with the same"
    " lines are shown once."
)


def _sized(model: oir.Model, dims: dict[str, int]) -> str:
    opened = concrete.open_dims(model, {})
    shown = ", ".join(f"{one}={dims[one]}" for one in opened if one in dims)
    return f"Counted for {shown}." if shown else ""


def _outcome(result: Result) -> tuple[State, str]:
    check = result.proof.verification
    if check is None or not check.outputs:
        return State.WARN, "not verified"
    if result.lossy is not None and result.lossy.edits:
        return (State.GOOD, "loss measured") if result.lossy.judged is not None else (State.WARN, "loss not measured")
    return State.GOOD, "verified"


def _summary(result: Result, before: Costs, after: Costs, source: str) -> str:
    said = f"{name(source)} went from {before.nodes} to {terminal.count(after.nodes, 'node')}"
    was, now = result.sizes
    if was is not None and now is not None:
        said += f" and from {terminal.size(was)} to {terminal.size(now)}"
    elif terminal.size(before.bytes) != terminal.size(after.bytes):
        said += f" and from {terminal.size(before.bytes)} to {terminal.size(after.bytes)} of weights"
    check, (latency, _) = result.proof.verification, result.timing
    if check is None or check.worst is None:
        proof = "nothing was verified" + (f": {result.proof.unverified}" if result.proof.unverified else "")
    else:
        where = f"on {terminal.count(len(check.samples), 'sample')}"
        proof = f"its outputs agree within {check.worst.error:.1e} {where}"
        if result.lossy is not None and result.lossy.edits:
            edits = terminal.count(len(result.lossy.edits), "lossy edit")
            loss = lossy_section.loss(result.lossy)
            made = f"{edits} {'was' if len(result.lossy.edits) == 1 else 'were'} made"
            proof = f"{made} and {loss}" if loss else f"{made}, and what was lost was not measured"
    if latency is not None:
        span = f"{latency.low:.3f} to {latency.high:.3f}"
        if latency.faster or latency.slower:
            proof += f"; it takes {latency.ratio:.3f} times the original's time ({span})"
        else:
            proof += f"; its time is {span} of the original's: {latency.words}"
    if result.compiled is not None:
        manifest = result.compiled.manifest
        state = "agrees with it" if manifest.verified else "was not run"
        proof += f"; its code for {manifest.target} {state}"
    return f"{said}; {proof}."


def _figures(result: Result, before: Costs, after: Costs) -> list[Figure]:
    found = [_share("nodes", before.nodes, after.nodes, str)]
    was, now = result.sizes
    if was is not None and now is not None:
        found.append(_share("size of the file", was, now, terminal.size))
    else:
        found.append(_share("bytes of weights", before.bytes, after.bytes, terminal.size))
    if before.macs and after.macs is not None:
        found.append(_share("multiply-adds", before.macs, after.macs, terminal.quantity))
    latency, timed = result.timing
    if latency is not None:
        state = State.GOOD if latency.faster else State.BAD if latency.slower else State.PLAIN
        number, span = f"{latency.ratio:.3f} ×", f"{latency.low:.3f} to {latency.high:.3f}"
        if state is State.PLAIN:
            number = f"{latency.low:.2f} – {latency.high:.2f} ×"
        found.append(Figure(number, "time of a run", f"{span}: {latency.words}", state))
    check = result.proof.verification
    if result.lossy is not None and result.lossy.edits:
        found += lossy_section.figures(result.lossy)
    elif check is not None and check.worst is not None:
        said = f"allowed {check.worst.tolerance:.0e}, {terminal.count(len(check.samples), 'sample')}"
        found.append(Figure(f"{check.worst.error:.1e}", "largest relative error", said, State.GOOD))
    return found


def _share(what: str, before: int, after: int, spell: Callable[[int], str]) -> Figure:
    said = f"{spell(before)} → {spell(after)}"
    text = change(before, after)
    if not text:
        return Figure(spell(after), what, "unchanged" if before == after else said)
    return Figure(text, what, said, State.GOOD if after < before else State.WARN)


def _compared(result: Result, before: Costs, after: Costs, sized: str) -> tuple[Table, ...]:
    rows = [
        ("nodes", str(before.nodes), str(after.nodes), change(before.nodes, after.nodes)),
        ("kinds of operators", str(len(before.operators)), str(len(after.operators)), ""),
        ("blocks", str(before.blocks), str(after.blocks), ""),
        ("attention layers", str(before.attentions), str(after.attentions), ""),
        (
            "parameters",
            f"{before.parameters:,}",
            f"{after.parameters:,}",
            change(before.parameters, after.parameters),
        ),
        (
            "bytes of weights",
            terminal.size(before.bytes),
            terminal.size(after.bytes),
            change(before.bytes, after.bytes),
        ),
        (
            "multiply-adds",
            terminal.quantity(before.macs),
            terminal.quantity(after.macs),
            change(before.macs, after.macs),
        ),
        ("peak of activations", _bytes(before.peak), _bytes(after.peak), change(before.peak, after.peak)),
        ("opset", before.opsets, after.opsets, ""),
    ]
    was, now = result.sizes
    if was is not None or now is not None:
        written = "not written" if now is None else terminal.size(now)
        rows.append(("size of the files", _bytes(was), written, change(was, now)))
    latency, timed = result.timing
    if latency is not None:
        rows.append(("time of a run", "1", f"{latency.ratio:.3f} ({latency.low:.3f} to {latency.high:.3f})", ""))
    if result.lossy is not None:
        rows += lossy_section.rows(result.lossy)
    names = sorted({*before.operators, *after.operators}, key=lambda one: (-before.operators.get(one, 0), one))
    counts = [(one, before.operators.get(one, 0), after.operators.get(one, 0)) for one in names]
    operators = Table(
        "Operators",
        ("operator", ">before", ">after", ">change"),
        tuple((one, str(a), str(b), f"{b - a:+d}".replace("-", "−") if a != b else "") for one, a, b in counts),
        folded=True,
    )
    unknown = "?" in (cell for row in rows for cell in row)
    note = f"{sized} A `?` is a number that could not be counted.".strip() if unknown else sized
    return Table("", ("", ">before", ">after", ">change"), tuple(rows), note), operators


def _bytes(count: int | None) -> str:
    return "?" if count is None else terminal.size(count)


def _passes_lead(result: Result) -> tuple[str, ...]:
    steps = report.merged(result.steps)
    if not steps:
        return ("No pass ran.",)
    fired = sum(1 for step in steps if step.outcome.rewritten and not step.undone)
    seconds = sum(step.seconds for step in steps)
    text = f"{fired} of {len(steps)} pass{'es' * (len(steps) != 1)} changed something, in {seconds:.2g} s of CPU time."
    return (f"{text} A site is a place that a pass looked at; a site that stays as it is has a reason.",)


def _passes(result: Result) -> tuple[Entry | Table, ...]:
    steps = report.merged(result.steps)
    quiet = [step for step in steps if not (step.outcome.rewritten or step.outcome.skipped or step.undone)]
    found: list[Entry | Table] = [_pass(step) for step in steps if step not in quiet]
    if quiet:
        names = ", ".join(step.spec for step in quiet)
        title = f"{len(quiet)} further pass{'es' * (len(quiet) != 1)} found no site"
        seconds = sum(step.seconds for step in quiet)
        found.append(Entry(title, State.PLAIN, "no site", f"{1e3 * seconds:.0f} ms", (names,), code=False))
    recipe = tuple((str(number), spec) for number, spec in enumerate(result.recipe, 1))
    return *found, Table("Recipe", (">", "pass"), recipe, folded=True)


def _pass(step: Step) -> Entry:
    outcome, more = step.outcome, step.nodes[1] - step.nodes[0]
    if step.undone:
        state, mark = State.WARN, "undone"
    elif outcome.rewritten:
        state, mark = State.GOOD, f"changed {outcome.rewritten}"
    else:
        state, mark = State.PLAIN, "left alone"
    said = [f"{more:+d} nodes".replace("-", "−") if more else "", f"{1e3 * step.seconds:.0f} ms"]
    paragraphs = [f"Undone: {step.undone}."] if step.undone else []
    paragraphs.append(
        f"{terminal.count(outcome.eligible, 'site')} looked at, {outcome.matched} with the whole pattern,"
        f" {outcome.rewritten} changed. Nodes {step.nodes[0]} → {step.nodes[1]}, bytes of constants"
        f" {terminal.size(step.bytes[0])} → {terminal.size(step.bytes[1])}."
    )
    if outcome.changed_ops:
        ops = ", ".join(f"{op} {count}" for op, count in outcome.changed_ops.most_common())
        places = _some([one for one in outcome.changed_nodes if one != "?"])
        paragraphs.append(f"Changed: {ops}" + (f"; at {places}." if places else "."))
    tables = (_skipped(outcome.skipped),) if outcome.skipped else ()
    return Entry(step.spec, state, mark, ", ".join(filter(None, said)), tuple(paragraphs), tables)


def _skipped(skips: Sequence[Skip]) -> Table:
    groups: dict[tuple[str, str], list[Skip]] = {}
    for skip in skips:
        groups.setdefault((skip.op, skip.reason), []).append(skip)
    counts = Counter({key: len(some) for key, some in groups.items()})
    rows = tuple(
        (
            reason,
            op,
            str(count),
            terminal.size(sum(one.bytes for one in groups[op, reason])),
            _some([one.node for one in groups[op, reason]]),
        )
        for (op, reason), count in counts.most_common()
    )
    return Table("Left alone", ("because", "operator", ">sites", ">parameters", "where"), rows)


def _some(names: Sequence[str]) -> str:
    shown = ", ".join(name(one) for one in names[:_SITES])
    return f"{shown} and {len(names) - _SITES} more" if len(names) > _SITES else shown


def _proof(result: Result) -> tuple[Table, ...]:
    lines = [*(f"note      {note}" for note in origin.notes(result.model)), *report.proof_lines(result)]
    lines += [] if result.compiled is None else compiled.lines(result.compiled)
    lines += [f"undone    {spec}: {reason}" for spec, reason in result.undone.items()]
    found = [Table("", ("", "what was found"), tuple((line[:10].strip(), line[10:]) for line in lines))]
    check = result.proof.verification
    if check is not None and check.outputs:
        against = "what the lossy edits left" if result.lossy is not None and result.lossy.edits else "the original"
        rows = tuple(
            (
                name(one.output),
                f"{one.error:.2e}",
                f"{one.tolerance:.0e}",
                name(one.sample),
                "yes" if one.holds else "no",
            )
            for one in check.outputs
        )
        found.append(
            Table(
                f"Outputs compared with {against}",
                ("output", ">largest relative error", ">allowed", "on sample", "holds"),
                rows,
            )
        )
        samples = tuple((name(one), "compared") for one in check.samples)
        samples += tuple((name(one), f"refused by the original: {why}") for one, why in check.refused)
        found.append(Table("Samples", ("sample", ""), samples, folded=True))
    return tuple(found)
