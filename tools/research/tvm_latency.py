"""Edits chosen by times in ONNX Runtime and by compiled kernels: `python -m burnish.tools.research.tvm_latency`.

Each subject is searched twice within the same drop. Both choices are compiled for this machine without tuning, all of
it, and run in turns with the model without edits, on the clock of the thread; so they are in ONNX Runtime. Writes
`docs/results/tvm-latency.md`; with names of subjects it prints their rows.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as oir

from burnish.backends.ort.kernel_times import processor
from burnish.backends.ort.session import executor, runtime
from burnish.frontends import onnx_file
from burnish.ir.samples import Sample
from burnish.passes import plan
from burnish.passes.lossy import Edit
from burnish.passes.pipeline import Pipeline
from burnish.passes.plan import Plan
from burnish.passes.score_store import Store
from burnish.tools import api, compiled, compiled_times, lossy_options, lossy_stage
from burnish.tools.lossy import Lossy
from burnish.tools.lossy_context import largest, with_seconds

DEMO = Path(__file__).resolve().parents[1] / "demo"
PAGE = Path(__file__).resolve().parents[2] / "docs" / "results" / "tvm-latency.md"
DROP = "2%"
ROUNDS = 20
SUBJECTS = {
    "digits ViT, batch 64": ("digits_vit", 64),
    "digits ResNet, batch 1": ("digits_resnet", 1),
}
HEAD = """# Edits chosen by compiled kernels

`python -m burnish.tools.research.tvm_latency` looks for the ranks of layers (`project-rank`) that save most time
within a drop of {drop} of the accuracy, twice: by times in ONNX Runtime and by times of kernels compiled for this
machine ([how](../ideas/latency.md#where-kernels-are-compiled)). Kernels are not tuned, and all of the model is
compiled. Both choices are then run in turns with the model without edits, as compiled code and in ONNX Runtime,
{rounds} rounds there and back on the clock of the thread. Microseconds are medians, the ratio is the median of the
rounds' with its 95 % interval. *Foretold* is what the edits chosen by times there save by their own timings, each
alone, over what they were measured to save together.

{versions}, {processor}, one thread of a shared machine.

"""
CHOICES = """## What was chosen

| subject | edits by ONNX Runtime | edits by kernels | sites with another choice | for instance |
| --- | --- | --- | --- | --- |
"""
TIMES = """
## What came of it

| subject | run in | no edits, µs | by ONNX Runtime, µs | by kernels, µs | the last over the one before | foretold |
| --- | --- | --- | --- | --- | --- | --- |
"""


@dataclass(frozen=True)
class Choice:
    """What a search chose, and what it is chosen by."""

    todo: Plan
    kernels: compiled_times.KernelTiming | None
    found: Lossy

    def foretold(self, edits: Sequence[Edit], samples: Sequence[Sample]) -> float:
        """Seconds that edits save by the timings of this search, which were kept."""
        assert self.found.judged is not None
        normal, store = self.found.judged.model, Store()
        passes = self.todo.lossy
        timed = with_seconds(normal, edits, passes, samples, store=store, last=self.todo.passes, kernels=self.kernels)[
            1
        ]
        return sum(edit.savings.seconds or 0.0 for edit in timed.edits)


def search(model: oir.Model, samples: Sequence[Sample], target: str) -> Choice:
    """The search of `optimize` for this target."""
    todo = plan.resolve(passes=["project-rank"], max_drop=DROP, objective="latency", target=target)
    machine = compiled.target_of(target) if todo.compiled else None
    kernels = compiled_times.asked(todo, machine, None, everything=True, emit=None)
    options = lossy_options.options(kernels=kernels)
    return Choice(todo, kernels, lossy_stage.run(model, todo, samples, api.ort_judge(target), options))


def code(model: oir.Model, todo: Plan, feeds: Mapping[str, np.ndarray]) -> Callable[[], object]:
    """A call of the compiled model, inputs in place."""
    import tvm

    from burnish.backends.tvm import compiling
    from burnish.backends.tvm.lowering import lower
    from burnish.backends.tvm.quiet import quiet
    from burnish.backends.tvm.runner import TvmRunner, tensor_on, use_threads
    from burnish.backends.tvm.target import parse

    target = parse("llvm")
    use_threads(1)
    with quiet():
        lowered = lower(Pipeline(todo.passes).rewrite(model).model)
        built = compiling.build(compiling.scheduled(compiling.fused(lowered.module, target), target), target)
    runner = TvmRunner(built, tvm.cpu(), lowered.inputs, lowered.outputs, list(lowered.arrays()))
    given = [tensor_on(tvm.cpu(), feeds[name]) for name in lowered.inputs]
    return lambda: runner.run_tensors(given)


def session(model: oir.Model, todo: Plan, feeds: Mapping[str, np.ndarray]) -> Callable[[], object]:
    """A call of the model in ONNX Runtime, inputs in place."""
    return executor(threads=1)(Pipeline(todo.passes).rewrite(model).model).bound(feeds)


def in_turns(calls: Sequence[Callable[[], object]]) -> np.ndarray:
    """Seconds of the thread per call, [rounds, calls]."""
    counts = [max(1, int(np.ceil(0.003 / max(_stretch(one, 2), 1e-7)))) for one in calls]
    order = range(len(calls))
    rows = []
    for number in range(2 * ROUNDS):
        row = [0.0] * len(calls)
        for index in order if number % 2 == 0 else reversed(order):
            row[index] = _stretch(calls[index], counts[index])
        rows.append(row)
    times: np.ndarray = np.asarray(rows).reshape(ROUNDS, 2, len(calls)).mean(axis=1)
    return times


def _stretch(call: Callable[[], object], count: int) -> float:
    start = time.thread_time()
    for _ in range(count):
        call()
    return (time.thread_time() - start) / count


def rows(name: str) -> tuple[str, list[str]]:
    """The row of what was chosen for a subject, and those of what came of it."""
    file, batch = SUBJECTS[name]
    model = onnx_file.read(DEMO / f"{file}.onnx")
    with np.load(DEMO / "digits.npz") as data:
        images, labels = data["image"], data["label"]
    starts = range(0, len(images) // batch * batch, batch)
    samples = [Sample(f"{at}", {"image": images[at : at + batch]}, labels[at : at + batch]) for at in starts]
    feeds = largest(samples).feeds
    ort, tvm = (search(model, samples, target) for target in ("onnx", "llvm"))
    chosen = [{edit.site: edit.option for edit in one.found.edits} for one in (ort, tvm)]
    differ = [site for site in dict.fromkeys([*chosen[0], *chosen[1]]) if chosen[0].get(site) != chosen[1].get(site)]
    shown = ""
    if differ:
        first, second = (one.get(differ[0], "left alone") for one in chosen)
        shown = f"`{differ[0]}`: {first}; {second}"
    choice = f"| {name} | {len(chosen[0])} | {len(chosen[1])} | {len(differ)} | {shown} |\n"
    assert tvm.found.judged is not None
    models = [tvm.found.judged.model, ort.found.model, tvm.found.model]
    times: list[str] = []
    for where, make, own in (("compiled code", code, tvm), ("ONNX Runtime", session, ort)):
        made = in_turns([make(one, own.todo, feeds) for one in models])
        plain, by_ort, by_kernels = np.median(made, axis=0).tolist()
        saved = plain - (by_kernels if own is tvm else by_ort)
        foretold = own.foretold(own.found.edits, samples)
        times.append(
            f"| {name} | {where} | {1e6 * plain:.4g} | {1e6 * by_ort:.4g} | {1e6 * by_kernels:.4g}"
            f" | {_ratio(made[:, 2] / made[:, 1])} | {foretold / saved:.2f} |\n"
        )
    return choice, times


def _ratio(ratios: np.ndarray) -> str:
    picks = np.random.default_rng(0).integers(0, ratios.size, (1000, ratios.size))
    low, high = np.percentile(np.median(ratios[picks], axis=1), (2.5, 97.5))
    return f"{np.median(ratios):.3f} ({low:.3f} to {high:.3f})"


def page(found: Sequence[tuple[str, list[str]]]) -> str:
    """The page."""
    from burnish.backends.tvm import versions

    wheels: dict[str, Any] = {**versions.found(), "ONNX Runtime": runtime().__version__}
    said = ", ".join(f"{name} {version}" for name, version in wheels.items())
    head = HEAD.format(drop=DROP, rounds=ROUNDS, versions=said, processor=processor())
    choices, times = "".join(one for one, _ in found), "".join(row for _, many in found for row in many)
    return head + CHOICES + choices + TIMES + times


def main(names: Sequence[str]) -> None:
    """Print rows of the named subjects, or write the page."""
    found = []
    for name in names or SUBJECTS:
        found.append(rows(name))
        print(found[-1][0], *found[-1][1], sep="", end="", flush=True)
    if not names:
        PAGE.write_text(page(found))


if __name__ == "__main__":
    main(sys.argv[1:])
