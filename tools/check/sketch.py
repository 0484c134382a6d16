"""A few numbers that stand for many: how far two arrays are apart can be told from their sketches alone.

A sketch is a set of sums of all elements under random signs (Alon, Matias and Szegedy 1996; Johnson and Lindenstrauss
1984): the mean of the squared differences of two sketches is, in expectation, the squared Euclidean distance of the
arrays. The signs of a matrix are products of signs for its rows and for its columns, which keeps that true and needs
one pass over the data. They come from a fixed seed and the shape, so that sketches of different runs compare.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from burnish.tools.check.lock import SKETCH

DIGITS = 6
"""Decimal digits that are kept of what is computed, counted from the largest number beside it."""

_CHUNK = 1 << 21
_LARGEST = float(np.finfo(np.float64).max)


def sketch(array: np.ndarray, turn: int = 0) -> tuple[float, ...]:
    """`SKETCH` sums of the elements of an array under random signs; they depend on its shape and numbers only.

    Args:
        array: numbers of any dtype and shape; NaN and infinities count as 0, complex numbers as pairs.
        turn: of several arrays that make up one vector: the sum of their sketches is the sketch of it.
    """
    matrix = _matrix(_real(array))
    rows, columns = matrix.shape
    if not matrix.size:
        return (0.0,) * SKETCH
    left = _signs(rows, turn, rows, columns, 0)
    right = _signs(columns, turn, rows, columns, 1)
    sums = np.zeros((SKETCH, columns))
    step = max(1, _CHUNK // columns)
    with np.errstate(over="ignore", invalid="ignore"):
        for start in range(0, rows, step):
            sums += left[:, start : start + step] @ finite(matrix[start : start + step])
        found = (sums * right).sum(axis=1)
    return tuple(np.nan_to_num(found, posinf=_LARGEST, neginf=-_LARGEST).tolist())


def distance(a: Sequence[float], b: Sequence[float], norm: float) -> float:
    """An estimate of |x - y| / norm from the sketches of x and y, which have one shape.

    Args:
        a, b: their sketches; empty ones say nothing and are at distance 0.
        norm: what the distance is relative to, the Euclidean norm of x; where it is 0 the distance is 0 or infinite.
    """
    if not a or not b:
        return 0.0
    apart = math.hypot(*(x - y for x, y in zip(a, b, strict=True))) / math.sqrt(len(a))
    if not norm:
        return math.inf if apart else 0.0
    return apart / norm


def norm(array: np.ndarray) -> float:
    """The root of the sum of the squares of all finite elements, in float64."""
    flat = _real(array).reshape(-1)
    total = 0.0
    for start in range(0, flat.size, _CHUNK):
        part = finite(flat[start : start + _CHUNK])
        largest = float(np.abs(part).max())
        if largest:
            part = part / largest
            total = math.hypot(total, largest * math.sqrt(float(np.dot(part, part))))
    return min(total, _LARGEST)


def finite(array: np.ndarray) -> np.ndarray:
    """The elements in float64, with 0 for NaN and infinities."""
    found = array.astype(np.float64)
    bad = ~np.isfinite(found)
    if bad.any():
        found[bad] = 0.0
    return found


def rounded(number: float, largest: float, digits: int = DIGITS) -> float:
    """A number without the digits that differ between machines: `digits` of them count from the first of `largest`."""
    if not number or not largest or not math.isfinite(largest):
        return 0.0 if not number else float(number)
    return round(number, digits - 1 - math.floor(math.log10(abs(largest)))) + 0.0


def are_numbers(array: np.ndarray) -> bool:
    """Whether there is a sketch of an array: it holds numbers or truth values, those of narrow dtypes included."""
    return array.dtype.kind in "fiubc" or (array.dtype.kind == "V" and array.dtype.names is None)


def _real(array: np.ndarray) -> np.ndarray:
    """A complex array as pairs of real numbers, anything else as it is."""
    if array.dtype.kind != "c":
        return array
    return np.stack([array.real, array.imag], axis=-1)


def _matrix(array: np.ndarray) -> np.ndarray:
    """The array as a matrix, split at the axis at which rows and columns together are fewest."""
    shape = array.shape
    splits = [(math.prod(shape[:axis]), math.prod(shape[axis:])) for axis in range(len(shape) + 1)]
    return array.reshape(min(splits, key=sum))


def _signs(count: int, *seed: int) -> np.ndarray:
    """`SKETCH` rows of 1 and -1, float64; from the raw stream of a generator, which no version of NumPy changes."""
    raw = np.random.PCG64(seed).random_raw(-(-count * SKETCH // 64)).astype("<u8")
    bits = np.unpackbits(raw.view(np.uint8), count=count * SKETCH)
    return bits.reshape(SKETCH, count) * 2.0 - 1.0
