"""Whether the numbers that a router chooses are those by which matrices of experts are gathered."""

from __future__ import annotations

from collections.abc import Iterable

import onnx_ir as oir

from burnish.ir import match, weights
from burnish.ir.inference import Inference
from burnish.ir.walk import is_op

_COMPUTES = ("Add", "Sub", "Mul", "Div", "Mod", "Min", "Max", "Clip", "Neg", "Abs")
_ENDS = ("TopK", "NonZero", "OneHot", "Loop", "Scan", "If")
"""Operators above which an integer is no number of an expert, or the one that was chosen."""


def altered(
    gathers: Iterable[oir.Node], indices: oir.Value, count: int, chosen: int, facts: Inference
) -> str | None:  # fmt: skip
    """Why the numbers that matrices are gathered by are not those that were chosen, in plain words; None when they are.

    Args:
        gathers: the nodes that gather matrices.
        indices: the numbers that were chosen, int64 [..., chosen].
        count: experts.
        chosen: experts for each token.
        facts: what is proven of the model.
    """
    below = _below(indices, facts)
    pending = [value for node in gathers if (value := match.input_of(node, 1)) is not None]
    seen: set[oir.Value] = set()
    while pending:
        value = pending.pop()
        node = value.producer()
        if value in seen or value not in below or node is None or is_op(node, *_ENDS):
            continue
        seen.add(value)
        if is_op(node, *_COMPUTES) and not _wraps(node, count):
            return f"{match.describe(node)} changes the numbers of the chosen experts"
        if is_op(node, "Slice") and _cuts(node, chosen, facts):
            return f"{match.describe(node)} takes only some of the chosen experts"
        pending += [one for one in node.inputs if one is not None]
    return None


def _below(indices: oir.Value, facts: Inference) -> set[oir.Value]:
    """The integers that are computed from `indices`."""
    found, pending = set[oir.Value](), [indices]
    while pending:
        value = pending.pop()
        dtype = facts.dtype(value)
        if value not in found and dtype is not None and dtype.is_integer():
            found.add(value)
            pending += [out for node in match.consumers(value) for out in node.outputs]
    return found


def _wraps(node: oir.Node, count: int) -> bool:
    """Whether a node counts negative numbers from the end, which no chosen one is."""
    pair = match.with_constant(node) if is_op(node, "Add") else None
    return pair is not None and weights.integers(pair[1]) == [count]


def _cuts(node: oir.Node, chosen: int, facts: Inference) -> bool:
    before, after = facts.shape(node.inputs[0]), facts.shape(node.outputs[0])
    if not before or not after or before[-1] != chosen or after[-1] == chosen or node.inputs[0] is None:
        return False
    return sum(not is_op(one, "Shape", "Size") for one in match.consumers(node.inputs[0])) == 1
