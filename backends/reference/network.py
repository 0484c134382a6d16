"""Matrix products, convolutions, pooling, normalization, softmax and resizing."""

# mypy: disable-error-code="no-any-return"
# NumPy types the results of arithmetic on its arrays as Any.

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view

from burnish.backends.reference.registry import Array, Call, operator


@operator("MatMul")
def _matmul(call: Call, a: Array, b: Array) -> Array:
    return np.asarray(np.matmul(a, b))


@operator("Gemm")
def _gemm(call: Call, a: Array, b: Array, c: Array | None = None) -> Array:
    a = a.T if call.get("transA", 0) else a
    b = b.T if call.get("transB", 0) else b
    alpha, beta = call.get("alpha", 1.0), call.get("beta", 1.0)
    product = a @ b
    if alpha != 1.0:
        product = (alpha * product).astype(a.dtype)
    if c is None:
        return np.asarray(product)
    return np.asarray(product + (c if beta == 1.0 else (beta * c).astype(c.dtype)))


@operator("Einsum")
def _einsum(call: Call, *arrays: Array) -> Array:
    return np.asarray(np.einsum(call.get("equation").replace(" ", ""), *arrays, optimize=True))


def spatial_pads(
    call: Call, sizes: Sequence[int], kernel: Sequence[int], strides: Sequence[int], dilations: Sequence[int]
) -> list[int]:
    """Begin and end pads of every spatial axis (begins first), from `pads` or `auto_pad`."""
    auto = call.get("auto_pad", "NOTSET")
    n = len(sizes)
    if auto in ("NOTSET", ""):
        return list(call.get("pads") or [0] * (2 * n))
    if auto == "VALID":
        return [0] * (2 * n)
    totals = [
        max((-(-size // s) - 1) * s + (k - 1) * d + 1 - size, 0)
        for size, k, s, d in zip(sizes, kernel, strides, dilations, strict=True)
    ]
    halves = [t // 2 for t in totals]
    rests = [t - h for t, h in zip(totals, halves, strict=True)]
    return halves + rests if auto == "SAME_UPPER" else rests + halves


def windows(x: Array, kernel: Sequence[int], strides: Sequence[int], dilations: Sequence[int]) -> Array:
    """A view of shape [N, C, *out, *kernel] on the padded x of shape [N, C, *in]."""
    axes = tuple(range(2, x.ndim))
    spans = [(k - 1) * d + 1 for k, d in zip(kernel, dilations, strict=True)]
    view = sliding_window_view(x, spans, axis=axes)
    steps = [slice(None, None, step) for step in (*strides, *dilations)]
    return np.asarray(view[(slice(None), slice(None), *steps)])


def _padded(x: Array, pads: Sequence[int], fill: float = 0.0) -> Array:
    n = x.ndim - 2
    if not any(pads):
        return x
    return np.pad(x, [(0, 0), (0, 0), *((pads[i], pads[i + n]) for i in range(n))], constant_values=fill)


def convolve(call: Call, x: Array, w: Array) -> Array:
    """The convolution of x [N, C, *in] with w [M, C/group, *kernel], without bias."""
    n = x.ndim - 2
    group = call.get("group", 1)
    strides, dilations = call.get("strides") or [1] * n, call.get("dilations") or [1] * n
    kernel = w.shape[2:]
    x = _padded(x, spatial_pads(call, x.shape[2:], kernel, strides, dilations))
    view = windows(x, kernel, strides, dilations)
    out = view.shape[2 : 2 + n]
    batch, channels, maps = x.shape[0], x.shape[1] // group, w.shape[0] // group
    columns = np.moveaxis(view, 1, 1 + n).reshape(batch, *out, group, channels, *kernel)
    columns = np.moveaxis(columns, 1 + n, 0).reshape(group, batch * int(np.prod(out)), channels * int(np.prod(kernel)))
    y = np.matmul(columns, w.reshape(group, maps, -1).transpose(0, 2, 1))
    return np.moveaxis(y.transpose(1, 0, 2).reshape(batch, *out, group * maps), -1, 1)


def per_channel(vector: Array, like: Array) -> Array:
    """A vector [C] shaped to broadcast along axis 1 of `like`."""
    return vector.reshape(1, -1, *(1,) * (like.ndim - 2))


@operator("Conv")
def _conv(call: Call, x: Array, w: Array, b: Array | None = None) -> Array:
    y = convolve(call, x, w)
    return y if b is None else y + per_channel(b, y)


@operator("ConvTranspose")
def _conv_transpose(call: Call, x: Array, w: Array, b: Array | None = None) -> Array:
    n = x.ndim - 2
    group = call.get("group", 1)
    strides, dilations = call.get("strides") or [1] * n, call.get("dilations") or [1] * n
    extra = list(call.get("output_padding") or [0] * n)
    kernel, sizes = w.shape[2:], x.shape[2:]
    full = [(s - 1) * st + (k - 1) * d + 1 for s, st, k, d in zip(sizes, strides, kernel, dilations, strict=True)]
    auto = call.get("auto_pad", "NOTSET")
    wanted = call.get("output_shape")
    if wanted is None and auto in ("SAME_UPPER", "SAME_LOWER"):
        wanted = [s * st for s, st in zip(sizes, strides, strict=True)]
    if wanted is not None:
        totals = [f + e - o for f, e, o in zip(full, extra, list(wanted)[-n:], strict=True)]
        small = [t // 2 for t in totals]
        large = [t - s for t, s in zip(totals, small, strict=True)]
        pads = small + large if auto == "SAME_UPPER" else large + small
    else:
        pads = list(call.get("pads") or [0] * (2 * n))
    batch, channels = x.shape[0], x.shape[1] // group
    maps = w.shape[1]
    flat = x.reshape(batch, group, channels, -1).transpose(1, 0, 3, 2).reshape(group, -1, channels)
    y = np.matmul(flat, w.reshape(group, channels, -1)).reshape(group, batch, *sizes, maps, *kernel)
    room = [max(f + e, f + max(-p, 0)) for f, e, p in zip(full, extra, pads[n:], strict=True)]
    total = np.zeros((batch, group, maps, *room))
    for tap in np.ndindex(*kernel):
        piece = y[(..., *tap)]
        where = [
            slice(t * d, t * d + (s - 1) * st + 1, st)
            for t, d, s, st in zip(tap, dilations, sizes, strides, strict=True)
        ]
        total[(slice(None), slice(None), slice(None), *where)] += np.moveaxis(piece, -1, 2).swapaxes(0, 1)
    total = total.reshape(batch, group * maps, *room)
    total = np.pad(total, [(0, 0), (0, 0), *((max(-p, 0), 0) for p in pads[:n])])
    ends = [f + e - pads[n + i] + max(-pads[i], 0) for i, (f, e) in enumerate(zip(full, extra, strict=True))]
    total = total[(slice(None), slice(None), *(slice(max(pads[i], 0), ends[i]) for i in range(n)))]
    return total if b is None else total + per_channel(b, total)


def _pool_pads(
    call: Call, sizes: Sequence[int], kernel: Sequence[int], strides: Sequence[int], dilations: Sequence[int]
) -> tuple[list[int], list[int]]:
    """The declared pads, and the pads with the overhang that `ceil_mode` adds at the ends.

    Where an axis is shorter than the window, by less than a stride, ONNX Runtime makes one window that overhangs it.
    """
    n = len(sizes)
    pads = spatial_pads(call, sizes, kernel, strides, dilations)
    whole = list(pads)
    ceil = call.get("ceil_mode", 0) and call.get("auto_pad", "NOTSET") in ("NOTSET", "")
    for i in range(n):
        room = sizes[i] + pads[i] + pads[n + i] - (kernel[i] - 1) * dilations[i] - 1
        if -strides[i] < room < 0:
            whole[n + i] -= room
        elif ceil:
            count = -(-room // strides[i]) + 1
            if (count - 1) * strides[i] >= sizes[i] + pads[i]:
                count -= 1
            whole[n + i] += max((count - 1) * strides[i] - room, 0)
    return pads, whole


@operator("MaxPool")
def _max_pool(call: Call, x: Array) -> Any:
    n = x.ndim - 2
    kernel = call.get("kernel_shape")
    strides, dilations = call.get("strides") or [1] * n, call.get("dilations") or [1] * n
    _, pads = _pool_pads(call, x.shape[2:], kernel, strides, dilations)
    low = -np.inf if x.dtype.kind == "f" else np.iinfo(x.dtype).min
    axes = tuple(range(2 + n, 2 + 2 * n))
    view = windows(_padded(x, pads, low), kernel, strides, dilations)
    y = view.max(axes)
    if call.outputs < 2:
        return y
    shape = x.shape[2:]
    order = "F" if call.get("storage_order", 0) else "C"
    numbers = np.arange(int(np.prod(shape)), dtype=np.int64).reshape(shape, order=order)  # type: ignore[call-overload]
    numbers = windows(_padded(numbers[None, None], pads, -1), kernel, strides, dilations)
    hit = (view == y[(..., *[None] * n)]).reshape(*y.shape, -1).argmax(-1)
    flat = np.broadcast_to(numbers.reshape(1, 1, *y.shape[2:], -1), (*y.shape, int(np.prod(kernel))))
    places = np.take_along_axis(flat, hit[..., None], -1)[..., 0]
    planes = np.arange(x.shape[0] * x.shape[1], dtype=np.int64).reshape(*x.shape[:2], *[1] * n)
    return y, places + planes * int(np.prod(shape))


@operator("AveragePool")
def _average_pool(call: Call, x: Array) -> Array:
    n = x.ndim - 2
    kernel = call.get("kernel_shape")
    strides, dilations = call.get("strides") or [1] * n, call.get("dilations") or [1] * n
    pads, whole = _pool_pads(call, x.shape[2:], kernel, strides, dilations)
    axes = tuple(range(2 + n, 2 + 2 * n))
    counted = np.ones((1, 1, *x.shape[2:]))
    if call.get("count_include_pad", 0):
        counted = _padded(counted, pads, 1.0)
        rest = [0] * n + [whole[n + i] - pads[n + i] for i in range(n)]
        counted = _padded(counted, rest)
    else:
        counted = _padded(counted, whole)
    total = windows(_padded(x, whole), kernel, strides, dilations).sum(axes)
    return np.asarray(total / windows(counted, kernel, strides, dilations).sum(axes))


@operator("GlobalAveragePool", "GlobalMaxPool")
def _global_pool(call: Call, x: Array) -> Array:
    axes = tuple(range(2, x.ndim))
    return np.asarray(x.mean(axes, keepdims=True) if call.op == "GlobalAveragePool" else x.max(axes, keepdims=True))


@operator("LRN")
def local_response(call: Call, x: Array) -> Array:
    """Divided by a power of the mean square over neighbouring channels."""
    size = call.get("size")
    before = (size - 1) // 2
    squares = np.pad(x * x, [(0, 0), (before, size - 1 - before), *[(0, 0)] * (x.ndim - 2)])
    total = sum(squares[:, i : i + x.shape[1]] for i in range(size))
    return x / (call.get("bias", 1.0) + call.get("alpha", 1e-4) / size * total) ** call.get("beta", 0.75)


@operator("Hardmax")
def hardmax(call: Call, x: Array) -> Array:
    """1 at the first of the largest elements along `axis`; before opset 13 over all axes from `axis` on."""
    axis = call.get("axis", -1 if call.version >= 13 else 1) % x.ndim
    flat = x if call.version >= 13 else x.reshape(*x.shape[:axis], -1)
    made = np.zeros_like(flat)
    np.put_along_axis(made, np.expand_dims(flat.argmax(axis), axis), 1.0, axis)
    return made.reshape(x.shape)


@operator("Softmax", "LogSoftmax")
def softmax(call: Call, x: Array) -> Array:
    """Softmax along `axis`; before opset 13 over all axes from `axis` on."""
    shape = x.shape
    axis = call.get("axis", -1 if call.version >= 13 else 1)
    if call.version < 13:
        axis = axis % x.ndim if x.ndim else 0
        x = x.reshape(int(np.prod(shape[:axis])), int(np.prod(shape[axis:])))
        axis = 1
    shifted = x - np.max(x, axis, keepdims=True) if x.size else x
    powers = np.exp(shifted)
    total = powers.sum(axis, keepdims=True)
    return (shifted - np.log(total) if call.op == "LogSoftmax" else powers / total).reshape(shape)


@operator("BatchNormalization")
def _batch_norm(call: Call, x: Array, scale: Array, bias: Array, mean: Array, variance: Array) -> Any:
    epsilon = call.get("epsilon", 1e-5)
    if not call.get("training_mode", 0):
        factor = scale / np.sqrt(variance + epsilon)
        return x * per_channel(factor, x) + per_channel(bias - mean * factor, x)
    axes = (0, *range(2, x.ndim))
    momentum = call.get("momentum", 0.9)
    now, spread = x.mean(axes), x.var(axes)
    factor = scale / np.sqrt(spread + epsilon)
    y = (x - per_channel(now, x)) * per_channel(factor, x) + per_channel(bias, x)
    return y, mean * momentum + now * (1 - momentum), variance * momentum + spread * (1 - momentum)


def standardize(x: Array, axes: tuple[int, ...], epsilon: float) -> tuple[Array, Array, Array]:
    """x with mean 0 and variance 1 over `axes`, the mean, and 1 / the standard deviation."""
    mean = x.mean(axes, keepdims=True)
    centered = x - mean
    inverse = 1.0 / np.sqrt((centered * centered).mean(axes, keepdims=True) + epsilon)
    return centered * inverse, mean, inverse


@operator("LayerNormalization")
def _layer_norm(call: Call, x: Array, scale: Array, bias: Array | None = None) -> tuple[Array, Array, Array]:
    axes = tuple(range(call.get("axis", -1) % x.ndim, x.ndim))
    y, mean, inverse = standardize(x, axes, call.get("epsilon", 1e-5))
    y = y * scale
    return (y if bias is None else y + bias), mean, inverse


@operator("RMSNormalization", "SimplifiedLayerNormalization")
@operator("SimplifiedLayerNormalization", domain="com.microsoft")
def _rms_norm(call: Call, x: Array, scale: Array) -> tuple[Array, Array]:
    axes = tuple(range(call.get("axis", -1) % x.ndim, x.ndim))
    inverse = 1.0 / np.sqrt((x * x).mean(axes, keepdims=True) + call.get("epsilon", 1e-5))
    return x * inverse * scale, inverse


@operator("InstanceNormalization")
def _instance_norm(call: Call, x: Array, scale: Array, bias: Array) -> Array:
    y, _, _ = standardize(x, tuple(range(2, x.ndim)), call.get("epsilon", 1e-5))
    return y * per_channel(scale, x) + per_channel(bias, x)


@operator("GroupNormalization")
def _group_norm(call: Call, x: Array, scale: Array, bias: Array) -> Array:
    groups = call.get("num_groups")
    y, _, _ = standardize(x.reshape(x.shape[0], groups, -1), (2,), call.get("epsilon", 1e-5))
    if call.version < 21:
        scale, bias = np.repeat(scale, x.shape[1] // groups), np.repeat(bias, x.shape[1] // groups)
    return y.reshape(x.shape) * per_channel(scale, x) + per_channel(bias, x)


@operator("LpNormalization")
def _lp_norm(call: Call, x: Array) -> Array:
    axis, p = call.get("axis", -1), call.get("p", 2)
    size = np.abs(x).sum(axis, keepdims=True) if p == 1 else np.sqrt((x * x).sum(axis, keepdims=True))
    return x / np.where(size == 0, 1.0, size)


@operator("MeanVarianceNormalization")
def _mvn(call: Call, x: Array) -> Array:
    axes = tuple(call.get("axes", (0, 2, 3)))
    centered = x - x.mean(axes, keepdims=True)
    return centered / (np.sqrt((centered * centered).mean(axes, keepdims=True)) + 1e-9)
