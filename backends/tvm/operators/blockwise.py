"""Weights of a few bits in blocks, each with a scale, unpacked in the kernel that uses them."""

from __future__ import annotations

from typing import Any

import onnx_ir as oir
from tvm import relax, te, tirx

from burnish.backends.tvm import packing
from burnish.backends.tvm.maker import Maker
from burnish.backends.tvm.operators.movement import times
from burnish.backends.tvm.registry import Unsupported, lowers

op = relax.op


def unpacked(byte: Any, place: Any, bits: int) -> Any:
    """The number at a place of packed numbers, as int32; the lowest bits of a byte hold the first one.

    Args:
        byte: the byte that holds it.
        place: its place in the row.
        bits: 2, 4 or 8 a number.
    """
    whole = tirx.Cast("int32", byte)
    if bits == 8:
        return whole
    if bits == 4:
        return packing.element_of(byte, place, signed=False)
    shift = tirx.Cast("int32", tirx.floormod(place, 8 // bits)) * bits
    return tirx.bitwise_and(tirx.shift_right(whole, shift), tirx.const((1 << bits) - 1, "int32"))


@lowers("MatMulNBits", domain="com.microsoft")
def matmul_bits(
    make: Maker,
    a: Any,
    b: Any,
    scales: Any,
    zeros: Any = None,
    g_idx: Any = None,
    bias: Any = None,
    *,
    K: int,
    N: int,
    bits: int = 4,
    block_size: int,
    accuracy_level: int = 0,
) -> Any:
    """a[..., K] times the transpose of the weights [N, K]; one kernel, summed in float32."""
    if bits not in (2, 4, 8) or g_idx is not None:
        raise Unsupported("a MatMulNBits of this form")
    shape, dtype, blocks, per = make.shape(a), make.dtype(a), -(-K // block_size), 8 // bits
    packed = zeros is not None and make.dtype(zeros) == "uint8"
    flat = _shaped(make, a, [times(shape[:-1]), K])
    b = _shaped(make, b, [N, blocks, block_size // per])
    given = [_shaped(make, scales, [N, blocks])]
    if zeros is not None:
        given.append(_shaped(make, zeros, [N, -(-blocks // per) if packed else blocks]))

    def multiplied(x: Any, w: Any, s: Any, *z: Any) -> Any:
        def weight(n: Any, k: Any) -> Any:
            block = k // block_size
            number = tirx.Cast("float32", unpacked(w(n, block, k % block_size // per), k % block_size, bits))
            if not z:
                zero = tirx.const(float(1 << bits - 1), "float32")
            elif packed:
                zero = tirx.Cast("float32", unpacked(z[0](n, block // per), block, bits))
            else:
                zero = tirx.Cast("float32", z[0](n, block))
            return tirx.Cast(dtype, (number - zero) * tirx.Cast("float32", s(n, block)))

        whole = te.compute((N, K), weight, name="dequantize")
        k = te.reduce_axis((0, K), name="k")

        def element(m: Any, n: Any) -> Any:
            return te.sum(tirx.Cast("float32", x(m, k)) * tirx.Cast("float32", whole(n, k)), axis=k)

        return te.compute((x.shape[0], N), element, name="matmul")

    found = make.te(multiplied, flat, b, *given)
    if bias is not None:
        found = make.emit(op.add(found, op.astype(bias, "float32")))
    found = make.emit(op.astype(found, dtype)) if dtype != "float32" else found
    return _shaped(make, found, [*shape[:-1], N])


def _shaped(make: Maker, x: Any, shape: list[Any]) -> Any:
    """A tensor in a shape; itself where it has it, for a reshape can become a kernel that copies."""
    return x if len(shape) == make.rank(x) else make.emit(op.reshape(x, shape))


@lowers("GatherBlockQuantized", domain="com.microsoft")
def gather_blocks(
    make: Maker,
    data: Any,
    indices: Any,
    scales: Any,
    zeros: Any = None,
    *,
    gather_axis: int = 0,
    quantize_axis: int = 1,
    block_size: int = 128,
    bits: int = 4,
) -> Any:
    """Rows of a table of packed numbers, by indices of any rank; indices below zero count from the end."""
    rows, rank = make.shape(data)[0], make.rank(data)
    if gather_axis % rank or quantize_axis % rank != rank - 1 or rank != 2 or bits not in (4, 8):
        raise Unsupported("a GatherBlockQuantized of this form")
    bytes_of = make.input_dtype(0) is oir.DataType.UINT8
    per = 8 // bits if bytes_of else 1
    width = make.shape(data)[1] * per
    default = 1 << bits - 1 if bytes_of else 0
    dtype = make.dtype(scales)

    def gathered(table: Any, at: Any, s: Any, *z: Any) -> Any:
        def element(*place: Any) -> Any:
            row, k = at(*place[:-1]), place[-1]
            row = tirx.Select(row < tirx.const(0, str(row.ty.dtype)), row + tirx.Cast(str(row.ty.dtype), rows), row)
            block = k // block_size
            number = unpacked(table(row, k // per), k, bits) if per > 1 else tirx.Cast("int32", table(row, k))
            zero: Any = tirx.const(default, "int32")
            if z:
                zero = (
                    unpacked(z[0](row, block // per), block, bits) if per > 1 else tirx.Cast("int32", z[0](row, block))
                )
            return tirx.Cast(dtype, tirx.Cast("float32", number - zero) * tirx.Cast("float32", s(row, block)))

        return te.compute((*at.shape, width), element, name="gather")

    return make.te(gathered, data, indices, scales, *(() if zeros is None else (zeros,)))
