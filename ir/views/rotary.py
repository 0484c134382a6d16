"""Rotary position embedding in every spelling: pairs of elements of each head turned by an angle.

    y[i] = x[i] * cos - x[j] * sin,    y[j] = x[j] * cos + x[i] * sin

where the pair (i, j) lies half a head apart, or side by side (`interleaved`).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import onnx_ir as oir

from burnish.ir import match
from burnish.ir.inference import Inference
from burnish.ir.views.attention import Miss
from burnish.ir.walk import is_op, walk


@dataclass(frozen=True)
class Rotary:
    """One rotary embedding.

    Attributes:
        anchor: the Neg or Sub in its middle, or the operator that is the whole.
        x: what is turned; [batch, heads, sequence, size] where `find_rotaries` gives it.
        y: the result, of the same shape.
        cos, sin: what multiplies; for `whole` tables an element for each element of a head, else one for each pair.
        whole: see `cos`; both elements of a pair have to find the same number there.
        interleaved: pairs lie side by side.
        nodes: the nodes from `x` to `y`.
    """

    anchor: oir.Node
    x: oir.Value
    y: oir.Value
    cos: oir.Value
    sin: oir.Value
    whole: bool
    interleaved: bool
    nodes: tuple[oir.Node, ...]


def find_rotaries(model: oir.Model, facts: Inference | None = None) -> Iterator[Rotary | Miss]:
    """Every rotary embedding of the model in graph order, and the near misses with their reasons."""
    known = facts if facts is not None else Inference(model)
    for node in walk(model, "Neg", "Sub"):
        found = read_rotary(node, known) if node.graph is not None else None
        if found is not None:
            yield _checked(found, known) if isinstance(found, Rotary) else found


def read_rotary(node: oir.Node, facts: Inference) -> Rotary | Miss | None:
    """The rotary embedding around a Neg or Sub, whatever the order of the axes of x but the last and of the tables."""
    return _turned(node, facts) if node.op_type == "Neg" else _pairwise(node, facts)


@dataclass(frozen=True)
class _Part:
    """`first` or second element of each pair of `x`."""

    x: oir.Value
    first: bool
    interleaved: bool
    node: oir.Node


def _part(value: oir.Value | None, facts: Inference) -> _Part | None:
    """Which elements of the last axis of what `value` is; None when it is not half of them."""
    node = match.producer(value, "Split", "Slice")
    source = node.inputs[0] if node is not None else None
    whole, part = facts.shape(source), facts.shape(value)
    if node is None or value is None or source is None or not whole or not part:
        return None
    size = whole[-1]
    if not isinstance(size, int) or size % 2 or part != (*whole[:-1], size // 2):
        return None
    if node.op_type == "Split":
        last = match.attribute(node, "axis", 0) % len(whole) == len(whole) - 1
        return _Part(source, value is node.outputs[0], False, node) if last and len(node.outputs) == 2 else None
    start, step = (facts.numbers(match.input_of(node, index)) for index in (1, 4))
    if start is None or len(start) != 1:
        return None
    if step is None or step == [1]:
        return _Part(source, start[0] == 0, False, node)
    return _Part(source, start[0] == 0, True, node) if step == [2] and start[0] in (0, 1) else None


def _only(value: oir.Value, *ops: str) -> oir.Node | None:
    return match.sole_reader(value, *ops)


def _woven(value: oir.Value, facts: Inference) -> tuple[oir.Value, list[oir.Node], int, bool] | None:
    """Follow one element of each pair into the tensor of both: (that tensor, nodes, which input, interleaved)."""
    unsqueeze = _only(value, "Unsqueeze")
    joined = unsqueeze.outputs[0] if unsqueeze is not None else value
    concat = _only(joined, "Concat")
    if concat is None or len(concat.inputs) != 2:
        return None
    shape = facts.shape(concat.outputs[0])
    if shape is None or match.attribute(concat, "axis", 0) % len(shape) != len(shape) - 1:
        return None
    place = list(concat.inputs).index(joined)
    if unsqueeze is None:
        return concat.outputs[0], [concat], place, False
    reshape = _only(concat.outputs[0], "Reshape")
    before, after = facts.shape(value), facts.shape(reshape.outputs[0]) if reshape is not None else None
    if reshape is None or before is None or after is None or not isinstance(before[-1], int):
        return None
    if match.axes_of(unsqueeze) not in ([-1], [len(before)]) or after != (*before[:-1], 2 * before[-1]):
        return None
    return reshape.outputs[0], [unsqueeze, concat, reshape], place, True


def _unstacked(value: oir.Value | None, interleaved: bool) -> oir.Value | None:
    """The other element of a pair on its way into the tensor of both."""
    node = match.producer(value, "Unsqueeze") if interleaved else None
    return (node.inputs[0] if node is not None else None) if interleaved else value


def _other(node: oir.Node, value: oir.Value) -> oir.Value | None:
    left, right = node.inputs
    return right if left is value else left


def _turned(node: oir.Node, facts: Inference) -> Rotary | Miss | None:
    """x * cos + turned(x) * sin, where turned(x) = (-x2, x1)."""
    second = _part(node.inputs[0], facts)
    if second is None or second.first:
        return None
    woven = _woven(node.outputs[0], facts)
    if woven is None or woven[2] != 0 or woven[3] != second.interleaved:
        return None
    turned, nodes, _, interleaved = woven
    concat = next(one for one in nodes if one.op_type == "Concat")
    first = _part(_unstacked(concat.inputs[1], interleaved), facts)
    if first is None or not first.first or first.interleaved != interleaved or first.x is not second.x:
        return None
    times_sin = _only(turned, "Mul")
    total = _only(times_sin.outputs[0], "Add") if times_sin is not None else None
    if times_sin is None or total is None:
        return Miss(node, "the turned half is read elsewhere as well")
    times_cos = match.producer(_other(total, times_sin.outputs[0]), "Mul")
    if times_cos is None or second.x not in times_cos.inputs or _only(times_cos.outputs[0]) is not total:
        return Miss(node, "no product with cosines is added to the one with sines")
    cos, sin = _other(times_cos, second.x), _other(times_sin, turned)
    assert cos is not None and sin is not None
    inner = [first.node, second.node, node, *nodes, times_sin, times_cos, total]
    return Rotary(node, second.x, total.outputs[0], cos, sin, True, interleaved, tuple(dict.fromkeys(inner)))


def _pairwise(node: oir.Node, facts: Inference) -> Rotary | Miss | None:
    """(x1 * cos - x2 * sin, x2 * cos + x1 * sin) joined."""
    left, right = (match.producer(value, "Mul") for value in node.inputs)
    if left is None or right is None:
        return None
    a, b = _split_product(left, facts), _split_product(right, facts)
    if a is None or b is None or a[0].x is not b[0].x or not a[0].first or b[0].first:
        return None
    woven = _woven(node.outputs[0], facts)
    if woven is None or woven[2] != 0 or not a[0].interleaved == b[0].interleaved == woven[3]:
        return None
    y, nodes, _, interleaved = woven
    concat = next(one for one in nodes if one.op_type == "Concat")
    total = match.producer(_unstacked(concat.inputs[1], interleaved), "Add")
    products = [match.producer(value, "Mul") for value in total.inputs] if total is not None else []
    parts = [_split_product(one, facts) for one in products if one is not None]
    wanted = {(False, id(a[1])), (True, id(b[1]))}
    if (
        total is None
        or len(parts) != 2
        or {(part[0].first, id(part[1])) for part in parts if part is not None} != wanted
    ):
        return Miss(node, "the second half is not x2 * cos + x1 * sin")
    inner = [a[0].node, b[0].node, left, right, node, *(one for one in products if one is not None), total, *nodes]
    return Rotary(node, a[0].x, y, a[1], b[1], False, interleaved, tuple(dict.fromkeys(inner)))


def _split_product(node: oir.Node, facts: Inference) -> tuple[_Part, oir.Value] | None:
    """For a product of half of a tensor with something, (the half, the something)."""
    for half, factor in (tuple(node.inputs), tuple(reversed(node.inputs))):
        found = _part(half, facts)
        if found is not None and factor is not None:
            return found, factor
    return None


def _checked(found: Rotary, facts: Inference) -> Rotary | Miss:
    """`found` when its tables are laid out as [batch or 1, 1, sequence, table], the batch and sequence those of x."""
    x, y = facts.shape(found.x), facts.shape(found.y)
    if x is None or len(x) != 4 or x != y or not isinstance(x[3], int):
        return Miss(found.anchor, "the tables may be larger than the heads")
    if any(is_op(one, "Shape", "Size") for node in found.nodes[:-1] for one in match.consumers(node.outputs[0])):
        return Miss(found.anchor, "an inner value is asked for its size")
    width = x[3] if found.whole else x[3] // 2
    for table in (found.cos, found.sin):
        shape = facts.shape(table)
        if shape is None or len(shape) > 4 or len(shape) < 2 or shape[-1] != width:
            return Miss(found.anchor, "the tables are not known to have a column for each element")
        if shape[-2] != x[2]:
            return Miss(found.anchor, "the tables are not known to have a row for each position")
        if len(shape) > 2 and shape[-3] != 1:
            return Miss(found.anchor, "the heads have tables of their own")
    return found


def same_halves(array: np.ndarray, interleaved: bool) -> np.ndarray | None:
    """The numbers of a table [..., 2 r] by pair, [..., r], when both elements of each pair have the same; else None."""
    half = array.shape[-1] // 2
    a, b = (array[..., 0::2], array[..., 1::2]) if interleaved else (array[..., :half], array[..., half:])
    return a if np.array_equal(a, b) else None
