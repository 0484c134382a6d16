"""Finding normalizations that exporters spell out as arithmetic."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as oir

from burnish.ir import match, weights
from burnish.ir.views.norm import Norm
from burnish.ir.views.parameter import Parameter, find_parameter
from burnish.ir.walk import is_op


@dataclass(frozen=True)
class _Variance:
    """The mean square of `centred` over `axes`; `value` is x, `mean` its mean where it was subtracted."""

    value: oir.Value
    centred: oir.Value
    mean: oir.Value | None
    axes: tuple[int, ...]
    epsilon: float
    nodes: tuple[oir.Node, ...]


def find_spelled_norm(node: oir.Node) -> Norm | None:
    """A layer norm or RMS norm around `node`, the square root (or power of -0.5) of the variance plus epsilon.

    Known spellings: the variance from Pow or Mul; Div by the root, or Mul by its Reciprocal or by 1 / root; the gain
    multiplied to the result or to the reciprocal root; `x * m + (b - mean * m)` as TensorFlow writes it; Casts around.
    """
    variance = _variance(node)
    if variance is None:
        return None
    inverse = _inverse(node)
    nodes = [*variance.nodes, node]
    if inverse is None:
        quotient = match.sole_consumer(node.outputs[0], "Div")
        if (
            quotient is None
            or quotient.inputs[1] is not node.outputs[0]
            or not _is_centred(quotient.inputs[0], variance)
        ):
            return None
        nodes += _twin(quotient.inputs[0], variance)
        return _finish(variance, nodes, quotient, None)
    if inverse is not node:
        nodes.append(inverse)
    factor, gain = inverse.outputs[0], None
    step = match.sole_consumer(factor, "Mul")
    if step is not None and not any(_is_centred(value, variance) for value in step.inputs):
        gain = _gain(_other(step, factor), variance)
        if gain is None:
            return None
        nodes.append(step)
        factor = step.outputs[0]
        step = match.sole_consumer(factor, "Mul")
    if step is not None and _is_centred(_other(step, factor), variance):
        nodes += _twin(_other(step, factor), variance)
        return _finish(variance, nodes, step, gain)
    return _moved_mean(variance, nodes, factor, gain)


def _variance(node: oir.Node) -> _Variance | None:
    if is_op(node, "Pow") and weights.scalar(node.inputs[1]) != -0.5:
        return None
    inner = node.inputs[0]
    add = match.producer(inner, "Add")
    nodes: list[oir.Node] = []
    epsilon = 0.0
    if add is not None:
        pair = match.with_scalar(add)
        if pair is None or not 0 <= pair[1] <= 0.1:
            return None
        nodes, inner, epsilon = [add], pair[0], pair[1]
    mean = match.producer(inner, "ReduceMean")
    axes = _trailing_axes(mean)
    square = match.producer(mean.inputs[0], "Pow", "Mul") if mean is not None else None
    if mean is None or axes is None or square is None or square.inputs[0] is None:
        return None
    if is_op(square, "Mul") and square.inputs[0] is not square.inputs[1]:
        return None
    if is_op(square, "Pow") and weights.scalar(square.inputs[1]) != 2.0:
        return None
    nodes = [square, mean, *nodes]
    centred = square.inputs[0]
    subtract = match.producer(centred, "Sub")
    average = match.producer(subtract.inputs[1], "ReduceMean") if subtract is not None else None
    if subtract is None or average is None or subtract.inputs[0] is None or average.inputs[0] is not subtract.inputs[0]:
        return _Variance(centred, centred, None, axes, epsilon, tuple(nodes))
    if _trailing_axes(average) != axes:
        return None
    return _Variance(subtract.inputs[0], centred, average.outputs[0], axes, epsilon, (average, subtract, *nodes))


def _trailing_axes(node: oir.Node | None) -> tuple[int, ...] | None:
    """The axes of a ReduceMean that keeps its dims, counted from the end, when they are the last ones."""
    if node is None or not match.attribute(node, "keepdims", 1):
        return None
    axes, rank = match.axes_of(node), match.rank(node.inputs[0])
    if not axes or (rank is None and any(axis >= 0 for axis in axes)):
        return None
    found = tuple(sorted(axis if axis < 0 or rank is None else axis - rank for axis in axes))
    return found if found == tuple(range(-len(found), 0)) else None


def _inverse(root: oir.Node) -> oir.Node | None:
    """The node that gives one divided by the root: a Reciprocal, a Div of 1, or a Pow by -0.5 itself."""
    if is_op(root, "Pow"):
        return root
    node = match.sole_consumer(root.outputs[0], "Reciprocal", "Div")
    if node is None or is_op(node, "Reciprocal"):
        return node
    return node if weights.scalar(node.inputs[0]) == 1.0 and node.inputs[1] is root.outputs[0] else None


def _is_centred(value: oir.Value | None, variance: _Variance) -> bool:
    if value is variance.centred:
        return True
    node = match.producer(value, "Sub")
    return node is not None and variance.mean is not None and _subtracts(node, variance)


def _subtracts(node: oir.Node, variance: _Variance) -> bool:
    if node.inputs[0] is not variance.value:
        return False
    mean = match.producer(node.inputs[1], "ReduceMean")
    known = variance.mean.producer() if variance.mean is not None else None
    if mean is None or known is None:
        return False
    return mean is known or (mean.inputs[0] is variance.value and _trailing_axes(mean) == variance.axes)


def _twin(value: oir.Value | None, variance: _Variance) -> list[oir.Node]:
    """The nodes of a second, equal subtraction of the mean."""
    node = match.producer(value, "Sub")
    if value is variance.centred or node is None:
        return []
    mean = match.producer(node.inputs[1], "ReduceMean")
    known = variance.mean.producer() if variance.mean is not None else None
    return [node] if mean is known or mean is None else [mean, node]


def _other(node: oir.Node, value: oir.Value) -> oir.Value | None:
    return node.inputs[1] if node.inputs[0] is value else node.inputs[0]


def _gain(value: oir.Value | None, variance: _Variance) -> Parameter | None:
    """A constant that has one number a normalized element, or one for all."""
    found = find_parameter(value)
    rank = match.rank(variance.value)
    if found is None or found.dtype is None or not found.dtype.is_floating_point():
        return None
    normalized = len(variance.axes)
    if any(size != 1 for size in found.shape[: max(len(found.shape) - normalized, 0)]):
        return None
    if rank is None or len(found.shape) > rank:
        return None
    sizes = [match.dim(variance.value, axis) for axis in range(-min(normalized, len(found.shape)), 0)]
    actual = found.shape[-normalized:]
    whole = all(a in (1, s) for a, s in zip(actual, sizes, strict=True)) and None not in sizes
    return found if whole and int(np.prod(actual)) in (1, _size(variance)) else None


def _size(variance: _Variance) -> int:
    return int(np.prod([match.dim(variance.value, axis) or 0 for axis in variance.axes]))


def _moved_mean(variance: _Variance, nodes: list[oir.Node], factor: oir.Value, gain: Parameter | None) -> Norm | None:
    """`x * m + (b - mean * m)` with m the gain over the root."""
    if variance.mean is None:
        return None
    products = [user for user in match.consumers(factor) if is_op(user, "Mul")]
    if len(products) != 2 or len(factor.uses()) != 2:
        return None
    whole = next((p for p in products if _other(p, factor) is variance.value), None)
    moved = next((p for p in products if _other(p, factor) is variance.mean), None)
    subtract = match.sole_consumer(moved.outputs[0], "Sub") if moved is not None else None
    add = match.sole_consumer(subtract.outputs[0], "Add") if subtract is not None else None
    if whole is None or moved is None or subtract is None or add is None:
        return None
    bias = _gain(subtract.inputs[0], variance)
    if bias is None or subtract.inputs[1] is not moved.outputs[0] or whole.outputs[0] not in add.inputs:
        return None
    own = (*nodes, whole, moved, subtract, add)
    return Norm("layer", own, variance.value, add.outputs[0], variance.axes, variance.epsilon, gain, bias)


def _finish(variance: _Variance, nodes: list[oir.Node], last: oir.Node, gain: Parameter | None) -> Norm:
    """Take in the Cast back, the gain and the bias behind the normalized value, and the Cast before it."""
    nodes.append(last)
    kind = "rms" if variance.mean is None else "layer"
    source, compute = variance.value, None
    before, back = match.producer(source, "Cast"), match.sole_consumer(last.outputs[0], "Cast")
    origin = before.inputs[0].dtype if before is not None and before.inputs[0] is not None else None
    if before is not None and origin is not None and origin.is_floating_point():
        own = {id(node) for node in nodes}
        private = all(id(user) in own for user in match.consumers(source))
        to = oir.DataType(match.attribute(before, "to"))
        if back is not None and match.attribute(back, "to") == int(origin):
            source, compute = before.inputs[0], None if to == origin else to  # type: ignore[assignment]
            nodes = [*([before] if private else []), *nodes, back]
            last = back
    bias = None
    scaled = match.sole_consumer(last.outputs[0], "Mul")
    if gain is None and scaled is not None:
        gain = _gain(_other(scaled, last.outputs[0]), variance)
        if gain is not None:
            nodes.append(scaled)
            last = scaled
    shifted = match.sole_consumer(last.outputs[0], "Add")
    if kind == "layer" and shifted is not None:
        bias = _gain(_other(shifted, last.outputs[0]), variance)
        if bias is not None:
            nodes.append(shifted)
            last = shifted
    return Norm(kind, tuple(nodes), source, last.outputs[0], variance.axes, variance.epsilon, gain, bias, 0, compute)


def find_spelled_group(node: oir.Node) -> Norm | None:
    """A group norm spelled as Reshape to groups, InstanceNormalization without gain, Reshape back, gain and bias."""
    split, back = match.producer(node.inputs[0], "Reshape"), match.sole_consumer(node.outputs[0], "Reshape")
    gain, bias = find_parameter(node.inputs[1]), find_parameter(node.inputs[2])
    if split is None or back is None or gain is None or bias is None or split.inputs[0] is None:
        return None
    source, groups = split.inputs[0], gain.shape[0]
    channels, rank = match.dim(source, 1), match.rank(source)
    same = source.shape is not None and back.outputs[0].shape == source.shape and not source.shape.has_unknown_dim()
    if not same or channels is None or rank is None or channels % groups or match.dim(node.inputs[0], 1) != groups:
        return None
    if match.rank(node.inputs[0]) != 3 or not (gain.read() == 1).all() or bias.read().any():
        return None
    if source.shape[0] != node.inputs[0].shape[0]:  # type: ignore[index, union-attr]
        return None
    nodes, last, found = [split, node, back], back, dict[str, Parameter]()
    for op_type in ("Mul", "Add"):
        step = match.sole_consumer(last.outputs[0], op_type)
        one = find_parameter(_other(step, last.outputs[0])) if step is not None else None
        if step is None or one is None:
            continue
        aligned = (1,) * (rank - len(one.shape)) + one.shape
        if len(aligned) == rank and aligned == tuple(channels if axis == 1 else 1 for axis in range(rank)):
            nodes.append(step)
            found[op_type] = one
            last = step
    epsilon = float(match.attribute(node, "epsilon", 1e-5))
    out = last.outputs[0]
    return Norm("group", tuple(nodes), source, out, (), epsilon, found.get("Mul"), found.get("Add"), groups)


def near_miss(node: oir.Node) -> str | None:
    """Why `node` only resembles the root of a variance that `find_spelled_norm` sees; None when it does not even that.

    Args:
        node: a Sqrt, or a Pow by -0.5.
    """
    if not is_op(node, "Sqrt", "Pow") or (is_op(node, "Pow") and weights.scalar(node.inputs[1]) != -0.5):
        return None
    add = match.producer(node.inputs[0], "Add")
    pair = match.with_scalar(add) if add is not None else None
    mean = match.producer(pair[0] if pair is not None else node.inputs[0], "ReduceMean")
    square = match.producer(mean.inputs[0], "Pow", "Mul") if mean is not None else None
    if mean is None or square is None:
        return None
    if _trailing_axes(mean) is None:
        return "its statistics are not those of the last axes"
    if _variance(node) is None:
        return "what is averaged under the root is no square, or another mean was subtracted before"
    return "what is done with the root is no normalization of the same value"
