"""The page of widths along a line and in steps, from the numbers of `rexnet.py`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).resolve().parents[2] / "docs" / "results"
NUMBERS, PAGE = FOLDER / "rexnet.json", FOLDER / "rexnet.md"
SEEDS = (0, 1, 2)
WIDE = 32
"""Channels before a random layer."""
RATIOS = (1, 2, 4, 6, 8)
NAMES = (
    "in steps, ReLU6",
    "in steps, SiLU",
    "along a line, SiLU, residuals of equal widths only",
    "along a line, SiLU",
)
FORMS = ("Slice, Add, ScatterND (as TorchScript writes it)", "Slice, Add, Concat", "Pad, Add (`pad-residual`)")

_HEAD = """# Widths along a line

[ReXNet](https://arxiv.org/abs/2007.00992) (Han et al., CVPR 2021) makes the channels of the blocks grow along a line
with their depth, where other networks double them from stage to stage, and adds the input of a block to the first of
its outputs where it puts out more. `python -m burnish.tools.research.rexnet_networks OUT.onnx` writes the network of
the paper with random weights (4.8 million parameters; a number behind the file scales its widths);
`python -m burnish.tools.research.rexnet` makes this page.

On digits, at equal parameters, it makes no difference that 500 digits and three seeds resolve, and no more do SiLU for
ReLU6 and partial residuals for none. What the ranks say is the same for all: the narrow values between the blocks are
used to the last channel (`inspect --rank` calls them narrow) but for the last ones, where widths in steps have most to
spare. The paper prefers SiLU to ReLU6 for its higher ranks; counted by variance they are lower behind random layers,
and no different in trained ones.

"""


def write(known: Mapping[str, Any]) -> None:
    """Write the page with what is known."""
    lines = [_HEAD, *_digits(known), *_blocks(known), *_random(known), *_forms(known)]
    PAGE.write_text("".join(lines).rstrip("\n") + "\n", encoding="utf-8")


def _rows(known: Mapping[str, Any], name: str) -> list[dict[str, Any]]:
    return [known[key] for seed in SEEDS if (key := f"{name} | {seed}") in known]


def _digits(known: Mapping[str, Any]) -> list[str]:
    lines = [
        "## On digits\n\n"
        "Eight inverted bottlenecks, six times as wide inside, at 8, 4 and 2 pixels, trained anew with three seeds;\n"
        "accuracy in percent on 500 held-out digits, of which one is 0.2 points and the standard error of one number\n"
        "0.4. *Used* is the share of the channels that holds 99 % of the variance over the training digits,\n"
        "as `burnish inspect --rank` counts it, mean over the blocks and seeds: of what a block reads, and of the\n"
        "wide value inside it.\n\n"
        "| widths | channels of the blocks | parameters | file, bytes | by seed | mean | used, read | used, inside |\n"
        "| --- | --- | --- | --- | --- | --- | --- | --- |\n"
    ]
    for name in NAMES:
        rows = _rows(known, name)
        if rows:
            scores = [100 * row["accuracy"] for row in rows]
            read, inside = (_share(rows, first) for first in (0, 1))
            first = rows[0]
            lines.append(
                f"| {name} | {', '.join(map(str, first['widths']))} | {first['parameters']:,} | {first['bytes']:,}"
                f" | {', '.join(f'{one:.1f}' for one in scores)} | {sum(scores) / len(scores):.1f}"
                f" | {100 * read:.0f} % | {100 * inside:.0f} % |\n"
            )
    return [*lines, "\n"]


def _blocks_of(row: Mapping[str, Any]) -> tuple[list[Any], list[Any]]:
    """What the blocks after the first read, and what their narrow layers read; (channels, used) each.

    The first block has no layer that makes it wider; the last pointwise layer is the one behind the blocks.
    """
    used = row["used"]
    return used[1:-1:2], used[2:-1:2]


def _share(rows: list[dict[str, Any]], which: int) -> float:
    shares = [used / channels for row in rows for channels, used in _blocks_of(row)[which]]
    return float(sum(shares) / len(shares))


def _blocks(known: Mapping[str, Any]) -> list[str]:
    lines = [
        "## By block\n\nChannels that a block reads and has inside, and behind the stroke how many of them are used"
        " (mean of the seeds).\n"
    ]
    for name in NAMES:
        rows = _rows(known, name)
        if not rows:
            continue
        count = len(_blocks_of(rows[0])[0])
        lines.append(f"\n| {name} | {' | '.join(str(block + 2) for block in range(count))} |\n")
        lines.append("| --- " * (count + 1) + "|\n")
        for which, title in enumerate(("read", "inside")):
            cells = []
            for block in range(count):
                used = sum(_blocks_of(row)[which][block][1] for row in rows) / len(rows)
                cells.append(f"{_blocks_of(rows[0])[which][block][0]} / {used:.3g}")
            lines.append(f"| {title} | {' | '.join(cells)} |\n")
    return [*lines, "\n"]


def _random(known: Mapping[str, Any]) -> list[str]:
    titles = {"none": "none", "ReLU6": "ReLU6", "SiLU": "SiLU"}
    lines = [
        f"## Behind random layers\n\nThe share of the channels used behind a random layer that makes {WIDE} normal"
        " channels so many times as wide,\nmean of 20.\n\n"
        f"| activation | {' | '.join(f'{ratio}x' for ratio in RATIOS)} |\n" + "| --- " * (len(RATIOS) + 1) + "|\n"
    ]
    for name, title in titles.items():
        if f"random {name}" in known:
            lines.append(f"| {title} | {' | '.join(f'{100 * one:.0f} %' for one in known[f'random {name}'])} |\n")
    return [*lines, "\n"]


def _forms(known: Mapping[str, Any]) -> list[str]:
    if "forms" not in known:
        return []
    lines = [
        "## Spellings of the residual\n\n"
        "ReXNet 1.0 with random weights, one image of 224 x 224 pixels, one thread, in ONNX Runtime as `optimize\n"
        "--target ort-cpu` writes it with and without `pad-residual`, in turns on the clock of the thread of a busy\n"
        "machine; medians, and the ratio to the last with its 95 % interval.\n\n"
        "| spelling | ms | ratio |\n| --- | --- | --- |\n"
    ]
    for title in FORMS:
        time, ratio, low, high = known["forms"][title]
        lines.append(f"| {title} | {time:.4g} | {ratio:.3f} ({low:.3f} to {high:.3f}) |\n")
    return lines
