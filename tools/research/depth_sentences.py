"""What early exits and parallel attentions cost: `docs/results/early-exit.md`, and its numbers in `early-exit.json`.

`python -m burnish.tools.research.depth_sentences` measures what the JSON does not have yet and writes the page; a run
that was killed goes on where it was. `... page` only writes the page.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from functools import cache, partial
from typing import Any

import numpy as np
import onnx_ir as oir

from burnish.backends.ort.session import executor
from burnish.ir.samples import Sample
from burnish.ir.views.blocks import stacks
from burnish.passes import catalog, lossy, measure_choice
from burnish.passes.base import Outcome
from burnish.passes.depth_criteria import Ranking, without
from burnish.passes.lossy import LossyPass
from burnish.passes.pipeline import constant_bytes
from burnish.passes.scoring import Scorer
from burnish.tools.lossy_context import context_for
from burnish.tools.research import zoo, zoo_tasks
from burnish.tools.research.depth import FOLDER, LANGUAGE, Numbers, normal, windows

NUMBERS, PAGE = FOLDER / "early-exit.json", FOLDER / "early-exit.md"

SENTENCES, LAYERS = "a2-minilm", 6
CALIBRATION = 3
"""Batches of sentences that removals are chosen by; their labels are not looked at."""

POOLINGS = ("keep", "first", "max", "mean")
HELD_OUT, CHOOSE_BY = 2, 128
"""Texts that judge the language model, and the tokens of another text by which groups are scored."""

EXACT = (0, 1, 2, 11, 28, 29)
"""Blocks whose removal changes the language model most, which were kept exact by hand before."""


def parsed(spec: str) -> LossyPass:
    """The pass of a text."""
    (one,) = catalog.parse(spec)
    assert isinstance(one, LossyPass)
    return one


def made(name: str, spec: str) -> oir.Model:
    """A model of the zoo after the edits that the options of a pass name."""
    one = parsed(spec)
    return lossy.apply(normal(name), one.asked(normal(name), Outcome(one.pass_name())), [one])[0]


def outputs(model: oir.Model, samples: Sequence[Sample]) -> list[dict[str, Any]]:
    """What ONNX Runtime makes of samples, on one thread."""
    runner = executor(threads=1, target="ort-cpu")(model)
    found = [dict(runner.run(sample.feeds)) for sample in samples]
    runner.close()
    return found


@cache
def sentences() -> tuple[zoo_tasks.Task, list[Sample]]:
    """The sentences with their labels, in batches."""
    task = zoo_tasks.load(SENTENCES, zoo.ROOT)
    return task, [Sample(f"batch {number}", feeds) for number, feeds in enumerate(task.samples)]


def recall(model: oir.Model) -> float:
    """The share of queries whose nearest document is theirs (R@1)."""
    task, samples = sentences()
    return task.metric(outputs(model, samples))


def exactness() -> dict[str, Any]:
    """Whether the state behind a truncated model is that of the whole one, and what the file loses."""
    whole, sample = normal(SENTENCES).clone(), sentences()[1][:1]
    exits = [block.exit for block in stacks(whole).blocks]
    whole.graph.outputs.extend(exits)
    states = outputs(whole, sample)[0]
    blocks = [block.parameters * 4 for block in stacks(normal(SENTENCES)).blocks]
    worst, spare = 0.0, 0
    for layer in range(1, LAYERS + 1):
        short = made(SENTENCES, f"early-exit{{layer={layer}}}")
        lost = constant_bytes(normal(SENTENCES)) - constant_bytes(short)
        spare = max(spare, abs(lost - sum(blocks[layer:])))
        state = stacks(short).blocks[-1].exit
        short.graph.outputs.append(state)
        found = outputs(short, sample)[0][str(state.name)]
        worst = max(worst, float(np.abs(found - states[str(exits[layer - 1].name)]).max()))
    return {"error": worst, "bytes": spare, "block": blocks[0]}


def removed(count: int, criterion: Any) -> list[int]:
    """The blocks of the sentence encoder that go by a criterion."""
    model = normal(SENTENCES)
    ranking = Ranking(criterion, context_for(model, sentences()[1][:CALIBRATION]))
    return [block.index for block in ranking.choose(model, stacks(model), count)]


def measure_sentences(numbers: Numbers) -> None:
    """Everything about the sentence encoder."""
    numbers.get("exactness", exactness)
    numbers.get("recall", lambda: recall(normal(SENTENCES)))
    for layer in range(1, LAYERS + 1):
        for pooling in POOLINGS:
            spec = f"early-exit{{layer={layer},pooling={pooling}}}"
            if (layer, pooling) != (LAYERS, "keep"):
                numbers.get(spec, partial(_recall_of, spec))
    for last in range(2, LAYERS + 1):
        spec = f"early-exit{{last={last}}}"
        numbers.get(spec, partial(_recall_of, spec))
    for taker in range(1, LAYERS):
        spec = f"tie-blocks{{map={taker}:{taker - 1}}}"
        numbers.get(spec, partial(_recall_of, spec))
    for count in range(1, LAYERS):
        for criterion in ("output-loss", "block-influence"):
            gone = numbers.get(f"{criterion} {count}", partial(removed, count, criterion))
            numbers.get(f"without {gone}", partial(_recall_without, gone))


def _recall_of(spec: str) -> float:
    return recall(made(SENTENCES, spec))


def _recall_without(gone: Sequence[int]) -> float:
    return recall(without(normal(SENTENCES), gone))


@cache
def reference() -> list[np.ndarray]:
    """The tokens that the language model thinks the likeliest behind each token of the texts that judge."""
    return [found["logits"].argmax(-1) for found in outputs(normal(LANGUAGE), windows("held-out")[:HELD_OUT])]


def judged(groups: str, fuse: bool = False) -> tuple[float, float]:
    """Top-1 agreement with the exact language model, and the mean negative log likelihood of the next token."""
    spec = f"parallel-blocks{{groups={groups or '0:1'},fuse={str(fuse).lower()}}}"
    samples = windows("held-out")[:HELD_OUT]
    same, loss = [], []
    for sample, found, best in zip(samples, outputs(made(LANGUAGE, spec), samples), reference(), strict=True):
        logits = found["logits"][0].astype(np.float64)
        same.append(logits.argmax(-1) == best[0])
        logits -= logits.max(-1, keepdims=True)
        targets = sample.feeds["input_ids"][0, 1:]
        loss.append(np.log(np.exp(logits[:-1]).sum(-1)) - logits[np.arange(len(targets)), targets])
    return float(np.concatenate(same).mean()), float(np.concatenate(loss).mean())


def scored(size: int) -> list[float]:
    """The divergence of the language model by each group of `size` neighbours alone, by its first block."""
    model, one = normal(LANGUAGE), parsed(f"parallel-blocks{{size={size}}}")
    samples = [Sample("text", {name: array[:, :CHOOSE_BY] for name, array in windows("windows")[0].feeds.items()})]
    edits = one.propose(model, context_for(model, samples), Outcome("parallel-blocks"))
    chosen = measure_choice.measure("divergence", model, samples).measure
    with Scorer(model, samples, executor(threads=1, target="ort-cpu"), [chosen], [one]) as scorer:
        return [score.values["divergence"] for score in scorer.scores(edits)]


def cheapest(costs: Sequence[float], size: int, count: int) -> list[int]:
    """Where `count` groups of `size` blocks begin, which share no block, so that the sum of their costs is least."""
    blocks = len(costs) + size - 1
    best: list[list[tuple[float, list[int]] | None]] = [[(0.0, []), *[None] * count] for _ in range(blocks + 1)]
    for end in range(1, blocks + 1):
        for number in range(1, count + 1):
            choices = [best[end - 1][number]]
            if end >= size and (before := best[end - size][number - 1]) is not None:
                choices.append((before[0] + costs[end - size], [*before[1], end - size]))
            best[end][number] = min((one for one in choices if one is not None), default=None)
    found = best[blocks][count]
    assert found is not None
    return found[1]


def by_hand(size: int, exact: Sequence[int]) -> list[int]:
    """Where groups of `size` blocks begin that leave out the blocks in `exact`, as many as fit, from the first on."""
    starts, start = [], 0
    while start + size <= 30:
        if any(block in exact for block in range(start, start + size)):
            start += 1
        else:
            starts.append(start)
            start += size
    return starts


def spelled(starts: Sequence[int], size: int) -> str:
    """Groups as the option `groups` takes them."""
    return "+".join(f"{start}:{start + size}" for start in starts)


def measure_groups(numbers: Numbers) -> None:
    """Everything about the language model."""
    numbers.get("groups none", lambda: judged(""))
    for size in (2, 4):
        hand = by_hand(size, EXACT)
        sets = {"all": by_hand(size, (0, 29)), "hand": hand}
        sets["scores"] = cheapest(numbers.get(f"scores {size}", partial(scored, size)), size, len(hand))
        for name, starts in sets.items():
            numbers.get(f"starts {name} {size}", partial(list, starts))
            numbers.get(f"groups {name} {size}", partial(judged, spelled(starts, size)))
    numbers.get("fused", lambda: judged(spelled(by_hand(2, EXACT), 2), fuse=True))


_HEAD = """# Early exits and parallel attentions, measured

Made by `python -m burnish.tools.research.depth_sentences`; the numbers are in [early-exit.json](early-exit.json). What
the passes do is on [their page](../ideas/early-exit.md). Nothing is healed here.

## A sentence encoder, layer by layer

all-MiniLM-L6-v2 (A2, 6 post-norm blocks), R@1: the share of {queries} queries whose nearest of {documents} documents
is theirs. The whole model: **{recall:.3f}**. Behind each of the 6 layers the state of the truncated model is that of
the whole one (largest difference {error:g}), and the file loses {block:,} bytes with every block, {spare}.
"""

_REMOVED = """
Without a block or more, for comparison: those whose removal changes the output least (`output-loss`), and those that
change the stream least (`block-influence`), chosen on {batches} batches of sentences without their labels.

| blocks that go | `early-exit` | `output-loss` | R@1 | `block-influence` | R@1 |
| ---: | ---: | --- | ---: | --- | ---: |
"""

_MEAN = """
The mean of the last layers (`last=K`, no layer goes), and a block with the weights of the one before it (`tie-blocks`):

| last K | R@1 | tied | R@1 |
| ---: | ---: | --- | ---: |
"""

_GROUPS = """
## A language model with parallel attentions

SmolLM2-135M (A3, 30 pre-norm blocks), on {texts} texts of 256 tokens from the Python manual: the share of positions
whose likeliest next token is that of the exact model, and the mean negative log likelihood ({exact:.3f} of the exact
model). "All" groups the blocks 1 to 28. "By hand" keeps the blocks {hand} exact, whose removal changes the model most.
"By scores" takes as many groups as that, those whose divergences alone, on {chosen} tokens of another text, have the
smallest sum.

| blocks in a group | choice | blocks in groups | exact blocks | top-1 agreement | NLL |
| ---: | --- | ---: | --- | ---: | ---: |
"""

_LAST = """
With `fuse=true`, pairs by hand: agreement {same:.3f}, NLL {loss:.4f}; unfused {plain:.3f} and {plain_loss:.4f}.
"""


def page(numbers: Mapping[str, Any]) -> str:
    """The page of what was measured."""
    exact, whole = numbers["exactness"], numbers["recall"]
    keys = np.concatenate(sentences()[0].labels)
    spare = (
        "to the byte those of its weights" if not exact["bytes"] else f"{exact['bytes']} more or less than its weights"
    )
    lines = [
        _HEAD.format(
            queries=(keys >= 0).sum(),
            documents=(keys < 0).sum(),
            recall=whole,
            spare=spare,
            error=exact["error"],
            block=exact["block"],
        )  # fmt: skip
    ]
    lines.append("| exit at layer | " + " | ".join(f"`pooling={one}`" for one in POOLINGS) + " |")
    lines.append("| ---: |" + " ---: |" * len(POOLINGS))
    for layer in range(1, LAYERS + 1):
        specs = [f"early-exit{{layer={layer},pooling={pooling}}}" for pooling in POOLINGS]
        found = [whole if spec not in numbers else numbers[spec] for spec in specs]
        lines.append(f"| {layer} | " + " | ".join(f"{one:.3f}" for one in found) + " |")
    lines.append(_REMOVED.format(batches=CALIBRATION).rstrip())
    for count in range(1, LAYERS):
        short = numbers[f"early-exit{{layer={LAYERS - count},pooling=keep}}"]
        sets = [numbers[f"{criterion} {count}"] for criterion in ("output-loss", "block-influence")]
        cells = [f"{', '.join(map(str, gone))} | {numbers[f'without {gone}']:.3f}" for gone in sets]
        lines.append(f"| {count} | {short:.3f} | {' | '.join(cells)} |")
    lines.append(_MEAN.rstrip())
    for last in range(2, LAYERS + 1):
        taker = last - 1
        tied = numbers[f"tie-blocks{{map={taker}:{taker - 1}}}"]
        lines.append(
            f"| {last} | {numbers[f'early-exit{{last={last}}}']:.3f} | {taker} with {taker - 1} | {tied:.3f} |"
        )
    hand = ", ".join(map(str, EXACT))
    lines.append(_GROUPS.format(texts=HELD_OUT, exact=numbers["groups none"][1], hand=hand, chosen=CHOOSE_BY).rstrip())
    for size in (2, 4):
        for name, words in (("all", "all"), ("hand", "by hand"), ("scores", "by scores")):
            starts = numbers[f"starts {name} {size}"]
            inside = {start + place for start in starts for place in range(size)}
            left = ", ".join(str(block) for block in range(30) if block not in inside)
            same, loss = numbers[f"groups {name} {size}"]
            lines.append(f"| {size} | {words} | {len(inside)} | {left} | {same:.3f} | {loss:.3f} |")
    (same, loss), (plain, plain_loss) = numbers["fused"], numbers["groups hand 2"]
    lines.append(_LAST.format(same=same, loss=loss, plain=plain, plain_loss=plain_loss))
    return "\n".join(lines)


def main(arguments: Sequence[str]) -> int:
    """Run the command."""
    numbers = Numbers(NUMBERS)
    if list(arguments) != ["page"]:
        measure_sentences(numbers)
        measure_groups(numbers)
    PAGE.write_text(page(numbers.known), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
