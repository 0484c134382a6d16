"""Regions of nodes that can compute in another order of axes, so that the Transposes around them go."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as oir

from burnish.ir import edit, match, weights
from burnish.ir.views.parameter import match_perm
from burnish.ir.walk import is_op

_UNARY = (
    "Abs Cast Ceil Celu Clip Cos Elu Erf Exp Floor Gelu HardSigmoid HardSwish Identity LeakyRelu Log Mish Neg Not "
    "Reciprocal Relu Round Selu Sigmoid Sign Sin Softplus Softsign Sqrt Tanh ThresholdedRelu"
).split()
_ELEMENTWISE = "Add And Div Equal Greater Less Max Min Mul Or Pow Sub Sum Where Xor".split()
_REDUCE = "ReduceL1 ReduceL2 ReduceMax ReduceMean ReduceMin ReduceProd ReduceSum ReduceSumSquare".split()
_AXIS = ("Concat", "Softmax", "LogSoftmax", "Split")
_MOVABLE = (*_UNARY, *_ELEMENTWISE, *_REDUCE, *_AXIS, "Pad")

_UNKNOWN_SIZE = 64
_LARGEST_REGION = 400

Perm = tuple[int, ...]


def inverse(perm: Perm) -> Perm:
    """The permutation that undoes `perm`."""
    return tuple(int(i) for i in np.argsort(perm))


def elements(value: oir.Value) -> int:
    """Elements of a value; a dimension that is not known counts as 64."""
    return int(
        np.prod([size if isinstance(size, int) else _UNKNOWN_SIZE for size in value.shape or ()], dtype=np.int64)
    )


@dataclass(frozen=True)
class Region:
    """Nodes that compute on values a Transpose by `perm` reads, and can compute on its result instead.

    Attributes:
        perm: the permutation that takes today's order of axes to the new one.
        nodes: in the order of the graph.
        entering: computed values from outside that the nodes read as data.
        leaving: values of the nodes that somebody outside reads, other than by a Transpose by `perm`.
        ends: the Transposes by `perm` that read the nodes' values.
    """

    perm: Perm
    nodes: tuple[oir.Node, ...]
    entering: tuple[oir.Value, ...]
    leaving: tuple[oir.Value, ...]
    ends: tuple[oir.Node, ...]

    @property
    def saved(self) -> int:
        """Elements moved by Transposes today less those moved, or kept twice as constants, afterwards."""
        own = {id(node) for node in self.nodes}
        constants = {id(v): v for node in self.nodes for v in _data(node) if weights.is_constant(v)}
        copied = [v for v in constants.values() if any(id(user) not in own for user in match.consumers(v))]
        total = sum(elements(end.outputs[0]) for end in self.ends) - sum(elements(value) for value in self.leaving)
        total -= sum(elements(value) for value in copied if match.rank(value))
        for value in self.entering:
            if _undone(value, self.perm) is None:
                total -= elements(value)
            elif not value.is_graph_output() and all(id(user) in own for user in match.consumers(value)):
                total += elements(value)
        return total


def find_region(end: oir.Node, perm: Perm, version: int, *, downwards: bool) -> Region | None:
    """The region that a Transpose ends.

    Args:
        end: a Transpose by `perm`.
        perm: its permutation.
        version: the opset of the model.
        downwards: take in what else reads the region's values, and not only what they are computed from.
    """
    found: dict[int, oir.Node] = {}
    pending = [end.inputs[0].producer() if end.inputs[0] is not None else None]
    while pending:
        node = pending.pop()
        if node is None or id(node) in found or not _movable(node, end, perm, version):
            continue
        found[id(node)] = node
        if len(found) > _LARGEST_REGION:
            return None
        pending += [value.producer() for value in _data(node) if _undone(value, perm) is None]
        if downwards:
            pending += [user for out in node.outputs for user in match.consumers(out)]
    if not found:
        return None
    nodes = tuple(node for node in end.graph or () if id(node) in found)
    data = {id(v): v for node in nodes for v in _data(node) if not weights.is_constant(v)}
    entering = tuple(v for v in data.values() if (p := v.producer()) is None or id(p) not in found)
    leaving, ends = [], []
    for out in (out for node in nodes for out in node.outputs):
        users = [user for user in match.consumers(out) if id(user) not in found]
        closing = [user for user in users if is_op(user, "Transpose") and match_perm(user, len(perm)) == perm]
        ends += closing
        if out.is_graph_output() or len(closing) < len(users):
            leaving.append(out)
    return Region(perm, nodes, entering, tuple(leaving), tuple(ends))


def move(model: oir.Model, region: Region) -> None:
    """Let the nodes of the region compute in the new order of axes."""
    moved: dict[int, oir.Value] = {}
    for node in region.nodes:
        _move_node(model, node, region.perm, moved)
    for end in region.ends:
        edit.replace_value(end.outputs[0], moved[id(end.inputs[0])])
    edit.remove_unused(region.ends)
    owner = {id(out): node for node in region.nodes for out in node.outputs}
    for value in region.leaving:
        node = owner[id(value)]
        back = edit.make("Transpose", [moved[id(value)]], {"perm": inverse(region.perm)}, like=node)
        edit.insert_before(node, [back])
        edit.replace_value(value, back.outputs[0])
    edit.remove_unused(reversed(region.nodes))


def _undone(value: oir.Value | None, perm: Perm) -> oir.Value | None:
    """What a Transpose read to compute `value`, when a Transpose by `perm` would undo it."""
    node = match.producer(value, "Transpose")
    return node.inputs[0] if node is not None and match_perm(node, len(perm)) == inverse(perm) else None


def _data(node: oir.Node) -> Iterator[oir.Value]:
    inputs = node.inputs if is_op(node, *_ELEMENTWISE, "Concat") else node.inputs[:1]
    yield from (value for value in inputs if value is not None)


def _movable(node: oir.Node, end: oir.Node, perm: Perm, version: int) -> bool:
    if not is_op(node, *_MOVABLE) or node.graph is not end.graph or None in node.inputs[:1]:
        return False
    if any(match.rank(out) != len(perm) for out in node.outputs):
        return False
    for value in _data(node):
        if match.rank(value) != len(perm) and not weights.is_constant(value):
            return False
    if all(weights.is_constant(value) for value in _data(node)):
        return False
    if is_op(node, *_REDUCE):
        return bool(match.attribute(node, "keepdims", 1)) and bool(match.axes_of(node))
    if is_op(node, "Softmax", "LogSoftmax"):
        # Along any axis but the last, runtimes transpose inside the operator.
        axis, last = int(match.attribute(node, "axis", -1)) % len(perm), len(perm) - 1
        return version >= 13 and (axis != last or inverse(perm)[axis] == last)
    if is_op(node, "Pad"):
        return match.input_of(node, 3) is None and weights.integers(match.input_of(node, 1)) is not None
    return True


def _move_node(model: oir.Model, node: oir.Node, perm: Perm, moved: dict[int, oir.Value]) -> None:
    data = {id(value) for value in _data(node)}
    inputs = [_moved(model, v, node, perm, moved) if v is not None and id(v) in data else v for v in node.inputs]
    attributes: dict[str, Any] = {name: one for name, one in node.attributes.items()}
    place = inverse(perm)
    if is_op(node, *_AXIS):
        default = 0 if is_op(node, "Split") else -1
        attributes["axis"] = place[int(match.attribute(node, "axis", default)) % len(perm)]
    elif is_op(node, *_REDUCE):
        axes = [place[axis % len(perm)] for axis in match.axes_of(node) or ()]
        if "axes" in attributes:
            attributes["axes"] = axes
        else:
            inputs[1] = edit.add_constant(model, f"{node.outputs[0].name}_axes", np.asarray(axes, np.int64))
    elif is_op(node, "Pad"):
        pads = np.asarray(weights.integers(node.inputs[1]), np.int64).reshape(2, -1)[:, list(perm)]
        inputs[1] = edit.add_constant(model, f"{node.outputs[0].name}_pads", pads.reshape(-1))
    new = edit.make(node.op_type, inputs, attributes, like=node, domain=node.domain, outputs=len(node.outputs))
    edit.insert_before(node, [new])
    for old, out in zip(node.outputs, new.outputs, strict=True):
        out.type, out.shape = old.type, _permuted(old, perm)
        moved[id(old)] = out


def _moved(model: oir.Model, value: oir.Value, node: oir.Node, perm: Perm, moved: dict[int, oir.Value]) -> oir.Value:
    """`value` in the new order of axes: what a Transpose was made from, a permuted constant, or a new Transpose."""
    known = moved.get(id(value)) or _undone(value, perm)
    if known is not None:
        return known
    array = weights.constant(value)
    if array is None:
        step = edit.make("Transpose", [value], {"perm": perm}, like=node)
        edit.insert_before(node, [step])
        step.outputs[0].type, step.outputs[0].shape = value.type, _permuted(value, perm)
        moved[id(value)] = step.outputs[0]
        return step.outputs[0]
    if array.size == 1 and array.ndim <= 1:
        return value
    exact = weights.exact(value)
    name = f"{value.name or 'constant'}_moved"
    full = (1,) * (len(perm) - array.ndim) + array.shape
    tensor = weights.tensor_of(value)
    if exact is not None and tensor is not None:
        moved[id(value)] = edit.add_rounded(model, name, exact.reshape(full).transpose(perm), tensor.dtype)
    else:
        moved[id(value)] = edit.add_constant(model, name, np.ascontiguousarray(array.reshape(full).transpose(perm)))
    return moved[id(value)]


def _permuted(value: oir.Value, perm: Perm) -> oir.Shape | None:
    return oir.Shape([value.shape[axis] for axis in perm]) if value.shape is not None else None
