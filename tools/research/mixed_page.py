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

For latency nothing that is written is slower than float32. For size it may be: what is stored in few bits is unpacked
at each run, and the digits ViT in 4 and 2 bits takes about twice the time of a model that runs in a millisecond.

Few rows leave little: a row of a hundred that changes, lost or won, is a standard error of one percent of its own.
That none of `n` rows changes leaves it open whether up to 1 - 0.32^(1/n) of others do, with 68 % certainty, which is
below one percent from 114 rows on; `optimize` says so where fewer are held out ([the idea](../ideas/lossy.md)). Where a
kept budget is open, these samples cannot tell one percent, or the standard error of the search was exceeded, as it is
once in six times.

Parts of one photograph are no photographs of their own. EfficientNet-lite0 is searched on photographs as `groups`
([samples](../ideas/samples.md#what-comes-from-one-thing)): no photograph is in both halves, and standard errors are
those of photographs. Only 20 have labels, so it is judged by how many of the original's choices among 1000 classes
stay, and many photographs show what is no class. That is a strict measure: `--recipe int8` changes 1.3 ± 0.5 % of the
choices on the unseen ones, and for time only two convolutions are on integers. On parts of the 20 labelled
photographs, some of each in both halves, the search had put 46 layers on integers, for half of the time: of the
held-out parts none became wrong, of those of other photographs 2 %.

MiniLM is searched on 356 pairs of docstrings. One percent is less than a pair of those 178 that are held out: nothing
may change there. By numbers of 16 and 8 bits nothing does; for time each plan of six down to seven edits changed
some, and nothing is written. Searches on 60 pairs, of which 30 were held out, had come to 0.85 of its time.

Numbers of 16 bits, and convolutions that are stored in 8 or 4, belong to the recipe for size. Without them
EfficientNet-lite0 kept 72 % of its bytes, MiniLM all of them, and PP-OCR's reader 49 %. SmolLM2's row for latency was
measured before they did; searches for time leave both out.

A search for time knows what layers on integers save only beside each other ([the idea](../ideas/selection.md)).
PP-OCR's classifier of directions runs in less than a millisecond, and from session to session its time differs by two
thirds: the exact passes alone take it to 0.71.

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
