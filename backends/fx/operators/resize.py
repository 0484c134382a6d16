"""Resize: one axis at a time, as a weighted sum of a few taken slices."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch

from burnish.backends.fx.registry import operator
from burnish.backends.fx.values import Tensor, Value, flat, host, integers


def _centres(mode: str, size: int, out: int, scale: float, roi: tuple[float, float]) -> Tensor:
    """Where the middle of every output element lies in the input, float64."""
    x = torch.arange(out, dtype=torch.float64)
    if mode == "asymmetric":
        return x / scale
    if mode == "align_corners":
        length = scale * size
        return x * (size - 1) / (length - 1) if length != 1 else torch.zeros_like(x)
    if mode == "pytorch_half_pixel":
        return (x + 0.5) / scale - 0.5 if scale * size > 1 else torch.full_like(x, -0.5)
    if mode == "half_pixel_symmetric":
        adjustment = out / (scale * size)
        return size / 2 * (1 - adjustment) + (x + 0.5) / scale - 0.5
    if mode == "tf_half_pixel_for_nn":
        return (x + 0.5) / scale
    if mode == "tf_crop_and_resize":
        start, end = roi
        if out > 1:
            return start * (size - 1) + x * (end - start) * (size - 1) / (out - 1)
        return torch.full_like(x, 0.5 * (start + end) * (size - 1))
    return (x + 0.5) / scale - 0.5


def _kernel(mode: str, a: float, x: Tensor) -> Tensor:
    x = x.abs()
    if mode == "linear":
        return (1.0 - x).clamp(min=0.0)
    near = ((a + 2) * x - (a + 3)) * x * x + 1
    far = ((a * x - 5 * a) * x + 8 * a) * x - 4 * a
    return torch.where(x <= 1, near, torch.where(x < 2, far, torch.zeros_like(x)))


def _nearest(how: str, x: Tensor, scale: float) -> Tensor:
    if how == "simple":
        how = "ceil" if scale < 1.0 else "floor"
    if how == "floor":
        return torch.floor(x)
    if how == "ceil":
        return torch.ceil(x)
    return torch.floor(x + 0.5) if how == "round_prefer_ceil" else torch.ceil(x - 0.5)


def _taps(
    centre: Tensor, size: int, scale: float, mode: str, nearest_mode: str, cubic: float, exclude: int, antialias: int
) -> tuple[Tensor, Tensor]:
    """Which slices to take [taps, out], and their weights, likewise."""
    if mode == "nearest":
        index, weight = _nearest(nearest_mode, centre, scale)[None], torch.ones((1, len(centre)), dtype=torch.float64)
    else:
        reach = 1 if mode == "linear" else 2
        stretch = min(scale, 1.0) if antialias else 1.0
        span = math.ceil(reach / stretch)
        index = torch.floor(centre) - span + 1 + torch.arange(2 * span)[:, None]
        weight = _kernel(mode, cubic, (index - centre) * stretch)
        outside = (index < 0) | (index >= size)
        weight = torch.where(outside, torch.zeros_like(weight), weight) if exclude else weight
        weight = weight / weight.sum(0)
    return index.clamp(0, size - 1).long(), weight


def _outputs(
    x: Tensor, axes: Sequence[int], scales: Sequence[float] | None, sizes: Sequence[Any] | None, policy: str
) -> tuple[list[Any], list[float]]:
    """The new sizes of `axes`, and the factors."""
    if sizes:
        factors = [n / x.shape[a] for n, a in zip(sizes, axes, strict=True)]
        if policy == "stretch":
            return list(sizes), factors
        factor = min(factors) if policy == "not_larger" else max(factors)
        return [math.floor(factor * x.shape[a] + 0.5) for a in axes], [factor] * len(axes)
    if scales is None:
        raise ValueError("neither scales nor sizes are given")
    return [math.floor(f * x.shape[a] + 1e-9) for f, a in zip(scales, axes, strict=True)], list(scales)


@operator("Resize", since=11, static=(1, 2, 3), fixed=(1, 2))
def resize(
    x: Tensor, roi: Value = None, scales: Value = None, sizes: Value = None, mode: str = "nearest",
    coordinate_transformation_mode: str = "half_pixel", nearest_mode: str = "round_prefer_floor",
    cubic_coeff_a: float = -0.75, exclude_outside: int = 0, extrapolation_value: float = 0.0, antialias: int = 0,
    axes: Sequence[int] | None = None, keep_aspect_ratio_policy: str = "stretch",
) -> Tensor:  # fmt: skip
    """In another size, by interpolation along every axis."""
    along = [a % x.dim() for a in (range(x.dim()) if axes is None else axes)]
    regions = flat(host(roi)) if roi is not None else []
    factors = flat(host(scales)) if scales is not None else []
    lengths = integers(sizes) if sizes is not None else []
    outs, factors = _outputs(x, along, factors or None, lengths, keep_aspect_ratio_policy)
    crop = coordinate_transformation_mode == "tf_crop_and_resize"
    real, outside = x.is_floating_point(), None
    y = x if real or mode == "nearest" else x.double()
    for i, (axis, out, factor) in enumerate(zip(along, outs, factors, strict=True)):
        size = x.shape[axis]
        if factor == 1.0 and out == size and not crop:
            continue
        bounds = (regions[i], regions[i + len(along)]) if crop and regions else (0.0, 1.0)
        centre = _centres(coordinate_transformation_mode, size, out, factor, bounds)
        shape = [-1 if d == axis else 1 for d in range(x.dim())]
        index, weight = _taps(centre, size, factor, mode, nearest_mode, cubic_coeff_a, exclude_outside, antialias)
        y = _mixed(y, axis, index.to(x.device), weight.to(x.device, y.dtype).reshape(len(weight), *shape))
        if crop:
            beyond = ((centre < 0) | (centre > size - 1)).reshape(shape).to(x.device)
            outside = beyond if outside is None else outside | beyond
    if outside is not None:
        y = torch.where(outside, torch.full_like(y, extrapolation_value), y)
    return y if y.dtype == x.dtype else _whole(y, bool(antialias)).to(x.dtype)


def _whole(y: Tensor, rounded: bool) -> Tensor:
    """Interpolated integers: cut off, rounded only with antialiasing, as ONNX Runtime does."""
    return torch.round(y) if rounded else torch.trunc(y + torch.copysign(torch.full_like(y, _SLACK), y))


_SLACK = 1e-6
"""What rounding may take from a number that is an integer."""


def _mixed(x: Tensor, axis: int, index: Tensor, weight: Tensor) -> Tensor:
    if len(index) == 1:
        return x.index_select(axis, index[0])
    total = x.index_select(axis, index[0]) * weight[0]
    for row, part in zip(index[1:], weight[1:], strict=True):
        total = total + x.index_select(axis, row) * part
    return total


@operator("Resize", "Upsample", since=9, static=(1,), fixed=(1,))
def resize_by_scales(x: Tensor, scales: Value, mode: str = "nearest") -> Tensor:
    """Before opset 11: by factors, the first elements aligned, the nearest one before, or behind in smaller sizes."""
    return resize(
        x, scales=scales, mode=mode, coordinate_transformation_mode="asymmetric", nearest_mode="simple"
    )  # fmt: skip
