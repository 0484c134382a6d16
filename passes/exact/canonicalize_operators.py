"""One spelling for operators that exporters write in several ways."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import onnx_ir as oir

from burnish.ir import edit, match, weights
from burnish.ir.inference import Inference
from burnish.ir.walk import is_op, main_graphs
from burnish.passes.base import ExactPass, Outcome


@dataclass(frozen=True)
class CanonicalizeOperators(ExactPass):
    """Write operators one way: Cast for CastLike, Reciprocal for 1/x, Split for slices, MatMul for a reshaped Gemm."""

    def rewrite(self, model: oir.Model, outcome: Outcome) -> None:
        facts = Inference(model)
        for graph in main_graphs(model):
            for node in list(graph):
                for op_type, rule in _RULES:
                    if node.graph is not None and is_op(node, op_type):
                        rule(model, facts, node, outcome)


def _named(model: oir.Model, node: oir.Node, like: oir.Node, what: str) -> oir.Node:
    node.name = edit.unique_name(model, f"{like.name or like.op_type}.{what}")
    for out in node.outputs:
        out.name = edit.unique_name(model, f"{like.outputs[0].name}.{what}")
    return node


def _cast_like(model: oir.Model, facts: Inference, node: oir.Node, outcome: Outcome) -> None:
    to = facts.dtype(node.inputs[1])
    if to is None:
        outcome.skip(node, "the type it casts to is unknown")
    elif outcome.take(node):
        saturate = match.attribute(node, "saturate")
        edit.replace_node(node, edit.make("Cast", [node.inputs[0]], {"to": int(to), "saturate": saturate}, like=node))


def _inverse(model: oir.Model, facts: Inference, node: oir.Node, outcome: Outcome) -> None:
    one, value = weights.constant(node.inputs[0], largest=1), node.inputs[1]
    dtype, shape = facts.dtype(value), facts.shape(value)
    if one is None or one.size != 1 or value is None or weights.is_constant(value) or one.reshape(-1)[0] != 1:
        return
    if dtype is None or not dtype.is_floating_point() or shape is None or len(shape) < one.ndim:
        return
    if outcome.take(node):
        edit.replace_node(node, edit.make("Reciprocal", [value], like=node))


def _pick(model: oir.Model, facts: Inference, node: oir.Node, outcome: Outcome) -> None:
    """A Squeeze of a Slice of length one, or of one of the outputs of a Split, becomes a Gather of one position."""
    source = match.producer(node.inputs[0], "Slice", "Split")
    axes = match.axes_of(node)
    if source is None or node.inputs[0] is None or not axes or len(axes) != 1 or not match.used_once(node.inputs[0]):
        return
    shape = facts.shape(source.inputs[0])
    if shape is None:
        return
    axis = axes[0] % len(shape)
    position = _position(facts, source, node.inputs[0], axis, len(shape))
    if position is None or not isinstance(shape[axis], int) or not 0 <= position < int(shape[axis]):  # type: ignore[arg-type]
        return
    if outcome.take(node):
        index = edit.add_constant(model, "position", np.array(position, np.int64))
        edit.replace_node(node, edit.make("Gather", [source.inputs[0], index], {"axis": axis}, like=node))


def _position(facts: Inference, source: oir.Node, value: oir.Value, axis: int, rank: int) -> int | None:
    """The position on `axis` that a Slice or Split takes, when it takes one and cuts no other axis."""
    if source.op_type == "Split":
        parts = [facts.shape(out) for out in source.outputs]
        if match.attribute(source, "axis", 0) % rank != axis or any(p is None or p[axis] != 1 for p in parts):
            return None
        return list(source.outputs).index(value)
    from burnish.ir.content_rules import slices

    spans = slices(facts, source, rank)
    if spans is None or list(spans) != [axis]:
        return None
    start, end, step = spans[axis]
    return start if isinstance(start, int) and step == 1 and end == start + 1 and start >= 0 else None


def _split(model: oir.Model, facts: Inference, node: oir.Node, outcome: Outcome) -> None:
    """Slices that cut one axis into neighbouring pieces, all of it, become one Split."""
    from burnish.ir.content_rules import slices

    value, shape = node.inputs[0], facts.shape(node.inputs[0])
    if value is None or shape is None or facts.opset < 13 or facts.content(value) is not None:
        return
    pieces: dict[int, tuple[int, oir.Node]] = {}
    axes = set()
    for reader in match.consumers(value):
        spans = slices(facts, reader, len(shape)) if is_op(reader, "Slice") and reader.inputs[0] is value else None
        if spans is None or len(spans) != 1 or reader.graph is not node.graph or reader.outputs[0].is_graph_output():
            continue
        ((axis, (start, end, step)),) = spans.items()
        size = shape[axis]
        if step == 1 and isinstance(size, int) and isinstance(start, int) and isinstance(end, int):
            first, last, _ = slice(start, end).indices(size)
            axes.add(axis)
            if first not in pieces and last > first:
                pieces[first] = (last, reader)
    if len(axes) != 1 or len(pieces) < 2:
        return
    (axis,) = axes
    starts, at = [], 0
    while at in pieces:
        starts.append(at)
        at = pieces[at][0]
    if (
        at != shape[axis]
        or len(starts) != len(pieces)
        or node is not _first(node.graph, [pieces[s][1] for s in starts])
    ):
        return
    if outcome.take(node):
        nodes = [pieces[start][1] for start in starts]
        sizes = edit.add_constant(model, "split", np.array([pieces[s][0] - s for s in starts], np.int64))
        new = edit.make("Split", [value, sizes], {"axis": axis}, like=nodes, outputs=len(nodes))
        _named(model, new, node, "split")
        edit.insert_before(node, [new])
        for old, out in zip(nodes, new.outputs, strict=True):
            facts.set(out, facts.dtype(old.outputs[0]), facts.shape(old.outputs[0]))
            edit.replace_value(old.outputs[0], out)
        edit.remove_unused(nodes)


def _range(model: oir.Model, facts: Inference, node: oir.Node, outcome: Outcome) -> None:
    """Bounds that are vectors of one element, which runtimes accept only while they cannot see it, become scalars."""
    wrong = [index for index, value in enumerate(node.inputs) if facts.shape(value) == (1,)]
    if wrong and outcome.take(node):
        for index in wrong:
            step = _named(model, edit.make("Squeeze", [node.inputs[index]], like=node), node, "scalar")
            edit.insert_before(node, [step])
            step.outputs[0].type, step.outputs[0].shape = node.inputs[index].type, oir.Shape([])  # type: ignore[union-attr]
            facts.set(step.outputs[0], facts.dtype(node.inputs[index]), ())
            node.replace_input_with(index, step.outputs[0])


def _first(graph: oir.Graph | oir.Function | None, nodes: list[oir.Node]) -> oir.Node | None:
    wanted = {id(node) for node in nodes}
    return next((node for node in graph or () if id(node) in wanted), None)


def _gemm(model: oir.Model, facts: Inference, node: oir.Node, outcome: Outcome) -> None:
    """Reshape to a matrix, Gemm, Reshape back (a linear layer on more than two axes) becomes MatMul and Add."""
    before, after = match.producer(node.inputs[0], "Reshape"), match.sole_consumer(node.outputs[0], "Reshape")
    weight, bias = node.inputs[1], match.input_of(node, 2)
    if before is None or after is None or weight is None:
        return
    source, result = facts.shape(before.inputs[0]), facts.shape(after.outputs[0])
    matrix, out = facts.shape(before.outputs[0]), facts.shape(node.outputs[0])
    if not source or not result or matrix is None or out is None or source[-1] != matrix[-1]:
        return
    if result != source[:-1] + out[-1:]:
        return
    scaled = match.attribute(node, "alpha", 1.0) != 1 or match.attribute(node, "beta", 1.0) != 1
    if scaled or match.attribute(node, "transA", 0):
        outcome.skip(node, "it transposes its input or scales its result")
        return
    if match.attribute(node, "transB", 0) and not weights.is_constant(weight):
        outcome.skip(node, "its weight is transposed and computed at run time")
        return
    if bias is not None and len(facts.shape(bias) or (0, 0)) > 1:
        outcome.skip(node, "its bias is no vector")
        return
    if not outcome.take(node):
        return
    new = []
    if match.attribute(node, "transB", 0):
        new.append(_named(model, edit.make("Transpose", [weight], {"perm": [1, 0]}, like=node), node, "T"))
        weight = new[0].outputs[0]
    new.append(_named(model, edit.make("MatMul", [before.inputs[0], weight], like=node), node, "matmul"))
    if bias is not None:
        new.append(_named(model, edit.make("Add", [new[-1].outputs[0], bias], like=[node, after]), node, "bias"))
    for made in new:
        product = made.op_type != "Transpose"
        made.outputs[0].type = after.outputs[0].type
        made.outputs[0].shape = after.outputs[0].shape if product else None
    edit.replace_node(after, new)


_RULES: list[tuple[str, Callable[[oir.Model, Inference, oir.Node, Outcome], None]]] = [
    ("CastLike", _cast_like),
    ("Div", _inverse),
    ("Squeeze", _pick),
    ("Slice", _split),
    ("Gemm", _gemm),
    ("Range", _range),
]
