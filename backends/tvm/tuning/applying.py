"""Schedules from a database, put into a module."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from burnish.backends.tvm import compiling, intrinsics
from burnish.backends.tvm.reasons import last_line
from burnish.backends.tvm.target import Target
from burnish.backends.tvm.tuning.database import Database
from burnish.backends.tvm.tuning.kernels import Kernel, kernels
from burnish.backends.tvm.tuning.records import Record

DYNAMIC = "its sizes are known only when it runs"


@dataclass(frozen=True)
class Applied:
    """A module with the best schedules.

    Attributes:
        module: kernels that have a record are scheduled, the others as they were.
        seconds: that each scheduled function took when it was tuned, by its name.
        missing: why each of the others has no schedule, by its name.
        used: kernels and the records that their schedules came from.
        notes: records that were skipped, and why.
        looked_up: SHA-256 of the files of records that were looked up, by name; empty for a file that is not there.
    """

    module: Any
    seconds: dict[str, float]
    missing: dict[str, str]
    used: tuple[tuple[Kernel, Record], ...]
    notes: tuple[str, ...]
    looked_up: dict[str, str]


def apply(module: Any, database: Database, target: Target, *, threads: int = 1) -> Applied:
    """The module with the fastest recorded schedule of each kernel.

    Args:
        module: from `compiling.fused`.
        database: where schedules are looked up, by the kernel's structure, the target, the threads and TVM's versions.
        target: what the module is compiled for.
        threads: that kernels will run on.
    """
    seconds: dict[str, float] = {}
    missing: dict[str, str] = {}
    used: list[tuple[Kernel, Record]] = []
    notes: list[str] = []
    looked_up: dict[str, str] = {}
    scheduled: dict[str, Any] = {}
    for kernel in kernels(module):
        if kernel.arguments is None:
            missing |= dict.fromkeys(kernel.names, DYNAMIC)
            continue
        found = database.read(kernel, target, threads)
        looked_up[database.file(kernel, target, threads).name] = found.digest
        notes += found.notes
        best = _first(kernel, found.best(), notes)
        if best is None:
            missing |= dict.fromkeys(kernel.names, found.end or "there is no record of it")
            continue
        function, record = best
        used.append((kernel, record))
        for name in kernel.names:
            scheduled[name], seconds[name] = function, record.seconds or 0.0
    changed = compiling.copied(module)
    for variable, function in module.functions_items():
        if variable.name_hint in scheduled:
            kept = function.attrs["op_pattern"] if function.attrs and "op_pattern" in function.attrs else None
            made = scheduled[variable.name_hint].with_attr("tirx.is_scheduled", True)
            changed.update_func(variable, made if kept is None else made.with_attr("op_pattern", kept))
    return Applied(changed, seconds, missing, tuple(used), tuple(notes), looked_up)


def replayed(kernel: Kernel, record: Record) -> Any:
    """The schedule that a record describes, of the kernel that was lowered here.

    Raises:
        ValueError: it cannot be carried out on this kernel.
    """
    from tvm.s_tir import Schedule
    from tvm.s_tir.schedule import Trace

    assert record.trace is not None
    if any(instruction[0] == "Tensorize" for instruction in record.trace[0]):
        intrinsics.load()
    schedule = Schedule(kernel.module)
    try:
        Trace.apply_json_to_schedule(record.trace, schedule)
    except Exception as error:  # TVM's errors have many types
        raise ValueError(last_line(error, 200)) from None
    return schedule


def _first(kernel: Kernel, records: list[Record], notes: list[str]) -> tuple[Any, Record] | None:
    for record in records[:5]:
        try:
            return replayed(kernel, record).mod["main"], record
        except ValueError as reason:
            notes.append(f"{kernel.name}: a record is skipped, it cannot be replayed: {reason}")
    return None
