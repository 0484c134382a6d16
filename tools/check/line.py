"""A line of a segment, taken apart: operator, what it reads, attributes."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from burnish.ir.segments import ENTRY
from burnish.ir.views.block_hash import COMMUTATIVE

_CONSTANT = re.compile(r"([a-z0-9_]+)\[([\d,]*)\](?: (.*))?", re.DOTALL)
_OPENING, _CLOSING = "([{", ")]}"
_COMPUTED = "·"


@dataclass(frozen=True)
class Constant:
    """A constant as a line shows it: dtype, shape, and its values where they are shown."""

    dtype: str
    shape: str
    values: str | None

    def __str__(self) -> str:
        kind = f"{self.dtype}[{self.shape}]"
        return kind if self.values is None else f"{kind} {self.values}" if self.shape else self.values

    @property
    def is_weight(self) -> bool:
        """Whether its values are too many to be shown, or floating point in an array."""
        return self.values is None


@dataclass(frozen=True)
class Parsed:
    """A line taken apart.

    Attributes:
        indent: how many graphs are around it.
        operator: with its domain.
        operands: what it reads, as text; the graph's inputs by the names that the old model has for them.
        attributes: names and values as text, in order.
        inputs: the names among the operands that are inputs of the model.
    """

    indent: int
    operator: str
    operands: tuple[str, ...]
    attributes: tuple[tuple[str, str], ...]
    inputs: frozenset[str]

    @cached_property
    def key(self) -> tuple[object, ...]:
        """All but which nodes it reads: what does not change when a node before it is exchanged."""
        shown = [one if self.is_fixed(one) else _COMPUTED for one in self.operands]
        if self.operator in COMMUTATIVE:
            shown.sort()
        return self.indent, self.operator, tuple(shown), self.attributes

    def is_fixed(self, operand: str) -> bool:
        """Whether an operand is a constant, an input or absent."""
        return operand == "_" or operand in self.inputs or constant(operand) is not None

    @property
    def copies(self) -> bool:
        """Whether it only copies a constant; exporters write such nodes for constants of equal values."""
        return self.operator == "Identity" and len(self.constants) == 1

    @property
    def constants(self) -> list[Constant]:
        """The constants it reads, in order."""
        return [found for one in self.operands if one not in self.inputs and (found := constant(one)) is not None]

    @property
    def computed(self) -> list[str]:
        """The operators whose results it reads, the entry of the block included."""
        return [one.split(".")[0] if one != ENTRY else one for one in self.operands if not self.is_fixed(one)]

    def __str__(self) -> str:
        shown = "".join(f" {name}={value}" for name, value in self.attributes)
        return f"{self.operator}({', '.join(self.operands)}){shown}"


def constant(operand: str) -> Constant | None:
    """The constant that an operand is; None when it is computed."""
    found = _CONSTANT.fullmatch(operand)
    return None if found is None else Constant(found[1], found[2], found[3])


def parse(text: str, inputs: Collection[str], renamed: Mapping[str, str] | None = None) -> Parsed:
    """Take a line apart; one that cannot be is an operator of its own.

    Args:
        text: as `burnish.ir.segments` writes it.
        inputs: the names of the inputs of the model, as the old model has them.
        renamed: the old name of inputs that have another one now.
    """
    body = text.lstrip(" ")
    indent = (len(text) - len(body)) // 2
    operator, bracket, rest = body.partition("(")
    end = _end(rest)
    if not bracket or end is None:
        return Parsed(indent, body, (), (), frozenset())
    operands = tuple((renamed or {}).get(one, one) for one in _split(rest[:end], ", "))
    attributes: list[tuple[str, str]] = []
    for part in _split(rest[end + 1 :].strip(), " "):
        name, sign, value = part.partition("=")
        if attributes and not (sign and name.isidentifier()):
            attributes[-1] = (attributes[-1][0], f"{attributes[-1][1]} {part}")
        else:
            attributes.append((name, value))
    return Parsed(indent, operator, operands, tuple(attributes), frozenset(one for one in operands if one in inputs))


def seen_through(lines: Sequence[Parsed], all_copies: Collection[Parsed]) -> tuple[Parsed, ...]:
    """The lines of a segment with the constants in the place of their copies, as far as it is clear which.

    Args:
        lines: of the segment.
        all_copies: the lines of the whole model that only copy a constant; empty when other values are copied too.
    """
    own = {line.operands[0] for line in lines if line.copies}
    known = own or {line.operands[0] for line in all_copies}
    if not all_copies or len(known) != 1:
        return tuple(lines)
    (shown,) = known
    return tuple(
        replace(line, operands=tuple(shown if one == "Identity" else one for one in line.operands)) for line in lines
    )


def _end(text: str) -> int | None:
    """Where the bracket closes that was opened before `text`."""
    return next((index for index, depth in _depths(text) if depth < 0), None)


def _split(text: str, separator: str) -> list[str]:
    """The parts between separators that stand in no bracket and no quotes."""
    found, start = [], 0
    for index, depth in _depths(text):
        if depth == 0 and text.startswith(separator, index):
            found.append(text[start:index])
            start = index + len(separator)
    return [one for one in [*found, text[start:]] if one]


def _depths(text: str) -> list[tuple[int, int]]:
    """Each position outside quotes with the number of brackets open behind it."""
    found, depth, quote, skip = [], 0, "", False
    for index, sign in enumerate(text):
        if skip:
            skip = False
        elif quote:
            skip, quote = sign == "\\", "" if sign == quote else quote
        elif sign in "'\"":
            quote = sign
        else:
            depth += (sign in _OPENING) - (sign in _CLOSING)
            found.append((index, depth))
    return found
