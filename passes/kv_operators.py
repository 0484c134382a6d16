"""Attention operators that read the keys and values that another one gives, and queries without keys beside them.

What ONNX Runtime does with each operator when keys are longer than queries and no past is given was measured; the
tests of `share-kv` hold every spelling to it.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as oir

from burnish.ir import edit, match
from burnish.ir.inference import Inference
from burnish.ir.views.attention_layer import AttentionLayer
from burnish.ir.views.heads import Axes
from burnish.ir.views.parameter import find_parameter
from burnish.ir.views.projection import Projection
from burnish.ir.walk import STANDARD_DOMAINS, is_op

_CONTRIB = "com.microsoft"
_LAYOUTS = (("b", "s", "hd"), ("b", "s", "d"), ("b", "s", "h", "d"), ("b", "h", "s", "d"))
"""How queries may be laid out that are to be made by a matrix of their own."""

_QUANTIZED = ("k_quant_type", "v_quant_type", "kv_cache_bit_width")


def obstacle(layer: AttentionLayer) -> str | None:
    """Why an operator that joins new and older keys cannot read those of another, in plain words; None when it can."""
    node = layer.anchor
    if node.domain in STANDARD_DOMAINS and node.op_type == "Attention":
        if match.input_of(node, 6) is not None:
            return "it counts its keys by `nonpad_kv_seqlen`"
        if len(node.outputs) > 3 and (node.outputs[3].uses() or node.outputs[3].is_graph_output()):
            return "its scores are read elsewhere"
        return None
    if is_op(node, "MultiHeadAttention", domain=_CONTRIB):
        if match.attribute(node, "unidirectional", 0):
            return "`unidirectional` counts from the first key when no past is given"
        if len(node.outputs) > 3 or match.input_of(node, 8) is not None:
            return "it gives its scores, or writes into a buffer of full length"
        return None
    if is_op(node, "GroupQueryAttention", domain=_CONTRIB):
        if len(node.outputs) > 3 or len(node.inputs) > 12 or any(name in node.attributes for name in _QUANTIZED):
            return "it gives its scores, or its cache is quantized"
        return None
    return f"there is no form of {node.op_type} that reads keys of another"


def lengths(node: oir.Node) -> list[oir.Value | None]:
    """The inputs by which an operator counts the keys that are there; none where it goes by their shape."""
    grouped = is_op(node, "GroupQueryAttention", domain=_CONTRIB)
    return [match.input_of(node, 5), match.input_of(node, 6)] if grouped else []


def shares_matrix(layer: AttentionLayer) -> bool:
    """Whether the matrix of the queries makes keys or values as well."""
    query, *others = layer.projections[:3]
    return any(one is not None and one.holder is query.holder for one in others)


def not_narrowed(layer: AttentionLayer, facts: Inference) -> str | None:
    """Why `narrowed` cannot make the queries of a layer, in plain words; None when it can."""
    source, wanted = facts.shape(layer.source), _place(layer, facts)
    if wanted is None or source is None or len(source) != 3 or source[:2] != wanted:
        return "its queries are packed with keys and values in a way that is not undone"
    if wanted[0] == wanted[1] != 1:
        return "batch and positions are equally long, so the order of its queries is not proven"
    return None


def _place(layer: AttentionLayer, facts: Inference) -> tuple[object, object] | None:
    """The sizes of batch and positions of the queries, where they are laid out in one of the known ways."""
    queries = layer.kept[0]
    if queries.value is None:
        node = layer.anchor
        if not (is_op(node, "GroupQueryAttention", domain=_CONTRIB) and match.input_of(node, 1) is None):
            return None
        shape = facts.shape(node.inputs[0])
        return (shape[0], shape[1]) if shape is not None else None
    axes, shape = tuple(one.replace("gr", "h") for one in queries.axes), facts.shape(queries.value)
    if axes not in _LAYOUTS or shape is None:
        return None
    return shape[0], shape[axes.index("s")]


def narrowed(
    model: oir.Model, layer: AttentionLayer, weight: np.ndarray | None = None, bias: np.ndarray | None = None
) -> None:
    """Let the queries of a layer be made by a matrix of their own; `not_narrowed` has no reason.

    The bias that an operator adds goes, so keys and values must be given with theirs.

    Args:
        model: changed in place.
        layer: the layer.
        weight: float64 [heads, size, in]; those that the layer has when absent.
        bias: float64 [heads, size], with `weight`.
    """
    projection, queries = layer.projections[0], layer.kept[0]
    assert layer.query is not None
    if weight is None:
        weight, bias = projection.weight(), projection.bias()
    old = queries.value if queries.value is not None else layer.anchor.inputs[0]
    assert old is not None
    axes = queries.axes if queries.value is not None else ("b", "s", "hd")
    nodes = matrix(model, projection, layer.source, (weight, bias), "queries", axes)
    new = nodes[-1].outputs[0]
    edit.insert_behind(old, nodes)
    new.type = old.type
    if queries.value is not None:
        new.shape = old.shape
        old.replace_all_uses_with(new)
        edit.remove_unused([one for one in (old.producer(),) if one is not None])
    else:
        edit.set_input(layer.anchor, 0, new)
    for holder, index, _ in projection.biases:
        if holder is layer.anchor:
            edit.set_input(holder, index, None)


def matrix(
    model: oir.Model,
    projection: Projection,
    source: oir.Value,
    weights: tuple[np.ndarray, np.ndarray | None],
    what: str,
    axes: Axes,
) -> list[oir.Node]:
    """The nodes of a linear layer that makes queries, keys or values and nothing else, not yet in the graph.

    Args:
        model: gets the weights.
        projection: of the matrix that made them so far.
        source: [batch, positions, in].
        weights: float64 [heads, size, in], and the bias [heads, size].
        what: for the names of the weights.
        axes: how the last of the nodes gives them, of the letters b, s or t, h, d: heads and elements on the last axis,
            heads on the last but one, or on the second.
    """
    weight, bias = weights
    assert projection.linear is not None
    dtype, node = projection.linear.dtype or oir.DataType.FLOAT, projection.holder
    name = f"{node.name or 'attention'}_{what}"
    held = edit.add_rounded(model, name, weight.reshape(-1, weight.shape[-1]).T, dtype)
    nodes = [edit.make("MatMul", [source, held], like=node)]
    if bias is not None:
        shift = edit.add_rounded(model, f"{name}_bias", bias.reshape(-1), dtype)
        nodes.append(edit.make("Add", [nodes[-1].outputs[0], shift], like=node))
    if len(axes) == 4:
        sizes = edit.add_constant(model, f"{name}_heads", np.array([0, 0, *weight.shape[:2]], np.int64))
        nodes.append(edit.make("Reshape", [nodes[-1].outputs[0], sizes], like=node))
        if axes[1] not in ("s", "t", "u"):
            nodes.append(edit.make("Transpose", [nodes[-1].outputs[0]], {"perm": [0, 2, 1, 3]}, like=node))
    return nodes


def read(model: oir.Model, layer: AttentionLayer, keys: oir.Value, values: oir.Value) -> None:
    """Let an operator, for which `obstacle` has no reason, read keys and values of another; its queries are its own.

    Args:
        model: changed in place.
        layer: the layer; its operator joins new and older keys.
        keys, values: [batch, heads, positions, size], older and new ones, turned and normed.
    """
    node = layer.anchor
    if node.domain in STANDARD_DOMAINS:
        _standard(model, layer, keys, values)
    elif node.op_type == "GroupQueryAttention":
        _grouped(model, layer, keys, values)
    else:
        _multi_head(model, layer, keys, values)
    for out, value in zip(node.outputs[1:3], (keys, values), strict=False):
        if out.is_graph_output():
            model.graph.outputs.remove(out)
        out.replace_all_uses_with(value)
    node.resize_outputs(1)


def _standard(model: oir.Model, layer: AttentionLayer, keys: oir.Value, values: oir.Value) -> None:
    node = layer.anchor
    if match.attribute(node, "is_causal", 0):
        edit.set_input(node, 3, causal_mask(model, layer, keys))
        node.attributes.pop("is_causal")
    query = node.inputs[0]
    if query is not None and match.rank(query) == 3:
        keys, values = (_flat(model, node, one, layer.kv_heads) for one in (keys, values))
    edit.set_input(node, 1, keys)
    edit.set_input(node, 2, values)
    for index in (4, 5):
        edit.set_input(node, index, None)
    node.resize_inputs(4 if match.input_of(node, 3) is not None else 3)


def _flat(model: oir.Model, node: oir.Node, value: oir.Value, heads: int) -> oir.Value:
    """[batch, heads, positions, size] as [batch, positions, heads * size]."""
    size = match.dim(value, 3)
    turned = edit.make("Transpose", [value], {"perm": [0, 2, 1, 3]}, like=node)
    sizes = edit.add_constant(model, f"{node.name}_flat", np.array([0, 0, heads * (size or 0)], np.int64))
    flat = edit.make("Reshape", [turned.outputs[0], sizes], like=node)
    edit.insert_before(node, [turned, flat])
    return flat.outputs[0]


def causal_mask(model: oir.Model, layer: AttentionLayer, keys: oir.Value) -> oir.Value:
    """The mask of an operator with `is_causal`, which would count from the first key when no past is given."""
    node, mask = layer.anchor, match.input_of(layer.anchor, 3)
    query = node.inputs[0]
    nodes: list[oir.Node] = []

    def add(op: str, inputs: list[oir.Value | None], **attributes: object) -> oir.Value:
        nodes.append(edit.make(op, inputs, attributes, like=node))
        return nodes[-1].outputs[0]

    def number(value: int) -> oir.Value:
        return edit.add_constant(model, f"{node.name}_number", np.array(value, np.int64))

    axis = 1 if match.rank(query) == 3 else 2
    zero, one = number(0), number(1)
    length = add("Squeeze", [add("Shape", [query], start=axis, end=axis + 1)])
    total = add("Squeeze", [add("Shape", [keys], start=2, end=3)])
    first = add("Sub", [total, length])
    ends = edit.add_constant(model, f"{node.name}_axes", np.array([1], np.int64))
    rows = add("Unsqueeze", [add("Add", [add("Range", [zero, length, one]), first]), ends])
    seen = add("LessOrEqual", [add("Range", [zero, total, one]), rows])
    if mask is not None and mask.dtype == oir.DataType.BOOL:
        seen = add("And", [mask, seen])
    elif mask is not None and mask.dtype is not None:
        low = edit.add_rounded(model, f"{node.name}_low", np.array(-np.inf), mask.dtype)
        seen = add("Where", [seen, mask, low])
    edit.insert_before(node, nodes)
    return seen


def _multi_head(model: oir.Model, layer: AttentionLayer, keys: oir.Value, values: oir.Value) -> None:
    node = layer.anchor
    queries_biased(model, layer)
    edit.set_input(node, 1, keys)
    edit.set_input(node, 2, values)
    for index in (6, 7):
        edit.set_input(node, index, None)
    node.resize_inputs(6 if match.input_of(node, 5) is not None else 5 if match.input_of(node, 4) is not None else 3)


def queries_biased(model: oir.Model, layer: AttentionLayer) -> None:
    """Add the bias of the queries before an operator MultiHeadAttention, which is to add none to keys and values."""
    node, bias = layer.anchor, match.input_of(layer.anchor, 3)
    parameter = find_parameter(bias)
    if bias is not None and parameter is not None:
        width, dtype = layer.heads * layer.head_size, parameter.dtype or oir.DataType.FLOAT
        own = edit.add_rounded(model, f"{bias.name}_queries", parameter.read().reshape(-1)[:width], dtype)
        added = edit.make("Add", [node.inputs[0], own], like=node)
        edit.insert_before(node, [added])
        edit.set_input(node, 0, added.outputs[0])
        edit.set_input(node, 3, None)


def _grouped(model: oir.Model, layer: AttentionLayer, keys: oir.Value, values: oir.Value) -> None:
    """Empty new keys and values, cut from the queries, and those of the other as the past."""
    node = layer.anchor
    spans = {"starts": [0, 0], "ends": [0, layer.kv_heads * layer.head_size], "axes": [1, 2]}
    made = [edit.add_constant(model, f"{node.name}_{name}", np.array(one, np.int64)) for name, one in spans.items()]
    empty = edit.make("Slice", [node.inputs[0], *made], like=node)
    edit.insert_before(node, [empty])
    for index, value in ((1, empty.outputs[0]), (2, empty.outputs[0]), (3, keys), (4, values)):
        edit.set_input(node, index, value)
