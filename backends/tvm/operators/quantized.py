"""Quantized values: to and from integers, and products of integers."""

from __future__ import annotations

from typing import Any

import onnx_ir as oir
from tvm import relax, te, tirx

from burnish.backends.tvm.maker import Maker
from burnish.backends.tvm.operators.elementwise import mapped
from burnish.backends.tvm.operators.network import WINDOW, convolved, product
from burnish.backends.tvm.registry import Unsupported, lowers

op = relax.op
Given = dict[str, Any]

_LIMITS = {
    oir.DataType.INT4: (-8, 7), oir.DataType.UINT4: (0, 15), oir.DataType.INT8: (-128, 127),
    oir.DataType.UINT8: (0, 255), oir.DataType.INT16: (-32768, 32767), oir.DataType.UINT16: (0, 65535),
}  # fmt: skip


def limits(make: Maker, index: int = 0) -> tuple[int, int]:
    """The smallest and largest number of the quantized dtype of an output."""
    dtype = make.output_dtype(index)
    if dtype not in _LIMITS:
        raise Unsupported(f"numbers quantized to {dtype.name.lower()}")
    return _LIMITS[dtype]


def spread(tensor: Any, at: tuple[Any, ...], axis: int, block: int) -> Any:
    """The scale or zero point of the element at `at`: of the tensor, of its place on the axis, or of its block."""
    if block:
        return tensor(*[place // block if index == axis else place for index, place in enumerate(at)])
    if not tensor.shape:
        return tensor()
    single = isinstance(tensor.shape[0], tirx.IntImm) and int(tensor.shape[0]) == 1
    return tensor(0 if single else at[axis])


def saturated(value: Any, zero: Any, low: int, high: int, dtype: str) -> Any:
    """A number rounded half to even, moved by the zero point and held within the limits."""
    kind = str(value.ty.dtype)
    moved = tirx.nearbyint(value) + tirx.Cast(kind, zero)
    return tirx.Cast(dtype, tirx.max(tirx.min(moved, tirx.const(high, kind)), tirx.const(low, kind)))


@lowers("QuantizeLinear", since=10)
@lowers("QuantizeLinear", domain="com.microsoft")
def quantize(
    make: Maker,
    x: Any,
    scale: Any,
    zero: Any = None,
    *,
    axis: int = 1,
    block_size: int = 0,
    output_dtype: int = 0,
    saturate: int = 1,
    precision: int = 0,
) -> Any:
    low, high = limits(make)
    axis = _axis(make, x, scale, axis)
    dtype = make.output_dtype_name()
    wide = "float64" if make.dtype(x) == "float64" else "float32"

    def quantized(t: Any, s: Any, *zeros: Any) -> Any:
        def element(*at: Any) -> Any:
            offset = spread(zeros[0], at, axis, block_size) if zeros else tirx.const(0, dtype)
            number = tirx.Cast(wide, t(*at)) / tirx.Cast(wide, spread(s, at, axis, block_size))
            return saturated(number, offset, low, high, dtype)

        return te.compute(t.shape, element, name="quantize")

    return make.te(quantized, x, scale, *(() if zero is None else (zero,)))


def _axis(make: Maker, x: Any, scale: Any, axis: int) -> int:
    rank = make.rank(x)
    if make.rank(scale) == 0 or rank == 0:
        return 0
    if not -rank <= axis < rank and make.shape(scale) != [1]:
        raise Unsupported(f"the axis {axis} of a tensor of rank {rank}")
    return axis % rank


@lowers("DequantizeLinear", since=10)
@lowers("DequantizeLinear", domain="com.microsoft")
def dequantize(
    make: Maker, x: Any, scale: Any, zero: Any = None, *, axis: int = 1, block_size: int = 0, output_dtype: int = 0
) -> Any:
    axis = _axis(make, x, scale, axis)
    dtype = make.output_dtype_name()

    def dequantized(t: Any, s: Any, *zeros: Any) -> Any:
        def element(*at: Any) -> Any:
            number = tirx.Cast("int32", t(*at))
            if zeros:
                number = number - tirx.Cast("int32", spread(zeros[0], at, axis, block_size))
            factor = spread(s, at, axis, block_size)
            return tirx.Cast(dtype, tirx.Cast(str(factor.ty.dtype), number) * factor)

        return te.compute(t.shape, element, name="dequantize")

    return make.te(dequantized, x, scale, *(() if zero is None else (zero,)))


@lowers("DynamicQuantizeLinear", since=11, several=True)
def quantize_dynamically(make: Maker, x: Any) -> tuple[Any, ...]:
    low, high = (make.emit(op.reshape(find(x, None, False), [1])) for find in (op.min, op.max))

    def scaled(least: Any, most: Any) -> Any:
        width = tirx.max(most(0), tirx.const(0.0, "float32")) - tirx.min(least(0), tirx.const(0.0, "float32"))
        found = width / tirx.const(255.0, "float32")
        one = tirx.const(1.0, "float32")
        return te.compute((), lambda: tirx.Select(found == tirx.const(0.0, "float32"), one, found), name="scale")

    scale = make.te(scaled, low, high)

    def shifted(least: Any, s: Any) -> Any:
        start = -tirx.min(least(0), tirx.const(0.0, "float32")) / s()
        return te.compute((), lambda: saturated(start, tirx.const(0, "uint8"), 0, 255, "uint8"), name="zero")

    zero = make.te(shifted, low, scale)
    found = mapped(make, lambda t, s, z: saturated(t / s, z, 0, 255, "uint8"), x, scale, zero)
    return found, scale, zero


def centred(make: Maker, x: Any, zero: Any, axis: int) -> Any:
    """Quantized integers as int32 without their zero point, which is one number or one for each place on an axis."""
    given = (x,) if zero is None else (x, zero)

    def moved(t: Any, *zeros: Any) -> Any:
        def element(*at: Any) -> Any:
            number = tirx.Cast("int32", t(*at))
            return number - tirx.Cast("int32", spread(zeros[0], at, axis, 0)) if zeros else number

        return te.compute(t.shape, element, name="centred")

    if zero is not None and make.rank(zero) > 1:
        raise Unsupported("zero points for rows and columns")
    return make.te(moved, *given)


@lowers("MatMulInteger", since=10)
def matmul_integer(make: Maker, a: Any, b: Any, a_zero: Any = None, b_zero: Any = None) -> Any:
    rows, columns = max(make.rank(a) - 2, 0), make.rank(b) - 1
    return product(make, centred(make, a, a_zero, rows), centred(make, b, b_zero, columns))


@lowers("ConvInteger", since=10, more=WINDOW)
def conv_integer(make: Maker, x: Any, w: Any, x_zero: Any = None, w_zero: Any = None, **window: Any) -> Any:
    return convolved(make, centred(make, x, x_zero, 1), centred(make, w, w_zero, 0), **window)


def _rescaled(make: Maker, sums: Any, given: Given, axis: int) -> Any:
    """int32 sums as quantized numbers: times the scales of the factors, over the scale of the output."""
    low, high = limits(make)
    dtype = make.output_dtype_name()

    def rescaled(t: Any, a: Any, b: Any, y: Any, z: Any) -> Any:
        def element(*at: Any) -> Any:
            factor = spread(a, at, 0, 0) * spread(b, at, axis, 0) / spread(y, at, 0, 0)
            return saturated(tirx.Cast("float32", t(*at)) * factor, spread(z, at, 0, 0), low, high, dtype)

        return te.compute(t.shape, element, name="rescaled")

    for name in ("a", "y", "z"):
        if make.shape(given[name]) not in ([], [1]):
            raise Unsupported("scales of rows")
    return make.te(rescaled, sums, *(given[name] for name in "abyz"))


@lowers("QLinearMatMul", since=10)
def qlinear_matmul(
    make: Maker, a: Any, a_scale: Any, a_zero: Any, b: Any, b_scale: Any, b_zero: Any, y_scale: Any, y_zero: Any
) -> Any:
    columns = make.rank(b) - 1
    sums = product(make, centred(make, a, a_zero, make.rank(a) - 2), centred(make, b, b_zero, columns))
    given = {"a": a_scale, "b": b_scale, "y": y_scale, "z": y_zero}
    return _rescaled(make, make.emit(sums), given, make.rank(make.emit(sums)) - 1)


@lowers("QLinearConv", since=10, more=WINDOW)
def qlinear_conv(
    make: Maker,
    x: Any,
    x_scale: Any,
    x_zero: Any,
    w: Any,
    w_scale: Any,
    w_zero: Any,
    y_scale: Any,
    y_zero: Any,
    bias: Any = None,
    **window: Any,
) -> Any:
    sums = make.emit(convolved(make, centred(make, x, x_zero, 1), centred(make, w, w_zero, 0), bias, **window))
    return _rescaled(make, sums, {"a": x_scale, "b": w_scale, "y": y_scale, "z": y_zero}, 1)


def _enter_binary(name: str, function: Any) -> None:
    @lowers(name, domain="com.microsoft")
    def binary(
        make: Maker, a: Any, a_scale: Any, a_zero: Any, b: Any, b_scale: Any, b_zero: Any, y_scale: Any, y_zero: Any
    ) -> Any:
        """In floating point between the two ends, as ONNX Runtime does."""
        low, high = limits(make)
        dtype = make.output_dtype_name()

        def joined(x: Any, xs: Any, xz: Any, y: Any, ys: Any, yz: Any, s: Any, z: Any) -> Any:
            first, second = (
                tirx.Cast("float32", tirx.Cast("int32", one) - tirx.Cast("int32", zero)) * scale
                for one, scale, zero in ((x, xs, xz), (y, ys, yz))
            )
            return saturated(function(first, second) / s, z, low, high, dtype)

        if any(make.shape(one) not in ([], [1]) for one in (a_scale, a_zero, b_scale, b_zero, y_scale, y_zero)):
            raise Unsupported("scales that are not one number")
        return mapped(make, joined, a, a_scale, a_zero, b, b_scale, b_zero, y_scale, y_zero)


_enter_binary("QLinearAdd", lambda a, b: a + b)
_enter_binary("QLinearMul", lambda a, b: a * b)


@lowers("QGemm", domain="com.microsoft")
def qgemm(
    make: Maker,
    a: Any,
    a_scale: Any,
    a_zero: Any,
    b: Any,
    b_scale: Any,
    b_zero: Any,
    bias: Any = None,
    y_scale: Any = None,
    y_zero: Any = None,
    *,
    transA: int = 0,  # noqa: N803
    transB: int = 0,  # noqa: N803
    alpha: float = 1.0,
) -> Any:
    if alpha != 1.0 or transA or y_scale is None:
        raise Unsupported("a QGemm of this form")
    right = make.emit(op.permute_dims(b, [1, 0])) if transB else b
    sums = make.emit(product(make, centred(make, a, a_zero, 0), centred(make, right, b_zero, 1)))
    if bias is not None:
        sums = make.emit(op.add(sums, bias))
    return _rescaled(make, sums, {"a": a_scale, "b": b_scale, "y": y_scale, "z": y_zero}, 1)


@lowers("QLinearGlobalAveragePool", domain="com.microsoft")
def qlinear_global_average(
    make: Maker, x: Any, x_scale: Any, x_zero: Any, y_scale: Any, y_zero: Any, *, channels_last: int = 0
) -> Any:
    if channels_last:
        raise Unsupported("channels at the end")
    low, high = limits(make)
    wide = make.emit(op.astype(centred(make, x, x_zero, 0), "float32"))
    mean = make.emit(op.mean(wide, list(range(2, make.rank(x))), True))
    dtype = make.output_dtype_name()
    return mapped(make, lambda t, a, y, z: saturated(t * a / y, z, low, high, dtype), mean, x_scale, y_scale, y_zero)
