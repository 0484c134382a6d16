"""Host values: what the shape arithmetic of a model computes, kept out of tensors.

A host value is an int (or a symbolic one while torch traces), a bool, or a list of host values: the integer scalar,
vector or matrix of ONNX. `Shape` makes them, and operators on nothing but host values stay on the host, so that
`torch.export` and `torch.compile` see sizes and not tensors whose content they cannot know. A host value becomes a
tensor where it meets one. Sequences of tensors are tuples, never lists.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import onnx_ir as oir
import torch

Tensor: TypeAlias = torch.Tensor
Value: TypeAlias = Any
"""A tensor, a host value, a tuple of tensors, or None for an absent one."""

DTYPES: dict[int, torch.dtype] = {
    oir.DataType.FLOAT: torch.float32,
    oir.DataType.UINT8: torch.uint8,
    oir.DataType.INT8: torch.int8,
    oir.DataType.UINT16: torch.uint16,
    oir.DataType.INT16: torch.int16,
    oir.DataType.INT32: torch.int32,
    oir.DataType.INT64: torch.int64,
    oir.DataType.BOOL: torch.bool,
    oir.DataType.FLOAT16: torch.float16,
    oir.DataType.DOUBLE: torch.float64,
    oir.DataType.UINT32: torch.uint32,
    oir.DataType.UINT64: torch.uint64,
    oir.DataType.COMPLEX64: torch.complex64,
    oir.DataType.COMPLEX128: torch.complex128,
    oir.DataType.BFLOAT16: torch.bfloat16,
    oir.DataType.FLOAT8E4M3FN: torch.float8_e4m3fn,
    oir.DataType.FLOAT8E4M3FNUZ: torch.float8_e4m3fnuz,
    oir.DataType.FLOAT8E5M2: torch.float8_e5m2,
    oir.DataType.FLOAT8E5M2FNUZ: torch.float8_e5m2fnuz,
    oir.DataType.FLOAT8E8M0: torch.float8_e8m0fnu,
}
"""The torch dtype of each ONNX dtype that torch has; by the ONNX number."""
HELD: dict[int, torch.dtype] = {
    oir.DataType.INT4: torch.int8,
    oir.DataType.UINT4: torch.uint8,
    oir.DataType.INT2: torch.int8,
    oir.DataType.UINT2: torch.uint8,
    oir.DataType.FLOAT4E2M1: torch.float8_e4m3fn,
}
"""The torch dtype that holds the numbers of an ONNX dtype that torch lacks."""


def held(dtype: int) -> torch.dtype:
    """The torch dtype of tensors of an ONNX dtype."""
    return HELD[dtype] if dtype in HELD else DTYPES[dtype]


def is_host(x: Value) -> bool:
    """Whether `x` is a host value."""
    return isinstance(x, int | list | torch.SymInt | torch.SymBool)


def all_host(*values: Value) -> bool:
    """Whether all of `values` that are present are host values."""
    return all(x is None or is_host(x) for x in values)


def flat(x: Value) -> list[Any]:
    """The elements of a host value, in order."""
    if not isinstance(x, list):
        return [x]
    return [item for part in x for item in flat(part)]


def sizes(x: Value) -> list[int]:
    """The dimensions of a host value."""
    found = []
    while isinstance(x, list):
        found.append(len(x))
        if not x:
            break
        x = x[0]
    return found


def nest(items: Sequence[Any], dims: Sequence[int]) -> Value:
    """A host value of the given dimensions from its elements in order."""
    if not dims:
        return items[0]
    step = len(items) // dims[0] if dims[0] else 0
    return [nest(items[i * step : (i + 1) * step], dims[1:]) for i in range(dims[0])]


def host(x: Value) -> Value:
    """`x` as a host value; a tensor is read, which needs its content."""
    return x.tolist() if isinstance(x, torch.Tensor) else x


def product(dims: Sequence[Any]) -> Any:
    """The product of sizes; tracing follows this loop where it cannot follow `math.prod`."""
    total = 1
    for d in dims:
        total = total * d
    return total


def integers(x: Value) -> list[Any]:
    """The elements of `x` as a flat list of sizes or axes."""
    return flat(host(x))


def integer(x: Value) -> Any:
    """The only element of `x`."""
    (only,) = integers(x)
    return only


def tensor(x: Value, like: torch.Tensor | None = None) -> torch.Tensor:
    """`x` as a tensor: host values become int64 or bool, or take dtype and device of `like`.

    None stays None.
    """
    if x is None or isinstance(x, torch.Tensor):
        return x
    items = flat(x)
    device = None if like is None else like.device
    if items and all(isinstance(item, bool | torch.SymBool) for item in items):
        dtype = torch.bool
    elif any(isinstance(item, float) for item in items):
        dtype = torch.float32 if like is None else like.dtype
    else:
        dtype = torch.int64 if like is None else like.dtype
    if any(isinstance(item, torch.SymInt) for item in items):
        symbols = [torch.scalar_tensor(item, dtype=dtype, device=device) for item in items]
        return torch.stack(symbols).reshape(sizes(x))
    return torch.tensor(items, dtype=dtype, device=device).reshape(sizes(x))


def tensors(*values: Value) -> list[Any]:
    """Operands of one dtype as tensors on one device: host values take the dtype of the first tensor; None stays."""
    found = [x for x in values if isinstance(x, torch.Tensor)]
    like = _placed(found)
    return [None if x is None else on_device(tensor(x, like), like) for x in values]


def together(*values: Value) -> list[Any]:
    """Operands of any dtypes as tensors on one device; host values become int64 or bool; None stays."""
    like = _placed([x for x in values if isinstance(x, torch.Tensor)])
    return [None if x is None else on_device(tensor(x), like) for x in values]


def _placed(found: Sequence[torch.Tensor]) -> torch.Tensor | None:
    """The tensor whose device the others follow: one that is not on the CPU when there is any."""
    return next((x for x in found if x.device.type != "cpu"), found[0] if found else None)


def on_device(x: torch.Tensor, like: torch.Tensor | None) -> torch.Tensor:
    """`x` on the device of `like`."""
    return x if like is None or x.device == like.device else x.to(like.device)


def broadcast(function: Callable[..., Any], *values: Value) -> Value:
    """Apply a function of numbers to the elements of host values, broadcast against each other."""
    depth = max(len(sizes(x)) for x in values)
    if not depth:
        return function(*values)
    rows = [x if len(sizes(x)) == depth else [x] for x in values]
    count = next((len(row) for row in rows if len(row) != 1), 1)
    if any(len(row) not in (1, count) for row in rows):
        raise ValueError(f"lengths {[len(row) for row in rows]} do not fit together")
    return [broadcast(function, *(row[0] if len(row) == 1 else row[i] for row in rows)) for i in range(count)]


def deeper(function: Callable[..., Any], x: Value, axis: int) -> Value:
    """Apply a function of host values to `x` below its first `axis` axes."""
    return function(x) if axis == 0 else [deeper(function, part, axis - 1) for part in x]


def as_output(x: Value, dtype: int) -> Value:
    """A graph output as a tensor of the declared ONNX dtype; tensors and sequences stay what they are."""
    return tensor(x).to(DTYPES[dtype]) if is_host(x) else x
