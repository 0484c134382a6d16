"""What models lose with fewer heads of keys and values: the last part of `docs/results/kv.md`, its numbers in JSON.

`python -m burnish.tools.research.kv_heads` measures what `docs/results/kv-heads.json` does not have yet; a run that was
killed goes on where it was. `... beds`, `... language`, `... search` and `... heal` measure a part. `kv.py` writes
the page.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping, Sequence
from functools import cache, partial
from typing import Any

import onnx_ir as oir

from burnish.backends.ort.session import executor
from burnish.ir.errors import UnchangedError
from burnish.passes import catalog, lossy
from burnish.passes.base import Outcome
from burnish.passes.lossy import Edit, LossyPass
from burnish.passes.measure_choice import measure as measure_named
from burnish.passes.scoring import Scorer
from burnish.tools.lossy_context import context_for
from burnish.tools.research import zoo
from burnish.tools.research.depth import FOLDER, LANGUAGE, Numbers, normal, perplexity, windows
from burnish.tools.research.lowrank_beds import BEDS, Bed

NUMBERS = FOLDER / "kv-heads.json"
COUNTS = (10, 20, 30)
"""Layers of 30 that keep one head of three."""

WAYS = {"fit": "fit", "weights": "fit", "mean": "mean", "first": "first", "random": "random"}
"""Ways by name, as the pass names them; `weights` is `fit` without samples."""

GROUPS = {"vit": (2, 1), "a2": (6, 3, 1)}
"""Models with as many heads of keys and values as of queries, and how many they keep."""

FITTED, JUDGED, MINUTES, BUDGET = 32, 8, 12, "20%"
"""Windows of 128 tokens that `fit` sees, of 256 that judge, minutes of healing, and what a search may lose."""


def pool(way: str, groups: int) -> LossyPass:
    """The pass for a way."""
    (one,) = catalog.parse(f"pool-kv-heads{{groups={groups},how={WAYS[way]}}}")
    assert isinstance(one, LossyPass)
    return one


@cache
def proposed(way: str) -> tuple[Edit, ...]:
    """An edit for each layer of the language model; `fit` looks at text of other topics."""
    model, one = normal(LANGUAGE), pool(way, 1)
    if way != "fit":
        return tuple(one.asked(model, Outcome("")))
    return tuple(one.propose(model, context_for(model, windows("training")[:FITTED]), Outcome("")))


def scored(way: str) -> list[float]:
    """What the outputs lose with each edit alone, on a window of 128 tokens."""
    model = normal(LANGUAGE)
    context = context_for(model, windows("check")[:1])
    measure = measure_named("relative-error", model).measure
    with Scorer(model, context.samples, context.execute, [measure], [pool(way, 1)]) as scorer:
        return [one.values["relative-error"] ** 2 for one in scorer.scores(proposed(way))]


def pooled(numbers: Numbers, way: str, count: int) -> oir.Model:
    """The language model with one head in as many layers, those that lose the least alone."""
    scores = numbers.get(f"{way} scores", partial(scored, way)) if count < max(COUNTS) else [0.0] * max(COUNTS)
    order = sorted(range(len(scores)), key=lambda index: scores[index])
    chosen = [proposed(way)[index] for index in sorted(order[:count])]
    return lossy.apply(normal(LANGUAGE), chosen, [pool(way, 1)])[0]


def judged(numbers: Numbers, way: str, count: int) -> float:
    """Its perplexity on text that nothing was chosen by."""
    return perplexity(pooled(numbers, way, count), windows("held-out")[:JUDGED])


def fewer(bed: Bed, way: str, groups: int) -> oir.Model:
    """A model without caches with fewer heads in all layers."""
    one, samples = pool(way, groups), bed.folds[0][0]
    outcome = Outcome("")
    edits = one.propose(bed.model, context_for(bed.model, samples), outcome) if way == "fit" else None
    made = lossy.apply(bed.model, one.asked(bed.model, outcome) if edits is None else edits, [one])[0]
    return made


def metric(bed: Bed, model: oir.Model) -> float:
    """Of the evaluation samples."""
    runner = executor(threads=1, target="ort-cpu")(model)
    found = bed.metric([runner.run(one.feeds) for one in bed.evaluation])
    runner.close()
    return found


def beds(numbers: Numbers) -> None:
    """Models without caches; those of digits are healed on the training digits, without labels."""
    from burnish.backends.fx.healing import HealOptions, heal

    for name, kept in GROUPS.items():
        bed = BEDS[name]()
        numbers.get(f"{name} dense", partial(metric, bed, bed.model))
        for groups in kept:
            for way in WAYS:
                numbers.get(f"{name} {way} {groups}", lambda w=way, g=groups, b=bed: metric(b, fewer(b, w, g)))  # type: ignore[misc]

        def healed(way: str, groups: int, bed: Bed) -> float:
            options = HealOptions(steps=300, batch=128, rate=1e-3)
            return metric(bed, heal(fewer(bed, way, groups), bed.model, bed.folds[0][0], options).model)

        for groups in kept if name == "vit" else ():
            for way in WAYS:
                numbers.get(f"{name} {way} {groups} healed", partial(healed, way, groups, bed))


def measure(numbers: Numbers) -> None:
    """The language model."""
    numbers.get("dense", lambda: perplexity(normal(LANGUAGE), windows("held-out")[:JUDGED]))
    for ways in (("fit", "mean"), WAYS):
        for count in reversed(COUNTS):
            for way in ways:
                numbers.get(f"{way} {count}", partial(judged, numbers, way, count))


def healed(numbers: Numbers) -> None:
    """The language model with one head in all layers, trained to do what the original does."""
    from burnish.backends.fx.healing import HealOptions, heal

    def train(way: str) -> dict[str, Any]:
        start = time.perf_counter()
        options = HealOptions(minutes=MINUTES, batch=4, rate=3e-4, train="all")
        found = heal(pooled(numbers, way, max(COUNTS)), normal(LANGUAGE), windows("training"), options)
        minutes = (time.perf_counter() - start) / 60
        return {
            "perplexity": perplexity(found.model, windows("held-out")[:JUDGED]),
            "minutes": minutes,
            "ended": found.ended,
        }

    for way in ("fit", "mean"):
        numbers.get(f"{way} healed", partial(train, way))


def searched(numbers: Numbers) -> None:
    """How many layers of the language model get one head within a budget."""
    import burnish
    from burnish.tools import report

    def found(way: str) -> dict[str, Any]:
        data = windows("training")[:24]
        options: dict[str, Any] = {"passes": [pool(way, 1)], "max_drop": BUDGET, "verify": "off"}
        try:
            result = burnish.optimize(zoo.path(LANGUAGE), data=data, metric="perplexity", **options)
        except UnchangedError:
            return {"layers": 0, "drop": 0.0}
        said = report.as_dict(result)["lossy"]
        return {"layers": len(said["edits"]), "drop": said["result"]["drop"] / said["original"]}

    for way in ("fit", "mean"):
        numbers.get(f"{way} searched", partial(found, way))


def section(numbers: Mapping[str, Any]) -> str:
    """The part of the page."""
    names = dict(zip(WAYS, ("fit, with samples", "fit, weights alone", "mean", "first", "random"), strict=True))
    head = f"| {' | '.join(names.values())} |\n| --- |{' --- |' * len(names)}\n"
    text = f"""
## Fewer heads

`python -m burnish.tools.research.kv_heads` measures this: [`pool-kv-heads`](../ideas/kv.md#fewer-heads) without any
training. `mean` is the mean of neighbouring heads, as in the paper on grouped queries; `first` and `random` take one.

SmolLM2-135M has 9 heads of queries and 3 of keys and values, of which one is left: in so many of its 30 layers the
cache is a third. The layers are those that lose the least alone on a window of 128 tokens, for each way by itself.
`fit` looks at {FITTED * 128:,} tokens of other topics. Perplexity is that of the first {JUDGED * 255:,} of the
predictions above; the model itself has {numbers["dense"]:.2f} on them.

| layers {head}"""
    for count in COUNTS:
        cells = [_cell(numbers, f"{way} {count}") for way in names]
        text += f"| {count} | {' | '.join(cells)} |\n"
    chosen = [(way, numbers[f"{way} searched"]) for way in ("fit", "mean") if f"{way} searched" in numbers]
    if chosen:
        parts = [f"{one['layers']} layers by `{way}` ({one['drop']:.1%} worse)" for way, one in chosen]
        text += f"""
`optimize --max-drop {BUDGET} -p pool-kv-heads{{groups=1}}` with 24 windows of 128 tokens gives one head to
{" and to ".join(parts)}, judged on the half that had no part in the choice.
"""
    trained = [(way, numbers[f"{way} healed"]) for way in ("fit", "mean") if f"{way} healed" in numbers]
    if trained:
        count = max(COUNTS)
        text += f"\nHealed by distillation for {MINUTES} minutes of one core, {count} layers with one head:"
        parts = [f" `{way}` {_cell(numbers, f'{way} {count}')} becomes {one['perplexity']:.2f}" for way, one in trained]
        text += ",".join(parts) + ".\n"
    titles = {
        "vit": "Digits ViT, 4 heads: accuracy on 500 held-out digits",
        "a2": "MiniLM (A2), 12 heads: R@1 of 60 texts",
    }
    for name, title in titles.items():
        text += f"\n{title}; the model itself has {numbers[f'{name} dense']:.3f}.\n\n| heads left {head}"
        for groups in GROUPS[name]:
            cells = [_cell(numbers, f"{name} {way} {groups}", 3) for way in names]
            text += f"| {groups} | {' | '.join(cells)} |\n"
            if name == "vit":
                cells = [_cell(numbers, f"{name} {way} {groups} healed", 3) for way in names]
                text += f"| {groups}, healed | {' | '.join(cells)} |\n"
    return text + "\nHealed means 300 steps of 128 of the 1297 training digits, without labels.\n"


def _cell(numbers: Mapping[str, Any], name: str, digits: int = 2) -> str:
    return f"{numbers[name]:,.{digits}f}" if name in numbers else "not measured"


def main(arguments: Sequence[str]) -> int:
    """Measure."""
    numbers = Numbers(NUMBERS)
    if arguments == ["beds"]:
        beds(numbers)
    elif arguments == ["language"]:
        measure(numbers)
    elif arguments == ["search"]:
        searched(numbers)
    elif arguments == ["heal"]:
        healed(numbers)
    else:
        beds(numbers)
        measure(numbers)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
