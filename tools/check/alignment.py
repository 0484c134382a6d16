"""Which segment of a model became which: blocks that are the same, changed, new or gone."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

from burnish.tools.check.line import Parsed
from burnish.tools.check.lock import SegmentLock

_ALIKE = 0.3
"""Share of lines in common from which a changed segment counts as the same one."""

_SAME_WEIGHTS = 0.25


@dataclass(frozen=True)
class Part:
    """A segment, its number in the lock and its lines taken apart."""

    segment: SegmentLock
    index: int
    lines: tuple[Parsed, ...]

    @property
    def name(self) -> str:
        """The segment's name."""
        return self.segment.name

    @property
    def is_block(self) -> bool:
        """Whether it is a block."""
        return self.name.startswith("block ")

    @cached_property
    def keys(self) -> tuple[object, ...]:
        """Its lines, whatever nodes they read; two segments with the same are alike."""
        return tuple(line.key for line in self.lines if not line.copies)

    @cached_property
    def counts(self) -> Counter[object]:
        """How often each line stands in it, whatever nodes it reads."""
        return Counter(self.keys)


@dataclass(frozen=True)
class Group:
    """Segments of the old model and what they became; one to one unless blocks are cut otherwise now."""

    old: tuple[Part, ...]
    new: tuple[Part, ...]

    @property
    def pair(self) -> tuple[Part, Part] | None:
        """The segment and what it became, where it is one to one."""
        return (self.old[0], self.new[0]) if len(self.old) == len(self.new) == 1 else None

    @property
    def same(self) -> bool:
        """Whether it is one segment and its structure is the same."""
        return self.pair is not None and self.pair[0].segment.structure == self.pair[1].segment.structure


def align(old: Sequence[Part], new: Sequence[Part]) -> list[Group]:
    """Pair segments in order so that most is in common; what is left between two pairs is a group of its own.

    The alignment is that of Needleman and Wunsch (1970) without a cost for gaps. Equal weights decide between blocks of
    equal structure, so that of many like blocks the right one is missing.
    """
    gain = _gains()
    table = [[0.0] * (len(new) + 1) for _ in range(len(old) + 1)]
    for i in range(len(old) - 1, -1, -1):
        for j in range(len(new) - 1, -1, -1):
            table[i][j] = max(table[i + 1][j], table[i][j + 1], gain(old[i], new[j]) + table[i + 1][j + 1])
    groups: list[Group] = []
    gone: list[Part] = []
    come: list[Part] = []
    i = j = 0
    while i < len(old) and j < len(new):
        if (own := gain(old[i], new[j])) > 0 and table[i][j] == own + table[i + 1][j + 1]:
            groups += [*_between(gone, come), Group((old[i],), (new[j],))]
            gone, come = [], []
            i, j = i + 1, j + 1
        elif table[i][j] == table[i + 1][j]:
            gone.append(old[i])
            i += 1
        else:
            come.append(new[j])
            j += 1
    return [*groups, *_between([*gone, *old[i:]], [*come, *new[j:]])]


def _between(gone: list[Part], come: list[Part]) -> list[Group]:
    return [Group(tuple(gone), tuple(come))] if gone or come else []


def _gains() -> Callable[[Part, Part], float]:
    """How much two segments have in common; 0 for segments that cannot be the same."""
    known: dict[tuple[str, str], float] = {}

    def gain(one: Part, other: Part) -> float:
        functions = [part.name if part.name.startswith("function ") else "" for part in (one, other)]
        if functions[0] != functions[1]:
            return 0.0
        code = one.segment.code, other.segment.code
        if code not in known:
            common = 2 * (one.counts & other.counts).total()
            known[code] = common / max(len(one.lines) + len(other.lines), 1)
        alike = 1.0 if one.segment.structure == other.segment.structure else known[code]
        if alike < _ALIKE:
            return 0.0
        kind = 1.0 if one.is_block == other.is_block else 0.5
        return alike * kind + _SAME_WEIGHTS * (one.segment.weights == other.segment.weights)

    return gain
