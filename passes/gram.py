"""Gram matrices XᵀX of the rows that pass through a value, and of the patches that a convolution sees.

The matrices are float64. For float32 values the products are made in float32, a block of some thousand rows at a time,
and the blocks are added in float64: half the time of float64 products, and on the activations of a trained network the
result is within 1e-7 of the largest eigenvalue (docs/results/observing.md): float32 has a precision of 1.2e-7.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Self

import numpy as np

from burnish.ir.errors import InputError
from burnish.passes.reducers import Array, Reducer, numeric, rows_of

LEAST_ROWS = 1024
"""Rows are collected until there are so many: adding a large matrix for fewer costs more than making it."""
_MOST_ROWS = 8192
_PANEL = 256
_PASSING = ("_waiting", "_filled", "_shared")
"""Fields that are no part of a state."""


@dataclass
class Gram(Reducer):
    """Number of rows, their sum, and the sum of their outer products.

    Attributes:
        axis: the axis of the features; 1 gives the channels of an image.
        exact: make products of float32 values in float64 too; those of float64 values always are.
        rows: how many rows counted.
    """

    axis: int = -1
    exact: bool = False
    rows: int = field(init=False, default=0)
    _total: Array | None = field(init=False, default=None)
    _products: Array | None = field(init=False, default=None)
    _waiting: Array | None = field(init=False, default=None, repr=False, compare=False)
    _filled: int = field(init=False, default=0, repr=False, compare=False)
    _shared: bool = field(init=False, default=False, repr=False, compare=False)

    def add(self, array: Array, keep: Array | None = None) -> None:
        array = numeric(array)
        all_count = keep is None or bool(keep.all())
        if (
            all_count
            and self.axis == 1
            and array.ndim > 2
            and array.size >= LEAST_ROWS * len(array) * array.shape[1] > 0
        ):
            for image in array:
                self._columns(np.ascontiguousarray(image).reshape(len(image), -1))
        else:
            self._rows(rows_of(array, self.axis, keep))

    def nbytes(self, shape: Sequence[int]) -> int:
        return self._held(int(shape[self.axis]))

    @property
    def _parts(self) -> int:
        """Groups of features with a matrix of their own."""
        return 1

    def _held(self, features: int) -> int:
        return 8 * features * (features // self._parts + 1) + 4 * (1 + self.exact) * features * LEAST_ROWS

    @property
    def matrix(self) -> Array:
        """XᵀX, float64 [features, features] ([groups, features, features] of a grouped convolution); do not write.

        Raises:
            InputError: no row has come.
        """
        self._flush()
        if self._products is None:
            raise InputError("no row was seen: there is no Gram matrix")
        for one in self._products if self._products.ndim == 3 else (self._products,):
            _mirror(one)
        return self._products

    @property
    def mean(self) -> Array:
        """The mean of the rows, float64 [features]; raises InputError like `matrix`."""
        self._flush()
        if self._total is None:
            raise InputError("no row was seen: there is no mean")
        return np.asarray(self._total / self.rows)

    @property
    def covariance(self) -> Array:
        """The covariance of the rows (divided by their number), float64, shaped like `matrix`."""
        matrix, mean = self.matrix, self.mean
        with np.errstate(invalid="ignore", over="ignore"):
            if matrix.ndim == 2:
                return np.asarray(matrix / self.rows - np.outer(mean, mean))
            parts = mean.reshape(len(matrix), -1)
            return np.asarray(matrix / self.rows - parts[:, :, None] * parts[:, None, :])

    def state(self) -> dict[str, Array]:
        self._flush()
        return {name: array for name, array in super().state().items() if name not in _PASSING}

    def twin(self) -> Self:
        self._flush()
        self._waiting, self._shared = None, True
        return super().twin()

    def _join(self, other: Self) -> None:
        self._flush()
        other._flush()
        if other._products is not None and other._total is not None:
            self._sum(other._total, other._products)
            self.rows += other.rows

    def _rows(self, rows: Array) -> None:
        """Take rows, a matrix [rows, features]."""
        self.rows += len(rows)
        if len(rows) < LEAST_ROWS:
            self._wait(rows)
            return
        for start in range(0, len(rows), _MOST_ROWS):
            block = np.ascontiguousarray(rows[start : start + _MOST_ROWS])
            if len(block) < LEAST_ROWS:
                self._wait(block)
            else:
                self._block(block)

    def _wait(self, rows: Array) -> None:
        """Keep a copy of a few rows until there are enough."""
        if self._waiting is not None and self._waiting.dtype != rows.dtype:
            self._flush()
            self._waiting = None
        if self._waiting is None:
            self._waiting = np.empty((LEAST_ROWS, rows.shape[1]), rows.dtype)
        _same_features(self._waiting.shape[1], rows.shape[1])
        room = LEAST_ROWS - self._filled
        self._waiting[self._filled : self._filled + min(room, len(rows))] = rows[:room]
        self._filled += min(room, len(rows))
        if self._filled == LEAST_ROWS:
            self._flush()
            if len(rows) > room:
                self._wait(rows[room:])

    def _flush(self) -> None:
        if self._waiting is not None and self._filled:
            block, self._filled = self._waiting[: self._filled], 0
            self._block(block)

    def _block(self, rows: Array) -> None:
        """Add a contiguous matrix [rows, features]."""
        if self.exact:
            rows = rows.astype(np.float64)
        self._sum(*_checked(rows, lambda r: (np.ones(len(r), r.dtype) @ r, _syrk(r.T, 0))))

    def _columns(self, columns: Array) -> None:
        """Take rows, a contiguous matrix [features, rows]."""
        self.rows += columns.shape[1]
        if self.exact:
            columns = columns.astype(np.float64)
        self._sum(*_checked(columns, lambda c: (c @ np.ones(c.shape[1], c.dtype), self._outer(c))))

    def _outer(self, columns: Array) -> Array:
        """The sum of the outer products of the columns of a matrix [features, rows]."""
        if self._parts == 1:
            return _syrk(columns.T, 1)
        parts = columns.reshape(self._parts, -1, columns.shape[1])
        return np.asarray(parts @ parts.transpose(0, 2, 1))

    def _sum(self, total: Array, products: Array) -> None:
        if self._products is None or self._total is None:
            self._total, self._products = total.astype(np.float64), products.astype(np.float64, copy=False)
            return
        _same_features(len(self._total), len(total))
        self._total = self._total + total
        if self._shared:
            self._products, self._shared = self._products + products, False
        else:
            self._products += products


def _checked(block: Array, products: Callable[[Array], tuple[Array, Array]]) -> tuple[Array, Array]:
    """`products(block)`, in float64 where float32 overflows, as the large negative numbers of masks do."""
    with np.errstate(over="ignore", invalid="ignore"):
        total, found = products(block)
        finite = np.isfinite(total).all() and np.isfinite(np.diagonal(found, axis1=-2, axis2=-1)).all()
        return (total, found) if finite or block.dtype != np.float32 else products(block.astype(np.float64))


def _syrk(matrix: Array, transposed: int) -> Array:
    """The lower triangle of A Aᵀ (of AᵀA when transposed), zeros above it; `matrix` is in Fortran's order."""
    from scipy.linalg import blas

    kernel = blas.ssyrk if matrix.dtype == np.float32 else blas.dsyrk
    found: Array = kernel(1.0, matrix, trans=transposed).T
    return found


def _same_features(before: int, now: int) -> None:
    if before != now:
        raise InputError(f"{now} features came after {before}")


def _mirror(matrix: Array) -> None:
    """Write the lower triangle of a square matrix over its upper one."""
    size = len(matrix)
    for start in range(0, size, _PANEL):
        end = min(start + _PANEL, size)
        matrix[start:end, end:] = matrix[end:, start:end].T
        corner = matrix[start:end, start:end]
        corner[:] = np.tril(corner) + np.tril(corner, -1).T


@dataclass
class ConvolutionGram(Gram):
    """The Gram matrix of the patches of an image, [batch, channels, *spatial], that a convolution multiplies.

    A row is a patch in the order of the weight, [channels, *kernel] flattened, with zeros where it reaches into the
    padding. Patches are unrolled some output lines of one image at a time. With groups, each has a matrix of its own.

    Attributes:
        kernel: sizes of the kernel.
        strides: the step along each spatial axis; 1 when absent.
        dilations: the spacing of the taps; 1 when absent.
        pads: padding before each axis, then after each; 0 when absent.
        same: `upper` or `lower` when the padding is that of ONNX's `auto_pad` SAME_UPPER or SAME_LOWER.
        groups: groups of channels.
    """

    axis: int = 1
    kernel: tuple[int, ...] = (1, 1)
    strides: tuple[int, ...] = ()
    dilations: tuple[int, ...] = ()
    pads: tuple[int, ...] = ()
    same: str = ""
    groups: int = 1

    def __post_init__(self) -> None:
        rank = len(self.kernel)
        if self.axis != 1:
            raise InputError("a convolution's channels are axis 1")
        for name, wanted in (("strides", rank), ("dilations", rank), ("pads", 2 * rank)):
            given = getattr(self, name)
            if given and len(given) != wanted:
                raise InputError(f"{name} {list(given)} do not fit a kernel {list(self.kernel)}")

    def add(self, array: Array, keep: Array | None = None) -> None:
        array = numeric(array)
        if keep is not None and not keep.all():
            raise InputError("patches of a convolution mix positions: no mask can say which of them count")
        if array.ndim != len(self.kernel) + 2 or array.shape[1] % self.groups:
            raise InputError(f"an array {list(array.shape)} is no input of a convolution {list(self.kernel)}")
        for image in array:
            for tile in self._tiles(image):
                if self.groups > 1 or tile.shape[1] >= LEAST_ROWS:
                    self._columns(tile)
                else:
                    self._rows(tile.T)

    def nbytes(self, shape: Sequence[int]) -> int:
        return self._held(int(shape[1]) * int(np.prod(self.kernel)))

    @property
    def _parts(self) -> int:
        return self.groups

    def _tiles(self, image: Array) -> Iterator[Array]:
        """Matrices [channels * kernel, patches] of whole output lines, not many more than `LEAST_ROWS` patches each."""
        rank = len(self.kernel)
        steps, spacing = self.strides or (1,) * rank, self.dilations or (1,) * rank
        reach = [d * (k - 1) + 1 for k, d in zip(self.kernel, spacing, strict=True)]
        padded = np.pad(image, [(0, 0), *self._padding(image.shape[1:], steps, reach)])
        if any(size < wanted for size, wanted in zip(padded.shape[1:], reach, strict=True)):
            return
        seen = np.lib.stride_tricks.sliding_window_view(padded, reach, tuple(range(1, rank + 1)))
        seen = seen[(slice(None), *(slice(None, None, s) for s in steps), *(slice(None, None, d) for d in spacing))]
        places = seen.shape[1 : rank + 1]
        patches = seen.transpose(0, *range(rank + 1, 2 * rank + 1), *range(1, rank + 1))
        lines = -(-LEAST_ROWS // max(1, int(np.prod(places[1:]))))
        features = len(image) * int(np.prod(self.kernel))
        for start in range(0, places[0], lines):
            some = np.moveaxis(patches, rank + 1, 0)[start : start + lines]
            yield np.ascontiguousarray(np.moveaxis(some, 0, rank + 1)).reshape(features, -1)

    def _padding(self, sizes: Sequence[int], steps: Sequence[int], reach: Sequence[int]) -> list[tuple[int, int]]:
        rank = len(self.kernel)
        if not self.same:
            pads = self.pads or (0,) * (2 * rank)
            return list(zip(pads[:rank], pads[rank:], strict=True))
        found = []
        for size, step, wide in zip(sizes, steps, reach, strict=True):
            missing = max(0, (-(-size // step) - 1) * step + wide - size)
            half = missing // 2
            found.append((half, missing - half) if self.same == "upper" else (missing - half, half))
        return found
