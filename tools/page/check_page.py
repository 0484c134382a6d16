"""The report of `check run` as a page."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import burnish
from burnish.tools import terminal
from burnish.tools.check import alignment, pointed, said
from burnish.tools.check.difference import Difference, Field, Report, Verdict
from burnish.tools.check.differences_contract import ports
from burnish.tools.check.differences_structure import parts as segments_of
from burnish.tools.check.differences_values import movement
from burnish.tools.check.differences_weights import moved
from burnish.tools.check.lock import Lock, OutputLock
from burnish.tools.page.alignment import Pair, Part, joined
from burnish.tools.page.charts import change
from burnish.tools.page.graphs import graphs
from burnish.tools.page.parts import Chart, Entry, Figure, Graphs, Page, Point, Section, Series, State, Table, name

if TYPE_CHECKING:
    import onnx_ir as oir

_STATES = {Verdict.REGRESSION: State.BAD, Verdict.TOLERATED: State.WARN, Verdict.NOTE: State.PLAIN}


def check_page(report: Report, old: oir.Model | None = None, new: oir.Model | None = None) -> Page:
    """What `check run` found, for people.

    Args:
        report: what was found.
        old, new: the model that was locked and the one that was checked, where at hand, for the names of nodes.
    """
    before, after = report.old, report.new
    groups = alignment.align(segments_of(before), segments_of(after, ports(before.inputs, after.inputs).renamed))
    names = _names(before, old), _names(after, new)
    graph = graphs(_pairs(before, after, groups, names), "locked", "now")
    sections = [
        Section("Differences", "differences", tuple(_entries(report, graph)), (_counted(report),)),
        Section("Locked and now", "compared", tuple(_tables(before, after))),
        Section("Graph", "graph", (graph,), (_HOW,)),
        Section("Outputs", "outputs", tuple(_values(before, after))),
        Section("Weights", "weights", tuple(_weights(before, groups))),
    ]
    return Page(
        title=name(Path(report.model).name or "model"),
        kind="check run",
        state=State.GOOD if report.passed else State.BAD,
        mark="passed" if report.passed else "regressed",
        summary=f"{said.sentence(report)}.",
        figures=tuple(_figures(report)),
        sections=tuple(one for one in sections if one.parts or one.lead),
        foot=(
            f"Made by burnish {burnish.__version__}; the lock was made with {before.made_with}.",
            *([f"Lock: {report.lock}"] if report.lock else []),
        ),
    )


def failed_page(model: str, reason: str) -> Page:
    """The page of a run that could not compare anything."""
    return Page(
        title=name(Path(model).name or "model"),
        kind="check run",
        state=State.BAD,
        mark="could not run",
        summary=f"Nothing was compared: {reason}.",
        sections=(),
        foot=(f"Made by burnish {burnish.__version__}.",),
    )


_HOW = (
    "Each line is a node: its operator, what it reads, its attributes. A node that is read is called by its operator, a"
    " weight by its dtype and shape, and `entry` is what a block reads from the block before it. Blocks with the same"
    " lines are shown once."
)


def _entries(report: Report, graph: Graphs) -> Iterator[Entry]:
    """An entry for each difference, regressions first; what concerns nodes leads to them in the graph."""
    order, places = list(Verdict), [(piece.anchor, piece.holds) for piece in graph.pieces]
    for one in sorted(report.differences, key=lambda one: order.index(one.verdict)):
        shown = one.place and name(one.place) if one.field in (Field.STRUCTURE, Field.WEIGHTS) else ""
        yield Entry(
            said.told(one),
            _STATES[one.verdict],
            one.verdict.value,
            one.field.value,
            _told(report, one),
            code=False,
            anchor=next((anchor for anchor, holds in places if shown and shown in holds), ""),
        )


def _told(report: Report, one: Difference) -> tuple[str, ...]:
    values = said.change(one)
    line = pointed.line(report, one)
    texts = [
        f"Was {values[0]}, is {values[1]}." if values is not None else "",
        f"Where: {one.place}." if one.place else "It concerns the model as a whole.",
        f"Line {line} of `{report.lock}`." if line is not None else "",
    ]
    return tuple(text for text in texts if text)


def _counted(report: Report) -> str:
    if not report.differences:
        return "Nothing differs."
    words = {Verdict.REGRESSION: "regressed", Verdict.TOLERATED: "within tolerance", Verdict.NOTE: "noted"}
    counts = {verdict: sum(one.verdict is verdict for one in report.differences) for verdict in words}
    told = ", ".join(f"{counts[verdict]} {word}" for verdict, word in words.items() if counts[verdict])
    notes = " What is noted follows from a regression, or could not be compared." if counts[Verdict.NOTE] else ""
    return f"{terminal.count(len(report.differences), 'difference')}: {told}.{notes}"


def _figures(report: Report) -> Iterator[Figure]:
    regressions = len(report.regressions)
    yield Figure(
        str(regressions),
        "regression" if regressions == 1 else "regressions",
        "",
        State.BAD if regressions else State.GOOD,
    )
    tolerated = sum(one.verdict is Verdict.TOLERATED for one in report.differences)
    if tolerated:
        yield Figure(str(tolerated), "within tolerance", "", State.WARN)
    old, new = report.old.sizes, report.new.sizes
    yield Figure(str(new.nodes), "nodes", f"locked with {old.nodes}" if old.nodes != new.nodes else "as locked")
    was, now = sum(old.bytes.values()), sum(new.bytes.values())
    yield Figure(terminal.size(now), "of weights", f"locked with {terminal.size(was)}" if was != now else "as locked")
    sizes = [one for one in report.differences if one.field is Field.VALUES and one.place]
    if sizes:
        yield Figure(sizes[0].new or "differs", "largest movement of an output", f"`{name(sizes[0].place)}`")


def _names(lock: Lock, model: oir.Model | None) -> Mapping[str, Sequence[str]]:
    """The names of the nodes of each segment by line: all where the model is at hand, else those that the lock has."""
    if model is not None:
        from burnish.ir.segments import segments

        return {one.name: [line.node.name or "" for line in one.lines] for one in segments(model)}
    found = {}
    for segment in lock.segments:
        lines = [""] * len(lock.code.get(segment.code, []))
        for layer in segment.layers:
            if layer.line < len(lines):
                lines[layer.line] = layer.name
        found[segment.name] = lines
    return found


def _pairs(
    old: Lock,
    new: Lock,
    groups: Iterable[alignment.Group],
    names: tuple[Mapping[str, Sequence[str]], Mapping[str, Sequence[str]]],
) -> Iterator[Pair]:
    """The segments of both locks as parts; where blocks are cut otherwise, all between two pairs as one."""
    for group in groups:
        before = [_part(old, one, names[0]) for one in group.old]
        after = [_part(new, one, names[1]) for one in group.new]
        if before and after:
            yield tuple(  # type: ignore[misc]
                some[0] if len(some) == 1 else joined(f"{some[0].name} to {some[-1].name}", some)
                for some in (before, after)
            )
        else:
            yield from ((one, None) for one in before)
            yield from ((None, one) for one in after)


def _part(lock: Lock, one: alignment.Part, names: Mapping[str, Sequence[str]]) -> Part:
    segment = one.segment
    lines = tuple(lock.code.get(segment.code, ()))
    known = tuple(names.get(segment.name, ()))
    if len(known) != len(lines):
        known = ("",) * len(lines)
    return Part(segment.name, segment.structure, segment.weights, lines, known)


def _tables(old: Lock, new: Lock) -> Iterator[Table]:
    rows: list[tuple[str, ...]] = [
        _row("nodes", old.sizes.nodes, new.sizes.nodes, str),
        _row("parameters", old.sizes.parameters, new.sizes.parameters, "{:,}".format),
        *(
            _row(f"bytes of {dtype}", old.sizes.bytes.get(dtype, 0), new.sizes.bytes.get(dtype, 0), terminal.size)
            for dtype in dict.fromkeys([*old.sizes.bytes, *new.sizes.bytes])
        ),
        _row("multiply-adds", old.sizes.multiply_adds, new.sizes.multiply_adds, terminal.quantity),
        _row("peak of activations", old.sizes.peak_activation, new.sizes.peak_activation, terminal.size),
        *(
            _row(view, old.views.get(view, 0), new.views.get(view, 0), str)
            for view in dict.fromkeys([*old.views, *new.views])
        ),
    ]
    metric, timed = (old.metric, new.metric), (old.latency, new.latency)
    if any(metric):
        called = next(one.name for one in metric if one)
        rows.append((called, *("" if one is None else f"{one.value:.4g}" for one in metric), ""))
    if any(timed):
        called = f"time, in that of a {next(one.reference for one in timed if one)}"
        spelled = ("" if one is None else f"{one.ratio:.3g} ({one.low:.3g} to {one.high:.3g})" for one in timed)
        rows.append((called, *spelled, ""))
    sizes = ", ".join(f"{dim}={number}" for dim, number in old.sizes.at.items())
    note = f"Multiply-adds and activations are counted for {sizes}." if sizes else ""
    yield Table("", ("", ">locked", ">now", ">change"), tuple(rows), note)
    yield _listed("Inputs", old.inputs, new.inputs)
    yield _listed("Outputs", old.outputs, new.outputs)
    yield _listed("Opsets", _texts(old.opsets), _texts(new.opsets), folded=True)
    yield _listed("Operators", _texts(old.operators), _texts(new.operators), folded=True)
    yield _listed("Rewrites by pass of the default recipe", _texts(old.passes), _texts(new.passes), folded=True)


def _listed(title: str, old: Mapping[str, str], new: Mapping[str, str], folded: bool = False) -> Table:
    """What both have by name; of a folded table what changed comes first."""
    names = list(dict.fromkeys([*old, *new]))
    changed = [one for one in names if old.get(one) != new.get(one)]
    if folded:
        names.sort(key=lambda one: one not in changed)
    rows = ((name(one), old.get(one, ""), new.get(one, ""), "changed" if one in changed else "") for one in names)
    said = f"{title}: {len(changed)} changed" if changed and folded else title
    return Table(said, ("name", "locked", "now", ""), tuple(rows), folded=folded)


def _texts(numbers: Mapping[str, int]) -> dict[str, str]:
    return {key: str(number) for key, number in numbers.items()}


def _row(what: str, old: int | None, new: int | None, spell: Callable[[int], str]) -> tuple[str, ...]:
    return what, *("?" if one is None else spell(one) for one in (old, new)), change(old, new)


def _values(old: Lock, new: Lock) -> Iterator[Table | Chart]:
    """The outputs on each sample, locked and now."""
    before = {one.sample: one.outputs for one in old.values}
    rows: list[tuple[str, ...]] = []
    points: dict[str, list[Point]] = {}
    for number, sample in enumerate(new.values):
        for output, now in sample.outputs.items():
            was = before.get(sample.sample, {}).get(output)
            if was is None:
                continue
            far = movement(was, now)
            points.setdefault(output, []).append(Point(float(number), far, name(sample.sample)))
            rows.append(
                (name(sample.sample), name(output), _both(was.type, now.type), *_statistics(was, now), f"{far:.2g}")
            )
    if not rows:
        return
    columns = ("sample", "output", "type", ">mean", ">deviation", ">lowest", ">highest", ">moved")
    said = "Where an output is within tolerance, or was not computed anew, the figures are those of the lock."
    table = Table("Outputs on each sample", columns, tuple(rows), said)
    if not any(point.y > 0 for some in points.values() for point in some):
        yield table
        return
    yield Chart(
        "How far each output moved",
        "sample",
        "movement relative to its size",
        tuple(Series(name(output), tuple(some)) for output, some in points.items()),
        table,
        logarithmic=True,
        places=len(new.values),
        note="Estimated from sketches. Outputs that did not move beyond their tolerance have no point.",
    )


def _statistics(was: OutputLock, now: OutputLock) -> Iterator[str]:
    for field in ("mean", "std", "low", "high"):
        yield _both(f"{getattr(was, field):.4g}", f"{getattr(now, field):.4g}")


def _both(was: str, now: str) -> str:
    return was if was == now else f"{was} → {now}"


def _weights(old: Lock, groups: Sequence[alignment.Group]) -> Iterator[Chart]:
    """The layers whose weights moved, in the order of the graph."""
    places: dict[tuple[int, int], int] = {}
    for index, segment in enumerate(old.segments):
        for number in range(len(segment.layers)):
            places[index, number] = len(places)
    found = [one for group in groups if group.pair is not None for one in moved(*group.pair)]
    if not found:
        return
    rows = tuple(
        (
            name(one.new.name or one.old.name),
            one.operator,
            one.part.name,
            f"{one.old.norm:.6g}",
            f"{one.new.norm:.6g}",
            "?" if one.distance is None else f"{one.distance:.2g}",
        )
        for one in found
    )
    columns = ("layer", "operator", "in", ">norm locked", ">norm now", ">moved")
    points = tuple(
        Point(float(places[one.part.index, one.number]), one.distance, name(one.label))
        for one in found
        if one.distance is not None and math.isfinite(one.distance)
    )
    yield Chart(
        "How far the weights of each layer moved",
        f"layer, of {len(places)} in the order of the graph",
        "movement relative to its norm",
        (Series("layers that moved", points),),
        Table("Layers whose weights changed", columns, rows),
        logarithmic=True,
        places=len(places),
        note=f"{len(found)} of {terminal.count(len(places), 'layer')} changed; estimated from sketches.",
    )
