"""The range of numbers that activations are stored for, from statistics of what passes through a value.

`reducer` is what has to see the value, `limits` reads the range from it, `scales` puts it on a grid. However many
arrays come, a reducer holds no more than its `nbytes`: 64 KiB for a histogram, 16 bytes for the two ends.

The largest magnitudes of single channels, for scalings, are seen by `Range(axis=...)` of `burnish.passes.reducers`.
"""

from __future__ import annotations

from typing import Literal, get_args

import numpy as np

from burnish.ir.errors import InputError
from burnish.passes import grids
from burnish.passes.grids import Grid, Scales
from burnish.passes.reducers import Histogram, Range, Reducer

Method = Literal["minmax", "percentile", "mse", "entropy"]
"""`minmax` cuts nothing off; `percentile` a share of the numbers on each side; `mse` what makes the sum of the squared
errors least; `entropy` what makes the divergence of the distribution of the integers from that of the numbers least."""

BINS = 8192
_SHARES = np.concatenate([np.geomspace(0.02, 0.68, 20), np.linspace(0.7, 1.0, 31)])
_THRESHOLDS = 96


def reducer(method: Method) -> Reducer:
    """An empty reducer that sees what a method needs to know."""
    return Range() if method == "minmax" else Histogram(bins=BINS)


EVERYTHING = (-np.inf, np.inf)


def limits(
    seen: Reducer,
    method: Method,
    grid: Grid,
    percentile: float = 99.99,
    within: tuple[float, float] = EVERYTHING,
) -> tuple[float, float]:
    """The range of a value: at most 0, and at least 0.

    Args:
        seen: what `reducer(method)` made, after it saw the value.
        method: see `Method`.
        grid: the integers that the range is for; `mse` and `entropy` look at how many there are.
        percentile: for `percentile`: the percent of the numbers that are not above the range; as many are not below.
        within: what is beyond these ends makes no difference; the range does not reach over them, but over 0.

    Raises:
        InputError: nothing was seen, or it is not finite.
    """
    if method not in get_args(Method):
        raise InputError(f"there is no calibration `{method}`", hint=f"there are {', '.join(get_args(Method))}")
    if isinstance(seen, Range):
        if seen.low is None or seen.high is None or not (seen.low <= seen.high).all():
            raise InputError("no number was seen: all are padding, or the samples have none")
        return _inside(*_finite(float(seen.low.min()), float(seen.high.max())), within)
    if not isinstance(seen, Histogram):
        raise TypeError(f"{seen.options} tells no range")
    if seen.infinite or seen.nan:
        raise InputError("it holds NaN or infinity")
    if seen.counts is None or not seen.counts.any():
        raise InputError("no number was seen: all are padding, or the samples have none")
    used = np.flatnonzero(seen.counts)
    counts = seen.counts[used].astype(np.float64)
    centres = np.clip((seen.edges[used] + seen.edges[used + 1]) / 2, *within)
    low, high = min(float(seen.edges[used[0]]), 0.0), max(float(seen.edges[used[-1] + 1]), 0.0)
    if method == "percentile":
        return _inside(*_quantiles(seen, percentile, low, high), within)
    if method == "mse":
        return _least_squares(centres, counts, grid, *_inside(low, high, within))
    return _inside(*_least_divergence(seen, grid, low, high), within)


def scales(low: float, high: float, grid: Grid) -> Scales:
    """One scale for numbers from `low` to `high`; a symmetric grid keeps its zero point at 0 where none is negative.

    Args:
        low, high: the range, which holds 0.
        grid: without a sign and symmetric, the zero point is the middle, or 0 where `low` is.
    """
    if grid.symmetric and not grid.signed and low >= 0:
        grid = Grid(grid.bits, signed=False, symmetric=False)
    return grids.fit(np.array([low, high]), grid)


def _finite(low: float, high: float) -> tuple[float, float]:
    if not (np.isfinite(low) and np.isfinite(high)):
        raise InputError("it holds NaN or infinity")
    return min(low, 0.0), max(high, 0.0)


def _inside(low: float, high: float, within: tuple[float, float]) -> tuple[float, float]:
    return min(max(low, within[0]), 0.0), max(min(high, within[1]), 0.0)


def _quantiles(seen: Histogram, percentile: float, low: float, high: float) -> tuple[float, float]:
    share = percentile / 100
    width = float(np.ldexp(1.0, seen.exponent))
    return max(min(seen.quantile(1 - share) - width, 0.0), low), min(max(seen.quantile(share), 0.0), high)


def _least_squares(centres: np.ndarray, counts: np.ndarray, grid: Grid, low: float, high: float) -> tuple[float, float]:
    """Both ends drawn in together, then each by itself, twice."""

    def error(a: float, b: float) -> float:
        fitted = scales(a, b, grid)
        apart = grids.dequantize(grids.quantize(centres, fitted), fitted) - centres
        return float(counts @ (apart * apart))

    best = min(((error(low * s, high * s), low * s, high * s) for s in _SHARES[::-1]), key=lambda one: one[0])
    for _ in range(2):
        tried = [(error(best[1], high * s), best[1], high * s) for s in _SHARES] if high > 0 else []
        best = min([best, *tried], key=lambda one: one[0])
        tried = [(error(low * s, best[2]), low * s, best[2]) for s in _SHARES] if low < 0 else []
        best = min([best, *tried], key=lambda one: one[0])
    return best[1], best[2]


def _least_divergence(seen: Histogram, grid: Grid, low: float, high: float) -> tuple[float, float]:
    """The threshold on magnitudes whose clipped distribution the integers show best (Migacz, TensorRT, 2017).

    The bins within the threshold, with what is outside added to the outermost ones, are compared with the same bins
    merged to as many groups as there are integers, each spread evenly over those of its bins that hold something. The
    bin that holds 0 is left out: 0 is an integer of its own, and a Relu puts most of the numbers there.
    """
    assert seen.counts is not None
    counts = seen.counts.astype(np.float64)
    counts[seen.bins // 2] = 0
    if not counts.any():
        return low, high
    half, width = seen.bins // 2, float(np.ldexp(1.0, seen.exponent))
    reach = round(max(-low, high) / width)
    levels = 1 << grid.bits
    sides = 2 if low < 0 < high else 1
    start = min(reach, max(1, levels // sides))
    best = (np.inf, reach)
    for end in np.unique(np.linspace(start, reach, _THRESHOLDS).round().astype(int)):
        first, last = max(half - end, half + round(low / width)), min(half + end, half + round(high / width))
        inner = counts[first:last]
        reference = inner.copy()
        reference[0] += counts[:first].sum()
        reference[-1] += counts[last:].sum()
        groups = np.arange(len(inner)) * levels // len(inner)
        sums = np.bincount(groups, inner, levels)
        filled = np.bincount(groups, inner > 0, levels)
        shown = np.where(inner > 0, (sums / np.maximum(filled, 1))[groups], 0.0)
        best = min(best, (_divergence(reference, shown), int(end)))
    return max(low, -best[1] * width), min(high, best[1] * width)


def _divergence(reference: np.ndarray, shown: np.ndarray) -> float:
    """The Kullback-Leibler divergence of counts, in nats; a place that `shown` lacks counts as a millionth there."""
    p, q = reference / reference.sum(), shown / max(shown.sum(), 1.0)
    there = p > 0
    return float(np.sum(p[there] * np.log(p[there] / np.maximum(q[there], 1e-6))))
