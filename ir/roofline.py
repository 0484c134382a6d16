"""The roofline model: how fast a node could run on a machine, and what keeps it from running faster.

A node that does F operations on B bytes takes at least max(F / peak, B / bandwidth) seconds; its ceiling is
min(peak, F / B * bandwidth) operations a second (Williams, Waterman and Patterson, Roofline: an insightful visual
performance model for multicore architectures, 2009). A multiply-add counts as two operations.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

Limit = Literal["compute", "memory", "overhead", "kernel"]

LIMITS: dict[Limit, str] = {
    "compute": "near the peak of multiplying matrices",
    "memory": "near the speed at which memory is copied",
    "overhead": "so little work that calling the kernel takes most of the time",
    "kernel": "far from both ceilings: the kernel's own doing",
}

_NEAR = 1 / 3
"""A node that reaches this share of its ceiling is said to be limited by it."""

_CALLS = 10
"""A node far from its ceiling is limited by overhead up to this many times what an empty node takes."""


@dataclass(frozen=True)
class Machine:
    """What a machine reached in measurements.

    Attributes:
        flops: the most floating-point (or integer) operations a second, by the element type that is multiplied.
        bandwidth: the most bytes a second, read and written together, for tensors larger than the caches.
        call: seconds that a node takes which does next to nothing.
        probe: seconds that the profiler adds to what it says a node takes.
    """

    flops: Mapping[str, float]
    bandwidth: float
    call: float
    probe: float


@dataclass(frozen=True)
class Verdict:
    """How a node stands to its ceiling.

    Attributes:
        ideal: seconds that the node would take at its ceiling.
        share: that over what it took; above 1 when its tensors stay in the caches, or when the kernel multiplies less
            than the definition says (Winograd).
        limit: what keeps it from running faster.
    """

    ideal: float
    share: float
    limit: Limit


def judge(flops: int, moved: int, seconds: float, dtype: str, machine: Machine) -> Verdict:
    """Hold a node against the roofline.

    Args:
        flops: operations, a multiply-add being two.
        moved: bytes read and written.
        seconds: what it took.
        dtype: what is multiplied; without a peak for it only the memory limits.
        machine: the ceilings.
    """
    compute = flops / machine.flops[dtype] if dtype in machine.flops else 0.0
    memory = moved / machine.bandwidth
    ideal = max(compute, memory)
    share = ideal / seconds if seconds > 0 else 0.0
    if share < _NEAR:
        return Verdict(ideal, share, "overhead" if seconds < _CALLS * machine.call else "kernel")
    return Verdict(ideal, share, "compute" if compute >= memory else "memory")
