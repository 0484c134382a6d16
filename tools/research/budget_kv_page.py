"""The page `docs/results/budget-kv.md`: what is lost with a part of the prompt, by which part that is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from burnish.passes import budget, kv_budget

HEAD = """# Caches that keep a part of the prompt, measured

`python -m burnish.tools.research.budget_kv` makes this page, numbers in [budget-kv.json](budget-kv.json).
[The idea](../ideas/kv.md#a-part-of-the-prompt) says what is done.

"""

NAMES = {
    "uniform": "`by=uniform`: every layer keeps as much (SnapKV)",
    "mass": "`by=mass` (ZigZagKV)",
    "cosine": "`by=cosine`",
    "first and last": "the first 4 and the last tokens, whatever is looked at",
    "last": "the last tokens",
}


def page(numbers: Mapping[str, Any], keeps: Sequence[str], rules: Sequence[str], rows: Sequence[int]) -> str:
    """The page of what is known."""
    found = {
        kind: [numbers[f"{kind} {n}"] for n in range(1000) if f"{kind} {n}" in numbers] for kind in ("text", "copy")
    }
    text = HEAD + _task(found)
    text += "| keeps | chosen by | caches, MB | text: loss | perplexity | over everything | copy: loss | right |\n"
    text += "| --- | --- | --- | --- | --- | --- | --- | --- |\n"
    text += _row(found, "everything", "all", "")
    for keep in keeps:
        for name in NAMES:
            text += _row(found, f"{name} {keep}", keep, NAMES[name])
    return text + _verdict(found, keeps) + _steps(numbers["steps"], keeps, rows) + _layers(numbers, keeps, rules)


def _task(found: Mapping[str, Sequence[Mapping[str, Any]]]) -> str:
    count = len(found["text"])
    return f"""## SmolLM2-135M (A3), prompts of 1,024 tokens

{count} prompts from the Python manual, some of one topic. *Text*: loss of the 64 tokens behind the first one after the
prompt, as the manual goes on, fed at once behind the caches that were kept ({64 * count:,} predictions). *Copy*: the
last 64 tokens of the prompt begin a passage of it again, from a random place; loss of the next 64 tokens behind the
first, which can be looked up there, and how many of them are the likeliest. Budgets are fitted to 4 prompts of other
topics. Caches are measured behind the prompt. The column before those on copies is the mean difference of the loss to
that with all caches, with its standard error over prompts.

"""


def _row(found: Mapping[str, Sequence[Mapping[str, Any]]], name: str, keep: str, rule: str) -> str:
    text, copy = (np.array([one[name]["loss"] for one in found[kind]]) for kind in ("text", "copy"))
    right = np.mean([one[name]["right"] for one in found["copy"]])
    size = np.mean([one[name]["bytes"] for one in found["text"]]) / 1e6
    cells = [keep, rule, f"{size:.2f}", f"{text.mean():.3f}", f"{np.exp(text.mean()):.2f}", _over(found, name)]
    return f"| {' | '.join([*cells, f'{copy.mean():.3f}', f'{100 * right:.1f} %'])} |\n"


def _over(found: Mapping[str, Sequence[Mapping[str, Any]]], name: str) -> str:
    apart = _apart(found["text"], name, "everything")
    return "" if name == "everything" else f"{apart[0]:+.3f} ± {apart[1]:.3f}"


def _apart(rows: Sequence[Mapping[str, Any]], one: str, other: str) -> tuple[float, float]:
    """The mean difference of the loss of two ways, and its standard error."""
    found = np.array([row[one]["loss"] - row[other]["loss"] for row in rows])
    return float(found.mean()), float(found.std(ddof=1) / len(found) ** 0.5)


def _verdict(found: Mapping[str, Sequence[Mapping[str, Any]]], keeps: Sequence[str]) -> str:
    text = "\nDifferences of the loss, prompt by prompt (negative is better; mean and standard error):\n\n"
    text += "| keeps | chosen by | against | text | copy |\n| --- | --- | --- | --- | --- |\n"
    pairs = [("cosine", "uniform"), ("mass", "uniform"), ("cosine", "first and last"), ("uniform", "first and last")]
    for keep in keeps:
        for one, other in pairs:
            cells = (_apart(found[kind], f"{one} {keep}", f"{other} {keep}") for kind in ("text", "copy"))
            shown = " | ".join(f"{mean:+.3f} ± {error:.3f}" for mean, error in cells)
            text += f"| {keep} | {_short(one)} | {_short(other)} | {shown} |\n"
    said = [_said(found, keeps, one, other) for one, other in pairs]
    return text + "\n" + "\n".join(said) + "\n"


def _short(name: str) -> str:
    return f"`by={name}`" if name in ("uniform", "mass", "cosine") else f"the {name} tokens"


def _said(found: Mapping[str, Sequence[Mapping[str, Any]]], keeps: Sequence[str], one: str, other: str) -> str:
    """In how many of the measurements one is better, and worse, than the other by more than two standard errors."""
    apart = [_apart(found[kind], f"{one} {keep}", f"{other} {keep}") for kind in found for keep in keeps]
    better, worse = (sum(sign * mean > 2 * error for mean, error in apart) for sign in (-1, 1))
    counts = f"{better} of {len(apart)}, and more in {worse}"
    return f"- {_short(one)} loses less than {_short(other)}, by more than two standard errors, in {counts}."


def _steps(took: Mapping[str, Sequence[float]], keeps: Sequence[str], rows: Sequence[int]) -> str:
    text = """
## What a step takes

One token for each row behind the prompt, milliseconds of the only thread by its own clock, medians of 15 steps in turns
on a machine with much other work:

| rows | all of the prompt |"""
    text += "".join(f" {keep} |" for keep in keeps) + f"\n|{' --- |' * (2 + len(keeps))}\n"
    for place, count in enumerate(rows):
        cells = [took[name][place] for name in ("everything", *(f"uniform {keep}" for keep in keeps))]
        text += f"| {count} | {' | '.join(f'{one:.0f}' for one in cells)} |\n"
    return text


def _layers(numbers: Mapping[str, Any], keeps: Sequence[str], rules: Sequence[str]) -> str:
    text = "\n## What each layer keeps\n\nPercent of the prompt, layers 0 to 29:\n\n| keeps | chosen by | layers |\n"
    text += "| --- | --- | --- |\n"
    for keep in keeps:
        for rule in rules:
            amount = budget.amount(keep, "--max-size")
            assert amount is not None
            shares = kv_budget.shares(numbers[f"{rule} needs"], amount, 0.2)
            text += f"| {keep} | {rule} | {' '.join(f'{one / 1e4:.0f}' for one in shares)} |\n"
    return text
