"""Weights of 8 or 4 bits as what rounding those of the base gives, by scales that the variant has, and what differs.

Division and rounding to even give the same everywhere, so that the guess needs no more than the scales. Where weights
were rounded to nearest nothing else is left to keep.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import prod

import numpy as np

from burnish.backends.delta import planes

_SAMPLE = 1 << 12
_COMPARED = 512
_LEAST_ALIKE = 0.5
"""The share of equal numbers, and the correlation before that, from which a guess counts as one."""


@dataclass(frozen=True)
class Rounding:
    """How numbers were made of those of the base.

    Attributes:
        bits: 8, or 4 where two numbers are in a byte, the first in the lower half.
        zero: what 0 becomes.
        turned: whether the base, as a matrix of its first axis and the others, is transposed.
        columns: whether there is a scale for each of the last axis, else one for so many numbers in a row.
    """

    bits: int
    zero: int
    turned: bool
    columns: bool

    def guess(self, base: np.ndarray, scales: np.ndarray, start: int, end: int, signed: bool) -> np.ndarray:
        """The numbers from `start` to before `end`, whole rows of a turned matrix, as uint8, one in a byte.

        Args:
            base: the weights, `[rows, columns]`.
            scales: one-dimensional; their number divides that of the weights.
            start, end: of the numbers as they are stored.
            signed: whether they are int8.
        """
        if self.turned:
            rows = len(base)
            weights = base.T[start // rows : end // rows].reshape(-1)
        else:
            weights = base.reshape(-1)[start:end]
        return self._rounded(weights, self._scale(scales, np.arange(start, end), base.size), signed)

    def _scale(self, scales: np.ndarray, places: np.ndarray, count: int) -> np.ndarray:
        found: np.ndarray = scales[places % scales.size if self.columns else places // (count // scales.size)]
        return found

    def _rounded(self, weights: np.ndarray, scales: np.ndarray, signed: bool) -> np.ndarray:
        with np.errstate(all="ignore"):
            whole = np.rint(weights.astype(np.float32) / scales.astype(np.float32)) + np.float32(self.zero)
        low, high = (-128, 127) if signed else (0, (1 << self.bits) - 1)
        limited: np.ndarray = np.clip(np.nan_to_num(whole, nan=self.zero), low, high)
        return limited.astype(np.int16).astype(np.uint8)


def spans(count: int, rows: int, turned: bool) -> Iterator[tuple[int, int]]:
    """The blocks that `guess` is asked for: an even number of rows of a turned matrix, of so many numbers each."""
    return planes.spans(count, 2 * rows if turned else 2)


def unpacked(values: np.ndarray, bits: int) -> np.ndarray:
    """Numbers of bytes, one in a byte."""
    return values if bits == 8 else np.stack([values & 15, values >> 4], axis=-1).reshape(-1)


def packed(numbers: np.ndarray, bits: int) -> np.ndarray:
    """What `unpacked` was given."""
    return numbers if bits == 8 else numbers[::2] | numbers[1::2] << 4


def find(
    values: np.ndarray, signed: bool, bases: Mapping[int, np.ndarray], scales: Mapping[int, np.ndarray]
) -> tuple[int, int, Rounding] | None:
    """The weights and the scales that the bytes of a tensor were made of; None where none are found.

    Args:
        values: uint8, the bytes.
        signed: whether they are int8.
        bases: weights `[rows, columns]` that it may be, by any key.
        scales: likewise.

    Returns:
        The keys, and how.
    """
    best: tuple[float, int, Rounding] | None = None
    for bits in (8,) if signed else (8, 4):
        count = values.size * (8 // bits)
        places = np.linspace(0, count - 1, min(count, _SAMPLE)).astype(np.int64)
        numbers = _at(values, places, bits, signed)
        for key, base in list((k, b) for k, b in bases.items() if b.size == count)[:_COMPARED]:
            for turned in (False, True)[: 1 + (2 * len(base) <= planes.BLOCK)]:
                alike = _correlation(_weights(base, places, turned), numbers)
                if alike > (_LEAST_ALIKE if best is None else best[0]):
                    best = alike, key, Rounding(bits, 0, turned, False)
    if best is None:
        return None
    _, key, how = best
    base = bases[key]
    places = np.linspace(0, base.size - 1, min(base.size, _SAMPLE)).astype(np.int64)
    numbers, weights = _at(values, places, how.bits, signed), _weights(base, places, how.turned)
    found: tuple[float, int, Rounding] | None = None
    for other, one in scales.items():
        if one.size < 2 or base.size % one.size or one.size * 2 > base.size:
            continue
        for columns in (False, True):
            tried = Rounding(how.bits, 0, how.turned, columns)
            with np.errstate(all="ignore"):
                whole = np.rint(weights.astype(np.float32) / tried._scale(one, places, base.size).astype(np.float32))
            zero = float(np.nan_to_num(np.median(numbers - whole), posinf=0, neginf=0))
            tried = Rounding(how.bits, int(np.clip(np.rint(zero), -256, 256)), how.turned, columns)
            guess = tried._rounded(weights, tried._scale(one, places, base.size), signed)
            equal = float((guess == numbers.astype(np.int16).astype(np.uint8)).mean())
            if equal > (_LEAST_ALIKE if found is None else found[0]):
                found = equal, other, tried
    return None if found is None else (key, found[1], found[2])


def _at(values: np.ndarray, places: np.ndarray, bits: int, signed: bool) -> np.ndarray:
    """Some of the numbers, as float32."""
    if bits == 8:
        found: np.ndarray = values[places].view(np.int8 if signed else np.uint8)
    else:
        found = values[places // 2] >> (4 * (places % 2)).astype(np.uint8) & 15
    return found.astype(np.float32)


def _weights(base: np.ndarray, places: np.ndarray, turned: bool) -> np.ndarray:
    """The weights at some places of the matrix, or of the turned one, as float32."""
    rows = len(base)
    if turned:
        places = places % rows * (base.size // rows) + places // rows
    found: np.ndarray = base.reshape(-1)[places].astype(np.float32)
    return found


def _correlation(weights: np.ndarray, numbers: np.ndarray) -> float:
    """Of magnitudes: a scale may have either sign."""
    with np.errstate(all="ignore"):
        sizes = np.abs(weights), np.abs(numbers - np.median(numbers))
        a, b = (one - one.mean() for one in sizes)
        found = float((a * b).sum() / np.sqrt((a * a).sum() * (b * b).sum()))
    return found if np.isfinite(found) else 0.0


def as_matrix(array: np.ndarray, dims: tuple[int, ...]) -> np.ndarray:
    """An array as the matrix of its first axis and the others."""
    rows = dims[0] if dims and dims[0] > 0 and prod(dims) == array.size else 1
    return array.reshape(rows, -1)
