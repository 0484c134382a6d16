"""QuantizeLinear and DequantizeLinear in a graph: a pair on a value, one node behind a constant weight or bias.

A pair rounds a value to a grid of integers. Runtimes that know this form take an operator between DequantizeLinear and
QuantizeLinear as one on integers; where they do not, the two nodes compute what the integers would.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import onnx_ir as oir

from burnish.ir import edit, match, weights
from burnish.ir.walk import is_op
from burnish.passes.grids import Float8, Grid, Scales

BIAS = Grid(32)
"""The integers of a bias: those that products of 8 bits are added up in."""

_PACKED = {
    (2, True): oir.DataType.INT2,
    (2, False): oir.DataType.UINT2,
    (4, True): oir.DataType.INT4,
    (4, False): oir.DataType.UINT4,
}


def least_opset(scales: Scales) -> int:
    """The first opset whose DequantizeLinear takes these scales: 10; with an axis 13; with blocks or few bits 21; of
    8-bit floating-point numbers 21, since `_constants` writes no zero point.
    """
    if scales.block is not None or scales.grid.bits < 8 or isinstance(scales.grid, Float8):
        return 21
    return 10 if scales.axis is None else 13


def pair_on(value: oir.Value) -> oir.Value | None:
    """The rounded form of a value: the output of the DequantizeLinear of its pair; the value itself where it is one.

    None where no QuantizeLinear with one constant scale reads it, or nothing turns that one's integers back.
    """
    above = match.producer(value, "DequantizeLinear")
    if above is not None and not weights.is_constant(above.inputs[0]) and scales_of(value) is not None:
        return value
    for user in match.consumers(value):
        if not is_op(user, "QuantizeLinear") or user.inputs[0] is not value or not _constant_scales(user):
            continue
        for back in match.consumers(user.outputs[0]):
            if is_op(back, "DequantizeLinear") and _equal_scales(user, back) and scales_of(back.outputs[0]) is not None:
                return back.outputs[0]
    return None


def scales_of(value: oir.Value) -> Scales | None:
    """The scales of a value that a pair has rounded for the whole tensor; None where `value` is no such one."""
    node = match.producer(value, "DequantizeLinear")
    if node is None or not _constant_scales(node):
        return None
    scale = np.asarray(weights.constant(node.inputs[1]))
    zero_value = match.input_of(node, 2)
    levels = node.inputs[0]
    kind = oir.DataType.UINT8 if levels is None or levels.dtype is None else levels.dtype
    zero = np.zeros(scale.shape, kind.numpy()) if zero_value is None else np.asarray(weights.constant(zero_value))
    grid = _grid_of(zero.dtype)
    return None if scale.size != 1 or grid is None else Scales(grid, scale.reshape(()), zero.reshape(()))


def _grid_of(dtype: np.dtype) -> Grid | None:
    """The grid of zero points."""
    kind = dtype.name.replace("_", "")
    if kind in ("float8e4m3fn", "float8e5m2"):
        return Float8(kind=kind)
    return Grid(8 * dtype.itemsize, dtype.kind == "i", False) if dtype.kind in "iu" else None


def scaled(scales: Scales, factor: float) -> Scales:
    """The scales of numbers that are a positive factor larger and have the same integers."""
    scale = np.asarray(scales.scale.astype(np.float64) * factor).astype(scales.scale.dtype)
    return Scales(scales.grid, scale, scales.zero_point, scales.axis, scales.block)


def put_pair(
    model: oir.Model, value: oir.Value, scales: Scales, readers: Iterable[oir.Node] | None = None
) -> oir.Value:
    """Round a value to a grid by a pair behind it; a pair that is there already is taken, with the scales that it has.

    Args:
        model: the model `value` is in.
        value: computed or given, of floating point.
        scales: one for the whole tensor.
        readers: the nodes that are to read the rounded value; all of them, and the graph's output, when None.

    Returns:
        The rounded value. It is a graph output under the old name where `value` was one and all readers read it.
    """
    rounded = pair_on(value)
    if rounded is value:
        return value
    if rounded is None:
        rounded = _new_pair(model, value, scales)
    (quantize,) = (node.inputs[0].producer() for node in [rounded.producer()] if node is not None and node.inputs[0])
    if readers is None:
        edit.replace_value(value, rounded)
        if quantize is not None:
            quantize.replace_input_with(0, value)
        if value.name is None:
            value.name = edit.unique_name(model, f"{rounded.name}_exact")
        return rounded
    chosen = {id(node) for node in readers}
    for use in list(value.uses()):
        if id(use.node) in chosen and use.node is not quantize:
            use.node.replace_input_with(use.idx, rounded)
    return rounded


def _new_pair(model: oir.Model, value: oir.Value, scales: Scales) -> oir.Value:
    producer = value.producer()
    stem = value.name or "value"
    constants = _constants(model, stem, scales)
    like = producer if producer is not None else match.consumers(value)
    kind = {"output_dtype": int(_stored_type(scales))} if isinstance(scales.grid, Float8) else {}
    there = edit.make("QuantizeLinear", [value, *constants], kind, like=like)
    back = edit.make("DequantizeLinear", [there.outputs[0], *constants], like=like)
    there.outputs[0].type = oir.TensorType(_stored_type(scales))
    there.outputs[0].shape = value.shape.copy() if value.shape is not None else None
    back.outputs[0].type = value.type
    back.outputs[0].shape = value.shape.copy() if value.shape is not None else None
    edit.insert_behind(value, [there, back])
    return back.outputs[0]


def put_weight(model: oir.Model, node: oir.Node, index: int, levels: np.ndarray, scales: Scales) -> oir.Value:
    """Let an input of a node be a constant of integers behind a DequantizeLinear; the old constant goes if unused.

    Args:
        model: the model.
        node: the node that reads the weight.
        index: which of its inputs.
        levels: integers of the scales' grid, as the weight is stored, not packed.
        scales: of it; floating point in the dtype that the node computes in.

    Returns:
        What the node reads now.
    """
    old = match.input_of(node, index)
    stem = (old.name if old is not None else None) or "weight"
    constants = weight_constants(model, stem, levels, scales)
    value = dequantized(node, constants, levels.shape, scales)
    edit.set_input(node, index, value)
    return value


def weight_constants(
    model: oir.Model, stem: str, levels: np.ndarray, scales: Scales, *, zero_point: bool = True
) -> list[oir.Value]:
    """What a DequantizeLinear of a weight reads: integers, scales and, unless they are left out, zero points."""
    dtype = _stored_type(scales)
    stored = oir.tensor(np.asarray(levels, order="C").astype(dtype.numpy()), dtype=dtype)
    constant = edit.add_constant(model, f"{stem}_quantized", stored)
    return [constant, *_constants(model, stem, scales, zero_point)]


def dequantized(node: oir.Node, constants: Sequence[oir.Value], shape: tuple[int, ...], scales: Scales) -> oir.Value:
    """The numbers of `weight_constants`, computed right before a node."""
    attributes: dict[str, int] = {}
    if scales.axis is not None:
        attributes["axis"] = scales.axis % len(shape)
    if scales.block is not None:
        attributes["block_size"] = scales.block
    back = edit.make("DequantizeLinear", constants, attributes, like=node)
    back.outputs[0].type = oir.TensorType(oir.DataType.from_numpy(scales.scale.dtype))
    back.outputs[0].shape = oir.Shape(shape)
    edit.insert_before(node, [back])
    return back.outputs[0]


def bias_scales(input_scale: float | np.ndarray, weight: Scales) -> Scales:
    """The scales in which an integer kernel adds the bias: the product of those of the input and of the weight.

    Args:
        input_scale: of the whole input.
        weight: scales of the weight, one, or one for each output.
    """
    scale = (np.float32(input_scale) * weight.scale.astype(np.float32)).astype(weight.scale.dtype)
    return Scales(BIAS, scale, np.zeros(scale.shape, np.int32), None if scale.ndim == 0 else 0)


def fitting_bias(weight: Scales, bias: np.ndarray, input_scale: float | np.ndarray) -> Scales:
    """The weight's scales, larger for those outputs whose bias would need more than 31 bits.

    Args:
        weight: scales of the weight, one, or one for each output.
        bias: floating point [outputs].
        input_scale: of the whole input.
    """
    least = least_scales(bias, input_scale)
    wanted = least.max(initial=0.0) if weight.scale.ndim == 0 else least
    scale = np.maximum(weight.scale, wanted).astype(weight.scale.dtype)
    return Scales(weight.grid, scale, weight.zero_point, weight.axis, weight.block)


def least_scales(bias: np.ndarray, input_scale: float | np.ndarray) -> np.ndarray:
    """The smallest scales of weights with which a bias [outputs] needs no more than 31 bits."""
    return np.asarray(np.abs(bias) / (float(input_scale) * 2.0**30))


def _constants(model: oir.Model, stem: str, scales: Scales, zero_point: bool = True) -> list[oir.Value]:
    """The scale and the zero point as initializers; kernels on integers ask for a zero point though it is 0.

    8-bit floating-point numbers have none: ONNX Runtime 1.32 leaves out a Relu before a QuantizeLinear whose zero point
    is the byte 0, as is right for unsigned integers only.
    """
    found = [edit.add_constant(model, f"{stem}_scale", np.asarray(scales.scale))]
    if zero_point and scales.grid != BIAS and not isinstance(scales.grid, Float8):
        dtype = _stored_type(scales)
        zero = oir.tensor(np.asarray(scales.zero_point).astype(dtype.numpy()), dtype=dtype)
        found.append(edit.add_constant(model, f"{stem}_zero_point", zero))
    return found


def _stored_type(scales: Scales) -> oir.DataType:
    packed = _PACKED.get((scales.grid.bits, scales.grid.signed))
    return packed if packed is not None else oir.DataType.from_numpy(scales.grid.dtype)


def _constant_scales(node: oir.Node) -> bool:
    return all(weights.is_constant(value) for value in node.inputs[1:] if value is not None)


def _equal_scales(one: oir.Node, other: oir.Node) -> bool:
    if not _constant_scales(other) or len(one.inputs) != len(other.inputs):
        return False
    pairs = zip(one.inputs[1:], other.inputs[1:], strict=True)
    return all(a is b or np.array_equal(weights.constant(a), weights.constant(b)) for a, b in pairs)  # type: ignore[arg-type]
