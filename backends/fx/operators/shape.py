"""Operators that read shapes or make tensors of given shapes."""

from __future__ import annotations

import math
from typing import Any

import torch

from burnish.backends.fx.registry import operator
from burnish.backends.fx.values import (
    DTYPES,
    Tensor,
    Value,
    flat,
    host,
    integers,
    is_host,
    nest,
    product,
    sizes,
    tensor,
)

_SMALL = 64
"""Integers of up to this many elements are made on the host."""


@operator("Shape")
def shape(x: Value, start: int = 0, end: int | None = None) -> list[Any]:
    """The dimensions from `start` to `end`, as a host value."""
    return list(sizes(x) if is_host(x) else x.shape)[start:end]


@operator("Size")
def size(x: Value) -> Any:
    """The number of elements, as a host value."""
    return product(sizes(x) if is_host(x) else x.shape)


Number = tuple[Any, int]
"""A tensor attribute of one element: the number and its ONNX dtype."""


@operator("Constant")
def constant(
    value: Tensor | Number | None = None, value_float: float | None = None, value_floats: list[float] | None = None,
    value_int: int | None = None, value_ints: list[int] | None = None,
) -> Value:  # fmt: skip
    """A constant whose attribute comes from the caller of a function; integers are host values."""
    if value is not None:
        return torch.tensor(value[0], dtype=DTYPES[value[1]]) if isinstance(value, tuple) else value
    if value_int is not None or value_ints is not None:
        return value_int if value_int is not None else value_ints
    return torch.tensor(value_float if value_float is not None else value_floats, dtype=torch.float32)


@operator("ConstantOfShape", static=(0,))
def constant_of_shape(shape: Value, value: Number = (0.0, 1)) -> Value:
    """A tensor filled with one value; short vectors of int64 stay on the host."""
    dims, (number, dtype) = integers(shape), value
    if DTYPES[dtype] == torch.int64 and all(isinstance(d, int) for d in dims) and 0 < product(dims) <= _SMALL:
        return nest([number] * product(dims), dims)
    return torch.full(dims, number, dtype=DTYPES[dtype])


@operator("Range", static=(0, 1, 2))
def arange(start: Value, limit: Value, delta: Value, stash_type: int = 1, *, result: int = 0) -> Tensor:
    """Numbers from `start` in steps of `delta`, `limit` excluded; the dtype is that of the operands."""
    given = [x for x in (start, limit, delta) if isinstance(x, torch.Tensor)]
    (first,), (last,), (step,) = (flat(host(x)) for x in (start, limit, delta))
    if result or given:
        dtype = given[0].dtype if given else DTYPES[result]
    else:
        dtype = torch.float32 if any(isinstance(x, float) for x in (first, last, step)) else torch.int64
    if not dtype.is_floating_point:
        return torch.arange(first, last, step, dtype=dtype, device=given[0].device if given else None)
    count = max(math.ceil((last - first) / step), 0)
    wide = torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype
    return (first + torch.arange(count, dtype=wide) * step).to(dtype)


@operator("EyeLike")
def eye_like(x: Value, dtype: int | None = None, k: int = 0) -> Tensor:
    """Ones on a diagonal of a matrix of the shape of `x`."""
    x = tensor(x)
    kind = x.dtype if dtype is None else DTYPES[dtype]
    ones = torch.ones(x.shape, device=x.device)
    return (torch.triu(ones, k) * torch.tril(ones, k)).to(kind)


@operator("Expand", static=(1,))
def expand(x: Value, shape: Value) -> Tensor:
    """Broadcast against a shape."""
    wanted = integers(shape)
    x = tensor(x)
    rank = max(x.dim(), len(wanted))
    own = [1] * (rank - x.dim()) + list(x.shape)
    wanted = [1] * (rank - len(wanted)) + wanted
    return x.expand([a if isinstance(b, int) and b == 1 else b for a, b in zip(own, wanted, strict=True)])


@operator("Reshape", static=(1,))
def reshape(x: Value, shape: Value, allowzero: int = 0) -> Value:
    """In another shape: 0 keeps a dimension (unless `allowzero`), -1 is computed."""
    wanted = integers(shape)
    own = sizes(x) if is_host(x) else x.shape
    if not allowzero:
        wanted = [own[i] if isinstance(d, int) and d == 0 else d for i, d in enumerate(wanted)]
    if not is_host(x):
        return x.reshape(wanted)
    items = integers(x)
    rest = product([d for d in wanted if d != -1])
    return nest(items, [len(items) // max(rest, 1) if d == -1 else d for d in wanted])


@operator("Flatten")
def flatten(x: Value, axis: int = 1) -> Tensor:
    """A matrix: the axes before `axis`, and those from it on."""
    x = tensor(x)
    axis = axis + x.dim() if axis < 0 else axis
    return x.reshape(product(x.shape[:axis]), product(x.shape[axis:]))


@operator("Squeeze", static=(1,))
def squeeze(x: Value, axes: Value = None) -> Value:
    """Without the given axes of size 1, or without all of them."""
    dims = sizes(x) if is_host(x) else list(x.shape)
    wanted = [a % len(dims) for a in integers(axes)] if axes is not None else [i for i, d in enumerate(dims) if d == 1]
    if any(dims[a] != 1 for a in wanted):
        raise ValueError(f"axes {wanted} of shape {dims} are not all 1")
    if is_host(x):
        return nest(integers(x), [d for i, d in enumerate(dims) if i not in wanted])
    return x.squeeze(tuple(wanted)) if wanted else x


@operator("Unsqueeze", static=(1,))
def unsqueeze(x: Value, axes: Value) -> Value:
    """With axes of size 1 inserted."""
    wanted = integers(axes)
    dims = sizes(x) if is_host(x) else list(x.shape)
    rank = len(dims) + len(wanted)
    places = sorted(a % rank for a in wanted)
    for place in places:
        dims.insert(place, 1)
    if is_host(x):
        return nest(integers(x), dims)
    for place in places:
        x = x.unsqueeze(place)
    return x
