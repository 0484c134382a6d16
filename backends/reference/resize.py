"""Resize: one axis at a time, as a weighted sum of a few taken slices."""

# mypy: disable-error-code="no-any-return"
# NumPy types the results of arithmetic on its arrays as Any.

from __future__ import annotations

import numpy as np

from burnish.backends.reference.registry import Array, Call, operator


def _centres(mode: str, size: int, out: int, scale: float, roi: tuple[float, float]) -> Array:
    x = np.arange(out, dtype=np.float64)
    if mode == "asymmetric":
        return x / scale
    if mode == "align_corners":
        length = scale * size
        return x * (size - 1) / (length - 1) if length != 1 else np.zeros(out)
    if mode == "pytorch_half_pixel":
        return (x + 0.5) / scale - 0.5 if scale * size > 1 else np.full(out, -0.5)
    if mode == "half_pixel_symmetric":
        adjustment = out / (scale * size)
        return size / 2 * (1 - adjustment) + (x + 0.5) / scale - 0.5
    if mode == "tf_half_pixel_for_nn":
        return (x + 0.5) / scale
    if mode == "tf_crop_and_resize":
        start, end = roi
        if out > 1:
            return start * (size - 1) + x * (end - start) * (size - 1) / (out - 1)
        return np.full(out, 0.5 * (start + end) * (size - 1))
    return (x + 0.5) / scale - 0.5


def _kernel(mode: str, a: float, x: Array) -> Array:
    x = np.abs(x)
    if mode == "linear":
        return np.maximum(1.0 - x, 0.0)
    near = ((a + 2) * x - (a + 3)) * x * x + 1
    far = ((a * x - 5 * a) * x + 8 * a) * x - 4 * a
    return np.where(x <= 1, near, np.where(x < 2, far, 0.0))


def _nearest(how: str, x: Array, scale: float) -> Array:
    if how == "simple":
        how = "ceil" if scale < 1.0 else "floor"
    if how == "floor":
        return np.floor(x)
    if how == "ceil":
        return np.ceil(x)
    return np.floor(x + 0.5) if how == "round_prefer_ceil" else np.ceil(x - 0.5)


def _taps(call: Call, size: int, out: int, scale: float, roi: tuple[float, float]) -> tuple[Array, Array]:
    """Which slices to take [taps, out], and their weights, likewise."""
    mode = call.get("mode", "nearest")
    transform = call.get("coordinate_transformation_mode", "half_pixel" if call.version >= 11 else "asymmetric")
    centre = _centres(transform, size, out, scale, roi)
    if mode == "nearest":
        how = call.get("nearest_mode", "round_prefer_floor" if call.version >= 11 else "simple")
        near = _nearest(how, centre, scale)
        index, weight = near[None], np.ones((1, out))
    else:
        reach = 1 if mode == "linear" else 2
        stretch = min(scale, 1.0) if call.get("antialias", 0) else 1.0
        span = int(np.ceil(reach / stretch))
        first = np.floor(centre) - span + 1
        index = first + np.arange(2 * span)[:, None]
        weight = _kernel(mode, call.get("cubic_coeff_a", -0.75), (index - centre) * stretch)
        outside = (index < 0) | (index >= size)
        if call.get("exclude_outside", 0):
            weight = np.where(outside, 0.0, weight)
        weight = weight / weight.sum(0)
    return np.clip(index, 0, size - 1).astype(np.int64), weight


@operator("Resize", "Upsample")
def _resize(call: Call, x: Array, *rest: Array | None) -> Array:
    roi, scales, sizes = (None, *rest, None)[:3] if call.version < 11 else (*rest, None, None, None)[:3]
    if call.version < 11 and scales is None:
        scales = np.asarray(call.get("scales"))
    axes = [a % x.ndim for a in call.get("axes", range(x.ndim))]
    if sizes is not None and sizes.size:
        outs = [int(n) for n in sizes]
        factors = [n / x.shape[a] for n, a in zip(outs, axes, strict=True)]
        policy = call.get("keep_aspect_ratio_policy", "stretch")
        if policy != "stretch":
            factors = [min(factors) if policy == "not_larger" else max(factors)] * len(axes)
            outs = [int(np.floor(f * x.shape[a] + 0.5)) for f, a in zip(factors, axes, strict=True)]
    else:
        assert scales is not None
        factors = [float(f) for f in scales]
        outs = [int(np.floor(f * x.shape[a] + 1e-9)) for f, a in zip(factors, axes, strict=True)]
    dtype = x.dtype
    crop = call.get("coordinate_transformation_mode") == "tf_crop_and_resize"
    outside = np.zeros((1,) * x.ndim, bool)
    for i, (axis, out, factor) in enumerate(zip(axes, outs, factors, strict=True)):
        size = x.shape[axis]
        if factor == 1.0 and out == size and not crop:
            continue
        bounds = (float(roi[i]), float(roi[i + len(axes)])) if crop and roi is not None else (0.0, 1.0)
        index, weight = _taps(call, size, out, factor, bounds)
        along = [-1 if d == axis else 1 for d in range(x.ndim)]
        if crop:
            centre = _centres("tf_crop_and_resize", size, out, factor, bounds)
            outside = outside | ((centre < 0) | (centre > size - 1)).reshape(along)
        if len(index) == 1:
            x = np.take(x, index[0], axis)
        else:
            x = sum(np.take(x, row, axis) * w.reshape(along) for row, w in zip(index, weight, strict=True))
    if crop:
        x = np.where(outside, call.get("extrapolation_value", 0.0), x)
    if x.dtype == dtype:
        return x
    # Integers are cut off, rounded only with antialiasing, as ONNX Runtime does it.
    return (np.rint(x) if call.get("antialias", 0) else np.trunc(x + np.copysign(_SLACK, x))).astype(dtype)


_SLACK = 1e-6
"""What rounding may take from a number that is an integer."""
