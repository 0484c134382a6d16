"""Reducers that keep some of what they see: the largest elements, rows drawn at random; and several at once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Self

import numpy as np

from burnish.ir.errors import InputError
from burnish.passes.reducers import Array, Reducer, numeric, rows_of


@dataclass
class TopK(Reducer):
    """The `count` elements of the largest magnitude, and the feature that each belongs to.

    Elements of equal magnitude are ordered by their feature, then the positive first, so that the order of the arrays
    does not matter. NaNs are left out.

    Attributes:
        count: how many are kept.
        axis: the axis of the features.
        values: the largest first; float64 [at most count].
        features: int64, beside `values`.
    """

    count: int = 16
    axis: int = -1
    values: Array | None = field(init=False, default=None)
    features: Array | None = field(init=False, default=None)

    def __post_init__(self) -> None:
        if self.count < 1:
            raise InputError(f"the {self.count} largest elements cannot be kept", hint="give a positive number")

    def add(self, array: Array, keep: Array | None = None) -> None:
        rows = rows_of(numeric(array), self.axis, keep)
        size = np.abs(rows).reshape(-1)
        full = self.values is not None and len(self.values) == self.count
        least = abs(float(self.values[-1])) if full and self.values is not None else 0.0
        if size.size > self.count:
            least = max(least, float(np.partition(np.nan_to_num(size, nan=-1.0), -self.count)[-self.count]))
        where = np.flatnonzero(size >= least)
        self._take(rows.reshape(-1)[where].astype(np.float64), where % max(rows.shape[1], 1))

    def nbytes(self, shape: Sequence[int]) -> int:
        return 16 * self.count

    def _join(self, other: Self) -> None:
        if other.values is not None and other.features is not None:
            self._take(other.values, other.features)

    def _take(self, values: Array, features: Array) -> None:
        if self.values is not None and self.features is not None:
            values, features = np.concatenate([self.values, values]), np.concatenate([self.features, features])
        order = np.lexsort((-values, features, -np.abs(values)))[: self.count]
        self.values, self.features = values[order], features[order].astype(np.int64)


@dataclass
class Reservoir(Reducer):
    """A uniform random sample of the rows, without replacement.

    Every row gets a random number that is fixed by `seed` and its place in the stream, and the rows of the smallest
    numbers stay. So the same stream gives the same sample, and parts of a stream that are reduced apart give the sample
    of the whole when each is told by `first` how many rows came before it.

    Attributes:
        count: how many rows are kept.
        axis: the axis of the features.
        seed: of the random numbers.
        first: rows of the stream that other reducers see before this one.
        seen: rows so far.
        keys: the random numbers of the rows that are kept, ascending; float64 [at most count].
        sample: the rows, float32 or float64 [at most count, features].
    """

    count: int = 256
    axis: int = -1
    seed: int = 0
    first: int = 0
    seen: int = field(init=False, default=0)
    keys: Array | None = field(init=False, default=None)
    sample: Array | None = field(init=False, default=None)

    def __post_init__(self) -> None:
        if self.count < 1:
            raise InputError(f"a sample of {self.count} rows is not possible", hint="give a positive number")

    def add(self, array: Array, keep: Array | None = None) -> None:
        rows = rows_of(numeric(array), self.axis, keep)
        drawn = _numbers(self.seed, self.first + self.seen, len(rows))
        self.seen += len(rows)
        if self.keys is not None and len(self.keys) == self.count:
            better = np.flatnonzero(drawn < self.keys[-1])
            drawn, rows = drawn[better], rows[better]
        self._take(drawn, rows)

    def nbytes(self, shape: Sequence[int]) -> int:
        return 8 * self.count * (1 + int(shape[self.axis]))

    @property
    def options(self) -> str:
        """The reducer with its options, as text; `first` may differ between parts of one stream."""
        return f"Reservoir(count={self.count}, axis={self.axis}, seed={self.seed})"

    def _join(self, other: Self) -> None:
        self.seen += other.seen
        if other.keys is not None and other.sample is not None:
            self._take(other.keys, other.sample)

    def _take(self, keys: Array, rows: Array) -> None:
        if self.keys is not None and self.sample is not None:
            if rows.shape[1] != self.sample.shape[1]:
                raise InputError(f"{rows.shape[1]} features came after {self.sample.shape[1]}")
            keys, rows = np.concatenate([self.keys, keys]), np.concatenate([self.sample, rows])
        order = np.argsort(keys, kind="stable")[: self.count]
        self.keys, self.sample = keys[order], rows[order]


def _numbers(seed: int, start: int, count: int) -> Array:
    """Numbers `start` to `start + count` of the random stream of `seed`, in [0, 1)."""
    per_step = 4  # Philox makes four numbers of 64 bits a step
    stream = np.random.Philox(key=seed).advance(start // per_step)
    return np.random.Generator(stream).random(start % per_step + count)[start % per_step :]


@dataclass
class Several(Reducer):
    """Several reducers of the same values, in one pass.

    Attributes:
        parts: the reducers.
    """

    parts: tuple[Reducer, ...]

    @property
    def feature_axis(self) -> int | None:
        return next((part.feature_axis for part in self.parts if part.feature_axis is not None), None)

    def add(self, array: Array, keep: Array | None = None) -> None:
        for part in self.parts:
            part.add(array, keep)

    def nbytes(self, shape: Sequence[int]) -> int:
        return sum(part.nbytes(shape) for part in self.parts)

    def fresh(self) -> Self:
        return type(self)(tuple(part.fresh() for part in self.parts))

    def twin(self) -> Self:
        return type(self)(tuple(part.twin() for part in self.parts))

    @property
    def options(self) -> str:
        """The reducers with their options, as text."""
        return f"Several({', '.join(part.options for part in self.parts)})"

    def _join(self, other: Self) -> None:
        for mine, theirs in zip(self.parts, other.parts, strict=True):
            mine.merge(theirs)

    def state(self) -> dict[str, Array]:
        held = {f"{index}.{name}": a for index, part in enumerate(self.parts) for name, a in part.state().items()}
        return {"options": np.asarray(self.options)} | held

    def restored(self, state: Mapping[str, Array]) -> Self:
        kept = str(state["options"]) if "options" in state else "nothing"
        if kept != self.options:
            raise InputError(f"the state is that of {kept}, not of {self.options}")
        split: list[dict[str, Array]] = [{} for _ in self.parts]
        for key, array in state.items():
            index, _, name = key.partition(".")
            if name:
                split[int(index)][name] = array
        return type(self)(tuple(part.restored(held) for part, held in zip(self.parts, split, strict=True)))
