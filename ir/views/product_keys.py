"""The view of a product-key lookup: the best sums of two short lists of scores, and the rows of a table they choose.

A query is cut in two halves, each scored against n keys; the k best of each half are added in all pairs, and the k best
pairs choose rows of a table of n * n (Lample et al. 2019, arXiv:1907.05242; Memory Layers at Scale, arXiv:2412.09764).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import onnx_ir as oir

from burnish.ir import dims, match, weights
from burnish.ir.dims import Dim
from burnish.ir.inference import Inference
from burnish.ir.views.attention import Miss
from burnish.ir.views.heads import selected
from burnish.ir.views.parameter import Parameter, find_parameter
from burnish.ir.walk import is_op, walk

Shape = tuple[Dim, ...]

MOVES = ("Identity", "Reshape", "Flatten", "Squeeze", "Unsqueeze")
"""Operators that keep elements in their order."""

_TABLES = (("", "Gather"), ("com.microsoft", "GatherBlockQuantized"))


@dataclass(frozen=True)
class Half:
    """The best keys of one half of the query.

    Attributes:
        top: the TopK that finds them; of both halves, where they are stacked.
        values: their scores, [..., k], the largest first.
        pick: (axis, index) of the half in what `top` gives; None where it finds those of this half alone.
        keys: how many there are to choose from.
        parameter: the keys that the query is multiplied with; None where the scores are no product with a constant.
        sets: matrices of keys, one for each head.
    """

    top: oir.Node
    values: oir.Value
    pick: tuple[int, int] | None
    keys: int
    parameter: Parameter | None
    sets: int


@dataclass(frozen=True)
class Rows:
    """The row of the table that each of the best pairs stands for: `stride * outer + inner`.

    Attributes:
        value: the rows, [..., k].
        outer, inner: the chosen keys of each half, [..., k of the half].
        stride: a constant of one number, times which the outer key counts.
        last: the node that computes `value`.
        late: the keys are looked up for the best pairs alone, not for all pairs.
    """

    value: oir.Value
    outer: oir.Value
    inner: oir.Value
    stride: oir.Value
    last: oir.Node
    late: bool


@dataclass(frozen=True)
class ProductKeys:
    """A product-key lookup.

    Attributes:
        anchor: the TopK that chooses among all pairs.
        outer, inner: the two halves; pair number i * k + j is that of key i of `outer` and key j of `inner`.
        pairs: the sums of all pairs, flat: what `anchor` reads.
        kept: how many pairs are chosen.
        lead: the axes before the last.
        rows: None where what is done with the best pairs is not understood.
        tables: the nodes that look rows up.
    """

    anchor: oir.Node
    outer: Half
    inner: Half
    pairs: oir.Value
    kept: int
    lead: Shape
    rows: Rows | None
    tables: tuple[oir.Node, ...]

    @property
    def lists(self) -> tuple[int, int]:
        """How many keys of each half are paired."""
        return match.dim(self.outer.values, -1) or 0, match.dim(self.inner.values, -1) or 0

    @property
    def heads(self) -> int:
        """Lookups that each query makes with keys of its own."""
        return self.outer.sets

    @property
    def table(self) -> tuple[int, int] | None:
        """Rows and numbers in a row of the first table; None when no table is known."""
        for node in self.tables:
            found = find_parameter(node.inputs[0])
            width = match.dim(node.outputs[0], -1)
            if found is not None and len(found.shape) == 2:
                return found.shape[0], width or found.shape[1]
        return None


def product_keys(model: oir.Model, facts: Inference | None = None) -> Iterator[ProductKeys | Miss]:
    """The product-key lookups of the main graph, and why what nearly is one is none."""
    known = facts if facts is not None else Inference(model)
    for node in walk(model, "TopK"):
        if node.graph is model.graph:
            found = _find(node, known)
            if found is not None:
                yield found


def best_pairs(first: int, second: int, kept: int) -> np.ndarray:
    """The pairs among which the `kept` largest sums of two lists with the largest first always are: int64 [pairs, 2].

    Pair (i, j), counted from 0, has (i + 1) (j + 1) - 1 others, (i', j') with i' <= i and j' <= j, whose sums are not
    smaller, also when rounded, and which come before it in row-major order. TopK takes the first of equal numbers, so a
    pair with `kept` or more others is never taken. The order of the pairs stays the row-major one.
    """
    found = [(i, j) for i in range(first) for j in range(second) if (i + 1) * (j + 1) <= kept]
    return np.array(found, np.int64).reshape(-1, 2)


def _find(node: oir.Node, facts: Inference) -> ProductKeys | Miss | None:
    kept = _number_of(node, facts)
    flat = facts.shape(node.inputs[0])
    above = node.inputs[0]
    while (move := match.producer(above, *MOVES)) is not None:
        above = move.inputs[0]
    add = match.producer(above, "Add")
    shape = facts.shape(above)
    if add is None or above is None or shape is None or flat is None or len(shape) != len(flat) + 1:
        return None
    lanes = [_lane(value, shape, facts) for value in add.inputs if value is not None]
    by_place = {place: value for value, place in (one for one in lanes if one is not None)}
    if len(by_place) != 2:
        return None
    outer, inner = (_half(by_place[place], (*shape[:-2], shape[place]), facts, 0) for place in (-2, -1))
    if outer is None or inner is None:
        return None
    if not _is_last(node, flat) or not match.attribute(node, "largest", 1):
        return Miss(node, "it does not choose the largest sums")
    if (outer.top, outer.pick) == (inner.top, inner.pick):
        return Miss(node, "both terms of its sums are the same scores")
    if kept is None or not all(isinstance(size, int) for size in shape[-2:]):
        return Miss(node, "how many pairs are chosen is not constant")
    if not same((*shape[:-2], dims.multiply(*shape[-2:])), flat):
        return Miss(node, "its pairs are not in the order of the two lists")
    for one in (outer, inner):
        if not match.attribute(one.top, "largest", 1) or not match.attribute(one.top, "sorted", 1):
            return Miss(node, "the scores of the halves are not sorted with the largest first")
    rows = _rows(node, outer, inner, shape, facts)
    tables = tuple(_lookups(rows.value)) if rows is not None else ()
    return ProductKeys(node, outer, inner, node.inputs[0], kept, shape[:-2], rows, tables)  # type: ignore[arg-type]


def same(one: Shape, other: Shape) -> bool:
    """Whether two shapes of equally many elements are equal: all sizes but at most one are proven to be."""
    if len(one) != len(other):
        return False
    differing = [(a, b) for a, b in zip(one, other, strict=True) if a != b]
    return len(differing) <= 1 and not any(isinstance(a, int) and isinstance(b, int) for a, b in differing)


def _is_last(node: oir.Node, shape: Shape) -> bool:
    return int(match.attribute(node, "axis", -1)) % len(shape) == len(shape) - 1


def _number_of(node: oir.Node, facts: Inference) -> int | None:
    found = facts.numbers(match.input_of(node, 1))
    return found[0] if found is not None and len(found) == 1 else None


def _lane(value: oir.Value, whole: Shape, facts: Inference) -> tuple[oir.Value, int] | None:
    """What is spread over [..., first, second], and along which of the two last axes it runs."""
    while True:
        shape = facts.shape(value)
        if shape is None or len(shape) != len(whole):
            return None
        if 1 in shape[-2:]:
            break
        node = match.producer(value, "Expand", "Identity")
        if node is None or node.inputs[0] is None:
            return None
        value = node.inputs[0]
    place = -2 if shape[-1] == 1 else -1
    if whole[-1] == 1 or whole[-2] == 1 or shape[place] != whole[place] or shape[-3 - place] != 1:
        return None
    return (value, place) if same(shape[:-2], whole[:-2]) else None


def _half(value: oir.Value, wanted: Shape, facts: Inference, output: int) -> Half | None:
    """The TopK whose output number `output` is `value`, at the place where its shape is `wanted`."""
    place: oir.Value | None = None
    pick: tuple[int, int] | None = None
    current = value
    while True:
        shape = facts.shape(current)
        if place is None and shape is not None and same(shape, wanted):
            place = current
        node = current.producer()
        if node is None or match.input_of(node, 0) is None:
            return None
        if is_op(node, "TopK"):
            break
        if is_op(node, *MOVES) and pick is None:
            current = node.inputs[0]  # type: ignore[assignment]
        elif is_op(node, "Gather", "Split", "Slice") and pick is None:
            found = selected(node, current, facts)
            if found is None:
                return None
            pick, current = found[:2], node.inputs[0]  # type: ignore[assignment]
        else:
            return None
    whole = facts.shape(node.inputs[0])
    given = facts.shape(node.outputs[output])
    if place is None or whole is None or not _is_last(node, whole) or node.outputs[output] is not current:
        return None
    if given is None or given[-1] != wanted[-1]:  # several lists, one behind the other, are not sorted
        return None
    if not isinstance(whole[-1], int) or (pick is not None and pick[0] == len(whole) - 1):
        return None
    parameter, sets = _keys(node.inputs[0])
    return Half(node, place, pick, whole[-1], parameter, max(sets // (whole[pick[0]] if pick else 1), 1))  # type: ignore[operator]


def _keys(scores: oir.Value | None) -> tuple[Parameter | None, int]:
    """The constant that scores are a product with, up to a factor, and how many matrices it has."""
    while (node := match.producer(scores, *MOVES, "Transpose", "Mul", "Div")) is not None:
        scaled = match.with_scalar(node) if is_op(node, "Mul", "Div") else (node.inputs[0], 1.0)
        if scaled is None:
            return None, 1
        scores = scaled[0]
    product = match.producer(scores, "MatMul", "Gemm", "Einsum")
    for value in product.inputs[:2] if product is not None else ():
        found = find_parameter(value)
        if found is not None:
            return found, math.prod(found.shape[:-2])
        pick = match.producer(value, "Gather")
        found = find_parameter(pick.inputs[0]) if pick is not None and weights.is_constant(pick.inputs[1]) else None
        if found is not None and pick is not None:
            return found, math.prod(found.shape[:-2]) // max(found.shape[match.attribute(pick, "axis", 0)], 1)
    return None, 1


def _rows(node: oir.Node, outer: Half, inner: Half, shape: Shape, facts: Inference) -> Rows | None:
    at = node.outputs[1]
    for user in match.consumers(at):
        if is_op(user, "GatherElements") and user.inputs[1] is at and _is_last(user, facts.shape(at) or (0,)):
            found = _of_all_pairs(user, outer, inner, shape, facts)
            if found is not None:
                return found
    first = _late(outer, "Div", at, shape, facts)
    second = _late(inner, "Mod", at, shape, facts)
    if first is None or second is None:
        return None
    for times in match.consumers(first.outputs[0]):
        stride = _other(times, first.outputs[0]) if is_op(times, "Mul") else None
        for add in match.consumers(times.outputs[0]) if weights.scalar(stride) is not None else ():
            if is_op(add, "Add") and _other(add, times.outputs[0]) is second.outputs[0]:
                return Rows(add.outputs[0], first.inputs[0], second.inputs[0], stride, add, True)  # type: ignore[arg-type]
    return None


def _of_all_pairs(user: oir.Node, outer: Half, inner: Half, shape: Shape, facts: Inference) -> Rows | None:
    """Rows that are computed for all pairs before those of the best are looked up."""
    data = user.inputs[0]
    while (move := match.producer(data, *MOVES)) is not None:
        data = move.inputs[0]
    add = match.producer(data, "Add")
    if add is None or not same(facts.shape(data) or (), shape):
        return None
    places: dict[int, tuple[oir.Value, oir.Value | None]] = {}
    for side in add.inputs:
        value, stride = side, None
        times = match.producer(value, "Mul")
        if times is not None:
            pair = match.with_constant(times)
            if pair is None or weights.scalar(pair[1]) is None:
                return None
            value, stride = pair
        lane = _lane(value, shape, facts) if value is not None else None
        if lane is None:
            return None
        places[lane[1]] = lane[0], stride
    if len(places) != 2 or places[-1][1] is not None or places[-2][1] is None:
        return None
    keys = [_half(places[place][0], (*shape[:-2], shape[place]), facts, 1) for place in (-2, -1)]
    for found, half in zip(keys, (outer, inner), strict=True):
        if found is None or found.top is not half.top or found.pick != half.pick:
            return None
    return Rows(user.outputs[0], keys[0].values, keys[1].values, places[-2][1], user, False)  # type: ignore[union-attr]


def _late(half: Half, op_type: str, at: oir.Value, shape: Shape, facts: Inference) -> oir.Node | None:
    """The GatherElements that looks up the keys of a half for the best pairs: number at / second, or at % second."""
    for user in (user for value in _layouts(half.top.outputs[1]) for user in match.consumers(value)):
        if not is_op(user, "GatherElements") or not _is_last(user, facts.shape(user.inputs[1]) or (0,)):
            continue
        found = _half(user.inputs[0], facts.shape(user.inputs[0]) or (), facts, 1)  # type: ignore[arg-type]
        index = user.inputs[1].producer() if user.inputs[1] is not None else None
        if found is None or found.pick != half.pick or index is None:
            continue
        if isinstance(shape[-1], int) and _reads(index, at, shape[-1], op_type):
            return user
    return None


def _layouts(value: oir.Value) -> list[oir.Value]:
    """A value, and what is picked from it or has its elements in the same order."""
    found = [value]
    for one in found:
        for user in match.consumers(one):
            if is_op(user, *MOVES, "Gather", "Split", "Slice") and user.inputs[0] is one:
                found += user.outputs
    return found


def _reads(node: oir.Node, at: oir.Value, by: int, op_type: str) -> bool:
    """Whether a node computes `at // by` or `at % by` of numbers that are not negative."""
    if is_op(node, "Sub") and op_type == "Div":  # torch's floor division: 1 is taken off where a number is negative
        cast = match.producer(node.inputs[1], "Cast")
        both = match.producer(cast.inputs[0], "And") if cast is not None else None
        equal = match.producer(both.inputs[0], "Equal") if both is not None else None
        less = match.producer(equal.inputs[0], "Less") if equal is not None else None
        if less is None or less.inputs[0] is not at or weights.scalar(less.inputs[1]) != 0.0:
            return False
        if equal is None or weights.scalar(equal.inputs[1]) != 1.0 or node.inputs[0] is None:
            return False
        inner = node.inputs[0].producer()
        return inner is not None and _reads(inner, at, by, "Div")
    return is_op(node, op_type) and node.inputs[0] is at and weights.scalar(node.inputs[1]) == by


def _other(node: oir.Node, value: oir.Value) -> oir.Value | None:
    found = [one for one in node.inputs if one is not value]
    return found[0] if len(found) == 1 else None


def _lookups(rows: oir.Value) -> Iterator[oir.Node]:
    for value in _layouts(rows):
        for user in match.consumers(value):
            if (user.domain, user.op_type) in _TABLES and user.inputs[1] is value:
                if find_parameter(user.inputs[0]) is not None and match.attribute(user, "axis", 0) == 0:
                    yield user
