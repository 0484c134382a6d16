"""Blocks that share weights, healed: `python -m burnish.tools.research.tying` writes `docs/results/tying.md`.

The digits ViT of `burnish demo` and a classifier of docstrings have three blocks each, so that every way to share can
be tried. Every number is kept in `docs/results/tying.json` as soon as it is known.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import onnx_ir as oir
import torch

import burnish
from burnish.backends.fx.healing import HealOptions
from burnish.backends.ort.session import executor
from burnish.frontends import onnx_file
from burnish.passes.pipeline import Pipeline, constant_bytes
from burnish.passes.recipes import NORMAL_FORM
from burnish.tools.research.depth import Numbers
from burnish.tools.research.norms_beds import Bed, text, vision
from burnish.tools.research.norms_page import BUDGET, FOLDER, SEEDS, STEPS

PAGE, NUMBERS = FOLDER / "tying.md", FOLDER / "tying.json"
BEDS: dict[str, Callable[[Path, int], Bed]] = {"vision": vision, "text": text}
MAPS = {
    "1:0": "neighbours, the first two",
    "2:1": "neighbours, the last two",
    "2:0": "in turns",
    "1:0+2:0": "all",
}
_HEAD = """# Blocks that share weights

`python -m burnish.tools.research.tying` makes this page ([how](../ideas/early-exit.md#tie-blocks)). The digits ViT of
`burnish demo` and a BERT-like classifier that guesses the package of a docstring have three blocks each, so that every
way to take the weights of a block before is tried: what the search chooses (`optimize -p tie-blocks --max-size ...`, by
what the outputs lose before healing), what would be learnt ([Dynamic Layer Tying](https://arxiv.org/abs/2401.12819)
trains while it ties, by reinforcement), or drawn by lot, is among them. Each is healed alike: {steps} steps of {batch}
rows, at most {rate:g}, on half of the training rows, distilled from the original without labels. Accuracy in percent on
rows that neither training nor healing has seen, 500 digits and 900 docstrings; further numbers are further seeds. The
standard error of one is 0.5 on the digits and 1.4 on the docstrings.
"""


def accuracy(model: oir.Model, one: Bed) -> float:
    """On the rows that nothing has seen."""
    runner = executor(threads=1)(model)
    found = float((runner.run(one.feeds)[one.output].argmax(1) == one.answers).mean())
    runner.close()
    return found


def _tied(one: Bed, pairs: str, seed: int | None) -> dict[str, float]:
    """The tied model, healed with a seed."""
    options = None if seed is None else HealOptions(steps=STEPS, seed=seed, **BUDGET)
    made = burnish.optimize(
        one.file, passes=[f"tie-blocks{{map={pairs}}}"], data=one.data, heal=options, verify="off", guard=[]
    ).model
    return {"accuracy": accuracy(made, one), "bytes": constant_bytes(made)}


def _searched(one: Bed) -> str:
    """The map that the search chooses where one block has to go."""
    size = _original(one)["bytes"]
    wanted = int(_tied(one, "1:0", None)["bytes"] + size / 50)
    made = burnish.optimize(one.file, passes=["tie-blocks"], data=one.data, max_size=wanted, verify="off", guard=[])
    assert made.lossy is not None
    pairs = {int(edit.site.split()[1]): int(edit.option.split()[-1]) for edit in made.lossy.edits}
    return "+".join(f"{taker}:{donor}" for taker, donor in sorted(pairs.items()))


def measure(numbers: Numbers, folder: Path) -> None:
    """What is missing, seed by seed."""
    for seed in SEEDS:
        for kind, make in BEDS.items():
            own = seed if kind == "text" else 0
            one = make(folder, own)
            numbers.get(f"{kind} original {own}", partial(_original, one))
            numbers.get(f"{kind} search {own}", partial(_searched, one))
            for pairs in MAPS:
                numbers.get(f"{kind} {pairs} unhealed {own}", partial(_tied, one, pairs, None))
                numbers.get(f"{kind} {pairs} healed {seed}", partial(_tied, one, pairs, seed))
            PAGE.write_text(page(numbers.known), encoding="utf-8")


def _original(one: Bed) -> dict[str, float]:
    model = Pipeline(NORMAL_FORM).rewrite(onnx_file.read(one.file)).model
    return {"accuracy": accuracy(model, one), "bytes": constant_bytes(model)}


def page(known: Mapping[str, Any]) -> str:
    """The page of what is known."""
    lines = [_HEAD.format(steps=STEPS, batch=BUDGET["batch"], rate=BUDGET["rate"])]
    for kind, title in (("vision", "Digits ViT"), ("text", "Docstrings")):
        originals = _by_seed(known, f"{kind} original")
        if not _by_seed(known, f"{kind} {next(iter(MAPS))} healed"):
            continue
        chosen = ", ".join(f"`{known[key]}`" for seed in SEEDS if (key := f"{kind} search {seed}") in known)
        lines.append(
            f"\n## {title}\n\nThe search, asked for one block less, chooses {chosen}.\n\n"
            "| map | | weights | not healed | healed | mean change |\n| --- | --- | --- | --- | --- | --- |\n"
            f"| original | | 100 % | {_shown(originals)} | | |\n"
        )
        for pairs, name in MAPS.items():
            rows, before = (_by_seed(known, f"{kind} {pairs} {what}") for what in ("healed", "unhealed"))
            if rows:
                first = [originals[min(place, len(originals) - 1)]["accuracy"] for place in range(len(rows))]
                change = sum(row["accuracy"] - base for row, base in zip(rows, first, strict=True)) / len(rows)
                lines.append(
                    f"| `{pairs}` | {name} | {100 * rows[0]['bytes'] / originals[0]['bytes']:.0f} %"
                    f" | {_shown(before)} | {_shown(rows)} | {100 * change:+.1f} |\n"
                )
    return "".join(lines)


def _by_seed(known: Mapping[str, Any], what: str) -> list[dict[str, float]]:
    return [known[key] for seed in SEEDS if (key := f"{what} {seed}") in known]


def _shown(rows: list[dict[str, float]]) -> str:
    return ", ".join(f"{100 * row['accuracy']:.1f}" for row in rows)


def main(words: list[str]) -> int:
    """Measure what is missing, then write the page."""
    torch.set_num_threads(1)
    numbers = Numbers(NUMBERS)
    folder = Path(tempfile.gettempdir()) / "burnish-norms"
    folder.mkdir(exist_ok=True)
    if words != ["page"]:
        measure(numbers, folder)
    PAGE.write_text(page(numbers.known), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
