"""The view of y = scale * x + shift per channel, and where a channel axis goes in nodes that only move elements."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as oir

from burnish.ir import match, weights
from burnish.ir.views.parameter import find_parameter, match_perm
from burnish.ir.walk import is_op

LAYOUT = ("Identity", "Transpose", "Reshape", "Flatten", "Squeeze", "Unsqueeze")
"""Operators that move elements and change none."""

PICKS = ("Gather", "Slice")
"""Operators that choose elements along some axes, and change none."""

STEPS = ("Mul", "Add", "Sub", "Div", "Neg")


@dataclass(frozen=True)
class Affine:
    """`output = scale * input + shift`, per channel along `axis`.

    Attributes:
        nodes: the nodes it consists of; the last one computes `output`.
        input: what it reads.
        scale: float64, one number a channel, or a single one.
        shift: like `scale`.
        axis: the channel axis counted from the front; None when both are single numbers.
    """

    nodes: tuple[oir.Node, ...]
    input: oir.Value
    scale: np.ndarray
    shift: np.ndarray
    axis: int | None

    @property
    def output(self) -> oir.Value:
        """What it computes."""
        return self.nodes[-1].outputs[0]

    @property
    def channels(self) -> int:
        """Channels; 1 when all are treated alike."""
        return max(self.scale.size, self.shift.size)

    @property
    def input_is_private(self) -> bool:
        """Whether nobody but its own nodes reads the input."""
        own = {id(node) for node in self.nodes}
        return not self.input.is_graph_output() and all(id(user) in own for user in match.consumers(self.input))

    def then(self, later: Affine) -> Affine | None:
        """This and then `later`, which reads this one's output; None when they differ in their channels."""
        axes = {axis for axis in (self.axis, later.axis) if axis is not None}
        if len(axes) > 1 or len({self.channels, later.channels} - {1}) > 1:
            return None
        scale, shift = self.scale * later.scale, self.shift * later.scale + later.shift
        return Affine((*self.nodes, *later.nodes), self.input, scale, shift, axes.pop() if axes else None)


def batch_affine(node: oir.Node, version: int) -> Affine | str:
    """What an inference BatchNormalization does, or in plain words why it is none.

    Args:
        node: a BatchNormalization.
        version: the opset of the model.
    """
    used = [out for out in node.outputs[1:] if out.uses() or out.is_graph_output()]
    if (
        match.attribute(node, "training_mode", 0)
        or used
        or (version < 14 and any(out.name for out in node.outputs[1:]))
    ):
        return "it runs in training mode"
    if match.rank(node.inputs[0]) == 1 or not match.attribute(node, "spatial", 1):
        return "it does not normalize channels on axis 1"
    found = [find_parameter(value) for value in node.inputs[1:5]]
    if node.inputs[0] is None or any(one is None for one in found):
        return "its statistics are computed at run time"
    gamma, beta, mean, variance = (one.read().reshape(-1) for one in found if one is not None)
    with np.errstate(all="ignore"):
        scale = gamma / np.sqrt(variance + float(match.attribute(node, "epsilon", 1e-5)))
        shift = beta - mean * scale
    if not (np.isfinite(scale).all() and np.isfinite(shift).all()):
        return "its variance makes the scale infinite"
    return Affine((node,), node.inputs[0], scale, shift, 1)


def step_affine(node: oir.Node | None) -> Affine | None:
    """A Mul, Add, Sub or Div with a constant that is uniform or per channel, or a Neg."""
    if node is None or not is_op(node, *STEPS):
        return None
    one, zero = np.ones(1), np.zeros(1)
    if is_op(node, "Neg"):
        value = node.inputs[0]
        floating = value is not None and value.dtype is not None and value.dtype.is_floating_point()
        return Affine((node,), value, -one, zero, None) if floating and value is not None else None
    pair = [find_parameter(value) for value in node.inputs]
    if (pair[0] is None) == (pair[1] is None):
        return None
    side = 0 if pair[0] is not None else 1
    parameter, value = pair[side], node.inputs[1 - side]
    if parameter is None or value is None or parameter.dtype is None or not parameter.dtype.is_floating_point():
        return None
    rank, shape = match.rank(value), parameter.shape
    if is_op(node, "Div") and side == 0 or (len(shape) > rank if rank is not None else len(shape) > 0):
        return None
    wide = [i for i, size in enumerate(shape) if size != 1]
    if len(wide) > 1 or (wide and (rank is None or match.dim(value, wide[0] - len(shape)) == 1)):
        return None
    axis = rank - len(shape) + wide[0] if wide and rank is not None else None
    number = parameter.read().reshape(-1)
    with np.errstate(all="ignore"):
        scale, shift = {
            "Mul": (number, zero),
            "Div": (1.0 / number, zero),
            "Add": (one, number),
            "Sub": (-one, number) if side == 0 else (one, -number),
        }[node.op_type]
    return Affine((node,), value, scale, shift, axis) if np.isfinite(scale).all() and np.isfinite(shift).all() else None


def add_affine(node: oir.Node | None, version: int) -> Affine | None:
    """The Add of a BatchNormalization of x and of x itself, plain or times a constant: `BN(x) + eta * x`."""
    if node is None or not is_op(node, "Add"):
        return None
    pair = match.operand(node, "BatchNormalization")
    batch = batch_affine(pair[0], version) if pair is not None else None
    if pair is None or not isinstance(batch, Affine) or not match.used_once(batch.output):
        return None
    if pair[1] is batch.input:
        return Affine((*batch.nodes, node), batch.input, batch.scale + 1.0, batch.shift, 1)
    kept = step_affine(pair[1].producer())
    if kept is None or kept.input is not batch.input or not match.used_once(kept.output) or kept.axis not in (None, 1):
        return None
    return Affine((*batch.nodes, *kept.nodes, node), batch.input, batch.scale + kept.scale, batch.shift + kept.shift, 1)


def axis_below(node: oir.Node, axis: int) -> int | None:
    """Where channel axis `axis` of the input of a layout node, or one that picks, is in its output.

    None when the node mixes it with others or picks some of the channels, or when that cannot be told.
    """
    if is_op(node, *PICKS):
        return _axis_picked(node, axis)
    if is_op(node, "Transpose"):
        rank = match.rank(node.inputs[0])
        return match_perm(node, rank).index(axis) if rank is not None else None
    return axis if is_op(node, "Identity") else _same_place(node.inputs[0], axis, node.outputs[0])


def _axis_picked(node: oir.Node, axis: int) -> int | None:
    rank = match.rank(node.inputs[0])
    if rank is None:
        return None
    if is_op(node, "Gather"):
        along, indices = match.attribute(node, "axis", 0) % rank, match.rank(node.inputs[1])
        if indices is None or along == axis:
            return None
        return axis if axis < along else axis - 1 + indices
    axes = match.attribute(node, "axes") or _integers(match.input_of(node, 3))
    if axes is None:
        starts = match.attribute(node, "starts") or _integers(match.input_of(node, 1))
        axes = list(range(len(starts))) if starts is not None and match.input_of(node, 3) is None else None
    return None if axes is None or axis in [one % rank for one in axes] else axis


def _integers(value: oir.Value | None) -> list[int] | None:
    return None if value is None else weights.integers(value)


def axis_above(node: oir.Node, axis: int) -> int | None:
    """Where channel axis `axis` of the output of a layout node is in its input; None when the node mixes it."""
    if is_op(node, "Transpose"):
        rank = match.rank(node.outputs[0]) or match.rank(node.inputs[0])
        return match_perm(node, rank)[axis] if rank is not None else None
    return axis if is_op(node, "Identity") else _same_place(node.outputs[0], axis, node.inputs[0])


def _same_place(one: oir.Value | None, axis: int, other: oir.Value | None) -> int | None:
    """The axis of `other` that runs over the elements of `axis` of `one`, two shapes of the same elements in order."""
    size, inner = match.dim(one, axis), inner_size(one, axis)
    if size is None or inner is None or other is None or other.shape is None:
        return None
    for place in range(len(other.shape)):
        if match.dim(other, place) == size and inner_size(other, place) == inner:
            return place
    return None


def inner_size(value: oir.Value | None, axis: int) -> tuple[int, tuple[str, ...]] | None:
    """How many elements one step along `axis` skips: a number and the symbols it is multiplied by."""
    if value is None or value.shape is None:
        return None
    number, symbols = 1, list[str]()
    for size in value.shape[axis + 1 :]:
        if isinstance(size, int):
            number *= size
        elif size.value is None:
            return None
        else:
            symbols.append(str(size.value))
    return number, tuple(sorted(symbols))


def chain(node: oir.Node, stop: Sequence[oir.Node] = ()) -> Affine | None:
    """The longest run of constant Mul, Add, Sub, Div and Neg that ends at `node`, whose inner values nobody else reads.

    Args:
        node: the last node.
        stop: nodes that are not part of it, such as the Add of a bias.
    """
    barred = {id(one) for one in stop}
    found = step_affine(node)
    while found is not None:
        above = found.input.producer()
        if above is None or id(above) in barred or above.graph is not node.graph or not match.used_once(found.input):
            return found
        earlier = step_affine(above)
        merged = earlier.then(found) if earlier is not None else None
        if merged is None:
            return found
        found = merged
    return None
