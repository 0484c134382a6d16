"""Weights that were in few bits before: the integers that they came from, found again from the numbers alone.

Checkpoints that were published in few bits and written back as floating-point numbers hold, in each block of
neighbours, a few numbers with equal steps between them: q * step of GGUF's Q4_0 and Q8_0, q * step + offset of its
Q4_1, (q - zero point) * step of GPTQ and AWQ. Such blocks are stored in those bits again without loss. Everything here
is to the rounding of the dtype that the numbers are stored in: what is a hundredth of a step off is another weight.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from burnish.passes.grids import Grid, Scales, dequantize

BLOCKS = (128, 64, 32, 16)
"""Sizes of blocks that are looked for, the largest first: fewer scales."""

SHIFTED = (2, 4)
"""The bits in which steps from any number on are looked for; in 8 bits the steps go through 0."""

_ROUNDED = 4
"""How many units in the last place of the largest number of a block an element may be off: the integer times the step,
the sum with the offset and both ends are rounded.
"""

_CLEAR = 16
"""How many times as long as that a step has to be, so that nothing fits by chance."""

_SAMPLE = 64


@dataclass(frozen=True)
class Published:
    """The integers of a matrix [out, in], in blocks along its inputs.

    Attributes:
        levels: of the scales' grid, [out, in].
        scales: steps, and zero points that are integers.
        offset: what is added to each number of a block, [out, blocks], in the dtype of the scales; None for nothing.
    """

    levels: np.ndarray
    scales: Scales
    offset: np.ndarray | None = None

    def numbers(self) -> np.ndarray:
        """What the integers stand for, float64 [out, in]."""
        found = dequantize(self.levels, self.scales)
        if self.offset is None:
            return found
        return np.asarray(found + self.scales.spread(self.offset.astype(np.float64), found.shape))


def find(
    weight: np.ndarray,
    bits: Iterable[int],
    dtype: np.dtype[np.floating],
    *,
    signed: bool = False,
    offsets: bool = True,
    blocks: Sequence[int] = BLOCKS,
) -> Published | None:
    """The integers of fewest bits that a matrix lies on in all of its blocks, and no larger blocks have; else None.

    Args:
        weight: float64 [out, in], finite.
        bits: those that can be stored.
        dtype: what the numbers were rounded to, and scales are stored in.
        signed: integers around 0 with positive scales and without zero points alone; else scales may be negative.
        offsets: steps from any number on as well, not only through 0.
        blocks: the sizes to look for.
    """
    out, features = weight.shape
    for width in sorted(bits):
        for block in blocks:
            if not out or features % block:
                continue
            search = _Blocks(weight.reshape(-1, block), width, np.dtype(dtype), signed)
            kinds = (False, True) if width in SHIFTED and not signed else (False,)
            for shifted in kinds:
                found = search.shifted(offsets) if shifted else search.through_zero()
                if found is not None and (made := _checked(weight, found, block, width, search)) is not None:
                    return made
    return None


def _checked(weight: np.ndarray, found: _Found, block: int, bits: int, search: _Blocks) -> Published | None:
    """What was found, shaped as the matrix, where it gives the numbers again as it is stored."""
    shape = (len(weight), weight.shape[1] // block)
    grid = Grid(bits, signed=search.signed, symmetric=found.zero is None)
    zero = np.full(shape, grid.middle) if found.zero is None else found.zero.reshape(shape)
    scales = Scales(grid, found.step.astype(search.dtype).reshape(shape), zero.astype(grid.dtype), 1, block)
    offset = None if found.offset is None else found.offset.astype(search.dtype).reshape(shape)
    made = Published(found.levels.astype(grid.dtype).reshape(weight.shape), scales, offset)
    apart = np.abs(made.numbers() - weight).reshape(-1, block).max(1)
    return made if (apart <= search.slack[:, 0]).all() else None


@dataclass(frozen=True)
class _Found:
    """Of rows of numbers: integers [rows, n], steps [rows], and zero points or offsets [rows]."""

    levels: np.ndarray
    step: np.ndarray
    zero: np.ndarray | None = None
    offset: np.ndarray | None = None


class _Blocks:
    """Looks for the steps of rows, float64 [rows, n], each of which is a block."""

    def __init__(self, rows: np.ndarray, bits: int, dtype: np.dtype[np.floating], signed: bool) -> None:
        self.rows, self.bits, self.dtype, self.signed = rows, bits, dtype, signed
        self.size = np.abs(rows).max(1, keepdims=True)
        self.slack = _ROUNDED * float(np.finfo(dtype).eps) * self.size

    def through_zero(self) -> _Found | None:
        """Multiples of the steps."""
        half = 1 << (self.bits - 1)
        found = self._steps(np.zeros_like(self.size), self.size, half, half)
        if found is None:
            return None
        step, levels = found
        turned = levels.max(1) > half - 1
        levels[turned] *= -1
        if self.signed and turned.any():
            return None
        middle = 0 if self.signed else half
        return _Found(levels + middle, np.where(turned, -1, 1) * self._none_zero(step))

    def shifted(self, offsets: bool) -> _Found | None:
        """Steps from the least number on: with zero points where these are integers everywhere, else with offsets."""
        top, middle = (1 << self.bits) - 1, 1 << (self.bits - 1)
        least = self.rows.min(1, keepdims=True)
        found = self._steps(least, self.rows.max(1, keepdims=True) - least, top, None)
        if found is None:
            return None
        step, levels = found
        least, flat = least[:, 0], step == 0
        used = levels.max(1)
        own = np.where(flat & (least != 0), np.abs(least), self._none_zero(step))
        start = np.rint(least / own)
        zero, first = np.maximum(-start, 0), np.maximum(start, 0)
        whole = (np.abs(least - start * own) <= self.slack[:, 0]) & (zero <= top) & (first + used <= top)
        if whole.all():
            return _Found(levels + first[:, None], own, zero=zero)
        if not offsets:
            return None
        own = self._none_zero(step)
        first = np.where(flat, middle, (top - used) // 2)
        return _Found(levels + first[:, None], own, offset=least + (middle - first) * np.where(flat, 0, own))

    def _none_zero(self, step: np.ndarray) -> np.ndarray:
        """Steps, where 0 the least of the others, or else 1, as kernels that subtract zero points need."""
        none = step == 0
        return np.where(none, np.min(step[~none], initial=np.inf) if not none.all() else 1.0, step)

    def _steps(
        self, start: np.ndarray, reach: np.ndarray, most: int, half: int | None
    ) -> tuple[np.ndarray, np.ndarray] | None:
        """The steps [rows] of which `reach` is a multiple, and how many of them lie between `start` and each number.

        None where any row has none. A row of equal numbers has steps of 0.

        Args:
            start: [rows, 1].
            reach: from there to the number furthest away, [rows, 1].
            most: how many steps that may be.
            half: steps go to both sides, this many to one of them and one fewer to the other; None for one side.
        """
        few = np.linspace(0, len(self.rows) - 1, min(len(self.rows), _SAMPLE)).astype(int)
        if len(few) < len(self.rows) and self._of_rows(few, start, reach, most, half) is None:
            return None
        return self._of_rows(np.arange(len(self.rows)), start, reach, most, half)

    def _of_rows(
        self, rows: np.ndarray, start: np.ndarray, reach: np.ndarray, most: int, half: int | None
    ) -> tuple[np.ndarray, np.ndarray] | None:
        """`_steps` of some rows; most blocks use all of their bits, so those counts are tried first."""
        step, levels = np.zeros(len(rows)), np.zeros((len(rows), self.rows.shape[1]))
        left = np.flatnonzero(reach[rows, 0] > self.slack[rows, 0] * (half is None))
        for count in sorted(
            range(1, most + 1), key=lambda one: (bool(one & (one + 1)) and bool(one & (one - 1)), -one)
        ):
            if not len(left):
                break
            which = rows[left]
            own = reach[which] / count
            steps = (self.rows[which] - start[which]) / own
            whole = np.rint(steps)
            fits = (np.abs(steps - whole) * own <= self.slack[which]).all(1)
            fits &= (_CLEAR * self.slack[which] <= own)[:, 0]
            if half is not None:
                fits &= (whole.min(1) > -half) | (whole.max(1) < half)
            step[left[fits]], levels[left[fits]] = own[fits, 0], whole[fits]
            left = left[~fits]
        return None if len(left) else (step, levels)
