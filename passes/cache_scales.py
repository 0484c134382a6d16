"""The largest magnitude of keys and values of a cache, for each head or each channel of each head."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Self

import numpy as np

from burnish.ir.errors import InputError
from burnish.passes.reducers import Array, Reducer, numeric


@dataclass
class Peaks(Reducer):
    """The largest magnitude at each place of some axes, over all others; what is padding counts too.

    Attributes:
        axes: the axes that keep their own numbers, counted from the front.
        peak: float64, with size 1 in all other axes; None before the first array.
    """

    axes: tuple[int, ...]
    peak: Array | None = field(init=False, default=None)

    @property
    def feature_axis(self) -> int | None:
        return None

    def add(self, array: Array, keep: Array | None = None) -> None:
        array = np.abs(numeric(array))
        others = tuple(axis for axis in range(array.ndim) if axis not in self.axes)
        self._take(array.max(axis=others, initial=0.0, keepdims=True).astype(np.float64))

    def nbytes(self, shape: Sequence[int]) -> int:
        return 8 * int(np.prod([shape[axis] for axis in self.axes if axis < len(shape)]))

    def _join(self, other: Self) -> None:
        if other.peak is not None:
            self._take(other.peak)

    def _take(self, peak: Array) -> None:
        if self.peak is not None and self.peak.shape != peak.shape:
            raise InputError(f"an array has other sizes than one before: {list(peak.shape)}, {list(self.peak.shape)}")
        self.peak = peak if self.peak is None else np.maximum(self.peak, peak)
