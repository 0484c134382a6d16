"""The memory that ONNX Runtime takes for a model, measured: in its arena, and of a process that does nothing else.

Run as a program (`python -m burnish.backends.ort.footprint MODEL FEEDS THREADS RESULT`) it loads the model, runs it
once on the arrays of an `.npz` file, and writes what that did to its resident memory into a JSON file.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as oir

from burnish.backends.ort.session import executor, from_path

_PATIENCE = 600.0
"""Seconds that the process of its own may take."""


@dataclass(frozen=True)
class ArenaUse:
    """What the first run of a session does to ONNX Runtime's arena on the CPU, in bytes.

    Attributes:
        peak: the most in use during the run, less what was in use before it (weights).
        requested: the most that kernels asked for, likewise; the difference to `peak` is rounding.
        held: all memory that the arena holds after the run, weights that lie in it included.
    """

    peak: int
    requested: int
    held: int


@dataclass(frozen=True)
class Resident:
    """What a fresh process took from the system, in bytes.

    Attributes:
        load: how much its resident memory grew while the session was made.
        run: how much more it grew in the first run, at its peak.
    """

    load: int
    run: int


def arena_use(model: oir.Model, feeds: Mapping[str, np.ndarray], *, threads: int = 1) -> ArenaUse | None:
    """Measure the arena in a run of `model`; None when this ONNX Runtime does not tell.

    Inputs belong to the caller and are not counted. Scratch memory inside kernels is.

    Raises:
        InputError: the model cannot be loaded or refuses the inputs.
    """
    with tempfile.TemporaryDirectory(prefix="burnish-") as name:
        runner = executor(threads=threads, trace=Path(name))(model)
        runner.run(feeds)
        assert runner.session is not None
        events = json.loads(Path(runner.session.end_profiling()).read_text())
        runner.close()
    nodes = sorted((one for one in events if one["cat"] == "Node"), key=lambda one: (one["ts"], -one["dur"]))
    counts = [{key: int(text) for key, text in one["args"].items() if key.startswith("mem_")} for one in nodes]
    if not counts or not all(_COUNTERS <= one.keys() for one in counts):
        return None
    first = counts[0]
    peak = max(one["mem_bytes_in_use"] for one in counts)
    if counts[-1]["mem_in_use_peak"] > first["mem_in_use_peak"]:  # it rose in this run, inside of a kernel perhaps
        peak = counts[-1]["mem_in_use_peak"]
    requested = max(one["mem_bytes_requested_in_use"] for one in counts)
    return ArenaUse(
        peak - (first["mem_bytes_in_use"] - first["mem_in_use_delta"]),
        requested - (first["mem_bytes_requested_in_use"] - first["mem_requested_in_use_delta"]),
        counts[-1]["mem_arena_held"],
    )


_COUNTERS = {
    "mem_bytes_in_use",
    "mem_in_use_delta",
    "mem_in_use_peak",
    "mem_bytes_requested_in_use",
    "mem_requested_in_use_delta",
    "mem_arena_held",
}


def resident(path: str | Path, feeds: Mapping[str, np.ndarray], *, threads: int = 1) -> Resident | None:
    """Measure a process that loads the file and runs it once; None where the system does not tell, or it fails.

    Needs `/proc` as Linux has it.
    """
    if any(array.dtype.kind in "OSUV" for array in feeds.values()):  # an .npz file cannot hold them
        return None
    package = str(Path(__file__).parents[3])
    with tempfile.TemporaryDirectory(prefix="burnish-") as name:
        given, result = Path(name) / "feeds.npz", Path(name) / "result.json"
        np.savez(given, **dict(feeds))  # type: ignore[arg-type]
        words = [sys.executable, "-m", __spec__.name, str(path), str(given), str(threads), str(result)]
        paths = os.pathsep.join(filter(None, (package, os.environ.get("PYTHONPATH"))))
        with suppress(subprocess.SubprocessError):
            subprocess.run(
                words,
                env=os.environ | {"PYTHONPATH": paths},
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                check=True,
                timeout=_PATIENCE,
            )
        if not result.exists():
            return None
        found: dict[str, Any] = json.loads(result.read_text())
    return Resident(**found)


def _memory(key: str) -> int:
    """`VmRSS` (resident now) or `VmHWM` (the most so far) of this process, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{key}:"))


def _main(path: str, given: str, threads: str, result: str) -> None:
    with np.load(given) as arrays:
        feeds = dict(arrays)
    from burnish.backends.ort.session import runtime

    runtime()
    before = _memory("VmRSS")
    runner = from_path(path, threads=int(threads))
    loaded = _memory("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the most so far is what is resident now
    runner.run(feeds)
    found = {"load": max(loaded - before, 0), "run": max(_memory("VmHWM") - loaded, 0)}
    Path(result).write_text(json.dumps(found))


if __name__ == "__main__":
    _main(*sys.argv[1:])
