"""Rounding a matrix to blocks of integers along its inputs, by itself or so that what it computes changes least.

With W [out, in] the matrix, Q what it is rounded to, and M the second moment of the rows that it multiplies, the
outputs change by tr (W - Q) M (W - Q)ᵀ in the mean square. GPTQ (Frantar et al. 2022, arXiv:2210.17323) rounds one
input after the other, those of the largest moment first, and lets the inputs that are not rounded yet make up for
the error, by the Cholesky factor of the inverse of M. Scales are fitted before, each input weighted by its moment. What
is found is then improved twice: each input in turn takes the best integer, given the others (coordinate descent,
QuantEase, Behdin et al. 2023, arXiv:2309.01885), and the scales of a row are solved for, given its integers.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np

from burnish.passes.grids import Clip, Grid, Scales, dequantize, fit, quantize

Rounding = Literal["nearest", "mse", "hqq", "gptq"]

MEASURED: tuple[Rounding, ...] = ("gptq",)
"""What needs samples."""

DAMPING = 0.01
"""The share of the mean moment that is added to each input's, as in GPTQ."""

_LAZY = 64
_ROUNDS = 2
_ROWS = 2048


def clip_of(rounding: Rounding) -> Clip:
    """How scales are fitted without samples."""
    return "minmax" if rounding == "nearest" else "hqq" if rounding == "hqq" else "mse"


def rounded(
    weight: np.ndarray,
    grid: Grid,
    block: int,
    rounding: Rounding,
    *,
    mirrored: bool,
    dtype: np.dtype[np.floating],
    moment: np.ndarray | None = None,
) -> tuple[np.ndarray, Scales]:
    """The integers for a matrix, and their scales.

    Args:
        weight: float64 [out, in].
        grid: the integers.
        block: how many neighbours of a row share a scale.
        rounding: `nearest` takes the smallest steps that reach all numbers of a block, `mse` those of the least sum of
            squared errors, `hqq` half-quadratic quantization; `gptq` uses the moment, and is `mse` without one.
        mirrored: scales may be negative, see `burnish.passes.grids.fit`.
        dtype: of the scales.
        moment: of the rows that the matrix multiplies, float64 [in, in].

    Raises:
        InputError: the numbers are not finite.
    """
    levels = np.empty(weight.shape, grid.dtype)
    found: list[Scales] = []
    exact = None if rounding != "gptq" or moment is None else _Metric.of(moment)
    for rows in _parts(len(weight)):
        some = weight[rows]
        if exact is None:
            scales = fit(some, grid, 1, block, clip_of(rounding), mirrored=mirrored, dtype=dtype)
            levels[rows] = quantize(some, scales)
        else:
            weights = np.diag(exact.matrix)
            scales = fit(some, grid, 1, block, "mse", importance=weights, mirrored=mirrored, dtype=dtype)
            part = _Part(some, exact.matrix, scales)
            part.compensated(exact.order, exact.factor)
            part.improved(mirrored)
            levels[rows], scales = part.integers, part.scales
        found.append(scales)
    scale, zero = (np.concatenate([getattr(one, name) for one in found]) for name in ("scale", "zero_point"))
    return levels, Scales(grid, scale, zero, 1, block)


def of_tied(moment: np.ndarray) -> np.ndarray:
    """The moment for a matrix whose rows are looked up as well: half of what counts is the rows themselves."""
    mean = max(float(np.trace(moment)) / len(moment), np.finfo(np.float64).tiny)
    return np.asarray(moment / mean + np.eye(len(moment)))


def change(weight: np.ndarray, levels: np.ndarray, scales: Scales, moment: np.ndarray) -> float:
    """By how much the outputs change, in the sum of the mean squares, as a share of the outputs' own."""
    apart = weight - dequantize(levels, scales)
    whole = float(np.einsum("ij,ij->", weight @ moment, weight))
    return float(np.einsum("ij,ij->", apart @ moment, apart)) / max(whole, np.finfo(np.float64).tiny)


def _parts(rows: int) -> Iterator[slice]:
    for start in range(0, rows, _ROWS):
        yield slice(start, min(start + _ROWS, rows))


@dataclass(frozen=True)
class _Metric:
    """A damped moment with a mean of 1, the order of inputs by it, and U, upper triangular, UᵀU its inverse there."""

    matrix: np.ndarray
    order: np.ndarray
    factor: np.ndarray

    @classmethod
    def of(cls, moment: np.ndarray) -> _Metric:
        from scipy.linalg import cholesky, solve_triangular

        unit = np.eye(len(moment))
        damped = moment + DAMPING * np.trace(moment) / len(moment) * unit
        matrix = damped / max(np.trace(damped) / len(damped), np.finfo(np.float64).tiny) + 1e-9 * unit
        order = np.argsort(-np.diag(matrix), kind="stable")
        inner = matrix[np.ix_(order, order)]
        upper = cholesky(inner[::-1, ::-1], lower=True)[::-1, ::-1]
        return cls(matrix, order, np.asarray(solve_triangular(upper, unit, lower=False)))


class _Part:
    """Some rows of a matrix, their integers and scales; arrays are [in, out], so that an input is contiguous."""

    def __init__(self, weight: np.ndarray, metric: np.ndarray, scales: Scales) -> None:
        self.weight = np.ascontiguousarray(weight.T, np.float32)
        self.metric, self.quick = metric, metric.astype(np.float32)
        self.scales = scales
        self.zero = self._spread(scales.zero_point)
        self.scale = self._spread(scales.scale)
        self.levels = np.ascontiguousarray(quantize(weight, scales).T, np.float32) - self.zero

    def _spread(self, values: np.ndarray) -> np.ndarray:
        found = self.scales.spread(values.astype(np.float32), self.weight.shape[::-1])
        return np.ascontiguousarray(found.T)

    @property
    def integers(self) -> np.ndarray:
        """The integers, [out, in]."""
        return np.asarray((self.levels + self.zero).T, self.scales.grid.dtype)

    def _round(self, wanted: np.ndarray, column: int) -> np.ndarray:
        """The numbers of one input nearest to those that are wanted; their integers are noted."""
        grid, levels = self.scales.grid, self.levels[column]
        np.rint(np.divide(wanted, self.scale[column], out=levels), out=levels)
        np.clip(levels, grid.low - self.zero[column], grid.high - self.zero[column], out=levels)
        return np.asarray(levels * self.scale[column])

    def compensated(self, order: np.ndarray, factor: np.ndarray) -> None:
        """Round by GPTQ: inputs in `order`, with the factor of the inverse of the metric in that order."""
        left, factor = self.weight[order], factor.astype(np.float32)
        for start in range(0, len(order), _LAZY):
            end = min(start + _LAZY, len(order))
            errors = np.empty((end - start, left.shape[1]), np.float32)
            for place in range(start, end):
                error = errors[place - start]
                np.subtract(left[place], self._round(left[place], order[place]), out=error)
                error /= factor[place, place]
                left[place + 1 : end] -= factor[place, place + 1 : end, None] * error
            left[end:] -= factor[start:end, end:].T @ errors

    def improved(self, mirrored: bool) -> None:
        """Improve integers, then scales, some times over; none of the steps makes the change of the outputs larger."""
        for _ in range(_ROUNDS):
            self._descend()
            self._solve_scales(mirrored)
        self._descend()

    def _descend(self) -> None:
        """Each input in turn takes the integers that are best, given the others."""
        pull = self.quick @ (self.weight - self.levels * self.scale)
        for start in range(0, len(pull), _LAZY):
            end = min(start + _LAZY, len(pull))
            moves = np.empty((end - start, pull.shape[1]), np.float32)
            for column in range(start, end):
                before = self.levels[column] * self.scale[column]
                wanted = before + pull[column] / self.quick[column, column]
                moves[column - start] = move = self._round(wanted, column) - before
                pull[column:end] -= self.quick[column:end, column, None] * move
            pull[end:] -= self.quick[end:, start:end] @ moves

    def _solve_scales(self, mirrored: bool) -> None:
        """The scales of each row that are best together, given its integers; kept where they are better as stored."""
        block, count = self.scales.block or 1, self.scales.scale.shape[1]
        parts = [slice(index * block, min((index + 1) * block, len(self.levels))) for index in range(count)]
        products = np.empty((self.levels.shape[1], count, count))
        wanted = np.empty(products.shape[:2])
        target = self.quick @ self.weight
        for index, one in enumerate(parts):
            seen = self.quick[:, one] @ self.levels[one]
            seen *= self.levels
            wanted[:, index] = np.einsum("ij,ij->j", target[one], self.levels[one])
            products[:, index] = np.add.reduceat(seen, [part.start for part in parts]).T
        products = (products + products.transpose(0, 2, 1)) / 2
        diagonal = np.einsum("ijj->ij", products)
        unused = diagonal <= 0
        diagonal += 1e-6 * diagonal.mean(1, keepdims=True) + unused
        old = self.scales.scale
        found = np.linalg.solve(products, wanted[:, :, None])[:, :, 0].astype(old.dtype)
        bad = unused | ~np.isfinite(found) | (np.abs(found) < np.finfo(found.dtype).tiny)
        bad |= (found < 0) if not mirrored else False
        found = np.where(bad, old, found)
        before, kept = self._changes(), self.scale
        self.scale = self._spread(found)
        worse = self._changes() > before
        self.scale = np.where(worse, kept, self.scale)
        grid, zero = self.scales.grid, self.scales.zero_point
        self.scales = Scales(grid, np.where(worse[:, None], old, found), zero, 1, block)

    def _changes(self) -> np.ndarray:
        apart = self.weight - self.levels * self.scale
        return np.asarray(np.einsum("ij,ij->j", self.quick @ apart, apart))
