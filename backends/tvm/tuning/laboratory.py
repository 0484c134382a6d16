"""Candidates are built and timed in child processes, here or on the servers of a tracker."""

from __future__ import annotations

import logging
import socket
import tempfile
import threading
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any

from burnish.backends.tvm import vector_math
from burnish.backends.tvm.reasons import last_line
from burnish.backends.tvm.tuning import worker
from burnish.ir.errors import InputError, MissingPackageError

KEY = "burnish"
"""The key that RPC servers must be registered by, unless another is named."""
BUILD, RUN, REMOTE = 60.0, 60.0, 150.0
"""Seconds that building, timing here and timing elsewhere may take, per candidate; the last includes the queue."""
_USES = 200
"""Candidates after which a child is replaced: TVM's compiler keeps some memory of each."""


def tracker(text: str) -> tuple[str, int, str]:
    """Host, port and key of `host:port` or `host:port/key`.

    Raises:
        InputError: the text is no such address.
    """
    address, _, key = text.partition("/")
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 65536:
        raise InputError(
            "an RPC tracker is named by host and port", place=text, hint=f"`127.0.0.1:9190`, or `HOST:PORT/KEY` ({KEY})"
        )
    return host.strip("[]"), int(port), key or KEY


class Laboratory:
    """Builds and times candidates; a context manager that leaves no child process and no file behind.

    Args:
        target: a `tvm.target.Target`.
        kind: the device: `cpu` or `cuda`.
        threads: that kernels run on.
        workers: candidates that are built at a time; timed is one at a time, on each server one.
        remote: host, port and key of a tracker; None times here.

    Raises:
        MissingPackageError: a package that child processes need is absent.
        InputError: the tracker cannot be reached or knows no server of the key.
    """

    def __init__(
        self, target: Any, kind: str, *, threads: int = 1, workers: int = 2, remote: tuple[str, int, str] | None = None
    ) -> None:
        self._pool = _pools()
        self._target, self._kind, self._remote = target, kind, remote
        self._threads = threads
        places = 1 if remote is None else servers(remote)
        start = partial(worker.start, threads)
        quiet = {"stdout": _NULL, "stderr": _NULL}
        self._builders = self._pool(workers, BUILD, start, maximum_process_uses=_USES, **quiet)
        self._runners = self._pool(places, RUN if remote is None else REMOTE, start, **quiet)
        self._folder = tempfile.TemporaryDirectory(prefix="burnish-tune-")
        self._count = 0

    def __enter__(self) -> Laboratory:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for pool in (self._builders, self._runners):
            pool.shutdown(wait=True)
        self._folder.cleanup()

    def measure(self, candidates: Sequence[Any], limit: float = 1.0) -> list[tuple[float | None, str]]:
        """Seconds of each candidate, or None with the reason.

        Args:
            candidates: TVM's `MeasureCandidate`s.
            limit: seconds; slower ones are run twice and no more.
        """
        paths = [str(Path(self._folder.name) / f"{self._count + index}.so") for index in range(len(candidates))]
        self._count += len(candidates)
        modules = [one.sch.mod for one in candidates]
        tasks = [(worker.built, module, self._target, path) for module, path in zip(modules, paths, strict=True)]
        made = list(self._builders.map_with_error_catching(_call, tasks))
        work = [
            (worker.measured, path, _arguments(one), self._kind, limit, self._remote)
            for one, path, done in zip(candidates, paths, made, strict=True)
            if _failure(done) is None
        ]
        timed = iter(self._runners.map_with_error_catching(_call, work))
        results: list[tuple[float | None, str]] = []
        for done in made:
            reason = _failure(done)
            if reason is None:
                done = next(timed)
                reason = _failure(done)
            results.append((float(done.value), "") if reason is None else (None, reason))
        for path in paths:
            Path(path).unlink(missing_ok=True)
        return results


_NULL = -3
"""`subprocess.DEVNULL`."""


def _call(task: tuple[Any, ...]) -> Any:
    return task[0](*task[1:])


def _arguments(candidate: Any) -> list[tuple[str, list[int]]]:
    return [(str(one.dtype), [int(size) for size in one.shape]) for one in candidate.args_info]


def _failure(done: Any) -> str | None:
    """Why a child has no result; None when it has one."""
    from tvm.support.popen_pool import StatusKind

    if done.status == StatusKind.COMPLETE:
        return None
    if done.status == StatusKind.TIMEOUT:
        return "it took too long"
    if isinstance(done.value, ChildProcessError):
        return "the process died"
    return last_line(done.value)


def _pools() -> Any:
    """TVM's pool of processes, with these modules sent by value: children need not find this package."""
    try:
        import cloudpickle
        import psutil  # noqa: F401
        from tvm.support.popen_pool import PopenPoolExecutor
    except ImportError as error:
        raise MissingPackageError(
            f"tuning needs the package `{error.name}`", hint="pip install 'burnish[tune]'"
        ) from error
    import sys

    for module in (worker, vector_math, sys.modules[__name__]):
        cloudpickle.register_pickle_by_value(module)
    return PopenPoolExecutor


def servers(remote: tuple[str, int, str]) -> int:
    """How many servers of the key a tracker knows."""
    place = f"{remote[0]}:{remote[1]}"
    try:
        import tornado  # noqa: F401
        from tvm import rpc
    except ImportError as error:
        raise MissingPackageError(
            f"measuring elsewhere needs the package `{error.name}`", hint="pip install 'burnish[tune]'"
        ) from error
    hint = "start it: `python -m tvm.exec.rpc_tracker --host HOST`"
    try:
        socket.create_connection(remote[:2], timeout=5).close()  # TVM would try for a minute
    except OSError as error:
        raise InputError(f"there is no RPC tracker: {error.strerror or error}", place=place, hint=hint) from None
    found: list[Any] = []

    def ask() -> None:
        try:
            found.append(rpc.connect_tracker(remote[0], remote[1]).summary()["server_info"])
        except Exception as error:
            logging.getLogger(__name__).debug("tracker: %s", error)

    asking = threading.Thread(target=ask, daemon=True)
    asking.start()
    asking.join(10)
    if not found:
        raise InputError("what answers there is no RPC tracker", place=place, hint=hint)
    count = sum(str(one["key"]) == f"server:{remote[2]}" for one in found[0])
    if not count:
        hint = f"start them: `python -m tvm.exec.rpc_server --tracker {place} --key {remote[2]}`"
        raise InputError(f"the RPC tracker knows no server of the key `{remote[2]}`", place=place, hint=hint)
    return count
