"""Many models at once: those of a folder against their namesakes in another, each in a process of its own."""

from __future__ import annotations

import multiprocessing
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

from burnish.ir.errors import BurnishError, InputError
from burnish.tools.check.difference import Report


class State(StrEnum):
    """What came of a model."""

    FAILED = "failed"
    REGRESSION = "regression"
    REMOVED = "removed"
    ADDED = "added"
    FINE = "fine"


@dataclass(frozen=True)
class Row:
    """A model of the two folders.

    Attributes:
        name: its path in them.
        state: what came of it.
        report: what was found; None where nothing was compared.
        reason: why it failed.
    """

    name: str
    state: State
    report: Report | None = None
    reason: str = ""


@dataclass(frozen=True)
class Options:
    """How every pair is checked.

    Attributes:
        tolerance: path of a file of tolerances.
        data: a folder with the samples of each model at its path: `a/b.npz`, or a folder `a/b`, for `a/b.onnx`. A model
            without any is run on made samples.
        run: compare outputs.
        threads: of the runtime, for each process.
    """

    tolerance: str | None = None
    data: str | None = None
    run: bool = True
    threads: int = 1


def matrix(
    old: str | Path,
    new: str | Path,
    options: Options = Options(),
    jobs: int = 1,
    on_step: Callable[[str, int, int], None] = lambda what, number, total: None,
) -> list[Row]:
    """Compare each model of a folder with the one of the same path in another.

    What the old model is compared by is the lock file beside it, `a.lock.yaml` for `a.onnx`; without one it is locked
    first. A model that cannot be read, or that ends its process, is a row that failed.

    Args:
        old, new: folders; `.onnx` files in all their folders count.
        options: how pairs are checked.
        jobs: processes.
        on_step: told which model is done, how many are, and of how many.

    Returns:
        Rows in the order of the names.

    Raises:
        InputError: a folder cannot be read, neither holds a model, or the tolerances cannot be read.
    """
    before, after = (_models(Path(folder)) for folder in (old, new))
    if not before and not after:
        raise InputError("there is no .onnx file in either folder", place=f"{old}, {new}", hint="give the two folders")
    if options.tolerance is not None:
        from burnish.tools.check import tolerances

        tolerances.read(options.tolerance)
    if options.data is not None and not Path(options.data).is_dir():
        hint = "give a folder with `NAME.npz` for each `NAME.onnx`"
        raise InputError("this is no folder", place=f"--data {options.data}", hint=hint)
    rows = {name: Row(name, State.REMOVED) for name in before.keys() - after.keys()}
    rows |= {name: Row(name, State.ADDED) for name in after.keys() - before.keys()}
    pairs = {name: (before[name], after[name]) for name in sorted(before.keys() & after.keys())}
    for number, row in enumerate(in_processes(_checked, pairs, options, jobs), 1):
        rows[row.name] = row
        on_step(row.name, number, len(pairs))
    return [rows[name] for name in sorted(rows)]


def exit_code(rows: Iterable[Row]) -> int:
    """2 when a model could not be checked, 1 when one regressed or is gone, 0 else."""
    states = {row.state for row in rows}
    return 2 if State.FAILED in states else int(bool(states & {State.REGRESSION, State.REMOVED}))


def _models(folder: Path) -> dict[str, str]:
    if not folder.is_dir():
        raise InputError("this is no folder", place=str(folder), hint="give two folders of .onnx files")
    found = (path for path in folder.rglob("*.onnx") if path.is_file())
    return {path.relative_to(folder).as_posix(): str(path) for path in found}


def in_processes(
    work: Callable[[str, str, str, Options], Row], pairs: dict[str, tuple[str, str]], options: Options, jobs: int
) -> Iterator[Row]:
    """The row of each pair, as they come.

    A process that ends takes with it all that run beside it: each of these is tried once more, alone, and the rest
    go on in new processes.

    Args:
        work: makes a row of a name, the paths of the old and the new model, and the options; it can be imported.
        pairs: the paths by name.
        options: for `work`.
        jobs: processes.
    """
    names = deque(pairs)
    while names:
        lost: list[str] = []
        with _pool(min(jobs, len(names)), options) as pool:
            running: dict[Future[Row], str] = {}
            while (names or running) and not lost:
                try:
                    while names and len(running) < jobs:
                        running[pool.submit(work, names[0], *pairs[names[0]], options)] = names[0]
                        names.popleft()
                except BrokenProcessPool:
                    break
                for future in wait(running, return_when=FIRST_COMPLETED).done:
                    name = running.pop(future)
                    try:
                        yield future.result()
                    except BrokenProcessPool:
                        lost.append(name)
            lost += running.values()
        for name in lost:
            with _pool(1, options) as pool:
                try:
                    yield pool.submit(work, name, *pairs[name], options).result()
                except BrokenProcessPool:
                    reason = "its process ended while it was checked: memory ran out, or the runtime crashed"
                    yield Row(name, State.FAILED, reason=reason)


def _pool(jobs: int, options: Options) -> ProcessPoolExecutor:
    context = multiprocessing.get_context("spawn")
    return ProcessPoolExecutor(jobs, mp_context=context, initializer=_keep_to, initargs=(options.threads,))


def _keep_to(threads: int) -> None:
    """Let libraries that are loaded later use so many threads."""
    os.environ["OMP_NUM_THREADS"] = str(threads)


def _checked(name: str, old: str, new: str, options: Options) -> Row:
    """The row of a pair; runs in a process of its own."""
    try:
        report = _report(name, old, new, options)
    except BurnishError as error:
        return Row(name, State.FAILED, reason=f"{error.place}: {error.cause}" if error.place else error.cause)
    except MemoryError:
        return Row(name, State.FAILED, reason="out of memory")
    except OSError as error:
        return Row(name, State.FAILED, reason=f"{error.filename or new}: {error.strerror or error}")
    except Exception as error:
        return Row(
            name, State.FAILED, reason=f"{type(error).__name__}: {error} (this is a defect of burnish; report it)"
        )
    return Row(name, State.FINE if report.passed else State.REGRESSION, report)


def _report(name: str, old: str, new: str, options: Options) -> Report:
    from burnish.frontends import onnx_file
    from burnish.tools import check_api

    data = _samples(options.data, name)
    original = onnx_file.read(old)
    written = check_api.beside(old)
    given: dict[str, Any] = {"data": data, "run": options.run, "threads": options.threads}
    lock = written if written.is_file() else check_api.lock(original, **given)
    return check_api.check(new, lock, tolerances=options.tolerance, old=original, **given)


def _samples(folder: str | None, name: str) -> str | None:
    if folder is None:
        return None
    found = Path(folder, name).with_suffix("")
    candidates = (found.with_name(f"{found.name}.npz"), found)
    return next((str(one) for one in candidates if one.exists()), None)
