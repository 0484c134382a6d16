"""Changes of structure that only follow from the contract: other types of inputs, other opsets."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

from burnish.tools.check.changes import Change, Kind

_SHAPES = frozenset(
    "Shape Size Gather Unsqueeze Squeeze Concat Slice Cast Range Expand ConstantOfShape Reshape Identity Flatten Tile "
    "Where Equal Mul Add Sub Div".split()
)
_ARITHMETIC = frozenset("Where Equal Mul Add Sub Div Expand Tile Flatten Identity".split())
_NUMBER = re.compile(r"-?\d+")
_INTEGERS = ("int64[", "int32[")
_SIZES = frozenset("Reshape Expand Tile ConstantOfShape Concat Range".split())
"""Operators whose integer constants are sizes; those of the others may be the place of something."""

_SPELLINGS = frozenset((("Reshape", "`allowzero`"), ("Shape", "`start`"), ("Shape", "`end`")))
"""Attributes that exporters set differently for the same shape."""

_MEANINGFUL = frozenset(("an attribute", "an operand"))


@dataclass(frozen=True)
class Context:
    """What differs in the contract, as far as structure can follow from it.

    Attributes:
        retyped: inputs, by their old name, with another dtype.
        reshaped: whether dimensions of inputs became fixed or dynamic.
        opset: whether the opset of the standard domain differs.
        outputs: whether there are other outputs than before, or in another order.
        renamed: the old name of inputs that have another one now.
        ran: whether the outputs of both on the same samples are known.
    """

    retyped: frozenset[str] = frozenset()
    reshaped: bool = False
    opset: bool = False
    outputs: bool = False
    renamed: Mapping[str, str] = field(default_factory=dict)
    ran: bool = False

    @property
    def reason(self) -> str:
        """What the structure follows from, as the begin of a sentence."""
        causes = [
            "the dtypes of inputs" * bool(self.retyped),
            "the dimensions of inputs" * self.reshaped,
            "the opset" * self.opset,
        ]
        return f"with {' and '.join(filter(None, causes))},"


def follows(change: Change, context: Context) -> bool:
    """Whether a change of structure is what a change of the contract leads to."""
    if change.kind in (Kind.BLOCK_NEW, Kind.BLOCK_GONE, Kind.MODE):
        return False
    lines = [*change.removed, *change.added]
    if context.opset and {change.was, change.now} == _MEANINGFUL:
        return True
    if context.retyped and lines and all(line.operator == "Cast" for line in lines):
        return True
    return context.reshaped and only_shapes(change)


def only_shapes(change: Change) -> bool:
    """Whether a change is of nodes that compute shapes, or of what is read as a shape."""
    whole = [text.startswith(_INTEGERS) for text in (change.was, change.now)]
    if change.kind is Kind.VALUE:
        spelling = (change.operator, change.detail) in _SPELLINGS
        sizes = change.operator in _SIZES and all(whole) and change.detail == "the constant"
        return spelling or (sizes and _same_sizes(change.was, change.now))
    if change.kind is Kind.WIRED:
        others = {one for text, integer in zip((change.was, change.now), whole, strict=True) if not integer
                  for one in text.split(", ")}  # fmt: skip
        return change.operator in _SHAPES and any(whole) and others <= _SHAPES
    lines = [*change.removed, *change.added]
    operators = {line.operator for line in lines}
    if not operators <= _SHAPES or operators <= _ARITHMETIC:
        return False
    return all(
        not one.is_weight and one.dtype in ("int64", "int32", "bool") for line in lines for one in line.constants
    )


def _same_sizes(was: str, now: str) -> bool:
    """Whether two constants can be the same shape: sizes that differ are computed (0 or -1) in one of them."""
    pairs = zip(*([int(one) for one in _NUMBER.findall(text.partition("] ")[2])] for text in (was, now)), strict=False)
    return was.partition(" ")[0] == now.partition(" ")[0] and all(a == b or a <= 0 or b <= 0 for a, b in pairs)
