"""Blocks that share weights, healed: `python -m burnish.tools.research.tying` writes `docs/results/tying.md`.

The digits ViT of `burnish demo` has three blocks, so that every way to share can be tried. Every
number is kept in `docs/results/tying.json` as soon as it is known.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Mapping
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
from burnish.tools.research.norms_beds import Bed, vision
from burnish.tools.research.norms_page import BUDGET, FOLDER, SEEDS, STEPS

PAGE, NUMBERS = FOLDER / "tying.md", FOLDER / "tying.json"
MAPS = {
    "1:0": "neighbours, the first two",
    "2:1": "neighbours, the last two",
    "2:0": "in turns",
    "1:0+2:0": "all",
}
_HEAD = """# Blocks that share weights

`python -m burnish.tools.research.tying` makes this page ([how](../ideas/early-exit.md#tie-blocks)). The digits ViT of
`burnish demo` has three blocks, so that every way to take the weights of a block before is tried: what the search
chooses (`optimize -p tie-blocks --max-size ...`, by what the outputs lose before healing), what would be learnt
([Dynamic Layer Tying](https://arxiv.org/abs/2401.12819) trains while it ties, by reinforcement), or drawn by lot, is
among them. Each is healed alike: {steps} steps of {batch} rows, at most {rate:g}, on half of the training rows,
distilled from the original without labels. Accuracy in percent on 500 digits that neither training nor healing has
seen, with a standard error of 0.5; further numbers are further seeds of healing. Deeper models are not measured.

The search, asked for one block less, chooses `{search}`.

| map | | weights | not healed | healed | mean change |
| --- | --- | --- | --- | --- | --- |
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
    one = vision(folder, 0)
    numbers.get("original", partial(_original, one))
    numbers.get("search", partial(_searched, one))
    for seed in SEEDS:
        for pairs in MAPS:
            numbers.get(f"{pairs} unhealed", partial(_tied, one, pairs, None))
            numbers.get(f"{pairs} healed {seed}", partial(_tied, one, pairs, seed))


def _original(one: Bed) -> dict[str, float]:
    model = Pipeline(NORMAL_FORM).rewrite(onnx_file.read(one.file)).model
    return {"accuracy": accuracy(model, one), "bytes": constant_bytes(model)}


def page(known: Mapping[str, Any]) -> str:
    """The page of what is known."""
    head = _HEAD.format(steps=STEPS, batch=BUDGET["batch"], rate=BUDGET["rate"], search=known["search"])
    original = known["original"]
    lines = [head, f"| original | | 100 % | {100 * original['accuracy']:.1f} | | |\n"]
    for pairs, name in MAPS.items():
        before = known[f"{pairs} unhealed"]
        healed = [known[key]["accuracy"] for seed in SEEDS if (key := f"{pairs} healed {seed}") in known]
        change = sum(healed) / len(healed) - original["accuracy"]
        lines.append(
            f"| `{pairs}` | {name} | {100 * before['bytes'] / original['bytes']:.0f} % | {100 * before['accuracy']:.1f}"
            f" | {', '.join(f'{100 * one:.1f}' for one in healed)} | {100 * change:+.1f} |\n"
        )
    return "".join(lines)


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
