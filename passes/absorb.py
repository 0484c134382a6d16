"""Putting a per-channel `scale * x + shift` into the weights of the layer before it, or of all layers after it."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

import numpy as np
import onnx_ir as oir

from burnish.ir import edit, match
from burnish.ir.views.affine import LAYOUT, PICKS, STEPS, Affine, axis_above, axis_below, chain, step_affine
from burnish.ir.views.convolution import Convolution, find_convolution
from burnish.ir.views.linear import Linear, find_linear
from burnish.ir.views.parameter import fits
from burnish.ir.walk import is_op

Layer = Linear | Convolution

LARGEST_COPY = 65536
"""Bytes of a shared weight up to which a copy of it costs less than the node it saves."""


@dataclass(frozen=True)
class Plan:
    """New weights of the layers that take an affine in; nothing has been changed yet."""

    affine: Affine
    layers: tuple[tuple[Layer, np.ndarray, np.ndarray | None], ...]

    def apply(self, model: oir.Model) -> None:
        """Write the weights and remove the affine."""
        edit.bypass(self.affine.nodes[-1], self.affine.input)
        for layer, weight, bias in self.layers:
            layer.write(model, weight, bias)


def into_layer_before(affine: Affine, largest_copy: int = LARGEST_COPY) -> Plan | str:
    """The plan that lets the layer before compute `affine` as well, or in plain words why there is none."""
    if not affine.input_is_private:
        return "other nodes read its input"
    if not affine.output.uses() and not affine.output.is_graph_output():
        return "nobody reads its result"
    value, axis = affine.input, affine.axis
    while (layer := layer_of(value)) is None:
        node = match.producer(value)
        if node is None:
            return "no layer computes its input"
        if not is_op(node, *LAYOUT) or node.inputs[0] is None:
            return f"its input comes from {node.op_type}, which is no layer with constant weights"
        value = node.inputs[0]
        if not match.used_once(value):
            return f"other nodes read the input of {node.op_type}"
        if axis is not None and (axis := axis_above(node, axis)) is None:
            return f"{node.op_type} mixes its channels with others"
    channels = layer.out_channels if isinstance(layer, Convolution) else layer.out_features
    if reason := _mismatch(affine, layer, value, axis, -1, channels):
        return reason
    scale, shift = np.broadcast_to(affine.scale, (channels,)), np.broadcast_to(affine.shift, (channels,))
    weight, bias = layer.weight(), layer.bias()
    new_weight = weight * scale.reshape(-1, *(1,) * (weight.ndim - 1))
    new_bias = scale * (bias if bias is not None else 0.0) + shift
    if bias is None and not new_bias.any():
        return _plan(affine, [(layer, new_weight, None)], largest_copy)
    return _plan(affine, [(layer, new_weight, new_bias)], largest_copy)


def affine_at(node: oir.Node, normalizing: Collection[oir.Node]) -> Affine | None:
    """The run of constant arithmetic that ends at `node`; None inside a longer run, and for the Add of a bias.

    Args:
        node: a node.
        normalizing: nodes of spelled-out normalizations, which are no part of a run.
    """
    if node.graph is None or _is_bias(node) or step_affine(node) is None or any(node is one for one in normalizing):
        return None
    above = node.inputs[0].producer() if node.inputs[0] is not None else None
    stop = [*normalizing, node]
    while above is not None and (found := step_affine(above)) is not None:
        if _is_bias(above):
            stop.append(above)
        above = found.input.producer()
    affine = chain(node, stop)
    reader = match.sole_consumer(node.outputs[0], *STEPS)
    later = step_affine(reader) if reader is not None else None
    inner = (
        affine is not None and later is not None and later.input is node.outputs[0] and affine.then(later) is not None
    )
    return None if inner else affine


def _is_bias(node: oir.Node) -> bool:
    layer = find_linear(node)
    return layer is not None and layer.add is node


def into_layers_after(
    affine: Affine,
    largest_copy: int = LARGEST_COPY,
    *,
    allow_new_bias: bool = False,
    besides: oir.Node | None = None,
) -> Plan | str:
    """The plan that lets every reader of `affine` compute it itself, or in plain words why there is none.

    Args:
        affine: what to take in.
        largest_copy: bytes of a shared weight up to which it is copied.
        allow_new_bias: take it in even where the Adds of new biases cost more than `affine` does.
        besides: a reader that is not asked, for whom the caller answers; it may be the only one.
    """
    layers: list[Layer] = []
    pending: list[tuple[oir.Value, int | None]] = [(affine.output, affine.axis)]
    while pending:
        value, axis = pending.pop()
        if value.is_graph_output():
            return "its result is an output of the graph"
        for user, index in [(use.node, use.idx) for use in value.uses() if use.node is not besides]:
            layer = find_convolution(user) or find_linear(user, with_add=True)
            if is_op(user, *LAYOUT, *PICKS) and index == 0:
                below = axis_below(user, axis) if axis is not None else None
                if axis is not None and below is None:
                    return f"{user.op_type} mixes its channels with others"
                pending.append((user.outputs[0], below))
            elif layer is None or layer.input is not value or index != 0:
                return f"{user.op_type} reads it, which is no layer with constant weights"
            else:
                channels = layer.in_channels if isinstance(layer, Convolution) else layer.in_features
                place = -1 if isinstance(layer, Convolution) else layer.input_axis
                if reason := _mismatch(affine, layer, value, axis, place, channels):
                    return reason
                layers.append(layer)
    if not layers and besides is None:
        return "nobody reads its result"
    shifts = bool(affine.shift.any())
    new_adds = [one.out_features for one in layers if isinstance(one, Linear) and shifts and not one.bias_is_free]
    size = max(affine.channels, max(one.in_features for one in layers if isinstance(one, Linear)) if new_adds else 1)
    if sum(new_adds) > size * len(affine.nodes) and not allow_new_bias:
        return "the bias Adds that the layers after it would need cost more than it does"
    written = []
    for one in layers:
        if shifts and isinstance(one, Convolution) and not one.reads_only_data:
            what = "does not use each input equally often" if one.transposed else "pads its input with zeros"
            return f"{one.node.op_type} {what}, so the shift differs from place to place"
        written.append((one, *_scale_input(one, affine)))
    return _plan(affine, written, largest_copy)


def _scale_input(layer: Layer, affine: Affine) -> tuple[np.ndarray, np.ndarray | None]:
    """The weight and bias with which `layer` reads x where it read `scale * x + shift`."""
    weight, bias = layer.weight(), layer.bias()
    groups = layer.groups if isinstance(layer, Convolution) else 1
    channels = layer.in_channels if isinstance(layer, Convolution) else layer.in_features
    split = weight.reshape(groups, weight.shape[0] // groups, weight.shape[1], -1)
    scale = np.broadcast_to(affine.scale, (channels,)).reshape(groups, 1, -1, 1)
    shift = np.broadcast_to(affine.shift, (channels,)).reshape(groups, 1, -1, 1)
    added = (split * shift).sum(axis=(2, 3)).reshape(-1)
    if not affine.shift.any():
        return (split * scale).reshape(weight.shape), bias
    return (split * scale).reshape(weight.shape), added if bias is None else bias + added


def layer_of(value: oir.Value) -> Layer | None:
    """The layer that computes `value`; a MatMul alone where `value` is its output before the bias."""
    node = value.producer()
    layer = find_convolution(node) or find_linear(node, with_add=is_op(node, "Add"))
    return layer if layer is not None and layer.output is value else None


def _mismatch(
    affine: Affine, layer: Layer, value: oir.Value, axis: int | None, place: int, channels: int
) -> str | None:
    """Why `affine` does not act on the channels of `layer` that `value` carries; None when it does."""
    if layer.read_only:
        return f"{layer.node.op_type} cannot be rewritten: {layer.read_only}"
    if affine.channels not in (1, channels):
        return f"{layer.node.op_type} has {channels} channels, it has {affine.channels}"
    if axis is None:
        return None
    if isinstance(layer, Convolution):
        expected: int | None = 1
    else:
        rank = 2 if is_op(layer.node, "Gemm") else match.rank(value)
        expected = None if rank is None else rank + place if place < 0 else place
    if axis != expected:
        return f"it acts on axis {axis}, not on the channels of {layer.node.op_type}"
    return None


def _plan(affine: Affine, written: list[tuple[Layer, np.ndarray, np.ndarray | None]], largest_copy: int) -> Plan | str:
    own = {id(layer.node) for layer, _, _ in written}
    for layer, weight, bias in written:
        dtype = layer.dtype
        if dtype is None:
            return f"the dtype of {layer.node.op_type} is unknown"
        others = [user for user in layer.shared if id(user) not in own]
        if others and weight.size * dtype.itemsize > largest_copy:
            return f"{others[0].op_type} shares the weight, and a copy is larger than {largest_copy} bytes"
        if not fits(weight, dtype) or (bias is not None and not fits(bias, dtype)):
            return f"the folded weight does not fit {dtype.name.lower()}"
    return Plan(affine, tuple(written))
