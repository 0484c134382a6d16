"""Operators that move elements, look at shapes, or reduce along axes."""

# mypy: disable-error-code="no-any-return"
# NumPy types the results of arithmetic on its arrays as Any.

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx_ir as oir

from burnish.backends.reference.registry import Array, Call, cast, operator


def _list(array: Array | None) -> list[int] | None:
    return None if array is None else [int(x) for x in np.asarray(array).reshape(-1)]


@operator("Constant")
def _constant(call: Call) -> Array:
    for name, value in call.attributes.items():
        if name in ("value_float", "value_floats"):
            return np.asarray(value, np.float64)
        if name in ("value_int", "value_ints"):
            return np.asarray(value, np.int64)
        if name in ("value_string", "value_strings"):
            return np.asarray(value, object)
        if name == "value":
            return np.asarray(value)
    raise ValueError("a Constant of a kind that is not dense")


@operator("Shape")
def _shape(call: Call, x: Array) -> Array:
    return np.asarray(x.shape[call.get("start", 0) : call.get("end")], np.int64)


@operator("Size")
def _size(call: Call, x: Array) -> Array:
    return np.asarray(x.size, np.int64)


@operator("Reshape")
def _reshape(call: Call, x: Array, shape: Array | None = None) -> Array:
    wanted = _list(shape) if shape is not None else list(call.get("shape"))
    assert wanted is not None
    if not call.get("allowzero", 0):
        wanted = [x.shape[i] if d == 0 else d for i, d in enumerate(wanted)]
    return x.reshape(wanted)


@operator("Transpose")
def _transpose(call: Call, x: Array) -> Array:
    return np.transpose(x, call.get("perm"))


@operator("Squeeze")
def _squeeze(call: Call, x: Array, axes: Array | None = None) -> Array:
    wanted = call.get("axes") if axes is None else _list(axes)
    return np.squeeze(x, None if wanted is None else tuple(wanted))


@operator("Unsqueeze")
def _unsqueeze(call: Call, x: Array, axes: Array | None = None) -> Array:
    wanted = list(call.get("axes")) if axes is None else [int(a) for a in axes.reshape(-1)]
    return np.expand_dims(x, tuple(wanted))


@operator("Flatten")
def _flatten(call: Call, x: Array) -> Array:
    axis = call.get("axis", 1)
    axis = axis + x.ndim if axis < 0 else axis
    return x.reshape(int(np.prod(x.shape[:axis])), int(np.prod(x.shape[axis:])))


@operator("Concat")
def _concat(call: Call, *arrays: Array) -> Array:
    return np.concatenate(arrays, call.get("axis", 1))


@operator("Split")
def _split(call: Call, x: Array, split: Array | None = None) -> tuple[Array, ...]:
    axis = call.get("axis", 0)
    sizes = call.get("split") if split is None else _list(split)
    if sizes is None:
        whole = -(-x.shape[axis] // call.outputs)
        return tuple(np.split(x, range(whole, whole * call.outputs, whole), axis))
    return tuple(np.split(x, np.cumsum(sizes)[:-1], axis))


@operator("Slice")
def _slice(call: Call, x: Array, *rest: Array | None) -> Array:
    starts: Any
    ends: Any
    axes: Any
    steps: Any
    if call.version < 10:
        starts, ends, axes, steps = list(call.get("starts")), list(call.get("ends")), call.get("axes"), None
    else:
        starts, ends, axes, steps = [_list(r) for r in (*rest, None, None)][:4]
    axes = range(len(starts)) if axes is None else axes
    steps = [1] * len(starts) if steps is None else steps
    cut: list[slice] = [slice(None)] * x.ndim
    for start, end, axis, step in zip(starts, ends, axes, steps, strict=True):
        size = x.shape[axis]
        start = start + size if start < 0 else start
        end = end + size if end < 0 else end
        if step > 0:
            cut[axis] = slice(max(start, 0), max(end, 0), step)
        else:
            back = slice(min(start, size - 1), end if end >= 0 else None, step)
            cut[axis] = back if size and start >= 0 else slice(0, 0)
    return x[tuple(cut)]


@operator("Gather")
def _gather(call: Call, x: Array, indices: Array) -> Array:
    return np.take(x, indices, axis=call.get("axis", 0))


def _along(x: Array, indices: Array, axis: int) -> tuple[Array, ...]:
    grid = list(np.ogrid[tuple(slice(n) for n in indices.shape)])
    grid[axis] = np.where(indices < 0, indices + x.shape[axis], indices)
    return tuple(grid)


@operator("GatherElements")
def _gather_elements(call: Call, x: Array, indices: Array) -> Array:
    return np.asarray(x[_along(x, indices, call.get("axis", 0))])


@operator("GatherND")
def _gather_nd(call: Call, x: Array, indices: Array) -> Array:
    batch = call.get("batch_dims", 0)
    lead = np.ogrid[tuple(slice(n) for n in x.shape[:batch])] if batch else []
    lead = [g.reshape(g.shape + (1,) * (indices.ndim - 1 - batch)) for g in lead]
    return np.asarray(x[(*lead, *np.moveaxis(indices, -1, 0))])


def _combine(target: Array, where: tuple[Any, ...], updates: Array, how: str) -> Array:
    step = {"add": np.add, "mul": np.multiply, "max": np.maximum, "min": np.minimum}.get(how)
    if step is None:
        target[where] = updates
    else:
        step.at(target, where, updates)
    return target


@operator("ScatterElements", "Scatter")
def _scatter_elements(call: Call, x: Array, indices: Array, updates: Array) -> Array:
    where = _along(x, indices, call.get("axis", 0))
    return _combine(x.copy(), where, updates, call.get("reduction", "none"))


@operator("ScatterND")
def _scatter_nd(call: Call, x: Array, indices: Array, updates: Array) -> Array:
    return _combine(x.copy(), tuple(np.moveaxis(indices, -1, 0)), updates, call.get("reduction", "none"))


@operator("Expand")
def _expand(call: Call, x: Array, shape: Array) -> Array:
    return np.broadcast_to(x, np.broadcast_shapes(x.shape, tuple(_list(shape) or ())))


@operator("Tile")
def _tile(call: Call, x: Array, repeats: Array) -> Array:
    return np.tile(x, _list(repeats) or ())


@operator("Pad")
def _pad(
    call: Call, x: Array, pads: Array | None = None, value: Array | None = None, axes: Array | None = None
) -> Array:
    amounts = list(call.get("pads") or call.get("paddings")) if pads is None else _list(pads)
    assert amounts is not None
    fill = call.get("value", 0.0) if value is None else value.reshape(())
    chosen = _list(axes) or list(range(x.ndim))
    widths = [(0, 0)] * x.ndim
    for i, axis in enumerate(chosen):
        widths[axis] = (amounts[i], amounts[i + len(chosen)])
    x = x[tuple(slice(max(-a, 0), n - max(-b, 0)) for (a, b), n in zip(widths, x.shape, strict=True))]
    widths = [(max(a, 0), max(b, 0)) for a, b in widths]
    mode: Any = call.get("mode", "constant")
    if mode == "constant":
        return np.pad(x, widths, constant_values=fill)
    return np.pad(x, widths, mode)


@operator("Range")
def _range(call: Call, start: Array, limit: Array, delta: Array) -> Array:
    first, last, step = (v.reshape(()).item() for v in (start, limit, delta))
    count = max(int(np.ceil((last - first) / step)), 0)
    return np.asarray(first + np.arange(count) * step).astype(start.dtype)


@operator("ConstantOfShape")
def _constant_of_shape(call: Call, shape: Array) -> Array:
    value = call.get("value", np.zeros(1))
    return np.full(_list(shape) or (), value.reshape(()), value.dtype)


@operator("EyeLike")
def _eye_like(call: Call, x: Array) -> Array:
    dtype = call.get("dtype")
    eye = np.eye(x.shape[0], x.shape[1], k=int(call.get("k", 0)))
    return eye.astype(x.dtype) if dtype is None else cast(eye, oir.DataType(dtype))


@operator("NonZero")
def _nonzero(call: Call, x: Array) -> Array:
    return np.stack(np.nonzero(x)).astype(np.int64)


@operator("OneHot")
def _one_hot(call: Call, indices: Array, depth: Array, values: Array) -> Array:
    axis = call.get("axis", -1)
    count, indices = int(depth.reshape(())), indices.astype(np.int64)
    rank = indices.ndim + 1
    places = np.arange(count).reshape([-1 if i == axis % rank else 1 for i in range(rank)])
    hot = np.expand_dims(np.where(indices < 0, indices + count, indices), axis) == places
    return np.where(hot, values[1], values[0])


@operator("Trilu")
def _trilu(call: Call, x: Array, k: Array | None = None) -> Array:
    shift = 0 if k is None else int(k.reshape(()))
    return np.triu(x, shift) if call.get("upper", 1) else np.tril(x, shift)


@operator("CumSum")
def _cumsum(call: Call, x: Array, axis: Array) -> Array:
    along = int(axis.reshape(()))
    x = np.flip(x, along) if call.get("reverse", 0) else x
    total = np.cumsum(x, along, dtype=x.dtype)
    total = total - x if call.get("exclusive", 0) else total
    return np.flip(total, along) if call.get("reverse", 0) else total


@operator("TopK")
def _top_k(call: Call, x: Array, k: Array | None = None) -> tuple[Array, Array]:
    axis = call.get("axis", -1)
    count = int(k.reshape(-1)[0]) if k is not None else call.get("k")
    key = -x.astype(np.float64) if call.get("largest", 1) else x
    order = np.argsort(key, axis=axis, kind="stable").astype(np.int64)
    order = np.take(order, np.arange(count), axis=axis)
    return np.take_along_axis(x, order, axis), order


@operator("ArgMax", "ArgMin")
def _arg(call: Call, x: Array) -> Array:
    axis = call.get("axis", 0)
    find = np.argmax if call.op == "ArgMax" else np.argmin
    if call.get("select_last_index", 0):
        found = x.shape[axis] - 1 - find(np.flip(x, axis), axis)
    else:
        found = find(x, axis)
    found = np.expand_dims(found, axis) if call.get("keepdims", 1) else np.asarray(found)
    return found.astype(np.int64)


@operator("DepthToSpace", "SpaceToDepth")
def _depth_space(call: Call, x: Array) -> Array:
    b = call.get("blocksize")
    n, c, h, w = x.shape
    if call.op == "SpaceToDepth":
        order = (0, 3, 5, 1, 2, 4) if call.get("mode", "DCR") == "DCR" else (0, 1, 3, 5, 2, 4)
        return x.reshape(n, c, h // b, b, w // b, b).transpose(order).reshape(n, c * b * b, h // b, w // b)
    if call.get("mode", "DCR") == "DCR":
        return x.reshape(n, b, b, c // b**2, h, w).transpose(0, 3, 4, 1, 5, 2).reshape(n, c // b**2, h * b, w * b)
    return x.reshape(n, c // b**2, b, b, h, w).transpose(0, 1, 4, 2, 5, 3).reshape(n, c // b**2, h * b, w * b)


def _reduce(op: str, x: Array, axes: tuple[int, ...], keep: bool) -> Any:
    if op in ("ReduceSum", "ReduceLogSum", "ReduceProd"):
        total = (np.prod if op == "ReduceProd" else np.sum)(x, axis=axes, keepdims=keep, dtype=x.dtype)
        return np.log(total) if op == "ReduceLogSum" else total
    if op == "ReduceMean":
        total = np.sum(x, axis=axes, keepdims=keep, dtype=x.dtype)
        count = int(np.prod([x.shape[a] for a in axes]))
        return total / count if x.dtype.kind == "f" else np.trunc(total / count).astype(x.dtype)
    if op == "ReduceL1":
        return np.sum(np.abs(x), axis=axes, keepdims=keep, dtype=x.dtype)
    if op in ("ReduceL2", "ReduceSumSquare"):
        total = np.sum(x * x, axis=axes, keepdims=keep, dtype=x.dtype)
        return np.sqrt(total).astype(x.dtype) if op == "ReduceL2" else total
    if op == "ReduceLogSumExp":
        top = np.max(x, axis=axes, keepdims=True, initial=-np.inf)
        top = np.where(np.isfinite(top), top, 0.0)
        total = np.log(np.sum(np.exp(x - top), axis=axes, keepdims=keep))
        return total + (top if keep else np.squeeze(top, axes))
    if not x.dtype == bool and any(x.shape[a] == 0 for a in axes):
        limits: Any = np.iinfo(x.dtype) if x.dtype.kind in "iu" else None
        low, high = (limits.min, limits.max) if limits else (-np.inf, np.inf)
        reduced: Sequence[int] = [1 if i in axes else n for i, n in enumerate(x.shape)]
        full = np.full(reduced, low if op == "ReduceMax" else high, x.dtype)
        return full if keep else np.squeeze(full, axes)
    return (np.max if op == "ReduceMax" else np.min)(x, axis=axes, keepdims=keep)


_REDUCTIONS = (
    "Sum", "Mean", "Max", "Min", "Prod", "L1", "L2", "LogSum", "LogSumExp", "SumSquare",
)  # fmt: skip


@operator(*(f"Reduce{name}" for name in _REDUCTIONS))
def _reduction(call: Call, x: Array, axes: Array | None = None) -> Array:
    wanted = call.get("axes") if axes is None else _list(axes)
    if not wanted:
        if call.get("noop_with_empty_axes", 0):
            return np.asarray(_reduce(call.op, x, (), True))
        wanted = range(x.ndim)
    return np.asarray(_reduce(call.op, x, tuple(a % x.ndim for a in wanted), bool(call.get("keepdims", 1))))
