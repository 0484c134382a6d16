"""Rows of caches moved, cut and chosen. Slots without a token are zeros: what is masked must still be a number."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]


class Span(NamedTuple):
    """Tokens of one row: `length` of them from slot `start` on, in row `row` of the old cache."""

    row: int
    start: int
    length: int


def moved(cache: Array, batch: int, time: int, spans: Sequence[Span], length: int, at_end: bool) -> Array:
    """A cache with one row for each span and `length` slots.

    Args:
        cache: keys or values; only read.
        batch, time: its axes of rows and slots.
        spans: which tokens go into each row.
        length: slots of the result; none of the spans is longer.
        at_end: whether the tokens of a row end at the last slot, else they begin at the first.

    Returns:
        A new array in C order; slots that no token fills are zero.
    """
    shape = list(cache.shape)
    shape[batch], shape[time] = len(spans), length
    made = np.zeros(shape, cache.dtype)
    old, new = np.moveaxis(cache, (batch, time), (0, 1)), np.moveaxis(made, (batch, time), (0, 1))
    for row, span in enumerate(spans):
        first = length - span.length if at_end else 0
        new[row, first : first + span.length] = old[span.row, span.start : span.start + span.length]
    return made


def laid(
    pieces: Sequence[Sequence[tuple[Array, int]]],
    sizes: tuple[int, ...],
    dtype: np.dtype[Any],
    batch: int,
    time: int,
    at_end: bool,
) -> Array:
    """A cache with a row for each sequence of pieces.

    Args:
        pieces: for each row, caches of one row with slots at their start, and how many slots are meant.
        sizes, dtype: of the result.
        batch, time: its axes of rows and slots.
        at_end: whether the tokens of a row end at the last slot, else they begin at the first.

    Returns:
        A new array in C order; slots that no token fills are zero.
    """
    made = np.zeros(sizes, dtype)
    new = np.moveaxis(made, (batch, time), (0, 1))
    for row, parts in enumerate(pieces):
        at = sizes[time] - sum(count for _, count in parts) if at_end else 0
        for one, count in parts:
            new[row, at : at + count] = np.moveaxis(one, (batch, time), (0, 1))[0, :count]
            at += count
    return made


def packed(ids: NDArray[np.int64], keep: NDArray[np.bool_]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """The tokens that are kept, moved to the start of their rows.

    Args:
        ids: [rows, n].
        keep: [rows, n].

    Returns:
        ids [rows, m], where m is the largest number of tokens kept in a row and what is behind a row's tokens is any
        id that occurs in it (zero in an empty row), and the place in `ids` of each, [rows, m]; -1 where there is none.
    """
    counts = keep.sum(1)
    width = int(counts.max(initial=0))
    order = np.argsort(~keep, axis=1, kind="stable")[:, :width]
    places = np.where(np.arange(width) < counts[:, None], order, -1)
    first = np.where(counts[:, None] > 0, order[:, :1], 0) if width else order
    chosen = np.where(places >= 0, places, first)
    return np.where(counts[:, None] > 0, np.take_along_axis(ids, chosen, 1), 0), places
