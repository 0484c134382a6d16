"""How much of the machine a model uses: each node's time held against what the machine could do."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from burnish.tools import terminal
from burnish.tools.subject import parse_counts

if TYPE_CHECKING:
    import numpy as np
    import onnx_ir as oir

    from burnish.backends.ort.replaced import Share
    from burnish.ir.cost import Cost
    from burnish.ir.roofline import Machine
    from burnish.tools.subject import Subject

_SHORTEST = 1e-8
"""Seconds; no node takes less, whatever a clock says."""


def report(subject: Subject, batch: str | None = None) -> dict[str, Any]:
    """What ONNX Runtime takes for each node on the CPU, its share of the roofline, and the utilization of each batch.

    Utilization is 2 * multiply-adds of one run / (its latency * peak), the multiply-adds counted on the model as it is
    in the file. An operation is a multiply or an add or a step on a single element; a multiply-add is two.

    Args:
        subject: the model; it is run with its first sample.
        batch: batch sizes, `1,4,16`; as the sample is when None.

    Raises:
        InputError: the batch sizes cannot be read, or the model takes no sample or none of them.
        MissingPackageError: ONNX Runtime is not installed.
    """
    from burnish.backends.ort import machine, replaced
    from burnish.backends.ort.session import executor
    from burnish.frontends import batch as batches
    from burnish.tools import advice

    disturbed = machine.disturbance(subject.threads)
    counts = None if batch is None else parse_counts(batch, "--batch", "batch sizes")
    axes = {} if counts is None else batches.batch_axes(subject.model)
    _check_free(subject, axes)
    runner = executor(threads=subject.threads)(subject.model)
    sample = subject.sample(runner)
    sets: dict[int | None, dict[str, np.ndarray]] = {None: sample.feeds}
    if counts is not None:
        sets = {count: batches.with_rows(sample.feeds, axes, count) for count in counts}
    _try(runner, sets)
    runner.close()
    copy, names = replaced.labelled(subject.model)
    measured = []
    for number, (count, feeds) in enumerate(sets.items()):
        subject.on_step("run" if count is None else f"run batch {count}", number, len(sets) + 2)
        measured.append(_Measured(subject, copy, count, feeds))
    subject.on_step("measure the machine", len(sets), len(sets) + 2)
    ceilings = machine.measure([one for each in measured for one in each.dtypes()], threads=subject.threads)
    subject.on_step("try the passes", len(sets) + 1, len(sets) + 2)
    runs = [one.described(ceilings, names) for one in measured]
    first = measured[0]
    return {
        "sample": sample.name,
        "provider": "CPUExecutionProvider",
        "threads": subject.threads,
        "machine": {
            "peak_operations_per_second": dict(ceilings.flops),
            "bandwidth_bytes_per_second": ceilings.bandwidth,
            "empty_node_seconds": ceilings.call,
            "profiler_seconds_per_empty_node": ceilings.probe,
        },
        "disturbed": disturbed,
        "batches": runs,
        "advice": [
            one | {"text": replaced.restored(one["text"], names)}
            for one in advice.advise(subject, copy, first.feeds, {s.nodes: s.seconds for s in first.shares})
        ],
        "listed": subject.top,
    }


def _check_free(subject: Subject, axes: Mapping[str, int]) -> None:
    """Refuse numbers in `--dims` for what `--batch` varies."""
    from burnish.ir.errors import InputError

    for value in subject.model.graph.inputs:
        axis = axes.get(str(value.name))
        if axis is None or value.shape is None:
            continue
        size = value.shape[axis]
        for name in (f"{value.name}.{axis}", None if isinstance(size, int) else size.value):
            if name in subject.numbers:
                raise InputError(f"`{name}` is the batch, which `--batch` varies", place="--dims", hint="leave it out")


def _try(runner: Any, sets: Mapping[int | None, dict[str, np.ndarray]]) -> None:
    """Run every batch once before anything is measured."""
    from burnish.ir.errors import InputError

    for count, feeds in sets.items():
        try:
            runner.run(feeds)
        except InputError as error:
            cause = f"the model takes no batch of {count}: {error.cause.splitlines()[0]}"
            raise InputError(cause, place=error.place, hint="its graph may have the batch built in") from error


class _Measured:
    """A profile of one batch, with what its kernels did the work of."""

    def __init__(self, subject: Subject, copy: oir.Model, count: int | None, feeds: dict[str, np.ndarray]) -> None:
        from burnish.backends.ort import profiling, replaced
        from burnish.ir import concrete, cost
        from burnish.ir.group_cost import group_cost

        self.count, self.feeds = count, feeds
        self.profile = profiling.profile(copy, feeds, threads=subject.threads)
        self.shares, self.idle = replaced.shares(copy.graph, self.profile.graph, self.profile.kernels)
        numbers = cost.dims_of(subject.model, feeds)
        sized = concrete.concrete(copy, numbers)
        if replaced.add_shapes(sized.graph, self.profile.kernels):
            sized = concrete.concrete(sized, numbers)
        nodes = {node.name: node for node in sized.graph}
        twins = [[nodes[node.name] for node in share.nodes] for share in self.shares]
        self.costs: list[Cost] = [group_cost(some, numbers) if some else cost.Cost() for some in twins]
        self.heads = [
            max(some, key=lambda node: cost.node_cost(node, numbers).macs or 0, default=None) for some in twins
        ]
        self.before = cost.total(cost.node_cost(nodes[node.name], numbers) for node in self.idle)
        self.unknown = list(dict.fromkeys(reason for one in (*self.costs, self.before) for reason in one.unknown))

    def dtypes(self) -> list[str]:
        """What is multiplied, the most multiplied first."""
        found: dict[str, int] = {}
        for share, cost in zip(self.shares, self.costs, strict=True):
            found[share.dtype] = found.get(share.dtype, 0) + (cost.macs or 0)
        return [name for name in sorted(found, key=lambda name: -found[name]) if found[name]]

    def described(self, machine: Machine, names: Mapping[str, str]) -> dict[str, Any]:
        """The batch in the document; nodes by falling time."""
        from burnish.backends.ort import replaced
        from burnish.ir.cost import total

        whole = total((*self.costs, self.before))
        latency = self.profile.plain
        probe = _probe(self.shares, latency, machine)
        machine = replace(machine, probe=probe)
        rows = [_row(*parts, machine, names) for parts in zip(self.shares, self.costs, self.heads, strict=True)]
        taken = sum(row["seconds"] for row in rows)
        for row in rows:
            row["share_of_time"] = row["seconds"] / taken if taken else 0.0
        at_peak = [
            2 * (cost.macs or 0) / machine.flops[share.dtype]
            for share, cost in zip(self.shares, self.costs, strict=True)
            if cost.macs and share.dtype in machine.flops
        ]
        complete = whole.macs is not None and len(at_peak) == sum(bool(cost.macs) for cost in self.costs)
        return {
            "batch": self.count,
            "shapes": {name: list(array.shape) for name, array in self.feeds.items()},
            "latency_seconds": latency,
            "runs_per_second": 1 / latency,
            "rows_per_second": None if self.count is None else self.count / latency,
            "multiply_adds": whole.macs,
            "multiply_adds_before_the_run": self.before.macs,
            "utilization": sum(at_peak) / latency if complete and at_peak else None,
            "nodes_seconds": taken,
            "nodes_share_of_latency": taken / latency,
            "nodes_seconds_as_profiled": sum(share.seconds for share in self.shares),
            "profiled_latency_seconds": self.profile.run,
            "profiled_runs": self.profile.runs,
            "profiler_seconds_per_node": probe,
            "nodes": sorted(rows, key=lambda row: -row["seconds"]),
            "nodes_not_run": [names[node.name or ""] for node in self.idle],
            "unknown": [replaced.restored(reason, names) for reason in self.unknown],
        }


def _probe(shares: Sequence[Share], latency: float, machine: Machine) -> float:
    """Seconds that the profiler adds to a node: to an empty one, or more.

    Kernels run one after another: what they take together beyond the latency is the profiler's as well.
    """

    def together(probe: float) -> float:
        return sum(_seconds(share, probe, machine) for share in shares)

    low, high = machine.probe, max((share.seconds for share in shares), default=0.0)
    if together(low) <= latency:
        return low
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (low, middle) if together(middle) <= latency else (middle, high)
    return high


def _seconds(share: Share, probe: float, machine: Machine) -> float:
    return max(share.seconds - probe * share.events, machine.call, _SHORTEST)


def _row(share: Share, cost: Cost, head: oir.Node | None, machine: Machine, names: Mapping[str, str]) -> dict[str, Any]:
    """One row of the document; it goes by the name of the node with the most multiply-adds, None when there is none."""
    from burnish.ir.cost import operator_name
    from burnish.ir.roofline import judge

    seconds = _seconds(share, machine.probe, machine)
    kernels = [operator_name(kernel.node) for kernel in share.kernels]
    row: dict[str, Any] = {
        "node": None if head is None else names[head.name or ""],
        "kernels": kernels,
        "replaces": [{"node": names[node.name or ""], "operator": operator_name(node)} for node in share.nodes],
        "element_type": share.dtype,
        "seconds": seconds,
        "share_of_time": 0.0,
        "multiply_adds": cost.macs,
        "element_operations": cost.operations,
        "bytes_read": cost.bytes_read,
        "bytes_written": cost.bytes_written,
        "operations_per_second": None,
        "operations_per_byte": None,
        "share_of_ceiling": None,
        "share_of_peak": None,
        "limit": "inserted" if not share.nodes else "unknown",
    }
    if None in (cost.macs, cost.operations, cost.bytes_read, cost.bytes_written) or not share.nodes:
        return row
    operations = 2 * (cost.macs or 0) + (cost.operations or 0)
    moved = (cost.bytes_read or 0) + (cost.bytes_written or 0)
    verdict = judge(operations, moved, seconds, share.dtype, machine)
    peak = machine.flops.get(share.dtype)
    return row | {
        "operations_per_second": operations / seconds,
        "operations_per_byte": operations / moved if moved else None,
        "share_of_ceiling": verdict.share,
        "share_of_peak": operations / seconds / peak if peak else None,
        "limit": verdict.limit,
    }


def show(found: dict[str, Any]) -> None:
    """Print the report as tables."""
    out = terminal.out()
    machine = found["machine"]
    peaks = [
        f"{terminal.quantity(number)}op/s in {name}" for name, number in machine["peak_operations_per_second"].items()
    ]
    threads = terminal.count(found["threads"], "thread")
    out.print(f"{'machine':20}ONNX Runtime on the CPU, {threads}; peak {', '.join(peaks) or 'unknown'}; ", end="")
    out.print(f"copies {terminal.quantity(machine['bandwidth_bytes_per_second'])}B/s")
    first = found["batches"][0]
    out.print(f"{'shapes':20}{terminal.shapes(first['shapes'])}")
    rows = [
        (
            "as given" if one["batch"] is None else str(one["batch"]),
            _ms(one["latency_seconds"]),
            terminal.quantity(one["rows_per_second"] or one["runs_per_second"]),
            terminal.quantity(one["multiply_adds"]),
            _percent(one["utilization"]),
            _percent(one["nodes_share_of_latency"]),
            _percent(one["profiled_latency_seconds"] / one["latency_seconds"] - 1),
        )
        for one in found["batches"]
    ]
    columns = [">batch", ">latency ms", ">rows/s" if first["batch"] else ">runs/s", ">multiply-adds", ">utilization"]
    terminal.show(terminal.table("Batches", [*columns, ">nodes/latency", ">profiling adds"], rows), out)
    _show_nodes(first, found["listed"], out)
    limits: dict[str, list[float]] = {}
    for row in first["nodes"]:
        limits.setdefault(row["limit"], []).append(row["share_of_time"])
    parts = [
        (name, str(len(limits[name])), _percent(sum(limits[name])), text)
        for name, text in _limits().items()
        if name in limits
    ]
    terminal.show(terminal.table("What limits", ["limit", ">nodes", ">time", "meaning"], parts), out)
    out.print("\nAdvice")
    for one in found["advice"]:
        out.print(f"- {one['text']}")
    terminal.unknown(first["unknown"])
    if found["disturbed"]:
        terminal.talk().print(f"disturbed: {found['disturbed']}")


def _show_nodes(run: dict[str, Any], top: int, out: Any) -> None:
    rows = [
        (
            terminal.short(row["node"] or "(inserted)", longest=48),
            "+".join(row["kernels"]) if len(row["kernels"]) < 4 else terminal.count(len(row["kernels"]), "kernel"),
            terminal.short("+".join(one["operator"] for one in row["replaces"]), longest=40),
            _ms(row["seconds"]),
            _percent(row["share_of_time"]),
            terminal.quantity(row["multiply_adds"]),
            "?" if row["bytes_read"] is None else terminal.size(row["bytes_read"] + row["bytes_written"]),
            terminal.quantity(row["operations_per_byte"]) if row["operations_per_byte"] is not None else "",
            _percent(row["share_of_ceiling"]) if row["share_of_ceiling"] is not None else "",
            row["limit"],
        )
        for row in run["nodes"][:top]
    ]
    columns = ["node", "kernel", "does the work of", ">ms", ">time", ">multiply-adds", ">bytes", ">op/B", ">of ceiling"]
    batch = "" if run["batch"] is None else f" at batch {run['batch']}"
    terminal.show(terminal.table(f"Slowest nodes{batch}", [*columns, "limit"], rows), out)


def _limits() -> dict[str, str]:
    from burnish.ir.roofline import LIMITS

    own = {"inserted": "put in by ONNX Runtime, to change a layout or type", "unknown": "a size is not known"}
    return {**{str(name): text for name, text in LIMITS.items()}, **own}


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:.3f}" if seconds < 0.01 else f"{seconds * 1e3:.1f}"


def _percent(share: float | None) -> str:
    return "?" if share is None else f"{100 * share:.0f} %" if abs(share) >= 0.0995 else f"{100 * share:.1f} %"


def plot(found: dict[str, Any]) -> Any:
    """The roofline with every node of the first batch on it."""
    from burnish.tools import roofline_plot

    return roofline_plot.draw(found)
