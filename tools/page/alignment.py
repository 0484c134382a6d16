"""Which part of one graph answers to which part of another, and which line to which line."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher
from functools import cached_property

import onnx_ir as oir

from burnish.ir.edit import sources
from burnish.ir.segments import Segment
from burnish.tools.pairing import in_order

MOST_CELLS = 2_000_000
"""Pairs of parts or of lines that are compared each with each; in longer lists lines that come often are no landmarks,
and of parts only equal beginnings and ends are found."""

_LEAST = 0.15
"""Parts that are less alike than this do not answer to each other."""


@dataclass(frozen=True)
class Part:
    """A segment, of a model or of a lock file.

    Attributes:
        name: `block 7`.
        structure, weights: its hashes.
        lines: the text of its lines.
        names: the name of the node of each line; empty where it is not known.
        origins: names of the nodes of the original that it was made from, where the model was made from another.
    """

    name: str
    structure: str
    weights: str
    lines: tuple[str, ...]
    names: tuple[str, ...]
    origins: frozenset[str] = frozenset()

    @cached_property
    def named(self) -> frozenset[str]:
        """The names of its nodes that have one."""
        return frozenset(self.names) - {""}

    @cached_property
    def number(self) -> int | None:
        """The number of a block; None for anything else."""
        word, _, number = self.name.partition(" ")
        return int(number) if word == "block" and number.isdecimal() else None


Pair = tuple[Part | None, Part | None]
"""A part and what it became; None for one that is gone or new."""


def parts_of(found: Sequence[Segment]) -> list[Part]:
    """The segments of a model as parts."""
    return [
        Part(
            one.name,
            one.structure,
            one.weights,
            tuple(line.text for line in one.lines),
            tuple(line.node.name or "" for line in one.lines),
            frozenset(name for line in one.lines for name in _origins(line.node)),
        )
        for one in found
    ]


def _origins(node: oir.Node) -> tuple[str, ...]:
    return tuple(name for name in sources(node) if name not in ("", "?"))


def pair(olds: Sequence[Part], news: Sequence[Part]) -> list[Pair]:
    """The parts of both in order, those that answer to each other together.

    A block answers to a block, and a graph in which no blocks were found to all parts of the other but its functions.
    Of all ways to pair parts without crossing, the one is taken whose pairs are most alike.
    """
    olds, news = _comparable(olds, news), _comparable(news, olds)
    first, last = 0, 0
    while first < min(len(olds), len(news)) and _equal(olds[first], news[first]):
        first += 1
    while last < min(len(olds), len(news)) - first and _equal(olds[-1 - last], news[-1 - last]):
        last += 1
    old, new = olds[first : len(olds) - last], news[first : len(news) - last]
    middle = (
        in_order(old, new, _likeness())
        if len(old) * len(new) <= MOST_CELLS
        else [*((o, None) for o in old), *((None, n) for n in new)]
    )
    return [
        *zip(olds[:first], news[:first], strict=True),
        *middle,
        *zip(olds[len(olds) - last :], news[len(news) - last :], strict=True),
    ]


def _comparable(parts: Sequence[Part], others: Sequence[Part]) -> list[Part]:
    """The parts as they are, or those of the main graph as one where the others have no blocks."""
    main = [one for one in parts if not one.name.startswith("function ")]
    if len(main) < 2 or any(one.number is not None for one in others):
        return list(parts)
    return [joined("graph", main), *parts[len(main) :]]


def joined(name: str, parts: Sequence[Part]) -> Part:
    """Parts that follow each other as one."""
    return Part(
        name,
        " ".join(one.structure for one in parts),
        " ".join(one.weights for one in parts),
        tuple(line for one in parts for line in one.lines),
        tuple(name for one in parts for name in one.names),
        frozenset().union(*(one.origins for one in parts)),
    )


def _equal(old: Part, new: Part) -> bool:
    return old.name == new.name and old.structure == new.structure and old.weights == new.weights


def _likeness() -> Callable[[Part, Part], float]:
    """How alike two parts are, 0 for those that cannot be the same.

    Where they come from and equal weights say more than equal lines.
    """
    shared: dict[tuple[str, str], float] = {}

    def gain(old: Part, new: Part) -> float:
        function = old.name.startswith("function ") or new.name.startswith("function ")
        if (old.number is None) != (new.number is None) or (function and old.name != new.name):
            return 0.0
        key = old.structure, new.structure
        if key not in shared:
            common = (Counter(old.lines) & Counter(new.lines)).total()
            shared[key] = 2 * common / max(len(old.lines) + len(new.lines), 1)
        origin = len(old.named & new.origins) / len(new.origins) if new.origins else 0.0
        named, same = old.name == new.name, old.weights == new.weights
        alike = shared[key] + 0.25 * named + 2.0 * origin + 1.0 * same
        return alike if alike >= _LEAST else 0.0

    return gain


def pair_lines(old: Sequence[str], new: Sequence[str]) -> list[tuple[int | None, int | None]]:
    """The lines of both in order by their numbers, equal ones together and changed ones beside each other."""
    many = len(old) * len(new) > MOST_CELLS
    blocks = SequenceMatcher(None, old, new, autojunk=many).get_opcodes()
    found: list[tuple[int | None, int | None]] = []
    for word, i, i_end, j, j_end in blocks:
        if word == "replace" and (i_end - i) * (j_end - j) <= MOST_CELLS:
            found += _replaced(old, new, (i, i_end), (j, j_end))
        elif word == "replace":
            found += [*((k, None) for k in range(i, i_end)), *((None, k) for k in range(j, j_end))]
        else:
            found += [
                (i + k if i + k < i_end else None, j + k if j + k < j_end else None)
                for k in range(max(i_end - i, j_end - j))
            ]
    return found


def _replaced(
    old: Sequence[str], new: Sequence[str], before: tuple[int, int], after: tuple[int, int]
) -> list[tuple[int | None, int | None]]:
    """Lines that take the place of others: beside each other where the operator is the same, in order."""
    found: list[tuple[int | None, int | None]] = []
    i, (j, j_end) = before[0], after
    while i < before[1] or j < j_end:
        if i == before[1] or j == j_end:
            found.append((i, None) if j == j_end else (None, j))
            i, j = (i + 1, j) if j == j_end else (i, j + 1)
            continue
        later = next((k for k in range(i, before[1]) if _operator(old[k]) == _operator(new[j])), None)
        if later is None:
            waits = any(_operator(old[i]) == _operator(new[k]) for k in range(j, j_end))
            found.append((None, j) if waits else (i, None))
            i, j = (i, j + 1) if waits else (i + 1, j)
            continue
        found += [(k, None) for k in range(i, later)]
        found.append((later, j))
        i, j = later + 1, j + 1
    return found


def _operator(line: str) -> str:
    return line.partition("(")[0]
