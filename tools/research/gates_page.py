"""The page of gates, from its numbers."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

FOLDER = Path(__file__).resolve().parents[2] / "docs" / "results"
PAGE = FOLDER / "gates.md"
SHARES, SEEDS, FITTED = (0.2, 0.4, 0.6), (0, 1, 2), 512
LANGUAGE_SHARE, TEXTS, WINDOWS = 0.2, 32, 12

_NAMES = {
    "vision": "Digits ViT (three blocks, a norm before each branch)",
    "text": "Docstrings by package (three blocks like BERT's, a norm behind each sum; trained with each seed)",
    "unseen": "The same classifier, routers learned on 450 rows that it was not trained on, judged on 450 others",
}

_HEAD = f"""# Gates around attention

`python -m burnish.tools.research.gates` makes this page ([how gates work](../ideas/gates.md)).

`optimize -p gate-attention{{skip=...}}` learns a router for each attention on {FITTED} training rows, without
labels. What it has to beat is attention that is dropped for good at the same mean share of skipped attentions:
of each number of attentions, the set is dropped that is nearest to the original on the same rows, all sets
tried; between two numbers the accuracy is the one on the line between them, as if rows were drawn by lot. *By
lot* are gates with drawn weights, each of which skips as many rows as the learned one. Accuracy in percent on
held-out rows; *skipped* is measured there, too.
"""

_CLASSIFIER = """
| wanted | seed | chosen | skipped | gates | dropped at that share | by lot (skipped) |
| --- | --- | --- | --- | --- | --- | --- |
"""


_FOUND = """
## What was found

- Means of three seeds, gates against what can be dropped at the same share: on the vision transformer 97.5 against 95.9
  at 20 %, 87.4 against 87.2 at 40 %, 64.5 against 59.5 at 60 %; on the docstrings 74.6 against 74.5, 70.5 against 70.9,
  and 68.4 against 64.5. At 40 % gates win nothing, and single seeds lose up to 4.6 points.
- The routers of the docstrings were learned on rows that the classifier had been trained on, where its scores are surer
  than on others. On rows that it had not seen, the seed that loses there wins.
- On SmolLM2 gates are hardly better than dropping: the line between 5 and 6 dropped attentions is at 22.92 for the same
  share, the gates are at 22.75.
- Training with straight-through gradients came out ahead on held-out rows in two of six cases, both on the docstrings,
  where accuracy rose by 4.0 and 1.2 points; on the vision transformer never.
- Deciding takes time: a small model is faster only where more than a third is skipped.
"""


def numbers_of(name: str) -> Path:
    """Where the numbers of a part are."""
    return FOLDER / f"gates-{name}.json"


def write() -> None:
    """Write what is known."""
    PAGE.write_text("".join(_lines()), encoding="utf-8")


def _lines() -> Iterator[str]:
    yield _HEAD
    times = []
    for name, title in _NAMES.items():
        known = _known(name)
        if not known:
            continue
        yield f"\n## {title}\n\n"
        for seed in SEEDS:
            if static := known.get(f"static | {seed}"):
                shown = ", ".join(f"{100 * one['accuracy']:.1f} without {len(one['dropped'])}" for one in static)
                yield f"Dropped for good{f', seed {seed}' if name == 'text' else ''}: {shown}.\n"
        yield _CLASSIFIER
        for share in SHARES:
            for steps in (0, 100):
                for seed in SEEDS:
                    if row := known.get(f"{share} | {steps} | {seed}"):
                        static = known.get(f"static | {seed}") or known["static | 0"]
                        yield _row(share, f"{seed}, {steps} steps" if steps else str(seed), row, static)
                        if "time" in row and name != "unseen":
                            times.append((title.partition(" (")[0], row))
    yield from _language(_known("language"))
    if times:
        yield from _times(times)
    yield _FOUND


def _row(share: float, seed: str, row: Mapping[str, Any], static: list[dict[str, Any]]) -> str:
    count = len(static) - 1
    at = [one / count for one in range(count + 1)]
    dropped = float(np.interp(row["skipped"], at, [one["accuracy"] for one in static]))
    lots = ", ".join(f"{100 * one['accuracy']:.1f} ({100 * one['skipped']:.0f} %)" for one in row["by lot"])
    return (
        f"| {100 * share:.0f} % | {seed} | {row['how']} | {100 * row['skipped']:.1f} % | {100 * row['accuracy']:.1f}"
        f" | {100 * dropped:.1f} | {lots or '-'} |\n"
    )


def _language(known: Mapping[str, Any]) -> Iterator[str]:
    if "gates" not in known or "original" not in known:
        return
    gates = known["gates"]
    yield f"""
## SmolLM2 (30 blocks)

`skip={LANGUAGE_SHARE},rounds=1`, learned on {TEXTS} texts of 32 tokens of the Python manual; perplexity on {WINDOWS}
windows of 256 tokens of other topics. Dropped for good is the attention that moves the outputs of the same texts least
when it alone goes. Each window is computed at once, so gates see the mean of the whole of it; the model has no caches.

| | perplexity |
| --- | --- |
| original | {known["original"]:.2f} |
| gates ({gates["how"]}): {gates["gates"]} of them, {100 * gates["skipped"]:.1f} % skipped | {gates["perplexity"]:.2f} |
"""
    for name, row in known.items():
        if name.startswith(("static", "by lot")):
            how = "dropped" if name.startswith("static") else f"dropped {name}"
            share = 100 * len(row["dropped"]) / len(gates["alone"])
            yield f"| {how}: {', '.join(map(str, row['dropped']))} ({share:.1f} %) | {row['perplexity']:.2f} |\n"


def _times(times: list[tuple[str, Mapping[str, Any]]]) -> Iterator[str]:
    yield """
## Time

24 held-out rows, one after the other, one thread, ONNX Runtime, over the time of the original; the clock is that of the
thread on a busy machine, medians of 30 rounds with their 95 % intervals.

| | skipped | time |
| --- | --- | --- |
"""
    for title, row in times:
        ratio, low, high = row["time"]
        yield f"| {title} | {100 * row['skipped']:.1f} % | {ratio:.3f} ({low:.3f} to {high:.3f}) |\n"
    language = _known("language").get("gates")
    if language:
        ratio, low, high = language["time"]
        yield f"| SmolLM2, 2 windows | {100 * language['skipped']:.1f} % | {ratio:.3f} ({low:.3f} to {high:.3f}) |\n"


def _known(name: str) -> Mapping[str, Any]:
    path = numbers_of(name)
    found: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    return found
