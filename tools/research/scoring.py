"""Measure what scoring costs: `OMP_NUM_THREADS=1 python -m burnish.tools.research.scoring`.

Writes `docs/results/scoring.json` (the numbers) and `scoring.md` (the tables). Everything that is compared is timed in
turns in one process, ONNX Runtime and torch with one thread: CPU seconds of the process, and seconds by the clock.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as oir

from burnish.backends.fx.runner import executor as fx_executor
from burnish.backends.ort.session import executor
from burnish.frontends import load
from burnish.ir.samples import Sample
from burnish.ir.views.blocks import stacks
from burnish.ir.weights import constant
from burnish.passes.base import Outcome
from burnish.passes.depth.remove_blocks import RemoveBlocks
from burnish.passes.measure_choice import measure
from burnish.passes.pipeline import Pipeline
from burnish.passes.recipes import NORMAL_FORM
from burnish.passes.rerun import Rerun
from burnish.passes.scoring import MEMORY, Bench, Job
from burnish.tools.lossy_context import context_for
from burnish.tools.observe import keeps_of
from burnish.tools.research import zoo_tasks

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "docs" / "results"
EVERY = 5
"""After so many edits the whole model is run once."""

Clocked = tuple[float, float, float]


def clocked(work: Callable[[], Any]) -> Clocked:
    """CPU seconds of this process and of this thread, which runs the models, and seconds by the clock."""
    clocks = time.process_time, time.thread_time, time.perf_counter
    before = [clock() for clock in clocks]
    work()
    cpu, thread, wall = (clock() - start for clock, start in zip(clocks, before, strict=True))
    return cpu, thread, wall


def normal(path: Path) -> oir.Model:
    return Pipeline(NORMAL_FORM).rewrite(load(path)).model


def language(zoo: Path, count: int, tokens: int) -> tuple[oir.Model, list[Sample]]:
    name = "a3-smollm2-nocache"
    task = zoo_tasks.load(name, zoo)
    feeds = [{key: array[:, :tokens] for key, array in one.items()} for one in task.samples[:count]]
    return normal(zoo / f"{name}.onnx"), [Sample(f"text {number}", one) for number, one in enumerate(feeds)]


def pictures(count: int) -> tuple[oir.Model, list[Sample]]:
    with np.load(ROOT / "tools" / "demo" / "digits.npz") as data:
        images = data["image"]
    model = normal(ROOT / "tools" / "demo" / "digits_resnet.onnx")
    return model, [
        Sample(f"digits {start}", {"image": images[start : start + 50]}) for start in range(0, 50 * count, 50)
    ]


def removals(model: oir.Model, samples: Sequence[Sample]) -> dict[str, Any]:
    """Score the removal of every block, and run the whole model on the same samples and measure it, in turns."""
    context = context_for(model, samples)
    judge = measure("divergence", model, samples, keeps=keeps_of).measure
    remove = RemoveBlocks()
    edits = remove.propose(model, context, Outcome("remove-blocks"))
    kept: list[Bench] = []
    fill = clocked(lambda: kept.append(Bench(Job(model, samples, [judge], [remove]), executor())))
    (bench,) = kept
    whole = executor()(model)

    def full() -> None:
        parts = [
            judge.partial(whole.run(sample.feeds), bench.reference(number), sample)
            for number, sample in enumerate(samples)
        ]
        judge.value(parts)

    full()
    fulls, times, values = [], [], []
    coming = bench.scores([(edit,) for edit in edits])
    for number in range(len(edits)):
        times.append(clocked(lambda: values.append(next(coming).values[judge.name])))
        if number % EVERY == 0:
            fulls.append(clocked(full))
    references = [bench.reference(number) for number in range(len(samples))]
    measuring = clocked(lambda: [judge.partial(r, r, s) for r, s in zip(references, samples, strict=True)])
    preparing = [clocked(partial(bench.route, (edits[number],))) for number in (0, 10, 20)]
    bench.close()
    whole.close()
    reloaded = clocked(lambda: executor()(model).close())
    return {
        "edits": len(edits),
        "fill": fill,
        "full": fulls,
        "scores": times,
        "values": values,
        "loading": reloaded,
        "measure": measuring,
        "prepare": preparing,
        "samples": [list(next(iter(sample.feeds.values())).shape) for sample in samples],
    }


def toggles(model: oir.Model, samples: Sequence[Sample], block: int, rounds: int) -> dict[str, Any]:
    """Run a block with other weights in the ways there are."""
    ways: dict[str, list[Clocked]] = {name: [] for name in ("session", "inputs", "whole", "torch")}
    rerun = Rerun(model, samples, executor(), MEMORY)
    rerun.prepare()
    structure = stacks(model)
    nodes = set(structure.blocks[block].nodes)
    whole = rerun.whole
    step = max(whole.steps, key=lambda one: len(nodes & set(one.section.nodes)))
    part = step.section.model(model)
    names = [str(value.name) for value in part.graph.inputs]
    feeds = [
        dict(zip(names, [rerun.value(past, number) for past in step.inputs], strict=True))
        for number in range(len(samples))
    ]
    for value, array in zip(part.graph.inputs, feeds[0].values(), strict=True):
        value.dtype = oir.DataType.from_numpy(array.dtype)
    large = [value for value in part.graph.initializers.values() if value.const_value.size > 1024]  # type: ignore[union-attr]
    arrays = {str(value.name): np.array(constant(value)) for value in large}
    exposed = part.clone()
    for name in arrays:
        value = exposed.graph.initializers[name]
        value.const_value = None
        del exposed.graph.initializers[name]
        exposed.graph.inputs.append(value)
    open_ended, module = executor()(exposed), fx_executor()(part)
    assert module.module is not None
    parameters = dict(module.module.named_parameters())
    feed_all = [one | arrays for one in feeds]

    def run(runner: Any, given: Sequence[dict[str, np.ndarray]]) -> None:
        for one in given:
            runner.run(one)

    def session() -> None:
        runner = executor()(part)
        run(runner, feeds)
        runner.close()

    def everything() -> None:
        runner = executor()(model)
        run(runner, [sample.feeds for sample in samples])
        runner.close()

    def torch_module() -> None:
        for parameter in parameters.values():
            parameter.data.copy_(parameter.data.clone())
        run(module, feeds)

    work: dict[str, Callable[[], None]] = {
        "session": session,
        "inputs": partial(run, open_ended, feed_all),
        "whole": everything,
        "torch": torch_module,
    }
    for way in work.values():
        way()
    for _ in range(rounds):
        for name, way in work.items():
            ways[name].append(clocked(way))
    rerun.close()
    return {"ways": ways, "weights": sum(array.nbytes for array in arrays.values()), "samples": len(samples)}


def _removals(one: dict[str, Any]) -> list[str]:
    full = np.median(one["full"], axis=0)
    scores, fill, loading = (np.asarray(one[name]) for name in ("scores", "fill", "loading"))
    measured, prepare = np.asarray(one["measure"]), np.median(one["prepare"], axis=0)
    count, shapes = one["edits"], one["samples"]
    scores[:, 1] += measured[0] / len(shapes)
    total = scores.sum(0)
    rows = [
        ("a full pass: the whole model in one session, and the measure", full, None),
        ("the measure in it", measured, measured / full),
        ("applying an edit and cutting the result", prepare, prepare / full),
        (f"**scoring {count} removals**, of {count} full passes", total, total / (count * full)),
        (
            f"the same and running the original once, of {count + 1} full passes",
            total + fill,
            (total + fill) / ((count + 1) * full),
        ),
        (
            f"the same, of {count} sessions made and run for the edited models and one for the original",
            total + fill,
            (total + fill) / (count * (full + loading + prepare) + full),
        ),
    ]
    shown = [*range(0, count, 5), count - 1]
    lines = [
        "",
        f"{count} blocks, {len(shapes)} samples of {shapes[0][-1]} tokens, `divergence`; a full pass was timed"
        f" {len(one['full'])} times in between, and the median counts.",
        "",
        "| what | CPU s | share | the first thread | share | s by the clock | share |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for text, seconds, share in rows:
        shares = [""] * 3 if share is None else [f"**{value:.2f}**" for value in share]
        cells = (f"{value:.1f} | {part}" for value, part in zip(seconds, shares, strict=True))
        lines.append(f"| {text} | {' | '.join(cells)} |")
    return [
        *lines,
        "",
        "| removed block | " + " | ".join(map(str, shown)) + " |",
        "| --- |" + " --- |" * len(shown),
        "| CPU, share of a full pass | " + " | ".join(f"{scores[n, 0] / full[0]:.2f}" for n in shown) + " |",
        "| the first thread | " + " | ".join(f"{scores[n, 1] / full[1]:.2f}" for n in shown) + " |",
    ]


def page(found: dict[str, Any]) -> str:
    lines = [
        "# Scoring, measured",
        "",
        "Made by `python -m burnish.tools.research.scoring`: ONNX Runtime on CPU, one thread, everything in turns.",
        "CPU seconds are those of the process. Scoring has a thread that runs models and two beside it, which apply",
        "the next edit and measure the sample before. Where a second core is free for these, the clock shows what the",
        "first does: its CPU seconds, and the measuring of each edit's last sample, for which it waits. The clock",
        "here shows what a machine of two cores made of it that had little else to do.",
        "",
        "## All single-block removals of SmolLM2-135M",
    ]
    for one in found["removals"].values():
        lines += _removals(one)
    lines += [
        "",
        "What cannot be saved are the blocks behind the removed one, half of them on average, and all that follows the",
        "last block, a fifth of the model. So 0.6 of a full pass is kept to where a second core takes the rest,",
        "and not in CPU seconds, where applying, cutting and measuring come on top.",
        "",
        "## Other weights in one block",
        "",
        "CPU milliseconds for one edit that exchanges the weights of a block and leaves its structure: a session",
        "made for the edited section; one session whose weights are inputs that are fed; a session of the whole model,",
        "which also runs what lies before and behind; the torch module, whose parameters are written over.",
        "",
        "| model | weights | samples | session of the section | weights as inputs | whole session | torch |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for name, each in found["toggles"].items():
        cells = [f"{1000 * np.median([one[0] for one in times]):.1f}" for times in each["ways"].values()]
        lines.append(f"| {name} | {each['weights'] / 1e6:.2f} MB | {each['samples']} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--zoo", type=Path, default=ROOT / ".zoo")
    parser.add_argument("--samples", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--parts", nargs="*", default=["removals", "toggles"])
    chosen = parser.parse_args()
    file = RESULTS / "scoring.json"
    found = json.loads(file.read_text()) if file.exists() else {}
    if chosen.parts:
        model, samples = language(chosen.zoo, chosen.samples, chosen.tokens)
    if "removals" in chosen.parts:
        found["removals"] = {f"{chosen.samples} x {chosen.tokens}": removals(model, samples)}
    if "toggles" in chosen.parts:
        found["toggles"] = {}
        for name, (one, some), block in (
            ("SmolLM2-135M, block 15", (model, samples), 15),
            ("SmolLM2-135M, block 15", (model, samples[:1]), 15),
            ("digits ResNet, block 1", pictures(10), 1),
            ("digits ResNet, block 1", pictures(1), 1),
        ):
            text = name + (", one sample" if len(some) == 1 else "")
            found["toggles"][text] = toggles(one, some, block, chosen.rounds)
    file.write_text(json.dumps(found) + "\n")
    (RESULTS / "scoring.md").write_text(page(found))


if __name__ == "__main__":
    main()
