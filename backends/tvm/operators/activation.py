"""Activations. NaN stays NaN: they compare instead of calling `max`, which some targets give another meaning."""

from __future__ import annotations

from typing import Any

from tvm import relax, tirx

from burnish.backends.tvm.maker import Maker
from burnish.backends.tvm.operators.elementwise import like, mapped, number
from burnish.backends.tvm.registry import lowers

op = relax.op


@lowers("Sigmoid", since=6)
def sigmoid(make: Maker, x: Any) -> Any:
    return op.sigmoid(x)


@lowers("Relu", since=6)
def relu(make: Maker, x: Any) -> Any:
    return mapped(make, lambda t: tirx.Select(t < like(t, 0), like(t, 0), t), x)


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
    grown = op.multiply(number(make, x, alpha), op.subtract(op.exp(x), number(make, x, 1)))
    return op.where(op.less(x, number(make, x, 0)), grown, x)


@lowers("Selu", since=6)
def selu(
    make: Maker, x: Any, *, alpha: float = 1.67326319217681884765625, gamma: float = 1.05070102214813232421875
) -> Any:
    return op.multiply(number(make, x, gamma), elu(make, x, alpha=alpha))


@lowers("Celu", since=12)
def celu(make: Maker, x: Any, *, alpha: float = 1.0) -> Any:
    grown = op.subtract(op.exp(op.divide(x, number(make, x, alpha))), number(make, x, 1))
    return op.where(op.less(x, number(make, x, 0)), op.multiply(number(make, x, alpha), grown), x)


@lowers("ThresholdedRelu", since=10)
def thresholded_relu(make: Maker, x: Any, *, alpha: float = 1.0) -> Any:
    return op.where(op.greater(x, number(make, x, alpha)), x, number(make, x, 0))


@lowers("Softsign")
def softsign(make: Maker, x: Any) -> Any:
    return op.divide(x, op.add(number(make, x, 1), op.abs(x)))


@lowers("Mish", since=18)
def mish(make: Maker, x: Any) -> Any:
    return op.multiply(x, op.tanh(softplus(make, x)))


@lowers("Shrink", since=9)
def shrink(make: Maker, x: Any, *, bias: float = 0.0, lambd: float = 0.5) -> Any:
    def shrunk(t: Any) -> Any:
        far, by = like(t, lambd), like(t, bias)
        low = tirx.Select(t < -far, t + by, like(t, 0))
        return tirx.Select(t > far, t - by, low)

    return mapped(make, shrunk, x)


@lowers("Softplus")
def softplus(make: Maker, x: Any) -> Any:
    positive, negative = relu(make, x), op.negative(op.abs(x))
    return op.add(positive, op.log(op.add(number(make, x, 1), op.exp(negative))))


@lowers("HardSigmoid", since=6)
def hard_sigmoid(make: Maker, x: Any, *, alpha: float = 0.2, beta: float = 0.5) -> Any:
    def bent(t: Any) -> Any:
        line = t * like(t, alpha) + like(t, beta)
        low = tirx.Select(line < like(t, 0), like(t, 0), line)
        return tirx.Select(low > like(t, 1), like(t, 1), low)

    return mapped(make, bent, x)


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
    x, slope = make.alike(x, slope)
    return op.where(op.less(x, number(make, x, 0)), op.multiply(x, slope), x)


@lowers("BiasGelu", domain="com.microsoft")
def bias_gelu(make: Maker, x: Any, bias: Any) -> Any:
    return op.nn.gelu(make.emit(op.add(x, bias)))


@lowers("FastGelu", domain="com.microsoft")
def fast_gelu(make: Maker, x: Any, bias: Any = None) -> Any:
    return op.nn.gelu_tanh(x if bias is None else make.emit(op.add(x, bias)))
