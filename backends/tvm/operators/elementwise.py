"""Operators that act on single elements."""

from __future__ import annotations

import math
from functools import reduce
from typing import Any

from tvm import relax, te, tirx

from burnish.backends.tvm.maker import Maker
from burnish.backends.tvm.registry import Unsupported, lowers

op = relax.op

_UNARY = {
    "Neg": op.negative, "Abs": op.abs, "Sqrt": op.sqrt, "Exp": op.exp, "Log": op.log, "Sin": op.sin, "Cos": op.cos,
    "Tan": op.tan, "Asin": op.asin, "Acos": op.acos, "Atan": op.atan, "Sinh": op.sinh, "Cosh": op.cosh,
    "Asinh": op.asinh, "Acosh": op.acosh, "Atanh": op.atanh, "Tanh": op.tanh, "Erf": op.erf, "Floor": op.floor,
    "Ceil": op.ceil, "Not": op.logical_not, "IsNaN": op.isnan, "Identity": lambda x: x,
}  # fmt: skip
_BINARY = {
    "Add": op.add, "Sub": op.subtract, "Mul": op.multiply, "Equal": op.equal, "Less": op.less, "Greater": op.greater,
    "LessOrEqual": op.less_equal, "GreaterOrEqual": op.greater_equal, "And": op.logical_and, "Or": op.logical_or,
    "Xor": op.logical_xor, "BitwiseAnd": op.bitwise_and, "BitwiseOr": op.bitwise_or, "BitwiseXor": op.bitwise_xor,
}  # fmt: skip


def mapped(make: Maker, function: Any, *given: Any) -> Any:
    """What a function of elements computes of tensors that broadcast together; one kernel."""

    def elements(*tensors: Any) -> Any:
        rank = max(len(one.shape) for one in tensors)
        shape = [
            _joined([one.shape[at - rank] for one in tensors if len(one.shape) >= rank - at]) for at in range(rank)
        ]
        return te.compute(
            shape, lambda *at: function(*[one(*_within(one, at, shape)) for one in tensors]), name="elements"
        )

    return make.te(elements, *(make.alike(*given) if len(given) > 1 else given))


def _joined(sizes: list[Any]) -> Any:
    return next((size for size in sizes if not _is_single(size)), sizes[0])


def _within(tensor: Any, at: tuple[Any, ...], shape: list[Any]) -> list[Any]:
    """Indices into a tensor; 0 is written only where the result is larger, else TVM fuses it with nothing before it."""
    start = len(at) - len(tensor.shape)
    places = zip(tensor.shape, at[start:], shape[start:], strict=True)
    return [0 if _is_single(size) and not _is_single(whole) else place for size, place, whole in places]


def _is_single(size: Any) -> bool:
    return isinstance(size, int | tirx.IntImm) and int(size) == 1


def like(element: Any, value: float) -> Any:
    """A constant of the dtype of an element."""
    return tirx.const(value, str(element.ty.dtype))


def larger(a: Any, b: Any) -> Any:
    """The larger of two elements, NaN where one is NaN: what `max` is depends on the target."""
    return tirx.Select(tirx.any(a < b, tirx.isnan(b)), b, a) if "float" in str(a.ty.dtype) else tirx.max(a, b)


def smaller(a: Any, b: Any) -> Any:
    """The smaller of two elements, NaN where one is NaN."""
    return tirx.Select(tirx.any(a > b, tirx.isnan(b)), b, a) if "float" in str(a.ty.dtype) else tirx.min(a, b)


def _unary(function: Any) -> Any:
    return lambda make, x: function(x)


def _binary(function: Any) -> Any:
    return lambda make, a, b: function(*make.alike(a, b))


def _is_float(make: Maker, x: Any) -> bool:
    return "float" in make.dtype(x)


def number(make: Maker, x: Any, value: float) -> Any:
    """A constant of the dtype of `x`."""
    return relax.const(value, make.dtype(x))


@lowers("Div", since=7)
def div(make: Maker, a: Any, b: Any) -> Any:
    return op.divide(*make.alike(a, b)) if _is_float(make, a) else mapped(make, tirx.truncdiv, a, b)


@lowers("Mod", since=10)
def mod(make: Maker, a: Any, b: Any, *, fmod: int = 0) -> Any:
    if not _is_float(make, a):
        return mapped(make, tirx.truncmod if fmod else tirx.floormod, a, b)
    if make.dtype(a) not in ("float32", "float64"):
        raise Unsupported(f"Mod of {make.dtype(a)}")
    name = "fmodf" if make.dtype(a) == "float32" else "fmod"

    def remainder(x: Any, y: Any) -> Any:
        found = tirx.call_pure_extern(make.dtype(a), name, x, y)
        zero = like(y, 0)
        apart = tirx.any(tirx.all(found < zero, y > zero), tirx.all(found > zero, y < zero))
        return found if fmod else tirx.Select(apart, found + y, found)

    return mapped(make, remainder, a, b)


@lowers("BitShift", since=11)
def bit_shift(make: Maker, a: Any, b: Any, *, direction: str) -> Any:
    if not make.dtype(a).startswith("uint"):
        raise Unsupported("BitShift of signed integers")
    width = int(make.dtype(a).removeprefix("uint"))

    def shifted(x: Any, y: Any) -> Any:
        by = tirx.min(y, like(y, width - 1))
        moved = x << by if direction == "LEFT" else x >> by
        return tirx.Select(y < like(y, width), moved, like(x, 0))

    return mapped(make, shifted, a, b)


@lowers("BitwiseNot", since=18)
def bitwise_not(make: Maker, x: Any) -> Any:
    return op.bitwise_not(x)


@lowers("Sign", since=9)
def sign(make: Maker, x: Any) -> Any:
    if make.dtype(x).startswith("uint"):
        return op.minimum(x, number(make, x, 1))

    def signed(t: Any) -> Any:
        low = tirx.Select(t < like(t, 0), like(t, -1), t)
        return tirx.Select(t > like(t, 0), like(t, 1), low)

    return mapped(make, signed, x)


@lowers("IsInf", since=10)
def is_inf(make: Maker, x: Any, *, detect_negative: int = 1, detect_positive: int = 1) -> Any:
    found = [
        op.equal(x, number(make, x, side))
        for side, wanted in ((math.inf, detect_positive), (-math.inf, detect_negative))
        if wanted
    ]
    return reduce(op.logical_or, found) if found else op.full(make.shape(x), relax.const(False), "bool")


@lowers("Pow", since=7)
def power(make: Maker, a: Any, b: Any) -> Any:
    array = make.array(b)
    exponent = float(array.reshape(())) if array is not None and array.size == 1 else None
    if array is not None and exponent is not None and array.ndim <= make.rank(a):
        if exponent == 1.0:
            return a
        if exponent in (2.0, 3.0):
            return reduce(op.multiply, [a] * int(exponent))
        if exponent == 0.5 and _is_float(make, a):
            return op.sqrt(a)
    if not _is_float(make, a):
        return _integer_power(make, a, b)
    a, b = make.alike(a, b)
    return op.power(a, op.astype(b, make.dtype(a)) if make.dtype(b) != make.dtype(a) else b)


def _integer_power(make: Maker, a: Any, b: Any) -> Any:
    """Through float64, as ONNX Runtime does."""
    dtype = make.dtype(a)

    def powered(x: Any, y: Any) -> Any:
        return tirx.Cast(dtype, tirx.pow(tirx.Cast("float64", x), tirx.Cast("float64", y)))

    return mapped(make, powered, a, b)


@lowers("Reciprocal")
def reciprocal(make: Maker, x: Any) -> Any:
    return op.divide(number(make, x, 1), x)


@lowers("Dropout", since=7, several=True)
def dropout(make: Maker, x: Any, *, ratio: float = 0.5) -> tuple[Any, ...]:
    if any(out.name for out in make.node.outputs[1:]):
        raise Unsupported("the mask of Dropout")
    return (x,)


@lowers("Dropout", since=12, several=True)
def dropout_by_input(make: Maker, x: Any, ratio: Any = None, training: Any = None, *, seed: int = 0) -> tuple[Any, ...]:
    array = None if training is None else make.array(training)
    if training is not None and (array is None or bool(array.reshape(()))):
        raise Unsupported("Dropout in training")
    if any(out.name for out in make.node.outputs[1:]):
        raise Unsupported("the mask of Dropout")
    return (x,)


@lowers("Round", since=11)
def rounded(make: Maker, x: Any) -> Any:
    return make.te(lambda t: te.compute(t.shape, lambda *i: tirx.nearbyint(t(*i)), name="round"), x)


@lowers("Clip", since=6)
def clip_by_attributes(make: Maker, x: Any, *, min: float | None = None, max: float | None = None) -> Any:
    low, high = (None if one is None else number(make, x, one) for one in (min, max))
    return clip(make, x, low, high)


@lowers("Clip", since=11)
def clip(make: Maker, x: Any, low: Any = None, high: Any = None) -> Any:
    """Bounds left out are the lowest and highest number of the dtype, which infinities become; NaN stays NaN."""
    dtype = make.dtype(x)
    if _is_float(make, x):
        low, high = (
            relax.const(sign * _HIGHEST[dtype], dtype) if bound is None else bound
            for bound, sign in ((low, -1.0), (high, 1.0))
        )
    given = [x, *(one for one in (low, high) if one is not None)]

    def clipped(t: Any, *bounds: Any) -> Any:
        rest = list(bounds)
        if low is not None:
            least = rest.pop(0)
            t = tirx.Select(t < least, least, t)
        return tirx.Select(t > rest[0], rest[0], t) if rest else t

    return mapped(make, clipped, *given)


_HIGHEST = {"float16": 65504.0, "bfloat16": 3.3895313892515355e38, "float32": 3.4028234663852886e38}
_HIGHEST["float64"] = 1.7976931348623157e308


@lowers("Max", since=8)
def maximum(make: Maker, *inputs: Any) -> Any:
    return reduce(lambda a, b: mapped(make, larger, a, b), inputs)


@lowers("Min", since=8)
def minimum(make: Maker, *inputs: Any) -> Any:
    return reduce(lambda a, b: mapped(make, smaller, a, b), inputs)


@lowers("Sum", since=8)
def sums(make: Maker, *inputs: Any) -> Any:
    return reduce(op.add, make.alike(*inputs))


@lowers("Mean", since=8)
def means(make: Maker, *inputs: Any) -> Any:
    return op.divide(reduce(op.add, make.alike(*inputs)), number(make, inputs[0], len(inputs)))


@lowers("Where", since=9)
def where(make: Maker, condition: Any, a: Any, b: Any) -> Any:
    return op.where(*make.alike(condition, a, b))


for _name, _function in _UNARY.items():
    lowers(_name)(_unary(_function))
for _name, _function in _BINARY.items():
    lowers(_name, since=7)(_binary(_function))
