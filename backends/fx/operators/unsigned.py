"""Arithmetic on unsigned integers of 16, 32 and 64 bits, which torch stores but does not compute with."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from burnish.backends.fx.values import Tensor

_NARROW = (torch.uint16, torch.uint32)
_SIGN = -(2**63)


def unsigned(function: Callable[..., Tensor], long: Callable[..., Tensor] | None = None) -> Callable[..., Tensor]:
    """`function` for all dtypes.

    16 and 32 bits are computed in int64, which holds them; what overflows wraps around. Of 64 bits `long` (`function`
    by default) gets the bits as int64.
    """

    def run(*values: Tensor) -> Tensor:
        kind = values[0].dtype
        if kind in _NARROW:
            return _back(function(*(v.to(torch.int64) for v in values)), kind)
        if kind == torch.uint64:
            return _back((long or function)(*(v.view(torch.int64) for v in values)), kind)
        return function(*values)

    return run


def _back(y: Tensor, kind: torch.dtype) -> Tensor:
    if y.dtype == torch.bool:
        return y
    return y.view(kind) if kind == torch.uint64 else y.to(kind)


def ordered(function: Callable[..., Any]) -> Callable[..., Tensor]:
    """A comparison, maximum or minimum of int64 bits as of unsigned numbers: the sign is flipped."""

    def run(a: Tensor, b: Tensor) -> Tensor:
        found: Tensor = function(a ^ _SIGN, b ^ _SIGN)
        return found if found.dtype == torch.bool else found ^ _SIGN

    return run


def quotient(a: Tensor, b: Tensor) -> Tensor:
    """Unsigned division of int64 bits: half the dividend first, then what was lost."""
    half = torch.div(shift_right(a, torch.ones_like(a)), b.clamp(min=1), rounding_mode="trunc") << 1
    half = half + (~_below(a - half * b, b)).to(torch.int64)
    return torch.where(b < 0, (~_below(a, b)).to(torch.int64), half)


def remainder(a: Tensor, b: Tensor) -> Tensor:
    """What unsigned division of int64 bits leaves."""
    return a - quotient(a, b) * b


def _below(a: Tensor, b: Tensor) -> Tensor:
    return (a ^ _SIGN) < (b ^ _SIGN)


def shift_left(a: Tensor, b: Tensor) -> Tensor:
    """Bits moved up; none are left after 64 steps."""
    return torch.where((b < 0) | (b > 63), torch.zeros_like(a), a << b.clamp(0, 63))


def shift_right(a: Tensor, b: Tensor) -> Tensor:
    """Bits moved down, zeros behind them; none are left after 64 steps."""
    moved = (a >> b.clamp(0, 63)) & ~(torch.full_like(a, _SIGN) >> b.clamp(0, 63) << 1)
    return torch.where((b < 0) | (b > 63), torch.zeros_like(a), moved)
