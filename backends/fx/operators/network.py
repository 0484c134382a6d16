"""Matrix products, convolutions, pooling, normalization and softmax."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F

from burnish.backends.fx.registry import operator
from burnish.backends.fx.values import Tensor, Value, integers, product, tensor, tensors

Ints = Sequence[int] | None


@operator("MatMul")
def matmul(a: Value, b: Value) -> Tensor:
    """The matrix product, batched."""
    return torch.matmul(*tensors(a, b))


@operator("Gemm")
def gemm(
    a: Value, b: Value, c: Value = None, alpha: float = 1.0, beta: float = 1.0, transA: int = 0, transB: int = 0
) -> Tensor:
    """`alpha` a b + `beta` c."""
    a, b, c = tensors(a, b, c)
    a = a.T if transA else a
    if alpha == beta == 1.0 and (c is None or c.dim() == 1 and c.shape[0] == b.shape[0 if transB else 1]):
        return F.linear(a, b if transB else b.T, c)
    y = a @ (b.T if transB else b)
    y = y if alpha == 1.0 else alpha * y
    return y if c is None else y + (c if beta == 1.0 else beta * c)


def spatial_pads(
    size: Sequence[Any], kernel: Sequence[int], strides: Sequence[int], dilations: Sequence[int], pads: Ints, auto: str
) -> tuple[list[Any], list[Any]]:
    """Begin and end pads of every spatial axis, from `pads` or `auto_pad`."""
    n = len(kernel)
    if auto in ("SAME_UPPER", "SAME_LOWER"):
        totals = [
            max((-(-i // s) - 1) * s + (k - 1) * d + 1 - i, 0)
            for i, k, s, d in zip(size, kernel, strides, dilations, strict=True)
        ]
        halves = [t // 2 for t in totals]
        rests = [t - h for t, h in zip(totals, halves, strict=True)]
        return (halves, rests) if auto == "SAME_UPPER" else (rests, halves)
    if auto == "VALID" or not pads:
        return [0] * n, [0] * n
    return list(pads[:n]), list(pads[n:])


def padded(x: Tensor, before: Sequence[Any], after: Sequence[Any], value: float = 0.0) -> Tensor:
    """`x` [N, C, *in] with its spatial axes padded."""
    pairs = [amount for pair in zip(reversed(before), reversed(after), strict=True) for amount in pair]
    return F.pad(x, pairs, value=value)


def windows(x: Tensor, kernel: Sequence[int], strides: Sequence[int], dilations: Sequence[int]) -> Tensor:
    """A view [N, C, *out, *kernel] on the padded x [N, C, *in]."""
    for axis, (k, s, d) in enumerate(zip(kernel, strides, dilations, strict=True), 2):
        x = x.unfold(axis, (k - 1) * d + 1, s)[..., ::d]
    return x


@operator("Conv")
def conv(
    x: Tensor, w: Tensor, b: Value = None, strides: Ints = None, dilations: Ints = None, pads: Ints = None,
    group: int = 1, auto_pad: str = "NOTSET", kernel_shape: Ints = None,
) -> Tensor:  # fmt: skip
    """The convolution of x [N, C, *in] with w [M, C/group, *kernel], in one, two or three dimensions."""
    x, w, b = tensors(x, w, b)
    n = w.dim() - 2
    steps, spread = list(strides or [1] * n), list(dilations or [1] * n)
    before, after = spatial_pads(x.shape[2:], w.shape[2:], steps, spread, pads, auto_pad)
    if before != after or any(p < 0 for p in before):
        x, before = padded(x, before, after), [0] * n
    return (F.conv1d, F.conv2d, F.conv3d)[n - 1](x, w, b, steps, before, spread, group)


@operator("ConvTranspose")
def conv_transpose(
    x: Tensor, w: Tensor, b: Value = None, strides: Ints = None, dilations: Ints = None, pads: Ints = None,
    output_padding: Ints = None, output_shape: Ints = None, group: int = 1, auto_pad: str = "NOTSET",
    kernel_shape: Ints = None,
) -> Tensor:  # fmt: skip
    """The transposed convolution of x [N, C, *in] with w [C, M/group, *kernel]."""
    x, w, b = tensors(x, w, b)
    n = w.dim() - 2
    steps, spread, extra = list(strides or [1] * n), list(dilations or [1] * n), list(output_padding or [0] * n)
    full = [(i - 1) * s + (k - 1) * d + 1 for i, s, k, d in zip(x.shape[2:], steps, w.shape[2:], spread, strict=True)]
    wanted = list(output_shape)[-n:] if output_shape else None
    if wanted is None and auto_pad in ("SAME_UPPER", "SAME_LOWER"):
        wanted = [i * s for i, s in zip(x.shape[2:], steps, strict=True)]
    if wanted is not None:
        totals = [f + e - o for f, e, o in zip(full, extra, wanted, strict=True)]
        halves = [t // 2 for t in totals]
        rests = [t - h for t, h in zip(totals, halves, strict=True)]
        before, after = (halves, rests) if auto_pad == "SAME_UPPER" else (rests, halves)
    else:
        before, after = spatial_pads(x.shape[2:], w.shape[2:], steps, spread, pads, auto_pad)
    function = (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)[n - 1]
    fits = before == after and all(p >= 0 for p in before)
    if fits and all(e < max(s, d) for e, s, d in zip(extra, steps, spread, strict=True)):
        return function(x, w, b, steps, before, extra, group, spread)
    y = function(x, w, None, steps, [0] * n, [0] * n, group, spread)
    y = padded(y, [-p for p in before], [e - p for e, p in zip(extra, after, strict=True)])
    return y if b is None else y + b.reshape(-1, *[1] * n)


def overhang(
    size: Sequence[Any], spans: Sequence[int], strides: Sequence[int], pads: Sequence[Any], ceil: bool
) -> list[Any]:
    """What is added at the ends of the spatial axes beyond the pads (begins, then ends).

    With `ceil`, a last window may begin inside the tensor or its first pads. Where an axis is shorter than the window,
    by less than a stride, ONNX Runtime makes one window that overhangs it.
    """
    n, added = len(size), []
    for i in range(n):
        room = size[i] + pads[i] + pads[n + i] - spans[i]
        if -strides[i] < room < 0:
            added.append(-room)
            continue
        count = -(-room // strides[i]) + 1 if ceil else 0
        if (count - 1) * strides[i] >= size[i] + pads[i]:
            count -= 1
        added.append(max((count - 1) * strides[i] - room, 0) if ceil else 0)
    return added


@operator("MaxPool", several=True)
def max_pool(
    x: Tensor, kernel_shape: Sequence[int], strides: Ints = None, pads: Ints = None, dilations: Ints = None,
    ceil_mode: int = 0, auto_pad: str = "NOTSET", storage_order: int = 0, *, outputs: int,
) -> tuple[Tensor, ...]:  # fmt: skip
    """The largest element of every window, and where it is in the flattened input."""
    n = len(kernel_shape)
    kernel, steps, spread = list(kernel_shape), list(strides or [1] * n), list(dilations or [1] * n)
    before, after = spatial_pads(x.shape[2:], kernel, steps, spread, pads, auto_pad)
    ceil = bool(ceil_mode) and auto_pad in ("NOTSET", "")
    spans = [(k - 1) * d + 1 for k, d in zip(kernel, spread, strict=True)]
    more = overhang(x.shape[2:], spans, steps, [*before, *after], ceil)
    simple = before == after and all(2 * p <= k for p, k in zip(before, kernel, strict=True))
    if simple and outputs == 1 and x.is_floating_point() and (ceil or not any(more)):
        return ((F.max_pool1d, F.max_pool2d, F.max_pool3d)[n - 1](x, kernel, steps, before, spread, ceil),)
    after = [a + m for a, m in zip(after, more, strict=True)]
    low = -math.inf if x.is_floating_point() else torch.iinfo(x.dtype).min
    view = windows(padded(x, before, after, low), kernel, steps, spread).flatten(-n)
    y, hit = view.max(-1)
    if outputs == 1:
        return (y,)
    shape = list(x.shape[2:])
    numbers = torch.arange(product(shape), device=x.device)
    numbers = numbers.reshape(shape[::-1]).permute(*range(n - 1, -1, -1)) if storage_order else numbers.reshape(shape)
    numbers = windows(padded(numbers[None, None], before, after, -1), kernel, steps, spread).flatten(-n)
    places = numbers.expand(*view.shape).gather(-1, hit.unsqueeze(-1)).squeeze(-1)
    planes = torch.arange(x.shape[0] * x.shape[1], device=x.device).reshape(*x.shape[:2], *[1] * n)
    return y, places + planes * product(shape)


@operator("AveragePool")
def average_pool(
    x: Tensor, kernel_shape: Sequence[int], strides: Ints = None, pads: Ints = None, dilations: Ints = None,
    ceil_mode: int = 0, auto_pad: str = "NOTSET", count_include_pad: int = 0,
) -> Tensor:  # fmt: skip
    """The mean of every window, over what lies in the tensor, or in its pads too."""
    n = len(kernel_shape)
    kernel, steps, spread = list(kernel_shape), list(strides or [1] * n), list(dilations or [1] * n)
    before, after = spatial_pads(x.shape[2:], kernel, steps, spread, pads, auto_pad)
    spans = [(k - 1) * d + 1 for k, d in zip(kernel, spread, strict=True)]
    ceil = bool(ceil_mode) and auto_pad in ("NOTSET", "")
    more = overhang(x.shape[2:], spans, steps, [*before, *after], ceil)
    if not any([*before, *after, *more]) and set(spread) == {1}:
        return (F.avg_pool1d, F.avg_pool2d, F.avg_pool3d)[n - 1](x, kernel, steps)
    whole = [a + m for a, m in zip(after, more, strict=True)]
    counted = torch.ones_like(x[:1, :1])
    counted = padded(padded(counted, before, after, float(bool(count_include_pad))), [0] * n, more)
    total = windows(padded(x, before, whole), kernel, steps, spread).flatten(-n).sum(-1)
    return total / windows(counted, kernel, steps, spread).flatten(-n).sum(-1)


@operator("GlobalAveragePool")
def global_average_pool(x: Tensor) -> Tensor:
    """The mean over the spatial axes."""
    return x.mean(list(range(2, x.dim())), True)


@operator("GlobalMaxPool")
def global_max_pool(x: Tensor) -> Tensor:
    """The maximum over the spatial axes."""
    return x.amax(list(range(2, x.dim())), True)


@operator("Softmax")
def softmax_flat(x: Tensor, axis: int = 1) -> Tensor:
    """Before opset 13: over all axes from `axis` on together."""
    axis = axis % x.dim()
    return torch.softmax(x.flatten(axis), -1).reshape(x.shape)


@operator("Softmax", since=13)
def softmax(x: Tensor, axis: int = -1) -> Tensor:
    """Exponentials that sum to 1 along an axis."""
    return torch.softmax(x, axis)


@operator("LogSoftmax")
def log_softmax_flat(x: Tensor, axis: int = 1) -> Tensor:
    """Before opset 13: over all axes from `axis` on together."""
    axis = axis % x.dim()
    return torch.log_softmax(x.flatten(axis), -1).reshape(x.shape)


@operator("LogSoftmax", since=13)
def log_softmax(x: Tensor, axis: int = -1) -> Tensor:
    """The logarithm of softmax."""
    return torch.log_softmax(x, axis)


def per_channel(vector: Tensor, like: Tensor) -> Tensor:
    """A vector [C] shaped to broadcast along axis 1 of `like`."""
    return vector.reshape(1, -1, *[1] * (like.dim() - 2))


@operator("BatchNormalization", fixed=(3, 4), several=True)
def batch_normalization(
    x: Tensor, scale: Tensor, bias: Tensor, mean: Tensor, variance: Tensor, epsilon: float = 1e-5,
    momentum: float = 0.9, training_mode: int = 0, spatial: int = 1, is_test: int = 1, *, outputs: int,
) -> tuple[Tensor, ...]:  # fmt: skip
    """Normalized by the given statistics; in training mode by those of the batch, which come out averaged too."""
    if not spatial:
        raise ValueError("spatial=0 is not supported")
    if not training_mode and (mean.requires_grad or variance.requires_grad):
        y = (x - per_channel(mean, x)) * per_channel((variance + epsilon).rsqrt() * scale, x)
        return (y + per_channel(bias, x),)
    if not training_mode:
        return (F.batch_norm(x, mean, variance, scale, bias, False, 0.0, epsilon),)
    axes = [0, *range(2, x.dim())]
    now, spread = x.mean(axes), x.var(axes, correction=0)
    y = F.batch_norm(x, None, None, scale, bias, True, 0.0, epsilon)
    return y, mean * momentum + now * (1 - momentum), variance * momentum + spread * (1 - momentum)


@operator("InstanceNormalization")
def instance_normalization(x: Tensor, scale: Tensor, bias: Tensor, epsilon: float = 1e-5) -> Tensor:
    """Every plane normalized by its own mean and variance."""
    y, _, _ = standardize(x, list(range(2, x.dim())), epsilon)
    return y * per_channel(scale, x) + per_channel(bias, x)


@operator("GroupNormalization")
def group_normalization_by_group(
    x: Tensor, scale: Tensor, bias: Tensor, num_groups: int, epsilon: float = 1e-5
) -> Tensor:
    """Groups of channels normalized; before opset 21 with one scale and bias a group."""
    each = x.shape[1] // num_groups
    return F.group_norm(x, num_groups, scale.repeat_interleave(each), bias.repeat_interleave(each), epsilon)


@operator("GroupNormalization", since=21)
def group_normalization(
    x: Tensor, scale: Tensor, bias: Tensor, num_groups: int, epsilon: float = 1e-5, stash_type: int = 1
) -> Tensor:
    """Groups of channels normalized."""
    return F.group_norm(x, num_groups, scale, bias, epsilon)


def standardize(x: Tensor, axes: Sequence[int], epsilon: float) -> tuple[Tensor, Tensor, Tensor]:
    """x with mean 0 and variance 1 over `axes`, the mean, and 1 / the standard deviation."""
    mean = x.mean(axes, True)
    inverse = (x.var(axes, correction=0, keepdim=True) + epsilon).rsqrt()
    return (x - mean) * inverse, mean, inverse


@operator("LayerNormalization", several=True)
def layer_normalization(
    x: Tensor, scale: Value, bias: Value = None, axis: int = -1, epsilon: float = 1e-5, stash_type: int = 1, *,
    outputs: int,
) -> tuple[Tensor, ...]:  # fmt: skip
    """Normalized over the axes from `axis` on, the mean, and 1 / the standard deviation."""
    axis = axis % x.dim()
    x, scale, bias = tensors(x, scale, bias)
    shape = list(x.shape[axis:])
    if outputs == 1 and list(scale.shape) == shape and (bias is None or list(bias.shape) == shape):
        return (F.layer_norm(x, shape, scale, bias, epsilon),)
    wide = x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
    y, mean, inverse = standardize(wide, list(range(axis, x.dim())), epsilon)
    y = y.to(x.dtype) * scale
    return (y if bias is None else y + bias), mean.float(), inverse.float()


@operator("RMSNormalization", "SimplifiedLayerNormalization", several=True)
def rms_normalization(
    x: Tensor, scale: Value, axis: int = -1, epsilon: float = 1e-5, stash_type: int = 1
) -> tuple[Tensor, Tensor]:
    """Divided by the root of the mean square over the axes from `axis` on, and 1 / that root."""
    x, scale = tensors(x, scale)
    axes = list(range(axis % x.dim(), x.dim()))
    wide = x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
    inverse = (wide.square().mean(axes, True) + epsilon).rsqrt()
    return (wide * inverse).to(x.dtype) * scale, inverse


@operator("LpNormalization")
def lp_normalization(x: Tensor, axis: int = -1, p: int = 2) -> Tensor:
    """Divided by the norm along an axis."""
    size = torch.linalg.vector_norm(x, p, axis, True)
    return x / torch.where(size == 0, torch.ones_like(size), size)


@operator("MeanVarianceNormalization")
def mean_variance_normalization(x: Tensor, axes: Value = (0, 2, 3)) -> Tensor:
    """With mean 0 and variance 1 over the axes."""
    along = integers(list(axes))
    centered = x - x.mean(along, True)
    return centered / (centered.square().mean(along, True).sqrt() + 1e-9)


@operator("LRN")
def local_response(x: Tensor, size: int, alpha: float = 1e-4, beta: float = 0.75, bias: float = 1.0) -> Tensor:
    """Divided by a power of the mean square over neighbouring channels."""
    before = (size - 1) // 2
    squares = F.pad(tensor(x).square().flatten(2), (0, 0, before, size - 1 - before))
    total = squares.unfold(1, size, 1).sum(-1).reshape(x.shape)
    return x / (bias + alpha / size * total) ** beta
