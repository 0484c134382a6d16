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

Clocked = tuple[float, float]


def clocked(work: Callable[[], Any]) -> Clocked:
    """CPU seconds of this process and seconds by the clock."""
    cpu, wall = time.process_time(), time.perf_counter()
    work()
    return time.process_time() - cpu, time.perf_counter() - wall


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


def page(found: dict[str, Any]) -> str:
    one = found["removals"]
    full = np.median(one["full"], axis=0)
    scores = np.asarray(one["scores"])
    total, fill = scores.sum(0), np.asarray(one["fill"])
    count, prepare = one["edits"], np.median(one["prepare"], axis=0)
    ratio = total / (count * full)
    with_fill = (total + fill) / ((count + 1) * full)
    again = (total + fill) / (count * (full + np.asarray(one["loading"])) + full)
    shapes = one["samples"]
    rows = [
        ("one full pass: the whole model in one session, and the measure", full, None),
        ("the measure in it", np.asarray(one["measure"]), np.asarray(one["measure"]) / full),
        ("applying an edit and cutting the result, beside the running of another", prepare, prepare / full),
        (f"{count} full passes", count * full, None),
        (f"**scoring {count} removals**", total, ratio),
        (f"the same with the pass that fills the cache, against {count + 1} full passes", total + fill, with_fill),
        (
            f"the same against {count} sessions made anew, a full pass in each, and one for the original",
            total + fill,
            again,
        ),
    ]
    lines = [
        "# Scoring, measured",
        "",
        "Made by `python -m burnish.tools.research.scoring`: ONNX Runtime on CPU, one thread, everything in turns. CPU",
        "seconds are those of the process; the clock also shows what runs beside each other, and what else the machine",
        "did, which had two cores.",
        "",
        "## All single-block removals of SmolLM2-135M",
        "",
        f"{count} blocks, {len(shapes)} samples of {shapes[0][-1]} tokens, `divergence`. A full pass was timed after",
        f"every {EVERY} edits ({len(one['full'])} times; the median counts).",
        "",
        "| what | CPU s | of full passes | s by the clock | of full passes |",
        "| --- | --- | --- | --- | --- |",
    ]
    for text, seconds, share in rows:
        shares = ["", ""] if share is None else [f"**{value:.2f}**" for value in share]
        lines.append(f"| {text} | {seconds[0]:.1f} | {shares[0]} | {seconds[1]:.1f} | {shares[1]} |")
    lines += [
        "",
        "By block, as a share of a full pass:",
        "",
        "| removed block | " + " | ".join(str(n) for n in range(0, count, 5)) + f" | {count - 1} |",
        "| --- |" + " --- |" * (len(range(0, count, 5)) + 1),
        "| CPU | " + " | ".join(f"{scores[n, 0] / full[0]:.2f}" for n in [*range(0, count, 5), count - 1]) + " |",
        "| clock | " + " | ".join(f"{scores[n, 1] / full[1]:.2f}" for n in [*range(0, count, 5), count - 1]) + " |",
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
        cells = [f"{1000 * np.median([cpu for cpu, _ in times]):.1f}" for times in each["ways"].values()]
        lines.append(f"| {name} | {each['weights'] / 1e6:.2f} MB | {each['samples']} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--zoo", type=Path, default=ROOT / ".zoo")
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--parts", nargs="*", default=["removals", "toggles"])
    chosen = parser.parse_args()
    file = RESULTS / "scoring.json"
    found = json.loads(file.read_text()) if file.exists() else {}
    if chosen.parts:
        model, samples = language(chosen.zoo, chosen.samples, chosen.tokens)
    if "removals" in chosen.parts:
        found["removals"] = removals(model, samples)
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
    file.write_text(json.dumps(found, indent=1) + "\n")
    (RESULTS / "scoring.md").write_text(page(found))


if __name__ == "__main__":
    main()
