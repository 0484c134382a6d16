"""Savings in time: where two factors of a layer break even, and how well savings of edits foretell the whole model's.

`python -m burnish.tools.research.latency` writes `docs/results/latency.md`; with names of subjects it prints their
rows. The models of the zoo and their data come from its cache. One thread; the page says what was measured by which
clock.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import onnx_ir as oir

from burnish.backends.ort.kernel_times import KernelTimes
from burnish.backends.ort.machine import disturbance
from burnish.backends.ort.observe import outputs_exchanged
from burnish.backends.ort.session import executor, runtime
from burnish.backends.ort.timing import Timing, paired
from burnish.frontends import onnx_file
from burnish.ir.part import part
from burnish.ir.samples import Sample
from burnish.ir.views.blocks import stacks
from burnish.ir.views.linear import Linear
from burnish.passes import lossy, recipes
from burnish.passes.base import Outcome
from burnish.passes.depth.remove_blocks import RemoveBlocks
from burnish.passes.latency import Timed, Work, faster
from burnish.passes.layers import layers
from burnish.passes.lossy import Edit, LossyPass
from burnish.passes.lowrank.project_rank import ProjectRank
from burnish.passes.pipeline import Pipeline
from burnish.tools.lossy_context import context_for, with_seconds
from burnish.tools.research import zoo_tasks

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "results" / "latency.md"
REMOVE, FACTOR = RemoveBlocks(), ProjectRank(ranks=7, joint=False)
PASSES: tuple[LossyPass, ...] = (REMOVE, FACTOR)
MOST_SHAPES = 8
"""Layers of different shape that a subject's table of ranks has, those that take the longest."""


@dataclass(frozen=True)
class Subject:
    """A model in normal form, the sample it is timed on, and the passes whose edits are looked at."""

    title: str
    model: oir.Model
    sample: Sample
    passes: tuple[LossyPass, ...]


def subject(name: str) -> Subject:
    """A subject by its name on the command line."""
    kind, _, rows = name.partition(":")
    folder = ROOT / ".zoo"
    if kind in ("vit", "resnet"):
        count = int(rows or 64)
        images = np.load(ROOT / "tools" / "demo" / "digits.npz")["image"][:count]
        model = onnx_file.read(ROOT / "tools" / "demo" / f"digits_{kind}.onnx")
        feeds, title = {"image": images}, f"digits {'ViT' if kind == 'vit' else 'ResNet'}, batch {count}"
    elif kind in ("a1", "a2"):
        whole = {"a1": "a1-efficientnet", "a2": "a2-minilm"}[kind]
        model = onnx_file.read(folder / f"{whole}.onnx")
        feeds = dict(zoo_tasks.load(whole, folder).samples[0])
        feeds = {key: array[: int(rows or 8)] for key, array in feeds.items()}
        batch = len(next(iter(feeds.values())))
        title = f"{kind.upper()} {'EfficientNet-B0' if kind == 'a1' else 'MiniLM'}, batch {batch}"
    else:
        model = onnx_file.read(folder / "a3-smollm2-nocache.onnx")
        ids = np.arange(100, 100 + int(rows or 128), dtype=np.int64)[None]
        known = {"attention_mask": np.ones_like(ids), "position_ids": np.arange(ids.size, dtype=np.int64)[None]}
        feeds = {str(value.name): known.get(str(value.name), ids) for value in model.graph.inputs}
        title = f"A3 SmolLM2, {ids.size} tokens"
    normal = Pipeline(recipes.NORMAL_FORM).rewrite(model).model
    if kind == "a3block":
        block, feeds = first_block(normal, feeds)
        return Subject(f"{title}, its first block alone", block, Sample("measured", feeds), (FACTOR,))
    return Subject(title, normal, Sample("measured", feeds), (REMOVE,) if kind == "a3" else PASSES)


def first_block(model: oir.Model, feeds: dict[str, np.ndarray]) -> tuple[oir.Model, dict[str, np.ndarray]]:
    """The first residual block as a model, and what comes in there."""
    found = part(model, set(stacks(model).blocks[0].nodes))
    names = [str(value.name) for value in found.graph.inputs]
    made = {str(value.name): value for node in model.graph for value in node.outputs}
    with outputs_exchanged(model, [made[name] for name in names if name in made]) as inner:
        seen = executor()(inner).run(feeds)
    return found, {name: seen[name] if name in seen else feeds[name] for name in names}


def proposed(one: Subject) -> list[Edit]:
    """The edits of its passes; padding counts like all else, since only shapes matter here."""
    everything = replace(context_for(one.model, [one.sample]), keeps=lambda _, wanted: dict.fromkeys(wanted))
    return [edit for each in one.passes for edit in each.propose(one.model, everything, Outcome(each.pass_name()))]


def rank_of(edit: Edit) -> int:
    """The rank of an edit of `project-rank`."""
    return int(edit.option.split()[1])


@dataclass(frozen=True)
class Ranks:
    """A shape of a layer, and how its factors do: share of the break-even rank, and time over the dense layer's."""

    layer: str
    seconds: float
    even: float
    points: list[tuple[float, float]] = field(default_factory=list)

    @property
    def pays(self) -> str:
        """The largest share of the break-even rank that is faster than the dense layer, between two ranks by a line."""
        points = [(0.0, 0.0), *sorted(self.points)]
        for (left, below), (right, above) in zip(points, points[1:], strict=False):
            if above >= 1:
                return f"{left + (right - left) * (1 - below) / (above - below):.2f}" if left else f"< {right:.2f}"
        return f"> {points[-1][0]:.2f}"


def ranks(one: Subject, edits: Sequence[Edit], found: Timed) -> list[Ranks]:
    """One row for each shape of a layer, the slowest first."""
    known = layers(one.model)
    rows: dict[tuple[str, float], Ranks] = {}
    for edit in edits:
        if edit.spec == REMOVE.pass_name() or edit.key not in found.parts:
            continue
        layer = known[edit.site]
        dense, pair = found.parts[edit.key]
        if isinstance(layer, Linear):
            inner, outer, name = layer.in_features, layer.out_features, f"{layer.in_features} -> {layer.out_features}"
        else:
            inner, outer = int(np.prod(layer.kernel)) * layer.in_channels // layer.groups, layer.out_channels
            size = "x".join(map(str, layer.kernel))
            name = f"{size} convolution {layer.in_channels} -> {layer.out_channels}"
        even = inner * outer / (inner + outer)
        row = rows.setdefault((name, dense), Ranks(name, dense, even))
        point = (rank_of(edit) / even, pair / dense)
        if point not in row.points:
            row.points.append(point)
    return sorted(rows.values(), key=lambda row: -row.seconds)[:MOST_SHAPES]


@dataclass(frozen=True)
class Row:
    """A plan: what was predicted, what the whole models take, on the thread's clock and on the wall."""

    plan: str
    before: float
    after: float
    predicted: float
    wall: Timing | None

    @property
    def error(self) -> float:
        """How far the prediction is off, as a share of the measured saving."""
        return self.predicted / (self.before - self.after) - 1


def plans(edits: Sequence[Edit]) -> Iterator[tuple[str, list[Edit]]]:
    """Plans of one and several edits that do not exclude each other."""
    blocks = [edit for edit in edits if edit.spec == REMOVE.pass_name()]
    sites: dict[str, list[Edit]] = {}
    for edit in edits:
        if edit not in blocks:
            sites.setdefault(edit.site, []).append(edit)
    if blocks:
        yield "one block", blocks[len(blocks) // 2 :][:1]
    two = compatible([blocks[0], *blocks[2:3]]) if len(blocks) > 2 else []
    if two:
        yield "two blocks", two
    if len(blocks) > 7:
        yield "every fourth block", compatible(blocks[2::4])
    for title, share in (("a low rank", 0.25), ("a middle rank", 0.5), ("a high rank", 0.75)):
        chosen = [sorted(found, key=rank_of)[min(int(share * len(found)), len(found) - 1)] for found in sites.values()]
        if chosen:
            yield f"all layers at {title}", compatible(chosen)
            yield f"every other layer at {title}", compatible(chosen[::2])
    if blocks and sites:
        chosen = [sorted(found, key=rank_of)[len(found) // 2] for found in sites.values()]
        yield "one block, all other layers at a middle rank", compatible([blocks[-1], *chosen])


def compatible(edits: Sequence[Edit]) -> list[Edit]:
    """Edits none of which claims what an earlier one has."""
    kept: list[Edit] = []
    for edit in edits:
        if not any(edit.claims & other.claims for other in kept):
            kept.append(edit)
    return kept


def measured(one: Subject, found: Timed) -> Iterator[Row]:
    """Every plan made, lowered, and timed against the lowered original."""
    lowering = Pipeline(recipes.named("default", "ort-cpu", None))
    before = Work(lowering.rewrite(one.model).model, one.sample.feeds)
    for plan, chosen in plans(faster(found)):
        changed = lowering.rewrite(lossy.apply(one.model, chosen, PASSES)[0]).model
        after = Work(changed, {str(v.name): one.sample.feeds[str(v.name)] for v in changed.graph.inputs})
        first, second = whole(before, after)
        wall = None if disturbance(1) else on_the_wall(before, after)
        count = f"{plan} ({len(chosen)} edit{'s' * (len(chosen) > 1)})"
        yield Row(count, first, second, sum(edit.savings.seconds or 0.0 for edit in chosen), wall)


def whole(before: Work, after: Work) -> tuple[float, float]:
    """Seconds of both models on the thread's clock: the median saving of three pairs of sessions.

    Where a session's weights come to lie in memory makes up to a tenth of the time of a model that reads them all.
    """
    pairs = [[float(seconds) for seconds in KernelTimes(seconds=1.5)(before, [after])] for _ in range(3)]
    before_seconds, after_seconds = sorted(pairs, key=lambda pair: pair[0] - pair[1])[1]
    return before_seconds, after_seconds


def on_the_wall(before: Work, after: Work) -> Timing:
    """The two models in rounds of A B B A, by the clock on the wall."""
    runners = [executor()(work.model) for work in (before, after)]
    calls = [runner.bound(work.feeds) for runner, work in zip(runners, (before, after), strict=True)]
    found = paired(*calls, rounds=100, seconds=4.0)
    for runner in runners:
        runner.close()
    return found


def page_of(one: Subject) -> tuple[list[str], list[str]]:
    """The two tables of a subject, without their headings."""
    edits = proposed(one)
    _, found = with_seconds(one.model, edits, PASSES, [one.sample])
    for key, reason in found.reasons.items():
        print(f"{key}: {reason}", file=sys.stderr)
    first = []
    for row in ranks(one, edits, found):
        shares = ", ".join(f"{share:.2f}: {time:.2f}" for share, time in sorted(row.points))
        dense = f"{row.layer} | {row.seconds * 1e6:.0f} | {row.even:.0f}"
        first.append(f"| {one.title} | {dense} | {shares} | {row.pays} |")
    second = []
    for line in measured(one, found):
        wall = "" if line.wall is None else f"{1 - line.wall.ratio:.1%}"
        saved = line.before - line.after
        cells = f"{line.before * 1e3:.3f} | {line.predicted * 1e3:.3f} | {saved * 1e3:.3f} | {line.error:+.0%}"
        shares = f"{line.predicted / line.before:.1%} | {wall}"
        second.append(f"| {one.title} | {line.plan} | {cells} | {shares} |")
    return first, second


SUBJECTS = ("vit:64", "vit:1", "resnet:64", "resnet:1", "a1:1", "a2:2", "a2:1", "a3block:128", "a3:32", "a3:1")


def main() -> None:
    """Print the rows of the named subjects, or write the page with all of them."""
    names = sys.argv[1:] or SUBJECTS
    tables: tuple[list[str], list[str]] = ([], [])
    for name in names:
        for table, rows in zip(tables, page_of(subject(name)), strict=True):
            table += rows
            print("\n".join(rows), flush=True)
    if sys.argv[1:]:
        return
    PAGE.write_text(_PAGE.format(*("\n".join(rows) for rows in tables), runtime().__version__, os.cpu_count()))


_PAGE = """# Savings in time

Written by `python -m burnish.tools.research.latency`; the idea is [here](../ideas/latency.md). ONNX Runtime {2}, one
thread of a shared machine of {3} processors.

## Where two factors of a layer break even

A layer with K inputs and N outputs, as a product of rank r, has r (K + N) weights instead of K N: as many at the
*break-even rank* K N / (K + N). Below, the time of the pair over that of the dense layer, by share of the break-even
rank, and the share up to which the pair is faster. The slowest layers of different shape; µs of the dense layer.

| model | layer | µs | break-even rank | share: time | faster up to |
| --- | --- | --- | --- | --- | --- |
{0}

## Predicted and measured savings

The sum of what the edits save alone, against the whole models, the default recipe run on both; edits of rank that were
not measured to be faster are left out, as they are when latency is the objective. *Saved* is on the clock of the thread
(the two models in turns, the median of three pairs of sessions), *wall* in rounds of A B B A by the clock on the wall,
where nothing else ran meanwhile.

| model | edits | ms | predicted ms | saved ms | off by | predicted | wall |
| --- | --- | --- | --- | --- | --- | --- | --- |
{1}

A block of SmolLM2 saves less of the 30 ms of one token than two sessions of one and the same model differ by (27 to
32 ms, by where the weights come to lie in memory): the rows of one and two blocks tell nothing, that of seven does.
Digits at batch 1 take 20 and 80 µs, and factors save about a microsecond each: too little is foretold for the ViT, by
half, and too much for the ResNet.
"""

if __name__ == "__main__":
    main()
