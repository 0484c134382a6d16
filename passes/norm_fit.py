"""The affine map per channel that is nearest to a normalization, as least squares on samples."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Self

import numpy as np

from burnish.ir.errors import InputError
from burnish.passes.reducers import Array, Reducer, numeric, rows_of

_ROWS = 1024
"""Rows that are normalized at a time, in float64."""


def normalized(rows: Array, centred: bool, epsilon: float) -> Array:
    """Rows [rows, channels] normalized, without gain and bias.

    Args:
        rows: float64.
        centred: LayerNorm, which takes the mean away; else RMSNorm.
        epsilon: added to the variance or mean square.
    """
    shifted = rows - rows.mean(1, keepdims=True) if centred else rows
    return np.asarray(shifted / np.sqrt(np.square(shifted).mean(1, keepdims=True) + epsilon))


@dataclass
class NormFit(Reducer):
    """Moments of rows and of what a normalization makes of them, channel by channel.

    Attributes:
        centred, epsilon: see `normalized`.
        rows: how many rows counted.
        mean, normal: the mean row before and after, float64 [channels]; None before the first row.
        spread, cross: sums of the squared deviations before, and of the products of deviations before and after.
    """

    centred: bool = True
    epsilon: float = 1e-5
    rows: int = field(init=False, default=0)
    mean: Array | None = field(init=False, default=None)
    normal: Array | None = field(init=False, default=None)
    spread: Array | None = field(init=False, default=None)
    cross: Array | None = field(init=False, default=None)

    @property
    def feature_axis(self) -> int:
        return -1

    def add(self, array: Array, keep: Array | None = None) -> None:
        rows = rows_of(numeric(array), -1, keep)
        for start in range(0, len(rows), _ROWS):
            block = rows[start : start + _ROWS].astype(np.float64)
            with np.errstate(all="ignore"):
                after = normalized(block, self.centred, self.epsilon)
                mean, normal = block.mean(0), after.mean(0)
                one = block - mean
                self._take(len(block), mean, normal, np.square(one).sum(0), (one * (after - normal)).sum(0))

    def nbytes(self, shape: Sequence[int]) -> int:
        return 32 * int(shape[-1])

    def _join(self, other: Self) -> None:
        if other.mean is not None and other.normal is not None and other.spread is not None and other.cross is not None:
            self._take(other.rows, other.mean, other.normal, other.spread, other.cross)

    def _take(self, rows: int, mean: Array, normal: Array, spread: Array, cross: Array) -> None:
        if self.mean is None or self.normal is None or self.spread is None or self.cross is None:
            self.rows, self.mean, self.normal, self.spread, self.cross = rows, mean, normal, spread, cross
            return
        if len(mean) != len(self.mean):
            raise InputError(f"{len(mean)} channels came after {len(self.mean)}")
        total = self.rows + rows
        one, other, weight = mean - self.mean, normal - self.normal, self.rows * rows / total
        self.spread = self.spread + spread + weight * np.square(one)
        self.cross = self.cross + cross + weight * one * other
        self.mean = self.mean + one * (rows / total)
        self.normal = self.normal + other * (rows / total)
        self.rows = total


@dataclass(frozen=True)
class Fit:
    """`scale * x + shift` per channel, and the statistics of x; all float64 [channels].

    Attributes:
        mean, variance: of x.
        scale, shift: what stands for the normalization.
    """

    mean: Array
    variance: Array
    scale: Array
    shift: Array


def fitted(seen: NormFit, gain: Array, bias: Array) -> Fit:
    """The affine that is nearest to the normalization on the rows that were seen, in each channel by itself.

    Raises:
        InputError: no row was seen, or rows hold what is no finite number.
    """
    mean, normal, spread, cross = _seen(seen)
    slope = np.divide(cross, spread, out=np.zeros_like(cross), where=spread > 0)
    return Fit(mean, spread / seen.rows, gain * slope, gain * (normal - slope * mean) + bias)


def by_statistics(seen: NormFit, gain: Array, bias: Array) -> Fit:
    """The affine that divides each channel by its own deviation (of RMSNorm: its own mean square) over all rows.

    Raises:
        InputError: as for `fitted`.
    """
    mean, _, spread, _ = _seen(seen)
    variance = spread / seen.rows
    if seen.centred:
        scale = gain / np.sqrt(variance + seen.epsilon)
        return Fit(mean, variance, scale, bias - scale * mean)
    return Fit(mean, variance, gain / np.sqrt(variance + np.square(mean) + seen.epsilon), bias)


def _seen(seen: NormFit) -> tuple[Array, Array, Array, Array]:
    if seen.mean is None or seen.normal is None or seen.spread is None or seen.cross is None:
        raise InputError("no row was seen: all are padding, or the samples have none")
    if not all(np.isfinite(one).all() for one in (seen.mean, seen.normal, seen.spread, seen.cross)):
        raise InputError("its input holds NaN, infinity, or numbers too large to be squared")
    return seen.mean, seen.normal, seen.spread, seen.cross
