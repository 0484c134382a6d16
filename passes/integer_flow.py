"""Which values are rounded to integers when layers are, so that what lies between the layers runs on integers too.

A runtime puts an operator on integers when each value that it reads and the value that it computes is rounded. A layer
needs that for its input, a convolution for its output as well. Between two such layers, and where several of them meet,
there may be operators that can follow: those that only move numbers, which keep the scale, and a few that compute,
which get a scale of their own. A Relu, or a Clip from 0 on, vanishes when the value behind it is rounded to integers
that begin at 0.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from math import isfinite

import onnx_ir as oir

from burnish.ir import match, weights
from burnish.ir.views.convolution import Convolution
from burnish.ir.walk import STANDARD_DOMAINS, is_op
from burnish.passes.layers import Layer

CLIPPED = ("HardSigmoid", "HardSwish")
"""Operators that are a sum on integers which ends at 0 and 1, and for HardSwish a product with it."""

COMPUTING = (
    *("Add", "Mul", "Concat", "GlobalAveragePool", "AveragePool", "Sigmoid", "LeakyRelu", "Relu", "Clip"),
    *CLIPPED,
)
"""Operators with a kernel on integers (ONNX Runtime 1.32, CPU), whose result has a scale of its own."""

MOVING = (
    *("MaxPool", "Reshape", "Flatten", "Squeeze", "Unsqueeze", "Transpose", "Slice", "Split", "Gather"),
    *("DepthToSpace", "SpaceToDepth", "Resize"),
)
"""Operators whose result consists of numbers that they read."""

_SMALL = 16
"""How many times smaller the other operand of a product is that is rounded for the sake of the large one."""


@dataclass(frozen=True)
class Flow:
    """What is rounded.

    Attributes:
        scale_of: every value that is rounded, in the order of the graph, with the value whose scale it takes over; None
            where it has one of its own.
        readers: the nodes that read the rounded form of each value; None for all of them, where an operator on integers
            computes it.
        nodes: the operators on integers.
        factors: values that are a positive constant times the one whose scale they take over: their integers are the
            same, their scale is so much larger.
    """

    scale_of: dict[oir.Value, oir.Value | None]
    readers: dict[oir.Value, list[oir.Node] | None]
    nodes: frozenset[oir.Node]
    factors: dict[oir.Value, float]

    def unconverted(self, layer: Layer) -> frozenset[str]:
        """The names of the values of a layer that come as integers, or are needed as nothing else."""
        names = [str(layer.input.name)] if self.readers.get(layer.input, []) is None else []
        end = settled(layer.output)
        if end in self.scale_of and not end.is_graph_output() and self.nodes.issuperset(match.consumers(end)):
            names.append(str(end.name))
        return frozenset(names)


def settled(value: oir.Value) -> oir.Value:
    """Where a value is rounded: behind the Relu, or Clip from 0 on, that is all that reads it."""
    node = match.sole_consumer(value, "Relu", "Clip")
    return node.outputs[0] if node is not None and node.inputs[0] is value and _begins_at_zero(node) else value


def regions(graph: oir.Graph, layers: Mapping[str, Layer]) -> list[tuple[list[oir.Node], list[str]]]:
    """The parts of a graph that `flow` tells apart: nodes in their order, and the layers whose ends they are.

    Rounding spreads through operators that can follow, and not through layers: what is rounded in a part hangs on its
    own layers only.

    Args:
        graph: the main graph, in order.
        layers: layers of it, by what they are called.
    """
    above: dict[oir.Value, oir.Value] = {}

    def part(value: oir.Value) -> oir.Value:
        while above.setdefault(value, value) is not value:
            above[value] = above[above[value]]
            value = above[value]
        return value

    ends = {name: (layer.input, settled(layer.output)) for name, layer in layers.items()}
    joined = [[*_operands(node), *node.outputs] for node in graph if _operands(node)]
    for first, *others in (*joined, *([layer.output, settled(layer.output)] for layer in layers.values())):
        for value in others:
            above[part(value)] = part(first)
    nodes: dict[oir.Value, list[oir.Node]] = {}
    for node in graph:
        for one in dict.fromkeys(part(out) for out in node.outputs if out in above):
            nodes.setdefault(one, []).append(node)
    names: dict[oir.Value, list[str]] = {}
    for name, some in ends.items():
        for one in dict.fromkeys(map(part, some)):
            names.setdefault(one, []).append(name)
    return [(nodes.get(one, []), own) for one, own in names.items()]


def flow(
    graph: oir.Graph, layers: Collection[Layer], between: bool = True, nodes: Sequence[oir.Node] | None = None
) -> Flow:
    """What is rounded when these layers are, and what reads it.

    Args:
        graph: the main graph, in order.
        layers: layers of it.
        between: also what lies between layers, and what they compute; else what they read alone, for them alone.
        nodes: of one of its `regions`, to look no further; None for all.
    """
    looked_at = list(graph) if nodes is None else nodes
    if not between:
        own = frozenset(layer.node for layer in layers)
        read = _in_order(graph, looked_at, {layer.input for layer in layers})
        readers: dict[oir.Value, list[oir.Node] | None] = {}
        for value in read:
            readers[value] = [user for user in match.consumers(value) if user in own]
        return Flow(dict.fromkeys(read), readers, frozenset(), {})
    marked: set[oir.Value] = set()
    for layer in layers:
        marked.add(layer.input)
        end = settled(layer.output)
        if isinstance(layer, Convolution) or end is not layer.output:
            marked.add(end)
    computed = {settled(layer.output) for layer in layers if isinstance(layer, Convolution)}
    ready: dict[oir.Node, list[oir.Value]] = {}
    reached = set(marked)
    for node in looked_at:
        operands = _operands(node)
        small = [value for value in operands if value not in reached and _is_small(value, node)]
        if operands and all(value in reached or value in small for value in operands) and len(small) < len(operands):
            ready[node] = [*(settled(out) for out in node.outputs if out.name != ""), *small]
            reached.update(ready[node])
            if computed.issuperset(operands):
                computed.update(ready[node])
    followed: dict[oir.Node, None] = {}
    for node in reversed(ready):
        users = (user for value in ready[node] for user in match.consumers(value))
        joins = len(set(_operands(node))) > 1 and computed.issuperset(_operands(node))
        if joins or any(value in marked for value in ready[node]) or any(user in followed for user in users):
            followed[node] = None
    for node in followed:
        marked.update(ready[node])
    on_them = frozenset([*(layer.node for layer in layers), *followed])
    on_integers = {settled(out) for node in on_them for out in node.outputs}
    scale_of: dict[oir.Value, oir.Value | None] = {}
    factors: dict[oir.Value, float] = {}
    for value in _in_order(graph, looked_at, marked):
        above = value.producer()
        moved = above is not None and above in followed and is_op(above, *MOVING)
        scale_of[value] = above.inputs[0] if moved and above is not None else None
        scaled = with_number(above) if above in followed and is_op(above, "Mul") else None
        if scaled is not None and above is not None and above.outputs[0] is value:
            scale_of[value], factors[value] = scaled
    readers = {}
    for value in scale_of:
        whole = value in on_integers
        readers[value] = None if whole else [user for user in match.consumers(value) if user in on_them]
    return Flow(scale_of, readers, on_them, factors)


def _operands(node: oir.Node) -> list[oir.Value]:
    """The values that a node which can follow computes its result from; empty for any other node."""
    if node.domain not in STANDARD_DOMAINS:
        return []
    scaled = with_number(node)
    if scaled is not None:
        return [scaled[0]]
    if node.op_type in ("Add", "Mul", "Concat"):
        found = [value for value in node.inputs if value is not None]
        power = node.op_type == "Mul" and len({_root(value) for value in found}) == 1
        return [] if power or any(weights.is_constant(value) for value in found) else found
    if node.op_type in ("Relu", "Clip") and not _begins_at_zero(node):
        return []
    if is_op(node, "Resize") and not _repeats(node):
        return []
    if _is_miscounted(node):
        return []
    if is_op(node, "MaxPool") and len(node.outputs) > 1:
        return []
    value = match.input_of(node, 0)
    known = is_op(node, *COMPUTING, *MOVING) and value is not None and not weights.is_constant(value)
    return [value] if known and value is not None else []


def _repeats(resize: oir.Node) -> bool:
    """Whether all that a Resize gives are numbers that it reads."""
    crops = match.attribute(resize, "coordinate_transformation_mode", "half_pixel") == "tf_crop_and_resize"
    return match.attribute(resize, "mode", "nearest") == "nearest" and not crops


def _is_miscounted(node: oir.Node) -> bool:
    """Whether it is a pool whose kernel on integers is wrong (ONNX Runtime 1.32).

    With `count_include_pad` it also counts what `ceil_mode` adds behind the padding; with `dilations` it is not loaded.
    """
    whole = match.attribute(node, "count_include_pad", 0) and match.attribute(node, "ceil_mode", 0)
    return is_op(node, "AveragePool") and bool(whole or max(match.attribute(node, "dilations", (1,))) > 1)


def miscounted(value: oir.Value) -> oir.Node | None:
    """The pool above a value that would be computed wrongly on integers if the value were rounded.

    What only moves numbers, and a Relu or Clip, does not keep the runtime from seeing the pool between two pairs.
    """
    node = value.producer()
    while node is not None and is_op(node, "Relu", "Clip", "Identity", *MOVING) and node.inputs[0] is not None:
        node = node.inputs[0].producer()
    return node if node is not None and _is_miscounted(node) else None


def _root(value: oir.Value) -> oir.Value:
    """What a value holds the numbers of, or a number times them: in 8 bits little is left of the product of the two,
    a square, as it stands in Gelu spelled out.
    """
    while (node := value.producer()) is not None:
        scaled = with_number(node) if is_op(node, "Mul") else None
        above = scaled[0] if scaled is not None else node.inputs[0] if is_op(node, *MOVING) else None
        if above is None:
            break
        value = above
    return value


def with_number(node: oir.Node | None) -> tuple[oir.Value, float] | None:
    """What an Add takes one number to, or a Mul takes a positive one times; and the number."""
    pair = match.with_scalar(node) if node is not None and is_op(node, "Add", "Mul") else None
    if pair is None or not isfinite(pair[1]) or pair[1] == 0 or (is_op(node, "Mul") and pair[1] < 0):
        return None
    return pair


def _begins_at_zero(node: oir.Node) -> bool:
    """Whether a Relu or Clip gives nothing below 0 and passes on what is a little above."""
    if is_op(node, "Relu"):
        return True
    low = match.input_of(node, 1)
    least = match.attribute(node, "min") if low is None else weights.scalar(low)
    high = match.input_of(node, 2)
    most = match.attribute(node, "max", 1.0) if high is None else weights.scalar(high)
    return least == 0 and most is not None and most > 0


def _is_small(value: oir.Value, node: oir.Node) -> bool:
    """Whether `value` is spread by a product or sum over a result that is much larger."""
    own, whole = value.shape, node.outputs[0].shape
    if not is_op(node, "Add", "Mul") or own is None or whole is None or len(own) != len(whole) or len(own) < 3:
        return False
    spread = 1
    for size, wide in zip(own, whole, strict=True):
        if size != wide:
            spread *= int(wide) if size == 1 and isinstance(wide, int) else _SMALL if size == 1 else 0
    return spread >= _SMALL


def _in_order(graph: oir.Graph, nodes: Sequence[oir.Node], values: Collection[oir.Value]) -> list[oir.Value]:
    given = [value for value in graph.inputs if value in values]
    return [*given, *(out for node in nodes for out in node.outputs if out in values)]
