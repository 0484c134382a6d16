"""An attention layer from its attention: operands followed up to their linear layers, the result down to the last."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import onnx_ir as oir

from burnish.ir import match
from burnish.ir.dims import Dim
from burnish.ir.inference import Inference
from burnish.ir.views.attention import Miss
from burnish.ir.views.attention_layer import AttentionLayer, Context
from burnish.ir.views.cache import Cache, read_cache
from burnish.ir.views.heads import GROUP, Axes
from burnish.ir.views.kept import kept, kept_queries
from burnish.ir.views.linear import Linear, find_linear
from burnish.ir.views.parameter import find_parameter
from burnish.ir.views.projection import Projection
from burnish.ir.views.scale import find_factor
from burnish.ir.views.scores import Mask
from burnish.ir.views.trail import Bias, Climber, Trail
from burnish.ir.walk import is_op


@dataclass
class Core:
    """An attention without its linear layers.

    Attributes:
        anchor, spelling, scale, masks, causal, window, softcap: as in `AttentionLayer`.
        queries, keys, values: the climbers of the operands.
        q, k, v: the trails of the operands.
        lead: letters of batch in the order in which they are grouped.
        result, axes: the product with the values and its axes.
        nodes: from the scores to the result.
        product, scales: as in `AttentionLayer`, without the scales of the operands.
        cache: given by the operator; None to look at the trails.
        biases: of queries, keys and values, inside the operator: (node, input index, places).
        held: (first row, rows) of queries, keys and values in a matrix that the operator itself has as its input 1.
    """

    anchor: oir.Node
    spelling: str
    queries: Climber
    keys: Climber
    values: Climber
    q: Trail
    k: Trail
    v: Trail
    lead: str
    result: oir.Value
    axes: Axes
    scale: float
    nodes: list[oir.Node]
    product: oir.Node
    scales: tuple[oir.Node, ...] = ()
    masks: tuple[Mask, ...] = ()
    causal: bool | None = None
    window: int | None = None
    softcap: float = 0.0
    cache: Cache | None = None
    biases: tuple[tuple[oir.Node, int, np.ndarray] | None, ...] = (None, None, None)
    held: tuple[tuple[int, int], ...] = ()


@dataclass
class Down:
    """The way from an attention's result to what takes it."""

    value: oir.Value
    axes: Axes
    linear: Linear | None = None
    biases: list[Bias] = field(default_factory=list)
    nodes: list[oir.Node] = field(default_factory=list)
    stopped_by: str = ""


def assemble(core: Core, context: Context) -> AttentionLayer | Miss:
    """The layer around `core`, or why it is none."""
    facts = context.facts
    for trail, name in ((core.q, "queries"), (core.k, "keys"), (core.v, "values")):
        stored = name != "queries" and trail.is_stored(facts.model)
        if trail.linear is None and trail.store is not None and not core.held:
            return Miss(core.anchor, f"the {name} join two tensors, and no linear layer makes the second")
        if trail.linear is None and not stored and not core.held:
            return Miss(core.anchor, f"the {name} come from {trail.stopped_by}, not from a linear layer")
        if trail.linear is not None and trail.linear.input_axis != -1:
            return Miss(core.anchor, f"the layer of the {name} has its features on another axis")
    if (core.k.linear is None) != (core.v.linear is None):
        return Miss(core.anchor, "only one of keys and values is taken from a cache")
    if core.v.scale != 1.0 or core.v.turned is not None or core.v.norm is not None:
        return Miss(core.anchor, "the values are scaled, normalized or turned on the way")
    if (core.q.turned is None) != (core.k.turned is None) and core.k.linear is not None:
        return Miss(core.anchor, "only one of queries and keys has a rotary embedding")
    if core.q.turned is not None and core.k.turned is not None:
        one, other = core.q.turned, core.k.turned
        if (one.dims, one.interleaved, one.start) != (other.dims, other.interleaved, other.start):
            return Miss(core.anchor, "queries and keys have different rotary embeddings")
    down = descend(core.queries, core.result, core.axes)
    if down.linear is None:
        return Miss(core.anchor, f"its result goes through {down.stopped_by} before any linear layer")
    sizes = core.queries.sizes
    head_size, value_size, count = sizes["d"], sizes["e"], sizes["h"]
    kv_heads = own_heads(core.keys, core.k), own_heads(core.values, core.v)
    if kv_heads[0] != kv_heads[1] or not isinstance(count, int) or not isinstance(kv_heads[0], int):
        return Miss(core.anchor, "keys and values do not have the same number of heads")
    if not isinstance(head_size, int) or not isinstance(value_size, int):
        return Miss(core.anchor, "the size of a head is not known")
    found: list[Projection | None] = []
    plans = (
        (core.q, core.queries, "s", "d", count, core.biases[0], "queries"),
        (core.k, core.keys, "t", "d", kv_heads[0], core.biases[1], "keys"),
        (core.v, core.values, "t", "e", kv_heads[0], core.biases[2], "values"),
    )
    for trail, climber, time, size, number, bias, name in plans:
        if core.held:
            start, rows = core.held[len(found)]
            found.append(Projection(core.anchor, None, np.arange(start, start + rows), number, rows // number, False))
            continue
        if trail.linear is None:
            found.append(None)
            continue
        made = _projection(trail, climber, core.lead, time, size, number, bias)
        if isinstance(made, str):
            return Miss(core.anchor, f"{made} of the {name}")
        found.append(made)
    output = _output(core, down)
    if isinstance(output, str):
        return Miss(core.anchor, output)
    if not core.held and not _one_order(core, down):
        return Miss(core.anchor, "batch and positions do not come in one order in its layers")
    source = core.q.value if core.held else grouped(_input(core.q), facts)
    memory = source if core.held else grouped(_input(core.k), facts) if core.k.linear is not None else None
    assert found[0] is not None
    cross = memory is None and core.k.store is None or memory is not None and root(memory) is not root(source)
    if cross and memory is not None and core.k.store is not None:
        cross = False
    cache = core.cache if core.cache is not None else read_cache((core.keys, core.k), (core.values, core.v), cross)
    end, tail = _ended(down, facts)
    nodes = [*core.q.nodes, *core.k.nodes, *core.v.nodes, *core.nodes, *down.nodes, *tail]
    for trail in (core.q, core.k, core.v):
        nodes += _between(trail, facts) if trail.linear is not None else []
    shared = _shared(core)
    values = source if core.held else grouped(_input(core.v), facts) if core.v.linear is not None else None
    return AttentionLayer(
        core.anchor, source, memory, values, end,
        core.q.linear, core.k.linear, core.v.linear, down.linear,
        count, kv_heads[0], head_size, value_size,
        core.scale * core.q.scale * core.k.scale,
        core.masks, core.causal, core.window, core.softcap,
        core.q.turned, core.k.turned, core.q.norm, core.k.norm,
        cross, cache, core.spelling, context.ordered(nodes),
        core.product, tuple(find_factor(one, facts) for one in (*core.scales, *core.q.scales, *core.k.scales)),
        shared,
        (found[0], found[1], found[2], output),
        (kept_queries(core.q, core.queries), kept(core.k, core.keys), kept(core.v, core.values)),
        (tuple(dict(core.k.places).items()), tuple(dict(core.v.places).items())),
    )  # fmt: skip


def _one_order(core: Core, down: Down) -> bool:
    """Whether batch and positions are in the same order where queries, keys and values are made and the result goes."""
    own = [(core.queries, core.q.axes), (core.queries, down.axes)]
    own += [(climber, t.axes) for climber, t in ((core.keys, core.k), (core.values, core.v)) if t.linear is not None]
    spelled = ("".join(climber._plain(letters) for letters in axes[:-1]) for climber, axes in own)
    orders = {order.translate(str.maketrans("tu", "ss")) for order in spelled}
    return len({order for order in orders if len(order) > 1}) <= 1


def _shared(core: Core) -> tuple[oir.Node, ...]:
    """Nodes that read queries, keys or values for something else than they are for; not those of other packed parts."""
    found: dict[oir.Node, None] = {}
    for trail, climber in ((core.q, core.queries), (core.k, core.keys), (core.v, core.values)):
        own = {*trail.nodes, *core.nodes}
        for value, axes in trail.places if trail.linear is not None else ():
            packed = any(letter in climber.cuts for letters in axes for letter in letters)
            for reader in match.readers(value):
                part = packed and is_op(reader, "Split", "Slice", "Gather")
                if reader not in own and not part and not _leads_out(reader, 0):
                    found[reader] = None
    return tuple(found)


def _leads_out(node: oir.Node, depth: int) -> bool:
    """Whether all that `node` gives becomes outputs of the model, after movement only, or is asked for its size."""
    if depth > 8 or not is_op(node, "Identity", "Cast", "Transpose", "Reshape", "Unsqueeze", "Squeeze", "Concat"):
        return False
    return all(_leads_out(reader, depth + 1) for out in node.outputs for reader in match.readers(out))


def own_heads(climber: Climber, trail: Trail) -> Dim:
    """The heads that keys or values have before they are repeated."""
    return climber.sizes[GROUP] if trail.repeated or GROUP in "".join(trail.places[0][1]) else climber.sizes["h"]


def _input(trail: Trail) -> oir.Value:
    assert trail.linear is not None
    return trail.linear.input


def _projection(
    trail: Trail, climber: Climber, lead: str, time: str, size: str, count: int,
    given: tuple[oir.Node, int, np.ndarray] | None,
) -> Projection | str:  # fmt: skip
    assert trail.linear is not None
    time = "u" if trail.store is not None and "u" in "".join(trail.axes) else time
    if not climber.leads(trail.axes, lead + time):
        return "batch, positions and heads are not told apart in the layer"
    own = GROUP if trail.repeated or (GROUP in climber.sizes and count == climber.sizes[GROUP]) else "h"
    width = climber.sizes[size]
    places = climber.rows(trail.axes[-1], own + size)
    if places is None or not isinstance(width, int) or places.size != count * width:
        return "heads are not told apart in the layer"
    biases = [given] if given is not None else []
    for bias in trail.biases:
        where = climber.rows(bias.letters, own + size) if bias.letters else np.zeros(0, np.int64)
        if where is None or where.size not in (0, places.size):
            return "a bias that is not one for each element is added to the heads"
        biases.append((bias.node, bias.index, where))
    return Projection(trail.linear.node, trail.linear, places, count, width, False, tuple(biases))


def _output(core: Core, down: Down) -> Projection | str:
    assert down.linear is not None
    climber = core.queries
    count, width = climber.sizes["h"], climber.sizes["e"]
    if down.linear.input_axis != -1 or not climber.leads(down.axes, core.lead + "s"):
        return "batch, positions and heads are not told apart in the output layer"
    places = climber.rows(down.axes[-1], "he")
    if places is None or not isinstance(count, int) or not isinstance(width, int):
        return "heads are not told apart in the output layer"
    if places.size != count * width or places.size != down.linear.in_features:
        return "the output layer reads something else as well"
    biases = tuple((bias.node, bias.index, np.arange(down.linear.out_features)) for bias in down.biases)
    return Projection(down.linear.node, down.linear, places, count, width, True, biases)


def descend(climber: Climber, value: oir.Value, axes: Axes) -> Down:
    """Follow the result of an attention to the linear layer that takes it."""
    down = Down(value, axes)
    while True:
        readers = match.readers(down.value)
        linears = [found for one in readers if (found := find_linear(one)) is not None and found.input is down.value]
        if len(readers) != 1 or down.value.is_graph_output():
            down.stopped_by = "several nodes at once" if len(readers) > 1 else "no node at all"
            return down
        (node,) = readers
        if linears:
            down.linear = linears[0]
            down.nodes += linears[0].nodes
            return down
        shape = climber.facts.shape(node.outputs[0])
        after: Axes | None = None
        if node.inputs[0] is down.value and shape is not None:
            same = is_op(node, "Cast", "QuantizeLinear", "DequantizeLinear")
            after = down.axes if same else climber._moved_down(node, down.axes, shape)
        if after is None:
            down.stopped_by = node.op_type
            return down
        down.nodes.append(node)
        down.value, down.axes = node.outputs[0], after


def grouped(value: oir.Value, facts: Inference) -> oir.Value:
    """Where `value` comes from when steps that only group batch and positions are undone."""
    while True:
        node = match.producer(value, "Identity", "Reshape", "Flatten", "Squeeze", "Unsqueeze")
        source = node.inputs[0] if node is not None else None
        if source is None or not _same_last(source, value, facts):
            return value
        value = source


def root(value: oir.Value) -> oir.Value:
    """Where `value` comes from when movement and Casts are undone."""
    while True:
        node = match.producer(value, "Identity", "Reshape", "Flatten", "Squeeze", "Unsqueeze", "Cast", "Transpose")
        source = node.inputs[0] if node is not None else None
        if source is None:
            return value
        value = source


def _same_last(one: oir.Value, other: oir.Value, facts: Inference) -> bool:
    before, after = facts.shape(one), facts.shape(other)
    return bool(before) and bool(after) and before[-1] == after[-1]  # type: ignore[index]


def _between(trail: Trail, facts: Inference) -> list[oir.Node]:
    """The nodes that group batch and positions in front of a linear layer."""
    value, nodes = _input(trail), list[oir.Node]()
    stop = grouped(value, facts)
    while value is not stop:
        node = value.producer()
        assert node is not None and node.inputs[0] is not None
        nodes.append(node)
        value = node.inputs[0]
    return nodes


def _ended(down: Down, facts: Inference) -> tuple[oir.Value, list[oir.Node]]:
    """The result behind the output layer, once batch and positions are told apart again and its bias is added."""
    assert down.linear is not None
    value, nodes = down.linear.output, list[oir.Node]()
    for _ in range(4):
        node = match.sole_reader(value)
        if node is None:
            break
        if is_op(node, "Reshape", "Identity", "Unsqueeze", "Squeeze") and node.inputs[0] is value:
            if not _same_last(value, node.outputs[0], facts):
                break
        elif is_op(node, "Add") and nodes and down.linear.bias_parameter is None and not down.biases:
            index = 1 if node.inputs[0] is value else 0
            parameter = find_parameter(node.inputs[index])
            if parameter is None or parameter.shape[-1:] != (down.linear.out_features,):
                break
            if any(size != 1 for size in parameter.shape[:-1]) or facts.shape(node.outputs[0]) != facts.shape(value):
                break
            down.biases.append(Bias(node, index, parameter, ""))
        else:
            break
        nodes.append(node)
        value = node.outputs[0]
    return value, nodes
