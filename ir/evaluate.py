"""What deterministic operators compute from constants, in NumPy: the operators exporters leave on constants.

Quantize and dequantize operators are missing on purpose: folding them would undo the quantization of a weight.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx_ir as oir

from burnish.ir import match, weights

Arrays = list[Any]
Function = Callable[[oir.Node, Arrays], Any]


def _axes(node: oir.Node, arrays: Arrays) -> tuple[int, ...] | None:
    found = match.attribute(node, "axes")
    if found is None and len(arrays) > 1 and arrays[1] is not None:
        found = arrays[1].reshape(-1).tolist()
    return tuple(found) if found is not None else None


def _reshape(node: oir.Node, arrays: Arrays) -> Any:
    target = arrays[1].tolist()
    if not match.attribute(node, "allowzero", 0):
        target = [arrays[0].shape[i] if size == 0 else size for i, size in enumerate(target)]
    return arrays[0].reshape(target)


def _unsqueeze(node: oir.Node, arrays: Arrays) -> Any:
    return np.expand_dims(arrays[0], _axes(node, arrays) or ())


def _flatten(node: oir.Node, arrays: Arrays) -> Any:
    axis, shape = match.attribute(node, "axis", 1), arrays[0].shape
    axis = axis + len(shape) if axis < 0 else axis
    return arrays[0].reshape(int(np.prod(shape[:axis], dtype=np.int64)), -1)


def _slice(node: oir.Node, arrays: Arrays) -> Any:
    if match.attribute(node, "starts") is not None:
        starts, ends = match.attribute(node, "starts"), match.attribute(node, "ends")
        axes, steps = match.attribute(node, "axes"), None
    else:
        starts, ends, axes, steps = [a.tolist() if a is not None else None for a in (arrays[1:] + [None] * 4)[:4]]
    index = [slice(None)] * arrays[0].ndim
    for i, (start, end) in enumerate(zip(starts, ends, strict=True)):
        axis, step = axes[i] if axes is not None else i, steps[i] if steps is not None else 1
        index[axis] = slice(start, None if step < 0 and end < -arrays[0].shape[axis] else end, step)
    return arrays[0][tuple(index)]


def _gather(node: oir.Node, arrays: Arrays) -> Any:
    return np.take(arrays[0], arrays[1], axis=match.attribute(node, "axis", 0))


def _split(node: oir.Node, arrays: Arrays) -> Any:
    axis, parts = match.attribute(node, "axis", 0), match.attribute(node, "split")
    if parts is None and len(arrays) > 1 and arrays[1] is not None:
        parts = arrays[1].tolist()
    if parts is None:
        size, count = arrays[0].shape[axis], len(node.outputs)
        parts = [-(-size // count)] * count
    return np.split(arrays[0], np.cumsum(parts)[:-1], axis=axis)


def _filled(node: oir.Node, arrays: Arrays) -> Any:
    value = match.attribute(node, "value")
    number = value.numpy().reshape(-1)[0] if value is not None else np.float32(0)
    return np.full(arrays[0].tolist(), number, getattr(number, "dtype", None))


def _divide(node: oir.Node, arrays: Arrays) -> Any:
    left, right = arrays
    if left.dtype.kind not in "iu":
        return left / right
    quotient = np.floor_divide(np.abs(left), np.abs(right))
    return (quotient * np.sign(left) * np.sign(right)).astype(left.dtype)


def _modulo(node: oir.Node, arrays: Arrays) -> Any:
    return np.fmod(*arrays) if match.attribute(node, "fmod", 0) else np.mod(*arrays)


def _range(node: oir.Node, arrays: Arrays) -> Any:
    start, limit, delta = (a.reshape(())[()] for a in arrays)
    count = max(0, int(np.ceil((limit - start) / delta)))
    return (start + np.arange(count) * delta).astype(arrays[0].dtype)


def _trilu(node: oir.Node, arrays: Arrays) -> Any:
    k = int(arrays[1]) if len(arrays) > 1 and arrays[1] is not None else 0
    return np.triu(arrays[0], k) if match.attribute(node, "upper", 1) else np.tril(arrays[0], k)


def _cumsum(node: oir.Node, arrays: Arrays) -> Any:
    if match.attribute(node, "exclusive", 0) or match.attribute(node, "reverse", 0):
        return None
    return np.cumsum(arrays[0], axis=int(arrays[1]), dtype=arrays[0].dtype)


def _reduce(function: Callable[..., Any]) -> Function:
    def reduced(node: oir.Node, arrays: Arrays) -> Any:
        axes = _axes(node, arrays)
        if not axes and match.attribute(node, "noop_with_empty_axes", 0):
            return arrays[0]
        kept = bool(match.attribute(node, "keepdims", 1))
        return np.asarray(function(arrays[0], axis=axes or None, keepdims=kept)).astype(arrays[0].dtype)

    return reduced


def _numpy(function: Callable[..., Any]) -> Function:
    return lambda node, arrays: function(*arrays)


def _variadic(function: Callable[..., Any]) -> Function:
    def combined(node: oir.Node, arrays: Arrays) -> Any:
        result = arrays[0]
        for array in arrays[1:]:
            result = function(result, array)
        return result

    return combined


MOVES: dict[str, Function] = {
    "Identity": _numpy(lambda x: x),
    "Reshape": _reshape,
    "Transpose": lambda node, arrays: np.transpose(arrays[0], match.attribute(node, "perm")),
    "Unsqueeze": _unsqueeze,
    "Squeeze": lambda node, arrays: np.squeeze(arrays[0], _axes(node, arrays)),
    "Flatten": _flatten,
    "Concat": lambda node, arrays: np.concatenate(arrays, axis=match.attribute(node, "axis", 0)),
    "Slice": _slice,
    "Gather": _gather,
    "Split": _split,
    "Expand": _numpy(lambda x, shape: np.broadcast_to(x, np.broadcast_shapes(x.shape, tuple(shape.tolist())))),
    "Tile": _numpy(lambda x, repeats: np.tile(x, repeats.tolist())),
    "Where": _numpy(np.where),
    "Trilu": _trilu,
}
"""Operators that only move elements of a constant."""

SMOOTH: dict[str, Function] = {
    "Add": _numpy(np.add),
    "Sub": _numpy(np.subtract),
    "Mul": _numpy(np.multiply),
    "Div": _divide,
    "Pow": _numpy(lambda x, y: np.power(x, y).astype(x.dtype)),
    "Sqrt": _numpy(np.sqrt),
    "Reciprocal": _numpy(np.reciprocal),
    "Neg": _numpy(np.negative),
    "Abs": _numpy(np.abs),
    "Exp": _numpy(np.exp),
    "Log": _numpy(np.log),
    "Cos": _numpy(np.cos),
    "Sin": _numpy(np.sin),
    "Tanh": _numpy(np.tanh),
    "Sigmoid": _numpy(lambda x: 1 / (1 + np.exp(-x))),
    "Relu": _numpy(lambda x: np.maximum(x, 0)),
    "Max": _variadic(np.maximum),
    "Min": _variadic(np.minimum),
    "Sum": _variadic(np.add),
    "MatMul": _numpy(np.matmul),
    "CumSum": _cumsum,
    "ReduceSum": _reduce(np.sum),
    "ReduceMean": _reduce(np.mean),
    "ReduceMax": _reduce(np.max),
    "ReduceMin": _reduce(np.min),
    "ReduceProd": _reduce(np.prod),
}
"""Operators whose floating-point results are computed in float64 and rounded once."""

STEPS: dict[str, Function] = {
    "Shape": lambda node, arrays: np.array(
        arrays[0].shape[match.attribute(node, "start", 0) : match.attribute(node, "end")], np.int64
    ),
    "Size": lambda node, arrays: np.array(arrays[0].size, np.int64),
    "Floor": _numpy(np.floor),
    "Ceil": _numpy(np.ceil),
    "Round": _numpy(np.round),
    "Sign": _numpy(np.sign),
    "Mod": _modulo,
    "Range": _range,
    "ConstantOfShape": _filled,
    "Equal": _numpy(np.equal),
    "Less": _numpy(np.less),
    "LessOrEqual": _numpy(np.less_equal),
    "Greater": _numpy(np.greater),
    "GreaterOrEqual": _numpy(np.greater_equal),
    "And": _numpy(np.logical_and),
    "Or": _numpy(np.logical_or),
    "Xor": _numpy(np.logical_xor),
    "Not": _numpy(np.logical_not),
    "IsNaN": _numpy(np.isnan),
}
"""Operators that jump: computed from the values as they are stored."""


FOLDABLE = frozenset((*MOVES, *SMOOTH, *STEPS, "Cast", "CastLike"))
"""The operators that `evaluate` knows."""


def evaluate(node: oir.Node, *, largest: int) -> list[oir.TensorProtocol] | None:
    """The outputs of a standard operator whose inputs are all constant.

    Args:
        node: the node.
        largest: bytes; results of operators that make tensors larger are not computed above it.

    Returns:
        A tensor for each output; a moved weight is a view of the original where NumPy can make one. None when the
        operator is not listed or the operator cannot take its inputs.
    """
    op = node.op_type
    if op in ("ConstantOfShape", "Tile", "Range", "Expand", "Cast", "CastLike") and _least_bytes(node) > largest:
        return None
    try:
        with np.errstate(all="ignore"):
            if op in ("Cast", "CastLike"):
                return _cast(node)
            if op in MOVES:
                return _moved(node, MOVES[op])
            if op in SMOOTH and any(_is_float(value) for value in node.inputs):
                exact = [_exact(value) for value in node.inputs]
                first = weights.tensor_of(node.inputs[0])
                found = SMOOTH[op](node, exact)
                return None if found is None or first is None else [weights.rounded(np.asarray(found), first.dtype)]
            function = SMOOTH.get(op) or STEPS.get(op)
            if function is None or op == "MatMul":
                return None
            found = function(node, [_stored(value) for value in node.inputs])
            return None if found is None else [oir.Tensor(np.asarray(found))]
    except (ValueError, TypeError, IndexError, ZeroDivisionError, MemoryError):
        return None


def _least_bytes(node: oir.Node) -> float:
    """At least so many bytes has the result of an operator that can be larger than its inputs."""
    source = weights.tensor_of(node.inputs[0])
    size = source.size if source is not None else 0
    if node.op_type in ("Cast", "CastLike"):
        return float(size)
    numbers = [_stored(value) for value in node.inputs]
    if any(array is None for array in numbers):
        return float("inf")
    if node.op_type == "Range":
        start, limit, delta = (float(array.reshape(-1)[0]) for array in numbers if array is not None)
        return (limit - start) / delta * 4 if delta else float("inf")
    last = numbers[-1]
    count = float(np.prod(last.astype(np.float64))) if last is not None else 0.0
    return count * size if node.op_type == "Tile" else count


def _is_float(value: oir.Value | None) -> bool:
    tensor = weights.tensor_of(value)
    return tensor is not None and tensor.dtype.is_floating_point()


def _stored(value: oir.Value | None) -> np.ndarray | None:
    return weights.constant(value)


def _exact(value: oir.Value | None) -> np.ndarray | None:
    return weights.exact(value) if value is not None and _is_float(value) else weights.constant(value)


def _moved(node: oir.Node, function: Function) -> list[oir.TensorProtocol] | None:
    source = weights.tensor_of(node.inputs[1 if node.op_type == "Where" else 0])
    if source is None:
        return None
    if any(value is not None and weights.unrounded(value) is not None for value in node.inputs):
        parts = function(node, [_exact(value) for value in node.inputs])
        return [weights.rounded(part, source.dtype) for part in (parts if isinstance(parts, list) else [parts])]
    parts = function(node, [_stored(value) for value in node.inputs])
    return [
        oir.Tensor(np.asarray(part), dtype=source.dtype) for part in (parts if isinstance(parts, list) else [parts])
    ]


def _cast(node: oir.Node) -> list[oir.TensorProtocol] | None:
    tensor = weights.tensor_of(node.inputs[0])
    like = weights.tensor_of(node.inputs[1]) if node.op_type == "CastLike" else None
    if tensor is None:
        return None
    to = like.dtype if like is not None else oir.DataType(match.attribute(node, "to"))
    plain = "biuf"
    if to.bitwidth < 8 or tensor.dtype.bitwidth < 8 or to == oir.DataType.STRING or tensor.dtype == oir.DataType.STRING:
        return None
    if to.is_floating_point() and tensor.dtype.is_floating_point():
        value = node.inputs[0]
        exact = weights.exact(value) if value is not None else None
        return None if exact is None or to.bitwidth < 16 else [weights.rounded(exact, to)]
    array = tensor.numpy()
    if array.dtype.kind not in plain or np.dtype(to.numpy()).kind not in plain:
        return None
    if array.dtype.kind == "f" and np.dtype(to.numpy()).kind in "iu" and not np.all(np.abs(array) < 2.0**31):
        return None
    return [oir.Tensor(array.astype(to.numpy()))]
