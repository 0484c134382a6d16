"""A weight as a layer reads it: a constant, possibly behind nodes that only reshape, cast or dequantize it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as oir

from burnish.ir import edit, match, weights
from burnish.ir.walk import is_op

_STEPS = ("Identity", "Transpose", "Reshape", "Squeeze", "Unsqueeze", "Flatten", "Cast", "DequantizeLinear")


@dataclass(frozen=True)
class Parameter:
    """A constant of a layer.

    Attributes:
        value: what the layer reads.
        source: the initializer or the output of the Constant node that holds the numbers.
        steps: the nodes between `source` and `value`, first to last.
        shape: of `value`.
    """

    value: oir.Value
    source: oir.Value
    steps: tuple[oir.Node, ...]
    shape: tuple[int, ...]

    @property
    def quantized(self) -> bool:
        """Whether the numbers are stored as integers behind a DequantizeLinear."""
        return any(is_op(step, "DequantizeLinear") for step in self.steps)

    @property
    def widened(self) -> bool:
        """Whether the numbers are stored in fewer bits of floating point than the layer reads."""
        tensor, dtype = weights.tensor_of(self.source), self.dtype
        if tensor is None or dtype is None or self.quantized or not tensor.dtype.is_floating_point():
            return False
        return tensor.dtype.bitwidth < dtype.bitwidth

    @property
    def dtype(self) -> oir.DataType | None:
        """The dtype in which the layer reads the numbers; None when unknown."""
        for step in reversed(self.steps):
            if is_op(step, "Cast"):
                return oir.DataType(match.attribute(step, "to"))
            if is_op(step, "DequantizeLinear"):
                scale = weights.tensor_of(step.inputs[1])
                return scale.dtype if scale is not None else None
        tensor = weights.tensor_of(self.source)
        return tensor.dtype if tensor is not None else None

    def read(self) -> np.ndarray:
        """The numbers as the layer sees them, float64, of `shape`."""
        exact = weights.exact(self.source)
        array = exact if exact is not None else np.asarray(weights.constant(self.source))
        for step in self.steps:
            array = _apply(step, array)
        return array.astype(np.float64)

    @property
    def finite(self) -> bool:
        """Whether the numbers that are stored hold no NaN and no infinity."""
        tensor = weights.tensor_of(self.source)
        return tensor is None or not tensor.dtype.is_floating_point() or bool(np.isfinite(tensor.numpy()).all())

    def others(self, node: oir.Node) -> list[oir.Node]:
        """The nodes other than `node` and `steps` that read the same numbers, at any of the steps."""
        along = [self.source, *(step.outputs[0] for step in self.steps)]
        own = {id(node), *(id(step) for step in self.steps)}
        return [user for value in along for user in match.consumers(value) if id(user) not in own]


def find_parameter(value: oir.Value | None) -> Parameter | None:
    """The constant behind `value`; None when it is computed, or when its shape cannot be told."""
    steps: list[oir.Node] = []
    current = value
    while current is not None and value is not None:
        tensor = weights.tensor_of(current)
        if tensor is not None:
            shape: tuple[int, ...] | None = tuple(tensor.shape.numpy())
            for step in reversed(steps):
                shape = _shape(step, shape) if shape is not None else None
            return None if shape is None else Parameter(value, current, tuple(reversed(steps)), shape)
        node = match.producer(current, *_STEPS)
        if node is None or any(not weights.is_constant(v) for v in node.inputs[1:] if v is not None):
            return None
        steps.append(node)
        current = node.inputs[0]
    return None


def fits(array: np.ndarray, dtype: oir.DataType) -> bool:
    """Whether `dtype` holds `array` (float64) with ordinary rounding: no infinity, no lost small numbers."""
    if not np.isfinite(array).all():
        return False
    with np.errstate(over="ignore"):
        stored = array.astype(dtype.numpy()).astype(np.float64)
    if not np.isfinite(stored).all():
        return False
    epsilon = 2.0 ** -{oir.DataType.FLOAT16: 10, oir.DataType.BFLOAT16: 7, oir.DataType.DOUBLE: 52}.get(dtype, 23)
    return bool(np.linalg.norm(stored - array) <= epsilon * np.linalg.norm(array))


def write_input(
    model: oir.Model, node: oir.Node, index: int, array: np.ndarray, dtype: oir.DataType, name: str
) -> None:
    """Let input `index` of `node` be a new initializer, `array` (float64) in `dtype`; others keep the old one."""
    edit.set_input(node, index, edit.add_rounded(model, name, array, dtype))


def same_shape(node: oir.Node, like: oir.Value) -> oir.Value:
    """Give the first output of `node` the type and shape of `like`, and return it."""
    node.outputs[0].type = like.type
    node.outputs[0].shape = like.shape.copy() if like.shape is not None else None
    return node.outputs[0]


def _apply(step: oir.Node, array: np.ndarray) -> np.ndarray:
    match step.op_type:
        case "Transpose":
            return array.transpose(match_perm(step, array.ndim))
        case "DequantizeLinear":
            return _dequantize(step, array)
        case "Cast" | "Identity":
            return array
    shape = _shape(step, array.shape)
    if shape is None:
        raise ValueError(f"{match.describe(step)} has no constant shape")
    return array.reshape(shape)


def match_perm(node: oir.Node, rank: int) -> tuple[int, ...]:
    """The permutation of a Transpose; axes reversed when it names none."""
    perm = match.attribute(node, "perm")
    return tuple(int(p) for p in perm) if perm is not None else tuple(range(rank - 1, -1, -1))


def _dequantize(node: oir.Node, array: np.ndarray) -> np.ndarray:
    scale = np.asarray(weights.exact(node.inputs[1]))  # type: ignore[arg-type]
    zero = match.input_of(node, 2)
    offset = np.zeros((), np.float64) if zero is None else np.asarray(weights.constant(zero)).astype(np.float64)
    axis = match.attribute(node, "axis", 1)
    block = match.attribute(node, "block_size", 0)
    centred = array.astype(np.float64) - _spread(offset, array, axis, block)
    return np.asarray(centred * _spread(scale, array, axis, block))


def _spread(values: np.ndarray, array: np.ndarray, axis: int, block: int) -> np.ndarray:
    if values.size == 1:
        return values.reshape(())
    axis %= array.ndim
    if block:
        return values.repeat(block, axis).take(range(array.shape[axis]), axis)
    return values.reshape([-1 if i == axis else 1 for i in range(array.ndim)])


def _shape(step: oir.Node, shape: tuple[int, ...]) -> tuple[int, ...] | None:
    size = int(np.prod(shape))
    match step.op_type:
        case "Transpose":
            return tuple(shape[p] for p in match_perm(step, len(shape)))
        case "Flatten":
            axis = match.attribute(step, "axis", 1)
            rows = int(np.prod(shape[: axis if axis >= 0 else axis + len(shape)]))
            return (rows, size // max(rows, 1))
        case "Reshape":
            wanted = weights.integers(step.inputs[1])
            if wanted is None:
                return None
            if not match.attribute(step, "allowzero", 0):
                wanted = [shape[i] if d == 0 else d for i, d in enumerate(wanted)]
            rest = int(np.prod([d for d in wanted if d != -1]))
            return tuple(size // max(rest, 1) if d == -1 else d for d in wanted)
        case "Squeeze" | "Unsqueeze":
            return _unit_axes(step, shape)
    return shape


def _unit_axes(step: oir.Node, shape: tuple[int, ...]) -> tuple[int, ...] | None:
    axes = match.axes_of(step)
    if axes is None:
        return None
    if step.op_type == "Squeeze":
        gone = {a % len(shape) for a in axes} or {i for i, d in enumerate(shape) if d == 1}
        return tuple(d for i, d in enumerate(shape) if i not in gone)
    rank = len(shape) + len(axes)
    new = {a % rank for a in axes}
    old = iter(shape)
    return tuple(1 if i in new else next(old) for i in range(rank))
