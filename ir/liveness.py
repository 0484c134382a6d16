"""Memory of activations: what is alive while the nodes run one after another in their order in the file.

The inputs of the model live for the whole run, a computed value from the node that writes it to the last that reads it,
an output to the end. Weights are not counted. Every value has memory of its own here; `burnish.ir.arena` says what a
runtime needs that works in place and shares memory.

Time is counted in moments, one for each node, those in sub-graphs included: the nodes of a branch come before their If,
those of a body behind their Loop or Scan, as if one iteration ran and every branch were taken once.
"""

from __future__ import annotations

from dataclasses import dataclass

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
class Lifetime:
    """A value, its bytes, and the first and the last moment at which it is alive."""

    value: oir.Value
    bytes: int
    first: int
    last: int


@dataclass(frozen=True)
class Timeline:
    """What is alive when.

    Attributes:
        nodes: the node that runs at each moment; of a sub-graph without nodes, the one that holds it.
        lifetimes: of all activations whose size is known and not 0, by their first moment.
        lower_bound: bytes that the most demanding node needs for what it reads and writes, whatever the order of nodes.
        unknown: why values are missing in `lifetimes`.
    """

    nodes: tuple[oir.Node | None, ...]
    lifetimes: tuple[Lifetime, ...]
    lower_bound: int
    unknown: tuple[str, ...]

    def alive(self) -> list[int]:
        """Bytes alive at each moment."""
        return bytes_alive([(one.first, one.last, one.bytes) for one in self.lifetimes], len(self.nodes))


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


def bytes_alive(spans: list[tuple[int, int, int]], moments: int) -> list[int]:
    """Bytes alive at each of `moments`, from spans of (first moment, last moment, bytes)."""
    changes = [0] * (moments + 1)
    for first, last, size in spans:
        changes[first] += size
        changes[last + 1] -= size
    found, now = [], 0
    for change in changes[:-1]:
        now += change
        found.append(now)
    return found


class _Walk:
    def __init__(self, dims: Dims) -> None:
        self.dims = dims
        self.nodes: list[oir.Node | None] = []
        self.spans: dict[int, tuple[oir.Value, int, int]] = {}
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

    def graph(self, graph: oir.Graph, holder: oir.Node | None) -> None:
        """Append the moments of one run of `graph`, and the lifetimes of its values."""
        start = len(self.nodes)
        first = {id(value): (value, start) for value in graph.inputs}
        last: dict[int, int] = {}
        for node in graph:
            begin = len(self.nodes)
            branches = bodies(node)
            if not is_op(node, "If"):  # outputs of loops are there while the body runs, those of an If come after
                self.nodes.append(node)
            for body in branches:
                self.graph(body, node)
            if is_op(node, "If"):
                begin = len(self.nodes)
                self.nodes.append(node)
            end = len(self.nodes) - 1
            written = [value for value in node.outputs if value.name]
            first |= {id(value): (value, begin) for value in written}
            inside = captured(node) if branches else []
            last |= {id(value): end for value in (*node.inputs, *inside, *written) if value is not None}
            together = {id(value): value for value in (*reads(node), *written)}.values()
            self.lower_bound = max(self.lower_bound, sum(self.size(value) for value in together))
        if len(self.nodes) == start:
            self.nodes.append(holder)
        end = len(self.nodes) - 1
        last |= {id(value): end for value in (*graph.inputs, *graph.outputs)}
        self.spans |= {key: (value, begin, last[key]) for key, (value, begin) in first.items()}


def timeline(model: oir.Model, dims: Dims | None = None) -> Timeline:
    """What is alive when the nodes of `model` run in their order.

    Calls of functions count as one node; `burnish.ir.concrete` inlines them.

    Args:
        model: a model whose values have shapes; it is not changed.
        dims: numbers for the symbolic dimensions.
    """
    walk = _Walk(dims or {})
    walk.graph(model.graph, None)
    found = [Lifetime(value, walk.size(value), first, last) for value, first, last in walk.spans.values()]
    known = sorted((one for one in found if one.bytes), key=lambda one: (one.first, one.last))
    return Timeline(tuple(walk.nodes), tuple(known), walk.lower_bound, tuple(walk.unknown))


def peak_of(found: Timeline) -> Liveness:
    """The worst moment of a timeline, the first of several."""
    alive = found.alive()
    worst = max(range(len(alive)), key=alive.__getitem__)
    there = [Live(one.value, one.bytes) for one in found.lifetimes if one.first <= worst <= one.last]
    live = tuple(sorted(there, key=lambda one: -one.bytes))
    peak = None if found.unknown else alive[worst]
    return Liveness(peak, alive[worst], found.nodes[worst], live, found.lower_bound, found.unknown)


def activation_peak(model: oir.Model, dims: Dims | None = None) -> Liveness:
    """The most bytes of activations alive at one moment of a run of `model`; arguments as for `timeline`."""
    return peak_of(timeline(model, dims))
