"""Attention layers whose attention is one operator: the standard's Attention, and ONNX Runtime's own.

What the inputs, outputs and attributes mean is taken from the ONNX standard and from ONNX Runtime's documentation of
its contrib operators.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import onnx_ir as oir

from burnish.ir import dims, match
from burnish.ir.dims import Dim
from burnish.ir.views.assemble import Core, assemble
from burnish.ir.views.attention import Miss
from burnish.ir.views.attention_layer import AttentionLayer, Context
from burnish.ir.views.heads import Axes
from burnish.ir.views.parameter import find_parameter
from burnish.ir.views.reach import reach
from burnish.ir.views.scores import Mask
from burnish.ir.views.trail import Climber, Store, Trail
from burnish.ir.views.turned import Turned
from burnish.ir.walk import STANDARD_DOMAINS

CONTRIB = "com.microsoft"
OPERATORS = frozenset(
    "Attention MultiHeadAttention GroupQueryAttention DecoderMaskedMultiHeadAttention PackedAttention QAttention"
    " PackedMultiHeadAttention SparseAttention LongformerAttention DecoderAttention LinearAttention".split()
)
"""Operators that are an attention; those without a reader give a reason."""


def read(node: oir.Node, context: Context) -> AttentionLayer | Miss | None:
    """The layer around the operator `node`, or why there is none."""
    standard = node.domain in STANDARD_DOMAINS
    if not standard and node.domain != CONTRIB:
        return None
    if standard:
        core = _standard(node, context) if node.op_type == "Attention" else None
    else:
        reader = {
            "Attention": _packed,
            "MultiHeadAttention": _multi_head,
            "GroupQueryAttention": _grouped,
        }.get(node.op_type)
        if reader is None:
            return Miss(node, f"there is no view of {node.op_type}")
        core = reader(node, context)
    if core is None:
        return None
    return core if isinstance(core, Miss) else assemble(core, context)


@dataclass(frozen=True)
class _Operand:
    """A value with its axes, and letters of which an axis is a part: (letter of the axis, its letters, start, size)."""

    value: oir.Value
    axes: Axes
    part: tuple[str, int, Dim] | None = None

    def climb(self, climber: Climber) -> Trail:
        axes = list(self.axes)
        if self.part is not None:
            axes[axes.index("*")] = climber.cut(*self.part)
        return climber.climb(self.value, tuple(axes))


@dataclass
class _Sizes:
    b: Dim
    s: Dim
    t: Dim
    h: int
    kv: int
    d: int
    e: int
    kb: Dim
    vb: Dim

    def climbers(self, context: Context) -> tuple[Climber, Climber, Climber]:
        sizes: dict[str, Dim] = {"b": self.b, "s": self.s, "t": self.t, "d": self.d, "e": self.e}
        facts, turns, norms = context.facts, context.turns, context.norms
        return (
            Climber(facts, {**sizes, "h": self.h}, turns, norms),
            Climber(facts, {**sizes, "h": self.kv, "b": self.kb}, turns, norms),
            Climber(facts, {**sizes, "h": self.kv, "b": self.vb}, turns, norms),
        )


def _core(
    node: oir.Node, context: Context, sizes: _Sizes, operands: tuple[_Operand, _Operand, _Operand], result: Axes,
    stores: tuple[Store | None, Store | None] = (None, None),
) -> Core:  # fmt: skip
    climbers = sizes.climbers(context)
    trails = [operand.climb(climber) for operand, climber in zip(operands, climbers, strict=True)]
    given = [climbers[0], *climbers[1:]]
    for index, store in enumerate(stores, 1):
        if store is not None:
            trails[index].store = store
        lent = _lent(trails[index].value, context) if trails[index].linear is None else None
        if lent is not None:
            given[index], other = lent
            trails[index] = replace(other, nodes=[*trails[index].nodes, *other.nodes])
    scale = float(match.attribute(node, "scale", 0.0)) or float(sizes.d) ** -0.5
    spelling = node.op_type if node.domain in STANDARD_DOMAINS else f"{node.domain}:{node.op_type}"
    softcap = float(match.attribute(node, "softcap", 0.0))
    return Core(
        node, spelling, given[0], given[1], given[2], trails[0], trails[1], trails[2],
        "b", node.outputs[0], result, scale, [node], node,
        softcap=softcap,
    )  # fmt: skip


def _lent(value: oir.Value | None, context: Context) -> tuple[Climber, Trail] | None:
    """The keys or values of another attention, which its operator gives as `value` together with the older ones."""
    node = value.producer() if value is not None else None
    if node is None or value not in node.outputs[1:3]:
        return None
    standard = node.domain in STANDARD_DOMAINS and node.op_type == "Attention"
    reader = _standard if standard else _LENDERS.get(node.op_type) if node.domain == CONTRIB else None
    core = reader(node, context) if reader is not None else None
    if not isinstance(core, Core):
        return None
    return (core.keys, core.k) if value is node.outputs[1] else (core.values, core.v)


def _store(node: oir.Node, past: int, present: int, axes: Axes = ("b", "h", "t", "d")) -> Store | None:
    value = match.input_of(node, past)
    made = node.outputs[present] if len(node.outputs) > present else None
    if made is not None and not made.uses() and not made.is_graph_output():
        made = None
    if value is None and made is None:
        return None
    form = "append"
    if value is not None and made is not None and value.shape is not None and made.shape is not None:
        same = list(map(str, value.shape)) == list(map(str, made.shape))
        form = "update" if same and len(value.shape) > 2 else "append"
    return Store(value, made, axes, form, node)


def _mask(value: oir.Value | None, context: Context, fill: float = -np.inf) -> tuple[Mask, ...]:
    if value is None:
        return ()
    kind = context.facts.dtype(value)
    return (Mask((value,)) if kind is not None and kind.is_floating_point() else Mask((), value, False, fill),)


def _standard(node: oir.Node, context: Context) -> Core | Miss:
    facts = context.facts
    q, k, v = node.inputs[:3]
    shapes = [facts.shape(value) for value in (q, k, v)]
    if q is None or k is None or v is None or any(one is None or len(one) not in (3, 4) for one in shapes):
        return Miss(node, "the shapes of queries, keys and values are not known")
    a, b, c = (one for one in shapes if one is not None)
    heads: list[Dim | None]
    if len(a) == 3:
        heads = [match.attribute(node, "q_num_heads"), match.attribute(node, "kv_num_heads")]
        counted = ((a, heads[0]), (b, heads[1]), (c, heads[1]))
        sizes = [dims.divide_exactly(one[2], count) for one, count in counted if count]
        axes: tuple[Axes, Axes, Axes] = ("b", "s", "hd"), ("b", "t", "hd"), ("b", "t", "he")
        result: Axes = ("b", "s", "he")
        time = a[1], b[1]
    else:
        heads = [a[1], b[1]]
        sizes = [a[3], b[3], c[3]]
        axes = ("b", "h", "s", "d"), ("b", "h", "t", "d"), ("b", "h", "t", "e")
        result = ("b", "h", "s", "e")
        time = a[2], b[2]
    if len(sizes) != 3 or not all(isinstance(one, int) for one in (*heads, *sizes)) or sizes[0] != sizes[1]:
        return Miss(node, "the number of heads or their size is not known")
    given = _Sizes(a[0], time[0], time[1], heads[0], heads[1], sizes[0], sizes[2], b[0], c[0])  # type: ignore[arg-type]
    operands = tuple(_Operand(value, place) for value, place in zip((q, k, v), axes, strict=True))
    stores = _store(node, 4, 1), _store(node, 5, 2, ("b", "h", "t", "e"))
    core = _core(node, context, given, operands, result, stores)  # type: ignore[arg-type]
    core.masks = _mask(match.input_of(node, 3), context)
    past = facts.shape(match.input_of(node, 4))
    total = dims.add(time[1], past[2]) if past is not None and len(past) == 4 else time[1]
    core.causal, core.window = reach(core.masks, time[0], total, facts)
    if match.attribute(node, "is_causal", 0):
        core.causal = True
    return core


def _multi_head(node: oir.Node, context: Context) -> Core | Miss:
    facts, heads = context.facts, int(match.attribute(node, "num_heads", 0))
    q, k, v = (match.input_of(node, index) for index in range(3))
    a, b, c = (facts.shape(value) for value in (q, k, v))
    if q is None or a is None or (k is not None and b is None) or (v is not None and c is None):
        return Miss(node, "the shapes of queries, keys and values are not known")
    if k is None and len(a) == 5:
        places: tuple[Axes, ...] = (("b", "s", "h", "*", "d"),) * 3
        parts = [("", index, 3) for index in range(3)]
        size: Dim | None = a[4]
        wide, total, values = size, a[1], (q, q, q)
        places = places[0], ("b", "t", "h", "*", "d"), ("b", "t", "h", "*", "e")
        operands = [_Operand(one, axes, part) for one, axes, part in zip(values, places, parts, strict=True)]
    elif k is not None and b is not None and v is None and len(b) == 5:
        size = dims.divide_exactly(a[2], heads)
        wide, total = b[4], b[1]
        operands = [_Operand(q, ("b", "s", "hd"))]
        operands += [_Operand(k, ("b", "t", "h", "*", letter), ("", index, 2)) for index, letter in enumerate("de")]
    elif k is not None and v is not None and b is not None and c is not None and len(b) == len(c) and len(a) == 3:
        size = dims.divide_exactly(a[2], heads)
        flat = len(b) == 3
        wide, total = (dims.divide_exactly(c[2], heads), b[1]) if flat else (c[3], b[2])
        operands = [_Operand(q, ("b", "s", "hd"))]
        for value, letter in ((k, "d"), (v, "e")):
            operands.append(_Operand(value, ("b", "t", f"h{letter}") if flat else ("b", "h", "t", letter)))
    else:
        return Miss(node, "its queries, keys and values are laid out in an unknown way")
    if not isinstance(size, int) or not isinstance(wide, int):
        return Miss(node, "the number of heads or their size is not known")
    stores = _store(node, 6, 1), _store(node, 7, 2, ("b", "h", "t", "e"))
    batches = [shape[0] if shape is not None else a[0] for shape in (b, c if c is not None else b)]
    given = _Sizes(a[0], a[1], total, heads, heads, size, wide, batches[0], batches[1])
    core = _core(node, context, given, tuple(operands), ("b", "s", "he"), stores)  # type: ignore[arg-type]
    bias = match.input_of(node, 3)
    if bias is not None:
        if find_parameter(bias) is None or (b is not None and len(b) == 4):
            return Miss(node, "its bias is computed, or added to keys and values that are split into heads")
        widths = [heads * size, heads * size, heads * wide]
        starts = np.cumsum([0, *widths])
        spans = zip(starts[:3], starts[1:], strict=True)
        core.biases = tuple((node, 3, np.arange(start, stop)) for start, stop in spans)
    core.masks = (
        *_mask(match.input_of(node, 4), context, float(match.attribute(node, "mask_filter_value", -1e4))),
        *_mask(match.input_of(node, 5), context),
    )
    past = facts.shape(match.input_of(node, 6))
    _reached(core, context, given, past[2] if past is not None and len(past) == 4 else 0)
    return core


def _reached(core: Core, context: Context, given: _Sizes, past: Dim) -> None:
    added = tuple(mask for mask in core.masks if mask.keep is None)
    core.causal, core.window = reach(added, given.s, dims.add(given.t, past), context.facts)
    if match.attribute(core.anchor, "unidirectional", 0):
        core.causal = True


def _grouped(node: oir.Node, context: Context) -> Core | Miss:
    facts = context.facts
    heads, fewer = int(match.attribute(node, "num_heads", 0)), int(match.attribute(node, "kv_num_heads", 0))
    q, k, v = (match.input_of(node, index) for index in range(3))
    a, b = facts.shape(q), facts.shape(k)
    if q is None or a is None or len(a) != 3 or (k is not None and (b is None or len(b) != 3)):
        return Miss(node, "the shapes of queries, keys and values are not known")
    if match.attribute(node, "smooth_softmax", 0) or match.input_of(node, 11) is not None:
        return Miss(node, "its softmax has a sink")
    size = dims.divide_exactly(a[2], heads + 2 * fewer if k is None else heads)
    if not isinstance(size, int):
        return Miss(node, "the number of heads or their size is not known")
    if k is None or v is None:
        operands = [
            _Operand(q, ("b", time, "*"), (f"h{letter}", start * size, a[2]))
            for time, letter, start in (("s", "d", 0), ("t", "d", heads), ("t", "e", heads + fewer))
        ]
    else:
        operands = [_Operand(q, ("b", "s", "hd")), _Operand(k, ("b", "t", "hd")), _Operand(v, ("b", "t", "he"))]
    stores: tuple[Store | None, Store | None] = _store(node, 3, 1), _store(node, 4, 2, ("b", "h", "t", "e"))
    past = match.input_of(node, 3), match.input_of(node, 4)
    lent = b is not None and b[1] == 0 and all(_lent(one, context) is not None for one in past)
    if lent:
        operands[1:] = [_Operand(one, ("b", "h", "t", size)) for one, size in zip(past, "de", strict=True) if one]
        stores = None, None
    given = _Sizes(a[0], a[1], b[1] if b is not None else a[1], heads, fewer, size, size, a[0], a[0])
    core = _core(node, context, given, tuple(operands), ("b", "s", "he"), stores)  # type: ignore[arg-type]
    if match.attribute(node, "do_rotary", 0):
        cos, sin = match.input_of(node, 7), match.input_of(node, 8)
        width = facts.shape(cos)
        own = [core.q] if lent else [core.q, core.k]
        if cos is None or sin is None or not width or any(trail.turned for trail in own):
            return Miss(node, "the tables of its rotary embedding are not known")
        if not isinstance(width[-1], int):
            return Miss(node, "the tables of its rotary embedding are not known")
        paired = bool(match.attribute(node, "rotary_interleaved", 0))
        position = match.input_of(node, 9)
        for trail in own:
            x = trail.places[0][0]
            trail.turned = Turned(x, x, cos, sin, position, 2 * width[-1], paired, 0, (node,))
    core.masks = _mask(match.input_of(node, 10), context)
    core.causal, core.window = True, reach(core.masks, given.s, given.t, facts)[1]
    window = int(match.attribute(node, "local_window_size", -1))
    core.window = window if window > 0 else core.window
    return core


def _packed(node: oir.Node, context: Context) -> Core | Miss:
    """com.microsoft Attention, whose matrix for queries, keys and values is its own."""
    facts = context.facts
    source, matrix, bias = (match.input_of(node, index) for index in range(3))
    shape, weight = facts.shape(source), find_parameter(matrix)
    heads, widths = int(match.attribute(node, "num_heads", 0)), match.attribute(node, "qkv_hidden_sizes")
    if source is None or shape is None or len(shape) != 3 or weight is None or len(weight.shape) != 2:
        return Miss(node, "its matrix is computed, or the shape of its input is not known")
    if bias is not None and find_parameter(bias) is None:
        return Miss(node, "its bias is computed")
    if match.attribute(node, "do_rotary", 0):
        return Miss(node, "its rotary embedding has tables of its own")
    widths = [int(one) for one in widths] if widths else [weight.shape[1] // 3] * 3
    if not heads or sum(widths) != weight.shape[1] or any(one % heads for one in widths) or widths[0] != widths[1]:
        return Miss(node, "its matrix does not divide into heads")
    given = _Sizes(
        shape[0], shape[1], shape[1], heads, heads, widths[0] // heads, widths[2] // heads, shape[0], shape[0]
    )
    climbers = given.climbers(context)
    starts = np.cumsum([0, *widths])
    trails = [Trail(source, ("b", "s", ""), places=[(source, ("b", "s", ""))]) for _ in range(3)]
    core = Core(
        node, f"{CONTRIB}:Attention", *climbers, trails[0], trails[1], trails[2], "b", node.outputs[0],
        ("b", "s", "he"), float(match.attribute(node, "scale", 0.0)) or float(given.d) ** -0.5, [node], node,
        held=tuple((starts[index], widths[index]) for index in range(3)),
    )  # fmt: skip
    past = facts.shape(match.input_of(node, 4))
    for index, trail in enumerate(trails[1:]):
        letter = climbers[index + 1].cut("", index, 2)
        store = _store(node, 4, 1, (letter, "b", "h", "t", "de"[index]))
        trail.store = store
    core.masks = (
        *_mask(match.input_of(node, 3), context, float(match.attribute(node, "mask_filter_value", -1e4))),
        *_mask(match.input_of(node, 5), context),
    )
    _reached(core, context, given, past[3] if past is not None and len(past) == 5 else 0)
    return core


_LENDERS: dict[str, Callable[[oir.Node, Context], Core | Miss]] = {
    "MultiHeadAttention": _multi_head,
    "GroupQueryAttention": _grouped,
}
