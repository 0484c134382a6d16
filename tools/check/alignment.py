"""Which segment of a model became which: blocks that are the same, changed, new or gone."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

from burnish.tools.check.line import Parsed
from burnish.tools.check.lock import SegmentLock
from burnish.tools.pairing import in_order

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

    Equal weights decide between blocks of equal structure, so that of many like blocks the right one is missing.
    """
    groups: list[Group] = []
    gone: list[Part] = []
    come: list[Part] = []
    for one, other in in_order(old, new, _gains()):
        if one is not None and other is not None:
            groups += [*_between(gone, come), Group((one,), (other,))]
            gone, come = [], []
        elif one is not None:
            gone.append(one)
        elif other is not None:
            come.append(other)
    return [*groups, *_between(gone, come)]


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
