"""What loading a compiled model takes: `python -m burnish.tools.research.tvm_loading MODEL.onnx...`.

Each model is compiled twice without tuning: as `optimize --target llvm --regions all` writes it, weights beside the
code, and with the weights as constants inside the library. Each is then loaded in processes of their own: the first by
`burnish.backends.tvm.load`, the second by TVM's runtime alone behind the same comparison of its SHA-256. The page
`docs/results/tvm-loading.md` has the medians of a process from its start.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import burnish
from burnish.frontends import onnx_file
from burnish.passes import recipes
from burnish.passes.pipeline import Pipeline

PAGE = Path(__file__).resolve().parents[2] / "docs" / "results" / "tvm-loading.md"
HEAD = """# Loading a compiled model

`python -m burnish.tools.research.tvm_loading` loads each model in new processes, {rounds} times, in turns: as
`optimize` writes it, weights in a file beside the library, and with the weights inside the library. Both compare every
byte with its SHA-256 first, and neither imports torch. CPU time is that of the whole process, Python's start included,
on {machine}. Wall-clock time is not given: the machine was shared.

| model | weights, MB | beside: CPU, s | beside: memory, MB | inside: CPU, s | inside: memory, MB |
| --- | --- | --- | --- | --- | --- |
"""
_BESIDE = "from burnish.backends import tvm; made = tvm.load({path!r})"
_INSIDE = """
import hashlib, os
os.environ["TVM_USE_RUNTIME_LIB"] = "1"
sys.modules["torch"] = None
seen = hashlib.sha256()
with open({path!r}, "rb") as stream:
    while block := stream.read(1 << 20):
        seen.update(block)
import tvm
from tvm.runtime import vm
made = vm.VirtualMachine(tvm.runtime.load_module({path!r}), tvm.cpu())
"""
_MEASURED = """
import json, resource
used = resource.getrusage(resource.RUSAGE_SELF)
with open("/proc/self/status") as stream:
    peak = next(int(line.split()[1]) for line in stream if line.startswith("VmHWM"))
print(json.dumps([used.ru_utime + used.ru_stime, peak * 1024 / 1e6, bool(sys.modules.get("torch"))]))
"""


def measured(code: str) -> tuple[float, float]:
    """Seconds of CPU and megabytes at the most, of a new process that runs `code`."""
    settings = os.environ | {"TVM_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", f"import sys\n{code}\n{_MEASURED}"]
    ran = subprocess.run(command, capture_output=True, text=True, check=True, env=settings)
    seconds, memory, torch = json.loads(ran.stdout.splitlines()[-1])
    assert not torch
    return seconds, memory


def inside(model: Path, path: Path) -> None:
    """Write the library with the weights as constants."""
    from tvm import relax

    from burnish.backends.tvm import compiling, target
    from burnish.backends.tvm.lowering import MAIN, lower

    rewritten = Pipeline(recipes.named("default", "onnx", None)[:-1]).rewrite(onnx_file.read(model)).model
    lowered, machine = lower(rewritten), target.parse("llvm")
    parameters = list(lowered.module[MAIN].params)[len(lowered.inputs) :]
    arrays = dict(zip((one.name for one in parameters), lowered.arrays(), strict=True))
    module = compiling.scheduled(compiling.fused(lowered.module, machine), machine)
    compiling.export(compiling.build(relax.transform.BindParams(MAIN, arrays)(module), machine), path)


def row(model: Path, rounds: int) -> dict[str, Any]:
    """What both ways take for one model."""
    with tempfile.TemporaryDirectory() as folder:
        beside = Path(folder) / "out"
        burnish.optimize(model, beside, target="llvm", verify="off", regions="all")
        library = Path(folder) / "inside.so"
        inside(model, library)
        codes = _BESIDE.format(path=str(beside)), _INSIDE.format(path=str(library))
        found = [[measured(code) for code in codes] for _ in range(rounds)]
        size = (beside / "weights.safetensors").stat().st_size
    cells = [tuple(statistics.median(one[way][what] for one in found) for what in (0, 1)) for way in (0, 1)]
    return {"model": model.stem, "weights": size / 1e6, "cells": cells}


def main() -> None:
    """Measure and write the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("models", nargs="+", type=Path)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--machine", required=True, help="what the page says it ran on")
    given = parser.parse_args()
    text = HEAD.format(rounds=given.rounds, machine=given.machine)
    for model in given.models:
        one = row(model, given.rounds)
        cells = " | ".join(f"{cpu:.2f} | {memory:.0f}" for cpu, memory in one["cells"])
        text += f"| {one['model']} | {one['weights']:.1f} | {cells} |\n"
    PAGE.write_text(text)


if __name__ == "__main__":
    main()
