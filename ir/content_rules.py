"""What operators do to small integer tensors whose elements are sizes: one rule an operator."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_ir as oir

from burnish.ir import dims, match, weights

if TYPE_CHECKING:
    from burnish.ir.inference import Inference

Rule = Callable[["Inference", oir.Node], "np.ndarray | None"]

_LIMITS = {oir.DataType.INT64: 2**63 - 1, oir.DataType.INT32: 2**31 - 1}


def checked(content: np.ndarray | None, dtype: oir.DataType | None) -> np.ndarray | None:
    """`content`, with elements that would overflow `dtype` made unknown; None when nothing of it is known."""
    if content is None:
        return None
    limit = _LIMITS.get(dtype) if dtype is not None else None
    if limit is not None:
        for index, element in enumerate(content.reshape(-1).tolist()):
            if isinstance(element, int) and abs(element) > limit:
                content.reshape(-1)[index] = None
    return content if any(element is not None for element in content.reshape(-1).tolist()) else None


def plain(shape: tuple[dims.Dim, ...]) -> tuple[int, ...]:
    """The numbers of a shape that is known to hold nothing else."""
    return tuple(size for size in shape if isinstance(size, int))


def _vector(elements: list[Any]) -> np.ndarray:
    result = np.empty(len(elements), object)
    result[:] = elements
    return result


def _lift(function: Callable[..., Any], arity: int) -> Callable[..., np.ndarray]:
    def known(*arguments: Any) -> Any:
        return None if any(x is None for x in arguments) else function(*arguments)

    lifted = np.frompyfunc(known, arity, 1)
    return lambda *arrays: np.asarray(lifted(*arrays), object)


def _elementwise(function: Callable[..., Any], arity: int) -> Rule:
    lifted = _lift(function, arity)

    def rule(facts: Inference, node: oir.Node) -> np.ndarray | None:
        contents = [facts.content(value) for value in node.inputs]
        return None if any(c is None for c in contents) else lifted(*contents)

    return rule


def _variadic(function: Callable[[Any, Any], Any]) -> Rule:
    lifted = _lift(function, 2)

    def rule(facts: Inference, node: oir.Node) -> np.ndarray | None:
        contents = [facts.content(value) for value in node.inputs]
        if any(c is None for c in contents):
            return None
        result = contents[0]
        for content in contents[1:]:
            result = lifted(result, content)
        return result

    return rule


def _shape(facts: Inference, node: oir.Node) -> np.ndarray | None:
    shape = facts.shape(node.inputs[0])
    if shape is None:
        return None
    start, end = match.attribute(node, "start", 0), match.attribute(node, "end")
    return _vector(list(shape[start:end]))


def _size(facts: Inference, node: oir.Node) -> np.ndarray | None:
    shape = facts.shape(node.inputs[0])
    return None if shape is None else np.array(dims.product(shape), object)


def _gather(facts: Inference, node: oir.Node) -> np.ndarray | None:
    content, indices = facts.content(node.inputs[0]), facts.content(node.inputs[1])
    if content is None or indices is None or content.ndim == 0:
        return None
    axis = match.attribute(node, "axis", 0)
    wanted = indices.reshape(-1).tolist()
    if not all(type(i) is int and -content.shape[axis] <= i < content.shape[axis] for i in wanted):
        return None
    return np.asarray(np.take(content, indices.astype(np.int64), axis=axis), object)


def _slice(facts: Inference, node: oir.Node) -> np.ndarray | None:
    content = facts.content(node.inputs[0])
    spans = slices(facts, node, content.ndim if content is not None else 0)
    if content is None or spans is None:
        return None
    index = [slice(None)] * content.ndim
    for axis, (start, end, step) in spans.items():
        if not (isinstance(start, int) and isinstance(end, int)):
            return None
        index[axis] = slice(start, None if step < 0 and end < -content.shape[axis] else end, step)
    return content[tuple(index)]


def slices(facts: Inference, node: oir.Node, rank: int) -> dict[int, tuple[dims.Dim, dims.Dim, int]] | None:
    """The (start, end, step) by axis of a Slice; None when one is computed at run time or they are not equally many."""
    starts: list[dims.Dim]
    ends: list[dims.Dim]
    if match.attribute(node, "starts") is not None:
        starts, ends = (list(match.attribute(node, name) or ()) for name in ("starts", "ends"))
        axes, steps = match.attribute(node, "axes"), None
    else:
        inputs = [match.input_of(node, i) for i in range(1, 5)]
        found_starts, found_ends = facts.integers(inputs[0]), facts.integers(inputs[1])
        axes = facts.numbers(inputs[2]) if inputs[2] is not None else None
        steps = facts.numbers(inputs[3]) if inputs[3] is not None else None
        if found_starts is None or found_ends is None:
            return None
        if (inputs[2] is not None and axes is None) or (inputs[3] is not None and steps is None):
            return None
        starts, ends = found_starts, found_ends
    axes = list(axes) if axes is not None else list(range(len(starts)))
    steps = steps if steps is not None else [1] * len(starts)
    if not len(starts) == len(ends) == len(axes) == len(steps):
        return None
    return {axis % rank if rank else axis: span for axis, *span in zip(axes, starts, ends, steps, strict=True)}  # type: ignore[misc]


def split(facts: Inference, node: oir.Node) -> list[np.ndarray]:
    """The contents of the parts of a Split of a vector; empty when they are not known."""
    content, shapes = facts.content(node.inputs[0]), [facts.shape(out) for out in node.outputs]
    lengths = [shape[0] for shape in shapes if shape is not None and len(shape) == 1 and isinstance(shape[0], int)]
    if content is None or content.ndim != 1 or len(lengths) != len(shapes):
        return []
    return list(np.split(content, np.cumsum(np.array(lengths, np.int64))[:-1]))


def _concat(facts: Inference, node: oir.Node) -> np.ndarray | None:
    parts = []
    for value in node.inputs:
        content, shape = facts.content(value), facts.shape(value)
        if content is None:
            if shape is None or len(shape) != 1 or not isinstance(shape[0], int):
                return None
            content = np.full((shape[0],), None, object)
        parts.append(content)
    return np.asarray(np.concatenate(parts, axis=match.attribute(node, "axis", 0)), object)


def _reshaped(facts: Inference, node: oir.Node) -> np.ndarray | None:
    content, shape = facts.content(node.inputs[0]), facts.shape(node.outputs[0])
    return None if content is None or shape is None else content.reshape(plain(shape))


def _same(facts: Inference, node: oir.Node) -> np.ndarray | None:
    content = facts.content(node.inputs[0])
    return content.copy() if content is not None else None


def _cast(facts: Inference, node: oir.Node) -> np.ndarray | None:
    content, to = facts.content(node.inputs[0]), facts.dtype(node.outputs[0])
    if content is None:
        array = weights.constant(node.inputs[0], largest=64)
        if array is None or array.dtype.kind != "f" or not np.isfinite(array).all() or to == oir.DataType.BOOL:
            return None
        return np.asarray(np.trunc(array).astype(np.int64).astype(object), object)
    if to == oir.DataType.BOOL:
        return _lift(lambda x: x if isinstance(x, bool) else _differs(x, 0), 1)(content)
    return _lift(lambda x: int(x) if isinstance(x, bool) else x, 1)(content)


def _broadcast(facts: Inference, node: oir.Node) -> np.ndarray | None:
    content, shape = facts.content(node.inputs[0]), facts.shape(node.outputs[0])
    return None if content is None or shape is None else np.broadcast_to(content, plain(shape)).copy()


def _filled(facts: Inference, node: oir.Node) -> np.ndarray | None:
    shape, value = facts.shape(node.outputs[0]), match.attribute(node, "value")
    number = value.numpy().reshape(-1)[0].item() if value is not None else 0
    return np.full(plain(shape), number, object) if shape is not None else None


def _range(facts: Inference, node: oir.Node) -> np.ndarray | None:
    bounds = [facts.numbers(value) for value in node.inputs]
    return None if any(b is None for b in bounds) else _vector(list(range(*(b[0] for b in bounds if b))))


def _where(facts: Inference, node: oir.Node) -> np.ndarray | None:
    test, yes, no = (facts.content(value) for value in node.inputs)
    if test is None or yes is None or no is None:
        return None
    choose = np.frompyfunc(lambda t, a, b: (a if a == b else None) if t is None else a if t else b, 3, 1)
    return np.asarray(choose(test, yes, no), object)


def _reduce(function: Callable[[Any, Any], Any]) -> Rule:
    def rule(facts: Inference, node: oir.Node) -> np.ndarray | None:
        elements, shape = facts.integers(node.inputs[0]), facts.shape(node.outputs[0])
        if not elements or shape is None or dims.product(shape) != 1:
            return None
        total = elements[0]
        for element in elements[1:]:
            total = None if total is None else function(total, element)
        return np.full((1,) * len(shape), total, object)

    return rule


def _differs(left: Any, right: Any) -> bool | None:
    order = dims.compare(left, right)
    return None if order is None else order != 0


def _equals(left: Any, right: Any) -> bool | None:
    if isinstance(left, bool) and isinstance(right, bool):
        return left == right
    differs = _differs(left, right)
    return None if differs is None else not differs


def _order(*accepted: int) -> Callable[[Any, Any], bool | None]:
    def test(left: Any, right: Any) -> bool | None:
        order = dims.compare(left, right)
        return None if order is None else order in accepted

    return test


def _divide(left: Any, right: Any) -> Any:
    if isinstance(left, int) and isinstance(right, int):
        return None if right == 0 else int(left / right) if abs(left) < 2**52 else None
    return dims.divide(left, right)


def _modulo(left: Any, right: Any) -> Any:
    if isinstance(right, int) and right > 0 and isinstance(left, int) and left >= 0:
        return left % right
    if isinstance(right, int) and right > 0 and dims.divide_exactly(left, right) is not None:
        return 0
    return None


def _larger(left: Any, right: Any) -> Any:
    order = dims.compare(left, right)
    return None if order is None else left if order >= 0 else right


def _smaller(left: Any, right: Any) -> Any:
    order = dims.compare(left, right)
    return None if order is None else left if order <= 0 else right


RULES: dict[str, Rule] = {
    "Shape": _shape,
    "Size": _size,
    "Gather": _gather,
    "Slice": _slice,
    "Concat": _concat,
    "Unsqueeze": _reshaped,
    "Squeeze": _reshaped,
    "Reshape": _reshaped,
    "Flatten": _reshaped,
    "Identity": _same,
    "Cast": _cast,
    "CastLike": _cast,
    "Expand": _broadcast,
    "ConstantOfShape": _filled,
    "Range": _range,
    "Where": _where,
    "Add": _elementwise(dims.add, 2),
    "Sub": _elementwise(dims.subtract, 2),
    "Mul": _elementwise(dims.multiply, 2),
    "Div": _elementwise(_divide, 2),
    "Mod": _elementwise(_modulo, 2),
    "Neg": _elementwise(dims.negate, 1),
    "Max": _variadic(_larger),
    "Min": _variadic(_smaller),
    "Equal": _elementwise(_equals, 2),
    "Less": _elementwise(_order(-1), 2),
    "LessOrEqual": _elementwise(_order(-1, 0), 2),
    "Greater": _elementwise(_order(1), 2),
    "GreaterOrEqual": _elementwise(_order(0, 1), 2),
    "Not": _elementwise(lambda x: not x, 1),
    "And": _elementwise(lambda a, b: a and b, 2),
    "Or": _elementwise(lambda a, b: a or b, 2),
    "ReduceProd": _reduce(dims.multiply),
    "ReduceSum": _reduce(dims.add),
    "ReduceMax": _reduce(_larger),
    "ReduceMin": _reduce(_smaller),
}
"""By operator: the content of the first output from those of the inputs, None when it is not known."""
