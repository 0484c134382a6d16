"""Tunes half-precision kernels on a GPU and times them against torch (cuBLAS, cuDNN) and TVM's default schedules.

    python -m burnish.tools.research.gpu.tune_check OUT --minutes 6 [--device cpu --small] [--only NAME,...]

OUT gets `records/SPACE/` (tuning records) and `table.json` and `table.md`, written anew after each kernel. The minutes
are shared evenly by the kernels and the two design spaces, `cuda` and `cuda-tensorcore`. Needs torch, numpy, msgspec,
psutil, cloudpickle, xgboost (the wheel xgboost-cpu), scipy, apache-tvm and apache-tvm-ffi with their metadata; neither
ONNX nor ONNX Runtime.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import tvm
from tvm import relax

from burnish.backends.tvm import compiling, tuning
from burnish.backends.tvm.target import Target, parse
from burnish.backends.tvm.tuning import kernels, worker

_ROUNDS, _CALLS = 7, 20


class Case:
    """A computation of two tensors, in Relax and in torch."""

    def __init__(
        self, first: list[int], second: list[int], make: Callable[..., Any], torch_: Callable[..., Any]
    ) -> None:
        self.shapes, self.make, self.torch = (first, second), make, torch_

    def module(self, dtype: str, target: Target) -> Any:
        """The fused module."""
        builder = relax.BlockBuilder()
        given = [relax.Var(name, relax.TensorType(shape, dtype)) for name, shape in zip("xw", self.shapes, strict=True)]
        with builder.function("main", given):
            with builder.dataflow():
                result = builder.emit_output(self.make(builder, *given))
            builder.emit_func_output(result)
        return compiling.fused(builder.get(), target)


def cases(small: bool) -> dict[str, Case]:
    """What is tuned, halves summed in float32; with `small`, the same of sizes that take a CPU no time."""

    def as_given(builder: Any, found: Any, x: Any) -> Any:
        return builder.emit(relax.op.astype(found, x.ty.dtype)) if str(x.ty.dtype) == "float16" else found

    def product(builder: Any, x: Any, w: Any) -> Any:
        return as_given(builder, builder.emit(relax.op.matmul(x, w, out_dtype="float32")), x)

    def gelu(builder: Any, x: Any, w: Any) -> Any:
        return relax.op.nn.gelu(product(builder, x, w))

    def convolution(builder: Any, x: Any, w: Any) -> Any:
        return as_given(builder, builder.emit(relax.op.nn.conv2d(x, w, padding=(1, 1), out_dtype="float32")), x)

    def activated(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        return F.gelu(x @ w)

    found: dict[str, Case] = {}
    for size in (32, 64) if small else (512, 1024, 4096):
        found[f"matmul {size}"] = Case([size, size], [size, size], product, torch.matmul)
        found[f"matmul {size} gelu"] = Case([size, size], [size, size], gelu, activated)
    batch, width, side, heads, length, part = (1, 16, 8, 2, 16, 16) if small else (16, 64, 56, 96, 512, 64)
    found["conv 3x3"] = Case(
        [batch, width, side, side], [width, width, 3, 3], convolution, lambda x, w: F.conv2d(x, w, padding=1)
    )
    found["attention scores"] = Case([heads, length, part], [heads, part, length], product, torch.matmul)
    found["attention values"] = Case([heads, length, length], [heads, length, part], product, torch.matmul)
    return found


class Device:
    """Where kernels run: tensors, timing, and the target."""

    def __init__(self, name: str) -> None:
        self.cuda = name == "cuda"
        self.name, self.target = name, parse("cuda" if self.cuda else "llvm")
        self.dtype = torch.float16 if self.cuda else torch.float32
        self.place = tvm.cuda(0) if self.cuda else tvm.cpu()

    def tensors(self, case: Case) -> list[torch.Tensor]:
        """Inputs of about unit size, the products too."""
        torch.manual_seed(0)
        first, second = case.shapes
        depth = second[1] * 9 if len(second) == 4 else second[-2]
        made = torch.randn(first), torch.randn(second) / depth**0.5
        return [one.to(self.dtype).to(self.name) for one in made]

    def torch_seconds(self, function: Callable[[], Any]) -> float:
        """The median of rounds of many calls, per call; calls follow one another without waiting."""
        for _ in range(5):
            function()
        times = []
        for _ in range(_ROUNDS):
            self._wait()
            if self.cuda:
                begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                begin.record()
                for _ in range(_CALLS):
                    function()
                end.record()
                self._wait()
                times.append(begin.elapsed_time(end) / 1e3 / _CALLS)
            else:
                started = time.perf_counter()
                for _ in range(_CALLS):
                    function()
                times.append((time.perf_counter() - started) / _CALLS)
        return float(statistics.median(times))

    def kernel_seconds(self, module: Any, case: Case, folder: Path) -> tuple[float, float]:
        """The time of a module's only kernel, likewise, and its largest relative error against torch in float32."""
        [function] = [one for _, one in module.functions_items() if isinstance(one, tvm.tirx.PrimFunc)]
        path = worker.built(tvm.IRModule({"main": function}), self.target.tvm(), str(folder / f"{time.time_ns()}.so"))
        library = tvm.runtime.load_module(path)
        given = self.tensors(case)
        expected = case.torch(*(one.float().cpu() for one in given))
        result = torch.zeros(expected.shape, dtype=self.dtype, device=self.name)
        self._wait()
        arguments = [tvm.runtime.from_dlpack(one) for one in (*given, result)]
        library["main"](*arguments)
        self.place.sync()
        error = float((result.float().cpu() - expected).abs().max() / expected.abs().max())
        timer = library.time_evaluator("main", self.place, number=_CALLS, repeat=_ROUNDS)
        return float(statistics.median(timer(*arguments).results)), error

    def _wait(self) -> None:
        if self.cuda:
            torch.cuda.synchronize()


def check(
    device: Device, case: Case, spaces: dict[str, str], seconds: float, out: Path, workers: int
) -> dict[str, Any]:
    """The row of a case: times in seconds, errors, trials."""
    tensors = device.tensors(case)
    row: dict[str, Any] = {"torch": device.torch_seconds(lambda: case.torch(*tensors))}
    fused = case.module(str(device.dtype).removeprefix("torch."), device.target)
    [kernel] = kernels.kernels(fused)
    row["flops"] = kernel.flops
    with tempfile.TemporaryDirectory() as folder:
        try:
            row["default"] = device.kernel_seconds(compiling.scheduled(fused, device.target), case, Path(folder))
        except Exception as error:  # the row says so, the next kernel is tried
            row["default"] = f"{type(error).__name__}: {str(error).splitlines()[-1][:200]}"
        for space, rules in spaces.items():
            database = tuning.Database(out / "records" / space)
            try:
                budget = tuning.Budget(max(seconds, 8.0), True)
                done = tuning.tune(fused, device.target, budget, database, workers=workers, space=rules)
                [task] = done.tasks
                row[f"{space} trials"], row[f"{space} wall"] = task.trials + task.before, done.wall
                row[f"{space} failed"] = failures(database, kernel, device.target)
                applied = tuning.apply(fused, database, device.target)
                if applied.missing:
                    raise RuntimeError(str(applied.missing))
                row[space] = device.kernel_seconds(applied.module, case, Path(folder))
            except Exception as error:  # likewise
                traceback.print_exc()
                row[space] = f"{type(error).__name__}: {(str(error).splitlines() or [''])[-1][:200]}"
    return row


def failures(database: tuning.Database, kernel: kernels.Kernel, target: Target) -> dict[str, int]:
    """Reasons of candidates that could not be measured, and how often."""
    found: dict[str, int] = {}
    for record in database.read(kernel, target, 1).records:
        if record.error:
            found[record.error[:100]] = found.get(record.error[:100], 0) + 1
    return found


def table(rows: dict[str, dict[str, Any]], spaces: list[str], title: str) -> str:
    """The rows in Markdown; a ratio is over torch's time, below 1 is faster."""
    names = ["default", *spaces]
    said = [
        title,
        "",
        "| kernel | torch us | TFLOP/s | " + " | ".join(f"{one} / torch (error)" for one in names) + " | trials |",
    ]
    said.append("| --- | ---: | ---: |" + " ---: |" * (len(names) + 1))
    for name, row in rows.items():
        cells = []
        for one in names:
            value: Any = row.get(one)
            is_time = isinstance(value, (tuple, list))
            cells.append(f"{value[0] / row['torch']:.2f} ({value[1]:.0e})" if is_time else str(value)[:60])
        trials = " + ".join(str(row.get(f"{one} trials", "?")) for one in spaces)
        rate = row["flops"] / row["torch"] / 1e12
        said.append(f"| {name} | {row['torch'] * 1e6:.1f} | {rate:.1f} | " + " | ".join(cells) + f" | {trials} |")
    return "\n".join([*said, ""])


def main() -> None:
    """Tune, time, write."""
    parser = argparse.ArgumentParser()
    parser.add_argument("out", type=Path)
    parser.add_argument("--minutes", type=float, default=6.0)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--only", default="")
    parser.add_argument("--workers", type=int, default=max(1, (os.cpu_count() or 2) - 2))
    given = parser.parse_args()
    device = Device(given.device)
    chosen = {key: case for key, case in cases(given.small).items() if not given.only or key in given.only.split(",")}
    spaces = {one: one for one in ("cuda-tensorcore", "cuda")} if device.cuda else {"llvm": "llvm"}
    name = torch.cuda.get_device_name() if device.cuda else "CPU"
    title = f"{name}, {device.target}, {device.dtype}, TVM {tvm.__version__}, torch {torch.__version__}"
    given.out.mkdir(parents=True, exist_ok=True)
    rows: dict[str, dict[str, Any]] = {}
    end = time.monotonic() + given.minutes * 60
    for index, (key, case) in enumerate(chosen.items()):
        share = (end - time.monotonic()) / (len(chosen) - index) / len(spaces)
        print(f"{key}: {share:.0f} s for each space", flush=True)
        try:
            rows[key] = check(device, case, spaces, share, given.out, given.workers)
        except Exception:  # one kernel less
            traceback.print_exc()
            continue
        (given.out / "table.json").write_text(json.dumps({"title": title, "rows": rows}, indent=1))
        (given.out / "table.md").write_text(table(rows, list(spaces), title))
        print(table({key: rows[key]}, list(spaces), title), flush=True)


if __name__ == "__main__":
    main()
