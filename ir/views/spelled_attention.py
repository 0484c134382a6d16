"""Attention layers spelled out as products and a softmax, heads on an axis of their own or merged into the batch."""

from __future__ import annotations

from collections.abc import Iterator

import onnx_ir as oir

from burnish.ir import dims, match
from burnish.ir.dims import Dim
from burnish.ir.inference import Inference, Shape
from burnish.ir.views.assemble import Core, assemble
from burnish.ir.views.attention import Miss
from burnish.ir.views.attention_layer import AttentionLayer, Context
from burnish.ir.views.heads import GROUP, REPEAT, Axes
from burnish.ir.views.parameter import find_parameter
from burnish.ir.views.reach import reach
from burnish.ir.views.scores import NO_VALUES, Scores, Weighted, read_scores, weighted
from burnish.ir.views.trail import Climber
from burnish.ir.walk import is_op

_MOVES = ("Reshape", "Transpose", "Squeeze", "Unsqueeze", "Mul", "Div", "Identity", "Cast", "Split", "Slice", "Gather")


def read(node: oir.Node, context: Context) -> AttentionLayer | Miss:
    """The attention layer whose probabilities the Softmax `node` computes, or why there is none."""
    facts = context.facts
    after = weighted(node.outputs[0], facts)
    if isinstance(after, str):
        return Miss(node, after) if after != NO_VALUES else _without_values(node, facts)
    q_k_v = after.end.inputs[1]
    if q_k_v is None or find_parameter(q_k_v) is not None:
        return Miss(node, "its values are a constant", near=False)
    scores = read_scores(node.inputs[0], facts)
    if isinstance(scores, str):
        return Miss(node, scores)
    if scores.twofold:
        return Miss(node, "its scores are the sum of several products")
    if scores.stretched:
        return Miss(node, "the mask is scaled together with the scores")
    shape = facts.shape(node.inputs[0])
    if shape is None:
        return Miss(node, "the shape of the scores is not known")
    rank = len(shape)
    if match.attribute(node, "axis", -1 if facts.opset >= 13 else 1) % rank != rank - 1:
        return Miss(node, "the softmax does not run over the keys")
    return _layer(node, scores, after, context)


def _without_values(node: oir.Node, facts: Inference) -> Miss:
    """A softmax that no product with values follows: near when it is one of products of two computed values."""
    scores = read_scores(node.inputs[0], facts)
    computed = isinstance(scores, Scores) and not any(find_parameter(one) for one in scores.product.inputs[:2])
    readers = sorted({one.op_type for one in match.readers(node.outputs[0])})
    if not computed or not readers:
        return Miss(node, NO_VALUES, near=False)
    return Miss(node, f"its probabilities go through {' and '.join(readers)}, not into a product with values")


def _layer(node: oir.Node, scores: Scores, after: Weighted, context: Context) -> AttentionLayer | Miss:
    facts = context.facts
    q, k, v = scores.product.inputs[0], scores.product.inputs[1], after.end.inputs[1]
    shapes = [facts.shape(value) for value in (q, k, v)]
    if q is None or k is None or v is None or any(one is None or len(one) < 2 for one in shapes):
        return Miss(node, "the shapes of queries, keys and values are not known")
    known: list[Shape] = [one for one in shapes if one is not None]
    turned = [
        bool(match.attribute(scores.product, "transA", 0)),
        not match.attribute(scores.product, "transB", 0),
        bool(match.attribute(after.end, "transB", 0)),
    ]
    (s, d), (t, kd), (vt, e) = (
        (one[-1], one[-2]) if swap else (one[-2], one[-1]) for one, swap in zip(known, turned, strict=True)
    )
    if d != kd or not isinstance(d, int) or not isinstance(e, int):
        return Miss(node, "the sizes of queries, keys and values are not known to agree")
    first: Miss | None = None
    leads = [one[:-2] for one in known]
    for letters, sizes in _arrangements(leads[0], leads[1], _heads_near(q, facts)):
        all_sizes = {**sizes, "s": s, "t": t, "d": d, "e": e}
        queries = Climber(facts, all_sizes, context.turns, context.norms)
        keys, values = (
            Climber(facts, _own(all_sizes, letters, lead, time), context.turns, context.norms)
            for lead, time in zip(leads[1:], (t, vt), strict=True)
        )
        ends = [("s", "d"), ("t", "d"), ("t", "e")]
        axes = [_axes(letters, len(one), pair, swap) for one, pair, swap in zip(leads, ends, turned, strict=True)]
        wanted = [_axes(letters, len(leads[0]), ("s", "e"), False)]
        if any(one is None for one in (*axes, *wanted)) or not (
            _agree(keys, axes[1], known[1]) and _agree(values, axes[2], known[2])
        ):
            first = first or Miss(node, "batch and heads of queries, keys and values are not known to agree")
            continue
        trails = [
            climber.climb(value, place or ())
            for climber, value, place in zip((queries, keys, values), (q, k, v), axes, strict=True)
        ]
        result_axes = _axes(letters, len(facts.shape(after.end.outputs[0]) or ()) - 2, ("s", "e"), False)
        if result_axes is None:
            continue
        causal, window = reach(scores.masks, s, t, facts)
        lead = "".join(letter for letter in "bw" if letter in "".join(letters))
        core = Core(
            node, "arithmetic", queries, keys, values, trails[0], trails[1], trails[2], lead,
            after.end.outputs[0], result_axes, scores.scale,
            [*scores.nodes, node, *after.passed, after.end], scores.product, tuple(scores.scales),
            scores.masks, causal, window, scores.cap,
        )  # fmt: skip
        found = assemble(core, context)
        if isinstance(found, AttentionLayer):
            return found
        first = first or found
    return first or Miss(node, "the scores are not laid out by batch, heads, queries and keys")


def _arrangements(lead: Shape, other: Shape, near: list[int]) -> Iterator[tuple[Axes, dict[str, Dim]]]:
    """What the axes of the queries before the last two may be, likeliest first, with the sizes of the letters."""
    if len(lead) == 2:
        if isinstance(lead[1], int):
            yield ("b", "h"), {"b": lead[0], "h": lead[1]}
        if isinstance(lead[0], int):
            yield ("h", "b"), {"b": lead[1], "h": lead[0]}
        yield ("b", "w"), {"b": lead[0], "w": lead[1], "h": 1}
    elif len(lead) == 1:
        for count in near:
            batch = dims.divide_exactly(lead[0], count)
            if batch is not None:
                yield ("bh",), {"b": batch, "h": count}
                yield ("hb",), {"b": batch, "h": count}
        yield ("b",), {"b": lead[0], "h": 1}
    elif len(lead) == 3:
        if isinstance(lead[2], int) and isinstance(lead[1], int) and len(other) == 3 and other[2] == 1 != lead[2]:
            sizes = {"b": lead[0], GROUP: lead[1], REPEAT: lead[2], "h": lead[1] * lead[2]}
            yield ("b", GROUP, REPEAT), sizes
        if isinstance(lead[2], int):
            yield ("b", "w", "h"), {"b": lead[0], "w": lead[1], "h": lead[2]}
        if isinstance(lead[1], int):
            yield ("b", "h", "w"), {"b": lead[0], "w": lead[2], "h": lead[1]}
    elif not lead:
        yield (), {"b": 1, "h": 1}


def _axes(letters: Axes, rank: int, last: Axes, swap: bool) -> Axes | None:
    """The axes of an operand with `rank` axes before the last two."""
    ends = tuple(reversed(last)) if swap else last
    if rank == len(letters):
        return (*letters, *ends)
    if rank == 1 and len(letters) == 2:
        return ("".join(letters), *ends)
    if rank == 2 and letters in (("bh",), ("hb",)):
        return (*letters[0], *ends)
    return None


def _own(sizes: dict[str, Dim], letters: Axes, lead: Shape, time: Dim) -> dict[str, Dim]:
    """The sizes of the letters of keys or values: a batch of their own, and perhaps one head for all queries."""
    sizes = {**sizes, "t": time}
    if len(lead) == len(letters):
        for letter, size in zip(letters, lead, strict=True):
            if len(letter) == 1 and (letter not in ("h", GROUP, REPEAT) or size == 1):
                sizes[letter] = size
    elif letters in (("bh",), ("hb",)) or len(lead) == 1:
        count = sizes["h"]
        batch = dims.divide_exactly(lead[0], count) if len(lead) == 1 and isinstance(count, int) else None
        sizes["b"] = batch if batch is not None else sizes["b"]
    return sizes


def _agree(climber: Climber, axes: Axes | None, shape: Shape) -> bool:
    """Whether keys or values have the sizes that their letters say."""
    return axes is not None and all(
        dims.product([climber.sizes[letter] for letter in letters]) == size
        for letters, size in zip(axes, shape, strict=True)
    )


def _heads_near(q: oir.Value, facts: Inference) -> list[int]:
    """Numbers that may be that of the heads: sizes of the axes of what the queries are rearranged from."""
    found: dict[int, None] = {}
    value: oir.Value | None = q
    for _ in range(12):
        node = value.producer() if value is not None else None
        if node is None or not is_op(node, *_MOVES):
            break
        value = node.inputs[0]
        shape = facts.shape(value)
        if shape is not None and len(shape) > 3:
            found |= dict.fromkeys(size for size in shape if isinstance(size, int) and size > 1)
        wide, last = (shape or (None,))[-1], (facts.shape(q) or (None,))[-1]
        if isinstance(wide, int) and isinstance(last, int) and wide % last == 0 and wide > last:
            found[wide // last] = None
    return list(found)
