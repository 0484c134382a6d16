"""The page and the picture of `lowrank.py`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from burnish.tools import plots

RESULTS = Path(__file__).resolve().parents[2] / "docs" / "results"
SHARES = (0.9, 0.7, 0.5)
METHODS = ("ours", "ours, no bias", "ASVD", "ASVD + bias", "SVD", "SVD + bias")
Row = dict[str, Any]

_HEAD = """# Low rank, measured

Made by `python -m burnish.tools.research.lowrank`; numbers in [lowrank.json](lowrank.json). `project-rank` against the
truncated SVD of the weight and ASVD (columns scaled by the root of the mean magnitude of their input), both in the same
pass (`basis=weight`, `basis=activation`): every layer that can be two factors keeps the same share of its weight, with
the same rank for every method, before any training. Nothing is evaluated on what was calibrated on.

"no bias" and "+ bias" say whether the mean output of each layer is kept by its bias: ours keeps it unless told not to,
ASVD and SVD as published do not. `error` is the relative Frobenius error of all outputs. Where it is near 1 or above,
nothing of them is left, and which is larger says little. R@1 of 60 texts and top-1 of 20 pictures move by chance.
"""

_ALONE = (
    "The error of the outputs when one layer is factored to 70 % of its parameters and the others are not, root of the",
    "mean square over the layers. It is what a search adds up, and tells methods apart where all layers together leave",
    "nothing of the outputs: an error of 1 is that of an output of zeros.",
)
_HEALED = (
    "Made by `python -m burnish.tools.research.lowrank_heal`. Factored with the ranks that the selection of",
    "`optimize --max-size` finds, then distilled from the original on the 1297 training digits and four randomly",
    "turned and shifted copies, without labels. Accuracy on the 500 held-out digits, which neither training nor",
    "healing saw; 0.2 points are one digit. With one ratio for all layers instead, the ResNet falls to 0.532 and the",
    "transformer of 169 k to 0.558 before healing: what is kept where matters more than anything that follows.",
)


def write(kept: Row) -> int:
    """Write `lowrank.md` and `lowrank.svg`; 1 where ours has the larger error on some model at some share, else 0."""
    lines = [_HEAD, "![error against the share of parameters](lowrank.svg)", "", "## Before healing"]
    lost = []
    for row in kept["bases"].values():
        lines += ["", *_model(row)]
        lost += [f"{row['name']} at {share:.0%}" for share in SHARES if not _holds(row, share)]
    good = "Ours has the smallest error on every model at every share, against both as published."
    bad = f"Ours has **not** the smallest error on {', '.join(lost)}, against both as published."
    lines[1:1] = [bad if lost else good, ""]
    lines += [*_alone(kept["bases"]), *_healed(kept.get("healed", {}))]
    (RESULTS / "lowrank.md").write_text("\n".join(lines) + "\n")
    _draw(kept["bases"])
    return int(bool(lost))


def _error(row: Row, method: str, share: float) -> float:
    return float(row["results"][f"{method} | {share}"]["error"])


def _holds(row: Row, share: float) -> bool:
    """Whether ours is no worse than ASVD and better than SVD."""
    ours = _error(row, "ours", share)
    return ours <= _error(row, "ASVD", share) and ours < _error(row, "SVD", share)


def _model(row: Row) -> list[str]:
    known = [method for method in METHODS if f"{method} | {SHARES[0]}" in row["results"]]
    lines = [
        f"### {row['name']}",
        "",
        f"{row['layers']} layers factored, {row['left_alone']} left alone. {row['metric_name']}: the original has "
        f"{row['metric']:.4g}.",
        "",
        "| parameters of the layers | " + " | ".join(known) + " |",
        "| --- |" + " --- |" * len(known),
    ]
    for share in SHARES:
        least = min(_error(row, method, share) for method in known)
        cells = []
        for method in known:
            one = row["results"][f"{method} | {share}"]
            text = f"{one['error']:.3f}"
            cells.append(f"{f'**{text}**' if one['error'] == least else text} / {one['metric']:.4g}")
        lines.append(f"| {share:.0%} | " + " | ".join(cells) + " |")
    return [*lines, "", "Error / metric; the smallest error is bold."]


def _alone(rows: dict[str, Row]) -> list[str]:
    """What the layers do alone, where it was measured."""
    lines = [
        "",
        "## Each layer alone",
        "",
        *_ALONE,
        "",
        "| model | ours | ASVD | SVD |",
        "| --- | --- | --- | --- |",
    ]
    for row in rows.values():
        found = [row["results"][f"{method} | 0.7"].get("alone") for method in ("ours", "ASVD", "SVD")]
        if None not in found:
            lines.append(f"| {row['name']} | " + " | ".join(f"{one:.3f}" for one in found) + " |")
    return lines


def _healed(rows: dict[str, Row]) -> list[str]:
    """Factored digits models before and after healing."""
    lines = [
        "",
        "## Healed",
        "",
        *_HEALED,
        "",
        "| model | parameters | kept | original | factored | healed, by seed | steps | mean drop, points |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in rows.values():
        each = [row["healed"][seed] for seed in sorted(row["healed"])]
        drop = 100 * (row["original"] - sum(one["accuracy"] for one in each) / max(len(each), 1))
        steps = ", ".join(str(one["steps"]) for one in each) + f" of {row['batch']}"
        healed = ", ".join(format(one["accuracy"], ".3f") for one in each)
        cells = [row["name"], f"{row['parameters']:,}", f"{row['kept']:.1%}"]
        cells += [f"{row['original']:.3f}", f"{row['factored']:.3f}", healed, steps, f"**{drop:.2f}**"]
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def _draw(rows: dict[str, Row]) -> None:
    with plots.style():
        figure, axes = plots.figure(2.6 * len(rows), 2.8, ncols=len(rows), sharey=True, squeeze=False)
        for axis, row in zip(axes[0], rows.values(), strict=True):
            for method, color, mark in zip(("ours", "ASVD", "SVD"), plots.COLORS, plots.MARKS, strict=False):
                errors = [_error(row, method, share) for share in SHARES]
                axis.plot([100 * share for share in SHARES], errors, color=color, marker=mark, label=method)
            axis.set_title(row["name"])
            axis.set_xlabel("% of the parameters")
            axis.invert_xaxis()
        axes[0][0].set_ylabel("relative error of the outputs")
        axes[0][0].legend()
        plots.save(figure, RESULTS / "lowrank.svg")
