"""What the channels of a value are divided by, and the weights behind it multiplied with, so that integers lose least.

A value that has one scale is rounded in steps of its widest channel. Dividing channel j by s_j = m_j ** a, m_j the
largest magnitude seen there, makes them alike, and the weights unlike (SmoothQuant, Xiao et al. 2022, arXiv:2211.10438,
with weights left out of s). Channels narrower than half of the others count as wide as these: what samples show little
of may be large elsewhere, and would then set the scale of all. The exponent is the one for which the error of what the
layers compute is least:

    (x step)^2 / 12 * sum over i, j of (w_ij s_j)^2  +  sum over i of (w step_i)^2 / 12 * sum over j of E x_j^2 / s_j^2

as for rounding errors that are even and independent, where the steps follow from the ranges of x_j / s_j and w_ij s_j.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from burnish.passes.reducers import Moments, Range
from burnish.passes.reservoirs import Several

_EXPONENTS = np.linspace(0.0, 1.0, 21)
_GAIN = 0.5
"""The squared error has to come down to this share, or nothing is divided."""


def reducer() -> Several:
    """What has to be seen of a value: ranges and moments of its last axis."""
    return Several((Range(axis=-1), Moments(axis=-1)))


def divisors(seen: Several, weights: Sequence[np.ndarray], bits: int) -> np.ndarray | None:
    """What the channels of a value are divided by, float64 [channels]; None where dividing gains nothing.

    Args:
        seen: a `reducer` that has seen the value.
        weights: of the layers that read it, float64 [out, channels].
        bits: of the weights; the value has 8.
    """
    ranges, moments = seen.parts
    assert isinstance(ranges, Range) and isinstance(moments, Moments)
    if ranges.absmax is None or ranges.low is None or ranges.high is None or moments.mean is None:
        return None
    largest = ranges.absmax
    if not np.isfinite(largest).all() or not largest.any():
        return None
    assert moments.variance is not None
    square = moments.variance + moments.mean**2
    low, high = np.minimum(ranges.low, 0.0), np.maximum(ranges.high, 0.0)
    usual = np.maximum(largest, np.median(largest[largest > 0]))
    tried = [usual**exponent for exponent in _EXPONENTS]
    errors = [_error(one, low, high, square, weights, bits) for one in tried]
    best = int(np.argmin(errors))
    return tried[best] if errors[best] < _GAIN * errors[0] else None


def _error(
    scale: np.ndarray,
    low: np.ndarray,
    high: np.ndarray,
    square: np.ndarray,
    weights: Sequence[np.ndarray],
    bits: int,
) -> float:
    step = ((high / scale).max() - (low / scale).min()) / 255
    total = 0.0
    for weight in weights:
        scaled = weight * scale
        steps = np.abs(scaled).max(1) / (2 ** (bits - 1) - 1)
        total += step**2 * float((scaled**2).sum()) + float((steps**2).sum()) * float((square / scale**2).sum())
    return total
