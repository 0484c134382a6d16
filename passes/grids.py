"""Grids of integers, or of 8-bit floating-point numbers: fitting scale and zero point, rounding to them, and back.

A number x is stored as the integer q = clip(round(x / scale) + zero point) and read as (q - zero point) * scale, as by
QuantizeLinear and DequantizeLinear of ONNX. One scale is for a whole tensor, for each index of one axis, or for each
block along an axis. `burnish.ir.packing` puts several integers into a byte.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np

from burnish.ir.errors import InputError

Clip = Literal["minmax", "mse", "hqq"]

_STEPS = 16
_REFINEMENTS = 3
_NORM, _BETA, _KAPPA, _ITERATIONS = 0.7, 10.0, 1.01, 20
_PIECE = 1 << 16
_LEAST_STEPS = 8


@dataclass(frozen=True)
class Grid:
    """The integers that numbers are stored as.

    Attributes:
        bits: 2 to 32.
        signed: from -2^(bits-1) on, else from 0 on.
        symmetric: the zero point is 0, or 2^(bits-1) where there is no sign; else it is fitted.
    """

    bits: int
    signed: bool = True
    symmetric: bool = True

    @property
    def low(self) -> int:
        """The least integer."""
        return -(1 << (self.bits - 1)) if self.signed else 0

    @property
    def high(self) -> int:
        """The largest integer."""
        return self.low + (1 << self.bits) - 1

    @property
    def middle(self) -> int:
        """The zero point of a symmetric grid."""
        return 0 if self.signed else 1 << (self.bits - 1)

    @property
    def dtype(self) -> np.dtype[np.signedinteger | np.unsignedinteger]:
        """The smallest dtype of numpy that holds the integers."""
        width = 8 if self.bits <= 8 else 16 if self.bits <= 16 else 32
        return np.dtype(f"{'int' if self.signed else 'uint'}{width}")

    def round(self, steps: np.ndarray) -> None:
        """Bring numbers of steps, which are within the ends already, to the grid, in place; halves to the even one."""
        np.rint(steps, out=steps)


@dataclass(frozen=True)
class Float8(Grid):
    """The numbers of 8 bits that `float8e4m3fn` or `float8e5m2` has, in place of integers.

    Steps are not equally long: they are a sixteenth (an eighth) of a number at most, down to 2^-6 (2^-14), below which
    they stay as they are. See Micikevicius et al. 2022, arXiv:2209.05433.
    """

    bits: int = 8
    kind: str = "float8e4m3fn"

    @property
    def high(self) -> int:
        """The largest number."""
        return {"float8e4m3fn": 448, "float8e5m2": 57344}[self.kind]

    @property
    def low(self) -> int:
        """The least number."""
        return -self.high

    @property
    def dtype(self) -> np.dtype:
        """That of `ml_dtypes`."""
        import ml_dtypes

        kind = ml_dtypes.float8_e4m3fn if self.kind == "float8e4m3fn" else ml_dtypes.float8_e5m2
        found: np.dtype = np.dtype(kind)
        return found

    def round(self, steps: np.ndarray) -> None:
        """See `Grid`; what lies in the middle goes to the number whose last bit is 0."""
        steps[...] = steps.astype(self.dtype)


@dataclass(frozen=True)
class Scales:
    """What turns numbers into integers of a grid and back.

    Attributes:
        grid: the integers.
        scale: floating point; shape () for one of all, [size] for one of each index of `axis`; for blocks the shape of
            the numbers with ceil(size / block) along `axis`.
        zero_point: of the grid's dtype, shaped like `scale`.
        axis: of the indices or of the blocks; None for one scale of all.
        block: how many neighbours along `axis` share a scale; the last block may be shorter. None for no blocks.
    """

    grid: Grid
    scale: np.ndarray
    zero_point: np.ndarray
    axis: int | None = None
    block: int | None = None

    def spread(self, values: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
        """One number for each element of an array of `shape`, or what broadcasts to it, from one for each scale."""
        if self.axis is None:
            return values
        axis = self.axis % len(shape)
        if self.block is not None:
            return values.repeat(self.block, axis).take(range(shape[axis]), axis)
        return values.reshape([-1 if index == axis else 1 for index in range(len(shape))])


def fit(
    values: np.ndarray,
    grid: Grid,
    axis: int | None = None,
    block: int | None = None,
    clip: Clip = "minmax",
    *,
    importance: np.ndarray | None = None,
    mirrored: bool = False,
    dtype: np.dtype[np.floating] | type[np.floating] = np.float32,
) -> Scales:
    """Scales and zero points for numbers.

    Args:
        values: floating point, any shape.
        grid: the integers.
        axis: one scale for each index of this axis; with `block`, for each block along it; None for one scale.
        block: how many neighbours share a scale.
        clip: `minmax` lets every number lie in the range; `mse` lets a few be cut off where the sum of the squared
            errors becomes less: the range is shrunk step by step, then scale and zero point are the least squares
            solution for the integers found, some times over. `hqq` is half-quadratic quantization (Badri and Shaji
            2023, https://mobiusml.github.io/hqq_blog): the same solution again and again for numbers without the errors
            that a norm of p = 0.7, which forgives few large ones, leaves out.
        importance: weights of the squared errors, what broadcasts to `values`; not negative.
        mirrored: a symmetric grid may have negative scales: it reaches one step further on one side, and that can be
            either. QuantizeLinear of some targets takes positive scales only.
        dtype: scales are rounded to it before anything is rounded to them.

    Raises:
        InputError: the numbers are not finite.
    """
    if not np.isfinite(values).all():
        raise InputError("numbers that are not finite cannot be rounded to integers")
    rows, shape = _rows(values, axis, block)
    weights = None
    if importance is not None:
        weights, _ = _rows(np.broadcast_to(importance, values.shape), axis, block)
    dtype = np.dtype(dtype)
    scale, zero = np.empty(len(rows), dtype), np.empty(len(rows), grid.dtype)
    for part in _pieces(rows):
        some = rows[part].astype(np.float64)
        search = _Search(some, grid, None if weights is None else weights[part].astype(np.float64), dtype)
        found = search.covering(mirrored) if clip == "minmax" else search.least_squares(mirrored)
        scale[part], zero[part] = search.half_quadratic(mirrored) if clip == "hqq" else found
    return Scales(grid, scale.reshape(shape), zero.reshape(shape), axis, block)


def quantize(values: np.ndarray, scales: Scales) -> np.ndarray:
    """The integers for numbers, shaped like them, of the grid's dtype; halves go to the even integer."""
    scale = scales.spread(scales.scale.astype(np.float64), values.shape)
    zero = scales.spread(scales.zero_point.astype(np.float64), values.shape)
    levels = np.asarray(np.clip(values / scale, scales.grid.low - zero, scales.grid.high - zero))
    scales.grid.round(levels)
    return np.asarray(levels + zero, scales.grid.dtype)


def dequantize(levels: np.ndarray, scales: Scales) -> np.ndarray:
    """The numbers, float64, that integers stand for."""
    zero = scales.spread(scales.zero_point.astype(np.float64), levels.shape)
    return np.asarray((levels.astype(np.float64) - zero) * scales.spread(scales.scale.astype(np.float64), levels.shape))


def too_small(values: np.ndarray) -> bool:
    """Whether numbers, not all of them 0, are only a few times as large as the smallest scale of their dtype.

    That is its smallest normal number; rounded to multiples of it they would be another weight.
    """
    largest = float(np.abs(values).max(initial=0.0))
    return 0 < largest < _LEAST_STEPS * float(np.finfo(values.dtype).tiny)


def signed(levels: np.ndarray, grid: Grid) -> np.ndarray:
    """The integers of a grid from their lowest bits as unsigned ones, which is how packed ones are read."""
    found = levels.astype(np.int64)
    return np.asarray(np.where(found > grid.high, found - (1 << grid.bits), found), grid.dtype)


def _rows(values: np.ndarray, axis: int | None, block: int | None) -> tuple[np.ndarray, tuple[int, ...]]:
    """Numbers as [scales, numbers of one scale] (the last block filled up with zeros), and the shape of the scales."""
    if axis is None:
        return values.reshape(1, -1), ()
    if block is None:
        moved = np.moveaxis(values, axis, 0)
        return moved.reshape(len(moved), -1), (len(moved),)
    axis %= values.ndim
    count = -(-values.shape[axis] // block)
    parts = [slice(None)] * values.ndim
    found = np.zeros(
        [count * block if index == axis else size for index, size in enumerate(values.shape)], values.dtype
    )
    parts[axis] = slice(values.shape[axis])
    found[tuple(parts)] = values
    split = found.reshape(*values.shape[:axis], count, block, *values.shape[axis + 1 :])
    moved = np.moveaxis(split, axis + 1, -1)
    return moved.reshape(-1, block), moved.shape[:-1]


def _pieces(rows: np.ndarray) -> Iterator[slice]:
    step = max(1, _PIECE // max(1, rows.shape[1]))
    for start in range(0, len(rows), step):
        yield slice(start, start + step)


Fit = tuple[np.ndarray, np.ndarray]
"""Scales [rows] and zero points [rows]."""


@dataclass(frozen=True)
class _Search:
    """Looks for the scales of rows, float64 [rows, n], each of which gets one."""

    rows: np.ndarray
    grid: Grid
    weights: np.ndarray | None
    dtype: np.dtype[np.floating]

    def covering(self, mirrored: bool) -> Fit:
        """The smallest steps with which every number is in the range."""
        least, most = self._ends()
        if not self.grid.symmetric:
            return self._between(least, most)
        scale = self._steps(least, most)
        if mirrored:
            other = self._steps(-most, -least)
            scale = np.where(other < scale, -other, scale)
        return self._stored(scale), self._middle()

    def least_squares(self, mirrored: bool) -> Fit:
        """The best that a search over smaller ranges, then over least squares solutions, finds."""
        best = self.covering(False)
        error = self._error(best)
        best, error = self._better(best, error, self._narrowed(best, mirrored))
        for _ in range(_REFINEMENTS):
            best, error = self._better(best, error, self._solved(best, self.rows))
        return best

    def _narrowed(self, best: Fit, mirrored: bool) -> Fit:
        """The best of some smaller ranges, compared in float32 where the numbers allow it."""
        least, most = self._ends()
        largest = np.maximum(-least, most).max(initial=0.0)
        kind = np.float32 if 1e-12 < largest < 1e12 else np.float64
        rows, weights = self.rows.astype(kind), None if self.weights is None else self.weights.astype(kind)
        room = np.empty_like(rows)
        error = np.full(len(rows), np.inf)
        smallest = {2: 0.3, 3: 0.4, 4: 0.5}.get(self.grid.bits, 0.6)
        for share in np.linspace(1.0, smallest, _STEPS):
            if not self.grid.symmetric:
                tried = [self._between(least * share, most * share)]
            else:
                tried = [(self._stored(self._steps(least * share, most * share)), self._middle())]
                if mirrored:
                    tried.append((self._stored(-self._steps(-most * share, -least * share)), self._middle()))
            for one in tried:
                scale, (low, high) = one[0].astype(kind)[:, None], self._bounds(one)
                np.divide(rows, scale, out=room)
                np.clip(room, low.astype(kind), high.astype(kind), out=room)
                self.grid.round(room)
                room *= scale
                room -= rows
                found = np.einsum("ij,ij->i", room, room if weights is None else room * weights)
                less = found < error
                best = np.where(less, one[0], best[0]), np.where(less, one[1], best[1])
                error = np.where(less, found, error)
        return best

    def _bounds(self, fit: Fit) -> tuple[np.ndarray, np.ndarray]:
        """The least and the largest integer less the zero point; one for each row where these differ."""
        zero = np.float64(self.grid.middle) if self.grid.symmetric else fit[1].astype(np.float64)[:, None]
        return np.asarray(self.grid.low - zero), np.asarray(self.grid.high - zero)

    def half_quadratic(self, mirrored: bool) -> Fit:
        """The solution of half-quadratic quantization that has the least sum of the errors to the power of 0.7.

        In its paper the scale stays and the zero point is a floating-point number. Here zero points are integers, so
        the scale is solved for as well; it is all that is solved for on a symmetric grid.
        """
        best = fit = self.covering(mirrored)
        norm = (np.abs(self._apart(fit)) ** _NORM).sum(1)
        beta = _BETA
        for _ in range(_ITERATIONS):
            apart = self._apart(fit)
            sizes = np.abs(apart)
            with np.errstate(divide="ignore"):
                left = np.maximum(sizes - sizes ** (_NORM - 1) / beta, 0)
            fit = self._solved(fit, self.rows - np.sign(apart) * np.where(sizes > 0, left, 0))
            found = (np.abs(self._apart(fit)) ** _NORM).sum(1)
            less = found < norm
            best, norm = (np.where(less, fit[0], best[0]), np.where(less, fit[1], best[1])), np.minimum(found, norm)
            beta *= _KAPPA
        return best

    def _apart(self, fit: Fit) -> np.ndarray:
        return np.asarray(self.rows - self._levels(fit) * fit[0].astype(np.float64)[:, None])

    def _ends(self) -> tuple[np.ndarray, np.ndarray]:
        if not self.rows.shape[1]:
            return np.zeros(len(self.rows)), np.zeros(len(self.rows))
        return np.minimum(self.rows.min(1), 0.0), np.maximum(self.rows.max(1), 0.0)

    def _middle(self) -> np.ndarray:
        return np.full(len(self.rows), self.grid.middle, self.grid.dtype)

    def _steps(self, least: np.ndarray, most: np.ndarray) -> np.ndarray:
        """Steps of a symmetric grid that reaches from `least` to `most`."""
        below, above = self.grid.middle - self.grid.low, self.grid.high - self.grid.middle
        return np.maximum(-least / below, most / above)

    def _between(self, least: np.ndarray, most: np.ndarray) -> Fit:
        scale = self._stored((most - least) / (self.grid.high - self.grid.low))
        zero = np.rint(self.grid.low - least / scale.astype(np.float64))
        return scale, np.clip(zero, self.grid.low, self.grid.high).astype(self.grid.dtype)

    def _stored(self, scale: np.ndarray) -> np.ndarray:
        """Scales as they are stored: rounded, and no smaller than a normal number; of numbers that are all 0 the least
        of the others, or else 1: MatMulNBits adds and subtracts a block's zero points in floating point, and the rest
        is as large as the scale.
        """
        found = scale.astype(self.dtype)
        tiny = np.finfo(self.dtype).tiny
        found = np.where((np.abs(found) < tiny) & (scale != 0), np.copysign(tiny, scale), found).astype(self.dtype)
        bad = found == 0
        found[bad] = np.abs(found[~bad]).min(initial=np.inf) if not bad.all() else 1
        return found

    def _levels(self, fit: Fit) -> np.ndarray:
        """The integers less the zero point, float64."""
        found = np.divide(self.rows, fit[0].astype(np.float64)[:, None])
        np.clip(found, *self._bounds(fit), out=found)
        self.grid.round(found)
        return np.asarray(found)

    def _error(self, fit: Fit) -> np.ndarray:
        apart = self._levels(fit)
        apart *= fit[0].astype(np.float64)[:, None]
        apart -= self.rows
        weighted = apart if self.weights is None else apart * self.weights
        return np.asarray(np.einsum("ij,ij->i", apart, weighted))

    def _better(self, best: Fit, error: np.ndarray, other: Fit) -> tuple[Fit, np.ndarray]:
        found = self._error(other)
        less = found < error
        return (np.where(less, other[0], best[0]), np.where(less, other[1], best[1])), np.where(less, found, error)

    def _solved(self, fit: Fit, rows: np.ndarray) -> Fit:
        """The scales (and zero points) that bring the integers which these give for the rows nearest to `rows`."""
        levels = self._levels(fit)
        weighted = levels if self.weights is None else levels * self.weights
        product, square = (np.einsum("ij,ij->i", weighted, one) for one in (rows, levels))
        if self.grid.symmetric:
            return self._stored(product / np.where(square > 0, square, np.inf)), fit[1]
        ones = np.ones_like(levels) if self.weights is None else self.weights
        count, total, mean = ones.sum(1), weighted.sum(1), np.einsum("ij,ij->i", ones, rows)
        spread = square * count - total * total
        scale = np.where(spread > 0, (product * count - total * mean) / np.where(spread > 0, spread, 1), 0.0)
        scale = np.where(scale > 0, scale, fit[0].astype(np.float64))
        shift = (total - mean / scale) / np.where(count > 0, count, 1)
        zero = np.clip(np.rint(fit[1] + shift), self.grid.low, self.grid.high)
        moved = levels + fit[1].astype(np.float64)[:, None] - zero[:, None]
        weighted = moved if self.weights is None else moved * self.weights
        product, square = (np.einsum("ij,ij->i", weighted, one) for one in (rows, moved))
        found = product / np.where(square > 0, square, np.inf)
        return self._stored(np.where(found > 0, found, scale)), zero.astype(self.grid.dtype)
