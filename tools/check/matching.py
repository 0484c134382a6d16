"""What two long lists have in common, found fast where they differ in few places."""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence
from difflib import SequenceMatcher

_LARGE = 4_000_000
"""Pairs of items up to which all are looked at; of more, frequent items are no place to begin a match at."""


def opcodes(one: Sequence[Hashable], other: Sequence[Hashable]) -> Iterator[tuple[str, int, int, int, int]]:
    """`difflib.SequenceMatcher.get_opcodes` of what lies between the beginning and the end that two lists share.

    Its time is quadratic where many items are alike, as lines of a model are; most changes are small.
    """
    shorter = min(len(one), len(other))
    begin = next((index for index in range(shorter) if one[index] != other[index]), shorter)
    room = shorter - begin
    end = next((index for index in range(room) if one[-1 - index] != other[-1 - index]), room)
    if begin:
        yield "equal", 0, begin, 0, begin
    left, right = one[begin : len(one) - end], other[begin : len(other) - end]
    matcher = SequenceMatcher(None, left, right, autojunk=len(left) * len(right) > _LARGE)
    for tag, i1, i2, j1, j2 in matcher.get_opcodes():
        yield tag, begin + i1, begin + i2, begin + j1, begin + j2
    if end:
        yield "equal", len(one) - end, len(one), len(other) - end, len(other)


def pairs(one: Sequence[Hashable], other: Sequence[Hashable]) -> Iterator[tuple[int, int]]:
    """The indices of items that match, in order."""
    for tag, i1, i2, j1, _ in opcodes(one, other):
        if tag == "equal":
            yield from ((index, j1 + index - i1) for index in range(i1, i2))
