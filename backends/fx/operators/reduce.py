"""Operators that reduce along axes, order elements or accumulate them."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch

from burnish.backends.fx.registry import operator
from burnish.backends.fx.values import Tensor, Value, flat, integer, integers, is_host, product, sizes, tensor

Axes = list[int]


def _sum(x: Tensor, axes: Axes, keep: bool) -> Tensor:
    return x.sum(axes, keep, dtype=x.dtype)


def _mean(x: Tensor, axes: Axes, keep: bool) -> Tensor:
    if x.is_floating_point():
        return x.mean(axes, keep)
    return torch.div(_sum(x, axes, keep), product([x.shape[a] for a in axes]), rounding_mode="trunc")


def _product(x: Tensor, axes: Axes, keep: bool) -> Tensor:
    for axis in sorted(axes, reverse=True):
        x = x.prod(axis, keep, dtype=x.dtype)
    return x


def _empty(x: Tensor, axes: Axes, keep: bool, value: float) -> Tensor | None:
    """What a maximum or minimum over no elements is; None where there are some."""
    if x.numel() or all(x.shape[a] for a in axes):
        return None
    dims = [1 if i in axes else d for i, d in enumerate(x.shape) if keep or i not in axes]
    if x.is_floating_point() or x.dtype == torch.bool:
        fill: Any = value if x.is_floating_point() else value > 0
    else:
        fill = torch.iinfo(x.dtype).max if value > 0 else torch.iinfo(x.dtype).min
    return torch.full(dims, fill, dtype=x.dtype, device=x.device)


def _max(x: Tensor, axes: Axes, keep: bool) -> Tensor:
    empty = _empty(x, axes, keep, -math.inf)
    return x.amax(axes, keep) if empty is None else empty


def _min(x: Tensor, axes: Axes, keep: bool) -> Tensor:
    empty = _empty(x, axes, keep, math.inf)
    return x.amin(axes, keep) if empty is None else empty


def _l1(x: Tensor, axes: Axes, keep: bool) -> Tensor:
    return _sum(x.abs(), axes, keep)


def _l2(x: Tensor, axes: Axes, keep: bool) -> Tensor:
    if x.is_floating_point():
        return torch.linalg.vector_norm(x, 2, axes, keep)
    return _sum(x.square(), axes, keep).sqrt().to(x.dtype)


def _log_sum(x: Tensor, axes: Axes, keep: bool) -> Tensor:
    return _sum(x, axes, keep).log().to(x.dtype)


def _log_sum_exp(x: Tensor, axes: Axes, keep: bool) -> Tensor:
    return torch.logsumexp(x, axes, keep).to(x.dtype)


def _sum_square(x: Tensor, axes: Axes, keep: bool) -> Tensor:
    return _sum(x.square(), axes, keep)


_REDUCTIONS: dict[str, tuple[Callable[..., Tensor], Callable[..., Any] | None]] = {
    "ReduceSum": (_sum, sum), "ReduceMean": (_mean, None), "ReduceProd": (_product, product),
    "ReduceMax": (_max, max), "ReduceMin": (_min, min), "ReduceL1": (_l1, None), "ReduceL2": (_l2, None),
    "ReduceLogSum": (_log_sum, None), "ReduceLogSumExp": (_log_sum_exp, None), "ReduceSumSquare": (_sum_square, None),
}  # fmt: skip


def _reduction(name: str, function: Callable[..., Tensor], scalar: Callable[..., Any] | None) -> None:
    def run(x: Value, axes: Value = None, keepdims: int = 1, noop_with_empty_axes: int = 0) -> Value:
        wanted = integers(axes) if axes is not None else []
        if is_host(x) and scalar is not None and len(sizes(x)) == 1 and not noop_with_empty_axes:
            found = scalar(flat(x))
            return [found] if keepdims else found
        x = tensor(x)
        if not wanted:
            wanted = [] if noop_with_empty_axes else list(range(x.dim()))
        along = [a % x.dim() for a in wanted]
        return function(x, along, bool(keepdims)) if along else _nothing(name, x)

    run.__name__ = run.__qualname__ = name
    run.__module__ = __name__
    globals()[name] = operator(name, static=(1,))(run)


def _nothing(name: str, x: Tensor) -> Tensor:
    """The reduction along no axes: what it does to a single element."""
    if name in ("ReduceL1", "ReduceL2"):
        return x.abs()
    if name == "ReduceSumSquare":
        return x.square()
    return x.log() if name == "ReduceLogSum" else x


for _name, (_function, _scalar) in _REDUCTIONS.items():
    _reduction(_name, _function, _scalar)


def _extreme(find: Callable[..., Tensor], x: Tensor, axis: int, keep: bool, last: bool) -> Tensor:
    if not last:
        return find(x, axis, keep)
    return x.shape[axis] - 1 - find(x.flip(axis), axis, keep)


@operator("ArgMax")
def arg_max(x: Value, axis: int = 0, keepdims: int = 1, select_last_index: int = 0) -> Tensor:
    """Where the largest element is."""
    return _extreme(torch.argmax, tensor(x), axis, bool(keepdims), bool(select_last_index))


@operator("ArgMin")
def arg_min(x: Value, axis: int = 0, keepdims: int = 1, select_last_index: int = 0) -> Tensor:
    """Where the smallest element is."""
    return _extreme(torch.argmin, tensor(x), axis, bool(keepdims), bool(select_last_index))


@operator("Hardmax")
def hardmax_flat(x: Tensor, axis: int = 1) -> Tensor:
    """Before opset 13: over all axes from `axis` on together."""
    return hardmax(x.flatten(axis % x.dim()), -1).reshape(x.shape)


@operator("Hardmax", since=13)
def hardmax(x: Tensor, axis: int = -1) -> Tensor:
    """1 at the first of the largest elements along an axis, 0 elsewhere."""
    return torch.zeros_like(x).scatter(axis, x.argmax(axis, True), 1.0)


@operator("Det")
def det(x: Tensor) -> Tensor:
    """Determinants of matrices."""
    wide = x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
    return torch.linalg.det(wide).to(x.dtype)


@operator("Unique", several=True)
def unique(x: Value, axis: int | None = None, sorted: int = 1) -> tuple[Tensor, ...]:
    """Every element or slice once; where each first is, which one each element is, and how often each occurs."""
    x = tensor(x)
    rows = x.reshape(-1) if axis is None else x
    along = axis or 0
    _, which, counts = torch.unique(rows.detach(), return_inverse=True, return_counts=True, dim=along)
    which = which.reshape(-1)
    places = torch.arange(len(which) - 1, -1, -1, device=x.device)
    first = places.new_zeros(len(counts)).scatter_reduce(0, which.flip(0), places, "amin", include_self=False)
    if not sorted:
        order = torch.argsort(first)
        first, counts = first[order], counts[order]
        which = torch.empty_like(order).scatter(0, order, torch.arange(len(order), device=x.device))[which]
    return rows.index_select(along, first), first, which, counts


@operator("TopK", static=(1,), several=True)
def top_k(x: Value, k: Value, axis: int = -1, largest: int = 1, sorted: int = 1) -> tuple[Tensor, Tensor]:
    """The largest or smallest elements and their indices; of equal ones the first."""
    x = tensor(x)
    values, places = torch.sort(x, dim=axis, descending=bool(largest), stable=True)
    count = integer(k)
    return values.narrow(axis, 0, count), places.narrow(axis, 0, count)


@operator("CumSum", static=(1,))
def cumulative_sum(x: Value, axis: Value, exclusive: int = 0, reverse: int = 0) -> Tensor:
    """Sums of all elements up to each one."""
    x, along = tensor(x), integer(axis)
    x = x.flip(along) if reverse else x
    total = torch.cumsum(x, along, dtype=x.dtype)
    total = total - x if exclusive else total
    return total.flip(along) if reverse else total


@operator("CumProd", static=(1,))
def cumulative_product(x: Value, axis: Value, exclusive: int = 0, reverse: int = 0) -> Tensor:
    """Products of all elements up to each one."""
    x, along = tensor(x), integer(axis)
    x = x.flip(along) if reverse else x
    total = torch.cumprod(x, along, dtype=x.dtype)
    if exclusive:
        first = torch.ones_like(total.narrow(along, 0, 1))
        total = torch.cat((first, total.narrow(along, 0, x.shape[along] - 1)), along)
    return total.flip(along) if reverse else total


@operator("Einsum")
def einsum(*values: Value, equation: str) -> Tensor:
    """Products summed as the equation says."""
    return torch.einsum(equation.replace(" ", ""), *(tensor(v) for v in values))
