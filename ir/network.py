"""A graph as a networkx graph, and what a node reads besides its inputs."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import onnx_ir as oir

from burnish.ir.walk import bodies


def captured(node: oir.Node) -> list[oir.Value]:
    """The values that the sub-graphs of `node` read from outside of it, each once, in order of first use."""
    graphs = [inner for body in bodies(node) for inner in (body, *body.subgraphs())]
    inside = {id(graph) for graph in graphs}
    found = {id(value): value for graph in graphs for value in _read_in(graph) if id(value.graph) not in inside}
    return list(found.values())


def reads(node: oir.Node) -> list[oir.Value]:
    """The inputs of `node` that are given and what its sub-graphs capture, each once."""
    given = [value for value in node.inputs if value is not None]
    return list({id(value): value for value in (*given, *captured(node))}.values())


def _read_in(graph: oir.Graph) -> Iterator[oir.Value]:
    for node in graph:
        yield from (value for value in node.inputs if value is not None)
    yield from graph.outputs


def network(graph: oir.Graph | oir.Function) -> Any:
    """A `networkx.DiGraph` of one graph: its nodes, and an edge from each node to each that needs its values.

    The graph is a snapshot; editing the model does not change it. Nodes of nested graphs are not in it: the node that
    holds them stands for them. Edge data: `values`, the list of values that pass along the edge in the order in which
    the reader takes them, and `captured`, the part of them that only sub-graphs of the reader take.

    Args:
        graph: the main graph, a nested graph or a function.
    """
    import networkx as nx

    found = nx.DiGraph()
    own = list(graph)
    found.add_nodes_from(own)
    inside = set(own)
    for node in own:
        given = {id(value) for value in node.inputs if value is not None}
        for value in reads(node):
            source = value.producer()
            if source not in inside:
                continue
            if not found.has_edge(source, node):
                found.add_edge(source, node, values=[], captured=[])
            edge = found.edges[source, node]
            edge["values"].append(value)
            if id(value) not in given:
                edge["captured"].append(value)
    return found
