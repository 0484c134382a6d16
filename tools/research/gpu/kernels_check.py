"""Runs libraries of kernels on a GPU: compared with ONNX Runtime's outputs, timed against torch.compile.

    python -m burnish.tools.research.gpu.kernels_check FOLDER [--out table.json] [--device cpu]

FOLDER is what `kernels_prepare` wrote. Needs torch, apache-tvm-ffi, onnx, onnx_ir; neither TVM nor ONNX Runtime.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import tvm_ffi

_ROUNDS = 60


class Bench:
    """Runs and times on one device, on a stream that is not the default one."""

    def __init__(self, device: str, seconds: float) -> None:
        self.until = time.monotonic() + seconds
        self.cuda = device == "cuda"
        self.device = device
        self.stream = torch.cuda.Stream() if self.cuda else None

    def on_stream(self, function: Callable[[], Any]) -> Any:
        """What a function gives, run on the stream; waits for it."""
        if self.stream is None:
            return function()
        with torch.cuda.stream(self.stream):
            found = function()
        self.stream.synchronize()
        return found

    def microseconds(self, function: Callable[[], Any]) -> float:
        """The median time of a call."""
        return float(self.on_stream(lambda: self._median(function)))

    def _median(self, function: Callable[[], Any]) -> float:
        for _ in range(10):
            function()
        if not self.cuda:
            times = []
            for _ in range(_ROUNDS):
                begun = time.perf_counter()
                function()
                times.append((time.perf_counter() - begun) * 1e6)
            return statistics.median(times)
        events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(_ROUNDS)]
        for first, last in events:
            first.record()
            function()
            last.record()
        torch.cuda.synchronize()
        return statistics.median(float(first.elapsed_time(last)) * 1e3 for first, last in events)

    def captured(self, function: Callable[[], Any]) -> Any:
        """The function as a CUDA graph."""
        if not self.cuda:
            return None
        self.on_stream(lambda: [function() for _ in range(3)])
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            function()
        graph.replay()
        torch.cuda.synchronize()
        return graph.replay


def tensors(folder: Path, device: str) -> dict[str, torch.Tensor]:
    """The weights, read from the safetensors file without a package for it."""
    data = (folder / "weights.safetensors").read_bytes()
    length = int.from_bytes(data[:8], "little")
    kinds = {"F32": np.float32, "F16": np.float16, "I64": np.int64, "I32": np.int32, "BOOL": np.bool_, "U8": np.uint8}
    kinds |= {"I8": np.int8, "F64": np.float64}
    found = {}
    for name, one in json.loads(data[8 : 8 + length]).items():
        first, last = (8 + length + at for at in one["data_offsets"])
        array = np.frombuffer(data[first:last], kinds[one["dtype"]]).reshape(one["shape"])
        found[name] = torch.from_numpy(array.copy()).to(device)
    return found


def error(found: np.ndarray, wanted: np.ndarray) -> float:
    """The largest difference, relative to the largest value wanted."""
    if found.shape != wanted.shape:
        raise ValueError(f"shape {found.shape} in place of {wanted.shape}")
    if not wanted.size:
        return 0.0
    difference = np.abs(found.astype(np.float64) - wanted.astype(np.float64)).max()
    return float(difference / max(1e-30, np.abs(wanted).max()))


def worst(got: Sequence[torch.Tensor], wanted: Sequence[np.ndarray]) -> float:
    """The largest error of an output."""
    return max(error(one.float().cpu().numpy(), want) for one, want in zip(got, wanted, strict=True))


def attempt(row: dict[str, Any], name: str, function: Callable[[], Any]) -> Any:
    """What a function gives; a failure is written into the row instead."""
    try:
        return function()
    except Exception as problem:
        traceback.print_exc()
        row.setdefault("failed", {})[name] = f"{type(problem).__name__}: {problem}"[:300]
        return None


def twin(folder: Path, device: str) -> Any:
    """The same model as a torch module."""
    from burnish.backends.fx.builder import to_graph_module
    from burnish.frontends import onnx_file

    return to_graph_module(onnx_file.read(folder / "model.onnx"), fallback=False).to(device).eval()


def library(folder: Path) -> Path:
    """The library, compiled here where only its source came along."""
    found = folder / "model.so"
    if not found.exists():
        major, minor = torch.cuda.get_device_capability()
        include = [f"-I{one}" for one in tvm_ffi.libinfo.include_paths()]
        link = [f"-L{Path(tvm_ffi.libinfo.find_libtvm_ffi()).parent}", "-ltvm_ffi"]
        code = ["-gencode", f"arch=compute_{major}{minor},code=sm_{major}{minor}"]
        command = ["nvcc", "-shared", "-std=c++17", "-O3", "-Xcompiler", "-fPIC", *code, *include]
        subprocess.run([*command, str(folder / "model.cu"), "-o", str(found), *link], check=True)
    return found


def check(folder: Path, bench: Bench) -> list[dict[str, Any]]:
    """One row for each sample of a model."""
    about = json.loads((folder / "about.json").read_text())
    arrays = np.load(folder / "samples.npz")
    weights = tensors(folder / "kernels", bench.device)
    module = tvm_ffi.load_module(str(library(folder / "kernels")))
    given = [tvm_ffi.from_dlpack(weights[f"w{index}"]) for index in range(about["weights"])]
    bound = module.bind(*given)
    blank: dict[str, Any] = {}
    torch_twin = attempt(blank, "twin", lambda: twin(folder, bench.device))
    rows = []
    for number, sample in enumerate(about["samples"]):
        row = {"model": about["name"], "half": about["half"], **sample, **blank}
        given, wanted = (_raw(arrays, f"{sample.get('of', number)}.{kind}.") for kind in ("in", "out"))
        if "repeat" in sample:
            given, wanted = ([np.repeat(one[:1], sample["repeat"], axis=0) for one in part] for part in (given, wanted))
        inputs = [torch.from_numpy(array.copy()).to(bench.device) for array in given]
        _measure(row, bound, torch_twin, inputs, wanted, bench)
        rows.append(row)
        print(json.dumps(row), flush=True)
    return rows


def _measure(
    row: dict[str, Any],
    bound: Any,
    module: Any,
    inputs: Sequence[torch.Tensor],
    wanted: Sequence[np.ndarray],
    bench: Bench,
) -> None:
    got = attempt(row, "kernels", lambda: bench.on_stream(lambda: list(bound(*inputs))))
    if got is not None:
        row["error"] = worst(got, wanted)
        row["kernels_us"] = bench.microseconds(lambda: bound(*inputs))
        replay = attempt(row, "graph", lambda: bench.captured(lambda: bound(*inputs)))
        if replay is not None:
            row["kernels_graph_us"] = bench.microseconds(replay)
    if module is not None and time.monotonic() < bench.until:
        row |= attempt(row, "torch", lambda: _torch(module, inputs, wanted, bench)) or {}


def _torch(module: Any, inputs: Sequence[Any], wanted: Sequence[np.ndarray], bench: Bench) -> dict[str, Any]:
    found: dict[str, Any] = {}
    with torch.no_grad():
        found["torch_error"] = worst(bench.on_stream(lambda: list(module(*inputs))), wanted)
        found["torch_us"] = bench.microseconds(lambda: module(*inputs))
        torch._dynamo.reset()
        compiled = torch.compile(module, dynamic=False)
        begun = time.perf_counter()
        found["compiled_error"] = worst(bench.on_stream(lambda: list(compiled(*inputs))), wanted)
        found["compile_s"] = time.perf_counter() - begun
        found["compiled_us"] = bench.microseconds(lambda: compiled(*inputs))
        replay = attempt(found, "compiled graph", lambda: bench.captured(lambda: compiled(*inputs)))
        if replay is not None:
            found["compiled_graph_us"] = bench.microseconds(replay)
    return found


def _raw(arrays: Any, prefix: str) -> list[np.ndarray]:
    found: list[np.ndarray] = []
    while f"{prefix}{len(found)}" in arrays:
        found.append(arrays[f"{prefix}{len(found)}"])
    return found


def main() -> None:
    """Check every model in a folder and print a table."""
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--only", nargs="*", default=[])
    parser.add_argument("--seconds", type=float, default=420, help="No comparison with torch is begun after these.")
    options = parser.parse_args()
    bench = Bench(options.device, options.seconds)
    rows: list[dict[str, Any]] = []
    for folder in sorted(one.parent for one in options.folder.glob("*/about.json")):
        if options.only and folder.name not in options.only:
            continue
        blank: dict[str, Any] = {"model": folder.name}
        rows += attempt(blank, "model", lambda folder=folder: check(folder, bench)) or [blank]  # type: ignore[misc]
    machine = torch.cuda.get_device_name() if bench.cuda else "CPU"
    found = {
        "machine": machine,
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "date": time.strftime("%F"),
        "rows": rows,
    }
    if options.out:
        options.out.write_text(json.dumps(found, indent=1))
    times = ("kernels_us", "kernels_graph_us", "torch_us", "compiled_us", "compiled_graph_us")
    print(f"{'model':16}{'sample':34}{'error':>9}{'torch':>9}" + "".join(f"{one[:-3]:>16}" for one in times))
    for row in rows:
        line = f"{row['model']:16}{row.get('sample', '')[:33]:34}"
        line += "".join(f"{row[one]:9.1e}" if one in row else f"{'-':>9}" for one in ("error", "torch_error"))
        print(line + "".join(f"{row[one]:16.1f}" if one in row else f"{'-':>16}" for one in times))
        for name, reason in row.get("failed", {}).items():
            print(f"    {name}: {reason}")


if __name__ == "__main__":
    main()
