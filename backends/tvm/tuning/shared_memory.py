"""How much shared memory a scheduled kernel of a GPU takes, and which part of it the launch has to ask for."""

from __future__ import annotations

from typing import Any

import tvm
from tvm.s_tir import transform

GIVEN = 49152
"""Bytes of static shared memory that a block has at most: the scope `shared`. More is had as `shared.dyn` alone."""


def bytes_of(module: Any) -> dict[str, int]:
    """Bytes of a block in the scopes `shared` and `shared.dyn`, as far as sizes are numbers.

    Args:
        module: with the function `main`.
    """
    passes = [
        transform.LowerCrossThreadReduction(),
        transform.LowerInitBlock(),
        transform.PlanAndUpdateBufferAllocationLocation(),
        transform.ConvertBlocksToOpaque(),
        transform.CompactBufferAllocation(),
    ]
    found = {"shared": 0, "shared.dyn": 0}
    waiting = [tvm.transform.Sequential(passes)(module)["main"].body]
    while waiting:
        one = waiting.pop()
        for buffer in getattr(one, "alloc_buffers", ()):
            if buffer.scope() in found and all(isinstance(size, tvm.tirx.IntImm) for size in buffer.shape):
                size = tvm.DataType(str(buffer.dtype)).bits // 8
                for extent in buffer.shape:
                    size *= int(extent)
                found[buffer.scope()] += size
        parts = [getattr(one, name, None) for name in ("body", "block", "then_case", "else_case")]
        waiting += [part for part in (*parts, *getattr(one, "seq", ())) if part is not None]
    return found
