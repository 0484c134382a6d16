"""What changed between the lines of a segment and those that it became."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum
from itertools import zip_longest

import numpy as np

from burnish.ir.views.block_hash import COMMUTATIVE, defaults_of
from burnish.tools.check.alignment import Group, Part
from burnish.tools.check.line import Constant, Parsed, constant
from burnish.tools.check.matching import opcodes, pairs
from burnish.tools.check.spelled import ACTIVATIONS, recognised, spelled

_ARITHMETIC = frozenset("Add Sub Mul Div Pow Sqrt Neg Reciprocal Cast Identity Erf Tanh Sigmoid".split())

_BIAS, _NORM, _LAYERS = "a bias", "BatchNormalization", ("Conv", "ConvTranspose", "Gemm")

_GAP = 2
"""Nodes that two spellings of an activation may have in common in the middle."""

TRAINING = "training"
"""What `Change.now` is for a node that is in training mode now."""


class Kind(StrEnum):
    """How something changed."""

    VALUE = "value"
    MODE = "mode"
    REPLACED = "replaced"
    ADDED = "added"
    GONE = "gone"
    WIRED = "wired"
    BLOCK_NEW = "block-new"
    BLOCK_GONE = "block-gone"


@dataclass(frozen=True)
class Change:
    """One change at one place.

    Attributes:
        kind: how.
        operator: of the node that changed; the layer or operators for what was added, is gone or was replaced.
        detail: what of the node: the name of an attribute, "the constant", "the weight".
        was, now: what it was and is.
        old: the segment and the line in the old model; None for what was added.
        new: likewise in the new model.
        removed, added: the lines that went and came.
    """

    kind: Kind
    operator: str
    detail: str = ""
    was: str = ""
    now: str = ""
    old: tuple[Part, int] | None = None
    new: tuple[Part, int] | None = None
    removed: tuple[Parsed, ...] = ()
    added: tuple[Parsed, ...] = ()

    @property
    def place(self) -> str:
        """The segment, by the name that it has now if it is still there."""
        spot = self.new or self.old
        return spot[0].name if spot is not None else ""


_Lines = Sequence[tuple[Part, int]]
_Range = tuple[int, int, int, int]


def changes(group: Group, opsets: tuple[int, int]) -> Iterator[Change]:
    """The changes inside a group of segments.

    Args:
        group: segments and what they became; not the same.
        opsets: of the standard domain, old and new.
    """
    old, new = _lines(group.old), _lines(group.new)
    for i1, i2, j1, j2 in _hunks(old, new):
        yield from _hunk(old[i1:i2], new[j1:j2], opsets)


def rewired(group: Group) -> Iterator[Change]:
    """The lines of a group that are the same except that they read other nodes."""
    old, new = _lines(group.old), _lines(group.new)
    for i1, i2, j1, _ in _matching(old, new):
        for one, other in zip(old[i1:i2], new[j1:], strict=False):
            before, after = _parsed(one), _parsed(other)
            was, now = Counter(before.computed), Counter(after.computed)
            if was != now or (before.computed != after.computed and before.operator not in COMMUTATIVE):
                first, second = _apart(before.computed, after.computed)
                yield Change(Kind.WIRED, before.operator, "", first, second, one, other, (before,), (after,))


def _apart(was: list[str], now: list[str]) -> tuple[str, str]:
    """What only one of two nodes reads, each as a list; all of it where it is the same in another order."""
    gone, come = Counter(was) - Counter(now), Counter(now) - Counter(was)
    sides = (sorted(gone.elements()), sorted(come.elements())) if gone and come else (was, now)
    return ", ".join(sides[0]), ", ".join(sides[1])


def _lines(parts: Sequence[Part]) -> list[tuple[Part, int]]:
    return [(part, index) for part in parts for index, line in enumerate(part.lines) if not line.copies]


def _parsed(spot: tuple[Part, int]) -> Parsed:
    return spot[0].lines[spot[1]]


def _codes(old: _Lines, new: _Lines) -> Iterator[tuple[str, int, int, int, int]]:
    numbers: dict[object, int] = {}
    one, other = ([numbers.setdefault(_parsed(spot).key, len(numbers)) for spot in lines] for lines in (old, new))
    yield from opcodes(one, other)


def _matching(old: _Lines, new: _Lines) -> Iterator[_Range]:
    return ((i1, i2, j1, j2) for tag, i1, i2, j1, j2 in _codes(old, new) if tag == "equal")


def _hunks(old: _Lines, new: _Lines) -> list[_Range]:
    """Ranges of lines that differ, without those that only stand elsewhere."""
    found = [(i1, i2, j1, j2) for tag, i1, i2, j1, j2 in _codes(old, new) if tag != "equal"]
    counted = [
        (Counter(_parsed(one).key for one in old[i1:i2]), Counter(_parsed(one).key for one in new[j1:j2]))
        for i1, i2, j1, j2 in found
    ]
    moved: set[int] = set()
    for index, (gone, come) in enumerate(counted):
        if gone == come:
            moved.add(index)
        elif gone and not come and index not in moved:
            other = next((k for k, (g, c) in enumerate(counted) if not g and c == gone and k not in moved), None)
            if other is not None:
                moved |= {index, other}
    return _joined([one for index, one in enumerate(found) if index not in moved], old, new)


def _joined(hunks: list[_Range], old: _Lines, new: _Lines) -> list[_Range]:
    """Hunks with those put together that are one activation which became another, though both have a node in common."""
    found: list[_Range] = []
    for hunk in hunks:
        if found:
            i1, i2, j1, _ = found[-1]
            gap = [_parsed(spot) for spot in old[i2 : hunk[0]]]
            near = len(gap) <= _GAP and all(line.operator in _ARITHMETIC and not line.constants for line in gap)
            whole = (i1, hunk[1], j1, hunk[3])
            sides = ([_parsed(spot) for spot in lines] for lines in (old[i1 : hunk[1]], new[j1 : hunk[3]]))
            if near and all(recognised(side) in ACTIVATIONS for side in sides):
                found[-1] = whole
                continue
        found.append(hunk)
    return found


def _hunk(old: _Lines, new: _Lines, opsets: tuple[int, int]) -> Iterator[Change]:
    """Lines that became others: pairs of the same operator, and runs between them."""
    before, after = [[(p.indent, p.operator) for p in map(_parsed, lines)] for lines in (old, new)]
    found: list[Change] = []
    i = j = 0
    for one, other in [*_anchors(old, new, before == after), (len(old), len(new))]:
        found += _run(old[i:one], new[j:other])
        if one < len(old):
            found += _pair(old[one], new[other], opsets)
        i, j = one + 1, other + 1
    yield from _folded(found)


def _folded(found: list[Change]) -> Iterator[Change]:
    """The changes of a hunk, with a norm that was folded into the layer before it, or is folded no longer, as one."""
    skip = -1
    for index, one in enumerate(found):
        following = found[index + 1] if index + 1 < len(found) else None
        if index == skip:
            continue
        if one.kind is Kind.WIRED and following is not None and _BIAS in (one.was, one.now):
            norm = following.removed[0] if len(following.removed) == 1 else None
            if following.kind is Kind.GONE and norm and (norm.operator, norm.computed) == (_NORM, [one.operator]):
                both, lines = f"{one.operator} and {_NORM}", (*one.removed, norm)
                now = f"{one.operator} with a bias"
                yield Change(Kind.REPLACED, "", "", both, now, one.old, one.new, lines, one.added)
                skip = index + 1
                continue
            if following.kind is Kind.MODE and one.was == _BIAS:
                continue
        yield one


def _anchors(old: _Lines, new: _Lines, all_alike: bool) -> list[tuple[int, int]]:
    """Pairs of lines of the same operator: all of them, or where the operators differ those that mean something alone.

    These are lines with weights, and operators that are no arithmetic and stand on each side once.
    """
    if all_alike:
        return [(index, index) for index in range(len(old))]
    counts = [Counter(_parsed(spot).operator for spot in lines) for lines in (old, new)]
    once = {name for name, count in counts[0].items() if count == counts[1][name] == 1} - _ARITHMETIC
    sides = []
    for lines in (old, new):
        parsed = [_parsed(spot) for spot in lines]
        chosen = [
            index
            for index, line in enumerate(parsed)
            if line.operator in once or any(one.is_weight for one in line.constants)
        ]
        sides.append((chosen, [(parsed[index].indent, parsed[index].operator) for index in chosen]))
    (left, one), (right, other) = sides
    return [(left[i], right[j]) for i, j in pairs(one, other)]


def _run(old: _Lines, new: _Lines) -> Iterator[Change]:
    """A run of nodes that became another one, was added or is gone."""
    removed, added = tuple(map(_parsed, old)), tuple(map(_parsed, new))
    training = [index for index, line in enumerate(added) if _trains(line)]
    for index in training:
        yield Change(Kind.MODE, added[index].operator, now=TRAINING, new=new[index], added=(added[index],))
    added = tuple(line for index, line in enumerate(added) if index not in training)
    first = next((spot for index, spot in enumerate(new) if index not in training), None)
    if removed and added:
        was = removed[0].operator if len(removed) == 1 else spelled(removed)
        yield Change(Kind.REPLACED, "", "", was, spelled(added), old[0], first, removed, added)
    elif added:
        yield Change(Kind.ADDED, spelled(added), new=first, added=added)
    elif removed and not training:
        yield Change(Kind.GONE, spelled(removed), old=old[0], removed=removed)


def _pair(old: tuple[Part, int], new: tuple[Part, int], opsets: tuple[int, int]) -> Iterator[Change]:
    """What changed of a node that is still the same operator."""
    one, other = _parsed(old), _parsed(new)
    if one.key == other.key:
        return
    if _trains(other) and not _trains(one):
        yield Change(Kind.MODE, other.operator, now=TRAINING, old=old, new=new)
        return
    was, now = dict(one.attributes), dict(other.attributes)
    moved = _moved(one, other)
    for name in sorted(was.keys() | now.keys()):
        if was.get(name) != now.get(name) and name not in moved:
            before = was.get(name) or _default(one.operator, name, opsets[0])
            after = now.get(name) or _default(one.operator, name, opsets[1])
            if before != after:
                yield Change(Kind.VALUE, one.operator, f"`{name}`", before, after, old, new)
    for name, (before, after) in moved.items():
        yield Change(Kind.VALUE, one.operator, f"`{name}`", before, after, old, new)
    if not moved:
        yield from _operands(old, new)


def _moved(one: Parsed, other: Parsed) -> dict[str, tuple[str, str]]:
    """Attributes that are an operand now, or the other way round, with the same value: newer opsets have it so."""
    was, now = dict(one.attributes), dict(other.attributes)
    less, more = ({str(c.values).replace(" ", "") for c in line.constants} for line in (one, other))
    kinds = ("an attribute", "an operand")
    found = {name: kinds for name in was.keys() - now.keys() if was[name].replace(" ", "") in more - less}
    return found | {name: kinds[::-1] for name in now.keys() - was.keys() if now[name].replace(" ", "") in less - more}


def _operands(old: tuple[Part, int], new: tuple[Part, int]) -> Iterator[Change]:
    one, other = _parsed(old), _parsed(new)
    pairs: Iterable[tuple[str, str]] = zip(one.operands, other.operands, strict=False)
    if one.operator in COMMUTATIVE or len(one.operands) != len(other.operands):
        was, now = Counter(one.operands), Counter(other.operands)
        pairs = zip_longest(sorted((was - now).elements()), sorted((now - was).elements()), fillvalue="")
    shapes: list[tuple[str, str]] = []
    for first, second in pairs:
        if first == second or not (one.is_fixed(first) or other.is_fixed(second) or not (first and second)):
            continue
        before, after = _constant(first, one), _constant(second, other)
        if before is None or after is None:
            shown = [_shown(text, line) for text, line in ((first, one), (second, other))]
            yield Change(Kind.WIRED, one.operator, "", shown[0], shown[1], old, new, (one,), (other,))
        elif not (before.is_weight or after.is_weight):
            texts = (str(before), str(after))
            if before.dtype != after.dtype and not (before.shape or after.shape):
                texts = (f"{before.dtype} {before}", f"{after.dtype} {after}")
            yield Change(Kind.VALUE, one.operator, _detail(old), *texts, old, new)
        elif before.dtype == after.dtype:
            shapes.append((f"[{before.shape}]", f"[{after.shape}]"))
        else:
            same = before.shape == after.shape
            texts = (before.dtype, after.dtype) if same else (str(before), str(after))
            yield Change(Kind.VALUE, one.operator, "the dtype of the weights", texts[0], texts[1], old, new)
    if shapes:
        first, second = (" and ".join(side) for side in zip(*shapes, strict=True))
        yield Change(Kind.VALUE, one.operator, "the shape of the weights", first, second, old, new)


def _shown(operand: str, line: Parsed) -> str:
    found = _constant(operand, line)
    if found is not None and found.is_weight and line.operator in _LAYERS and "," not in found.shape:
        return _BIAS
    return f"`{operand}`" if operand in line.inputs else operand


def _constant(operand: str, line: Parsed) -> Constant | None:
    return None if operand in line.inputs else constant(operand)


def _detail(spot: tuple[Part, int]) -> str:
    """What a constant in a line is."""
    line, after = _parsed(spot), spot[0].lines[spot[1] + 1 : spot[1] + 2]
    roots = ("Sqrt", "Pow", "Reciprocal")
    if line.operator == "Add" and "ReduceMean" in line.computed and any(one.operator in roots for one in after):
        return "the epsilon of a normalization, the constant"
    return "the constant"


def _default(operator: str, name: str, opset: int) -> str:
    known = defaults_of(operator, opset).get(name)
    if known is None:
        return "its default"
    return str(np.float32(known)) if "." in known and "[" not in known else known.replace(" ", "")


def _trains(line: Parsed) -> bool:
    """Whether a node does what is right in training only."""
    if line.operator == "BatchNormalization":
        return dict(line.attributes).get("training_mode", "0") != "0"
    return line.operator == "Dropout" and len(line.operands) > 2 and line.operands[2].endswith(" true")
