"""A part of a model as a model of its own."""

from __future__ import annotations

from collections.abc import Set

import onnx_ir as oir

from burnish.ir.network import reads


def ends(model: oir.Model, nodes: Set[oir.Node]) -> tuple[list[oir.Value], list[oir.Value]]:
    """What nodes of the main graph read from outside, weights left out, and what they compute for outside, in order."""
    made = {value for node in nodes for value in node.outputs}
    read = {value for node in nodes for value in reads(node) if value not in made}
    read_outside = {value for node in model.graph if node not in nodes for value in reads(node)}
    inputs = [value for value in model.graph.inputs if value in read]
    inputs += [value for node in model.graph for value in node.outputs if value in read]
    outputs = [
        value
        for node in model.graph
        if node in nodes
        for value in node.outputs
        if value.is_graph_output() or value in read_outside
    ]
    return inputs, outputs


def part(model: oir.Model, nodes: Set[oir.Node]) -> oir.Model:
    """Nodes of the main graph as a model whose inputs and outputs are what passes between them and the others.

    Args:
        model: left untouched; weights are shared. Values that become inputs may be without a type.
        nodes: nodes of its main graph, at least one.
    """
    graph = oir.convenience.extract(model.graph, *ends(model, nodes))
    return oir.Model(graph, ir_version=model.ir_version, functions=list(model.functions.values())).clone()
