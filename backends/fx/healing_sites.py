"""The weights of a model that are stored as integers, found by the nodes that read them."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, replace

import numpy as np
import onnx_ir as oir

from burnish.ir import match, weights
from burnish.ir.packing import pack, unpack
from burnish.ir.views.parameter import find_parameter
from burnish.ir.walk import is_op, main_graphs

_CONTRIB = "com.microsoft"
_BITS = {
    oir.DataType.INT2: 2, oir.DataType.UINT2: 2, oir.DataType.INT4: 4, oir.DataType.UINT4: 4, oir.DataType.INT8: 8,
    oir.DataType.UINT8: 8, oir.DataType.INT16: 16, oir.DataType.UINT16: 16, oir.DataType.INT32: 32,
}  # fmt: skip
BLOCKED = ("DynamicQuantizeLSTM", "QAttention", "QGemm")
"""Operators on integers that do not begin with `QLinear`, through which no gradient passes."""
_FLOATS = (oir.DataType.FLOAT, oir.DataType.FLOAT16, oir.DataType.BFLOAT16, oir.DataType.DOUBLE)


@dataclass(frozen=True)
class Stored:
    """A weight as integers.

    Attributes:
        value: the constant that holds the integers.
        scale: the constant of its scales.
        zero: the constant of its zero points; None where there is none.
        low, high: the least and the largest integer.
        shape: of the numbers.
        spread: of scales and zero points: () for one, [size] for one of each index of `axis`, or for blocks the shape
            of the numbers with fewer along `axis`.
        axis, block: of the scales; block 0 for no blocks.
        packed: bits of each integer, where several share a byte; 0 where the tensor's dtype says it.
        readers: the nodes that read it.
    """

    value: oir.Value
    scale: oir.Value
    zero: oir.Value | None
    low: int
    high: int
    shape: tuple[int, ...]
    spread: tuple[int, ...]
    axis: int
    block: int
    packed: int
    readers: tuple[oir.Node, ...]

    @property
    def bias(self) -> bool:
        """Whether it is added in the integers of 32 bits in which products are summed up."""
        return self.high == 2**31 - 1

    def levels(self) -> np.ndarray:
        """The integers, int64 of `shape`."""
        array = _constant(self.value)
        if self.packed:
            array = unpack(array.reshape(self.shape[0], -1), self.packed)[:, : self.shape[1]]
        return array.astype(np.int64)

    def zeros(self) -> np.ndarray:
        """The zero points, float64 of `spread`."""
        if self.zero is None:
            return np.full(self.spread, 2.0 ** (self.packed - 1) if self.packed else 0.0)
        array = _constant(self.zero)
        if self.packed:
            array = unpack(array.reshape(self.shape[0], -1), self.packed)[:, : self.spread[1]]
        return array.astype(np.float64).reshape(self.spread)

    def scales(self) -> np.ndarray:
        """The scales, float64 of `spread`."""
        return _constant(self.scale).astype(np.float64).reshape(self.spread)

    def tensor(self, levels: np.ndarray) -> oir.TensorProtocol:
        """Integers of `shape` as the constant stores them."""
        old = weights.tensor_of(self.value)
        assert old is not None
        if self.packed:
            whole = unpack(old.numpy().reshape(self.shape[0], -1), self.packed)
            whole[:, : self.shape[1]] = levels
            stored = pack(whole, self.packed).reshape(tuple(old.shape.numpy()))
        else:
            stored = levels.astype(old.dtype.numpy())
        return oir.Tensor(stored, dtype=old.dtype, name=old.name)


@dataclass(frozen=True)
class Sum:
    """A bias whose scale is the product of two others, as integer kernels take it to be.

    Attributes:
        bias: the constant of its integers.
        scale: its own scale.
        of_input, of_weight: the scales of what the layer multiplies.
    """

    bias: oir.Value
    scale: oir.Value
    of_input: oir.Value
    of_weight: oir.Value


@dataclass(frozen=True)
class Sites:
    """What was found.

    Attributes:
        stored: the weights that can be trained.
        refused: why others cannot, by the nodes that read them.
        sums: biases, one for each layer.
        fixed: scales that have to stay, as something depends on them that cannot follow.
    """

    stored: list[Stored]
    refused: dict[oir.Node, str]
    sums: list[Sum]
    fixed: set[oir.Value]


def find(model: oir.Model) -> Sites:
    """The integers of a model."""
    found: dict[oir.Value, Stored | str] = {}
    readers: dict[oir.Value, list[oir.Node]] = defaultdict(list)
    refused: dict[oir.Node, str] = {}
    sums: list[Sum] = []
    for node in (node for graph in main_graphs(model) for node in graph):
        one = _read(node)
        if isinstance(one, Stored):
            sums += _sums(node, one) if one.bias else []
            readers[one.value].append(node)
            if node.graph is not model.graph:
                found[one.value] = "it is in a branch or a loop"
            elif isinstance(other := found.setdefault(one.value, one), Stored) and _form(other) != _form(one):
                found[one.value] = "others read its integers with other scales"
        elif one is not None:
            refused[node] = one
    stored = []
    for value, item in found.items():
        if isinstance(item, str):
            refused |= dict.fromkeys(readers[value], item)
        else:
            stored.append(replace(item, readers=tuple(readers[value])))
    return Sites(stored, refused, sums, _fixed(stored, sums))


def _fixed(stored: list[Stored], sums: list[Sum]) -> set[oir.Value]:
    """The scales of weights beside a bias that stays, or whose scale has to be another product as well."""
    free = {one.value for one in stored}
    factors: dict[oir.Value, set[tuple[oir.Value, oir.Value]]] = defaultdict(set)
    for one in sums:
        factors[one.scale].add((one.of_input, one.of_weight))
    held = {scale for scale in factors if any(not _is_bias(user) for user in match.consumers(scale))}
    stuck = {one.of_weight for one in sums if one.bias not in free or len(factors[one.scale]) > 1 or one.scale in held}
    return stuck | factors.keys()


def _is_bias(node: oir.Node) -> bool:
    held = weights.tensor_of(node.inputs[0]) if is_op(node, "DequantizeLinear") else None
    return held is not None and held.dtype == oir.DataType.INT32


def _form(one: Stored) -> tuple[object, ...]:
    return one.scale, one.zero, one.shape, one.spread, one.axis % max(len(one.shape), 1), one.block, one.packed


def _read(node: oir.Node) -> Stored | str | None:
    """The integers that a node reads as a weight, or why they cannot be trained; None where it reads none."""
    if is_op(node, "DequantizeLinear") and weights.is_constant(node.inputs[0]):
        return _dequantized(node)
    if is_op(node, "DequantizeLinear", domain=_CONTRIB) and weights.is_constant(node.inputs[0]):
        return "only DequantizeLinear of standard ONNX is trained"
    if is_op(node, "MatMulNBits", domain=_CONTRIB):
        return _multiplied(node)
    if is_op(node, "GatherBlockQuantized", domain=_CONTRIB):
        return _looked_up(node)
    if is_op(node, "MatMulInteger", "ConvInteger") and weights.is_constant(match.input_of(node, 1)):
        return _dynamic(node)
    if node.op_type.startswith("QLinear") or node.op_type in BLOCKED:
        return f"no gradient passes through {node.op_type}"
    return None


def _dequantized(node: oir.Node) -> Stored | str | None:
    tensor, scale = weights.tensor_of(node.inputs[0]), match.input_of(node, 1)
    if tensor is None or tensor.dtype not in _BITS:
        return "it is stored in floating point of few bits"
    if tensor.size == 1 and tensor.dtype != oir.DataType.INT32:
        return None  # a bound or a factor, which is no weight
    shape, spread = tuple(tensor.shape.numpy()), _shape(scale)
    block, axis = match.attribute(node, "block_size", 0), match.attribute(node, "axis", 1)
    one = int(np.prod(spread or ())) == 1 and not block
    return _made(
        node, node.inputs[0], scale, match.input_of(node, 2), tensor, shape, () if one else spread, axis, block
    )


def _multiplied(node: oir.Node) -> Stored | str:
    k, n = match.attribute(node, "K"), match.attribute(node, "N")
    bits, block = match.attribute(node, "bits", 4), match.attribute(node, "block_size")
    tensor, zero = weights.tensor_of(match.input_of(node, 1)), match.input_of(node, 3)
    if match.input_of(node, 4) is not None:
        return "its blocks are not in order"
    if zero is not None and (held := weights.tensor_of(zero)) is not None and held.dtype != oir.DataType.UINT8:
        return "its zero points are no integers"
    spread = (n, -(-k // block))
    return _made(node, node.inputs[1], match.input_of(node, 2), zero, tensor, (n, k), spread, 1, block, bits)


def _looked_up(node: oir.Node) -> Stored | str:
    table = find_parameter(node.inputs[0])
    tensor = weights.tensor_of(table.source) if table is not None else None
    axes = match.attribute(node, "gather_axis", 0), match.attribute(node, "quantize_axis", 1)
    if table is None or tensor is None or len(table.shape) != 2 or tensor.dtype != oir.DataType.UINT8:
        return "its table is not one of bytes"
    if axes[0] != 0 or axes[1] not in (1, -1):
        return "its blocks do not lie along the rows"
    bits, block = match.attribute(node, "bits", 4), match.attribute(node, "block_size", 128)
    rows, width = table.shape[0], table.shape[1] * 8 // bits
    spread, zero = (rows, -(-width // block)), match.input_of(node, 3)
    return _made(node, table.source, match.input_of(node, 2), zero, tensor, (rows, width), spread, 1, block, bits)


def _dynamic(node: oir.Node) -> Stored | str:
    """The weight of a product whose input is quantized in each run: its scale is a factor of what is computed."""
    tensor, zero = weights.tensor_of(node.inputs[1]), match.input_of(node, 3)
    quantize = match.producer(node.inputs[0], "DynamicQuantizeLinear")
    cast = match.sole_consumer(node.outputs[0], "Cast")
    times = match.sole_consumer(cast.outputs[0], "Mul") if cast is not None else None
    if quantize is None or cast is None or times is None or tensor is None:
        return "it is not clear where its scale is"
    both = match.producer(next(one for one in times.inputs if one is not cast.outputs[0]), "Mul")
    sides = [] if both is None else [one for one in both.inputs if one is not quantize.outputs[1]]
    if len(sides) != 1 or not weights.is_constant(sides[0]):
        return "it is not clear where its scale is"
    axis = 0 if is_op(node, "ConvInteger") else len(tensor.shape) - 1
    size = tuple(tensor.shape.numpy())[axis]
    count = int(np.prod(_shape(sides[0]) or ()))
    if count not in (1, size):
        return "its scales are not one for each output"
    spread = () if count == 1 else (size,)
    return _made(node, node.inputs[1], sides[0], zero, tensor, tuple(tensor.shape.numpy()), spread, axis, 0)


def _made(
    node: oir.Node, value: oir.Value | None, scale: oir.Value | None, zero: oir.Value | None,
    tensor: oir.TensorProtocol | None, shape: tuple[int, ...], spread: tuple[int, ...] | None, axis: int, block: int,
    packed: int = 0,
) -> Stored | str:  # fmt: skip
    if value is None or tensor is None or scale is None or (held := weights.tensor_of(scale)) is None:
        return "its integers or its scales are computed"
    if held.dtype not in _FLOATS or spread is None:
        return "its scales are no floating-point numbers that torch has"
    if zero is not None and not weights.is_constant(zero):
        return "its zero points are computed"
    sizes = {int(np.prod(spread))}
    if zero is not None and not packed:
        sizes.add(int(np.prod(_shape(zero) or ())))
    if int(np.prod(_shape(scale) or ())) not in sizes or len(sizes) > 1:
        return "its zero points and its scales differ in number"
    numbers = _constant(scale)
    if not (np.isfinite(numbers).all() and numbers.all()):
        return "some of its scales are 0 or no numbers"
    bits, unsigned = packed or _BITS[tensor.dtype], packed or tensor.dtype.name.startswith("U")
    low = 0 if unsigned else -(2 ** (bits - 1))
    return Stored(value, scale, zero, low, low + 2**bits - 1, shape, spread, axis, block, packed, (node,))


def _sums(node: oir.Node, one: Stored) -> list[Sum]:
    """The layers that add a bias whose scale is the product of those of their input and of their weight."""
    found = []
    for layer in match.consumers(node.outputs[0]):
        ends = [match.producer(match.input_of(layer, index), "DequantizeLinear") for index in (0, 1)]
        of_input, of_weight = (match.input_of(end, 1) if end is not None else None for end in ends)
        if of_input is None or of_weight is None or not all(map(weights.is_constant, (of_input, of_weight))):
            continue
        whole = (_constant(of_input).astype(np.float64) * _constant(of_weight)).ravel()
        if whole.size in (1, one.scales().size) and np.allclose(whole, one.scales().ravel(), rtol=1e-5, atol=0):
            found.append(Sum(one.value, one.scale, of_input, of_weight))
    return found


def _shape(value: oir.Value | None) -> tuple[int, ...] | None:
    tensor = weights.tensor_of(value)
    return None if tensor is None else tuple(tensor.shape.numpy())


def _constant(value: oir.Value) -> np.ndarray:
    return np.asarray(weights.constant(value))
