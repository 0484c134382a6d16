"""Products with quantized weights as one kernel of two stages, the weight as numbers and the product.

A schedule then computes the first stage where the second one reads it, so that the weight is never written: the kernel
reads the bytes of the integers alone. What is recognised is a constant of 4 or 8 bits behind a DequantizeLinear, with a
scale for the tensor, for each row or column, or for blocks, that a MatMul or Gemm reads as its second factor, through a
Transpose or not.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import onnx_ir as oir
from tvm import relax, te, tirx

from burnish.backends.tvm import packing
from burnish.backends.tvm.maker import Maker, dtype_name
from burnish.backends.tvm.operators.movement import times
from burnish.ir import match, weights
from burnish.ir.walk import is_op

op = relax.op

_NARROW = frozenset((oir.DataType.INT8, oir.DataType.UINT8, oir.DataType.INT4, oir.DataType.UINT4))
Number = Callable[..., Any]


@dataclass(frozen=True)
class Stored:
    """A weight as it lies in memory.

    Attributes:
        shape: rows and columns in memory, of which the product sums over the rows.
        transposed: whether it sums over the columns, [N, K], and not over the rows, [K, N].
        given: the expressions that `number` reads.
        number: the weight at a row and column as a tensor expression of the placeholders of `given`.
    """

    shape: tuple[int, int]
    transposed: bool
    given: tuple[Any, ...]
    number: Callable[[Sequence[Any], Any, Any], Any]

    @property
    def depth(self) -> int:
        """The size that is summed over, K."""
        return self.shape[self.transposed]


def multiplied(make: Maker, a: Any, stored: Stored) -> Any:
    """a[..., K] times a weight, to [..., N] in float32; one kernel."""
    depth, width = stored.depth, stored.shape[not stored.transposed]
    shape = make.shape(a)
    flat = a if len(shape) == 2 else make.emit(op.reshape(a, [times(shape[:-1]), depth]))

    def both(x: Any, *given: Any) -> Any:
        whole = te.compute(stored.shape, lambda row, column: stored.number(given, row, column), name="dequantize")
        k = te.reduce_axis((0, depth), name="k")

        def element(m: Any, n: Any) -> Any:
            number = whole(n, k) if stored.transposed else whole(k, n)
            return te.sum(tirx.Cast("float32", x(m, k)) * tirx.Cast("float32", number), axis=k)

        return te.compute((x.shape[0], width), element, name="matmul")

    found = make.te(both, flat, *stored.given)
    return found if len(shape) == 2 else make.emit(op.reshape(found, [*shape[:-1], width]))


def between(node: oir.Node, index: int = 1) -> list[oir.Node]:
    """What makes an input of a node of a quantized weight: a Transpose or none, a DequantizeLinear."""
    made: list[oir.Node] = []
    maker = match.input_of(node, index)
    transposed = match.producer(maker, "Transpose")
    if transposed is not None and list(match.attribute(transposed, "perm", [1, 0])) == [1, 0]:
        made, maker = [transposed], transposed.inputs[0]
    found = match.producer(maker, "DequantizeLinear") or match.producer(
        maker, "DequantizeLinear", domain="com.microsoft"
    )
    tensors = [] if found is None else [weights.tensor_of(one) for one in found.inputs if one is not None]
    first = tensors[0] if tensors else None
    if found is None or first is None or first.dtype not in _NARROW or len(first.shape) != 2:
        return []
    return [] if any(one is None for one in tensors) else [*made, found]


def product_alone(node: oir.Node) -> list[oir.Node]:
    """A product with a quantized weight and the nodes that make the weight; none where a node is no such product."""
    if is_op(node, "MatMulNBits", domain="com.microsoft"):
        return [node]
    made = between(node) if is_op(node, "MatMul", "Gemm") else []
    return [*reversed(made), node] if made else []


def behind(make: Maker, index: int, transposed: bool = False) -> Stored | None:
    """The quantized weight that an input of the node is; None when it is anything else.

    Args:
        make: of the node.
        index: of the input.
        transposed: whether the node reads it transposed.
    """
    path = between(make.node, index)
    if not path:
        return None
    node = path[-1]
    transposed ^= len(path) > 1
    read = [one for one in node.inputs if one is not None]
    kinds = [tensor for one in read if (tensor := weights.tensor_of(one)) is not None]
    rows, columns = (int(size) for size in kinds[0].shape.numpy())
    axis, block = match.attribute(node, "axis", 1) % 2, match.attribute(node, "block_size", 0)
    if len(kinds[1].shape) > 1 and not block:
        return None
    given = tuple(make.stored(one) for one in read)
    dtype = dtype_name(make.value_dtype(node.outputs[0]))

    def number(places: Sequence[Any], row: Any, column: Any) -> Any:
        found = _read(places[0], kinds[0], (row, column))
        factor = _spread(places[1], kinds[1], (row, column), axis, block)
        if len(kinds) > 2:
            found = found - _spread(places[2], kinds[2], (row, column), axis, block)
        return tirx.Cast(dtype, tirx.Cast(str(factor.ty.dtype), found) * factor)

    return Stored((rows, columns), transposed, given, number)


def _read(place: Any, tensor: oir.TensorProtocol, at: Sequence[Any]) -> Any:
    """An element: of integers as int32, those of 4 bits taken out of their byte."""
    if not packing.is_packed(tensor):
        found = place(*at)
        return found if tensor.dtype.is_floating_point() else tirx.Cast("int32", found)
    flat: Any = 0
    for index, size in zip(at, tensor.shape.numpy(), strict=True):
        flat = flat * int(size) + index
    return packing.element_of(place(flat // 2), flat, signed=tensor.dtype is oir.DataType.INT4)


def _spread(place: Any, tensor: oir.TensorProtocol, at: tuple[Any, Any], axis: int, block: int) -> Any:
    """The scale or zero point of the element at a row and column."""
    if block:
        return _read(place, tensor, [one // block if index == axis else one for index, one in enumerate(at)])
    if tensor.size == 1:
        return _read(place, tensor, [tirx.const(0, "int64")] * len(tensor.shape))
    return _read(place, tensor, [at[axis]])
