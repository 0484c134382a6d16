"""What this machine reaches in ONNX Runtime: the ceilings that a model's nodes are held against."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import numpy as np
import onnx_ir as oir

from burnish.backends.ort.profiling import profile
from burnish.backends.ort.session import executor
from burnish.ir.errors import InputError
from burnish.ir.roofline import Machine

_SIDES = (512, 1024)
_EMPTY_NODES = 200
_SMALLEST_COPY, _LARGEST_COPY = 64 << 20, 256 << 20


def measure(dtypes: Iterable[str], *, threads: int = 1, seconds: float = 0.4) -> Machine:
    """Measure the ceilings on the CPU: the best of several rounds of each.

    The peak of an element type is that of multiplying two square matrices, the second of them constant, as weights are:
    MatMul for floating point, MatMulInteger for 8-bit integers. Bandwidth is that of `Neg` on a tensor larger than the
    caches, its bytes counted once for reading and once for writing. An empty node is one of a chain of `Neg` on one
    number; what it takes more in a profile is the profiler's.

    Args:
        dtypes: element types by their NumPy names; those whose product the runtime lacks get no peak.
        threads: threads inside an operator.
        seconds: time for each measurement, about.
    """
    flops: dict[str, float] = {}
    for dtype in dict.fromkeys(dtypes):
        if dtype not in _PRODUCTS:
            continue
        try:
            flops[dtype] = max(
                2 * side**3 / _best(product(side, dtype), seconds / 2, threads=threads) for side in _SIDES
            )
        except InputError:  # the runtime has no such kernel
            continue
    size = min(max(2 * last_cache(), _SMALLEST_COPY), _LARGEST_COPY) // 4
    moved = _best(_chain(1, size), seconds, threads=threads)
    chain = _best(_chain(_EMPTY_NODES, 1), seconds / 2, threads=threads)
    alone = _best(_chain(1, 1), seconds / 4, threads=threads)
    call = max(chain - alone, 0.0) / (_EMPTY_NODES - 1)
    watched = profile(*_chain(_EMPTY_NODES, 1), threads=threads, seconds=seconds / 2)
    return Machine(flops, 8 * size / moved, call, max(watched.total / _EMPTY_NODES - call, 0.0))


def disturbance(threads: int) -> str:
    """What else runs on the machine, where that leaves too little for so many threads; empty if all is well."""
    if not hasattr(os, "getloadavg"):
        return ""
    load, processors = os.getloadavg()[0], os.cpu_count() or 1
    if load <= max(processors - threads, 1) + 0.5:
        return ""
    return f"other work runs here (load {load:.1f} on {processors} processors), which makes all times longer"


def _best(model: tuple[oir.Model, Mapping[str, np.ndarray]], seconds: float, *, threads: int) -> float:
    """Seconds of the fastest run, with inputs and outputs in place: nothing is copied in or out."""
    graph, feeds = model
    runner = executor(threads=threads)(graph)
    found = _fastest(runner.bound(feeds), seconds)
    runner.close()
    return found


def _fastest(action: Callable[[], object], seconds: float) -> float:
    best, end = float("inf"), time.perf_counter() + seconds
    rounds = 0
    while rounds < 5 or time.perf_counter() < end:
        start = time.perf_counter()
        action()
        best = min(best, time.perf_counter() - start)
        rounds += 1
    return best


_PRODUCTS = {
    "float32": ("MatMul", np.float32, np.float32, oir.DataType.FLOAT),
    "float64": ("MatMul", np.float64, np.float64, oir.DataType.DOUBLE),
    "float16": ("MatMul", np.float16, np.float16, oir.DataType.FLOAT16),
    "uint8": ("MatMulInteger", np.uint8, np.int8, oir.DataType.INT32),
    "int8": ("MatMulInteger", np.int8, np.int8, oir.DataType.INT32),
}


def product(side: int, dtype: str) -> tuple[oir.Model, Mapping[str, np.ndarray]]:
    """The product of two square matrices, the second constant: a model, and the first matrix by the input's name."""
    operator, left, right, result = _PRODUCTS[dtype]
    rng = np.random.default_rng(0)
    drawn = rng.integers(-4, 5, (2, side, side))
    first = (drawn[0] + 4 if dtype == "uint8" else drawn[0]).astype(left)
    x = _value("x", oir.DataType.from_numpy(np.dtype(left)), (side, side))
    y = _value("y", result, (side, side))
    weight = oir.Value(name="w", const_value=oir.Tensor(drawn[1].astype(right), name="w"))
    node = oir.Node("", operator, [x, weight], outputs=[y])
    return _model([x], [y], [node], [weight]), {"x": first}


def _chain(length: int, size: int) -> tuple[oir.Model, Mapping[str, np.ndarray]]:
    """`length` times Neg on `size` numbers."""
    values = [_value(f"v{index}", oir.DataType.FLOAT, (size,)) for index in range(length + 1)]
    nodes = [
        oir.Node("", "Neg", [values[index]], outputs=[values[index + 1]], name=f"n{index}") for index in range(length)
    ]
    return _model(values[:1], values[-1:], nodes, []), {"v0": np.ones(size, np.float32)}


def _value(name: str, dtype: oir.DataType, shape: tuple[int, ...]) -> oir.Value:
    return oir.Value(name=name, type=oir.TensorType(dtype), shape=oir.Shape(shape))


def _model(
    inputs: list[oir.Value], outputs: list[oir.Value], nodes: list[oir.Node], weights: list[oir.Value]
) -> oir.Model:
    graph = oir.Graph(inputs, outputs, nodes=nodes, initializers=weights, opset_imports={"": 17}, name="machine")
    return oir.Model(graph, ir_version=8)


def last_cache() -> int:
    """Bytes of the largest cache; 0 where the system does not say."""
    found = 0
    for file in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        text = file.read_text().strip()
        scale = {"K": 1 << 10, "M": 1 << 20}.get(text[-1:], 1)
        if text.rstrip("KM").isdecimal():
            found = max(found, int(text.rstrip("KM")) * scale)
    return found
