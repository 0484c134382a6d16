"""Layers as products of integers whose inputs are quantized in each run, from the range that they have there.

The nodes are those that ONNX Runtime joins to its own: DynamicQuantizeLinear, MatMulInteger, Cast, Mul and Add become
one DynamicQuantizeMatMul, or a MatMulIntegerToFloat each where several layers read one quantized value.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import onnx_ir as oir

from burnish.ir import edit, match, weights
from burnish.ir.views.convolution import Convolution, find_convolution
from burnish.ir.views.linear import Linear, find_linear
from burnish.ir.views.parameter import Parameter, same_shape
from burnish.ir.walk import walk
from burnish.passes import windows
from burnish.passes.layers import Layer, unusable
from burnish.passes.lossy import Savings

QUANTIZE = "DynamicQuantizeLinear"

OPSET = 11
"""The first opset that has it."""


def refusal(layer: Layer) -> str | None:
    """Why a layer cannot multiply integers, in plain words; None when it can. Sharing its weight is no reason."""
    if layer.read_only is not None:
        return layer.read_only
    if layer.dtype != oir.DataType.FLOAT:
        return f"it does not compute in float32, which is all that {QUANTIZE} reads"
    if layer.parameter is not None and (reason := unusable(layer.parameter)) is not None:
        return reason
    if isinstance(layer, Convolution):
        return "it is a transposed convolution" if layer.transposed else None
    if layer.input_axis != -1:
        return "its features are not the last axis of its input"
    return "its input is a vector" if match.rank(layer.input) == 1 else None


def error(layer: Layer, payload: Mapping[str, np.ndarray]) -> float:
    """The relative error of the weight of a layer that `write` gets this payload for, behind the factor of its rows."""
    weight = layer.weight() / payload.get("factor", np.float32(1)).astype(np.float64)
    levels = payload["levels"].reshape(len(weight), -1)
    scale, zero = (payload[key].reshape(-1, 1).astype(np.float64) for key in ("scale", "zero"))
    lost = weight.reshape(len(weight), -1) - (levels - zero) * scale
    return float(np.linalg.norm(lost) / max(np.linalg.norm(weight), np.finfo(np.float64).tiny))


def twins(layer: Layer) -> list[Layer]:
    """The other layers that multiply the same weight in the same way."""
    found = [find_linear(node) or find_convolution(node) for node in layer.shared]
    assert layer.parameter is not None
    return [
        one
        for one in found
        if one is not None
        and one.parameter is not None
        and one.parameter.value is layer.parameter.value
        and one.node.op_type == layer.node.op_type
        and np.array_equal(_form(one), _form(layer))
        and refusal(one) is None
    ]


def _form(layer: Layer) -> tuple[float, ...]:
    """What else the weight that is multiplied depends on."""
    if isinstance(layer, Linear):
        return (float(layer.stored_transposed), match.attribute(layer.node, "alpha", 1.0))
    return (float(layer.groups),)


def write(model: oir.Model, layers: Sequence[Layer], payload: Mapping[str, np.ndarray]) -> None:
    """Let layers of one weight multiply integers.

    Args:
        model: the model the layers are in.
        layers: a layer that `refusal` allows, and its `twins`.
        payload: `levels`, int8 or uint8, shaped like the layer's weight: [out, in], or [out, in / groups, *kernel];
            `scale`, float32, and `zero`, like the levels, one for each output; zeros are left out; and `factor`,
            float32, where there is one: what each channel of the input is multiplied with before it is quantized.
    """
    first = layers[0]
    stem = (first.parameter.source.name if first.parameter is not None else None) or "weight"
    stored = payload["levels"].T if isinstance(first, Linear) else payload["levels"]
    if windows.sliding(model, first) is not None:
        stored = windows.matrix(stored)
    weight = edit.add_constant(model, f"{stem}_levels", np.ascontiguousarray(stored))
    factor = edit.add_constant(model, f"{stem}_scale", payload["scale"].reshape(spread(model, first)))
    zero = payload["zero"]
    offset = edit.add_constant(model, f"{stem}_zero", zero) if zero.any() else None
    for layer in layers:
        bias = bias_of(layer, spread(model, layer))
        value = edit.add_constant(model, f"{stem}_bias", bias) if isinstance(bias, np.ndarray) else bias
        source = layer.input
        if "factor" in payload:
            source = multiplied(model, source, payload["factor"], layer.node)
        _write(model, layer, source, weight, factor, offset, value)


def _write(
    model: oir.Model,
    layer: Layer,
    source: oir.Value,
    weight: oir.Value,
    factor: oir.Value,
    offset: oir.Value | None,
    bias: oir.Value | None,
) -> None:
    old = layer.node
    nodes: list[oir.Node] = []
    along = windows.sliding(model, layer)
    if along is not None:
        source = windows.rows(model, along)
    rounded, scale, zero = quantized(source, old)
    if along is not None:
        nodes = windows.cut(model, along, rounded, zero)
        rounded = nodes[-1].outputs[0]
    whole = isinstance(layer, Convolution) and along is None
    product = edit.make("ConvInteger" if whole else "MatMulInteger", [rounded, weight, zero, offset], like=old)
    if whole:
        product.attributes.update(old.attributes)
    both = edit.make("Mul", [scale, factor], like=old)
    number = edit.make("Cast", [product.outputs[0]], {"to": oir.DataType.FLOAT.value}, like=old)
    result = edit.make("Mul", [number.outputs[0], both.outputs[0]], like=old)
    nodes += [product, number, both, result]
    if bias is not None:
        nodes.append(edit.make("Add", [result.outputs[0], bias], like=layer.nodes))
    for one in (product, number, result, nodes[-1]):
        same_shape(one, layer.output)
        if along is not None:
            one.outputs[0].shape = windows.result(along)
    product.outputs[0].type = oir.TensorType(oir.DataType.INT32)
    same_shape(both, factor)
    if along is not None:
        nodes += windows.back(model, along, nodes[-1].outputs[0])
        same_shape(nodes[-1], layer.output)
    edit.replace_node(layer.nodes[-1], nodes)


def spread(model: oir.Model, layer: Layer) -> tuple[int, ...]:
    """The shape in which one number for each output broadcasts to what the node on integers computes."""
    if isinstance(layer, Linear):
        return (layer.out_features,)
    return (layer.out_channels,) + (1,) * (len(layer.kernel) if windows.sliding(model, layer) is None else 0)


def bias_of(layer: Layer, shape: tuple[int, ...]) -> oir.Value | np.ndarray | None:
    """What is added to a layer of integers: the bias that it has, or one that is new, float32; None for nothing.

    Args:
        layer: the layer.
        shape: see `spread`.
    """
    bias, parameter = layer.bias(), layer.bias_parameter
    if bias is None or parameter is None:
        return None
    if parameter.shape == shape and match.attribute(layer.node, "beta", 1.0) == 1.0:
        return parameter.value
    return bias.reshape(shape).astype(np.float32)


def multiplied(model: oir.Model, value: oir.Value, factor: np.ndarray, reader: oir.Node) -> oir.Value:
    """A value times a constant; made once in each graph."""
    for node in match.consumers(value):
        held = weights.constant(node.inputs[1]) if node.op_type == "Mul" and node.graph is reader.graph else None
        if held is not None and node.inputs[0] is value and np.array_equal(held, factor):
            return node.outputs[0]
    new = edit.make("Mul", [value, edit.add_constant(model, f"{value.name}_factor", factor)], like=reader)
    same_shape(new, value)
    edit.insert_behind(value, [new], reader.graph)
    return new.outputs[0]


def absorb(model: oir.Model) -> None:
    """Let norms and products with a constant do what a `factor` behind them does, where nobody else reads them."""
    for node in walk(model, "Mul"):
        if match.sole_consumer(node.outputs[0], QUANTIZE) is None or not weights.is_constant(node.inputs[1]):
            continue
        factor = weights.constant(node.inputs[1])
        assert factor is not None
        written = _absorbed(node.inputs[0], factor) if factor.ndim == 1 else None
        if written is None:
            continue
        for one, index, array in written:
            name = f"{one.inputs[index].name}_balanced"  # type: ignore[union-attr]
            edit.set_input(one, index, edit.add_constant(model, name, array))
        edit.bypass(node)


def _absorbed(value: oir.Value | None, factor: np.ndarray) -> list[tuple[oir.Node, int, np.ndarray]] | None:
    """New constants, by node and input, with which a value is what it was times the factor; None for none."""
    node = match.producer(value, "LayerNormalization", "RMSNormalization", "Mul", "Add")
    if value is None or node is None or match.sole_consumer(value) is None:
        return None
    if node.op_type in ("Mul", "Add"):
        sides = [index for index in (0, 1) if weights.is_constant(node.inputs[index])]
        if len(sides) != 1:
            return None
        before = [] if node.op_type == "Mul" else _absorbed(node.inputs[1 - sides[0]], factor)
    else:
        plain = match.attribute(node, "axis", -1) == -1 and not any(out.uses() for out in node.outputs[1:])
        before, sides = ([], [*range(1, len(node.inputs))]) if plain else (None, [])
    held = [weights.constant(node.inputs[index]) for index in sides]
    if before is None or any(
        one is None or one.dtype != np.float32 or one.shape not in ((), (1,), factor.shape) for one in held
    ):
        return None
    return [*before, *((node, index, one * factor) for index, one in zip(sides, held, strict=True) if one is not None)]


def quantized(value: oir.Value, reader: oir.Node) -> tuple[oir.Value, oir.Value, oir.Value]:
    """The integers (uint8), the scale and the zero point of a value, for a node that reads it; made once in each graph.

    Args:
        value: float32, any shape.
        reader: the node; a value of an outer graph is quantized in the graph of the node.
    """
    for node in match.consumers(value):
        if node.op_type == QUANTIZE and node.graph is reader.graph:
            return node.outputs[0], node.outputs[1], node.outputs[2]
    new = edit.make(QUANTIZE, [value], like=reader, outputs=3)
    byte = oir.TensorType(oir.DataType.UINT8)
    same_shape(new, value).type = byte
    for out, kind in zip(new.outputs[1:], (oir.TensorType(oir.DataType.FLOAT), byte), strict=True):
        out.type, out.shape = kind, oir.Shape([])
    edit.insert_behind(value, [new], reader.graph)
    return new.outputs[0], new.outputs[1], new.outputs[2]


def saved(gone: Iterable[Parameter], added: Iterable[np.ndarray]) -> Savings:
    """What is held less; multiply-adds stay what they are."""
    old = {one.source.name: weights.tensor_of(one.source) for one in gone}
    tensors, arrays = [one for one in old.values() if one is not None], list(added)
    return Savings(
        sum(one.size for one in tensors) - sum(one.size for one in arrays),
        sum(one.nbytes for one in tensors) - sum(one.nbytes for one in arrays),
        0,
    )
