"""Whether the elements of a tensor are the same all along an axis, as far as its computation proves it."""

from __future__ import annotations

import numpy as np
import onnx_ir as oir

from burnish.ir import match, weights
from burnish.ir.content_rules import slices
from burnish.ir.views.bands import Bands
from burnish.ir.views.ramps import places
from burnish.ir.walk import is_op

_DEEPEST = 64
_LARGEST = 1 << 22
_ELEMENTWISE = frozenset(
    "Abs Add And Cast CastLike Ceil Clip Cos Div Equal Erf Exp Floor Gelu Greater GreaterOrEqual Identity IsInf IsNaN"
    " Less LessOrEqual Log Max Mean Min Mod Mul Neg Not Or Pow Reciprocal Relu Round Sigmoid Sign Sin Sqrt Sub Sum Tanh"
    " Where Xor Expand Dropout".split()
)


def varies(value: oir.Value | None, axis: int, bands: Bands, depth: int = 0) -> bool:
    """Whether elements of `value` may differ along an axis counted from the end, the last being 1."""
    shape = bands.facts.shape(value)
    if value is None or (shape is not None and (axis > len(shape) or shape[-axis] == 1)):
        return False
    tensor = weights.tensor_of(value)
    if tensor is not None:
        return tensor.size > _LARGEST or _array_varies(tensor.numpy(), axis)
    node = value.producer()
    if node is None or shape is None or depth > _DEEPEST:
        return True
    runs = bands.of(value)
    if len(runs) == 1 and runs[0].low == runs[0].high:
        return False
    return _computed(node, value, axis, bands, depth + 1)


def _array_varies(array: np.ndarray, axis: int) -> bool:
    moved = np.moveaxis(array, array.ndim - axis, 0)
    return not np.array_equal(moved, np.broadcast_to(moved[:1], moved.shape))


def _computed(node: oir.Node, value: oir.Value, axis: int, bands: Bands, depth: int) -> bool:
    facts, inputs = bands.facts, [one for one in node.inputs if one is not None]
    after, before = facts.shape(value), facts.shape(inputs[0]) if inputs else None
    if node.op_type == "ConstantOfShape" and is_op(node, "ConstantOfShape"):
        return False
    if before is None or after is None or not is_op(node, node.op_type):
        return True
    if node.op_type in _ELEMENTWISE:
        data = inputs[:1] if node.op_type in ("Expand", "Dropout", "CastLike") else inputs
        return any(varies(one, axis, bands, depth) for one in data)
    if is_op(node, "Unsqueeze", "Squeeze", "Reshape", "Flatten", "Transpose"):
        where = places(node, before, after)
        old = next((one for one, new in (where or {}).items() if new == axis), None)
        return old is None or varies(inputs[0], old, bands, depth)
    if is_op(node, "Concat"):
        along = match.attribute(node, "axis", 0) % len(after)
        return len(after) - along == axis or any(varies(one, axis, bands, depth) for one in inputs)
    if is_op(node, "Slice"):
        known = slices(facts, node, len(before)) is not None
        return not known or varies(inputs[0], axis, bands, depth)
    if is_op(node, "GatherND") and not match.attribute(node, "batch_dims", 0):
        indices = facts.shape(inputs[1])
        inner = len(after) - (len(indices) - 1) if indices is not None else None
        return inner is None or axis <= inner or varies(inputs[1], axis - inner + 1, bands, depth)
    if is_op(node, "Gather"):
        indices = facts.shape(inputs[1])
        along = match.attribute(node, "axis", 0) % len(before)
        behind = len(before) - along - 1
        if indices is None:
            return True
        if axis <= behind:
            return varies(inputs[0], axis, bands, depth)
        if axis <= behind + len(indices):
            return varies(inputs[1], axis - behind, bands, depth)
        return varies(inputs[0], axis - len(indices) + 1, bands, depth)
    return True
