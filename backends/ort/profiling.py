"""ONNX Runtime's own profile of a model: what each kernel takes, and the graph that the kernels belong to."""

from __future__ import annotations

import json
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as oir

from burnish.backends.ort.session import OrtRunner, executor
from burnish.ir.errors import InputError

_CONTROL_FLOW = ("If", "Loop", "Scan", "SequenceMap")
_MOST_EVENTS = 400_000
"""ONNX Runtime keeps a million events of a profile and drops the rest."""

_RUNS = (8, 400)


@dataclass(frozen=True)
class Kernel:
    """A node of the optimized graph, and what it takes.

    Attributes:
        node: the node, in `Profile.graph`.
        seconds: in one run, with all that happens in its sub-graphs.
        dtype: NumPy's name of the element type of its first input; empty when it has none.
        events: how often the profiler looked at a clock meanwhile: once, and once for each kernel inside of it.
        written: type and shape of each output that is written; empty where the profile does not tell.
    """

    node: oir.Node
    seconds: float
    dtype: str
    events: float
    written: tuple[tuple[oir.DataType, tuple[int, ...]], ...]


@dataclass(frozen=True)
class Profile:
    """What a run of a model takes, kernel by kernel.

    Attributes:
        graph: the main graph as ONNX Runtime optimized it; weights are not to be read from it.
        kernels: its nodes that ran, in order.
        run: seconds of a profiled run, from the profile.
        plain: seconds of a run of the same model without a profile, as a caller sees it.
        runs: how many profiled runs the numbers are from.
    """

    graph: oir.Graph
    kernels: tuple[Kernel, ...]
    run: float
    plain: float
    runs: int

    @property
    def total(self) -> float:
        """Seconds of all kernels."""
        return sum(kernel.seconds for kernel in self.kernels)


def profile(model: oir.Model, feeds: Mapping[str, np.ndarray], *, threads: int = 1, seconds: float = 1.5) -> Profile:
    """Run a model with and without ONNX Runtime's profiler, in turns; all times are means of the fastest quarter.

    Other work on the machine only ever makes a run slower.

    Args:
        model: the model; every node has a name of its own, the profile knows them by it.
        feeds: its inputs.
        threads: threads inside an operator.
        seconds: how long to run, about; at least a few runs are made.

    Raises:
        InputError: the model cannot be loaded or refuses the inputs.
        MissingPackageError: the runtime is not installed.
    """
    with tempfile.TemporaryDirectory(prefix="burnish-") as name:
        folder = Path(name)
        traced = executor(threads=threads, trace=folder)(model)
        plain = executor(threads=threads)(model)
        optimized = oir.load(folder / "optimized.onnx")
        times = _run_in_turns(traced, plain, feeds, seconds, len(optimized.graph))
        assert traced.session is not None
        events = json.loads(Path(traced.session.end_profiling()).read_text())
        traced.close()
        plain.close()
    runs = _runs(events)[1:]  # the first one warms up
    if not runs:
        raise InputError("ONNX Runtime's profile holds no runs")
    chosen = sorted(runs, key=lambda run: run.seconds)[: -(-len(runs) // 4)]
    seen: dict[_Key, list[_Event]] = defaultdict(list)
    for run in chosen:
        for event in run.kernels:
            seen[event.key].append(event)
    kernels = tuple(
        Kernel(
            node,
            sum(event.seconds for event in seen[key]) / len(chosen),
            seen[key][0].dtype,
            sum(event.count for event in seen[key]) / len(chosen),
            seen[key][0].written,
        )
        for node, key in _keys(optimized.graph, seen)
    )
    fastest = sorted(times)[: -(-len(times) // 4)]
    run_time = sum(run.seconds for run in chosen) / len(chosen)
    return Profile(optimized.graph, kernels, run_time, sum(fastest) / len(fastest), len(chosen))


def _run_in_turns(
    traced: OrtRunner, plain: OrtRunner, feeds: Mapping[str, np.ndarray], seconds: float, nodes: int
) -> list[float]:
    """Seconds of the plain runs, after a warm-up of both."""
    plain.run(feeds)
    traced.run(feeds)
    fewest, most = _RUNS
    most = min(most, max(fewest, _MOST_EVENTS // max(nodes, 1)))
    times: list[float] = []
    end = time.perf_counter() + seconds
    while len(times) < fewest or (len(times) < most and time.perf_counter() < end):
        start = time.perf_counter()
        plain.run(feeds)
        times.append(time.perf_counter() - start)
        traced.run(feeds)
    return times


_Key = tuple[str, str, int]
"""The name, operator and index of a node; one without a name goes by operator and index in the profile."""


@dataclass
class _Event:
    key: _Key
    seconds: float
    dtype: str
    written: tuple[tuple[oir.DataType, tuple[int, ...]], ...]
    count: int = 1


@dataclass(frozen=True)
class _Run:
    seconds: float
    kernels: list[_Event]


def _runs(events: list[dict[str, Any]]) -> list[_Run]:
    """The runs of a profile; what sub-graphs do is within the kernels that hold them."""
    ends = [one for one in events if one["cat"] == "Session" and one["name"] == "model_run"]
    nodes = [one for one in events if one["cat"] == "Node" and one["name"].endswith("_kernel_time")]
    nodes.sort(key=lambda one: (one["ts"], -one["dur"]))
    found, position = [], 0
    for whole in sorted(ends, key=lambda one: one["ts"]):
        end = whole["ts"] + whole["dur"]
        kernels: list[_Event] = []
        outer = -1  # when the control flow ends whose sub-graphs run now
        while position < len(nodes) and nodes[position]["ts"] <= end:
            one = nodes[position]
            position += 1
            if one["ts"] < outer:
                kernels[-1].count += 1
                continue
            if one["args"]["op_name"] in _CONTROL_FLOW:
                outer = one["ts"] + one["dur"]
            kernels.append(_Event(_key(one), one["dur"] * 1e-6, _dtype(one["args"]), _written(one["args"])))
        found.append(_Run(whole["dur"] * 1e-6, kernels))
    return found


def _key(event: Mapping[str, Any]) -> _Key:
    operator, index = event["args"]["op_name"], int(event["args"]["node_index"])
    name = event["name"].removesuffix("_kernel_time")
    return "" if name == f"{operator}_{index}" else name, operator, index


_TYPES = {
    "float": oir.DataType.FLOAT,
    "double": oir.DataType.DOUBLE,
    "float16": oir.DataType.FLOAT16,
    **{name: oir.DataType[name.upper()] for name in "bool int8 uint8 int16 uint16 int32 uint32 int64 uint64".split()},
}


def _dtype(arguments: Mapping[str, Any]) -> str:
    inputs = arguments.get("input_type_shape") or [{}]
    found = _TYPES.get(next(iter(inputs[0]), ""))
    return "" if found is None else str(found.numpy())


def _written(arguments: Mapping[str, Any]) -> tuple[tuple[oir.DataType, tuple[int, ...]], ...]:
    pairs = [pair for one in arguments.get("output_type_shape") or () for pair in one.items()]
    if not all(name in _TYPES for name, _ in pairs):
        return ()
    return tuple((_TYPES[name], tuple(shape)) for name, shape in pairs)


def _keys(graph: oir.Graph, known: Iterable[_Key]) -> list[tuple[oir.Node, _Key]]:
    """The nodes of the optimized graph that ran, each with its key in the profile.

    The file does not hold the indices; where two nodes have one name and operator, they come in the order of theirs.
    """
    indices: dict[tuple[str, str], list[int]] = defaultdict(list)
    for name, operator, index in sorted(known, key=lambda key: key[2], reverse=True):
        indices[name, operator].append(index)
    found = []
    for node in graph:
        left = indices[node.name or "", node.op_type]
        if left:
            found.append((node, (node.name or "", node.op_type, left.pop())))
    return found
