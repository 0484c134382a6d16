"""The Python interface to regressions of exported models: `lock` and `check`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from burnish.frontends.measures import Metric
    from burnish.passes.protocols import Measure
    from burnish.tools.check.difference import Report
    from burnish.tools.check.lock import Lock
    from burnish.tools.check.tolerances import Tolerances

SUFFIX = ".lock.yaml"


def lock(
    source: Any,
    path: str | Path | None = None,
    *,
    inputs: Any = None,
    data: Any = None,
    metric: str | Measure | Metric | None = None,
    latency: bool = False,
    run: bool = True,
    threads: int = 1,
) -> Lock:
    """What a model is, and its lock file when a path is given.

    Args:
        source: anything that `burnish.load` takes.
        path: where to write; an older lock is replaced, any other file is not.
        inputs: example inputs, for a torch module.
        data: samples that the outputs are computed on; made from the model's own meaning when absent.
        metric: a name of `burnish.passes.measure_choice.NAMES`, `package.module:function`, or a function of the outputs
            and labels of all samples; by default what suits the labels in `data`, and none without labels.
        latency: time the model, too, as a ratio to a matrix product in the same process.
        run: compute outputs; without, the lock holds what can be read from the graph.
        threads: threads of the runtime.

    Raises:
        InputError: the model or the samples cannot be used, or the path cannot be written.
    """
    from burnish.frontends import load
    from burnish.tools.check import lock_file, take

    request = take.Request(data=data, metric=metric, latency=latency, run=run, threads=threads)
    made = take.take(load(source, inputs), request)
    if path is not None:
        lock_file.write(made, path)
    return made


def check(
    source: Any,
    lock: str | Path | Lock,
    *,
    inputs: Any = None,
    data: Any = None,
    metric: str | Measure | Metric | None = None,
    latency: bool = False,
    run: bool = True,
    threads: int = 1,
    tolerances: str | Path | Tolerances | None = None,
    old: Any = None,
) -> Report:
    """What differs between a model and its lock.

    Args:
        source, inputs, metric, latency, run, threads: as for `lock`.
        lock: a lock, or the path of its file.
        data: the samples that the lock was made with, where it was made with any.
        tolerances: what may differ, or the path of a file that says so.
        old: the model that the lock was made from: where outputs differ, the first node where the two part is named.

    Raises:
        InputError: the model, the lock, the samples or the tolerances cannot be used.
    """
    from burnish.frontends import load
    from burnish.ir.errors import InputError
    from burnish.tools.check import lock_file, take
    from burnish.tools.check import tolerances as allowed
    from burnish.tools.check.check import check as compared

    model = load(source, inputs)
    path = str(lock) if isinstance(lock, str | Path) else ""
    known = lock_file.read(lock) if isinstance(lock, str | Path) else lock
    if run and data is None and known.samples is not None and known.samples.given:
        cause = "the outputs in the lock were computed on samples that were given, and none are given now"
        raise InputError(cause, place=path or None, hint="give the same `--data`, or `--no-run` to compare no outputs")
    request = take.Request(data=data, metric=metric, latency=latency, run=run, threads=threads)
    if isinstance(tolerances, str | Path):
        tolerances = allowed.read(tolerances)
    return compared(
        model,
        known,
        request,
        allowed.Tolerances() if tolerances is None else tolerances,
        old=None if old is None else load(old),
        model_name=str(source) if isinstance(source, str | Path) else type(source).__name__,
        lock_name=path,
    )


def beside(model: str | Path) -> Path:
    """Where the lock file of a model stands unless it is said: `model.onnx` has `model.lock.yaml` beside it.

    Other names are kept whole, `model.pt2.lock.yaml`: `encoder.v1` and `encoder.v2` are two models.
    """
    path = Path(model)
    return path.with_suffix(SUFFIX) if path.suffix.lower() == ".onnx" else Path(f"{path}{SUFFIX}")
