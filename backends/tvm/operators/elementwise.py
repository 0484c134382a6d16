"""Operators that act on single elements."""

from __future__ import annotations

import math
from functools import reduce
from typing import Any

import onnx_ir as oir
from tvm import relax, te, tirx, topi

from burnish.backends.tvm.maker import Maker, dtype_name
from burnish.backends.tvm.registry import Unsupported, lowers

op = relax.op

_UNARY = {
    "Neg": op.negative, "Abs": op.abs, "Sqrt": op.sqrt, "Exp": op.exp, "Log": op.log, "Sin": op.sin, "Cos": op.cos,
    "Tan": op.tan, "Asin": op.asin, "Acos": op.acos, "Atan": op.atan, "Sinh": op.sinh, "Cosh": op.cosh,
    "Asinh": op.asinh, "Acosh": op.acosh, "Atanh": op.atanh, "Tanh": op.tanh, "Erf": op.erf, "Floor": op.floor,
    "Ceil": op.ceil, "Sign": op.sign, "Not": op.logical_not, "IsNaN": op.isnan, "Relu": op.nn.relu,
    "Sigmoid": op.sigmoid, "Identity": lambda x: x,
}  # fmt: skip
_BINARY = {
    "Add": op.add, "Sub": op.subtract, "Mul": op.multiply, "Equal": op.equal, "Less": op.less, "Greater": op.greater,
    "LessOrEqual": op.less_equal, "GreaterOrEqual": op.greater_equal, "And": op.logical_and, "Or": op.logical_or,
    "Xor": op.logical_xor,
}  # fmt: skip


def _enter(names: dict[str, Any], arity: int) -> None:
    for name, function in names.items():
        if arity == 1:
            lowers(name)(lambda make, x, function=function: function(x))
        else:
            lowers(name, since=7)(lambda make, a, b, function=function: function(*make.alike(a, b)))


def _is_float(make: Maker, x: Any) -> bool:
    return "float" in make.dtype(x)


def number(make: Maker, x: Any, value: float) -> Any:
    """A constant of the dtype of `x`."""
    return relax.const(value, make.dtype(x))


@lowers("Div", since=7)
def div(make: Maker, a: Any, b: Any) -> Any:
    a, b = make.alike(a, b)
    return op.divide(a, b) if _is_float(make, a) else make.te(_truncated, a, b)


def _truncated(a: Any, b: Any) -> Any:
    """Integer division towards zero, with broadcasting, as ONNX has it."""
    quotient = topi.floor_divide(topi.abs(a), topi.abs(b))
    return topi.where(topi.not_equal(topi.less(a, 0), topi.less(b, 0)), topi.negative(quotient), quotient)


@lowers("Mod", since=10)
def mod(make: Maker, a: Any, b: Any, *, fmod: int = 0) -> Any:
    if fmod or _is_float(make, a):
        raise Unsupported("Mod of floating point")
    return op.floor_mod(a, b)


@lowers("Pow", since=7)
def power(make: Maker, a: Any, b: Any) -> Any:
    if not _is_float(make, a):
        raise Unsupported("Pow of integers")
    array = make.array(b)
    exponent = float(array.reshape(())) if array is not None and array.size == 1 else None
    if exponent == 2.0:
        return op.multiply(a, a)
    if exponent == 3.0:
        return op.multiply(op.multiply(a, a), a)
    if exponent == 0.5:
        return op.sqrt(a)
    return op.power(a, op.astype(b, make.dtype(a)) if make.dtype(b) != make.dtype(a) else b)


@lowers("Reciprocal")
def reciprocal(make: Maker, x: Any) -> Any:
    return op.divide(number(make, x, 1), x)


@lowers("Round", since=11)
def rounded(make: Maker, x: Any) -> Any:
    return make.te(lambda t: te.compute(t.shape, lambda *i: tirx.nearbyint(t(*i)), name="round"), x)


@lowers("Gelu", since=20)
def gelu(make: Maker, x: Any, *, approximate: str = "none") -> Any:
    return op.nn.gelu_tanh(x) if approximate == "tanh" else op.nn.gelu(x)


@lowers("Gelu", domain="com.microsoft")
def gelu_microsoft(make: Maker, x: Any) -> Any:
    return op.nn.gelu(x)


@lowers("LeakyRelu", since=6)
def leaky_relu(make: Maker, x: Any, *, alpha: float = 0.01) -> Any:
    return op.nn.leakyrelu(x, alpha)


@lowers("Elu", since=6)
def elu(make: Maker, x: Any, *, alpha: float = 1.0) -> Any:
    zero = number(make, x, 0)
    grown = op.multiply(number(make, x, alpha), op.subtract(op.exp(op.minimum(x, zero)), number(make, x, 1)))
    return op.add(op.nn.relu(x), grown)


@lowers("Softplus")
def softplus(make: Maker, x: Any) -> Any:
    positive, negative = op.nn.relu(x), op.negative(op.abs(x))
    return op.add(positive, op.log(op.add(number(make, x, 1), op.exp(negative))))


@lowers("HardSigmoid", since=6)
def hard_sigmoid(make: Maker, x: Any, *, alpha: float = 0.2, beta: float = 0.5) -> Any:
    return op.clip(op.add(op.multiply(x, number(make, x, alpha)), number(make, x, beta)), 0.0, 1.0)


@lowers("HardSwish", since=14)
def hard_swish(make: Maker, x: Any) -> Any:
    return op.multiply(x, hard_sigmoid(make, x, alpha=1 / 6, beta=0.5))


@lowers("Swish", since=24)
def swish(make: Maker, x: Any, *, alpha: float = 1.0) -> Any:
    return op.multiply(x, op.sigmoid(x if alpha == 1.0 else op.multiply(x, number(make, x, alpha))))


@lowers("QuickGelu", domain="com.microsoft")
def quick_gelu(make: Maker, x: Any, *, alpha: float = 1.702) -> Any:
    return swish(make, x, alpha=alpha)


@lowers("PRelu", since=9)
def prelu(make: Maker, x: Any, slope: Any) -> Any:
    return op.where(op.less(x, number(make, x, 0)), op.multiply(x, slope), x)


@lowers("Clip", since=6)
def clip_by_attributes(make: Maker, x: Any, *, min: float = -math.inf, max: float = math.inf) -> Any:
    return _clipped(x, number(make, x, min), number(make, x, max))


@lowers("Clip", since=11)
def clip(make: Maker, x: Any, low: Any = None, high: Any = None) -> Any:
    return _clipped(x, low, high)


def _clipped(x: Any, low: Any, high: Any) -> Any:
    at_least = x if low is None else op.maximum(x, low)
    return at_least if high is None else op.minimum(at_least, high)


@lowers("Max", since=8)
def maximum(make: Maker, *inputs: Any) -> Any:
    return reduce(op.maximum, make.alike(*inputs))


@lowers("Min", since=8)
def minimum(make: Maker, *inputs: Any) -> Any:
    return reduce(op.minimum, make.alike(*inputs))


@lowers("Sum", since=8)
def sums(make: Maker, *inputs: Any) -> Any:
    return reduce(op.add, make.alike(*inputs))


@lowers("Mean", since=8)
def means(make: Maker, *inputs: Any) -> Any:
    return op.divide(reduce(op.add, make.alike(*inputs)), number(make, inputs[0], len(inputs)))


@lowers("Where", since=9)
def where(make: Maker, condition: Any, a: Any, b: Any) -> Any:
    return op.where(*make.alike(condition, a, b))


@lowers("Cast", since=6)
def cast(make: Maker, x: Any, *, to: int, saturate: int = 1) -> Any:
    found, wanted = make.dtype(x), dtype_name(oir.DataType(to))
    if wanted == "bool":
        return op.not_equal(x, relax.const(0, found)) if found != "bool" else x
    return op.astype(x, wanted)


_enter(_UNARY, 1)
_enter(_BINARY, 2)
