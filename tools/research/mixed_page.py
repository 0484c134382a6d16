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
metric on those samples. *time* is a run in ONNX Runtime against the file that was given, in turns, on one thread, by
the time that this thread had a processor: the middle one of three pairs of sessions, and between which ends their
95 % intervals lie. *edits* are how many were made, were run alone, and were proposed; *minutes* the search's, of a
processor that other work shared.

Few rows leave little: one row of a hundred that changes, lost or won, is a standard error of one percent of its own.
So no plan that changes a held-out line holds on PP-OCR's classifier, and none is made; a budget of one percent wants
several hundred rows. EfficientNet-lite0 was searched on ten photographs in four variants each, 20 of the 40 held out,
and loses one of a hundred others: that none of 20 is lost leaves a loss of up to 5.5 % possible, with 68 % certainty; a
bound of 1 % takes 114 rows. There are no more photographs with labels here. PP-OCR's reader was searched on 15 lines,
with 15 held out: on 30 others 1.1 and 1.2 % of its places change, and nothing of what it reads. Where the standard
error on unseen samples is larger than what is allowed there, these samples cannot tell one percent.

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
    "| model | metric | size | drop, held out | drop, unseen | allowed there | time | edits | minutes |",
    "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
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
            f"| {title} | nothing is written: {row['failed'].replace('|', '/')} | | | | | | | {row['cpu'] / 60:.1f} |"
        )
    unseen = row["unseen"]
    task = f"; of the task {row['task'][0]:.4g} to {row['task'][1]:.4g}" if "task" in row else ""
    ratio, low, high = row["time"]
    cells = (
        title,
        f"{row['measure']}{task}",
        f"{100 * row['bytes'] / row['original bytes']:.1f} %",
        f"{row['drop']:.4f} ± {row['spread']:.4f}",
        f"{unseen['drop']:.4f} ± {unseen['spread']:.4f}",
        f"{0.01 * abs(unseen['original']):.4f}",
        f"{ratio:.2f} ({low:.2f} to {high:.2f})",
        f"{sum(row['chosen'].values())} / {row['scored']} / {row['proposed']}",
        f"{row['cpu'] / 60:.1f}",
    )
    return f"| {' | '.join(cells)} |"


def _chosen(chosen: Mapping[str, int]) -> str:
    return ", ".join(f"{count} {name}" for name, count in chosen.items()) or "nothing"
