"""The page of models without norms, from the numbers of `norms.py`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).resolve().parents[2] / "docs" / "results"
NUMBERS, PAGE = FOLDER / "norms.json", FOLDER / "norms.md"
SEEDS = (0, 1, 2)
STEPS = 300
BUDGET: dict[str, Any] = {"batch": 32, "rate": 1e-3, "evaluations": 10, "patience": 10}
VARIANTS: dict[str, tuple[str, float, int]] = {
    "progressive": ("replace-norm", 0.5, STEPS),
    "unhealed": ("replace-norm", 0.0, 0),
    "unhealed, statistics": ("replace-norm{start=statistics}", 0.0, 0),
    "at once": ("replace-norm", 0.0, STEPS),
    "at once, statistics": ("replace-norm{start=statistics}", 0.0, STEPS),
    "progressive, statistics": ("replace-norm{start=statistics}", 0.5, STEPS),
    "affine": ("replace-norm{with=affine}", 0.0, STEPS),
}
"""The pass, how long norms fade out, and steps of healing; what matters most first."""
TITLES = {
    "unhealed, statistics": "statistics, not healed",
    "unhealed": "least squares, not healed",
    "at once, statistics": "statistics, healed, norms gone at once",
    "progressive, statistics": "statistics, healed, norms fade out",
    "at once": "least squares, healed, norms gone at once",
    "progressive": "least squares, healed, norms fade out (the defaults)",
    "affine": "least squares, `with=affine`, healed, norms gone at once",
}

_HEAD = """# Transformers without norms

`python -m burnish.tools.research.norms` makes this page. Every LayerNorm of two models is replaced by
`optimize -p replace-norm --heal`, from the ONNX file ([how](../ideas/norms.md)); `merge-repbn` then puts the
replacements into the layers behind them where these alone read them. Half of the training rows start and heal ({steps}
steps of {batch} rows, at most {rate:g}; distilled from the original, without labels). Accuracy is that on rows that
neither training nor healing has seen: 500 digits, and 900 docstrings of which the package is guessed. The vision
transformer is the one of `burnish demo`, with three seeds of healing; the classifier of docstrings is trained and
healed with three seeds; without healing the seeds of the former do not differ. One digit is 0.2 points; the standard
error of an accuracy is 0.5 points on the digits and 1.4 on the docstrings.

"""


def write() -> None:
    """Write the page."""
    known = json.loads(NUMBERS.read_text())
    lines = [_HEAD.format(steps=STEPS, batch=BUDGET["batch"], rate=BUDGET["rate"])]
    for bed in ("vision", "text"):
        rows = {name: [row for seed in SEEDS if (row := known.get(f"{bed} | {name} | {seed}"))] for name in TITLES}
        first = next(iter(rows["progressive"]))
        lines.append(f"## {first['bed']}\n\n{first['replaced']} norms. Accuracy in percent.\n\n")
        lines.append("| start and healing | by seed | mean change |\n| --- | --- | --- |\n")
        shown = ", ".join(f"{100 * one['original']:.1f}" for one in rows["progressive"])
        lines.append(f"| original | {shown} | |\n")
        lines += [_row(title, rows[name]) for name, title in TITLES.items() if rows[name]]
        lines.append(_merged(rows["progressive"]))
    lines.append(_times(known))
    PAGE.write_text("".join(lines).rstrip("\n") + "\n", encoding="utf-8")


def _row(title: str, rows: list[dict[str, Any]]) -> str:
    shown = ", ".join(f"{100 * one['accuracy']:.1f}" for one in rows)
    change = sum(one["accuracy"] - one["original"] for one in rows) / len(rows)
    return f"| {title} | {shown} | {100 * change:+.1f} |\n"


def _merged(rows: list[dict[str, Any]]) -> str:
    before, after = rows[0]["nodes"]
    apart = [max(one["apart"][name] for one in rows) for name in ("float32", "float64")]
    return (
        f"\nMerged, {rows[0]['norms']} norms are left; of {before} nodes with RepBN {after} remain. The scores differ\n"
        f"from those before merging by {apart[0]:.1e} of the largest, in float64 by {apart[1]:.1e}.\n\n"
    )


def _times(known: dict[str, Any]) -> str:
    lines = [
        "## Time\n\nThe healed and merged model beside the original, each as `optimize` writes it for the runtime\n"
        "(TVM: all of it compiled, not tuned), run in turns on the thread's clock on a busy machine. Microseconds\n"
        "are medians, the ratio is the median of the rounds' with its 95 % interval.\n\n"
        "| model | where | original, µs | without norms, µs | ratio |\n| --- | --- | --- | --- | --- |\n"
    ]
    for bed in ("vision", "text"):
        row = known[f"{bed} | progressive | {SEEDS[0]}"]
        for where, (one, other, ratio, low, high) in row["times"].items():
            lines.append(
                f"| {row['bed']} | {where} | {one:.4g} | {other:.4g} | {ratio:.3f} ({low:.3f} to {high:.3f}) |\n"
            )
    return "".join(lines)
