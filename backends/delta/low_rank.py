"""The difference of two weights as a product of two thin matrices of whole numbers, where it is one but for rounding.

Merging a low-rank adapter (LoRA, Hu et al., arXiv:2106.09685) gives `round(W + B A)`. The factors are found again from
the rounded sum, and kept as integers small enough that their product is exact in float64 in any order of summation:
every machine computes the same guess from them, and the few last places where it is off are kept beside.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from burnish.backends.delta.planes import MANTISSA

DTYPES = ("float32", "float16", "bfloat16")
"""The dtypes that this is done for."""
LARGEST_RANK = 256
_EXACT = 53
"""Bits of the whole numbers that float64 holds all of."""
_SKETCH = 136
_ROWS = 1 << 20


@dataclass(frozen=True)
class Factors:
    """`left @ right * 2^scale`, the difference of two weights.

    Attributes:
        left: int32, `[rows, rank]`.
        right: int32, `[rank, columns]`.
        scale: an exponent of two.
    """

    left: np.ndarray
    right: np.ndarray
    scale: int

    def guess(self, base: np.ndarray, first: int) -> np.ndarray:
        """The changed rows, in the dtype of `base`: those of the base, from row `first` on, and the difference."""
        rows = self.left[first : first + len(base)].astype(np.float64)
        change = np.ldexp(rows @ self.right.astype(np.float64), self.scale)
        with np.errstate(over="ignore", invalid="ignore"):
            return (base.astype(np.float64) + change).astype(base.dtype)


def bits(rank: int) -> int:
    """Bits of the integers of factors, with the sign: sums of `rank` products of two of them are exact in float64."""
    return (_EXACT - (rank - 1).bit_length()) // 2


def find(base: np.ndarray, changed: np.ndarray) -> Factors | None:
    """Factors of `changed - base`, both `[rows, columns]` of a dtype in `DTYPES`; None where it has no low rank.

    What is left of the difference must be no more than rounding the sum explains.
    """
    rows, columns = base.shape
    width = min(_SKETCH, min(rows, columns) // 2)
    if width < 4:
        return None
    random = np.random.default_rng(0).standard_normal((columns, width))
    sketch, noise, energy = np.empty((rows, width)), 0.0, 0.0
    for start, change, rounding in _changes(base, changed):
        if not np.isfinite(change).all():
            return None
        sketch[start : start + len(change)] = change @ random
        noise += float((rounding**2).sum()) / 12
        energy += float((change**2).sum())
    if energy == 0 or noise == 0:
        return None
    span = np.linalg.qr(sketch)[0]
    inside = np.zeros((width, columns))
    for start, change, _ in _changes(base, changed):
        inside += span[start : start + len(change)].T @ change
    if energy - float((inside**2).sum()) > 3 * noise:
        return None
    turned, sizes, right = np.linalg.svd(inside, full_matrices=False)
    edge = (np.sqrt(rows) + np.sqrt(columns)) * np.sqrt(noise / base.size)
    rank = int((sizes > 1.5 * edge).sum())
    if not 0 < rank <= min(LARGEST_RANK, width - 3):
        return None
    return _whole(span @ turned[:, :rank], sizes[:rank, None] * right[:rank])


def _whole(left: np.ndarray, right: np.ndarray) -> Factors:
    """Factors rounded to integers of `bits` bits."""
    steps = [bits(len(right)) - 1 - int(np.frexp(np.abs(one).max())[1]) for one in (left, right)]
    whole = [np.rint(np.ldexp(one, step)).astype("<i4") for one, step in zip((left, right), steps, strict=True)]
    return Factors(whole[0], whole[1], -sum(steps))


def _changes(base: np.ndarray, changed: np.ndarray) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
    """Some rows at a time: where they begin, the difference and the distance of neighbouring numbers, in float64."""
    step, mantissa = max(1, _ROWS // base.shape[1]), MANTISSA[base.dtype.name]
    for start in range(0, len(base), step):
        old, new = (one[start : start + step].astype(np.float64) for one in (base, changed))
        yield start, new - old, np.ldexp(1.0, np.frexp(new)[1] - 1 - mantissa)
