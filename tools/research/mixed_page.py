"""The page of what `burnish.tools.research.mixed` measured."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_TOP = """# The recipe `mixed` within one percent

`optimize MODEL --recipe mixed --data DATA --max-drop 1%`, once for size and once for latency: a search among removed
blocks, low ranks and numbers of fewer bits. What it wrote is judged on samples that no part of the search saw. The
metric is the one that `optimize` takes for the model and its labels by itself.

*size* is the share of the bytes of the file, data included; *drop* is by how much the metric gets worse, with one
standard error: on the search's own held-out half, and on unseen samples. The budget is one percent of the original's
metric on those samples. *kept* says whether it is kept there: "yes" with the standard error, "no" where more was lost,
"open" where the drop is within the budget and the standard error reaches beyond. *time* is a run in ONNX Runtime
against the file that was given, in turns, on one thread, by the time that this thread had a processor: the middle one
of three pairs of sessions, and between which ends their 95 % intervals lie, on a machine that was busy with other work.
*edits* are how many were made, were run alone, and were proposed; *minutes* the search's, of a processor that other
work shared.

For latency nothing that is written is slower than float32. For size it may be: the digits ViT in 4 and 2 bits takes
about twice the time of a model that runs in a millisecond.

Few rows leave little: a row of a hundred that changes, lost or won, is a standard error of one percent of its own.
That none of `n` rows changes leaves it open whether up to 1 - 0.32^(1/n) of others do, with 68 % certainty, which is
below one percent from 114 rows on; `optimize` says so where fewer are held out ([the idea](../ideas/lossy.md)).
Parts of one photograph are no photographs of their own: on unseen ones the standard error is that of ten photographs,
and among those held out are parts of all that edits were fitted to. Where a kept budget is open, these samples cannot
tell one percent.

MiniLM is searched on 356 pairs of docstrings. One percent is less than a pair of those 178 that are held out, and no
plan held, neither for size nor for time, where each of six down to seven edits changed some: its rows are of the exact
passes alone, which is no longer written then (exit code 4). Searches on 60 pairs,
of which 30 were held out, had come to 50 % of its bytes and 0.85 of its time.

With 20 rows held out EfficientNet-lite0 lost one of a hundred others for size, with 120 it keeps its budget; with 15
lines PP-OCR's reader lost 1.2 and 1.1 % of its places, with 60 it keeps its budget. For time 46 layers of
EfficientNet-lite0 are on integers. None of its 120 held-out rows changed, which are parts of ten photographs; on parts
of ten others 2 % are lost.

A search for time knows what layers on integers save only beside each other ([the idea](../ideas/selection.md)). Before
it did, nine layers of EfficientNet-lite0 were on integers, and it took 0.89 of its time. PP-OCR's classifier of
directions runs in less than a millisecond, and from session to session its time differs by two thirds: the exact passes
alone take it to 0.71.

Made by `python -m burnish.tools.research.mixed NAME size|latency` and `... page`.
"""
_ALL = (
    "EfficientNet-lite0 (A1)",
    "MiniLM (A2)",
    "SmolLM2 (A3)",
    "Silero VAD (A4)",
    "Magika (A5)",
    "PP-OCR, direction (A6)",
    "PP-OCR, reading (A6)",
    "digits ResNet",
    "digits ViT",
)
_HEAD = (
    "| model | metric | size | drop, held out | drop, unseen | allowed there | kept | time | edits | minutes |",
    "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
)


def page(known: Mapping[str, Any]) -> str:
    """The page as Markdown."""
    lines = [_TOP]
    for objective in ("size", "latency"):
        lines += [f"## For {objective}", "", *_HEAD]
        rows = {found["title"]: found[objective] for found in known.values() if objective in found}
        lines += [_row(title, rows[title]) for title in _ALL if title in rows]
        missing = ", ".join(title for title in _ALL if title not in rows)
        lines += ["", *([f"Not measured: {missing}.", ""] if missing else [])]
    lines += ["## What was chosen", ""]
    for found in known.values():
        lines += [f"**{found['title']}**: {found['data']}."]
        for objective in ("size", "latency"):
            if "chosen" in found.get(objective, {}):
                lines.append(f"- {objective} ({found[objective]['split']}): {_chosen(found[objective]['chosen'])}.")
        lines.append("")
    return "\n".join(lines)


def _row(title: str, row: Mapping[str, Any]) -> str:
    if "failed" in row:
        return (
            f"| {title} | nothing is written: {row['failed'].replace('|', '/')} | | | | | | | | {row['cpu'] / 60:.1f} |"
        )
    unseen = row["unseen"]
    drop, allowed = unseen["drop"], 0.01 * abs(unseen["original"])
    task = f"; of the task {row['task'][0]:.4g} to {row['task'][1]:.4g}" if "task" in row else ""
    ratio, low, high = row["time"]
    cells = (
        title,
        f"{row['measure']}{task}",
        f"{100 * row['bytes'] / row['original bytes']:.1f} %",
        f"{row['drop']:.4f} ± {row['spread']:.4f}",
        f"{unseen['drop']:.4f} ± {unseen['spread']:.4f}",
        f"{allowed:.4f}",
        "no" if drop > allowed else "yes" if max(drop, 0.0) + unseen["spread"] <= allowed else "open",
        f"{ratio:.2f} ({low:.2f} to {high:.2f})",
        f"{sum(row['chosen'].values())} / {row['scored']} / {row['proposed']}",
        f"{row['cpu'] / 60:.1f}",
    )
    return f"| {' | '.join(cells)} |"


def _chosen(chosen: Mapping[str, int]) -> str:
    return ", ".join(f"{count} {name}" for name, count in chosen.items()) or "nothing"
