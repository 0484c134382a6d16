"""Tensors of integers that count along an axis, constant or computed from the sizes of other tensors."""

from __future__ import annotations

import numpy as np
import onnx_ir as oir

from burnish.ir import match, weights
from burnish.ir.dims import Dim
from burnish.ir.inference import Inference, Shape

LARGEST = 1 << 22
"""Elements of the largest constant that is looked at."""

_MOVED = ("Reshape", "Unsqueeze", "Squeeze")
_INTEGERS = (oir.DataType.INT32, oir.DataType.INT64)


def box(facts: Inference, indices: oir.Value | None) -> list[tuple[int, Dim]] | None:
    """Where a ScatterND with these indices, int64 [sizes..., axes], writes: where it is a box, in order.

    Returns:
        For each axis the first place and the number of places. None where it is not proven to be a box.
    """
    shape = facts.shape(indices)
    if indices is None or shape is None or not shape or shape[-1] != len(shape) - 1:
        return None
    array, joined = weights.constant(indices, largest=LARGEST), match.producer(indices, "Concat")
    if array is not None:
        starts = [_start(array[..., axis], axis) for axis in range(len(shape) - 1)]
    elif joined is not None and int(match.attribute(joined, "axis", 0)) in (-1, len(shape) - 1):
        if any((facts.shape(part) or (0,))[-1] != 1 for part in joined.inputs):
            return None
        starts = [start_along(facts, part, axis) for axis, part in enumerate(joined.inputs)]
    else:
        starts = [start_along(facts, indices, 0) if len(shape) == 2 else None]
    found = [(start, size) for start, size in zip(starts, shape[:-1], strict=True) if start is not None]
    return found if len(found) == len(starts) else None


def start_along(facts: Inference, value: oir.Value | None, axis: int) -> int | None:
    """The s of a tensor of integers whose element at i is s + i[axis]; None where that is not proven."""
    array, shape = weights.constant(value, largest=LARGEST), facts.shape(value)
    if array is not None:
        return _start(array, axis)
    node = match.producer(value, "Range", "Expand", "Cast", *_MOVED)
    if node is None or shape is None or facts.dtype(node.inputs[0]) not in _INTEGERS:
        return None
    if node.op_type == "Range":
        start, step = weights.scalar(node.inputs[0]), weights.scalar(node.inputs[2])
        return int(start) if start is not None and step == 1 else None
    before = facts.shape(node.inputs[0])
    if before is None:
        return None
    if node.op_type == "Expand":
        inner = axis - len(shape) + len(before)
        return start_along(facts, node.inputs[0], inner) if inner >= 0 and before[inner] == shape[axis] else None
    if node.op_type == "Cast":
        return start_along(facts, node.inputs[0], axis) if facts.dtype(value) in _INTEGERS else None
    place = _places(shape, before).get(axis)
    return None if place is None else start_along(facts, node.inputs[0], place)


def _places(one: Shape, other: Shape) -> dict[int, int]:
    """Where axes are in another shape of the same elements that differs in axes of one element alone."""
    mine, theirs = ([axis for axis, size in enumerate(shape) if size != 1] for shape in (one, other))
    if [one[axis] for axis in mine] != [other[axis] for axis in theirs]:
        return {}
    return dict(zip(mine, theirs, strict=True))


def _start(array: np.ndarray, axis: int) -> int | None:
    if not array.size or array.dtype.kind not in "iu":
        return None
    start = int(array.reshape(-1)[0])
    line = start + np.arange(array.shape[axis]).reshape([-1 if at == axis else 1 for at in range(array.ndim)])
    return start if bool((array == line).all()) else None
