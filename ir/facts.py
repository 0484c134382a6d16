"""What can be known to hold for a model. A pass declares the facts it needs, breaks and gives, and they are checked."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import onnx_ir as oir

from burnish.ir import edit, text, walk
from burnish.ir.errors import BurnishError
from burnish.ir.match import describe
from burnish.ir.walk import bodies, main_graphs


@dataclass(frozen=True)
class Breach:
    """The first place where a fact does not hold: what is wrong, at which node, and what mends it."""

    cause: str
    node: oir.Node | None
    hint: str


class FactError(BurnishError):
    """A fact that a pass needs, or should have kept or given, does not hold."""

    exit_code = 3


def check(model: oir.Model, facts: Iterable[str], pass_name: str, moment: str) -> None:
    """Check facts in order.

    Args:
        model: the model.
        facts: names of `FACTS`.
        pass_name: the pass that runs now.
        moment: `"before"` when the pass needs the facts, `"after"` when it should have kept or given them.

    Raises:
        FactError: for the first fact that does not hold, with the nodes around the place.
    """
    for fact in facts:
        breach = FACTS[fact](model)
        if breach is not None:
            verb = "needs" if moment == "before" else "left a model without"
            lines = [f"`{pass_name}` {verb} `{fact}`: {breach.cause}", *_excerpt(model, breach.node)]
            raise FactError("\n".join(lines), hint=breach.hint)


def _excerpt(model: oir.Model, node: oir.Node | None) -> list[str]:
    """The lines of the nodes around `node`, with a mark at `node` and the nodes of the input model it comes from."""
    if node is None:
        return []
    lines = []
    for line, found in text.around(model, node):
        origin = f"    from {', '.join(edit.sources(found))}" if found is node else ""
        lines.append(f"{'  >' if found is node else '   '} {line.strip()}{origin}")
    return lines


def _sorted(model: oir.Model) -> Breach | None:
    """Every node comes after the nodes whose outputs it or its nested graphs read."""
    for root in (model.graph, *(function.graph for function in model.functions.values())):
        found = _unsorted(root, set())
        if found is not None:
            return found
    return None


def _unsorted(graph: oir.Graph, outer: set[int]) -> Breach | None:
    known = set(outer)
    known.update(map(id, graph.inputs))
    known.update(map(id, graph.initializers.values()))
    for node in graph:
        for value in node.inputs:
            if value is not None and id(value) not in known:
                cause = f"{describe(node)} reads `{value.name}` before it is computed"
                return Breach(cause, node, "put the nodes in topological order")
        for body in bodies(node):
            found = _unsorted(body, known)
            if found is not None:
                return found
        known.update(map(id, node.outputs))
    return None


def _named(model: oir.Model) -> Breach | None:
    """Values and nodes have names, and no two of them the same one, nested graphs included; each function by itself."""
    for root in (model.graph, *(function.graph for function in model.functions.values())):
        values: dict[str, int] = {}
        nodes: set[str] = set()
        for graph in (root, *root.subgraphs()):
            for value in (*graph.inputs, *graph.initializers.values()):
                breach = _name_breach(value, None, values)
                if breach is not None:
                    return breach
            for node in graph:
                if not node.name or node.name in nodes:
                    cause = f"two nodes are called `{node.name}`" if node.name else f"{describe(node)} has no name"
                    return Breach(cause, node, "give every node a name of its own")
                nodes.add(node.name)
                for value in node.outputs:
                    breach = _name_breach(value, node, values)
                    if breach is not None:
                        return breach
    return None


def _name_breach(value: oir.Value, node: oir.Node | None, taken: dict[str, int]) -> Breach | None:
    hint = "give every value a name of its own"
    if not value.name:
        used = bool(value.uses()) or value.is_graph_output() or node is None
        place = describe(node) if node is not None else "a graph"
        return Breach(f"{place} has a value without a name", node, hint) if used else None
    if taken.setdefault(value.name, id(value)) != id(value):
        return Breach(f"two values are called `{value.name}`", node, hint)
    return None


def _inlined(model: oir.Model) -> Breach | None:
    """No node calls a function of the model."""
    for node in walk.walk(model) if model.functions else ():
        if node.op_identifier() in model.functions:
            return Breach(f"{describe(node)} calls a function of the model", node, "inline the model's functions first")
    return None


def _lifted(model: oir.Model) -> Breach | None:
    """Constants are initializers: no `Constant` node outside functions."""
    for graph in main_graphs(model):
        for node in graph:
            if walk.is_op(node, "Constant"):
                return Breach(f"{describe(node)} holds a constant", node, "turn Constant nodes into initializers first")
    return None


def _typed(model: oir.Model) -> Breach | None:
    """Every value that is read or returned has a type, and a shape of known rank when it is a tensor."""
    for graph in main_graphs(model):
        for value in (*graph.inputs, *graph.initializers.values()):
            if not _has_type(value):
                return Breach(f"the type or rank of `{value.name}` is unknown", None, "infer types and shapes first")
        for node in graph:
            for value in node.outputs:
                if not _has_type(value) and (value.uses() or value.is_graph_output()):
                    cause = f"the type or rank of `{value.name}`, made by {describe(node)}, is unknown"
                    return Breach(cause, node, "give the new value a type and a shape, or infer them")
    return None


def _has_type(value: oir.Value) -> bool:
    if value.const_value is not None:
        return True
    tensor = isinstance(value.type, oir.TensorType | oir.SparseTensorType)
    return value.type is not None and (not tensor or value.shape is not None)


FACTS: dict[str, Callable[[oir.Model], Breach | None]] = {
    "sorted": _sorted,
    "named": _named,
    "inlined": _inlined,
    "lifted": _lifted,
    "typed": _typed,
}
"""The facts: each gives the first place where it does not hold, or None when it holds."""
