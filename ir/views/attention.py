"""Scaled dot-product attention in every spelling, found by what it computes.

    y = softmax(scale * q @ k^T + mask) @ v

over heads; the mask is any value that broadcasts to the scores, and never interpreted here.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import onnx_ir as oir

from burnish.ir import match
from burnish.ir.dims import Dim
from burnish.ir.inference import Inference
from burnish.ir.views.heads import GROUP, PACKED, Axes, Place, Walk
from burnish.ir.views.scores import NO_VALUES, Mask, Scores, read_scores, weighted
from burnish.ir.walk import is_op, walk


@dataclass(frozen=True)
class Source:
    """Where the queries, keys or values of an attention come from.

    Attributes:
        value: the tensor.
        flat: it is [batch, sequence, heads * size], else [batch, heads, sequence, size].
        scale: what lies between it and the scores.
        part: (index, number of parts) when it is one of equal parts of the last axis of a packed `value`.
        repeated: each of its heads serves several query heads.
        past: the cache in front of it, [batch, heads, past sequence, size].
        present: the cache with it, as the model computes it.
        path: the nodes from it to the products.
    """

    value: oir.Value
    flat: bool
    scale: float
    part: tuple[int, int] | None
    repeated: bool
    past: oir.Value | None
    present: oir.Value | None
    path: tuple[oir.Node, ...]


@dataclass(frozen=True)
class Attention:
    """One attention.

    Attributes:
        anchor: the Softmax, or the operator that is the whole attention.
        end: the node whose output is the product with the values.
        queries, keys, values: where they can be taken from, nearest to the products first.
        outputs: the result and its rearrangements [(value, flat)], nearest first.
        batch, heads, sequence, total: sizes; `total` counts the keys.
        head_size, value_size: elements of a head of queries and keys, and of values.
        scale: of the scores, without what lies inside a `Source`.
        mask: see `Mask`.
        guard: rows of NaN probabilities are replaced by zeros.
        wide: the softmax is computed in float32 of narrower scores.
        nodes: the nodes from the scores to `end`.
    """

    anchor: oir.Node
    end: oir.Node
    queries: tuple[Source, ...]
    keys: tuple[Source, ...]
    values: tuple[Source, ...]
    outputs: tuple[tuple[oir.Value, bool], ...]
    batch: Dim
    heads: int
    sequence: Dim
    total: Dim
    head_size: int
    value_size: int
    scale: float
    mask: Mask
    guard: bool
    wide: bool
    nodes: tuple[oir.Node, ...]


@dataclass(frozen=True)
class Miss:
    """A node that looks like the middle of an attention, and why it is none; `near`: it may be one."""

    anchor: oir.Node
    reason: str
    near: bool = True


def find_attentions(model: oir.Model, facts: Inference | None = None) -> Iterator[Attention | Miss]:
    """Every attention of the model in graph order, and every near miss with its reason.

    Args:
        model: the model; not changed. It may be changed between two results.
        facts: what is proven of the model as it is when the iteration begins.
    """
    known = facts if facts is not None else Inference(model)
    for node in walk(model, "Softmax", "Attention"):
        if node.graph is not None:
            yield read_operator(node, known) if node.op_type == "Attention" else read_softmax(node, known)


def read_softmax(node: oir.Node, facts: Inference) -> Attention | Miss:
    """The attention whose probabilities `node` computes, or why there is none."""
    out = node.outputs[0]
    shape = facts.shape(node.inputs[0])
    after = weighted(out, facts)
    if isinstance(after, str):
        return Miss(node, after, near=after != NO_VALUES)
    if after.odd:
        return Miss(node, after.odd)
    if shape is None or len(shape) != 4:
        return Miss(node, "the scores are not [batch, heads, queries, keys]")
    if match.attribute(node, "axis", -1 if facts.opset >= 13 else 1) % 4 != 3:
        return Miss(node, "the softmax does not run over the keys")
    scores = read_scores(node.inputs[0], facts)
    if isinstance(scores, str) or scores.odd:
        return Miss(node, scores.odd if isinstance(scores, Scores) else scores)
    end = after.end
    if end.op_type != "MatMul":
        return Miss(node, NO_VALUES, near=False)
    q, k, v = scores.product.inputs[0], scores.product.inputs[1], end.inputs[1]
    shapes = [facts.shape(value) for value in (q, k, v)]
    if q is None or k is None or v is None or any(one is None or len(one) != 4 for one in shapes):
        return Miss(node, "queries, keys or values are not four-dimensional")
    (b, h, s, d), (kb, kh, kd, t), (vb, vh, vt, e) = shapes  # type: ignore[misc]
    if not isinstance(h, int) or not isinstance(d, int) or not isinstance(e, int):
        return Miss(node, "the number of heads or their size is not known")
    if not (b == kb == vb and d == kd and t == vt):
        return Miss(node, "queries, keys and values are not known to agree in their batch")
    if kh != vh or kh not in (h, 1):
        return Miss(node, "the heads of keys and values do not agree with those of the queries")
    if shape != (b, h, s, t):
        return Miss(node, "the mask may be larger than the scores")
    read = _Reader(facts, {"b": b, "h": h, "s": s, "t": t, "d": d, "e": e})
    sources = read.queries(q), read.keys(k, ("b", "h", "d", "t"), kh), read.values(v, kh)
    if not all(sources):
        return Miss(node, "queries, keys or values are nowhere laid out as an operator takes them")
    nodes = (*scores.nodes, node, *after.passed, end)
    return Attention(
        node, end, *sources, read.results(end.outputs[0]),
        b, h, s, t, d, e, scores.scale, scores.mask, after.guard, scores.wide, nodes,
    )  # fmt: skip


def read_operator(node: oir.Node, facts: Inference) -> Attention | Miss:
    """The attention of a standard Attention operator, with its inputs followed to where they come from."""
    shapes = [facts.shape(value) for value in node.inputs[:3]]
    if any(one is None or len(one) != 4 for one in shapes):
        return Miss(node, "already one operator", near=False)
    (b, h, s, d), (kb, kh, t, _), (_, vh, _, e) = shapes  # type: ignore[misc]
    if len(node.inputs) > 4 and any(value is not None for value in node.inputs[4:]):
        return Miss(node, "already one operator with a cache", near=False)
    if any(out.uses() or out.is_graph_output() for out in node.outputs[1:]):
        return Miss(node, "its scores or caches are read elsewhere as well")
    if (
        not isinstance(h, int)
        or not isinstance(d, int)
        or not isinstance(e, int)
        or b != kb
        or kh != vh
        or not isinstance(kh, int)
    ):
        return Miss(node, "the number of heads or their size is not known")
    q, k, v = node.inputs[:3]
    assert q is not None and k is not None and v is not None
    read = _Reader(facts, {"b": b, "h": h, "s": s, "t": t, "d": d, "e": e})
    mask = match.input_of(node, 3)
    scale = match.attribute(node, "scale", 0.0) or float(d) ** -0.5
    return Attention(
        node, node, read.queries(q), read.keys(k, ("b", "h", "t", "d"), kh), read.values(v, kh),
        read.results(node.outputs[0]),
        b, h, s, t, d, e, scale, Mask((mask,) if mask is not None else ()), False, False, (node,),
    )  # fmt: skip


class _Reader:
    """Follows the operands of one attention."""

    def __init__(self, facts: Inference, sizes: dict[str, Dim]) -> None:
        self.facts = facts
        self.sizes = sizes

    def queries(self, q: oir.Value) -> tuple[Source, ...]:
        step = Walk(self.facts, self.sizes)
        return tuple(self._sources(step, step.up(q, ("b", "h", "s", "d"), scaled=True), "s", "d"))

    def keys(self, k: oir.Value, axes: Axes, shared: Dim) -> tuple[Source, ...]:
        return self._cached(k, axes, "d", shared, scaled=True)

    def values(self, v: oir.Value, shared: Dim) -> tuple[Source, ...]:
        return self._cached(v, ("b", "h", "t", "e"), "e", shared, scaled=False)

    def results(self, y: oir.Value) -> tuple[tuple[oir.Value, bool], ...]:
        step = Walk(self.facts, self.sizes)
        found = []
        for value, axes in step.down(y, ("b", "h", "s", "e")):
            if step.spelled(axes, ("b", "s", "he")):
                found.append((value, True))
            elif step.spelled(axes, ("b", "h", "s", "e")):
                found.append((value, False))
        return tuple(found)

    def _cached(self, value: oir.Value, axes: Axes, size: str, shared: Dim, scaled: bool) -> tuple[Source, ...]:
        """Sources of keys or values, then, behind a Concat with a cache, those of the new part."""
        fewer = shared != self.sizes["h"]
        step = Walk(self.facts, {**self.sizes, "h": shared} if fewer else self.sizes)
        places = list(step.up(value, axes, scaled=scaled))
        found = list(self._sources(step, places, "t", size, fewer=fewer))
        last = places[-1]
        node = last.value.producer()
        if node is None or not is_op(node, "Concat") or len(node.inputs) != 2 or last.pick is not None:
            return tuple(found)
        past, new = node.inputs
        if (
            not step.spelled(last.axes, ("b", GROUP if last.repeated else "h", "t", size))
            or past is None
            or new is None
            or match.attribute(node, "axis", 0) % 4 != 2
        ):
            return tuple(found)
        length = self.facts.shape(new)
        if length is None or self.facts.shape(past) is None:
            return tuple(found)
        fresh = Walk(self.facts, {**step.sizes, "u": length[2]})
        start = tuple(letters.replace("t", "u") for letters in last.axes)
        for source in self._sources(fresh, fresh.up(new, start, scaled=False), "u", size, fewer=fewer or last.repeated):
            found.append(
                Source(source.value, source.flat, last.scale, source.part, source.repeated, past, node.outputs[0],
                       (*source.path, node, *last.path))
            )  # fmt: skip
        return tuple(found)

    def _sources(
        self, step: Walk, places: Iterator[Place] | list[Place], length: str, size: str, fewer: bool = False
    ) -> Iterator[Source]:
        for place in places:
            own = GROUP if place.repeated or (fewer and GROUP in step.sizes) else "h"
            packed = PACKED if place.pick is not None else ""
            flat = step.spelled(place.axes, ("b", length, packed + own + size))
            if not flat and (packed or not step.spelled(place.axes, ("b", own, length, size))):
                continue
            part = (place.pick, int(step.sizes[PACKED])) if place.pick is not None else None  # type: ignore[arg-type]
            yield Source(place.value, flat, place.scale, part, place.repeated or fewer, None, None, place.path)
