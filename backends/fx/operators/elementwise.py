"""Operators that treat every element alone, with broadcasting."""

from __future__ import annotations

import operator as python
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from burnish.backends.fx.operators.unsigned import ordered, quotient, remainder, shift_left, shift_right, unsigned
from burnish.backends.fx.registry import operator
from burnish.backends.fx.values import Tensor, Value, all_host, broadcast, is_host, tensor, tensors, together


def gelu_tanh(x: Tensor) -> Tensor:
    """The usual approximation of gelu by tanh."""
    return F.gelu(x, approximate="tanh")


_UNARY: dict[str, Callable[..., Any]] = {
    "Acos": torch.acos, "Acosh": torch.acosh, "Asin": torch.asin, "Asinh": torch.asinh, "Atan": torch.atan,
    "Atanh": torch.atanh, "Ceil": torch.ceil, "Cos": torch.cos, "Cosh": torch.cosh, "Erf": torch.erf, "Exp": torch.exp,
    "Floor": torch.floor, "IsNaN": torch.isnan, "Log": torch.log, "Reciprocal": torch.reciprocal, "Relu": torch.relu,
    "Round": torch.round, "Sigmoid": torch.sigmoid, "Sign": torch.sign, "Sin": torch.sin, "Sinh": torch.sinh,
    "Softplus": F.softplus, "Softsign": F.softsign, "Sqrt": torch.sqrt, "Tan": torch.tan, "Tanh": torch.tanh,
    "Mish": F.mish, "HardSwish": F.hardswish, "BitwiseNot": unsigned(torch.bitwise_not),
}  # fmt: skip

_ON_HOST: dict[str, tuple[Callable[..., Any], Callable[..., Any]]] = {
    "Abs": (torch.abs, abs), "Neg": (torch.neg, python.neg), "Not": (torch.logical_not, python.not_),
}  # fmt: skip

_BINARY: dict[str, tuple[Callable[..., Any], Callable[..., Any]]] = {
    "Add": (unsigned(torch.add), python.add), "Sub": (unsigned(torch.sub), python.sub),
    "Mul": (unsigned(torch.mul), python.mul), "Equal": (torch.eq, python.eq),
    "Greater": (unsigned(torch.gt, ordered(torch.gt)), python.gt),
    "GreaterOrEqual": (unsigned(torch.ge, ordered(torch.ge)), python.ge),
    "Less": (unsigned(torch.lt, ordered(torch.lt)), python.lt),
    "LessOrEqual": (unsigned(torch.le, ordered(torch.le)), python.le),
    "And": (torch.logical_and, lambda a, b: bool(a) and bool(b)),
    "Or": (torch.logical_or, lambda a, b: bool(a) or bool(b)),
    "Xor": (torch.logical_xor, lambda a, b: bool(a) != bool(b)),
    "BitwiseAnd": (torch.bitwise_and, python.and_), "BitwiseOr": (torch.bitwise_or, python.or_),
    "BitwiseXor": (torch.bitwise_xor, python.xor),
}  # fmt: skip


def _publish(name: str, function: Callable[..., Any]) -> None:
    """Enter a function that a table made, under a name by which FX finds it in this module."""
    function.__name__ = function.__qualname__ = name
    function.__module__ = __name__
    globals()[name] = operator(name)(function)


def _unary(name: str, function: Callable[..., Any]) -> None:
    def run(x: Value) -> Tensor:
        return function(tensor(x))

    _publish(name, run)


def _unary_on_host(name: str, function: Callable[..., Any], scalar: Callable[..., Any]) -> None:
    def run(x: Value) -> Value:
        return broadcast(scalar, x) if is_host(x) else function(x)

    _publish(name, run)


def _binary(name: str, function: Callable[..., Any], scalar: Callable[..., Any]) -> None:
    def run(a: Value, b: Value) -> Value:
        return broadcast(scalar, a, b) if all_host(a, b) else function(*tensors(a, b))

    _publish(name, run)


for _name, _function in _UNARY.items():
    _unary(_name, _function)
for _name, _pair in _ON_HOST.items():
    _unary_on_host(_name, *_pair)
for _name, _pair in _BINARY.items():
    _binary(_name, *_pair)


_divided = unsigned(lambda a, b: torch.div(a, b, rounding_mode="trunc"), quotient)
_rest = unsigned(torch.remainder, remainder)
_largest = unsigned(torch.maximum, ordered(torch.maximum))
_smallest = unsigned(torch.minimum, ordered(torch.minimum))


def _quotient(a: Any, b: Any) -> Any:
    """Integer division towards zero."""
    return a // b if (a >= 0) == (b > 0) else -(-a // b)


@operator("Identity")
def identity(x: Value) -> Value:
    """The input itself."""
    return x


@operator("Div")
def div(a: Value, b: Value) -> Value:
    """Quotient; of integers towards zero."""
    if all_host(a, b):
        return broadcast(_quotient, a, b)
    a, b = tensors(a, b)
    return a / b if a.is_floating_point() else _divided(a, b)


@operator("Mod")
def mod(a: Value, b: Value, fmod: int = 0) -> Value:
    """Remainder with the sign of the divisor, or with `fmod` of the dividend."""
    if all_host(a, b) and not fmod:
        return broadcast(python.mod, a, b)
    a, b = tensors(a, b)
    return torch.fmod(a, b) if fmod and a.dtype.is_signed else _rest(a, b)


@operator("Pow", static=(1,))
def power(a: Value, b: Value) -> Value:
    """Power in the dtype of the base; a constant exponent arrives as a number."""
    if isinstance(b, int | float):
        return torch.pow(tensor(a), b) if tensor(a).is_floating_point() else torch.pow(tensor(a), b).to(tensor(a).dtype)
    if isinstance(b, list) and any(isinstance(item, float) for item in b):
        b = torch.tensor(b, device=tensor(a).device, dtype=torch.float32)
    a, b = together(a, b)
    if b.dtype in (torch.uint16, torch.uint32, torch.uint64):
        b = b.to(a.dtype if a.is_floating_point() else torch.int64)
    return torch.pow(a, b).to(a.dtype)


_up = unsigned(torch.bitwise_left_shift, shift_left)
_down = unsigned(torch.bitwise_right_shift, shift_right)


@operator("BitShift")
def bit_shift(a: Value, b: Value, direction: str) -> Tensor:
    """Shift by `b` bits."""
    a, b = tensors(a, b)
    return _up(a, b) if direction == "LEFT" else _down(a, b)


def _fold(values: tuple[Value, ...], function: Callable[..., Any], scalar: Callable[..., Any]) -> Value:
    host = all_host(*values)
    total, *rest = values if host else tensors(*values)
    for value in rest:
        total = broadcast(scalar, total, value) if host else function(total, value)
    return total


@operator("Max")
def maximum(*values: Value) -> Value:
    """Largest of the inputs, element by element."""
    return _fold(values, _largest, max)


@operator("Min")
def minimum(*values: Value) -> Value:
    """Smallest of the inputs, element by element."""
    return _fold(values, _smallest, min)


@operator("Sum")
def total(*values: Value) -> Value:
    """Sum of the inputs."""
    return _fold(values, torch.add, python.add)


@operator("Mean")
def mean(*values: Value) -> Value:
    """Mean of the inputs."""
    return _fold(tuple(tensors(*values)), torch.add, python.add) / len(values)


@operator("Where")
def where(condition: Value, a: Value, b: Value) -> Value:
    """`a` where the condition holds, else `b`."""
    if all_host(condition, a, b):
        return broadcast(lambda c, x, y: x if c else y, condition, a, b)
    a, b = tensors(a, b)
    condition, a, b = together(condition, a, b)
    return torch.where(condition, a, b)


@operator("Clip", static=(1, 2), fixed=(1, 2))
def clip(x: Value, min: Value = None, max: Value = None) -> Value:
    """Between `min` and `max`; where they cross, `max`."""
    x = tensor(x)
    low, high = (v[0] if isinstance(v, list) else v for v in (min, max))
    if low is None and high is None:
        return x
    if isinstance(low, torch.Tensor) or isinstance(high, torch.Tensor):
        low, high = (tensors(x, v)[1] for v in (low, high))
    return torch.clamp(x, low, high)


@operator("Gelu")
def gelu(x: Value, approximate: str = "none") -> Tensor:
    """x times the normal distribution function, or its approximation by tanh."""
    return F.gelu(tensor(x), approximate=approximate)


@operator("LeakyRelu")
def leaky_relu(x: Value, alpha: float = 0.01) -> Tensor:
    """`alpha` x below zero."""
    return F.leaky_relu(tensor(x), alpha)


@operator("PRelu")
def prelu_by_channel(x: Value, slope: Value) -> Tensor:
    """Before opset 7: one slope, or one a channel."""
    x, slope = tensors(x, slope)
    return prelu(x, slope.reshape(-1, *[1] * (x.dim() - 2)))


@operator("PRelu", since=7)
def prelu(x: Value, slope: Value) -> Tensor:
    """`slope` x below zero, the slope broadcast."""
    x, slope = tensors(x, slope)
    return torch.where(x < 0, x * slope, x)


@operator("ThresholdedRelu")
def thresholded_relu(x: Value, alpha: float = 1.0) -> Tensor:
    """Zero up to `alpha`."""
    x = tensor(x)
    return torch.where(x > alpha, x, torch.zeros_like(x))


@operator("Elu")
def elu(x: Value, alpha: float = 1.0) -> Tensor:
    """Exponential below zero."""
    return F.elu(tensor(x), alpha)


@operator("Celu")
def celu(x: Value, alpha: float = 1.0) -> Tensor:
    """Exponential below zero, continuously differentiable."""
    return F.celu(tensor(x), alpha)


@operator("Selu")
def selu(x: Value, alpha: float = 1.67326319217681884765625, gamma: float = 1.05070102214813232421875) -> Tensor:
    """Scaled exponential below zero, scaled above."""
    return gamma * F.elu(tensor(x), alpha)


@operator("HardSigmoid")
def hard_sigmoid(x: Value, alpha: float = 0.2, beta: float = 0.5) -> Tensor:
    """`alpha` x + `beta` between 0 and 1."""
    return torch.clamp(alpha * tensor(x) + beta, 0, 1)


@operator("Swish")
def swish(x: Value, alpha: float = 1.0) -> Tensor:
    """x times the sigmoid of `alpha` x."""
    x = tensor(x)
    return x * torch.sigmoid(alpha * x)


@operator("SwiGLU")
def swiglu(a: Value, b: Value, alpha: float = 1.0) -> Tensor:
    """`a` times the sigmoid of `alpha` a, times `b`."""
    a, b = tensors(a, b)
    return swish(a, alpha) * b


@operator("Shrink")
def shrink(x: Value, bias: float = 0.0, lambd: float = 0.5) -> Tensor:
    """Zero between -`lambd` and `lambd`, `bias` nearer to zero outside."""
    x = tensor(x)
    moved = torch.where(x < -lambd, x + bias, torch.where(x > lambd, x - bias, torch.zeros_like(x)))
    return moved.to(x.dtype)


@operator("IsInf")
def is_inf(x: Value, detect_negative: int = 1, detect_positive: int = 1) -> Tensor:
    """Whether an element is infinite, of the asked signs."""
    x = tensor(x)
    found = torch.zeros_like(x, dtype=torch.bool)
    if detect_positive:
        found = found | torch.isposinf(x)
    return found | torch.isneginf(x) if detect_negative else found


@operator("Dropout", static=(1, 2), several=True)
def dropout(
    x: Value, ratio: Value = 0.5, training_mode: Value = None, seed: int | None = None, is_test: int = 1,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The input and a mask of ones; in training mode, elements are dropped and the rest is scaled."""
    x = tensor(x)
    if training_mode is None or not bool(training_mode):
        return x, torch.ones_like(x, dtype=torch.bool)
    share = 0.5 if ratio is None else float(ratio)
    mask = torch.rand_like(x) >= share
    return torch.where(mask, x / (1.0 - share) if share < 1 else x, torch.zeros_like(x)), mask
