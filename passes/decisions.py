"""Edits behind which a model decides: what they change a little is tipped there, or not noticed at all.

The graph does not tell which, so that no edit is refused for it: a Round to 255 levels loses less than the integers
before it, a Sign ten times as much, and of all the layers before it each one alone tips nearly as much as all together.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

import onnx_ir as oir

from burnish.ir import match
from burnish.ir.network import network
from burnish.ir.walk import is_op
from burnish.passes.layers import layers
from burnish.passes.lossy import Edit

_DECIDING = (
    *("Round", "Floor", "Ceil", "Sign", "Hardmax", "ArgMax", "ArgMin", "NonZero", "NonMaxSuppression", "TopK"),
    *("Equal", "Greater", "GreaterOrEqual", "Less", "LessOrEqual", "Cast"),
)


def notes(model: oir.Model, edits: Iterable[Edit]) -> Counter[str]:
    """What to say of edits that reach the outputs only through operators that decide, with layers behind these.

    One that decides and has no layer behind it is how detectors and classifiers end, and nothing is said of it.
    """
    import networkx as nx

    whole = network(model.graph)
    ahead = {one for layer in layers(model).values() if layer.node in whole for one in nx.ancestors(whole, layer.node)}
    deciding = {node for node in whole if _decides(node)}
    smooth = whole.copy()
    smooth.remove_nodes_from([node for node in whole if node in deciding or is_op(node, "Shape", "Size")])
    ends = {node for node in smooth if any(value.is_graph_output() for value in node.outputs)}
    nodes, found = {str(node.name): node for node in smooth}, Counter[str]()
    for edit in edits:
        own = {nodes[name] for name in edit.claims if name in nodes}
        reached = own.union(*(nx.descendants(smooth, node) for node in own))
        kinds = {one.op_type for node in reached for one in whole.successors(node) if one in deciding & ahead}
        if kinds and reached.isdisjoint(ends):
            named = ", ".join(f"`{kind}`" for kind in sorted(kinds))
            told = f"before {named} inside the model, where small changes tip: seen in the loss, in no layer's error"
            found[told] += 1
    return found


def _decides(node: oir.Node) -> bool:
    """Whether it makes of floating-point numbers what does not follow them step by step."""
    read = match.input_of(node, 0)
    if not is_op(node, *_DECIDING) or read is None or read.dtype is None or not read.dtype.is_floating_point():
        return False
    if is_op(node, "TopK"):  # the numbers that it gives follow, the places do not
        return not (node.outputs[0].uses() or node.outputs[0].is_graph_output())
    return not is_op(node, "Cast") or not oir.DataType(match.attribute(node, "to")).is_floating_point()
