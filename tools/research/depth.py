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
from burnish.passes.lossy import Edit
from burnish.passes.measure_choice import measure as measure_named
from burnish.passes.pipeline import Pipeline
from burnish.passes.recipes import NORMAL_FORM
from burnish.passes.scoring import Scorer
from burnish.passes.search import Judgement, Plan, refined
from burnish.tools.lossy_context import context_for
from burnish.tools.research import depth_page, zoo

FOLDER = Path(__file__).resolve().parents[2] / "docs" / "results"
NUMBERS, PAGE = FOLDER / "depth.json", FOLDER / "depth.md"

LANGUAGE = "a3-smollm2-nocache"
GONE, HELD_OUT = 7, 33
"""Blocks that go, and windows of 256 tokens that judge."""

SAMPLES: dict[str, tuple[int, int]] = {
    "windows": (4, 256), "check": (8, 128), "short": (64, 32), "few": (1, 96), "training": (128, 128)
}  # fmt: skip
"""What criteria look at: how many texts, of how many tokens. `criticality` runs the model hundreds of times and sees
`few`; `angular` looks at one token of each text and sees many short ones. Joint results are checked on `check`, each
text of another topic. `training` is what models are healed with elsewhere."""

SCORED = ("output-loss", "perplexity")
"""Criteria whose numbers the scorer of the search gives, both in one run."""

RANKED: dict[str, tuple[Criterion, str]] = {
    "block-influence": ("block-influence", "windows"),
    "angular": ("angular", "short"),
    "taylor": ("taylor", "windows"),
    "reverse": ("reverse", "few"),
    "random": ("random", "few"),
    "magnitude": ("magnitude", "few"),
    "criticality": ("criticality", "few"),
}
"""The other rows of the table: the criterion, and what it looks at."""

SHARES = (0.0, 0.25, 0.5, 0.75, 1.0)
"""Shares of the perplexity in the error of the joint choice; the rest is output loss."""


EXCHANGES = 60
"""Plans with one block exchanged that are measured on `check` to make the joint choice better."""


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
    own = {"held-out": encoded[third:], "check": encoded[third - 1 :: -1]}.get(kind, encoded[:third])
    most = 1 if kind == "check" else max(3, 3 * 256 // size)
    cut = [[ids[at : at + size] for at in range(0, len(ids) - size + 1, size)][:most] for ids in own]
    return [_sample(ids) for ids in list(chain(*cut))[:count]]


def texts() -> tuple[list[Sample], list[Sample]]:
    """Windows of 256 tokens to choose by, and those that judge."""
    return windows("windows"), windows("held-out")


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
        plans = numbers.get("plans", lambda: _plans(numbers, scorer, edits))
    texts = windows("check")
    with Scorer(model, texts, context.execute, named[1:], [remove]) as judge:
        both = [[edits[index] for index in plan] for plan in plans]
        joint = numbers.get("joint", lambda: [one.values["perplexity"] for one in judge.scores(both)])
        first = plans[int(np.argmin(joint))]

        def judged_plan(chosen: Sequence[Edit]) -> Judgement:
            value = judge.scores([chosen])[0].values["perplexity"]
            return Judgement(value, value, 0.0)

        def ours() -> list[int]:
            errors = {edit.key: math.log(one) for edit, one in zip(edits, scores["perplexity"], strict=True)}
            start = Plan(tuple(edits[index] for index in first), 0.0, float(GONE))
            found = refined(start, edits, errors, lambda edit: 1.0, judged_plan, EXCHANGES)
            return sorted(edits.index(edit) for edit in found.edits)

        numbers.get("chosen by ours", ours)


def _plans(numbers: Numbers, scorer: Scorer, edits: Sequence[Edit]) -> list[list[int]]:
    """Sets chosen by mixtures of the scores, each with and without what neighbours cost less or more together."""
    scores = numbers.known["scores"]
    base = math.log(scorer.original().values["perplexity"])
    rises = [math.log(one) - base for one in scores["perplexity"]]
    losses = scores["output-loss"]
    likely = sorted(range(len(edits)), key=lambda index: rises[index])[: 3 * GONE]
    beside = [(index, index + 1) for index in sorted(likely) if index + 1 in likely]
    found = numbers.get(
        "neighbours",
        lambda: [
            (one.values["relative-error"] ** 2, math.log(one.values["perplexity"]) - base)
            for one in scorer.scores([[edits[a], edits[b]] for a, b in beside])
        ],
    )
    plans: list[list[int]] = []
    for share in SHARES:
        scales = (1 - share) / np.median(losses), share / np.median(rises)
        errors = {
            edit.key: scales[0] * loss + scales[1] * rise for edit, loss, rise in zip(edits, losses, rises, strict=True)
        }
        extra = {
            (edits[a].key, edits[b].key): scales[0] * loss
            + scales[1] * rise
            - errors[edits[a].key]
            - errors[edits[b].key]
            for (a, b), (loss, rise) in zip(beside, found, strict=True)
        }
        for pairs in (None, extra):
            chosen = selection.select(edits, errors, lambda edit: 1.0, target=GONE, pairs=pairs).edits
            plan = sorted(edits.index(edit) for edit in chosen)
            if plan not in plans:
                plans.append(plan)
    return plans


def ranked(name: str) -> list[int]:
    """The blocks that go by a row of `RANKED`."""
    criterion, kind = RANKED[name]
    model = normal(LANGUAGE)
    ranking = Ranking(criterion, context_for(model, windows(kind)))
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
