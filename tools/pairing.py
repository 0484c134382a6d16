"""Two sequences in order: which element of one is which of the other."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

A = TypeVar("A")
B = TypeVar("B")


def in_order(old: Sequence[A], new: Sequence[B], gain: Callable[[A, B], float]) -> list[tuple[A | None, B | None]]:
    """Pair elements without crossings so that the sum of the gains is largest; those left alone stand with None.

    The alignment is that of Needleman and Wunsch (1970) without a cost for gaps.

    Args:
        old, new: what to pair; every element is in the result once, and in order.
        gain: of a pair; 0 for elements that cannot be one. It is asked several times for the same pair.
    """
    best = [[0.0] * (len(new) + 1) for _ in range(len(old) + 1)]
    for i in range(len(old) - 1, -1, -1):
        for j in range(len(new) - 1, -1, -1):
            best[i][j] = max(best[i + 1][j], best[i][j + 1], gain(old[i], new[j]) + best[i + 1][j + 1])
    found: list[tuple[A | None, B | None]] = []
    i = j = 0
    while i < len(old) and j < len(new):
        if (own := gain(old[i], new[j])) > 0 and best[i][j] == own + best[i + 1][j + 1]:
            found.append((old[i], new[j]))
            i, j = i + 1, j + 1
        elif best[i][j] == best[i + 1][j]:
            found.append((old[i], None))
            i += 1
        else:
            found.append((None, new[j]))
            j += 1
    return [*found, *((one, None) for one in old[i:]), *((None, one) for one in new[j:])]
