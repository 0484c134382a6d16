"""HardSigmoid, HardSwish and arithmetic with one number between rounded values, as kernels on integers have them."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import onnx_ir as oir

from burnish.ir import edit, match, weights
from burnish.ir.views.parameter import same_shape
from burnish.ir.walk import is_op
from burnish.passes import qdq
from burnish.passes.grids import Grid, Scales
from burnish.passes.integer_flow import settled
from burnish.passes.ranges import EVERYTHING

_LEVELS = Grid(8, signed=False, symmetric=False)
_ENDS = (("low", 0.0), ("high", 1.0))
_UNIT = Scales(_LEVELS, np.asarray(1 / 255, np.float32), np.zeros((), np.uint8))
"""From 0 to 1."""


def spell_out(model: oir.Model, node: oir.Node) -> None:
    """Write a HardSigmoid or HardSwish that reads a rounded value and whose result is rounded as what integers do.

    HardSigmoid(x) = Clip(a x + b, 0, 1): a x has the integers of x with another scale, b is one integer, and the Clip
    vanishes in a range from 0 to 1. HardSwish(x) is x times that.

    Args:
        model: the model.
        node: the node; it is removed.
    """
    rounded = node.inputs[0]
    assert rounded is not None
    scales, back = qdq.scales_of(rounded), rounded.producer()
    if scales is None or back is None:
        return
    swish = is_op(node, "HardSwish")
    alpha = 1 / 6 if swish else float(match.attribute(node, "alpha", 0.2))
    beta = 0.5 if swish else float(match.attribute(node, "beta", 0.5))
    if alpha <= 0 or beta <= 0:
        return
    stem = str(node.outputs[0].name or "gate")
    steeper = _reread(model, back, qdq.scaled(scales, alpha), node)
    total = edit.make("Add", [steeper.outputs[0], steeper.outputs[0]], like=node)
    ends = [edit.add_constant(model, f"{stem}_{name}", np.asarray(end, np.float32)) for name, end in _ENDS]
    clipped = edit.make("Clip", [total.outputs[0], *ends], like=node)
    for one in (total, clipped):
        same_shape(one, node.outputs[0])
    edit.insert_before(node, [steeper, total])
    edit.set_input(total, 1, edit.add_constant(model, f"{stem}_offset", np.asarray(beta, np.float32)))
    round_number(model, total)
    if not swish:
        edit.replace_node(node, clipped)
        return
    product = edit.make("Mul", [rounded, clipped.outputs[0]], like=node)
    same_shape(product, node.outputs[0])
    edit.replace_node(node, [clipped, product])
    qdq.put_pair(model, clipped.outputs[0], _UNIT)


def told_apart(value: oir.Value) -> tuple[float, float]:
    """Between which ends its readers tell the numbers of a value apart; what is beyond an end is to them like the end.

    A HardSwish makes 0 of everything below -3; a HardSigmoid and a Clip are constant on both sides.
    """
    readers = match.consumers(value)
    if value.is_graph_output() or not readers:
        return EVERYTHING
    ends = [_told_apart(node, value) for node in readers]
    return min(low for low, _ in ends), max(high for _, high in ends)


def telling(model: oir.Model, values: Iterable[oir.Value]) -> tuple[oir.Model, dict[oir.Value, oir.Value]]:
    """Where a range is looked for: a copy of the model, and what stands there for each value.

    Of a value that is added to another one, and the sum goes through a Relu, what is below the negative of the other
    makes no difference: the Relu makes 0 of the sum. So what stands for it is the larger of both.

    Args:
        model: the model; not changed.
        values: of its main graph.
    """
    copy = model.clone()
    copies = {one.name: one for one in (*copy.graph.inputs, *(out for node in copy.graph for out in node.outputs))}
    found = {}
    for value in values:
        found[value] = own = copies[value.name]
        add = match.sole_consumer(own, "Add")
        other = None if add is None else add.inputs[1 if add.inputs[0] is own else 0]
        if add is None or other is None or other is own or settled(add.outputs[0]) is add.outputs[0]:
            continue
        if own.shape is None or own.shape != other.shape:
            continue
        negative = edit.make("Neg", [other], like=add)
        larger = edit.make("Max", [own, negative.outputs[0]], like=add)
        for one in (negative, larger):
            same_shape(one, own)
            one.outputs[0].name = edit.unique_name(copy, f"{own.name}_telling")
        edit.insert_before(add, [negative, larger])
        found[value] = larger.outputs[0]
    return copy, found


def _told_apart(node: oir.Node, value: oir.Value) -> tuple[float, float]:
    if node.inputs[0] is not value:
        return EVERYTHING
    if is_op(node, "HardSwish"):
        return -3.0, np.inf
    if is_op(node, "HardSigmoid"):
        alpha, beta = (float(match.attribute(node, name, usual)) for name, usual in (("alpha", 0.2), ("beta", 0.5)))
        return (-beta / alpha, (1 - beta) / alpha) if alpha > 0 else EVERYTHING
    return EVERYTHING


def round_number(model: oir.Model, node: oir.Node) -> None:
    """Let the one number that an Add takes to something be an integer: 1, or -1 with a zero point, times its size."""
    pair = match.with_constant(node)
    if pair is None:
        return
    number = np.asarray(weights.constant(pair[1]))
    if number.size != 1:
        return
    size, below = np.abs(number).reshape(()).astype(np.float32), bool(number.reshape(()) < 0)
    scales = Scales(_LEVELS, size, np.asarray(int(below), np.uint8))
    index = 1 if node.inputs[1] is pair[1] else 0
    qdq.put_weight(model, node, index, np.full(number.shape, int(not below), np.uint8), scales)


def rescale(model: oir.Model, value: oir.Value, scales: Scales) -> None:
    """Let the integers of a rounded value that is multiplied by a number be read with scales that hold the number.

    Args:
        model: the model.
        value: the product; the node that computes it is removed.
        scales: of the product.
    """
    node = value.producer()
    pair = None if node is None else match.with_constant(node)
    back = None if pair is None else match.producer(pair[0], "DequantizeLinear")
    if node is None or back is None:
        raise ValueError(f"`{value.name}` is no product of a rounded value")
    edit.replace_node(node, _reread(model, back, scales, node))


def _reread(model: oir.Model, back: oir.Node, scales: Scales, like: oir.Node) -> oir.Node:
    """A DequantizeLinear of the integers that `back` reads, with other scales."""
    stem = str(like.outputs[0].name or "value")
    slope = edit.add_constant(model, f"{stem}_slope", np.asarray(scales.scale))
    node = edit.make("DequantizeLinear", [back.inputs[0], slope, *back.inputs[2:]], like=like)
    same_shape(node, like.outputs[0])
    return node
