"""What models lose with their blocks: `docs/results/depth.md`, and the numbers beside it in `depth.json`.

`python -m burnish.tools.research.depth` measures what the JSON does not have yet and writes the page; every number is
kept as soon as it is known, so a run that was killed goes on where it was. `... page` only writes the page.
"""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
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
from burnish.passes import selection
from burnish.passes.base import Outcome
from burnish.passes.depth.remove_blocks import RemoveBlocks
from burnish.passes.depth_criteria import Criterion, Ranking, without
from burnish.passes.measure_choice import measure as measure_named
from burnish.passes.pipeline import Pipeline
from burnish.passes.recipes import NORMAL_FORM
from burnish.passes.scoring import Scorer
from burnish.tools.lossy_context import context_for
from burnish.tools.research import depth_page, zoo

FOLDER = Path(__file__).resolve().parents[2] / "docs" / "results"
NUMBERS, PAGE = FOLDER / "depth.json", FOLDER / "depth.md"

LANGUAGE = "a3-smollm2-nocache"
GONE, HELD_OUT = 7, 33
"""Blocks that go, and windows of 256 tokens that judge."""

SAMPLES: dict[str, tuple[int, int]] = {"windows": (4, 256), "short": (64, 32), "few": (1, 64)}
"""What criteria look at: how many texts, of how many tokens. Criteria that run the model hundreds of times see `few`;
`angular`, which looks at one token of each text, many short ones."""

SCORED = ("output-loss", "perplexity")
"""Criteria whose numbers the scorer of the search gives, both in one run."""

RANKED: dict[str, tuple[Criterion, str, bool]] = {
    "block-influence": ("block-influence", "windows", False),
    "angular": ("angular", "short", False),
    "taylor": ("taylor", "windows", False),
    "reverse": ("reverse", "few", False),
    "random": ("random", "few", False),
    "magnitude": ("magnitude", "few", False),
    "criticality": ("criticality", "few", False),
    "perplexity, one after the other": ("perplexity", "few", True),
}
"""The other rows of the table: the criterion, what it looks at, and whether it chooses one block after the other."""

SHARES = (0.0, 0.25, 0.5, 0.75, 1.0)
"""Shares of the perplexity in the error of the joint choice; the rest is output loss."""


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

    @property
    def known(self) -> Mapping[str, Any]:
        """All of them."""
        return self._found


@cache
def normal(name: str) -> oir.Model:
    """A model of the zoo, or of the demo, in normal form."""
    demo = Path(__file__).resolve().parents[1] / "demo" / f"{name}.onnx"
    return Pipeline(NORMAL_FORM).rewrite(onnx_file.read(demo if demo.exists() else zoo.path(name))).model


@cache
def windows(kind: str) -> list[Sample]:
    """Windows of tokens of the Python manual: `held-out`, or a kind of `SAMPLES`, whose topics are others."""
    from pydoc_data.topics import topics

    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(zoo.ROOT / "smollm2" / "tokenizer.json"))
    texts = [text for _, text in sorted(topics.items())]
    order = np.random.default_rng(0).permutation(len(texts))
    encoded = [tokenizer.encode(texts[index], add_special_tokens=False).ids for index in order]
    third = len(encoded) // 3
    count, size = (HELD_OUT, 256) if kind == "held-out" else SAMPLES[kind]
    own = encoded[third:] if kind == "held-out" else encoded[:third]
    most = max(3, 3 * 256 // size)
    cut = [[ids[at : at + size] for at in range(0, len(ids) - size + 1, size)][:most] for ids in own]
    return [_sample(ids) for ids in list(chain(*cut))[:count]]


def _sample(ids: Sequence[int]) -> Sample:
    array = np.array([ids], np.int64)
    return Sample("text", {"input_ids": array, "attention_mask": np.ones_like(array)})


def perplexity(model: oir.Model, samples: Iterable[Sample]) -> float:
    """Exponential of the mean negative log likelihood of each next token."""
    total, count = 0.0, 0
    runner = executor(threads=1, target="ort-cpu")(model)
    for sample in samples:
        logits = runner.run(sample.feeds)["logits"][0, :-1]
        targets = sample.feeds["input_ids"][0, 1:]
        logits = logits - logits.max(-1, keepdims=True)
        losses = np.log(np.exp(logits).sum(-1, dtype=np.float64)) - logits[np.arange(len(targets)), targets]
        total, count = total + float(losses.sum()), count + len(losses)
    runner.close()
    return float(np.exp(total / count))


def scored(numbers: Numbers) -> None:
    """The numbers of each block by the criteria of `SCORED`, and the blocks they choose together."""
    model, samples = normal(LANGUAGE), windows("windows")
    context = context_for(model, samples)
    remove = RemoveBlocks()
    edits = remove.propose(model, context, Outcome("remove-blocks"))
    named = [
        measure_named(name, model, samples, keeps=context.keeps).measure for name in ("relative-error", "perplexity")
    ]
    with Scorer(model, samples, context.execute, named, [remove]) as scorer:

        def alone() -> dict[str, list[float]]:
            found = scorer.scores(edits)
            squares = [one.values["relative-error"] ** 2 for one in found]
            return {"output-loss": squares, "perplexity": [one.values["perplexity"] for one in found]}

        scores = numbers.get("scores", alone)
        for name in SCORED:
            order = sorted(range(len(edits)), key=lambda index: scores[name][index])
            numbers.get(f"chosen by {name}", partial(sorted, order[:GONE]))
        numbers.get("joint", lambda: _joint(scorer, edits, scores))
    numbers.get("chosen by ours", lambda: min(numbers.known["joint"], key=lambda one: one[1])[0])


def _joint(
    scorer: Scorer, edits: Sequence[Any], scores: Mapping[str, Sequence[float]]
) -> list[tuple[list[int], float]]:
    """Sets chosen by mixtures of the scores, each with the perplexity of the model without it on the same texts."""
    base = math.log(scorer.original().values["perplexity"])
    rises = [max(math.log(one) - base, 0.0) for one in scores["perplexity"]]
    losses = scores["output-loss"]
    plans: dict[tuple[int, ...], Any] = {}
    for share in SHARES:
        errors = {
            edit.key: share * rise / np.median(rises) + (1 - share) * loss / np.median(losses)
            for edit, rise, loss in zip(edits, rises, losses, strict=True)
        }
        chosen = selection.select(edits, errors, lambda edit: 1.0, target=GONE).edits
        plans.setdefault(tuple(sorted(int(edit.site.split()[-1]) for edit in chosen)), chosen)
    found = scorer.scores(list(plans.values()))
    return [(list(plan), one.values["perplexity"]) for plan, one in zip(plans, found, strict=True)]


def ranked(name: str) -> list[int]:
    """The blocks that go by a row of `RANKED`."""
    criterion, kind, iterative = RANKED[name]
    model = normal(LANGUAGE)
    ranking = Ranking(criterion, context_for(model, windows(kind)), iterative=iterative)
    return [block.index for block in ranking.choose(model, stacks(model), GONE)]


def judged(numbers: Numbers, gone: Sequence[int]) -> float:
    """The perplexity of the language model without these blocks, on texts that nothing was chosen by."""
    name = f"perplexity without {'+'.join(map(str, gone)) or 'none'}"
    found: float = numbers.get(name, lambda: perplexity(without(normal(LANGUAGE), gone), windows("held-out")))
    return found


def curve(numbers: Numbers, name: str) -> None:
    """The metric of a model with fewer and fewer blocks, chosen by output loss on a third of the samples."""
    model = normal(name)
    if name.startswith("digits"):
        with np.load(Path(__file__).resolve().parents[1] / "demo" / "digits.npz") as arrays:
            samples: Any = [{"image": arrays["image"]}]
            metric: Any = partial(_accuracy, arrays["label"])
    else:
        samples, metric = zoo.task(name)[0], zoo.task(name)[2]
    some = [Sample("sample", sample) for sample in samples[: max(len(samples) // 3, 1)]]
    structure = stacks(model)
    numbers.get(f"{name}: blocks", lambda: [one.refusal for one in structure.blocks])
    criteria: tuple[Criterion, ...] = ("output-loss", "reverse")
    for criterion in criteria:
        ranking = Ranking(criterion, context_for(model, some))
        sets = numbers.get(f"{name}: by {criterion}", partial(_ladder, ranking, model))
        for gone in [[], *sets]:
            key = f"{name} without {'+'.join(map(str, gone)) or 'none'}"
            numbers.get(key, partial(_metric, model, gone, samples, metric))


def _accuracy(labels: np.ndarray, outputs: Sequence[Mapping[str, np.ndarray]]) -> float:
    return float((next(iter(outputs[0].values())).argmax(-1) == labels).mean())


def _ladder(ranking: Ranking, model: oir.Model) -> list[list[int]]:
    return [[block.index for block in gone] for gone in ranking.ladder(model, stacks(model))]


def _metric(model: oir.Model, gone: Sequence[int], samples: Any, metric: Any) -> float:
    runner = executor(threads=1, target="ort-cpu")(without(model, gone))
    found = metric([runner.run(sample) for sample in samples])
    runner.close()
    return float(found)


def decoding(numbers: Numbers) -> None:
    """How far cached decoding of the language model without the blocks of ours is from computing at once."""
    numbers.get("decoding", lambda: depth_page.decoding(normal("a3-smollm2-kv"), numbers.known["chosen by ours"]))


def measure(numbers: Numbers) -> None:
    """Everything on the page."""
    judged(numbers, [])
    scored(numbers)
    for name in ("ours", *SCORED):
        judged(numbers, numbers.known[f"chosen by {name}"])
    for name in RANKED:
        judged(numbers, numbers.get(f"chosen by {name}", partial(ranked, name)))
    decoding(numbers)
    for name in ("digits_resnet", "a6-ppocr-cls", "a2-minilm"):
        curve(numbers, name)


def main(arguments: Sequence[str]) -> int:
    """Run the command."""
    numbers = Numbers()
    if list(arguments) != ["page"]:
        measure(numbers)
    PAGE.write_text(depth_page.page(numbers.known), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
