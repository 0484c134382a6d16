"""Operators that treat every element alone, with broadcasting."""

# mypy: disable-error-code="no-any-return"
# NumPy types the results of arithmetic on its arrays as Any.

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx_ir as oir

from burnish.backends.reference.registry import OPERATORS, Array, Call, cast, operator


def erf(x: Array) -> Array:
    """The error function."""
    from scipy.special import erf as function

    return np.asarray(function(x))


def sigmoid(x: Array) -> Array:
    """1 / (1 + exp(-x)) without overflow."""
    small = np.exp(-np.abs(x))
    return np.where(x >= 0, 1.0, small) / (1.0 + small)


def softplus(x: Array) -> Array:
    """log(1 + exp(x))."""
    return np.logaddexp(x, 0.0)


def gelu(x: Array) -> Array:
    """x times the normal distribution function."""
    return 0.5 * x * (1.0 + erf(x * np.sqrt(0.5)))


def gelu_tanh(x: Array) -> Array:
    """The usual approximation of gelu by tanh."""
    return 0.5 * x * (1.0 + np.tanh(np.sqrt(2.0 / np.pi) * (x + 0.044715 * x * x * x)))


_UNARY: dict[str, Callable[[Array], Any]] = {
    "Abs": np.abs, "Neg": np.negative, "Sqrt": np.sqrt, "Exp": np.exp, "Log": np.log, "Sign": np.sign,
    "Sin": np.sin, "Cos": np.cos, "Tan": np.tan, "Asin": np.arcsin, "Acos": np.arccos, "Atan": np.arctan,
    "Sinh": np.sinh, "Cosh": np.cosh, "Tanh": np.tanh, "Asinh": np.arcsinh, "Acosh": np.arccosh, "Atanh": np.arctanh,
    "Floor": np.floor, "Ceil": np.ceil, "Round": np.rint, "Not": np.logical_not, "BitwiseNot": np.bitwise_not,
    "Reciprocal": np.reciprocal, "Erf": erf, "Sigmoid": sigmoid, "Softplus": softplus, "Identity": lambda x: x,
    "Relu": lambda x: np.maximum(x, 0), "Softsign": lambda x: x / (1.0 + np.abs(x)),
    "Mish": lambda x: x * np.tanh(softplus(x)), "HardSwish": lambda x: x * np.clip(x / 6.0 + 0.5, 0.0, 1.0),
}  # fmt: skip

_BINARY: dict[str, Callable[[Array, Array], Any]] = {
    "Add": np.add, "Sub": np.subtract, "Mul": np.multiply, "PRelu": lambda x, slope: np.where(x < 0, x * slope, x),
    "Equal": np.equal, "Greater": np.greater, "GreaterOrEqual": np.greater_equal, "Less": np.less,
    "LessOrEqual": np.less_equal, "And": np.logical_and, "Or": np.logical_or, "Xor": np.logical_xor,
    "BitwiseAnd": np.bitwise_and, "BitwiseOr": np.bitwise_or, "BitwiseXor": np.bitwise_xor,
}  # fmt: skip


def _enter_unary(name: str, function: Callable[[Array], Any]) -> None:
    OPERATORS["", name] = lambda call, x: function(x)


def _enter_binary(name: str, function: Callable[[Array, Array], Any]) -> None:
    def run(call: Call, a: Array, b: Array) -> Any:
        if call.version < 7 and call.get("broadcast") and call.get("axis") is not None:
            b = b.reshape(b.shape + (1,) * (a.ndim - call.get("axis") % a.ndim - b.ndim))
        return function(a, b)

    OPERATORS["", name] = run


def _divide(a: Array, b: Array) -> Array:
    if a.dtype.kind not in "iu":
        return np.divide(a, b)
    quotient = np.floor_divide(a, b)
    return quotient + ((quotient < 0) & (quotient * b != a)).astype(a.dtype)


for _name, _function in _UNARY.items():
    _enter_unary(_name, _function)
for _name, _pair in (_BINARY | {"Div": _divide}).items():
    _enter_binary(_name, _pair)


@operator("Pow")
def _pow(call: Call, a: Array, b: Array) -> Array:
    if b.dtype == np.float64 and b.size == 1 and float(b.reshape(())) == 2.0:
        return np.asarray(a * a if b.ndim <= a.ndim else (a * a).reshape(np.broadcast_shapes(a.shape, b.shape)))
    return np.asarray(np.power(a.astype(np.float64) if b.dtype == np.float64 else a, b)).astype(a.dtype, copy=False)


@operator("Mod")
def _mod(call: Call, a: Array, b: Array) -> Array:
    return np.asarray(np.fmod(a, b) if call.get("fmod", 0) else np.mod(a, b))


@operator("BitShift")
def _shift(call: Call, a: Array, b: Array) -> Array:
    return np.asarray(np.left_shift(a, b) if call.get("direction") == "LEFT" else np.right_shift(a, b))


@operator("Max", "Min", "Sum", "Mean")
def _variadic(call: Call, *arrays: Array) -> Array:
    step = {"Max": np.maximum, "Min": np.minimum}.get(call.op, np.add)
    total = arrays[0]
    for array in arrays[1:]:
        total = step(total, array)
    return total / len(arrays) if call.op == "Mean" else total


@operator("Where")
def _where(call: Call, condition: Array, a: Array, b: Array) -> Array:
    return np.where(condition, a, b)


@operator("Clip")
def _clip(call: Call, x: Array, low: Array | None = None, high: Array | None = None) -> Array:
    low = call.get("min", low)
    high = call.get("max", high)
    if low is not None:
        x = np.maximum(x, np.asarray(low, x.dtype))
    return x if high is None else np.minimum(x, np.asarray(high, x.dtype))


@operator("IsNaN")
def _is_nan(call: Call, x: Array) -> Array:
    return np.asarray(np.isnan(x))


@operator("IsInf")
def _is_inf(call: Call, x: Array) -> Array:
    found = np.zeros(x.shape, bool)
    if call.get("detect_positive", 1):
        found |= np.isposinf(x)
    if call.get("detect_negative", 1):
        found |= np.isneginf(x)
    return found


@operator("LeakyRelu", "ThresholdedRelu", "Elu", "Celu", "Selu", "HardSigmoid", "Swish")
def _activation(call: Call, x: Array) -> Array:
    alpha = call.get("alpha", {"LeakyRelu": 0.01, "Selu": 1.6732632423543773, "HardSigmoid": 0.2}.get(call.op, 1.0))
    if call.op == "LeakyRelu":
        return np.where(x < 0, alpha * x, x)
    if call.op == "ThresholdedRelu":
        return np.where(x > alpha, x, 0.0)
    if call.op == "HardSigmoid":
        return np.clip(alpha * x + call.get("beta", 0.5), 0.0, 1.0)
    if call.op == "Swish":
        return np.asarray(x * sigmoid(alpha * x))
    below = np.minimum(x, 0.0)
    if call.op == "Celu":
        return np.asarray(np.maximum(x, 0.0) + alpha * np.expm1(below / alpha))
    gamma = call.get("gamma", 1.0507009873554805) if call.op == "Selu" else 1.0
    return np.asarray(gamma * (np.maximum(x, 0.0) + alpha * np.expm1(below)))


@operator("Gelu")
def _gelu(call: Call, x: Array) -> Array:
    return gelu_tanh(x) if call.get("approximate", "none") == "tanh" else gelu(x)


@operator("Cast")
def _cast(call: Call, x: Array) -> Array:
    return cast(x, oir.DataType(call.get("to")))


@operator("CastLike")
def _cast_like(call: Call, x: Array, like: Array) -> Array:
    return cast(x, oir.DataType.STRING if like.dtype.kind in "OSU" else oir.DataType.from_numpy(like.dtype))


@operator("Dropout")
def _dropout(call: Call, x: Array, *_: Any) -> tuple[Array, Array]:
    return x, np.ones(x.shape, bool)
