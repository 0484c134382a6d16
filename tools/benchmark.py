"""What `burnish bench` finds: models in backends, compared with ONNX Runtime, then timed in turns."""

from __future__ import annotations

import time
import warnings
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from burnish.tools import bench_backends
from burnish.tools.subject import Subject

if TYPE_CHECKING:
    from burnish.backends.ort.timing import Spread, Timing
    from burnish.ir.errors import BurnishError
    from burnish.ir.samples import Sample
    from burnish.passes.protocols import Runner

_FOLDER = "artefact"


@dataclass(frozen=True)
class _Model:
    """A model that was asked for.

    Attributes:
        key: `a` or `b`.
        path: its file, or the folder it was compiled to.
    """

    key: str
    path: str

    @property
    def is_compiled(self) -> bool:
        """Whether it is a folder."""
        return Path(self.path).is_dir()

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of the model's file; of a folder that of the file it was compiled from."""
        from burnish.frontends import onnx_file

        if not self.is_compiled:
            return onnx_file.fingerprint(self.path)
        from burnish.backends.tvm import artifact, versions

        return artifact.read(Path(self.path), versions.found()).fingerprint


@dataclass
class _Entry:
    """A model in a backend.

    Attributes:
        runner: what is timed; None when it cannot be or computes something else.
        failure: why it cannot be run.
        found: what is shown of it, in plain types.
    """

    runner: bench_backends.Timeable | None
    failure: BurnishError | None
    found: dict[str, Any]


def benchmark(
    a: str,
    b: str | None = None,
    *,
    backends: Sequence[str] = ("ort-cpu",),
    threads: Sequence[int] = (1,),
    rounds: int = 30,
    seconds: float = 20.0,
    data: Any = None,
    dims: str = "",
    tuning_db: str | None = None,
) -> dict[str, Any]:
    """All that `burnish bench` shows, as the JSON document that `--json` prints; times are in seconds.

    Every model in every backend runs the same sample. What it computes is compared with the model in ONNX Runtime on
    the CPU first, and what computes something else is not timed.

    Args:
        a: a model's file, or the folder that `optimize --target llvm` wrote.
        b: another one with the same inputs.
        backends: names of `bench_backends.BACKENDS`; a folder is run by TVM whatever they are.
        threads: numbers of threads inside an operator; all is loaded and timed once for each.
        rounds: how many rounds at most.
        seconds: time limit of the rounds for one number of threads.
        data: as for `read_samples`; the first sample that the model takes is used.
        dims: numbers for the dynamic dimensions of the made sample, `batch=1,seq=128`, and of what TVM compiles.
        tuning_db: the folder of tuning records that TVM compiles with; None for plain kernels.

    Raises:
        InputError: a model cannot be loaded or refuses the sample; the only backend, or all of several, cannot run.
    """
    from burnish.ir.errors import BurnishError, InputError

    models = [_Model(key, path) for key, path in (("a", a), ("b", b)) if path is not None]
    for model in models:
        if not Path(model.path).exists():
            raise InputError("there is no such file or folder", place=model.path, hint="check the path")
    if tuning_db is not None and "tvm" not in backends:
        raise InputError("tuning records are for `tvm`", place="--tuning-db", hint="add it to `--backend`")
    if "tvm" in backends and not all(model.is_compiled for model in models):
        from burnish.backends.tvm import versions

        with suppress(BurnishError):  # its row says so; before a folder is loaded, which needs less than all of TVM
            versions.compiler()
    sample = _sample(models, data, dims)
    rows: list[dict[str, Any]] = []
    for count in threads:
        with ExitStack() as stack:
            entries = [
                _entry(model, name, models, sample, bench_backends.Request(model.path, count, dims, tuning_db), stack)
                for model in models
                for name in ([_FOLDER] if model.is_compiled else backends)
            ]
            failures = [one.failure for one in entries if one.failure is not None]
            if failures and (len(backends) == 1 or len(failures) == len(entries)):
                raise failures[0]
            _time(entries, sample, rounds, seconds)
        rows += [{"threads": count, **one.found} for one in entries]
    return {
        "a": a,
        "b": b,
        "sample": sample.name,
        "shapes": {name: list(array.shape) for name, array in sample.feeds.items()},
        "latency": rows,
        "session_creation": _creation(models, backends),
    }


def _sample(models: Sequence[_Model], data: Any, dims: str) -> Sample:
    """The sample that all of them run: of the first file, or of the first folder when there is no file."""
    from burnish.ir.errors import InputError

    first = next((one for one in models if not one.is_compiled), models[0])
    runner: Runner
    if first.is_compiled:
        from burnish.backends import tvm
        from burnish.tools.run_command import contract

        if data is None:
            hint = "give them with `--data`, or the model that it was compiled from beside it"
            raise InputError("a compiled model does not say what its inputs mean", place=first.path, hint=hint)
        loaded = tvm.load(first.path, threads=1)
        runner, model = loaded, contract(loaded.manifest)
    else:
        from burnish.backends.ort import session
        from burnish.frontends import onnx_file

        runner, model = session.from_path(first.path, lean=True), onnx_file.read(first.path)
    try:
        return Subject(model, first.path, dims, data).sample(runner)
    finally:
        runner.close()


def _entry(
    model: _Model, name: str, models: Sequence[_Model], sample: Sample, asked: bench_backends.Request, stack: ExitStack
) -> _Entry:
    """A model loaded in a backend, run once and compared."""
    from burnish.ir.errors import BurnishError

    found: dict[str, Any] = {"model": model.key, "backend": name, "status": "timed", "reason": ""}
    start = time.perf_counter()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of frameworks, about themselves
            runner, found["runtime"] = (
                bench_backends.artefact(model.path, asked.threads)
                if model.is_compiled
                else bench_backends.BACKENDS[name](asked)
            )
            stack.callback(runner.close)
            runner.run(sample.feeds)
    except BurnishError as error:
        error.place = error.place or model.path
        if model.key == "b" and error.hint is None:
            error.hint = "B must take the inputs of A; `--data` or `--dims` choose others"
        found |= {"status": "not run", "reason": error.cause}
        return _Entry(None, error, found)
    found["ready"] = time.perf_counter() - start
    right = _compare(model, models, sample, runner, found)
    return _Entry(runner if right else None, None, found)


def _compare(model: _Model, models: Sequence[_Model], sample: Sample, runner: Runner, found: dict[str, Any]) -> bool:
    """Whether a runner computes what its model computes in ONNX Runtime on the CPU, as far as that can be known."""
    from burnish.backends.ort import session
    from burnish.frontends import onnx_file
    from burnish.passes import prove, verify
    from burnish.tools import api

    files = [one for one in models if not one.is_compiled]
    own = [one for one in files if one is model or (model.is_compiled and one.fingerprint == model.fingerprint)]
    if not own:
        found["reason"] = "not compared: " + ("it was compiled from another model" if files else "there is no model")
        return True
    original = session.from_path(own[0].path, lean=True)
    try:
        expected = verify.Expected(original, [sample])
        wavers = expected.wavers(original)
    finally:
        original.close()
    if wavers:
        found["reason"] = "not compared: the model draws random numbers"
        return True
    read = onnx_file.read(own[0].path)
    result = prove.compare_code(read, [sample], api.ort_judge("onnx"), runner, timed=False)[0]
    worst = result.worst
    if worst is None:
        found["reason"] = "not compared: the model has no outputs"
        return True
    finite = worst.error if worst.error < float("inf") else None
    found |= {"error": finite, "allowed": worst.tolerance, "output": worst.output}
    if not result.holds:
        by = "in dtype, shape or exact values" if finite is None else f"by {worst.error:.2g}"
        reason = f"output `{worst.output}` differs {by} (allowed {worst.tolerance:.0e})"
        found |= {"status": "wrong", "reason": reason}
    return result.holds


def _time(entries: Sequence[_Entry], sample: Sample, rounds: int, seconds: float) -> None:
    """Time those that can be, in turns, and note it."""
    from burnish.backends.ort import timing

    ready = [(one, one.runner.bound(sample.feeds)) for one in entries if one.runner is not None]
    if not ready:
        return
    if len(ready) == 1:
        alone = timing.single(ready[0][1], rounds=rounds, seconds=seconds)
        ready[0][0].found |= {"rounds": alone.rounds, "seconds": _spread(alone)}
        return
    found = timing.in_turns([action for _, action in ready], rounds=rounds, seconds=seconds)
    for (entry, _), (spread, against) in zip(ready, found, strict=True):
        entry.found |= {"rounds": spread.rounds, "seconds": _spread(spread), "ratio": _ratio(against)}


def _creation(models: Sequence[_Model], backends: Sequence[str]) -> dict[str, dict[str, float]]:
    """How long a session in ONNX Runtime takes to make, for the models that were run there."""
    from burnish.backends.ort import timing

    if "ort-cpu" not in backends:
        return {}
    return {one.key: _spread(timing.creation_time(one.path)) for one in models if not one.is_compiled}


def _spread(found: Spread) -> dict[str, float]:
    return {"median": found.median, "low": found.low, "high": found.high}


def _ratio(found: Timing) -> dict[str, float]:
    return {"median": found.ratio, "low": found.low, "high": found.high}
