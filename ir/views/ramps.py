"""Integer tensors that count positions, wherever an exporter's movement put their axes."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as oir

from burnish.ir import dims, match, weights
from burnish.ir.content_rules import slices
from burnish.ir.dims import Dim
from burnish.ir.inference import Inference, Shape
from burnish.ir.views import heads
from burnish.ir.walk import is_op

_DEEPEST = 24
_LARGEST = 1 << 16


@dataclass(frozen=True)
class Ramp:
    """An integer tensor whose elements are start + sum of slope * index.

    Attributes:
        start: the first element.
        slopes: (axis counted from the end, first is 1; slope), slopes of axes of one element left out.
    """

    start: Dim
    slopes: tuple[tuple[int, int], ...] = ()

    def slope(self, axis: int) -> int:
        """The slope along an axis counted from the end."""
        return dict(self.slopes).get(axis, 0)

    def others(self, number: int) -> bool:
        """Whether it varies along axes before the last `number`."""
        return any(axis > number for axis, _ in self.slopes)

    def plus(self, other: Ramp) -> Ramp:
        """The sum."""
        axes = sorted({axis for axis, _ in (*self.slopes, *other.slopes)})
        slopes = tuple((axis, self.slope(axis) + other.slope(axis)) for axis in axes)
        return Ramp(dims.add(self.start, other.start), tuple(one for one in slopes if one[1]))

    def times(self, factor: int) -> Ramp:
        """Multiplied by a number."""
        slopes = tuple((axis, slope * factor) for axis, slope in self.slopes) if factor else ()
        return Ramp(dims.multiply(self.start, factor), slopes)

    def minus(self, other: Ramp) -> Ramp:
        """The difference."""
        return self.plus(other.times(-1))


def read_ramp(value: oir.Value | None, facts: Inference, depth: int = 0) -> Ramp | None:
    """The ramp that `value` is; None when it is none."""
    shape = facts.shape(value)
    if value is None or shape is None or depth > _DEEPEST:
        return None
    tensor = weights.tensor_of(value)
    if tensor is not None:
        return _constant(tensor) if 0 < tensor.size <= _LARGEST else None
    content = facts.content(value)
    number = content.item() if content is not None and content.size == 1 else None
    if number is not None and not isinstance(number, bool):
        return Ramp(number)
    node = value.producer()
    found = _computed(node, shape, facts, depth + 1) if node is not None else None
    if found is None:
        return None
    single = {axis for axis, size in enumerate(reversed(shape), 1) if size == 1}
    return Ramp(found.start, tuple(one for one in found.slopes if one[0] not in single))


_EXACT = 2.0**53
"""Whole numbers below it are exact in float64; such as hide scores are beyond it, and no places."""


def _constant(tensor: oir.TensorProtocol) -> Ramp | None:
    array = tensor.numpy()
    if array.dtype.kind not in "iuf" or not np.array_equal(array, np.round(array)):
        return None
    if array.dtype.kind == "f" and not np.all(np.abs(array) < _EXACT):
        return None
    array = array.astype(np.int64)
    start = int(array.reshape(-1)[0])
    slopes, made = list[tuple[int, int]](), np.full(array.shape, start)
    for axis, size in enumerate(array.shape):
        if size > 1:
            first = np.moveaxis(array, axis, 0).reshape(size, -1)[:, 0]
            slope = int(first[1] - first[0])
            made = made + slope * np.arange(size).reshape([-1 if i == axis else 1 for i in range(array.ndim)])
            if slope:
                slopes.append((array.ndim - axis, slope))
    return Ramp(start, tuple(slopes)) if np.array_equal(made, array) else None


def _computed(node: oir.Node, shape: Shape, facts: Inference, depth: int) -> Ramp | None:
    source = match.input_of(node, 0)
    before = facts.shape(source)
    if is_op(node, "Range"):
        start, step = (facts.integers(node.inputs[index]) for index in (0, 2))
        return Ramp(start[0], ((1, step[0]),)) if start and step and isinstance(step[0], int) else None
    if is_op(node, "Add", "Sub"):
        left, right = (read_ramp(value, facts, depth) for value in node.inputs)
        if left is None or right is None:
            return None
        return left.plus(right) if node.op_type == "Add" else left.minus(right)
    if is_op(node, "Mul"):
        scaled = heads.scaled_by(node, facts)
        inner = read_ramp(scaled[0], facts, depth) if scaled is not None else None
        if inner is None or scaled is None or scaled[1] != int(scaled[1]):
            return None
        return inner.times(int(scaled[1]))
    inner = read_ramp(source, facts, depth) if is_op(node, *_MOVES) else None
    if inner is None or before is None:
        return None
    if is_op(node, "Identity", "Cast", "Expand"):
        return inner
    if is_op(node, "Slice"):
        return _cut(node, inner, before, facts)
    found = places(node, before, shape)
    if found is None or any(axis not in found for axis, _ in inner.slopes):
        return None
    return Ramp(inner.start, tuple((found[axis], slope) for axis, slope in inner.slopes))


_MOVES = ("Identity", "Cast", "Expand", "Slice", "Unsqueeze", "Squeeze", "Reshape", "Flatten", "Transpose")


def _cut(node: oir.Node, ramp: Ramp, before: Shape, facts: Inference) -> Ramp | None:
    spans = slices(facts, node, len(before))
    if spans is None:
        return None
    for axis, (start, _, step) in spans.items():
        slope = ramp.slope(len(before) - axis)
        if not slope:
            continue
        if step != 1:
            return None
        begin = start if dims.at_least(start, 0) else dims.add(start, before[axis])
        if not dims.at_least(begin, 0):
            return None
        ramp = Ramp(dims.add(ramp.start, dims.multiply(begin, slope)), ramp.slopes)
    return ramp


def places(node: oir.Node, before: Shape, after: Shape) -> dict[int, int] | None:
    """Where the axes that are longer than one go, counted from the end."""
    if is_op(node, "Transpose"):
        order = match.attribute(node, "perm") or tuple(reversed(range(len(before))))
        return {len(before) - old: len(after) - new for new, old in enumerate(order)}
    long = [[axis for axis, size in enumerate(shape) if size != 1] for shape in (before, after)]
    sizes = [[shape[axis] for axis in axes] for shape, axes in zip((before, after), long, strict=True)]
    if sizes[0] != sizes[1]:
        return None
    return {len(before) - old: len(after) - new for old, new in zip(*long, strict=True)}
