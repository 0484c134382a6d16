"""Two graphs side by side: parts that answer to each other, blocks that are all alike as one."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace

from burnish.tools import terminal
from burnish.tools.page import parts
from burnish.tools.page.alignment import Pair, Part, pair_lines
from burnish.tools.page.parts import Graphs, Line, Piece, State

MOST_LINES = 6000
"""Lines of unchanged parts that are written; more would make a page slow, and changed ones are written all."""


@dataclass
class _Alike:
    """Pairs that differ in the same way."""

    state: State
    pairs: list[Pair] = field(default_factory=list)


def graphs(pairs: Iterable[Pair], old: str, new: str) -> Graphs:
    """Both graphs, with what changed marked.

    Args:
        pairs: their parts, those that answer to each other together.
        old, new: what they are called, such as `before` and `after`.
    """
    groups = _grouped(pairs)
    pieces, written, left = [], 0, 0
    for number, group in enumerate(groups):
        piece = replace(_piece(group), anchor=f"part-{number}")
        quiet = group.state in (State.SAME, State.WEIGHTS)
        if quiet and written + len(piece.lines) > MOST_LINES:
            left += len(piece.lines)
            piece = replace(piece, counts=f"{piece.counts}, lines left out", lines=())
        written += len(piece.lines) if quiet else 0
        pieces.append(piece)
    return Graphs(old, new, tuple(pieces), _note(groups, left))


def _note(groups: Iterable[_Alike], left: int) -> str:
    words = {
        State.SAME: "are the same",
        State.WEIGHTS: "have the same lines and other weights",
        State.CHANGED: "changed",
        State.ADDED: "are new",
        State.REMOVED: "are gone",
    }
    found = []
    for state, said in words.items():
        number = sum(len(group.pairs) for group in groups if group.state is state)
        if number:
            said = said if number > 1 else said.replace("are ", "is ", 1).replace("have ", "has ", 1)
            found.append(f"{terminal.count(number, 'part')} {said}")
    less = f" {left} lines of unchanged parts are left out." if left else ""
    return f"{', '.join(found)}.{less}" if found else "No nodes."


def _state(old: Part | None, new: Part | None) -> State:
    if old is None or new is None:
        return State.ADDED if old is None else State.REMOVED
    if old.structure != new.structure:
        return State.CHANGED
    return State.SAME if old.weights == new.weights else State.WEIGHTS


def _grouped(pairs: Iterable[Pair]) -> list[_Alike]:
    groups: list[_Alike] = []
    for both in pairs:
        state = _state(*both)
        if groups and groups[-1].state is state and _alike(groups[-1].pairs[-1], both):
            groups[-1].pairs.append(both)
        else:
            groups.append(_Alike(state, [both]))
    return groups


def _alike(first: Pair, second: Pair) -> bool:
    """Whether two pairs of blocks differ in the same way and are numbered on, so that one stands for both."""
    for one, other in zip(first, second, strict=True):
        if (one is None) != (other is None):
            return False
        if one is not None and other is not None:
            if one.number is None or other.number != one.number + 1 or one.structure != other.structure:
                return False
    return True


def _piece(group: _Alike) -> Piece:
    old, new = group.pairs[0]
    olds = [one for one, _ in group.pairs if one is not None]
    news = [one for _, one in group.pairs if one is not None]
    counts, lines = _counts(old, new, len(group.pairs)), tuple(_lines(olds, news))
    covers = frozenset(one.name for one in (*olds, *news))
    return Piece(_title(olds, news), group.state, counts, lines, covers)


def _title(olds: Sequence[Part], news: Sequence[Part]) -> str:
    was, now = _called(olds), _called(news)
    title = was or now
    if was and now and was != now:
        title = f"{was} (now {now.removeprefix('blocks ').removeprefix('block ')})"
    return f"{title}, all alike" if max(len(olds), len(news)) > 1 else title


def _called(some: Sequence[Part]) -> str:
    if not some:
        return ""
    return some[0].name if len(some) == 1 else f"blocks {some[0].number} to {some[-1].number}"


def _counts(old: Part | None, new: Part | None, times: int) -> str:
    was, now = (0 if one is None else len(one.lines) for one in (old, new))
    alone = old is None or new is None or was == now
    said = terminal.count(max(was, now), "node") if alone else f"{was} → {terminal.count(now, 'node')}"
    return said + (" each" if times > 1 else "")


def _lines(olds: Sequence[Part], news: Sequence[Part]) -> Iterable[Line]:
    before, after = olds[0].lines if olds else (), news[0].lines if news else ()
    if olds and news and olds[0].structure == news[0].structure:
        numbers: list[tuple[int | None, int | None]] = [(number, number) for number in range(len(before))]
    else:
        numbers = pair_lines(before, after)
    for i, j in numbers:
        yield Line(
            None if i is None else before[i],
            None if j is None else after[j],
            () if i is None else _names(olds, i),
            () if j is None else _names(news, j),
        )


def _names(some: Sequence[Part], line: int) -> tuple[str, ...]:
    return tuple(parts.name(one.names[line]) for one in some if one.names[line])
