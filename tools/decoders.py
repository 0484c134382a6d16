"""Open a model to decode with: what its inputs mean is read by the frontend, what runs it comes from a backend."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import onnx_ir as oir

from burnish.ir.errors import InputError

if TYPE_CHECKING:
    from burnish.backends.decoding.decoder import Decoder
    from burnish.backends.decoding.engine import Engine
    from burnish.backends.decoding.keeping import Keeper
    from burnish.backends.decoding.ports import Ports

RUNTIMES = ("ort", "fx", "tvm")


def open_decoder(
    model: oir.Model | str | Path,
    *,
    runtime: str = "ort",
    threads: int = 1,
    limit: int | None = None,
    name: str | None = None,
) -> Decoder:
    """A decoder of a model with caches.

    Args:
        model: a path, or a model in memory, which must not be edited while the decoder lives.
        runtime: `ort` (ONNX Runtime, on arrays that are used again), `fx` (torch) or `tvm`.
        threads: threads inside an operator.
        limit: positions that the model is made for, where something else than the graph says so.
        name: what errors call the model; its path by default.

    Returns:
        The decoder; `decoder.close()` frees it.

    Raises:
        InputError: the model is no decoder with caches, or the runtime cannot load it.
        MissingPackageError: the runtime is not installed.
    """
    from burnish.backends.decoding.decoder import Decoder
    from burnish.backends.decoding.ports import read_ports
    from burnish.frontends import onnx_file
    from burnish.frontends.roles import roles

    path = None if isinstance(model, oir.Model) else Path(model)
    read = onnx_file.read(path) if path is not None else model
    assert isinstance(read, oir.Model)
    said = name or (str(path) if path is not None else "the model")
    try:
        ports = read_ports(read, roles(read))
    except InputError as error:
        error.place = said if error.place is None else f"{said}, {error.place}"
        raise
    keeper = _keeper(read, ports, runtime, threads)
    return Decoder(ports, _engine(runtime, threads, path)(read), limit=limit, name=said, keeper=keeper)


def _keeper(model: oir.Model, ports: Ports, runtime: str, threads: int) -> Keeper | None:
    """What makes the caches of a decoder with budgets smaller; ONNX Runtime runs it for TVM too."""
    from burnish.backends.decoding.keeping import Keeper
    from burnish.passes import kv_budget, kv_compress

    budget = kv_budget.read(model)
    if budget is None:
        return None
    graph = kv_compress.compressor(model, budget)
    return Keeper(budget, _engine("fx" if runtime == "fx" else "ort", threads, None)(graph), ports.caches)


def _engine(runtime: str, threads: int, path: Path | None) -> Callable[[oir.Model], Engine]:
    from burnish.backends.decoding.engine import RunnerEngine

    if runtime == "ort":
        from burnish.backends.ort import session
        from burnish.backends.ort.writing import OrtEngine

        load = session.executor(threads=threads)
        return lambda model: OrtEngine(load(model))
    if runtime == "fx":
        from burnish.backends.fx import runner

        make = runner.executor(threads=threads)
        return lambda model: RunnerEngine(make(model))
    if runtime == "tvm":
        from burnish.tools import bench_backends

        if path is None:
            raise InputError("TVM compiles files, not models in memory", hint="give the path of the model")
        asked = bench_backends.Request(str(path), threads)
        return lambda model: RunnerEngine(bench_backends.compiled_here(asked)[0])
    raise InputError(f"there is no runtime `{runtime}`", hint=f"take one of {', '.join(RUNTIMES)}")
