"""What models lose with their blocks: `docs/results/depth.md`, and the numbers beside it in `depth.json`.

`python -m burnish.tools.research.depth` measures what the JSON does not have yet and writes the page; every number is
kept as soon as it is known, so a run that was killed goes on where it was. `... page` only writes the page.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterable, Sequence
from functools import cache, partial
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as oir

from burnish.backends.ort.session import executor
from burnish.frontends import onnx_file
from burnish.ir.samples import Sample
from burnish.ir.views.blocks import stacks
from burnish.passes.depth_criteria import Criterion, Ranking, without
from burnish.passes.pipeline import Pipeline
from burnish.passes.recipes import NORMAL_FORM
from burnish.tools.lossy_context import context_for
from burnish.tools.research import zoo

FOLDER = Path(__file__).resolve().parents[2] / "docs" / "results"
NUMBERS, PAGE = FOLDER / "depth.json", FOLDER / "depth.md"

LANGUAGE = "a3-smollm2-nocache"
GONE, WINDOW, CALIBRATION, HELD_OUT = 7, 256, 4, 33
"""Blocks that go; tokens of a text; texts to choose by; texts that judge."""

FEW = 1
"""Texts for the criteria that run the model hundreds of times."""

CRITERIA: dict[str, tuple[Criterion, int, bool]] = {
    "output-loss": ("output-loss", CALIBRATION, False),
    "block-influence": ("block-influence", CALIBRATION, False),
    "angular": ("angular", CALIBRATION, False),
    "perplexity": ("perplexity", CALIBRATION, False),
    "taylor": ("taylor", CALIBRATION, False),
    "magnitude": ("magnitude", FEW, False),
    "magnitude-l2": ("magnitude-l2", FEW, False),
    "reverse": ("reverse", FEW, False),
    "random": ("random", FEW, False),
    "perplexity, one after the other": ("perplexity", FEW, True),
    "criticality": ("criticality", FEW, False),
}
"""Rows of the table: the criterion, how many texts it sees, and whether it chooses one block after the other."""


class Numbers:
    """What was measured, by name, kept on disk."""

    def __init__(self, path: Path = NUMBERS) -> None:
        self._path = path
        self._found: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}

    def get(self, name: str, measure: Callable[[], Any]) -> Any:
        """The number of that name, measured when it is not known yet."""
        if name not in self._found:
            self._found[name] = measure()
            print(f"{name}: {self._found[name]}", file=sys.stderr, flush=True)
            unfinished = self._path.with_suffix(".partial")
            unfinished.write_text(json.dumps(self._found, indent=1) + "\n", encoding="utf-8")
            os.replace(unfinished, self._path)
        return self._found[name]

    def __getitem__(self, name: str) -> Any:
        return self._found[name]

    def __contains__(self, name: str) -> bool:
        return name in self._found


@cache
def normal(name: str) -> oir.Model:
    """A model of the zoo in normal form."""
    return Pipeline(NORMAL_FORM).rewrite(onnx_file.read(zoo.path(name))).model


@cache
def texts() -> tuple[list[Sample], list[Sample]]:
    """Windows of tokens to choose by and to judge by, of different topics of the Python manual."""
    import pydoc_data.topics

    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(zoo.ROOT / "smollm2" / "tokenizer.json"))
    topics = [text for _, text in sorted(pydoc_data.topics.topics.items())]
    order = np.random.default_rng(0).permutation(len(topics))
    encoded = [tokenizer.encode(topics[index], add_special_tokens=False).ids for index in order]
    windows = [
        [ids[start : start + WINDOW] for start in range(0, len(ids) - WINDOW + 1, WINDOW)][:3] for ids in encoded
    ]
    first = list(chain(*windows[: len(windows) // 3]))[:CALIBRATION]
    judges = list(chain(*windows[len(windows) // 3 :]))[:HELD_OUT]
    return [_sample(ids) for ids in first], [_sample(ids) for ids in judges]


def _sample(ids: Sequence[int]) -> Sample:
    array = np.array([ids], np.int64)
    return Sample("text", {"input_ids": array, "attention_mask": np.ones_like(array)})


def perplexity(model: oir.Model, samples: Iterable[Sample]) -> float:
    """Exponential of the mean negative log likelihood of each next token."""
    total, count = 0.0, 0
    runner = executor(threads=1, target="ort-cpu")(model)
    for sample in samples:
        logits = runner.run(sample.feeds)["logits"][0, :-1].astype(np.float64)
        targets = sample.feeds["input_ids"][0, 1:]
        logits -= logits.max(-1, keepdims=True)
        losses = np.log(np.exp(logits).sum(-1)) - logits[np.arange(len(targets)), targets]
        total, count = total + float(losses.sum()), count + len(losses)
    runner.close()
    return float(np.exp(total / count))


def chosen(name: str) -> list[int]:
    """The blocks that go by a row of the table."""
    criterion, count, iterative = CRITERIA[name]
    model = normal(LANGUAGE)
    ranking = Ranking(criterion, context_for(model, texts()[0][:count]), iterative=iterative)
    return [block.index for block in ranking.choose(model, stacks(model), GONE)]


def judged(numbers: Numbers, gone: Sequence[int]) -> float:
    """The perplexity of the language model without these blocks, on texts that nothing was chosen by."""
    name = f"perplexity without {'+'.join(map(str, gone)) or 'none'}"
    found: float = numbers.get(name, lambda: perplexity(without(normal(LANGUAGE), gone), texts()[1]))
    return found


def measure(numbers: Numbers) -> None:
    """Everything on the page."""
    judged(numbers, [])
    for name in CRITERIA:
        judged(numbers, numbers.get(f"chosen by {name}", partial(chosen, name)))


def main(arguments: Sequence[str]) -> int:
    """Run the command."""
    numbers = Numbers()
    if list(arguments) != ["page"]:
        measure(numbers)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
