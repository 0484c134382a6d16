"""Memory of activations: what is alive while the nodes run one after another in their order in the file.

The inputs of the model live for the whole run, a computed value from the node that writes it to the last that reads it,
an output to the end. Weights are not counted. Every value has memory of its own: a runtime that works in place or
shares memory between a tensor and its reshaped form needs less.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import onnx_ir as oir

from burnish.ir.network import captured, reads
from burnish.ir.sizes import Dims, UnknownSizeError, stored, value_bytes
from burnish.ir.walk import bodies, is_op


@dataclass(frozen=True)
class Live:
    """A value that is alive at the peak, and its bytes."""

    value: oir.Value
    bytes: int


@dataclass(frozen=True)
class Liveness:
    """The activation peak of a model.

    Attributes:
        peak: bytes alive at the worst moment; None when a value's size is not known.
        at_least: the same without the values of unknown size.
        at: the node that runs at that moment, in the innermost graph; None for a model without nodes.
        live: what is alive then, largest first.
        lower_bound: bytes that the most demanding node needs for what it reads and writes, whatever the order of nodes.
        unknown: why `peak` is None.
    """

    peak: int | None
    at_least: int
    at: oir.Node | None
    live: tuple[Live, ...]
    lower_bound: int
    unknown: tuple[str, ...]


@dataclass
class _Moment:
    bytes: int = 0
    at: oir.Node | None = None
    live: list[oir.Value] = field(default_factory=list)


class _Walk:
    def __init__(self, dims: Dims) -> None:
        self.dims = dims
        self.sizes: dict[int, int] = {}
        self.unknown: dict[str, None] = {}
        self.lower_bound = 0

    def size(self, value: oir.Value) -> int:
        """Bytes of an activation: 0 for constants and for what is of unknown size."""
        if id(value) not in self.sizes:
            self.sizes[id(value)] = self._size(value)
        return self.sizes[id(value)]

    def _size(self, value: oir.Value) -> int:
        if stored(value) is not None:
            return 0
        try:
            return value_bytes(value, self.dims)
        except UnknownSizeError as error:
            self.unknown[str(error)] = None
            return 0

    def together(self, values: list[oir.Value]) -> int:
        return sum(self.size(value) for value in {id(value): value for value in values}.values())

    def graph(self, graph: oir.Graph) -> _Moment:
        """The worst moment of one run of `graph`, without what lives outside of it."""
        nodes = list(graph)
        last = _last_reads(graph, nodes)
        alive = {id(value): value for value in graph.inputs}
        worst = _Moment(self.together(list(alive.values())), nodes[0] if nodes else None, list(alive.values()))
        for index, node in enumerate(nodes):
            written = [value for value in node.outputs if value.name]
            needed = reads(node) + written
            self.lower_bound = max(self.lower_bound, self.together(needed))
            for moment in self._moments(node, list(alive.values()), written):
                if moment.bytes > worst.bytes:
                    worst = moment
            alive.update((id(value), value) for value in written)
            alive = {key: value for key, value in alive.items() if last.get(key, -1) > index}
        return worst

    def _moments(self, node: oir.Node, before: list[oir.Value], written: list[oir.Value]) -> list[_Moment]:
        """The node with its outputs, and the worst of each of its sub-graphs.

        The outputs of an If come into being in its branches; those of loops are there while the body runs.
        """
        beside = before if is_op(node, "If") else before + written
        found = [_Moment(self.together(before + written), node, before + written)]
        for body in bodies(node):
            inner = self.graph(body)
            found.append(_Moment(self.together(beside) + inner.bytes, inner.at or node, beside + inner.live))
        return found


def _last_reads(graph: oir.Graph, nodes: list[oir.Node]) -> dict[int, int]:
    """The index of the last reader of each value of `graph`, by its id; inputs and outputs live to the end."""
    last = {id(value): index for index, node in enumerate(nodes) for value in node.inputs if value is not None}
    last |= {
        id(value): max(index, last.get(id(value), -1)) for index, node in enumerate(nodes) for value in captured(node)
    }
    last |= {id(value): len(nodes) for value in (*graph.inputs, *graph.outputs)}
    return last


def activation_peak(model: oir.Model, dims: Dims | None = None) -> Liveness:
    """The most bytes of activations alive at one moment of a run of `model`, nodes running in their order.

    Calls of functions count as one node; `burnish.ir.concrete` inlines them.

    Args:
        model: a model whose values have shapes; it is not changed.
        dims: numbers for the symbolic dimensions.
    """
    walk = _Walk(dims or {})
    worst = walk.graph(model.graph)
    values = {id(value): value for value in worst.live}.values()
    live = sorted((Live(value, walk.size(value)) for value in values), key=lambda one: -one.bytes)
    peak = None if walk.unknown else worst.bytes
    kept = tuple(one for one in live if one.bytes)
    return Liveness(peak, worst.bytes, worst.at, kept, walk.lower_bound, tuple(walk.unknown))
