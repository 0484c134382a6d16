"""Normalizations."""

from __future__ import annotations

from typing import Any

from tvm import relax, te, tirx

from burnish.backends.tvm.maker import Maker
from burnish.backends.tvm.operators.elementwise import number
from burnish.backends.tvm.operators.network import HALVES
from burnish.backends.tvm.registry import Unsupported, lowers

op = relax.op


@lowers("LayerNormalization", since=17, several=True)
def layer_norm(
    make: Maker, x: Any, scale: Any, bias: Any = None, *, axis: int = -1, epsilon: float = 1e-5, stash_type: int = 1
) -> tuple[Any, ...]:
    rank = make.rank(x)
    axes = list(range(axis % rank, rank))
    if not any(out.name for out in make.node.outputs[1:]):
        return (op.nn.layer_norm(x, scale, make.emit(op.zeros_like(scale)) if bias is None else bias, axes, epsilon),)
    centred, mean = _centred(make, x, axes)
    inverse = _inverse(make, centred, axes, epsilon)
    found = _scaled(make, make.emit(op.multiply(centred, inverse)), scale, bias, make.dtype(x))
    return found, mean, inverse


def _centred(make: Maker, x: Any, axes: list[int]) -> tuple[Any, Any]:
    """x - mean and the mean, in float32 for halves."""
    wide = make.emit(op.astype(x, "float32")) if make.dtype(x) in HALVES else x
    mean = make.emit(op.mean(wide, axes, True))
    return make.emit(op.subtract(wide, mean)), mean


def _inverse(make: Maker, x: Any, axes: list[int], epsilon: float) -> Any:
    """1 / sqrt(mean of squares + epsilon)."""
    mean = make.emit(op.mean(op.multiply(x, x), axes, True))
    return make.emit(op.divide(number(make, x, 1), op.sqrt(op.add(mean, number(make, x, epsilon)))))


def _scaled(make: Maker, x: Any, scale: Any, bias: Any, dtype: str) -> Any:
    """x * scale + bias in another dtype."""
    wide = make.dtype(x)
    found = op.multiply(x, scale if make.dtype(scale) == wide else op.astype(scale, wide))
    if bias is not None:
        found = op.add(found, bias if make.dtype(bias) == wide else op.astype(bias, wide))
    found = make.emit(found)
    return found if dtype == wide else make.emit(op.astype(found, dtype))


@lowers("RMSNormalization", since=23, several=True)
@lowers("SimplifiedLayerNormalization", since=1, several=True)
def rms_norm(
    make: Maker, x: Any, scale: Any, *, axis: int = -1, epsilon: float = 1e-5, stash_type: int = 1
) -> tuple[Any, ...]:
    rank = make.rank(x)
    axes = list(range(axis % rank, rank))
    plain = not any(out.name for out in make.node.outputs[1:])
    if plain and len(axes) < rank and make.dtype(scale) == make.dtype(x) and make.dtype(x) != "bfloat16":
        return (op.nn.rms_norm(x, scale, axes, epsilon),)
    wide = make.emit(op.astype(x, "float32")) if make.dtype(x) in HALVES else x
    inverse = _inverse(make, wide, axes, epsilon)
    return _scaled(make, make.emit(op.multiply(wide, inverse)), scale, None, make.dtype(x)), inverse


@lowers("SkipLayerNormalization", domain="com.microsoft", several=True)
def skip_layer_norm(
    make: Maker, x: Any, skip: Any, scale: Any, beta: Any = None, bias: Any = None, *, epsilon: float = 1e-12
) -> tuple[Any, ...]:
    total = _with_skip(make, x, skip, bias)
    zeros = beta if beta is not None else make.emit(op.zeros_like(scale))
    return op.nn.layer_norm(total, scale, zeros, [-1], epsilon), None, None, total


@lowers("SkipSimplifiedLayerNormalization", domain="com.microsoft", several=True)
def skip_rms_norm(
    make: Maker, x: Any, skip: Any, scale: Any, bias: Any = None, *, epsilon: float = 1e-12
) -> tuple[Any, ...]:
    total = _with_skip(make, x, skip, bias)
    return op.nn.rms_norm(total, scale, [-1], epsilon), None, None, total


def _with_skip(make: Maker, x: Any, skip: Any, bias: Any) -> Any:
    if any(out.name for out in make.node.outputs[1:3]):
        raise Unsupported("the mean and deviation of a norm with a skip")
    if make.rank(skip) != make.rank(x):
        raise Unsupported("a skip of another rank")
    total = make.emit(op.add(*make.alike(x, skip)))
    return total if bias is None else make.emit(op.add(total, bias))


@lowers("GroupNormalization", since=21)
def group_norm(
    make: Maker, x: Any, scale: Any, bias: Any, *, num_groups: int, epsilon: float = 1e-5, stash_type: int = 1
) -> Any:
    shape = make.shape(x)
    apart = make.emit(op.reshape(x, [shape[0], num_groups, shape[1] // num_groups, *shape[2:]]))
    axes = list(range(2, len(shape) + 1))
    centred, _ = _centred(make, apart, axes)
    normed = make.emit(op.reshape(op.multiply(centred, _inverse(make, centred, axes, epsilon)), shape))
    spread = [shape[1], *[1] * (len(shape) - 2)]
    scale, bias = (make.emit(op.reshape(one, spread)) for one in (scale, bias))
    return _scaled(make, normed, scale, bias, make.dtype(x))


@lowers("MeanVarianceNormalization", since=9)
def mean_variance_norm(make: Maker, x: Any, *, axes: tuple[int, ...] = (0, 2, 3)) -> Any:
    centred, _ = _centred(make, x, list(axes))
    deviation = op.sqrt(op.mean(op.multiply(centred, centred), list(axes), True))
    found = make.emit(op.divide(centred, op.add(deviation, number(make, centred, 1e-9))))
    return op.astype(found, make.dtype(x))


@lowers("LpNormalization")
def lp_norm(make: Maker, x: Any, *, axis: int = -1, p: int = 2) -> Any:
    sizes = op.abs(x) if p == 1 else op.multiply(x, x)
    total = make.emit(op.sum(sizes, [axis], True))
    norm = make.emit(total if p == 1 else op.sqrt(total))
    zero = number(make, x, 0)
    return op.where(op.equal(norm, zero), zero, make.emit(op.divide(x, norm)))


@lowers("LRN")
def local_response_norm(
    make: Maker, x: Any, *, size: int, alpha: float = 1e-4, beta: float = 0.75, bias: float = 1.0
) -> Any:
    return op.divide(x, make.te(_response, x, size=size, factor=alpha / size, beta=beta, bias=bias))


def _response(t: Any, size: int, factor: float, beta: float, bias: float) -> Any:
    """(bias + factor * sum of squares over `size` channels around each) to the power of beta."""
    near = te.reduce_axis((0, size), name="near")
    dtype = str(t.dtype)

    def total(*at: Any) -> Any:
        channel = at[1] + near - (size - 1) // 2
        inside = tirx.all(channel >= 0, channel < t.shape[1])
        read = tirx.if_then_else(inside, t(at[0], channel, *at[2:]), tirx.const(0, dtype))
        return te.sum(read * read, axis=near)

    sums = te.compute(t.shape, total, name="squares")

    def element(*at: Any) -> Any:
        whole = tirx.const(bias, dtype) + tirx.const(factor, dtype) * sums(*at)
        return tirx.pow(whole, tirx.const(beta, dtype))

    return te.compute(t.shape, element, name="response")


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
    centred, _ = _centred(make, x, axes)
    normed = make.emit(op.multiply(centred, _inverse(make, centred, axes, epsilon)))
    spread = [make.shape(scale)[0], *[1] * len(axes)]
    scale, bias = (make.emit(op.reshape(one, spread)) for one in (scale, bias))
    return _scaled(make, normed, scale, bias, make.dtype(x))
