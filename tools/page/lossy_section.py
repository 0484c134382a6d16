"""What lossy passes did, as sections of a page: the loss, the edits, what each site loses and what each plan saves."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

from burnish.tools import lossy_report, terminal
from burnish.tools.lossy_doubt import doubt
from burnish.tools.page.parts import Chart, Figure, Point, Section, Series, State, Table, name

if TYPE_CHECKING:
    from burnish.tools.lossy import Lossy

_RANK = re.compile(r"rank (\d+)")


def sections(found: Lossy | None) -> list[Section]:
    """The sections of a run with lossy passes; none without."""
    if found is None:
        return []
    lines = lossy_report.lines(found)
    told = Table("", ("", "what was found"), tuple((line[:10].strip(), line[10:].replace("->", "→")) for line in lines))
    charts = [one for one in (_front(found), _sensitivity(found), _ranks(found)) if one is not None]
    made = (told, _edits(found)) if found.edits else (told,)
    return [
        Section("Loss", "loss", made),
        *([Section("Plans and sites", "plans", tuple(charts), _lead(found))] if charts else []),
    ]


def _lead(found: Lossy) -> tuple[str, ...]:
    if not found.scores:
        return ()
    scored = sum(one.measured for one in found.scores.values())
    return (
        f"{scored} of {len(found.scores)} edits were scored, each alone: the error is how far it moves the outputs on"
        " fitting samples. They were chosen together and the plans measured.",
    )


def loss(found: Lossy) -> str:
    """What was lost, in half a sentence; empty when it was not measured."""
    final = found.final or found.result
    if found.measure is None or found.judged is None or final is None:
        return ""
    return f"{found.measure.name} went from {found.judged.original:.4g} to {final.metric:.4g} on held-out samples"


def figures(found: Lossy) -> list[Figure]:
    """The metric, where it was measured."""
    final = found.final or found.result
    if found.measure is None or found.judged is None or final is None:
        return []
    allowed = None if found.found is None else found.found.allowed
    limit = f", allowed {found.budget.drop}" if found.budget.drop is not None else ""
    unsure = doubt(found)
    holds = allowed is None or (final.sure <= allowed and unsure is None)
    said = f"from {found.judged.original:.4g}; drop {final.drop:.3g} ± {final.spread:.2g}{limit}"
    said += "" if unsure is None else f"; {unsure.why}"
    state = State.PLAIN if allowed is None else State.GOOD if holds else State.WARN
    return [Figure(f"{final.metric:.4g}", found.measure.name, said, state)]


def rows(found: Lossy) -> list[tuple[str, str, str, str]]:
    """Rows of the table of before and after: the metric and the budget."""
    final = found.final or found.result
    made = []
    if found.measure is not None and found.judged is not None:
        after = "" if final is None else f"{final.metric:.4g}"
        change = "" if final is None else f"drop {final.drop:.3g} ± {final.spread:.2g}"
        made.append((f"{found.measure.name} (held out)", f"{found.judged.original:.4g}", after, change))
    budget = found.budget
    wanted = {"drop": budget.drop, "size": budget.size, "latency": budget.latency}
    said = ", ".join(f"{key} {amount}" for key, amount in wanted.items() if amount is not None)
    return [*made, ("budget", "", said, "")] if said else made


def _edits(found: Lossy) -> Table:
    lines = []
    for edit in found.edits:
        score = found.scores.get(edit.key)
        lines.append(
            (
                name(edit.site),
                edit.spec,
                edit.option,
                f"{found.errors[edit.key]:.3g}" if edit.key in found.errors else "",
                "" if score is None else f"{score.error:.3g}",
                "" if score is None else f"{score.drop:.3g}",
                terminal.size(edit.savings.bytes)
                if edit.savings.bytes >= 0
                else f"−{terminal.size(-edit.savings.bytes)}",
                "" if edit.savings.seconds is None else f"{edit.savings.seconds * 1e3:.3f}",
                found.kernels.get(edit.key, ""),
            )
        )
    columns = ("site", "pass", "made", ">layer error", ">error", ">drop", ">saves", ">ms", "kernel")
    used = [index for index in range(len(columns)) if any(line[index] for line in lines)]
    said = "Error and drop of each are those it has alone." if found.scores else ""
    if found.errors:
        said += " The error of a layer is that of what it computes on samples, or of its weights where none were seen."
    if found.kernels:
        said += " Kernels are those that ONNX Runtime runs, read from the graph that it writes."
    chosen = tuple(tuple(line[index] for index in used) for line in lines)
    return Table("Edits that were made", tuple(columns[index] for index in used), chosen, said.strip())


def _scored(found: Lossy) -> list[tuple[str, str, str, float, float, str]]:
    """(pass, site, option, error, drop, refusal) of each scored edit, in the order in which they were proposed."""
    made = []
    for key, score in found.scores.items():
        spec, site, option = (key.split(" | ") + ["", ""])[:3]
        made.append((spec, site, option, score.error, score.drop, score.refusal))
    return made


def _sensitivity(found: Lossy) -> Chart | None:
    scored = _scored(found)
    sites = list(dict.fromkeys(site for _, site, *_ in scored))
    if not any(math.isfinite(error) for *_, error, _, _ in scored):
        return None
    chosen = {edit.key for edit in found.edits}
    places = {site: number for number, site in enumerate(sites)}
    series: dict[str, list[Point]] = {}
    for key, (spec, site, option, error, _, _) in zip(found.scores, scored, strict=True):
        called = "made" if key in chosen else f"not made: {spec}"
        series.setdefault(called, []).append(Point(float(places[site]), error, f"{name(site)}, {option}"))
    lines = tuple(
        (
            name(site),
            spec,
            option,
            f"{error:.3g}",
            f"{drop:.3g}",
            "made" if key in chosen else refusal or "not chosen",
        )
        for key, (spec, site, option, error, drop, refusal) in zip(found.scores, scored, strict=True)
    )
    columns = ("site", "pass", "edit", ">error", ">drop", "")
    return Chart(
        "Sensitivity: the error of each edit alone",
        "site, in the order of the graph",
        "error",
        tuple(Series(called, tuple(points)) for called, points in sorted(series.items())),
        Table("Scored edits", columns, lines),
        places=len(sites),
        logarithmic=sum(error > 0 for *_, error, _, _ in scored) > len(scored) // 2,
        note="Low points are cheap to change. Edits that change nothing have no point on a logarithmic axis.",
    )


def _ranks(found: Lossy) -> Chart | None:
    ranks: dict[str, list[int]] = {}
    for _, site, option, error, *_ in _scored(found):
        match = _RANK.search(option)
        if match and math.isfinite(error):
            ranks.setdefault(site, []).append(int(match[1]))
    made = {edit.site: int(match[1]) for edit in found.edits if (match := _RANK.search(edit.option))}
    sites = list(dict.fromkeys([*ranks, *made]))
    if not sites:
        return None
    offered = tuple(Point(float(n), float(r), name(site)) for n, site in enumerate(sites) for r in ranks.get(site, ()))
    taken = tuple(Point(float(n), float(made[site]), name(site)) for n, site in enumerate(sites) if site in made)
    lines = tuple(
        (name(site), ", ".join(map(str, sorted(ranks.get(site, ())))), str(made.get(site, "whole"))) for site in sites
    )
    return Chart(
        "Rank of each layer",
        "layer, in the order of the graph",
        "rank",
        (Series("made", taken), Series("scored", offered)),
        Table("Ranks", ("layer", "scored ranks", ">made"), lines),
        places=len(sites),
        note="A layer without a point that was made stays whole.",
    )


def _front(found: Lossy) -> Chart | None:
    plans = found.found.plans if found.found is not None else []
    whole = found.whole or 1.0
    measured: dict[str, list[Point]] = {"measured, held-out samples": [], "measured, fitting samples": []}
    lines = []
    for plan in plans:
        saved, edits = 100 * plan.saving / whole, terminal.count(len(plan.edits), "edit")
        for called, one in zip(measured, (plan.held_out, plan.fitted), strict=True):
            if one is not None:
                measured[called].append(Point(saved, one.drop, edits))
        judged = [("" if one is None else f"{one.drop:.4g} ± {one.spread:.2g}") for one in (plan.fitted, plan.held_out)]
        lines.append((edits, f"{saved:.1f}", f"{plan.error:.3g}", *judged))
    if not lines:
        return None
    highest = max((p.y for some in measured.values() for p in some if math.isfinite(p.y)), default=0.0)
    front = [Point(100 * saving / whole, drop) for saving, _, drop in found.frontier if drop <= max(1.5 * highest, 0)]
    series = [Series(called, tuple(points)) for called, points in measured.items() if points]
    if front:
        series.append(Series("predicted: the sum of the edits alone", tuple(front), line=True, dashed=True))
    allowed = None if found.found is None else found.found.allowed
    if allowed is not None:
        right = max([point.x for one in series for point in one.points] or [1.0])
        series.append(Series("allowed", (Point(0.0, allowed), Point(right, allowed)), line=True, dashed=True))
    what = "size" if found.budget.objective == "size" else "time"
    measure = found.measure.name if found.measure is not None else "metric"
    return Chart(
        "What each plan saves and loses",
        f"saved, % of the {what}",
        f"drop of {measure}",
        tuple(series),
        Table("Plans", ("plan", ">saved, %", ">sum of errors", ">drop, fitting", ">drop, held out"), _few(lines)),
    )


def _few(lines: Sequence[tuple[str, ...]]) -> tuple[tuple[str, ...], ...]:
    """Each row once, in order."""
    return tuple(dict.fromkeys(lines))
