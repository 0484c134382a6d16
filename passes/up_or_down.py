"""AdaRound: learning for each weight whether it is rounded up or down (Nagel et al. 2020, arXiv:2004.10568).

With W [in, out] the weight, s its scales, and M the second moment of the rows that it multiplies, the integers
floor(W / s) + h change the outputs by tr (W - Q)ᵀ M (W - Q) in the mean square. h = clip(1.2 sigmoid(v) - 0.1, 0, 1)
moves between 0 and 1 while v is learned by Adam, and Σ 1 - |2 h - 1|^β, whose β falls from 20 to 2, drives it to the
ends (equations 21 to 24 there). M is all that this loss depends on: each step is one of all samples, nothing is drawn
at random, and the gradient is a formula.
"""

from __future__ import annotations

import math

import numpy as np

_RATE, _FIRST, _SECOND = 1e-2, 0.9, 0.999
_WEIGHT = 5.0
"""Of the regularizer, where each output changes by one for each weight when it is rounded to nearest."""

_UNFORCED = 0.2
"""The share of the steps that come before the regularizer."""

_EXACT = 1e-10
"""An output that changes less when it is rounded to nearest, in squared steps, is left so."""

_PIECE = 1 << 18
"""Weights that are learned at a time, which each output is by itself: a dozen arrays of so many numbers are held."""

_BETAS = 20.0, 2.0
_LOW, _HIGH = -0.1, 1.1
_CERTAIN = 1e-4


def up_or_down(
    weight: np.ndarray, scale: np.ndarray, low: np.ndarray, high: np.ndarray, moment: np.ndarray, steps: int
) -> np.ndarray:
    """Integers for weights, each one of the two that a weight lies between; an output is rounded to nearest where that
    changes it no more.

    Args:
        weight: float32 [groups, in, out].
        scale: [groups, in, out] or [groups, 1, out]; no 0.
        low: the least integers; broadcasts to the weight.
        high: the largest integers, at least one more.
        moment: float32 [groups, in, in], with a mean of 1 on the diagonal or so.
        steps: of learning.

    Returns:
        The integers, float32 [groups, in, out].
    """
    found = np.empty_like(weight)
    low, high, scale = (np.broadcast_to(one, weight.shape) for one in (low, high, scale))
    step = max(1, _PIECE // (weight.shape[0] * weight.shape[1]))
    for start in range(0, weight.shape[2], step):
        some = np.s_[:, :, start : start + step]
        found[some] = _neighbours(weight[some], scale[some], low[some], high[some], moment, steps)
    return found


def _neighbours(
    weight: np.ndarray, scale: np.ndarray, low: np.ndarray, high: np.ndarray, moment: np.ndarray, steps: int
) -> np.ndarray:
    """`up_or_down` for some outputs."""
    exact = weight / scale
    below = np.clip(np.floor(exact), low, high - 1)
    nearest = np.clip(np.rint(exact), low, high) - below
    unit = scale / np.abs(scale).max(1, keepdims=True)
    rest = (exact - below) * unit
    before = _changes(nearest * unit - rest, moment)
    counts = np.where(before > _EXACT, weight.shape[1] / np.maximum(before, _EXACT), 0)[:, None]
    up = _learned(np.clip(exact - below, 0, 1), rest, unit, moment, counts, steps)
    better = _changes(up * unit - rest, moment) < before
    return np.asarray(below + np.where(better[:, None], up, nearest))


def _changes(apart: np.ndarray, moment: np.ndarray) -> np.ndarray:
    """By how much each output changes in the mean square, [groups, out]."""
    return np.asarray(np.einsum("gij,gij->gj", moment @ apart, apart))


def _learned(
    share: np.ndarray, rest: np.ndarray, scale: np.ndarray, moment: np.ndarray, counts: np.ndarray, steps: int
) -> np.ndarray:
    """What to add to the integers below: 0 or 1.

    Args:
        share: where learning begins, 0 to 1.
        rest: what is left of the weights above those integers, in the unit of an output.
        scale: of the integers, in that unit.
        moment: of the rows.
        counts: by what the changes of an output are multiplied, so that rounding to nearest has one for each weight.
        steps: of learning.
    """
    odds = (np.clip(share, _CERTAIN, 1 - _CERTAIN) - _LOW) / (_HIGH - _LOW)
    value = np.log(odds / (1 - odds))
    factor = 2 * scale * counts
    first, second = np.zeros_like(value), np.zeros_like(value)
    for step in range(1, steps + 1):
        odds = 1 / (1 + np.exp(-value))
        up = np.clip(odds * (_HIGH - _LOW) + _LOW, 0, 1)
        slope = moment @ (up * scale - rest)
        slope *= factor
        forced = ((step - 1) / steps - _UNFORCED) / (1 - _UNFORCED)
        if forced > 0:
            beta = _BETAS[1] + (_BETAS[0] - _BETAS[1]) * (1 + math.cos(math.pi * forced)) / 2
            middle = 2 * up - 1
            slope -= 2 * _WEIGHT * beta * np.copysign(np.abs(middle) ** (beta - 1), middle)
        slope *= (_HIGH - _LOW) * odds * (1 - odds) * ((up > 0) & (up < 1))
        first += (1 - _FIRST) * (slope - first)
        second += (1 - _SECOND) * (slope * slope - second)
        length = np.sqrt(second / (1 - _SECOND**step)) + 1e-8
        value -= _RATE / (1 - _FIRST**step) * first / length
    return np.asarray(value > 0, np.float32)
