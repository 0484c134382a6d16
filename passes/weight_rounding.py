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
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from burnish.passes.grids import Clip, Grid, Scales, dequantize, fit, quantize
from burnish.passes.up_or_down import up_or_down

Rounding = Literal["nearest", "mse", "hqq", "gptq", "adaround"]

MEASURED: tuple[Rounding, ...] = ("gptq", "adaround")
"""What needs samples."""

DAMPING = 0.01
"""The share of the mean moment that is added to each input's, as in GPTQ."""

_LAZY = 64
_ROUNDS = 2
_ROWS = 2048


def clip_of(rounding: Rounding | Literal["best"]) -> Clip:
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
    steps: int = 0,
) -> tuple[np.ndarray, Scales]:
    """The integers for a matrix, and their scales.

    Args:
        weight: float64 [out, in].
        grid: the integers.
        block: how many neighbours of a row share a scale.
        rounding: `nearest` takes the smallest steps that reach all numbers of a block, `mse` those of the least sum of
            squared errors, `hqq` half-quadratic quantization; those that are measured use the moment, and are `mse`
            without one.
        mirrored: scales may be negative, see `burnish.passes.grids.fit`.
        dtype: of the scales.
        moment: of the rows that the matrix multiplies, float64 [groups, in, in]: one for all outputs, or one for each
            group of them, as those of a grouped convolution.
        steps: of `adaround`, which is `gptq` without any.

    Raises:
        InputError: the numbers are not finite.
    """
    levels = np.empty(weight.shape, grid.dtype)
    scale = np.empty((len(weight), -(-weight.shape[1] // block)), dtype)
    found = Scales(grid, scale, np.empty(scale.shape, grid.dtype), 1, block)
    for rows, metric in _parts(len(weight), moment if rounding in MEASURED else None):
        some = weight[rows]
        if metric is None:
            scales = fit(some, grid, 1, block, clip_of(rounding), mirrored=mirrored, dtype=dtype)
            levels[rows] = quantize(some, scales)
        else:
            scales = fit(some, grid, 1, block, "mse", importance=metric.weights(some), mirrored=mirrored, dtype=dtype)
            part = _Part(some, metric, scales)
            part.compensated()
            part.improved(mirrored)
            if steps:
                part.learned(mirrored, steps)
            levels[rows], scales = part.integers, part.scales
        scale[rows], found.zero_point[rows] = scales.scale, scales.zero_point
    return levels, found


def rounded_layer(
    weight: np.ndarray,
    grid: Grid,
    moment: np.ndarray,
    dtype: np.dtype[np.floating],
    least: np.ndarray | None = None,
    steps: int = 0,
) -> tuple[np.ndarray, Scales]:
    """The integers [out, ...] for the weight of a layer by `gptq`, and a positive scale for each output (`axis` 0).

    Args:
        weight: float64 [out, ...]; of no transposed convolution.
        grid: the integers; symmetric.
        moment: of the rows, or patches, that it multiplies, float64 [groups, in, in].
        dtype: of the scales.
        least: the smallest scale that each output may have, [out].
        steps: of `adaround`, behind `gptq`.
    """
    rows = weight.reshape(len(weight), -1)
    levels, scales = rounded(
        rows, grid, rows.shape[1], "adaround", mirrored=False, dtype=dtype, moment=moment, steps=steps
    )
    scale = scales.scale[:, 0]
    if least is not None and (scale < least).any():
        scales = Scales(grid, np.maximum(scale, least)[:, None].astype(dtype), scales.zero_point, 1, rows.shape[1])
        levels = _settled(rows, scales, moment)
        scale = scales.scale[:, 0]
    return levels.reshape(weight.shape), Scales(grid, scale, scales.zero_point[:, 0], 0)


def _settled(weight: np.ndarray, scales: Scales, moment: np.ndarray) -> np.ndarray:
    """The integers by `gptq` for scales that stay as they are."""
    levels = np.empty(weight.shape, scales.grid.dtype)
    for rows, metric in _parts(len(weight), moment):
        assert metric is not None
        own = Scales(scales.grid, scales.scale[rows], scales.zero_point[rows], scales.axis, scales.block)
        part = _Part(weight[rows], metric, own)
        part.compensated()
        part.descended()
        levels[rows] = part.integers
    return levels


def of_tied(moment: np.ndarray) -> np.ndarray:
    """The moment for a matrix whose rows are looked up as well: half of what counts is the rows themselves."""
    size = moment.shape[-1]
    mean = max(float(np.trace(moment, axis1=-2, axis2=-1).mean()) / size, np.finfo(np.float64).tiny)
    return np.asarray(moment / mean + np.eye(size))


def change(weight: np.ndarray, levels: np.ndarray, scales: Scales, moment: np.ndarray | None = None) -> float:
    """By how much the outputs change, in the sum of the mean squares, as a share of the outputs' own.

    Args:
        weight: float64 [out, in].
        levels: the integers for it.
        scales: theirs, with a scale for all, for each output, or for blocks of its inputs.
        moment: of the rows that the matrix multiplies, float64 [groups, in, in]; None for rows of unrelated numbers of
            one size, and then it is the change of the weight itself.
    """
    groups = 1 if moment is None else len(moment)
    step = _ROWS if groups == 1 else len(weight) // groups
    sums = np.zeros(2)
    for number, start in enumerate(range(0, len(weight), step)):
        rows = slice(start, start + step)
        own = scales
        if scales.axis is not None:
            own = replace(scales, scale=scales.scale[rows], zero_point=scales.zero_point[rows])
        for place, some in enumerate((weight[rows] - dequantize(levels[rows], own), weight[rows])):
            seen = some if moment is None else some @ moment[number if groups > 1 else 0]
            sums[place] += float(np.vdot(seen, some))
    return float(sums[0] / max(sums[1], np.finfo(np.float64).tiny))


def error(weight: np.ndarray, levels: np.ndarray, scales: Scales, moment: np.ndarray | None = None) -> float:
    """The square root of `change`, for a weight [out, ...] of any number of axes."""
    found = change(weight.reshape(len(weight), -1), levels.reshape(len(weight), -1), scales, moment)
    return float(np.sqrt(found))


def _parts(rows: int, moment: np.ndarray | None) -> Iterator[tuple[slice, _Metric | None]]:
    """Rows that are rounded at once, and their metric where there is a moment."""
    if moment is None or len(moment) == 1:
        metric = None if moment is None else _Metric.of(moment)
        for start in range(0, rows, _ROWS):
            yield slice(start, min(start + _ROWS, rows)), metric
        return
    each = rows // len(moment)
    step = max(1, _ROWS // max(1, each))
    for start in range(0, len(moment), step):
        metric = _Metric.of(moment[start : start + step])
        yield slice(start * each, (start + len(metric.matrix)) * each), metric


@dataclass(frozen=True)
class _Metric:
    """Damped moments with a mean of 1, [groups, in, in]; the orders of inputs by them, [groups, in]; and matrices U,
    upper triangular, UᵀU their inverses in that order.
    """

    matrix: np.ndarray
    order: np.ndarray
    factor: np.ndarray

    @classmethod
    def of(cls, moments: np.ndarray) -> _Metric:
        from scipy.linalg import cholesky, solve_triangular

        unit = np.eye(moments.shape[1])
        matrices, orders, factors = np.empty(moments.shape), np.empty(moments.shape[:2], int), np.empty(moments.shape)
        for index, moment in enumerate(moments):
            damped = moment + DAMPING * np.trace(moment) / len(moment) * unit
            matrix = damped / max(np.trace(damped) / len(damped), np.finfo(np.float64).tiny) + 1e-9 * unit
            order = np.argsort(-np.diag(matrix), kind="stable")
            inner = matrix[np.ix_(order, order)]
            upper = cholesky(inner[::-1, ::-1], lower=True)[::-1, ::-1]
            matrices[index], orders[index] = matrix, order
            factors[index] = solve_triangular(upper, unit, lower=False)
        return cls(matrices, orders, factors)

    def weights(self, rows: np.ndarray) -> np.ndarray:
        """What the errors of each number of rows [groups * out, in] weigh by themselves; it broadcasts to the rows."""
        diagonal = np.diagonal(self.matrix, axis1=1, axis2=2)
        return np.asarray(diagonal if len(diagonal) == 1 else diagonal.repeat(len(rows) // len(diagonal), 0))


class _Part:
    """Some rows of a matrix, their integers and scales; arrays are [groups, in, out], so that an input is contiguous.

    The rows are those of all groups, one group after the other; each group has a metric of its own.
    """

    def __init__(self, weight: np.ndarray, metric: _Metric, scales: Scales) -> None:
        self.metric, self.quick = metric, metric.matrix.astype(np.float32)
        self.weight = self._grouped(weight.astype(np.float32))
        self.scales = scales
        self.zero = self._spread(scales.zero_point)
        self.scale = self._spread(scales.scale)
        self.levels = self._grouped(quantize(weight, scales).astype(np.float32)) - self.zero

    def _grouped(self, rows: np.ndarray) -> np.ndarray:
        """Numbers [groups * out, n] as [groups, n, out]."""
        return np.ascontiguousarray(rows.reshape(len(self.quick), -1, rows.shape[1]).transpose(0, 2, 1))

    def _spread(self, values: np.ndarray) -> np.ndarray:
        shape = (len(values), self.weight.shape[1])
        return self._grouped(self.scales.spread(values.astype(np.float32), shape))

    @property
    def integers(self) -> np.ndarray:
        """The integers, [groups * out, in]."""
        whole = (self.levels + self.zero).transpose(0, 2, 1)
        return np.asarray(whole.reshape(-1, whole.shape[2]), self.scales.grid.dtype)

    def compensated(self) -> None:
        """Round by GPTQ: inputs in the metric's order, with the factor of its inverse."""
        order, factor = self.metric.order[:, :, None], self.metric.factor.astype(np.float32)
        left, scale, zero = (np.take_along_axis(one, order, 1) for one in (self.weight, self.scale, self.zero))
        levels = np.empty_like(left)
        for start in range(0, order.shape[1], _LAZY):
            end = min(start + _LAZY, order.shape[1])
            errors = np.empty((len(left), end - start, left.shape[2]), np.float32)
            for place in range(start, end):
                error = errors[:, place - start]
                self._round(left[:, place], scale[:, place], zero[:, place], levels[:, place])
                np.subtract(left[:, place], levels[:, place] * scale[:, place], out=error)
                error /= factor[:, place, place, None]
                left[:, place + 1 : end] -= factor[:, place, place + 1 : end, None] * error[:, None]
            left[:, end:] -= factor[:, start:end, end:].transpose(0, 2, 1) @ errors
        np.put_along_axis(self.levels, order, levels, 1)

    def _round(self, wanted: np.ndarray, scale: np.ndarray, zero: np.ndarray, levels: np.ndarray) -> None:
        """Write the integers, less the zero point, nearest to the numbers of one input that are wanted."""
        np.rint(np.divide(wanted, scale, out=levels), out=levels)
        np.clip(levels, self.scales.grid.low - zero, self.scales.grid.high - zero, out=levels)

    def improved(self, mirrored: bool) -> None:
        """Improve integers, then scales, some times over; none of the steps makes the change of the outputs larger."""
        for _ in range(_ROUNDS):
            self._descend()
            self._solve_scales(mirrored)
        self._descend()

    def learned(self, mirrored: bool, steps: int) -> None:
        """Round by AdaRound, for the scales at hand, and improve that; outputs that it is no better for stay.

        Beginning anew it finds other integers than rounding one input after the other does, for most outputs better
        ones once they are improved likewise.
        """
        grid, before, levels, kept = self.scales.grid, self._changes(), self.levels, (self.scale, self.scales)
        low, high = grid.low - self.zero, grid.high - self.zero
        self.levels = up_or_down(self.weight, self.scale, low, high, self.quick, steps)
        self._solve_scales(mirrored)
        self.improved(mirrored)
        same = self._changes() >= before
        self.levels = np.where(same[:, None], levels, self.levels)
        self._restore(same, *kept)

    def _restore(self, where: np.ndarray, scale: np.ndarray, scales: Scales) -> None:
        """Give outputs, [groups, out], the scales that they had."""
        self.scale = np.where(where[:, None], scale, self.scale)
        found = np.where(where.reshape(-1, 1), scales.scale, self.scales.scale)
        self.scales = replace(scales, scale=found)

    def descended(self) -> None:
        """Improve the integers alone."""
        for _ in range(_ROUNDS + 1):
            self._descend()

    def _descend(self) -> None:
        """Each input in turn takes the integers that are best, given the others."""
        pull = self.quick @ (self.weight - self.levels * self.scale)
        for start in range(0, pull.shape[1], _LAZY):
            end = min(start + _LAZY, pull.shape[1])
            moves = np.empty((len(pull), end - start, pull.shape[2]), np.float32)
            for column in range(start, end):
                levels, scale = self.levels[:, column], self.scale[:, column]
                before = levels * scale
                wanted = before + pull[:, column] / self.quick[:, column, column, None]
                self._round(wanted, scale, self.zero[:, column], levels)
                moves[:, column - start] = move = levels * scale - before
                pull[:, column:end] -= self.quick[:, column:end, column, None] * move[:, None]
            pull[:, end:] -= self.quick[:, end:, start:end] @ moves

    def _solve_scales(self, mirrored: bool) -> None:
        """The scales of each row that are best together, given its integers; kept where they are better as stored."""
        old = self.scales.scale
        block, (rows, count) = self.scales.block or 1, old.shape
        size = self.levels.shape[1]
        parts = [slice(index * block, min((index + 1) * block, size)) for index in range(count)]
        products, wanted = np.empty((rows, count, count)), np.empty((rows, count))
        target = self.quick @ self.weight
        for index, one in enumerate(parts):
            seen = self.quick[:, :, one] @ self.levels[:, one]
            seen *= self.levels
            wanted[:, index] = np.einsum("gij,gij->gj", target[:, one], self.levels[:, one]).reshape(-1)
            sums = np.add.reduceat(seen, [part.start for part in parts], 1)
            products[:, index] = sums.transpose(0, 2, 1).reshape(rows, count)
        products = (products + products.transpose(0, 2, 1)) / 2
        diagonal = np.einsum("ijj->ij", products)
        unused = diagonal <= 0
        diagonal += 1e-6 * diagonal.mean(1, keepdims=True) + unused
        found = np.linalg.solve(products, wanted[:, :, None])[:, :, 0].astype(old.dtype)
        bad = unused | ~np.isfinite(found) | (np.abs(found) < np.finfo(found.dtype).tiny)
        bad |= (found < 0) if not mirrored else False
        found = np.where(bad, old, found)
        before, kept = self._changes(), (self.scale, self.scales)
        self.scale, self.scales = self._spread(found), replace(self.scales, scale=found)
        self._restore(self._changes() > before, *kept)

    def _changes(self) -> np.ndarray:
        """By how much the outputs change, [groups, out]."""
        apart = self.weight - self.levels * self.scale
        return np.asarray(np.einsum("gij,gij->gj", self.quick @ apart, apart))
