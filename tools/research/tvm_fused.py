"""Fused regions on a processor and in the code for a GPU: docs/results/tvm-fused.md.

    python -m burnish.tools.research.tvm_fused measure ROWS.jsonl
    python -m burnish.tools.research.tvm_fused code ROWS.jsonl [--target cuda:sm_90]
    python -m burnish.tools.research.tvm_fused tables ROWS.jsonl

Times are medians of one thread, all forms of a region taken in turns; rows that are in the file are not made again.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import click
import numpy as np
import onnx
import onnx_ir as oir
import tvm

from burnish.backends.ort import timing
from burnish.backends.ort.session import executor
from burnish.backends.tvm import compiling, processor_schedules
from burnish.backends.tvm import target as targets
from burnish.backends.tvm.kernels import emitting, inspection
from burnish.backends.tvm.lowering import lower
from burnish.backends.tvm.quiet import quiet
from burnish.backends.tvm.runner import TvmRunner
from burnish.tools.research import fused_cases

Maker = Callable[[Any], onnx.ModelProto]
_SIZES = ((576, 1536), (2048, 2048), (2048, 8192))
_ROWS = (1, 4, 64)
_SECONDS = 4.0


def cases(depth: int, width: int, dtype: type = np.float32) -> dict[str, Maker]:
    """Products with quantized weights, by what they are."""
    return {
        "MatMulNBits 4": lambda rows: fused_cases.bits(rows, depth, width, 4, dtype),
        "MatMulNBits 8": lambda rows: fused_cases.bits(rows, depth, width, 8, dtype),
        "int4 blocks, Gemm": lambda rows: fused_cases.dequantized(rows, depth, width, 4, transposed=True, dtype=dtype),
        "int8, Gemm": lambda rows: fused_cases.dequantized(rows, depth, width, 8, transposed=True, dtype=dtype),
        "int8, MatMul": lambda rows: fused_cases.dequantized(rows, depth, width, 8, transposed=False, dtype=dtype),
    }


@contextmanager
def unfused() -> Iterator[None]:
    """The same schedules, but for the weight, which is unpacked as a whole before it is multiplied."""
    place = mock.patch("tvm.s_tir.Schedule.compute_at", lambda self, block, loop, **_: None)
    with place, mock.patch.object(processor_schedules, "_FEW", 0):
        yield


def built(model: onnx.ModelProto) -> TvmRunner:
    """The model compiled for this machine."""
    target = targets.parse("llvm")
    with quiet():
        lowered = lower(oir.from_proto(model))
        code = compiling.build(compiling.scheduled(compiling.fused(lowered.module, target), target), target)
    return TvmRunner(code, tvm.cpu(), lowered.inputs, lowered.outputs, list(lowered.arrays()))


def measured(maker: Maker, rows: int) -> dict[str, Any]:
    """One region with some rows: fused, unfused, with dynamic rows, and in ONNX Runtime."""
    model = maker(rows)
    x = np.random.default_rng(1).standard_normal((rows, _depth(model))).astype(np.float32)
    truth = _truth(model, x)
    quickest = executor()(oir.from_proto(model))
    fused, dynamic = built(model), built(maker("n"))
    with unfused():
        written = built(model)
    given = tvm.runtime.tensor(x)
    found: dict[str, Any] = {"rows": rows}
    ours = {"fused": fused, "unfused": written, "dynamic": dynamic}
    runners: dict[str, Any] = {**ours, "ort": quickest}
    for name, runner in runners.items():
        found[f"{name}_error"] = float(np.abs(runner.run({"x": x})["y"] - truth).max() / np.abs(truth).max())
    actions = [
        lambda: fused.run_tensors([given]),
        lambda: quickest.run({"x": x}),
        lambda: written.run_tensors([given]),
        lambda: dynamic.run_tensors([given]),
    ]
    times = timing.in_turns(actions, rounds=25, seconds=_SECONDS)
    for name, (spread, pair) in zip(("fused", "ort", "unfused", "dynamic"), times, strict=True):
        found[name] = {"us": spread.median * 1e6, "share": 1 / pair.ratio, "range": [1 / pair.high, 1 / pair.low]}
    return found


def _depth(model: onnx.ModelProto) -> int:
    return int(model.graph.input[0].type.tensor_type.shape.dim[1].dim_value)


def _truth(model: onnx.ModelProto, x: np.ndarray) -> np.ndarray:
    """What ONNX Runtime computes without graph optimizations, which keep weights in their integers."""
    return executor(level="basic")(oir.from_proto(model)).run({"x": x})["y"].astype(np.float64)


def coded(model: onnx.ModelProto, target: str) -> dict[str, Any]:
    """What a region is in a library for a GPU."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "out"
        with quiet():
            emitted = emitting.emit(oir.from_proto(model), targets.parse(target), folder, title="region")
        found = inspection.kernels(folder / emitting.LIBRARY)
    matrix = sum((one.matrix for one in found), start=type(found[0].matrix)())
    return {
        "kernels": len(found),
        "calls": emitted.calls,
        "matrix": dict(matrix),
        "instructions": [one.instructions for one in found],
    }


@click.group()
def main() -> None:
    """Measure regions, look at their code, write the tables."""


@main.command()
@click.argument("rows", type=click.Path(path_type=Path))
@click.option("--only", default="")
def measure(rows: Path, only: str) -> None:
    """Add rows of times on this machine."""
    for depth, width in _SIZES:
        for name, maker in cases(depth, width).items():
            for count in _ROWS:
                key = {"kind": "time", "region": name, "depth": depth, "width": width, "rows": count}
                if only in name and not _is_there(rows, key):
                    _add(rows, key | measured(maker, count))


@main.command()
@click.argument("rows", type=click.Path(path_type=Path))
@click.option("--target", default="cuda:sm_90")
def code(rows: Path, target: str) -> None:
    """Add rows of what the code for a GPU holds, in float16."""
    for name, maker in cases(2048, 2048, np.float16).items():
        for count in (1, 128, "n"):
            key = {"kind": "code", "region": name, "rows": count, "target": target}
            if not _is_there(rows, key):
                _add(rows, key | coded(maker(count), target))


def _is_there(rows: Path, key: dict[str, Any]) -> bool:
    known = [json.loads(line) for line in rows.read_text().splitlines()] if rows.exists() else []
    return any(key.items() <= one.items() for one in known)


def _add(rows: Path, row: dict[str, Any]) -> None:
    print(row, flush=True)
    with rows.open("a") as stream:
        stream.write(json.dumps(row) + "\n")


@main.command()
@click.argument("rows", type=click.Path(path_type=Path))
def tables(rows: Path) -> None:
    """Print the tables of the page."""
    known = [json.loads(line) for line in rows.read_text().splitlines()]
    print("| weight | K x N | rows | fused, us | / ONNX Runtime | / unfused | / dynamic rows | error | its error |")
    print("|" + " --- |" * 9)
    names = list(cases(1, 1))
    times = [row for row in known if row["kind"] == "time"]
    for one in sorted(times, key=lambda row: (names.index(row["region"]), row["depth"], row["width"], row["rows"])):
        ratios = " | ".join(f"{one[name]['share']:.2f}" for name in ("ort", "unfused", "dynamic"))
        size = f"{one['depth']} x {one['width']}"
        errors = f"{one['fused_error']:.0e} | {one['ort_error']:.0e}"
        print(f"| {one['region']} | {size} | {one['rows']} | {one['fused']['us']:,.0f} | {ratios} | {errors} |")
    print("\n| weight | rows | kernels | calls | tensor-core instructions | instructions |\n|" + " --- |" * 6)
    for one in (row for row in known if row["kind"] == "code"):
        matrix = ", ".join(f"{count} {name}" for name, count in one["matrix"].items()) or "none"
        counts = f"{one['kernels']} | {one['calls']} | {matrix} | {one['instructions']}"
        print(f"| {one['region']} | {one['rows']} | {counts} |")


if __name__ == "__main__":
    main()
