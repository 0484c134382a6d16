"""Chains of operators that only move elements become one operator, and moves that the next operator implies go away."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import onnx_ir as oir

from burnish.ir import dims, edit, match, weights
from burnish.ir.inference import Inference, Shape, reshape_target
from burnish.ir.walk import is_op, main_graphs
from burnish.passes.base import ExactPass, Outcome

_BROADCASTING = tuple("Add Sub Mul Div And Or Where Equal Less LessOrEqual Greater GreaterOrEqual Pow".split())


@dataclass(frozen=True)
class MergeMoves(ExactPass):
    """Merge neighbouring Transpose, Reshape, Unsqueeze and Cast nodes, and drop Expand where the reader broadcasts."""

    def rewrite(self, model: oir.Model, outcome: Outcome) -> None:
        facts = Inference(model)
        for graph in main_graphs(model):
            for node in list(graph):
                rule = _RULES.get(node.op_type)
                if rule is not None and node.graph is not None and is_op(node, node.op_type):
                    rule(model, facts, node, outcome)


def _put(facts: Inference, node: oir.Node, new: oir.Node) -> oir.Node:
    facts.set(new.outputs[0], facts.dtype(node.outputs[0]), facts.shape(node.outputs[0]))
    edit.replace_node(node, new)
    return new


def _transpose(model: oir.Model, facts: Inference, node: oir.Node, outcome: Outcome) -> None:
    above = match.producer(node.inputs[0], "Transpose")
    if above is None:
        return
    rank = len(facts.shape(node.inputs[0]) or ())
    first = match.attribute(above, "perm") or range(rank - 1, -1, -1)
    second = match.attribute(node, "perm") or range(rank - 1, -1, -1)
    if rank and outcome.take(node):
        order = [first[axis] for axis in second]
        _put(facts, node, edit.make("Transpose", [above.inputs[0]], {"perm": order}, like=[node, above]))


def _reshape(model: oir.Model, facts: Inference, node: oir.Node, outcome: Outcome) -> None:
    above = match.producer(node.inputs[0], "Reshape", "Squeeze", "Unsqueeze", "Flatten", "Transpose")
    result = facts.shape(node.outputs[0])
    if above is None or result is None:
        return
    if above.op_type == "Transpose":
        _batched_transpose(model, facts, node, above, result, outcome)
        return
    target = reshape_target(facts.shape(above.inputs[0]), result)
    if target is None or not outcome.take(node):
        return
    shape = edit.add_constant(model, f"{node.outputs[0].name}.shape", np.array(target, np.int64))
    _put(facts, node, edit.make("Reshape", [above.inputs[0], shape], like=[node, above]))


def _batched_transpose(
    model: oir.Model, facts: Inference, node: oir.Node, above: oir.Node, result: Shape, outcome: Outcome
) -> None:
    """Axes merged into one, the last two exchanged, the merged ones parted again: one Transpose does it."""
    top, perm = match.producer(above.inputs[0], "Reshape"), match.attribute(above, "perm")
    source = facts.shape(top.inputs[0]) if top is not None else None
    middle = facts.shape(above.inputs[0])
    if top is None or source is None or middle is None or list(perm or ()) != [0, 2, 1] or len(source) != len(result):
        return
    kept = middle[1:] == source[-2:] and middle[0] == dims.product(source[:-2])
    if not kept or result != (*source[:-2], source[-1], source[-2]) or not outcome.take(node):
        return
    last = len(source) - 1
    order = [*range(last - 1), last, last - 1]
    new = _put(facts, node, edit.make("Transpose", [top.inputs[0]], {"perm": order}, like=[node, above, top]))
    _transpose(model, facts, new, outcome)


def _unsqueeze(model: oir.Model, facts: Inference, node: oir.Node, outcome: Outcome) -> None:
    above = match.producer(node.inputs[0], "Unsqueeze")
    inner, outer = (match.axes_of(above), match.axes_of(node)) if above is not None else (None, None)
    shape = facts.shape(node.outputs[0])
    if above is None or not inner or not outer or shape is None or not outcome.take(node):
        return
    rank = len(shape)
    new = {axis % rank for axis in outer}
    rest = [axis for axis in range(rank) if axis not in new]
    axes = sorted(new | {rest[axis % len(rest)] for axis in inner})
    if facts.opset >= 13:
        value = edit.add_constant(model, "axes", np.array(axes, np.int64))
        made = edit.make("Unsqueeze", [above.inputs[0], value], like=[node, above])
    else:
        made = edit.make("Unsqueeze", [above.inputs[0]], {"axes": axes}, like=[node, above])
    _put(facts, node, made)


def _cast(model: oir.Model, facts: Inference, node: oir.Node, outcome: Outcome) -> None:
    """A cast that loses nothing, before another cast, is not needed."""
    above = match.producer(node.inputs[0], "Cast")
    before = facts.dtype(above.inputs[0]) if above is not None else None
    between, after = facts.dtype(node.inputs[0]), facts.dtype(node.outputs[0])
    if above is None or before is None or between is None or after is None or not _widens(before, between):
        return
    if outcome.take(node):
        _put(facts, node, edit.make("Cast", [above.inputs[0]], {"to": int(after)}, like=[node, above]))


def _widens(narrow: oir.DataType, wide: oir.DataType) -> bool:
    types = oir.DataType
    chains = (
        [types.BOOL, types.INT32, types.INT64],
        [types.BOOL, types.INT32, types.DOUBLE],
        [types.BOOL, types.FLOAT, types.DOUBLE],
        [types.FLOAT16, types.FLOAT, types.DOUBLE],
        [types.BFLOAT16, types.FLOAT, types.DOUBLE],
    )
    return any(narrow in c and wide in c and c.index(narrow) <= c.index(wide) for c in chains)


def _expand(model: oir.Model, facts: Inference, node: oir.Node, outcome: Outcome) -> None:
    """An Expand whose readers broadcast to the same result without it goes away."""
    out, source = node.outputs[0], facts.shape(node.inputs[0])
    readers = match.consumers(out)
    if source is None or out.is_graph_output() or not readers or weights.is_constant(node.inputs[0]):
        return
    for reader in readers:
        shapes = [source if value is out else facts.shape(value) for value in reader.inputs]
        if not is_op(reader, *_BROADCASTING) or any(shape is None for shape in shapes):
            return
        if sum(value is out for value in reader.inputs) != 1 or facts.shape(reader.outputs[0]) is None:
            return
        if dims.broadcast_shapes(*(shape for shape in shapes if shape is not None)) != facts.shape(reader.outputs[0]):
            return
    if outcome.take(node):
        edit.bypass(node)


_RULES: dict[str, Callable[[oir.Model, Inference, oir.Node, Outcome], None]] = {
    "Transpose": _transpose,
    "Reshape": _reshape,
    "Unsqueeze": _unsqueeze,
    "Cast": _cast,
    "Expand": _expand,
}
