"""Operators that move, pick or place elements."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F

from burnish.backends.fx.registry import operator
from burnish.backends.fx.values import (
    Tensor,
    Value,
    all_host,
    deeper,
    host,
    integer,
    integers,
    is_host,
    on_device,
    sizes,
    tensor,
    tensors,
    together,
)


@operator("Transpose")
def transpose(x: Value, perm: Sequence[int] | None = None) -> Tensor:
    """Axes in another order, reversed by default."""
    x = tensor(x)
    return x.permute(list(perm) if perm is not None else list(range(x.dim()))[::-1])


@operator("Concat")
def concat(*values: Value, axis: int = 1) -> Value:
    """The inputs behind each other along an axis."""
    if all_host(*values):
        depth = len(sizes(values[0]))
        return _joined(list(values), axis % depth)
    return torch.cat(tensors(*values), axis)


def _joined(values: list[Any], axis: int) -> list[Any]:
    if axis == 0:
        return [item for value in values for item in value]
    return [_joined(list(rows), axis - 1) for rows in zip(*values, strict=True)]


@operator("Split", static=(1,), several=True)
def split(
    x: Value, split: Value = None, axis: int = 0, num_outputs: int | None = None, *, outputs: int
) -> tuple[Value, ...]:
    """Parts of the given sizes, or equal ones of which the last may be smaller."""
    length = sizes(x)[axis] if is_host(x) else x.shape[axis]
    count = num_outputs or outputs
    parts = integers(split) if split is not None else None
    if parts is None:
        whole = -(-length // count)
        parts = [whole] * (count - 1) + [length - whole * (count - 1)]
    if is_host(x):
        starts = [sum(parts[:i]) for i in range(len(parts))]
        cut = axis % len(sizes(x))
        return tuple(deeper(lambda v, s=s, n=n: v[s : s + n], x, cut) for s, n in zip(starts, parts, strict=True))
    return tuple(torch.split(x, parts, axis))


@operator("Slice", static=(1, 2, 3, 4))
def cut(x: Value, starts: Value, ends: Value, axes: Value = None, steps: Value = None) -> Value:
    """From `starts` to `ends` in `steps` along `axes`; ends beyond the tensor stop at it."""
    first, last = integers(starts), integers(ends)
    rank = len(sizes(x)) if is_host(x) else x.dim()
    along = integers(axes) if axes is not None else list(range(len(first)))
    strides = integers(steps) if steps is not None else [1] * len(first)
    if is_host(x) and any(isinstance(bound, torch.SymInt) for bound in first + last):
        x = tensor(x)
    for start, end, axis, step in zip(first, last, along, strides, strict=True):
        axis = axis % rank
        if is_host(x):
            x = deeper(lambda v, s=slice(start, end, step): v[s], x, axis)
        elif step > 0:
            x = x[(slice(None),) * axis + (slice(start, end, step),)]
        else:
            places = torch.arange(x.shape[axis], device=x.device).flip(0)
            x = x.index_select(axis, places[_reversed(start, end, step, x.shape[axis])])
    return x


def _reversed(start: int, end: int, step: int, size: int) -> slice:
    """The slice of the flipped axis that is `start:end:step` of the axis for a negative step."""
    start = min(start + size if start < 0 else start, size - 1)
    end = max(end + size, -1) if end < 0 else end
    return slice(size - 1 - start, size - 1 - end, -step) if start >= 0 else slice(0, 0)


@operator("Gather")
def gather(x: Value, indices: Value, axis: int = 0) -> Value:
    """Slices of `x` along an axis; negative indices count from the end."""
    if is_host(x) and is_host(indices):
        return deeper(lambda v: _taken(v, indices), x, axis % len(sizes(x)))
    x = tensor(x)
    if isinstance(indices, int):
        return x.select(axis, indices)
    indices = on_device(tensor(indices), x).long()
    axis = axis % x.dim()
    indices = torch.where(indices < 0, indices + x.shape[axis], indices)
    if axis == 0 and x.dim() == 2 and x.is_floating_point():
        return F.embedding(indices, x)
    taken = x.index_select(axis, indices.reshape(-1))
    return taken.reshape(*x.shape[:axis], *indices.shape, *x.shape[axis + 1 :])


def _taken(row: list[Any], indices: Value) -> Value:
    return [_taken(row, i) for i in indices] if isinstance(indices, list) else row[indices]


@operator("GatherElements")
def gather_elements(x: Value, indices: Value, axis: int = 0) -> Tensor:
    """One element for every index, along an axis."""
    x, indices = together(x, indices)
    return torch.gather(x, axis, torch.where(indices < 0, indices + x.shape[axis], indices).long())


def _grid(x: Tensor, indices: Tensor, batch: int = 0) -> tuple[Tensor, ...]:
    """The index tensors of the leading axes of `x` from index vectors [..., k]."""
    lead = []
    for axis in range(batch):
        shape = [-1 if i == axis else 1 for i in range(indices.dim() - 1)]
        lead.append(torch.arange(x.shape[axis], device=x.device).reshape(shape))
    return (*lead, *indices.long().unbind(-1))


@operator("GatherND")
def gather_nd(x: Value, indices: Value, batch_dims: int = 0) -> Tensor:
    """Slices of `x` at index vectors."""
    x, indices = together(x, indices)
    return x[_grid(x, indices, batch_dims)]


_REDUCTIONS = {"add": "sum", "mul": "prod", "max": "amax", "min": "amin"}


@operator("ScatterElements", "Scatter")
def scatter_elements(x: Value, indices: Value, updates: Value, axis: int = 0, reduction: str = "none") -> Tensor:
    """`x` with single elements replaced or combined along an axis."""
    x, updates = tensors(x, updates)
    x, indices = together(x, indices)
    indices = torch.where(indices < 0, indices + x.shape[axis], indices).long()
    if reduction == "none":
        return x.scatter(axis, indices, updates)
    return x.scatter_reduce(axis, indices, updates, _REDUCTIONS[reduction])


@operator("ScatterND")
def scatter_nd(x: Value, indices: Value, updates: Value, reduction: str = "none") -> Tensor:
    """`x` with the slices at index vectors replaced or combined."""
    x, updates = tensors(x, updates)
    x, indices = together(x, indices)
    if reduction in ("none", "add"):
        return x.index_put(_grid(x, indices), updates, accumulate=reduction == "add")
    depth = indices.shape[-1]
    places = torch.arange(x[(0,) * depth].numel(), device=x.device)
    flat = torch.zeros(indices.shape[:-1], dtype=torch.int64, device=x.device)
    for axis, part in enumerate(indices.long().unbind(-1)):
        flat = flat * x.shape[axis] + torch.where(part < 0, part + x.shape[axis], part)
    flat = (flat.reshape(-1, 1) * len(places) + places).reshape(-1)
    return x.reshape(-1).scatter_reduce(0, flat, updates.reshape(-1), _REDUCTIONS[reduction]).reshape(x.shape)


@operator("Tile", static=(1,))
def tile(x: Value, repeats: Value) -> Tensor:
    """The tensor repeated along every axis."""
    return tensor(x).repeat(integers(repeats))


@operator("Trilu", static=(1,))
def trilu(x: Value, k: Value = None, upper: int = 1) -> Tensor:
    """The upper or lower triangle of matrices."""
    x, shift = tensor(x), 0 if k is None else integer(k)
    return torch.triu(x, shift) if upper else torch.tril(x, shift)


@operator("OneHot", static=(1,))
def one_hot(indices: Value, depth: Value, values: Value, axis: int = -1) -> Tensor:
    """`values[1]` at the index along a new axis of length `depth`, `values[0]` elsewhere."""
    indices, values = together(indices, values)
    indices = indices.long()
    count = int(integer(depth))
    rank = indices.dim() + 1
    places = torch.arange(count, device=indices.device)
    places = places.reshape([-1 if i == axis % rank else 1 for i in range(rank)])
    hot = torch.where(indices < 0, indices + count, indices).unsqueeze(axis) == places
    return torch.where(hot, values[1], values[0])


@operator("NonZero")
def non_zero(x: Value) -> Tensor:
    """The indices of elements that are not zero, one column each."""
    return torch.nonzero(tensor(x)).T


@operator("Compress")
def compress(x: Value, condition: Value, axis: int | None = None) -> Tensor:
    """The slices for which the condition holds."""
    x, condition = together(x, condition)
    x = x.reshape(-1) if axis is None else x
    return x.index_select(axis or 0, torch.nonzero(condition).reshape(-1))


@operator("ReverseSequence")
def reverse_sequence(x: Value, lengths: Value, batch_axis: int = 1, time_axis: int = 0) -> Tensor:
    """The first elements of every sequence in reverse order."""
    x, lengths = together(x, lengths)
    steps = torch.arange(x.shape[time_axis], device=x.device)
    places = torch.where(steps < lengths[:, None], lengths[:, None] - 1 - steps, steps)
    moved = x.movedim((batch_axis, time_axis), (0, 1))
    rows = torch.arange(moved.shape[0], device=x.device)[:, None]
    return moved[rows, places].movedim((0, 1), (batch_axis, time_axis))


@operator("Pad", static=(1, 2, 3), fixed=(2,))
def pad(x: Value, pads: Value, value: Value = None, axes: Value = None, mode: str = "constant") -> Tensor:
    """With elements added at both ends of the axes; negative amounts remove some."""
    x, amounts = tensor(x), integers(pads)
    along = [a % x.dim() for a in integers(axes)] if axes is not None else list(range(x.dim()))
    widths: list[tuple[Any, Any]] = [(0, 0)] * x.dim()
    for i, axis in enumerate(along):
        widths[axis] = (amounts[i], amounts[i + len(along)])
    if mode == "constant" and isinstance(value, torch.Tensor) and x.dtype != torch.bool:
        inside = F.pad(torch.ones(x.shape, dtype=torch.bool, device=x.device), _reversed_pairs(widths))
        return torch.where(inside, F.pad(x, _reversed_pairs(widths)), on_device(value.reshape(()), x))
    if mode == "constant":
        fill = value[0] if isinstance(value, list) else 0 if value is None else host(value)
        fill = fill[0] if isinstance(fill, list) else fill
        if x.dtype == torch.bool:
            return F.pad(x.to(torch.uint8), _reversed_pairs(widths), value=int(fill)).bool()
        return F.pad(x, _reversed_pairs(widths), value=fill)
    for axis, (before, after) in enumerate(widths):
        if not (isinstance(before, int) and isinstance(after, int) and before == 0 and after == 0):
            x = x.index_select(axis, _source(mode, x.shape[axis], before, after, x.device))
    return x


def _reversed_pairs(widths: Sequence[tuple[Any, Any]]) -> list[Any]:
    return [amount for pair in reversed(widths) for amount in pair]


def _source(mode: str, size: Any, before: Any, after: Any, device: torch.device) -> Tensor:
    """Where each element of a padded axis comes from."""
    places = torch.arange(-before, size + after, device=device)
    if mode == "edge":
        return places.clamp(0, size - 1)
    if mode == "wrap":
        return places % size
    if size == 1:
        return torch.zeros_like(places)
    folded = places.abs() % (2 * (size - 1))
    return torch.where(folded < size, folded, 2 * (size - 1) - folded)


@operator("CenterCropPad", static=(1,))
def center_crop_pad(x: Value, shape: Value, axes: Sequence[int] | None = None) -> Tensor:
    """The middle of the axes in another size, cut or padded with zeros."""
    x = tensor(x)
    widths: list[tuple[Any, Any]] = [(0, 0)] * x.dim()
    for axis, size in zip(range(x.dim()) if axes is None else axes, integers(shape), strict=True):
        more = size - x.shape[axis]
        before = more // 2 if more >= 0 else -(-more // 2)
        widths[axis] = (before, more - before)
    return F.pad(x, _reversed_pairs(widths))


@operator("DepthToSpace")
def depth_to_space(x: Tensor, blocksize: int, mode: str = "DCR") -> Tensor:
    """Channels moved into square blocks of the plane."""
    b, (n, c, h, w) = blocksize, x.shape
    if mode == "CRD":
        return F.pixel_shuffle(x, b)
    x = x.reshape(n, b, b, c // b**2, h, w).permute(0, 3, 4, 1, 5, 2)
    return x.reshape(n, c // b**2, h * b, w * b)


@operator("SpaceToDepth")
def space_to_depth(x: Tensor, blocksize: int, mode: str = "DCR") -> Tensor:
    """Square blocks of the plane moved into channels."""
    b, (n, c, h, w) = blocksize, x.shape
    if mode == "CRD":
        return F.pixel_unshuffle(x, b)
    x = x.reshape(n, c, h // b, b, w // b, b).permute(0, 3, 5, 1, 2, 4)
    return x.reshape(n, c * b * b, h // b, w // b)
