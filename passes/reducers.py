"""Statistics of streams of arrays, in memory that does not grow with the number of arrays.

A reducer is a dataclass: its fields that can be given are options, the others hold what was seen so far. `add` takes
one array more, `merge` another reducer of the same options that saw other arrays (another part of the samples, another
process), `state` and `restored` carry it through a file. Whatever comes in is made float64 or float32 first: integers
and booleans to float64, narrower floating point to float32.

Rows that do not count, those of padding, are named by a `keep` beside the array: booleans that broadcast to the array,
of size 1 along the axis of the features.
"""

from __future__ import annotations

import copy
import dataclasses
import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Self

import numpy as np

from burnish.ir.errors import InputError

Array = np.ndarray[Any, Any]

_BLOCK = 1 << 20
"""Elements that are converted to float64 at a time."""


@dataclass
class Reducer(ABC):
    """A statistic of a stream of arrays."""

    @abstractmethod
    def add(self, array: Array, keep: Array | None = None) -> None:
        """Take one array more.

        Args:
            array: of any shape that has the reducer's axis.
            keep: booleans that broadcast to `array`, True for what counts; everything counts when absent.

        Raises:
            InputError: the array has no such axis, holds no numbers, or differs in size from those before.
        """

    @abstractmethod
    def nbytes(self, shape: Sequence[int]) -> int:
        """The bytes that are held, at most, when arrays of `shape` are added, however many."""

    @abstractmethod
    def _join(self, other: Self) -> None:
        """`merge`, where both have the same options and have seen something."""

    @property
    def feature_axis(self) -> int | None:
        """The axis along which a mask may not differ; None when it may differ from element to element."""
        axis: int | None = getattr(self, "axis", None)
        return axis

    def fresh(self) -> Self:
        """A reducer of the same options that has seen nothing."""
        return dataclasses.replace(self)

    def twin(self) -> Self:
        """A reducer that has seen the same and goes its own way; the two share memory while neither takes more."""
        return copy.copy(self)

    def merge(self, other: Self) -> None:
        """Take what `other` has seen; `other` is left as it is.

        Raises:
            InputError: the two have different options, or saw arrays of different sizes.
        """
        if other.options != self.options:
            raise InputError(f"{other.options} cannot be merged into {self.options}")
        self._join(other)

    @property
    def options(self) -> str:
        """The reducer with its options, as text."""
        given = (f"{one.name}={getattr(self, one.name)!r}" for one in dataclasses.fields(self) if one.init)
        return f"{type(self).__name__}({', '.join(given)})"

    def state(self) -> dict[str, Array]:
        """What was seen, as arrays that `numpy.savez` takes."""
        held = {one.name: getattr(self, one.name) for one in dataclasses.fields(self) if not one.init}
        found = {name: np.asarray(value) for name, value in held.items() if value is not None}
        return {"options": np.asarray(self.options)} | found

    def restored(self, state: Mapping[str, Array]) -> Self:
        """A reducer of the same options that goes on from a `state`.

        Raises:
            InputError: the state is that of a reducer of other options.
        """
        kept = str(state["options"]) if "options" in state else "nothing"
        if kept != self.options:
            raise InputError(f"the state is that of {kept}, not of {self.options}")
        found = self.fresh()
        for one in dataclasses.fields(found):
            if not one.init and one.name in state:
                array = np.array(state[one.name])
                setattr(found, one.name, array if array.ndim else array.item())
        return found

    def take_over(self, other: Self) -> None:
        """Have seen what `other`, of the same options, has seen, and nothing else; `other` is used up."""
        for one in dataclasses.fields(self):
            setattr(self, one.name, getattr(other, one.name))


def numeric(array: Array) -> Array:
    """The array in float32 or float64.

    Raises:
        InputError: it holds no numbers.
    """
    if array.dtype == np.float32 or array.dtype == np.float64:
        return array
    if array.dtype.kind in "iub":
        return array.astype(np.float64)
    if array.dtype.kind in "OSUM" or (array.dtype.kind == "V" and array.dtype.fields is not None):
        raise InputError(f"a statistic of {array.dtype} is not possible", hint="observe values that hold numbers")
    return array.astype(np.float32)


def rows_of(array: Array, axis: int | None, keep: Array | None) -> Array:
    """The array as a matrix [rows, features]: the features along `axis`, what `keep` leaves out left out.

    Args:
        array: any shape.
        axis: the axis of the features; None to have every element in a row of its own.
        keep: see `Reducer.add`.

    Raises:
        InputError: there is no such axis, or `keep` does not fit the array or differs along the axis.
    """
    if keep is not None:
        check_keep(array, axis, keep)
        keep = None if keep.all() else keep
    if axis is None:
        return (array if keep is None else array[np.broadcast_to(keep, array.shape)]).reshape(-1, 1)
    moved = np.moveaxis(array, _axis(array, axis), -1)
    if keep is None:
        return moved.reshape(math.prod(moved.shape[:-1]), moved.shape[-1])
    lead = np.moveaxis(keep, _axis(array, axis), -1)[..., 0]
    kept: Array = moved[np.broadcast_to(lead, moved.shape[:-1])]
    return kept


def check_keep(array: Array, axis: int | None, keep: Array) -> None:
    """Raise InputError unless `keep` can say which rows of `array` count."""
    wrong = keep.ndim != array.ndim or any(k not in (1, n) for k, n in zip(keep.shape, array.shape, strict=True))
    if wrong or (axis is not None and keep.shape[_axis(array, axis)] != 1):
        raise InputError(f"a mask {list(keep.shape)} does not say which rows of {list(array.shape)} count")


def _axis(array: Array, axis: int) -> int:
    if not -array.ndim <= axis < array.ndim:
        raise InputError(f"an array of shape {list(array.shape)} has no axis {axis}")
    return axis % array.ndim


def _size(shape: Sequence[int], axis: int | None) -> int:
    return 1 if axis is None else int(shape[axis])


def _blocks(rows: Array) -> Iterator[Array]:
    """The rows in float64, some at a time."""
    step = max(1, _BLOCK // max(rows.shape[1], 1))
    for start in range(0, len(rows), step):
        yield rows[start : start + step].astype(np.float64)


def _same_size(one: Array, other: Array) -> None:
    if one.shape[-1] != other.shape[-1]:
        raise InputError(f"{other.shape[-1]} features came after {one.shape[-1]}")


@dataclass
class Moments(Reducer):
    """Number of rows, mean and variance of each feature (of all elements together when `axis` is None).

    Attributes:
        axis: the axis of the features.
        rows: how many rows counted.
        mean: float64 [features]; None before the first row.
        deviations: sum of squared deviations from the mean, float64 [features].
    """

    axis: int | None = -1
    rows: int = field(init=False, default=0)
    mean: Array | None = field(init=False, default=None)
    deviations: Array | None = field(init=False, default=None)

    def add(self, array: Array, keep: Array | None = None) -> None:
        for block in _blocks(rows_of(numeric(array), self.axis, keep)):
            mean = block.mean(0)
            self._take(len(block), mean, np.square(block - mean).sum(0))

    def nbytes(self, shape: Sequence[int]) -> int:
        return 16 * _size(shape, self.axis)

    def _join(self, other: Self) -> None:
        if other.mean is not None and other.deviations is not None:
            self._take(other.rows, other.mean, other.deviations)

    def _take(self, rows: int, mean: Array, deviations: Array) -> None:
        """Chan, Golub and LeVeque's update, which does not cancel as a difference of squares does."""
        if self.mean is None or self.deviations is None:
            self.rows, self.mean, self.deviations = rows, mean.copy(), deviations.copy()
            return
        _same_size(self.mean, mean)
        total = self.rows + rows
        apart = mean - self.mean
        self.deviations = self.deviations + deviations + apart**2 * (self.rows * rows / total)
        self.mean = self.mean + apart * (rows / total)
        self.rows = total

    @property
    def variance(self) -> Array | None:
        """The mean squared deviation from the mean, float64 [features]; None before the first row."""
        return None if self.deviations is None else self.deviations / self.rows


@dataclass
class Magnitudes(Moments):
    """`Moments` of the absolute values."""

    def add(self, array: Array, keep: Array | None = None) -> None:
        super().add(np.abs(numeric(array)), keep)


@dataclass
class Range(Reducer):
    """Least and largest number: of the whole tensor, or at each index of one axis.

    `axis=None` is per tensor, `axis=-1` (or 1, for images) per channel, `axis=1` of [batch, positions, features] per
    token. When arrays differ in size along the axis, the longest counts. A NaN stays.

    Attributes:
        axis: the axis that keeps its own numbers.
        low: float64 [size of the axis], [1] per tensor; None before the first array. Infinite where nothing counted.
        high: likewise.
    """

    axis: int | None = None
    low: Array | None = field(init=False, default=None)
    high: Array | None = field(init=False, default=None)

    @property
    def feature_axis(self) -> int | None:
        return None

    def add(self, array: Array, keep: Array | None = None) -> None:
        array = numeric(array)
        own = None if self.axis is None else _axis(array, self.axis)
        others = tuple(axis for axis in range(array.ndim) if axis != own)
        where: Any = True
        if keep is not None:
            check_keep(array, None, keep)
            where = True if keep.all() else np.broadcast_to(keep, array.shape)
        low = np.min(array, axis=others, initial=np.inf, where=where).reshape(-1)
        high = np.max(array, axis=others, initial=-np.inf, where=where).reshape(-1)
        self._take(low.astype(np.float64), high.astype(np.float64))

    def nbytes(self, shape: Sequence[int]) -> int:
        return 16 * _size(shape, self.axis)

    def _join(self, other: Self) -> None:
        if other.low is not None and other.high is not None:
            self._take(other.low, other.high)

    def _take(self, low: Array, high: Array) -> None:
        if self.low is None or self.high is None:
            self.low, self.high = low, high
            return
        length = max(len(self.low), len(low))
        self.low = np.minimum(_padded(self.low, length, np.inf), _padded(low, length, np.inf))
        self.high = np.maximum(_padded(self.high, length, -np.inf), _padded(high, length, -np.inf))

    @property
    def absmax(self) -> Array | None:
        """The largest magnitude, like `high`; 0 where nothing counted."""
        if self.low is None or self.high is None:
            return None
        return np.where(self.low > self.high, 0.0, np.maximum(-self.low, self.high))


def _padded(array: Array, length: int, number: float) -> Array:
    return array if len(array) == length else np.pad(array, (0, length - len(array)), constant_values=number)


@dataclass
class Histogram(Reducer):
    """How many elements lie in each of `bins` bins of one width around zero.

    The width is the least power of two for which every finite element has a bin. When a larger element comes, bins are
    merged in pairs, so the counts are exact and do not depend on the order.

    Attributes:
        bins: a power of two.
        counts: int64 [bins].
        exponent: the width is 2 to this power.
        infinite: infinities, in no bin.
        nan: NaNs, in no bin.
    """

    bins: int = 2048
    counts: Array | None = field(init=False, default=None)
    exponent: int = field(init=False, default=-1022)
    infinite: int = field(init=False, default=0)
    nan: int = field(init=False, default=0)

    def __post_init__(self) -> None:
        if self.bins < 2 or self.bins & (self.bins - 1):
            raise InputError(f"a histogram of {self.bins} bins is not possible", hint="give a power of two")

    def add(self, array: Array, keep: Array | None = None) -> None:
        half = self.bins // 2
        for block in _blocks(rows_of(numeric(array), None, keep)):
            finite = block[np.isfinite(block)]
            nan = int(np.isnan(block).sum())
            self.nan += nan
            self.infinite += block.size - finite.size - nan
            largest = float(np.abs(finite).max(initial=0.0))
            self._widen(int(np.frexp(largest)[1]) - (half.bit_length() - 1) if largest else -1022)
            index = np.floor(np.ldexp(finite, -self.exponent)).astype(np.int64) + half
            counts = np.bincount(index, minlength=self.bins)
            self.counts = counts if self.counts is None else self.counts + counts

    def _widen(self, exponent: int) -> None:
        shift = exponent - self.exponent
        if shift <= 0:
            return
        self.exponent = exponent
        if self.counts is not None:
            half = self.bins // 2
            index = (np.arange(-half, half) >> min(shift, 62)) + half
            self.counts = np.bincount(index, weights=self.counts, minlength=self.bins).astype(np.int64)

    def nbytes(self, shape: Sequence[int]) -> int:
        return 8 * self.bins

    def _join(self, other: Self) -> None:
        self.nan += other.nan
        self.infinite += other.infinite
        if other.counts is None:
            return
        theirs = dataclasses.replace(other)
        theirs.counts, theirs.exponent = other.counts, other.exponent
        theirs._widen(self.exponent)
        self._widen(theirs.exponent)
        self.counts = theirs.counts.copy() if self.counts is None else self.counts + theirs.counts

    @property
    def edges(self) -> Array:
        """The bins' edges, float64 [bins + 1]; a bin holds its lower edge."""
        return np.ldexp(np.arange(-(self.bins // 2), self.bins // 2 + 1, dtype=np.float64), self.exponent)

    def quantile(self, share: float) -> float:
        """The number that `share` (0 to 1) of the elements do not exceed, right to one bin; NaN when there are none."""
        total = 0 if self.counts is None else int(self.counts.sum())
        if self.counts is None or not total:
            return float("nan")
        before = np.cumsum(self.counts)
        index = int(np.searchsorted(before, max(share * total, 1)))
        return float(self.edges[min(index, self.bins - 1) + 1])
