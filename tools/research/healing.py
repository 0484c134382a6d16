"""SmolLM2 healed after seven of its thirty blocks were removed: `python -m burnish.tools.research.healing`.

Each set of blocks is removed from the model without cache, and the rest is healed by distillation on docstrings of the
standard library. Perplexity is measured in ONNX Runtime on the topics of Python's help that `research.depth` judges by
too. Every run goes to `docs/results/healing.json` when it is done and is not made again; `... page` only writes
`docs/results/healing.md`. `MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=34359738368` in the environment saves a sixth of
the time: glibc then keeps the memory of the activations from step to step.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from burnish.ir.samples import Sample
from burnish.tools.research import depth, zoo
from burnish.tools.research.zoo_data import docstrings

FOLDER = Path(__file__).resolve().parents[2] / "docs" / "results"
NUMBERS, PAGE = FOLDER / "healing.json", FOLDER / "healing.md"

SETS = {
    "ours": (4, 5, 13, 14, 17, 25, 26),
    "ours, without exchanges": (4, 13, 14, 16, 17, 25, 26),
    "perplexity": (3, 4, 5, 14, 17, 25, 26),
    "block influence": (13, 14, 15, 16, 17, 25, 26),
    "reverse order": (23, 24, 25, 26, 27, 28, 29),
}
"""Sets that `research.depth` chose, the first two by output loss and perplexity together; numbers go by blocks."""
SEEDS = (0, 1, 2)
LENGTH, TEXTS = 256, 64
"""Tokens of a text, and texts to heal on, some of which say which weights are the best."""
OPTIONS: dict[str, Any] = {
    "steps": 58, "batch": 1, "rate": 2e-4, "temperature": 1.0, "held_out": 0.1, "evaluations": 3,
}  # fmt: skip


def samples() -> list[Sample]:
    """Docstrings put end to end, cut into texts of 256 tokens, and some of these, spread over the whole library."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(zoo.ROOT / "smollm2" / "tokenizer.json"))
    ids = [token for text in docstrings() for token in tokenizer.encode(text + "\n\n", add_special_tokens=False).ids]
    starts = np.linspace(0, len(ids) - LENGTH, TEXTS).astype(int)
    rows = [np.array([ids[start : start + LENGTH]], np.int64) for start in starts]
    return [
        Sample(f"docstrings {i}", {"input_ids": row, "attention_mask": np.ones_like(row)}) for i, row in enumerate(rows)
    ]


def run(name: str, seed: int) -> dict[str, Any]:
    """Heal the model without the blocks of a set."""
    from burnish.backends.fx.healing import HealOptions, heal
    from burnish.passes.depth_criteria import without

    teacher = depth.normal(depth.LANGUAGE)
    student = without(teacher, SETS[name])
    wall, cpu = time.monotonic(), time.process_time()
    healed = heal(student, teacher, samples(), HealOptions(**OPTIONS, seed=seed))
    return {
        "cpu": time.process_time() - cpu,
        "wall": time.monotonic() - wall,
        "perplexity": depth.perplexity(healed.model, depth.windows("held-out")),
        "losses": [healed.before, healed.after],
        "steps": healed.steps,
        "ended": healed.ended,
    }


def measure(sets: Sequence[str], seeds: Sequence[int]) -> None:
    """Every number that is not there yet."""
    from burnish.passes.depth_criteria import without

    teacher, judges = depth.normal(depth.LANGUAGE), depth.windows("held-out")

    def before(name: str) -> float:
        return depth.perplexity(without(teacher, SETS[name]), judges)

    keep("original", lambda: depth.perplexity(teacher, judges))
    for seed in seeds:
        for name in sets:
            keep(key(name, "before"), partial(before, name))
            keep(key(name, seed), partial(run, name, seed))


def key(name: str, what: object) -> str:
    """The name under which a number of a set is kept."""
    return f"{'+'.join(map(str, SETS[name]))} | {what}"


def keep(name: str, make: Callable[[], Any]) -> None:
    """A number under its name, made when it is not known; several processes may do so at once."""
    if name not in known():
        found = make()
        print(f"{name}: {found}", file=sys.stderr, flush=True)
        unfinished = NUMBERS.with_suffix(f".{os.getpid()}")
        unfinished.write_text(json.dumps({**known(), name: found}, indent=1) + "\n", encoding="utf-8")
        os.replace(unfinished, NUMBERS)


def known() -> dict[str, Any]:
    """What was measured."""
    found: dict[str, Any] = json.loads(NUMBERS.read_text(encoding="utf-8")) if NUMBERS.exists() else {}
    return found


_HEAD = """# A language model healed after seven of its thirty blocks were removed

`python -m burnish.tools.research.healing` makes this page. SmolLM2-135M without cache; the sets of blocks are those
of [the table of criteria](depth.md). The rest of the model is trained by distillation from the original, on {texts}
texts of 256 tokens from docstrings of the standard library, unlabelled: {steps} steps of AdamW over all weights,
one text each, at most {rate:.0e}, temperature 1. A tenth of the texts is held out and says which weights are kept.
Perplexity is that of 33 windows of 256 tokens from topics of Python's help, in ONNX Runtime. It trains in one
thread; CPU time is that of setting up and training on a busy machine.

"""


def page() -> str:
    """The page of what was measured."""
    found = known()
    lines = [_HEAD.format(texts=TEXTS, steps=OPTIONS["steps"], rate=OPTIONS["rate"])]
    lines += [f"The original has {found['original']:.2f}.\n\n"]
    lines += ["| removed by | blocks | before | healed | by seed | CPU minutes |\n"]
    lines += ["| --- | --- | --- | --- | --- | --- |\n"]
    before, healed = dict[str, float](), dict[str, float]()
    for name, blocks in SETS.items():
        runs = [found[key(name, seed)] for seed in SEEDS if key(name, seed) in found]
        if runs:
            values = [one["perplexity"] for one in runs]
            before[name], healed[name] = found[key(name, "before")], float(np.mean(values))
            minutes = ", ".join(f"{one['cpu'] / 60:.1f}" for one in runs)
            each = ", ".join(f"{value:.2f}" for value in values)
            row = (name, "+".join(map(str, blocks)), f"{before[name]:.4g}", f"**{healed[name]:.2f}**", each, minutes)
            lines.append(f"| {' | '.join(row)} |\n")
    first, last = (min(values, key=lambda name: values[name]) for values in (before, healed))
    lines.append(f"\nThe lowest before healing: {first}. The lowest healed: {last}.\n")
    lines.append("Where a set has one seed only, small differences between sets prove nothing.\n")
    return "".join(lines)


def main(arguments: Sequence[str]) -> int:
    """`[page | SEED...]`."""
    import torch

    torch.set_num_threads(1)
    if list(arguments) != ["page"]:
        measure(list(SETS), [int(one) for one in arguments] or SEEDS)
    PAGE.write_text(page(), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
