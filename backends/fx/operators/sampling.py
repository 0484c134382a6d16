"""Values of an image between its pixels: grids, regions, deformed convolution."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F

from burnish.backends.fx.registry import operator
from burnish.backends.fx.values import Tensor, Value, integers, on_device, tensor

_MODES = {"linear": "bilinear", "cubic": "bicubic"}


@operator("GridSample", since=16)
def grid_sample(
    x: Tensor, grid: Tensor, mode: str = "bilinear", padding_mode: str = "zeros", align_corners: int = 0
) -> Tensor:
    """x [N, C, *in] at the places of `grid` [N, *out, axes], -1 and 1 being the borders; the last axis comes first."""
    flat = x.dim() == 3
    if flat:
        x, grid = x.unsqueeze(2), torch.stack((grid[..., 0], torch.zeros_like(grid[..., 0])), -1).unsqueeze(1)
    wide = x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
    y = F.grid_sample(wide, grid.to(wide.dtype), _MODES.get(mode, mode), padding_mode, bool(align_corners))
    return (y.squeeze(2) if flat else y).to(x.dtype)


@operator("AffineGrid", static=(1,))
def affine_grid(theta: Tensor, size: Value, align_corners: int = 0) -> Tensor:
    """The places that affine maps [N, d, d + 1] send the pixels of an image of `size` to."""
    return F.affine_grid(theta, integers(size), bool(align_corners))


def _neighbours(at: Tensor, size: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The pixels before and after places along an axis, and their shares; none beyond one pixel outside."""
    inside = ((at >= -1.0) & (at <= size)).to(at.dtype)
    at = at.clamp(0, size - 1)
    low = at.detach().floor().clamp(max=max(size - 2, 0))
    high = (low + 1).clamp(max=size - 1)
    share = at - low
    return low.long(), high.long(), (1 - share) * inside, share * inside


def _regions(
    x: Tensor, batch: Tensor, start: Tensor, step: Tensor, out: tuple[int, int], grid: tuple[int, int], mode: str
) -> Tensor:
    """Pooled regions [n, C, *out] that begin at `start` [n, 2], with bins of `step` [n, 2], `grid` samples each."""
    ends = []
    for axis in range(2):
        inner = (torch.arange(grid[axis], device=x.device, dtype=x.dtype) + 0.5) / grid[axis]
        places = torch.arange(out[axis], device=x.device, dtype=x.dtype)[:, None] + inner
        at = start[:, axis, None, None] + places * step[:, axis, None, None]
        ends.append(_neighbours(at.flatten(1), x.shape[2 + axis]))
    (top, bottom, *rows), (left, right, *columns) = ends
    pieces = []
    for row, down in zip((top, bottom), rows, strict=True):
        for column, across in zip((left, right), columns, strict=True):
            taken = x[batch[:, None, None], :, row[:, :, None], column[:, None, :]]
            pieces.append(taken * (down[:, :, None] * across[:, None, :]).unsqueeze(-1))
    if mode == "max":
        each = torch.stack(pieces).amax(0)
    else:
        each = pieces[0] + pieces[1] + pieces[2] + pieces[3]
    each = each.reshape(len(batch), out[0], grid[0], out[1], grid[1], x.shape[1])
    return (each.amax((2, 4)) if mode == "max" else each.mean((2, 4))).permute(0, 3, 1, 2)


@operator("RoiAlign", since=16)
def roi_align(
    x: Tensor, rois: Tensor, batch: Value, mode: str = "avg", output_height: int = 1, output_width: int = 1,
    sampling_ratio: int = 0, spatial_scale: float = 1.0, coordinate_transformation_mode: str = "half_pixel",
) -> Tensor:  # fmt: skip
    """Regions [n, 4] of x [N, C, H, W] in bins, each the mean or maximum of interpolated samples."""
    batch = on_device(tensor(batch), x).long()
    half = coordinate_transformation_mode == "half_pixel"
    corners = rois.to(x.dtype) * spatial_scale - (0.5 if half else 0.0)
    start, size = corners[:, [1, 0]], corners[:, [3, 2]] - corners[:, [1, 0]]
    size = size if half else size.clamp(min=1.0)
    out = output_height, output_width
    step = torch.stack((size[:, 0] / output_height, size[:, 1] / output_width), 1)
    if sampling_ratio > 0:
        return _regions(x, batch, start, step, out, (sampling_ratio, sampling_ratio), mode)
    found = [x.new_zeros(0, x.shape[1], *out)]
    for i, (down, across) in enumerate(step.detach().tolist()):
        grid = math.ceil(down), math.ceil(across)
        one = slice(i, i + 1)
        if min(grid) > 0:
            found.append(_regions(x, batch[one], start[one], step[one], out, grid, mode))
        else:
            found.append(x.new_zeros(1, x.shape[1], *out))
    return torch.cat(found)


@operator("RoiAlign", since=10)
def roi_align_whole(
    x: Tensor, rois: Tensor, batch: Value, mode: str = "avg", output_height: int = 1, output_width: int = 1,
    sampling_ratio: int = 0, spatial_scale: float = 1.0,
) -> Tensor:  # fmt: skip
    """Before opset 16: without the shift by half a pixel."""
    return roi_align(
        x, rois, batch, mode, output_height, output_width, sampling_ratio, spatial_scale, "output_half_pixel"
    )


@operator("DeformConv")
def deform_conv(
    x: Tensor, w: Tensor, offset: Tensor, b: Value = None, mask: Value = None, dilations: Sequence[int] | None = None,
    group: int = 1, kernel_shape: Sequence[int] | None = None, offset_group: int = 1,
    pads: Sequence[int] | None = None, strides: Sequence[int] | None = None,
) -> Tensor:  # fmt: skip
    """The convolution of x [N, C, H, W] with every tap moved by an offset, and weighted by `mask`."""
    n, channels, *size = x.shape
    kernel, out = w.shape[2:], offset.shape[2:]
    taps = kernel[0] * kernel[1]
    moved = offset.reshape(n, offset_group, taps, 2, *out)
    places = []
    for axis in range(2):
        tap = torch.arange(kernel[axis], device=x.device) * (dilations or (1, 1))[axis]
        first = torch.arange(out[axis], device=x.device) * (strides or (1, 1))[axis] - (pads or (0, 0))[axis]
        tap = tap.reshape((-1, 1) if axis == 0 else (1, -1)).expand(*kernel).reshape(-1, 1, 1)
        at = moved[:, :, :, axis] + tap + first.reshape((-1, 1) if axis == 0 else (1, -1))
        places.append((2 * at + 1) / size[axis] - 1)
    grid = torch.stack(places[::-1], -1).reshape(n * offset_group, taps * out[0], out[1], 2)
    groups = x.reshape(n * offset_group, channels // offset_group, *size)
    taken = F.grid_sample(groups, grid, "bilinear", "zeros", False)
    taken = taken.reshape(n, offset_group, channels // offset_group, taps, *out)
    if mask is not None:
        taken = taken * mask.reshape(n, offset_group, 1, taps, *out)
    columns = taken.reshape(n, group, channels // group * taps, out[0] * out[1])
    y = torch.matmul(w.reshape(group, w.shape[0] // group, -1), columns).reshape(n, w.shape[0], *out)
    return y if b is None else y + b.reshape(1, -1, 1, 1)
