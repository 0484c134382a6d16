"""Parts of a value along one of its axes, and what is added to them."""

from __future__ import annotations

from dataclasses import dataclass

import onnx_ir as oir

from burnish.ir import match, weights


@dataclass(frozen=True)
class Part:
    """`value` at `start` to `end` of axis `axis`; `added` is what was added to it."""

    value: oir.Value
    axis: int
    start: int
    end: int
    added: oir.Value | None = None


def part_of(value: oir.Value | None) -> Part | None:
    """A Slice or an output of a Split along one axis whose size is known."""
    node = match.producer(value, "Slice", "Split")
    rank = match.rank(node.inputs[0]) if node is not None else None
    if node is None or rank is None or node.inputs[0] is None or value is None:
        return None
    source = node.inputs[0]
    if node.op_type == "Split":
        axis = int(match.attribute(node, "axis", 0)) % rank
        sizes = [match.dim(out, axis) for out in node.outputs]
        if None in sizes:
            return None
        start = sum(int(size or 0) for size in sizes[: value.index()])
        return Part(source, axis, start, start + int(match.dim(value, axis) or 0))
    given = [weights.integers(match.input_of(node, i)) for i in range(1, 5)]
    if len(node.inputs) == 1:
        given = [list(match.attribute(node, name) or ()) or None for name in ("starts", "ends", "axes")] + [None]
    starts, ends, axes, steps = given
    if starts is None or ends is None or len(starts) != 1 or (steps or [1]) != [1]:
        return None
    axis = (axes or [0])[0] % rank
    size = match.dim(source, axis)
    if size is None or len(node.inputs) > 3 and axes is None:
        return None
    start, end = (min(max(at + size if at < 0 else at, 0), size) for at in (starts[0], ends[0]))
    return Part(source, axis, start, end)


def added_part(value: oir.Value | None) -> Part | None:
    """An Add of a part and something else."""
    node = match.producer(value, "Add")
    for one, other in ((0, 1), (1, 0)) if node is not None else ():
        part = part_of(node.inputs[one])  # type: ignore[union-attr]
        if part is not None:
            return Part(part.value, part.axis, part.start, part.end, node.inputs[other])  # type: ignore[union-attr]
    return None
