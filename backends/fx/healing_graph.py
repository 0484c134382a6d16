"""FX graphs in two halves: what is the same in every step, and what is trained."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence, Set
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx


@dataclass(frozen=True)
class Halves:
    """A graph cut in two.

    Attributes:
        before: takes the inputs of the whole and gives what the second half needs, as a tuple.
        behind: takes that and gives what was wanted, as a tuple.
        kept: the nodes of the whole whose values pass between them.
    """

    before: fx.GraphModule
    behind: fx.GraphModule
    kept: tuple[fx.Node, ...]


def descendants(roots: Iterable[fx.Node]) -> set[fx.Node]:
    """All nodes that need one of the roots, which are not among them themselves unless they need another."""
    found: set[fx.Node] = set()
    left = list(roots)
    while left:
        for user in left.pop().users:
            if user not in found:
                found.add(user)
                left.append(user)
    return found


def ancestors(nodes: Iterable[fx.Node], given: Collection[fx.Node] = ()) -> set[fx.Node]:
    """The nodes and all that they need where some are given, which are not among them."""
    found: set[fx.Node] = set()
    left = list(nodes)
    while left:
        node = left.pop()
        if node not in found and node not in given:
            found.add(node)
            left += node.all_input_nodes
    return found


def cut(module: fx.GraphModule, wanted: Sequence[fx.Node], moving: Set[fx.Node]) -> Halves:
    """The computation of `wanted` in two halves, of which the second holds the `moving` nodes and weights.

    Args:
        module: its parameters are shared with both halves.
        wanted: nodes of its graph.
        moving: nodes with all their descendants.
    """
    nodes = list(module.graph.nodes)
    places = [node for node in nodes if node.op == "placeholder"]
    needed = ancestors(wanted)
    given = descendants(places) | set(places)
    live = needed & moving
    resting = [node for node in nodes if node in needed and node in given and node not in live]
    ends = set(wanted)
    kept = tuple(n for n in resting if n in ends or any(user in live for user in n.users))
    behind = ancestors(wanted, set(kept))
    return Halves(
        leading_to(module, kept),
        part(module, kept, [n for n in nodes if n in behind], wanted),
        kept,
    )


def leading_to(module: fx.GraphModule, wanted: Sequence[fx.Node]) -> fx.GraphModule:
    """What computes the wanted nodes from the inputs of the module, as a tuple."""
    nodes = list(module.graph.nodes)
    places = [node for node in nodes if node.op == "placeholder"]
    needed = ancestors(wanted)
    return part(module, places, [node for node in nodes if node in needed and node not in places], wanted)


def part(
    module: fx.GraphModule, inputs: Sequence[fx.Node], nodes: Sequence[fx.Node], outputs: Sequence[fx.Node]
) -> fx.GraphModule:
    """A graph of its own of some nodes of a module, which shares its weights.

    Args:
        module: it has all weights that the nodes read.
        inputs: nodes whose values it takes.
        nodes: what it computes, each behind what it needs.
        outputs: nodes whose values it gives, as a tuple.
    """
    graph = fx.Graph()
    made = {node: graph.placeholder(node.name) for node in inputs}
    for node in nodes:
        made[node] = graph.node_copy(node, lambda one: made[one])
    graph.output(tuple(made[node] for node in outputs))
    return fx.GraphModule(module, graph)


def size_of(values: Iterable[Any], besides: Set[int]) -> int:
    """Bytes of the tensors among the values, memory that several share counted once, that of `besides` not at all."""
    seen = set(besides)
    total = 0
    for value in values:
        for one in value if isinstance(value, tuple | list) else (value,):
            if isinstance(one, torch.Tensor) and one.untyped_storage().data_ptr() not in seen:
                seen.add(one.untyped_storage().data_ptr())
                total += one.untyped_storage().nbytes()
    return total


def storages(module: torch.nn.Module) -> set[int]:
    """Where the weights of a module lie."""
    return {one.untyped_storage().data_ptr() for one in (*module.parameters(), *module.buffers())}


class Kept:
    """Values by key, kept while they fit into `limit` bytes and computed again otherwise."""

    def __init__(self, limit: int, besides: Set[int]) -> None:
        self._left = limit
        self._besides = besides
        self._values: dict[Any, tuple[Any, ...]] = {}

    def get(self, key: Any, compute: Callable[[], tuple[Any, ...]]) -> tuple[Any, ...]:
        """The values of `key`."""
        if key in self._values:
            return self._values[key]
        found = compute()
        size = size_of(found, self._besides)
        if size <= self._left:
            self._left -= size
            self._values[key] = found
        return found
