"""Rotating a residual stream, and the values of an attention head by head, by writing other constants.

With R the rotation and rows x: a layer that reads the stream gets W R for its weight W [out, in], one that writes it
Rᵀ W and b R, a table or another constant of the stream C R. A norm's gain is taken in by its readers first, W diag(g).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

import numpy as np
import onnx_ir as oir

from burnish.ir import edit, match, weights
from burnish.ir.views.attention_layer import AttentionLayer, Heads
from burnish.ir.views.convolution import Convolution
from burnish.ir.views.linear import Linear
from burnish.ir.views.parameter import same_shape, write_input
from burnish.ir.views.stream import Constant, Reader, Stream
from burnish.passes import factors, norm_gains

Make = Callable[[np.ndarray], np.ndarray]
"""Makes a rotation for rows with a covariance, both float64 [size, size]."""


def covariance(stream: Stream) -> np.ndarray:
    """Of the rows of all weights that read the stream, gains included, but for a head tied to a table of it.

    Returns:
        float64 [width, width]; the identity where there are none.
    """
    total = np.zeros((stream.width, stream.width))
    ends = {id(reader) for reader, _ in ties(stream)}
    for reader in stream.readers:
        if id(reader) not in ends:
            rows = _gained(stream, reader)[0]
            total += rows.T @ rows
    return total if total.any() else np.eye(stream.width)


def ties(stream: Stream) -> Iterator[tuple[Reader, Constant]]:
    """The readers whose weight is a table of the stream itself, with the table."""
    tables = {one.parameter.source: one for one in stream.constants if one.axis == -1 and not one.parameter.steps}
    for reader in stream.readers:
        weight = reader.linear.parameter
        table = tables.get(weight.source) if weight is not None else None
        if table is None or reader.linear.input_axis != -1:
            continue
        shape = table.parameter.shape
        if shape == (reader.linear.out_features, reader.linear.in_features) and (
            shape[0] != shape[1] or np.array_equal(table.parameter.read(), reader.linear.weight())
        ):
            yield reader, table


def refusal(stream: Stream) -> tuple[oir.Node, str] | None:
    """The norm of a stream whose gain cannot be taken out, and why; None when all can."""
    for norm in {id(one.norm): one.norm for one in stream.readers if one.norm is not None}.values():
        if reason := norm_gains.stays(norm):
            return norm.nodes[0], reason
    return None


def rotate(model: oir.Model, stream: Stream, turn: np.ndarray, *, untie: bool) -> None:
    """Rotate a stream of the model, `x -> x @ turn`; what the model computes stays.

    Args:
        model: the model the stream was found in; the stream is out of date afterwards.
        stream: for which `refusal` gives None.
        turn: float64 [width, width], orthogonal; leaves the row of ones as it is where `stream.keeps_ones`.
        untie: give a head that is tied to a table a weight of its own. Else both keep reading one table, and a matrix
            [width, width] before the head stands for the gain of the last norm, Rᵀ diag(g) R.
    """
    before = set(model.graph.initializers)
    shared = any(one.shared for one in (*(reader.linear for reader in stream.readers), *stream.writers))
    tied = [] if untie else [pair for pair in ties(stream) if _is_theirs(stream, pair[1])]
    layers: dict[oir.Node, Linear | Convolution] = {}
    written: dict[oir.Node, tuple[np.ndarray, np.ndarray | None]] = {}
    heads: list[tuple[Reader, np.ndarray, np.ndarray]] = []
    for reader in stream.readers:
        if any(reader is one for one, _ in tied):
            norm = reader.norm
            if norm is not None:
                gain, offset = norm.gain(stream.width), norm.offset(stream.width)
                heads.append((reader, turn.T @ (gain[:, None] * turn), offset @ turn))
            continue
        weight, bias = _gained(stream, reader)
        layers[reader.linear.node], written[reader.linear.node] = reader.linear, (weight @ turn, bias)
    for writer in stream.writers:
        weight, bias = written.get(writer.node) or (writer.weight(), writer.bias())
        turned = np.tensordot(turn.T, weight, axes=1)
        layers[writer.node], written[writer.node] = writer, (turned, bias @ turn if bias is not None else None)
    tables = {id(table) for _, table in tied}
    for one in stream.constants:
        if id(one) not in tables and not any(one.parameter.source is table.parameter.source for _, table in tied):
            _write_constant(model, one, stream.width, turn)
    for source in dict.fromkeys(table.parameter.source for _, table in tied):
        exact = weights.exact(source)
        assert exact is not None and source.dtype is not None
        source.replace_all_uses_with(edit.add_rounded(model, str(source.name or "table"), exact @ turn, source.dtype))
        edit.drop_if_unused(source)
    for node, layer in layers.items():
        layer.write(model, *written.pop(node))  # it keeps a copy in float64: two of the whole model would be a lot
    for norm in stream.sources:
        _put_behind(model, norm.output, turn)
    for reader, matrix, offset in heads:
        _put_before(model, reader.linear, matrix, offset)
    for norm in {id(one.norm): one.norm for one in stream.readers if one.norm is not None}.values():
        norm_gains.take_out(model, norm, stream.width)
    if shared:
        factors.join_equal(model, before)


def _gained(stream: Stream, reader: Reader) -> tuple[np.ndarray, np.ndarray | None]:
    """The weight and bias of a reader that has taken in the gain and bias of the norm before it."""
    weight, bias, norm = reader.linear.weight(), reader.linear.bias(), reader.norm
    if norm is None:
        return weight, bias
    offset = norm.offset(stream.width)
    if offset.any():
        bias = weight @ offset + (bias if bias is not None else 0.0)
    return weight * norm.gain(stream.width), bias


def _is_theirs(stream: Stream, table: Constant) -> bool:
    """Whether nobody outside the stream reads a table."""
    own = {one.node for one in stream.constants} | {one.linear.node for one in stream.readers}
    pending = [table.parameter.source]
    while pending:
        for node in match.consumers(pending.pop()):
            if node in own:
                continue
            if node.op_type not in ("Transpose", "Identity"):
                return False
            pending += node.outputs
    return True


def _write_constant(model: oir.Model, one: Constant, width: int, turn: np.ndarray) -> None:
    parameter, axis = one.parameter, one.axis
    array = parameter.read()
    if axis is None:
        places = max(array.ndim, 1)
        array = np.broadcast_to(array.reshape((1,) * (places - array.ndim) + array.shape), (*array.shape[:-1], width))
        axis = -1
    turned = np.moveaxis(np.moveaxis(array, axis, -1) @ turn, -1, axis)
    assert parameter.dtype is not None
    write_input(model, one.node, one.index, turned, parameter.dtype, parameter.source.name or "constant")


def _put_before(model: oir.Model, layer: Linear, matrix: np.ndarray, offset: np.ndarray) -> None:
    """Let a layer read `x @ matrix + offset` where it read x."""
    node, value, dtype = layer.node, layer.input, layer.dtype
    assert dtype is not None
    name = f"{layer.output.name}_gain"
    product = edit.make("MatMul", [value, edit.add_rounded(model, name, matrix, dtype)], like=node)
    made, result = [product], same_shape(product, value)
    if offset.any():
        add = edit.make("Add", [result, edit.add_rounded(model, f"{name}_bias", offset, dtype)], like=node)
        made, result = [product, add], same_shape(add, value)
    edit.insert_before(node, made)
    node.replace_input_with(0, result)


def _put_behind(model: oir.Model, value: oir.Value, matrix: np.ndarray) -> None:
    """Let all that read a computed value read `value @ matrix`."""
    node, uses = value.producer(), list(value.uses())
    assert node is not None and node.graph is not None and value.dtype is not None
    stored = edit.add_rounded(model, f"{value.name}_turned", matrix, value.dtype)
    product = edit.make("MatMul", [value, stored], like=node)
    node.graph.insert_after(node, [product])
    for use in uses:
        use.node.replace_input_with(use.idx, same_shape(product, value))


def value_refusal(layer: AttentionLayer, layers: Iterable[AttentionLayer] = ()) -> str | None:
    """Why the values of an attention cannot be rotated beside the model's other layers, in plain words; else None."""
    if layer.shared:
        return f"{match.describe(layer.shared[0])} reads its queries, keys or values as well"
    if (reason := layer.overlap(layers)) is not None:
        return reason
    if layer.cache.kind != "none":
        return "its values are kept in a cache that the model takes or gives"
    value, output = layer.projections[2], layer.projections[3]
    if value is None:
        return "it has no values of its own"
    return value.read_only or output.read_only


def turn_values(model: oir.Model, layer: AttentionLayer, make: Make) -> None:
    """Rotate the values of each head of keys and values, and undo it in the output layer.

    Args:
        model: the model the layer is in; the layer is out of date afterwards.
        layer: an attention for which `value_refusal` gives None.
        make: is given the covariance of the rows of the output layer that read the head.
    """
    old = layer.read()
    assert old.value is not None
    turned, back = np.empty_like(old.value), np.empty_like(old.output)
    bias = None if old.value_bias is None else np.empty_like(old.value_bias)
    readers = layer.heads // layer.kv_heads
    for head in range(layer.kv_heads):
        own = slice(head * readers, (head + 1) * readers)
        rows = old.output[:, own].reshape(-1, layer.value_size)
        turn = make(rows.T @ rows)
        turned[head] = turn.T @ old.value[head]
        back[:, own] = old.output[:, own] @ turn
        if bias is not None and old.value_bias is not None:
            bias[head] = old.value_bias[head] @ turn
    layer.write(model, Heads(old.query, old.key, turned, back, old.query_bias, old.key_bias, bias, old.output_bias))
