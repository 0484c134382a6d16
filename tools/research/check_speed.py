"""Time `check run` of an unchanged model against ONNX Runtime alone: the page `docs/results/check-speed.md`.

python -m burnish.tools.research.check_speed .zoo > docs/results/check-speed.md
"""

from __future__ import annotations

import gc
import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from burnish.backends.ort import session
from burnish.frontends import onnx_file, synthesis
from burnish.frontends.samples import read_samples
from burnish.tools.check import lock_file
from burnish.tools.check.check import check
from burnish.tools.check.take import Request, take
from burnish.tools.research import zoo_tasks

_HEAD = """\
# What checking a model costs

`check run` of a model that did not change reads the lock and the model, hashes all weights, runs the samples once and
compares. Beside it: ONNX Runtime alone makes a session of the file and runs the same samples. Both in one process, in
turns, with one thread; medians of {rounds} rounds (3 for the task) on a machine of {cores} cores that others use, too.
Written by `python -m burnish.tools.research.check_speed`.

| model | samples | ONNX Runtime alone, s | check, s | ratio | lowest and highest ratio |
| --- | --- | --- | --- | --- | --- |"""

_FOOT = """
What is added is a hash of all weights and Python's work for each node, so that small models with many nodes pay most in
proportion, and little in seconds."""

_MODELS = ("a1-efficientnet", "a2-minilm", "a3-smollm2-nocache", "a6-ppocr-cls")


def measure(path: Path, data: Path | None, rounds: int) -> tuple[int, float, float, list[float]]:
    """The number of samples, median seconds of ONNX Runtime alone and of `check`, and the ratio of each round."""
    model = onnx_file.read(path)
    runner = session.executor()(model)
    made = synthesis.usable(synthesis.synthesise(model), runner)[0] if data is None else read_samples(data, model)
    runner.close()
    with tempfile.TemporaryDirectory() as folder:
        lock = Path(folder) / "lock.yaml"
        lock_file.write(take(model, Request(data=data)), lock)

        def alone() -> None:
            held = session.from_path(path)
            for sample in made:
                held.run(sample.feeds)
            held.close()

        def checked() -> None:
            report = check(onnx_file.read(path), lock_file.read(lock), Request(data=data))
            assert not report.differences

        alone()
        checked()
        times = np.array([[_seconds(alone), _seconds(checked)] for _ in range(rounds)])
    plain, ours = np.median(times, axis=0)
    return len(made), float(plain), float(ours), (times[:, 1] / times[:, 0]).tolist()


def _seconds(action: Callable[[], None]) -> float:
    gc.collect()
    start = time.perf_counter()
    action()
    return time.perf_counter() - start


def _task(name: str, zoo: Path, folder: Path) -> Path:
    """The labelled task of a model as a folder of samples."""
    task = zoo_tasks.load(name, zoo)
    for number, (feeds, labels) in enumerate(zip(task.samples, task.labels, strict=True)):
        arrays: dict[str, Any] = {"labels": labels, **feeds}
        np.savez(folder / f"{number:03d}.npz", **arrays)
    return folder


def main(zoo: Path, rounds: int = 11) -> None:
    """Print the page."""
    print(_HEAD.format(rounds=rounds, cores=os.cpu_count()))
    with tempfile.TemporaryDirectory() as folder:
        runs = [(name, None, rounds) for name in _MODELS] + [("a2-minilm", _task("a2-minilm", zoo, Path(folder)), 3)]
        for name, data, often in runs:
            count, plain, ours, ratios = measure(zoo / f"{name}.onnx", data, often)
            kind = f"{count} made" if data is None else f"{count} of its task"
            spread = f"{min(ratios):.2f} to {max(ratios):.2f}"
            print(
                f"| {name} | {kind} | {plain:.3f} | {ours:.3f} | {float(np.median(ratios)):.2f} | {spread} |",
                flush=True,
            )


if __name__ == "__main__":
    main(Path(sys.argv[1]))
