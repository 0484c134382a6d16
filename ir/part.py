"""A part of a model as a model of its own."""

from __future__ import annotations

from collections.abc import Sequence, Set

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
    return bounded(model, [node for node in model.graph if node in nodes], *ends(model, nodes))


def bounded(
    model: oir.Model, nodes: Sequence[oir.Node], inputs: Sequence[oir.Value], outputs: Sequence[oir.Value]
) -> oir.Model:
    """Nodes of the main graph as a model, where what passes between them and the others is known already.

    Args:
        model: left untouched; weights are shared.
        nodes: in order, with the Constants that they read.
        inputs: what they read from outside, weights left out.
        outputs: what they compute for outside.
    """
    given = set(inputs)
    read = {value: None for node in nodes for value in reads(node) if value not in given and value.is_initializer()}
    graph = oir.GraphView(
        inputs, outputs, nodes=nodes, initializers=list(read), opset_imports=dict(model.graph.opset_imports)
    ).clone()
    functions = [function.clone() for function in model.functions.values()]
    return oir.Model(graph, ir_version=model.ir_version, functions=functions)
