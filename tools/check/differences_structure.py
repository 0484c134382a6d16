"""Differences of structure as sentences: which block, which node, and what became of it."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from burnish.tools.check.alignment import Group, Part, align
from burnish.tools.check.changes import Change, Kind, changes, rewired
from burnish.tools.check.consequences import Context, follows, only_shapes
from burnish.tools.check.difference import Difference, Field, Verdict
from burnish.tools.check.line import parse, seen_through
from burnish.tools.check.lock import Lock
from burnish.tools.check.spelled import brief, layer, operators, spelled

_PLACES = 2
"""Segments between and behind blocks that are named in a list."""

_MANY = 3
"""Kinds of changes of what computes shapes that are told together."""

_WHOLE = "graph"
"""What the only segment of a model without blocks is called: no place, so that a node is named instead."""

Names = Mapping[str, Sequence[str]]
"""The names of the nodes of each segment, by line: labels for people."""


@dataclass(frozen=True)
class Structure:
    """What became of the segments.

    Attributes:
        groups: segments and what they became.
        differences: as sentences.
        unfolded: names of segments with new BatchNormalizations in training mode: these cannot be part of the weights
            of convolutions before them, so that those differ, too.
    """

    groups: list[Group]
    differences: list[Difference]
    unfolded: frozenset[str] = frozenset()


def structure(
    old: Lock, new: Lock, verdict: Verdict, context: Context, names: tuple[Names, Names] = ({}, {})
) -> Structure:
    """Compare the segments of two models.

    Args:
        old, new: the locks; equal structure fingerprints mean that nothing differs.
        verdict: of what may not differ, or may.
        context: what differs in the contract; structure that follows from it is a note.
        names: the names of nodes, old and new, as far as the models are at hand.
    """
    if (old.structure, old.weights, old.segments) == (new.structure, new.weights, new.segments):
        return Structure([], [])
    before = parts(old)
    groups = align(before, parts(new, context.renamed))
    if old.structure == new.structure:
        return Structure(groups, [])
    opsets = (old.opsets.get("ai.onnx", 0), new.opsets.get("ai.onnx", 0))
    found = [one for group in groups for one in _of(group, opsets)]
    found += _wired(groups, found)
    written = _Writer(names, verdict, context, before).all(found)
    unfolded = frozenset(
        one.place for one in found if one.kind is Kind.MODE and one.operator != "Dropout" and not one.old
    )
    return Structure(groups, written or [_hidden(old, new, groups, verdict, context)], unfolded)


def parts(lock: Lock, renamed: Mapping[str, str] | None = None) -> list[Part]:
    """The segments of a lock with their lines taken apart; inputs by their old names."""
    inputs = frozenset((renamed or {}).get(name, name) for name in lock.inputs)
    code = {key: tuple(parse(one, inputs, renamed) for one in lines) for key, lines in lock.code.items()}
    every = [line for lines in code.values() for line in lines if line.operator == "Identity"]
    copies = every if all(line.copies for line in every) else []
    clear = {key: seen_through(lines, copies) for key, lines in code.items()}
    return [Part(one, index, clear.get(one.code, ())) for index, one in enumerate(lock.segments)]


def _of(group: Group, opsets: tuple[int, int]) -> list[Change]:
    if group.same:
        return []
    if group.old and group.new:
        return list(changes(group, opsets))
    found = []
    for part in (*group.old, *group.new):
        spot = (part, 0)
        if part.is_block:
            kind = Kind.BLOCK_GONE if group.old else Kind.BLOCK_NEW
        else:
            kind = Kind.GONE if group.old else Kind.ADDED
        old, new = (spot, None) if group.old else (None, spot)
        removed, added = (part.lines, ()) if group.old else ((), part.lines)
        found.append(Change(kind, spelled(part.lines), old=old, new=new, removed=removed, added=added))
    return found


def _wired(groups: Sequence[Group], found: Sequence[Change]) -> list[Change]:
    """Nodes that read others than before, where no other change explains it."""
    gone = {line.operator for one in found if one.kind is not Kind.WIRED for line in one.removed}
    come = {line.operator for one in found if one.kind is not Kind.WIRED for line in one.added}
    result = []
    for group in groups:
        if group.same or not (group.old and group.new):
            continue
        for one in rewired(group):
            was, now = ({*text.split(", ")} for text in (one.was, one.now))
            loose = group.pair is None or group.pair[0].is_block != group.pair[1].is_block
            if (was - now) & gone or (now - was) & come or (loose and "entry" in was ^ now):
                continue
            result.append(one)
    return result


def _hidden(old: Lock, new: Lock, groups: Sequence[Group], verdict: Verdict, context: Context) -> Difference:
    """What to say of a structure that differs although all lines are the same."""
    other = [group.pair[1] for group in groups if group.pair is not None and not group.same]
    key: tuple[str | int, ...] = ("structure",)
    stored = _stored_otherwise(old, new)
    if stored and all(any(line.copies for line in pair.lines) for pair in other):
        if context.ran:
            message = f"the same nodes, their constants stored otherwise: {stored}"
            return Difference(Field.STRUCTURE, Verdict.NOTE, message, key=key)
        message = f"constants are stored otherwise: {stored}; only a run of the model shows that all else is the same"
        return Difference(Field.STRUCTURE, verdict, message, key=key)
    if other:
        place = ", ".join(f"`{part.name}`" for part in other)
        message = f"values are wired differently in {place}: the same nodes read other values than before"
        return Difference(Field.STRUCTURE, verdict, message, other[0].name, key=key)
    if len(old.outputs) != len(new.outputs):
        message = "the same nodes; which of their values are outputs differs"
        return Difference(Field.STRUCTURE, Verdict.NOTE, message, key=key)
    message = "the segments are wired to each other or to the outputs differently: the same nodes, other values"
    if context.outputs:
        message, verdict = "the same nodes, of which others are outputs", Verdict.NOTE
    return Difference(Field.STRUCTURE, verdict, message, key=key)


def _stored_otherwise(old: Lock, new: Lock) -> str:
    """How the same constants are stored now; empty when other nodes than these differ or nothing of this does."""
    names = sorted(name for name in old.operators.keys() | new.operators.keys()
                   if old.operators.get(name, 0) != new.operators.get(name, 0))  # fmt: skip
    if not set(names) <= {"Constant", "Identity"}:
        return ""
    told = []
    for name in names:
        by = new.operators.get(name, 0) - old.operators.get(name, 0)
        told.append(f"{abs(by)} {'more' if by > 0 else 'fewer'} {name} node{'s' * (abs(by) > 1)}")
    if not told and old.sizes.bytes != new.sizes.bytes:
        told = ["constants are shared or left unread otherwise"]
    return " and ".join(told)


class _Writer:
    """Writes changes as sentences, the same change in many places once."""

    def __init__(self, names: tuple[Names, Names], verdict: Verdict, context: Context, old: Sequence[Part]) -> None:
        self.names, self.verdict, self.context = names, verdict, context
        self.twins = {part.keys: part.name for part in old if part.is_block}

    def all(self, found: Sequence[Change]) -> list[Difference]:
        """One difference for each kind of change; what follows from the contract behind the others."""
        following: list[Change] = []
        causes: dict[object, list[Change]] = {}
        for one in found:
            if follows(one, self.context):
                following.append(one)
            else:
                causes.setdefault((one.kind, one.operator, one.detail, one.was, one.now), []).append(one)
        shapes = {key: same for key, same in causes.items() if only_shapes(same[0])}
        if len(shapes) < _MANY:
            shapes = {}
        written = [self._difference(same) for key, same in causes.items() if key not in shapes]
        if shapes:
            together = [one for same in shapes.values() for one in same]
            message = f"shapes are computed otherwise, in {_bare(together)}: {_balance(together)}"
            key = _key(together[0])
            written.append(Difference(Field.STRUCTURE, self.verdict, message, _bare(together), key=key))
        return written + ([self._following(following)] if following else [])

    def _difference(self, same: list[Change]) -> Difference:
        first = same[0]
        write: Callable[[list[Change]], str] = {
            Kind.VALUE: self._value,
            Kind.MODE: self._mode,
            Kind.REPLACED: self._replaced,
            Kind.ADDED: self._added,
            Kind.GONE: self._gone,
            Kind.WIRED: self._reads,
            Kind.BLOCK_NEW: self._new_blocks,
            Kind.BLOCK_GONE: self._gone_blocks,
        }[first.kind]
        place = first.place if len(same) == 1 else _bare(same)
        if len(same) == 1 and (first.kind in (Kind.VALUE, Kind.MODE, Kind.WIRED) or first.place == _WHOLE):
            place = self._name(first) or place
        now = _became(first) if first.kind is Kind.REPLACED else first.now
        return Difference(Field.STRUCTURE, self.verdict, write(same), place, first.was, now, _key(first))

    def _following(self, found: list[Change]) -> Difference:
        message = (
            f"{self.context.reason} what only computes shapes and types follows, in {_bare(found)}: {_balance(found)}"
        )
        return Difference(Field.STRUCTURE, Verdict.NOTE, message, found[0].place, key=_key(found[0]))

    def _value(self, same: list[Change]) -> str:
        first = same[0]
        return f"{first.detail} of {self._nodes(same)} is now {first.now}, was {first.was}"

    def _mode(self, same: list[Change]) -> str:
        return f"{self._nodes(same)} {'is' if len(same) == 1 else 'are'} now in training mode"

    def _nodes(self, same: list[Change]) -> str:
        first = same[0]
        if len(same) > 1:
            return f"{len(same)} {first.operator} nodes ({_bare(same)})"
        name = self._name(first)
        return f"{first.operator}{f' `{name}`' if name else ''} ({first.place})"

    def _replaced(self, same: list[Change]) -> str:
        first = same[0]
        was, now = first.was, _became(first)
        verb = "are" if was[0].isdecimal() or " and " in was else "is"
        where = f"{_bare(same)}: " if len(same) == 1 else f"in {_bare(same)}, "
        return f"{where if first.place != _WHOLE else ''}{was} {verb} now {now}{_often(same)}"

    def _added(self, same: list[Change]) -> str:
        lines = same[0].added
        known = layer(lines)
        what = f"one {known}" if known else _count(len(lines))
        return f"{what} added in {_bare(same)}{_often(same)}: {brief(lines)}"

    def _gone(self, same: list[Change]) -> str:
        lines = same[0].removed
        known = layer(lines)
        what = f"one {known} ({brief(lines)})" if known else spelled(lines)
        verb = "are" if what[0].isdecimal() else "is"
        return f"{what} {verb} gone from {_bare(same)}{_often(same)}"

    def _reads(self, same: list[Change]) -> str:
        was, now, one = same[0].was, same[0].now, len(same) == 1
        if not now:
            return f"{self._nodes(same)} no longer read{'s' * one} {was}"
        where = f" where {'it' if one else 'they'} read {was}" if was else " too"
        return f"{self._nodes(same)} now read{'s' * one} {now}{where}"

    def _new_blocks(self, same: list[Change]) -> str:
        numbers = [one.new[0] for one in same if one.new is not None]
        like = self.twins.get(numbers[0].keys, "")
        verb = "is" if len(numbers) == 1 else "are"
        return f"{_bare(same)} {verb} new{f', like {like}' if like else f': {spelled(same[0].added)}'}"

    def _gone_blocks(self, same: list[Change]) -> str:
        return f"{_bare(same)} {'is' if len({one.place for one in same}) == 1 else 'are'} gone"

    def _name(self, change: Change) -> str:
        """What the node is called: as the new model has it, else the old one."""
        if change.kind in (Kind.BLOCK_GONE, Kind.BLOCK_NEW):
            return ""
        for spot, names in ((change.new, self.names[1]), (change.old, self.names[0])):
            if spot is None:
                continue
            part, line = spot
            known = next((one.name for one in part.segment.layers if one.line == line), "")
            listed = names.get(part.name, ())
            found = listed[line] if line < len(listed) else known
            if found:
                return found
        return ""


def _became(change: Change) -> str:
    """What came in the place of nodes, as it is said behind what they were."""
    if len(change.removed) == 1 and len(change.added) > 1:
        return f"{len(change.added)} decomposed nodes ({operators(change.added)})"
    return f"one {change.now}" if len(change.removed) > 1 and len(change.added) == 1 else change.now


def _key(change: Change) -> tuple[str | int, ...]:
    """Where in the old lock it stands."""
    if change.old is None:
        return ("segments",)
    part, line = change.old
    if change.kind in (Kind.BLOCK_GONE, Kind.BLOCK_NEW):
        return ("segments", part.index)
    return ("code", part.segment.code, line)


def _often(same: Sequence[Change]) -> str:
    """How often, where it is more often than once in each place."""
    return f", {len(same)} times" if len(same) > len({one.place for one in same}) else ""


def _balance(found: Sequence[Change]) -> str:
    """How many nodes went and came."""
    moved = [one for one in found if one.kind is not Kind.WIRED]
    removed, added = sum(len(one.removed) for one in moved), sum(len(one.added) for one in moved)
    counts = [f"{_count(removed)} fewer" * bool(removed), f"{_count(added)} more" * bool(added)]
    return " and ".join(filter(None, counts)) or f"{_count(len(found))} with other constants"


def _count(number: int) -> str:
    return "one node" if number == 1 else f"{number} nodes"


def _bare(same: Sequence[Change]) -> str:
    """`block 3`, `blocks 0 to 5`, "blocks 1, 3 and 7 and `after block 7`"."""
    names = list(dict.fromkeys(one.place for one in same))
    numbers = sorted(int(found[1]) for name in names if (found := re.fullmatch(r"block (\d+)", name)))
    others = [name for name in names if not re.fullmatch(r"block \d+", name)]
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    spelled_out = [
        text for run in runs for text in ([f"{run[0]} to {run[-1]}"] if len(run) > 2 else [str(one) for one in run])
    ]
    blocks = [] if not numbers else [f"block{'s' * (len(numbers) > 1)} {_list(spelled_out)}"]
    before = [name for name in others if name.startswith("before")]
    after = [name for name in others if name not in before]
    more = len(after) - _PLACES
    after = [f"`{name}`" for name in after] if more < 2 else [
        *(f"`{name}`" for name in after[:_PLACES]), f"{more} other segments"
    ]  # fmt: skip
    return _list([*(f"`{name}`" for name in before), *blocks, *after])


def _list(items: Sequence[str]) -> str:
    return items[0] if len(items) == 1 else f"{', '.join(items[:-1])} and {items[-1]}"
