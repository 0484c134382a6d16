"""What a line of a database may hold, and why a line is not believed.

A record holds no code. It holds a trace: the names and arguments of schedule instructions, which TVM replays on a
kernel that was lowered here. Instructions rearrange loops and check that they may; those that do not check (dtypes and
scopes set by hand, buffer accesses hidden) and annotations through which TVM compiles foreign source
(`pragma_import_c`, `pragma_import_llvm`) are refused. What is left to trust: that TVM's own checks are right, and that
seconds which someone else wrote down were measured. Outputs are compared with ONNX Runtime in any case before a
region is accepted.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import msgspec

INSTRUCTIONS = frozenset(
    "AddUnitLoop Annotate Bind Blockize CacheIndex CacheInplace CacheRead CacheWrite ComputeAt ComputeInline "
    "DecomposeReduction EnterPostproc Fuse GetChildBlocks GetConsumers GetLoops GetOutputBlocks GetProducers "
    "GetSBlock LoopPartition Merge Parallel ReIndex ReindexCacheRead ReindexCacheWrite Reorder ReorderBlockIterVar "
    "ReverseComputeAt ReverseComputeInline RFactor RollingBuffer SampleCategorical SampleComputeLocation "
    "SamplePartitionedTile SamplePerfectTile SetAxisSeparator Split StorageAlign SetScope Tensorize TransformLayout "
    "Unannotate Unroll Vectorize".split()
)
ANNOTATIONS = (
    "meta_schedule.",
    "software_pipeline_",
    "warp_execution",
    "pragma_auto_unroll_max_step",
    "pragma_unroll_explicit",
)
SCOPES = ("global", "local", "shared", "shared.dyn", "wmma.matrix_a", "wmma.matrix_b", "wmma.accumulator")
LONGEST = 1 << 20
"""Bytes of a line that is read at all; a trace takes some thousand."""


class Heading(msgspec.Struct, forbid_unknown_fields=True):
    """The first line of a file: what its records are about.

    Attributes:
        format: of this file, 1.
        kernel: its structural hash.
        signature: dtypes and sizes of its arguments.
        target: with the number of threads, `llvm:znver4 threads=2`.
        versions: of the packages that wrote it, by name.
        name: of the function that was tuned first; for people.
    """

    format: int
    kernel: str
    signature: str
    target: str
    versions: dict[str, str]
    name: str


class Record(msgspec.Struct, forbid_unknown_fields=True):
    """A line: one candidate that was tried, or the end of a search.

    Attributes:
        spent: seconds that the search for this candidate, its build and its timing took.
        seconds: that the kernel takes; None when it could not be measured.
        trace: the instructions, as TVM's JSON: instructions, then decisions.
        error: why it could not be measured.
        end: why no further candidate will be found.
    """

    spent: float = 0.0
    seconds: float | None = None
    trace: list[Any] | None = None
    error: str = ""
    end: str = ""


def refusal(record: Record) -> str | None:
    """Why a record is not believed; None when it is."""
    if record.seconds is None:
        return None
    if not 0 < record.seconds < 1e6:
        return f"{record.seconds} is no time"
    trace = record.trace
    if not isinstance(trace, list) or len(trace) != 2 or not all(isinstance(part, list) for part in trace):
        return "its trace is none"
    for instruction in trace[0]:
        if not isinstance(instruction, list) or len(instruction) != 4 or instruction[0] not in INSTRUCTIONS:
            name = instruction[0] if isinstance(instruction, list) and instruction else instruction
            return f"the instruction `{str(name)[:40]}` is not allowed"
        kind, _, attributes, _ = instruction
        if kind in ("Annotate", "Unannotate") and not _named(attributes, ANNOTATIONS):
            return f"the annotation `{str(attributes)[:60]}` is not allowed"
        if kind == "SetScope" and not _scoped(attributes):
            return f"the scope `{str(attributes)[:60]}` is not allowed"
    return None


def _named(attributes: Any, prefixes: Iterable[str]) -> bool:
    return (
        isinstance(attributes, list)
        and bool(attributes)
        and isinstance(attributes[0], str)
        and attributes[0].startswith(tuple(prefixes))
    )


def _scoped(attributes: Any) -> bool:
    return isinstance(attributes, list) and all(one in SCOPES for one in attributes if isinstance(one, str))
