"""Normalizations."""

from __future__ import annotations

from typing import Any

from tvm import relax

from burnish.backends.tvm.maker import Maker
from burnish.backends.tvm.operators.elementwise import number
from burnish.backends.tvm.registry import Unsupported, lowers

op = relax.op


@lowers("LayerNormalization", since=17)
def layer_norm(
    make: Maker, x: Any, scale: Any, bias: Any = None, *, axis: int = -1, epsilon: float = 1e-5, stash_type: int = 1
) -> Any:
    if any(out.name for out in make.node.outputs[1:]):
        raise Unsupported("the mean and deviation of LayerNormalization")
    rank = make.rank(x)
    axes = list(range(axis % rank, rank))
    if bias is None:
        bias = make.emit(op.zeros_like(scale))
    return op.nn.layer_norm(x, scale, bias, axes, epsilon)


@lowers("RMSNormalization", since=23)
@lowers("SimplifiedLayerNormalization", since=1)
def rms_norm(make: Maker, x: Any, scale: Any, *, axis: int = -1, epsilon: float = 1e-5, stash_type: int = 1) -> Any:
    if any(out.name for out in make.node.outputs[1:]):
        raise Unsupported("the deviation of a norm")
    rank = make.rank(x)
    return op.nn.rms_norm(x, scale, list(range(axis % rank, rank)), epsilon)


@lowers("BatchNormalization", since=9)
def batch_norm(
    make: Maker,
    x: Any,
    scale: Any,
    bias: Any,
    mean: Any,
    variance: Any,
    *,
    epsilon: float = 1e-5,
    momentum: float = 0.9,
    training_mode: int = 0,
) -> Any:
    if training_mode:
        raise Unsupported("BatchNormalization in training mode")
    spread = [1, -1, *[1] * (make.rank(x) - 2)]
    factor = make.emit(op.divide(scale, op.sqrt(op.add(variance, number(make, variance, epsilon)))))
    offset = make.emit(op.subtract(bias, op.multiply(mean, factor)))
    return op.add(op.multiply(x, op.reshape(factor, spread)), op.reshape(offset, spread))


@lowers("InstanceNormalization", since=6)
def instance_norm(make: Maker, x: Any, scale: Any, bias: Any, *, epsilon: float = 1e-5) -> Any:
    axes = list(range(2, make.rank(x)))
    spread = [1, -1, *[1] * len(axes)]
    centred = make.emit(op.subtract(x, op.mean(x, axes, True)))
    variance = op.mean(op.multiply(centred, centred), axes, True)
    normed = op.divide(centred, op.sqrt(op.add(variance, number(make, x, epsilon))))
    return op.add(op.multiply(normed, op.reshape(scale, spread)), op.reshape(bias, spread))
