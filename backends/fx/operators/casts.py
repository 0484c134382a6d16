"""Casts, also to the narrow dtypes that torch cannot round to or lacks.

Numbers of fewer than eight bits are held in eight (`burnish.backends.fx.values.HELD`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import onnx_ir as oir
import torch

from burnish.backends.fx.registry import operator
from burnish.backends.fx.values import (
    DTYPES,
    HELD,
    Tensor,
    Value,
    broadcast,
    flat,
    held,
    is_host,
    tensor,
)

LIMITS: dict[int, tuple[int, int]] = {
    oir.DataType.INT4: (-8, 7), oir.DataType.UINT4: (0, 15), oir.DataType.INT2: (-2, 1), oir.DataType.UINT2: (0, 3),
}  # fmt: skip
"""The integers of the dtypes that torch lacks."""
_OVERFLOWS = 464.0
"""From here on float8_e4m3fn has no number: 448 is its largest, and this the middle to the next one."""


def to_dtype(x: Tensor, to: int, saturate: int = 1, round_mode: str = "up") -> Tensor:
    """`x` in the dtype of ONNX number `to`, or in the dtype that holds its numbers."""
    kind = held(to)
    if to in LIMITS:
        return _wrapped(x, *LIMITS[to]).to(kind)
    if to == oir.DataType.FLOAT4E2M1:
        return _nearest_four_bits(x.float()).to(kind)
    if to == oir.DataType.FLOAT8E8M0:
        return _exponent(x.float(), bool(saturate), round_mode)
    if kind.itemsize == 1 and kind.is_floating_point:
        return _eight_bits(x.float(), kind, bool(saturate))
    return x.to(kind)


def _wrapped(x: Tensor, low: int, high: int) -> Tensor:
    """Integers modulo the number of integers from `low` to `high`, as bits are cut off."""
    return torch.remainder(x.to(torch.int64) - low, high - low + 1) + low


def _nearest_four_bits(x: Tensor) -> Tensor:
    """The nearest of 0, 0.5, 1, 1.5, 2, 3, 4 and 6, ties to the even mantissa; NaN is lost."""
    size = x.abs()
    step = torch.where(size < 2, 0.5, torch.where(size < 4, 1.0, 2.0))
    found = torch.copysign((torch.round(size / step) * step).clamp(max=6.0), x)
    return torch.where(torch.isnan(x), torch.zeros_like(x), found)


def _eight_bits(x: Tensor, kind: torch.dtype, saturate: bool) -> Tensor:
    limits = torch.finfo(kind)
    if saturate:
        return x.clamp(limits.min, limits.max).to(kind)
    if kind == torch.float8_e4m3fn:
        x = torch.where(x.abs() > _OVERFLOWS, torch.full_like(x, float("nan")), x)
    return x.to(kind)


def _exponent(x: Tensor, saturate: bool, round_mode: str) -> Tensor:
    """Powers of two, without a sign; what is not finite becomes NaN."""
    bits = x.view(torch.int32)
    exponent, fraction = (bits >> 23) & 0xFF, bits & 0x7FFFFF
    if round_mode == "up":
        more = fraction > 0
    elif round_mode == "nearest":
        more = (fraction > 0x400000) | ((fraction == 0x400000) & (exponent > 0))
    else:
        more = torch.zeros_like(fraction, dtype=torch.bool)
    more = more & (exponent < (0xFE if saturate else 0xFF))
    return (exponent + more.to(torch.int32)).to(torch.uint8).view(torch.float8_e8m0fnu)


def _no_strings(attributes: Mapping[str, Any]) -> str | None:
    return "torch has no strings" if attributes.get("to") == oir.DataType.STRING else None


@operator("Cast", refuses=_no_strings)
def cast(x: Value, to: int, saturate: int = 1, round_mode: str = "up") -> Value:
    """In another dtype; shape arithmetic stays on the host."""
    if is_host(x) and to == oir.DataType.INT64:
        return broadcast(int, x) if any(isinstance(item, bool | torch.SymBool) for item in flat(x)) else x
    return to_dtype(tensor(x), to, saturate, round_mode)


@operator("CastLike", scalars=(0,))
def cast_like(x: Value, like: Value, saturate: int = 1, round_mode: str = "up", *, result: int = 0) -> Value:
    """In the dtype of another tensor; of its declared dtype when torch lacks that."""
    number = isinstance(x, int | float)
    if is_host(like) and (number or is_host(x)):
        kind = bool if like and all(isinstance(item, bool | torch.SymBool) for item in flat(like)) else int
        return broadcast(lambda item: item if isinstance(item, torch.SymInt) else kind(item), x)
    like = tensor(like)
    if result not in HELD and number and like.dtype.itemsize > 1:
        return tensor(int(x) if isinstance(x, bool) else x, like)
    code = result if result in HELD else next(code for code, dtype in DTYPES.items() if dtype == like.dtype)
    return to_dtype(tensor(x), code, saturate, round_mode)


def _same_bits(attributes: Mapping[str, Any]) -> str | None:
    return None if attributes["to"] in DTYPES else "torch has no such dtype"


@operator("BitCast", refuses=_same_bits)
def bit_cast(x: Value, to: int) -> Tensor:
    """The same bits as numbers of another dtype of the same size."""
    return tensor(x).view(DTYPES[to])
