"""A residual sum and the normalization behind it, which one operator of com.microsoft computes, as two operators."""

from __future__ import annotations

import onnx_ir as oir

from burnish.ir import edit, match
from burnish.ir.views.flow import SKIP_NORMS
from burnish.ir.views.parameter import same_shape
from burnish.ir.walk import is_op


def not_splittable(node: oir.Node) -> str | None:
    """Why a skip-normalization cannot be taken apart, in plain words; None when it can."""
    if any(out.uses() or out.is_graph_output() for out in node.outputs[1:3]):
        return "its mean or deviation is read"
    return None if _typed(node) is not None else "the rank of its input is not known"


def _typed(node: oir.Node) -> oir.Value | None:
    """One of the two streams that are added, of known rank; they have the same shape."""
    return next((value for value in node.inputs[:2] if match.rank(value) is not None), None)


def split(node: oir.Node) -> oir.Value:
    """Write a skip-normalization as a Sum and the normalization behind it, and give the sum.

    ONNX Runtime's own optimizer joins an Add with the LayerNormalization behind it; a Sum it leaves.

    Args:
        node: a SkipLayerNormalization or SkipSimplifiedLayerNormalization for which `not_splittable` has no reason.
    """
    simplified = is_op(node, SKIP_NORMS[1], domain="com.microsoft")
    gamma, beta = node.inputs[2], None if simplified else match.input_of(node, 3)
    bias = match.input_of(node, 3 if simplified else 4)
    nodes: list[oir.Node] = []
    first = node.inputs[0]
    typed = _typed(node)
    if bias is not None and typed is not None:
        nodes.append(edit.make("Add", [first, bias], like=node))
        first = same_shape(nodes[-1], typed)
    total = edit.make("Sum", [first, node.inputs[1]], like=node)
    if typed is not None:
        same_shape(total, typed)
    attributes = {"axis": -1, "epsilon": match.attribute(node, "epsilon", 1e-12)}
    name = "SimplifiedLayerNormalization" if simplified else "LayerNormalization"
    norm = edit.make(name, [total.outputs[0], gamma, beta], attributes, like=node)
    values = [norm.outputs[0], *(total.outputs[0] for _ in node.outputs[1:])]
    edit.replace_node(node, [*nodes, total, norm], values)
    edit.remove_unused([norm])  # the sum alone may have been read
    return total.outputs[0]
