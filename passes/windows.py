"""Convolutions along one axis as products: what the taps of the kernel read is put side by side, for one matrix.

ONNX Runtime's kernel for convolutions of integers is several times slower than that for floating-point numbers; its
product of integers is several times faster. On bytes the copies cost little.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as oir

from burnish.ir import edit
from burnish.ir.views.convolution import Convolution
from burnish.passes.layers import Layer

OPSET = 13
"""The first opset whose Squeeze, Unsqueeze and Pad are written as here."""

_TAPS = 16
_CHANNELS = 16
_END = np.iinfo(np.int64).max


def sliding(model: oir.Model, layer: Layer) -> Convolution | None:
    """A layer that can be written so: a convolution whose window covers 2 to 16 numbers along one axis, whose other
    axes have one number each, and which reads all of its 16 or more channels. None for any other.
    """
    if not isinstance(layer, Convolution) or model.opset_imports.get("", 1) < OPSET or _axis(layer) is None:
        return None
    return layer


def _axis(layer: Convolution) -> int | None:
    """The spatial axis that the window moves along; None where it is no such convolution."""
    axes = [index for index, size in enumerate(layer.kernel) if size > 1]
    if layer.transposed or layer.groups != 1 or layer.shared or layer.auto_pad != "NOTSET" or len(axes) != 1:
        return None
    (axis,), spatial = axes, len(layer.kernel)
    if layer.kernel[axis] > _TAPS or layer.in_channels < _CHANNELS or min(layer.pads) < 0:
        return None
    shape = layer.input.shape
    for index in (one for one in range(spatial) if one != axis):
        if shape is None or shape[2 + index] != 1 or layer.pads[index] or layer.pads[spatial + index]:
            return None
    return axis


def matrix(levels: np.ndarray) -> np.ndarray:
    """Integers [out, in, *kernel] as [taps * in, out]."""
    taps = levels.reshape(*levels.shape[:2], -1)
    return np.ascontiguousarray(taps.transpose(2, 1, 0).reshape(-1, len(levels)))


def rows(model: oir.Model, layer: Convolution) -> oir.Value:
    """What the layer reads with the channels last, [batch, length, channels]; new nodes stand before the layer."""
    nodes, value = [], layer.input
    if (others := _others(layer)).size:
        nodes.append(edit.make("Squeeze", [value, _constant(model, layer, "units", others)], like=layer.node))
        value = nodes[-1].outputs[0]
        value.type = layer.input.type
    nodes.append(edit.make("Transpose", [value], {"perm": [0, 2, 1]}, like=layer.node))
    nodes[-1].outputs[0].type = layer.input.type
    nodes[-1].outputs[0].shape = _shape(layer, layer.input, layer.in_channels)
    edit.insert_before(layer.node, nodes)
    return nodes[-1].outputs[0]


def cut(model: oir.Model, layer: Convolution, levels: oir.Value, zero: oir.Value) -> list[oir.Node]:
    """Nodes, the last of which has [batch, length, taps * channels], of the integers of `rows`.

    Args:
        model: the model.
        layer: the convolution.
        levels: the integers.
        zero: the one that stands for 0, which padding is.
    """
    axis = _axis(layer)
    assert axis is not None
    taps, step, apart = layer.kernel[axis], layer.strides[axis], layer.dilations[axis]
    before, after = layer.pads[axis], layer.pads[len(layer.kernel) + axis]
    nodes: list[oir.Node] = []
    if before or after:
        sizes = _constant(model, layer, "pads", np.array([0, before, 0, 0, after, 0]))
        nodes.append(edit.make("Pad", [levels, sizes, zero], like=layer.node))
        levels = nodes[-1].outputs[0]
    parts, along = [], [_constant(model, layer, name, np.array([one])) for name, one in (("axis", 1), ("step", step))]
    for tap in range(taps):
        ends = (("from", tap * apart), ("to", (tap + 1 - taps) * apart or _END))
        given = [_constant(model, layer, name, np.array([one])) for name, one in ends]
        parts.append(edit.make("Slice", [levels, *given, *along], like=layer.node))
    nodes += [*parts, edit.make("Concat", [one.outputs[0] for one in parts], {"axis": 2}, like=layer.node)]
    for one in nodes:
        one.outputs[0].type = oir.TensorType(oir.DataType.UINT8)
    nodes[-1].outputs[0].shape = _shape(layer, layer.output, taps * layer.in_channels)
    return nodes


def added(layer: Convolution) -> np.ndarray:
    """As many numbers as the constants of these nodes hold."""
    axis = _axis(layer)
    assert axis is not None
    pads = 6 if layer.pads[axis] or layer.pads[len(layer.kernel) + axis] else 0
    return np.empty(2 * _others(layer).size + pads + 2 + 2 * layer.kernel[axis], np.int64)


def back(model: oir.Model, layer: Convolution, value: oir.Value) -> list[oir.Node]:
    """Nodes that give a value [batch, length, out] the axes of the layer's output."""
    nodes = [edit.make("Transpose", [value], {"perm": [0, 2, 1]}, like=layer.node)]
    nodes[0].outputs[0].type = layer.output.type
    if (others := _others(layer)).size:
        given = [nodes[0].outputs[0], _constant(model, layer, "units", others)]
        nodes.append(edit.make("Unsqueeze", given, like=layer.node))
        nodes[-1].outputs[0].type = layer.output.type
    return nodes


def result(layer: Convolution) -> oir.Shape | None:
    """The shape [batch, length, out] of the product."""
    return _shape(layer, layer.output, layer.out_channels)


def _shape(layer: Convolution, like: oir.Value, channels: int) -> oir.Shape | None:
    axis = _axis(layer)
    if like.shape is None or axis is None:
        return None
    return oir.Shape([like.shape[0], like.shape[2 + axis], channels])


def _others(layer: Convolution) -> np.ndarray:
    """The axes of the input that have one number each."""
    return np.array([2 + index for index in range(len(layer.kernel)) if index != _axis(layer)], np.int64)


def _constant(model: oir.Model, layer: Convolution, name: str, array: np.ndarray) -> oir.Value:
    return edit.add_constant(model, f"{layer.output.name}_{name}", array)
