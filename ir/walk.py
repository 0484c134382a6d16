"""Visit the nodes of a model: the main graph, the graphs nested in its nodes, and its functions."""

from __future__ import annotations

from collections.abc import Iterator

import onnx_ir as oir

STANDARD_DOMAINS = ("", "ai.onnx")


def graphs(model: oir.Model) -> Iterator[oir.Graph]:
    """The main graph, then every graph nested in it and in the model's functions, outer before inner."""
    pending = [function.graph for function in reversed(model.functions.values())]
    pending.append(model.graph)
    while pending:
        graph = pending.pop()
        yield graph
        pending += reversed([body for node in graph if node.attributes for body in bodies(node)])


def main_graphs(model: oir.Model) -> list[oir.Graph]:
    """The main graph and every graph nested in it, outer before inner; functions are left out."""
    found = [model.graph]
    for graph in found:
        found += [body for node in graph if node.attributes for body in bodies(node)]
    return found


def bodies(node: oir.Node) -> list[oir.Graph]:
    """The graphs nested directly in `node`: the branches of an If, the body of a Loop or Scan."""
    found: list[oir.Graph] = []
    for attribute in node.attributes.values():
        if attribute.is_ref():
            continue
        if attribute.type == oir.AttributeType.GRAPH:
            found.append(attribute.as_graph())
        elif attribute.type == oir.AttributeType.GRAPHS:
            found.extend(attribute.as_graphs())
    return found


def walk(model: oir.Model, *op_types: str, domain: str = "") -> list[oir.Node]:
    """The nodes of all graphs of `model` in order, as a list that stays valid while the graph is edited.

    Args:
        model: the model to walk.
        op_types: keep nodes of these operators only; all nodes when empty.
        domain: the operators' domain when `op_types` is given; `""` also means `ai.onnx`.
    """
    found = [node for graph in graphs(model) for node in graph]
    return [node for node in found if is_op(node, *op_types, domain=domain)] if op_types else found


def is_op(node: oir.Node | None, *op_types: str, domain: str = "") -> bool:
    """Whether `node` exists and is one of `op_types` of `domain` (`""` also means `ai.onnx`)."""
    if node is None or node.op_type not in op_types:
        return False
    return node.domain == domain or (domain == "" and node.domain in STANDARD_DOMAINS)
