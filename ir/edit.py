"""The only functions that rewire a graph. After each of them the names of inputs and outputs are what they were."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import onnx_ir as oir

from burnish.ir import weights
from burnish.ir.walk import bodies, main_graphs

SOURCES = "burnish.sources"
"""Key in `node.meta` of the names of the original nodes a node was made from."""


def sources(node: oir.Node) -> tuple[str, ...]:
    """The names of the nodes of the input model that `node` comes from."""
    kept = node.meta.get(SOURCES)
    return kept if kept is not None else (node.name or "?",)


def make(
    op_type: str,
    inputs: Sequence[oir.Value | None],
    attributes: Mapping[str, Any] | None = None,
    *,
    like: oir.Node | Sequence[oir.Node],
    domain: str = "",
    outputs: int = 1,
    name: str | None = None,
) -> oir.Node:
    """A new node, not yet in a graph, that remembers the nodes it was made from.

    Args:
        op_type: the operator.
        inputs: its inputs, None where absent; trailing ones that are None are dropped.
        attributes: Python values; those that are None are left out.
        like: the node or nodes it takes the place of: source of provenance and metadata.
        domain: the operator's domain.
        outputs: how many outputs it has.
        name: the node's name; the graph gives it one when absent.
    """
    origin = [like] if isinstance(like, oir.Node) else list(like)
    kept = list(inputs)
    while kept and kept[-1] is None:
        kept.pop()
    given = {key: value for key, value in (attributes or {}).items() if value is not None}
    node = oir.node(op_type, kept, given, domain=domain, num_outputs=outputs, name=name)
    node.meta[SOURCES] = tuple(dict.fromkeys(source for one in origin for source in sources(one)))
    for one in reversed(origin):
        node.metadata_props.update(one.metadata_props)
    return node


def copied(node: oir.Node, values: Mapping[oir.Value, oir.Value]) -> oir.Node:
    """A node like another, not yet in a graph, that reads `values[v]` in the place of each `v` that is a key.

    Attributes and weights are shared; outputs have the same types and shapes and no names. The node has no sub-graphs.
    """
    inputs = [values.get(value, value) if value is not None else None for value in node.inputs]
    new = oir.Node(
        node.domain,
        node.op_type,
        inputs,
        list(node.attributes.values()),
        overload=node.overload,
        num_outputs=len(node.outputs),
        version=node.version,
    )
    new.meta[SOURCES] = sources(node)
    new.metadata_props.update(node.metadata_props)
    for old, out in zip(node.outputs, new.outputs, strict=True):
        out.type, out.shape = old.type, old.shape
        if old.name == "":
            out.name = ""
    return new


def insert_before(anchor: oir.Node, nodes: Iterable[oir.Node]) -> None:
    """Put new nodes into the graph of `anchor`, in order, right before it."""
    anchor.graph.insert_before(anchor, list(nodes))  # type: ignore[union-attr]


def insert_behind(value: oir.Value, nodes: Iterable[oir.Node], graph: oir.Graph | None = None) -> None:
    """Put new nodes into a graph, in order, right behind what computes `value` there; else at the start.

    Args:
        value: what they read.
        nodes: new nodes.
        graph: that of `value` when absent; or a branch that reads it from outside.
    """
    producer = value.producer()
    chosen = graph or (value.graph if producer is None else producer.graph)
    if chosen is None:
        raise ValueError(f"value `{value.name}` is in no graph")
    if producer is not None and producer.graph is chosen:
        chosen.insert_after(producer, list(nodes))
    elif len(chosen):
        chosen.insert_before(chosen[0], list(nodes))
    else:
        chosen.extend(nodes)


def replace_value(old: oir.Value, new: oir.Value) -> None:
    """Let every reader of `old` read `new`; when `old` is a graph output, `new` becomes it under the same name,
    with its notes.

    A `new` that already is an output or an input of a graph, or a constant, gets an Identity in between, since a graph
    must not lose, merge or rename its outputs. `new` inherits what is known of type and shape where it has none.
    """
    if new.type is None:
        new.type = old.type
    if new.shape is None:
        new.shape = old.shape
    if old.is_graph_output():
        node = old.producer()
        taken = new.is_graph_output() or new.is_graph_input() or new.producer() is None or new.graph is not old.graph
        if taken and node is not None:
            step = make("Identity", [new], like=node)
            insert_before(node, [step])
            step.outputs[0].type, step.outputs[0].shape = old.type, old.shape
            new = step.outputs[0]
        old.name, new.name = None, old.name
        if old.shape is not None or not isinstance(old.type, oir.TensorType | None):
            new.shape = old.shape
        new.type = old.type
        new.meta.update(old.meta)
    old.replace_all_uses_with(new, replace_graph_outputs=True)


def replace_node(old: oir.Node, new: oir.Node | Sequence[oir.Node], outputs: Sequence[oir.Value] | None = None) -> None:
    """Put new nodes in the place of `old`, and remove it together with all that only it needed.

    Args:
        old: the node to replace.
        new: the nodes that take its place, in order.
        outputs: the values that take the place of `old.outputs`, one by one; by default those of the last new node.
    """
    nodes = [new] if isinstance(new, oir.Node) else list(new)
    for before, after in zip(old.outputs, nodes[-1].outputs if outputs is None else (), strict=False):
        if after.name is None and not before.is_graph_output():
            before.name, after.name = None, before.name
    insert_before(old, nodes)
    values = outputs if outputs is not None else nodes[-1].outputs
    for before, after in zip(old.outputs, values, strict=False):
        replace_value(before, after)
    remove_unused([old])


def bypass(node: oir.Node, value: oir.Value | None = None) -> None:
    """Let the readers of the first output of `node` read `value` (by default its first input), and remove it."""
    source = value if value is not None else node.inputs[0]
    if source is None:
        raise ValueError(f"node `{node.name}` has no input to bypass to")
    replace_value(node.outputs[0], source)
    remove_unused([node])


def remove_unused(nodes: Iterable[oir.Node]) -> None:
    """Remove those of `nodes` whose outputs nobody reads, then whatever only they needed, initializers included."""
    pending = list(nodes)
    while pending:
        node = pending.pop()
        graph = node.graph
        if graph is None or any(out.uses() or out.is_graph_output() for out in node.outputs):
            continue
        read = [value for value in node.inputs if value is not None]
        for body in bodies(node):
            read += [v for inner in body.all_nodes() for v in inner.inputs if v is not None]
            for inner in list(body.all_nodes()):
                for index in range(len(inner.inputs)):
                    inner.replace_input_with(index, None)
        graph.remove(node, safe=True)
        for value in read:
            drop_if_unused(value)
            if (above := value.producer()) is not None:
                pending.append(above)


def drop_if_unused(value: oir.Value) -> None:
    """Remove an initializer that nobody reads and that is neither input nor output of its graph."""
    if value.is_initializer() and not value.uses() and not value.is_graph_output() and not value.is_graph_input():
        value.graph.initializers.pop(value.name)  # type: ignore[union-attr, arg-type]


def unique_name(model: oir.Model, wanted: str) -> str:
    """`wanted`, or `wanted` with a number behind it, such that no value of any graph of the model has that name."""
    taken = _taken(model)
    name, number = wanted, 1
    while name in taken:
        name, number = f"{wanted}_{number}", number + 1
    taken.add(name)
    return name


def name_nodes(model: oir.Model) -> None:
    """Give every node that has no name, or that of an earlier node, a name of its own: that of its first output.

    The same model gets the same names every time.
    """
    nodes = [node for graph in main_graphs(model) for node in graph]
    taken, double = set[str](), []
    for node in nodes:
        if node.name and node.name not in taken:
            taken.add(node.name)
        else:
            double.append(node)
    for node in double:
        wanted = next((str(value.name) for value in node.outputs if value.name), node.op_type)
        name, number = wanted, 1
        while name in taken:
            name, number = f"{wanted}_{number}", number + 1
        taken.add(name)
        node.name = name


def separate_names(model: oir.Model) -> None:
    """Rename values of nested graphs that are called like a value of another graph; onnx_ir names each graph alone."""
    graphs = main_graphs(model)
    if len(graphs) == 1:
        return
    owners: dict[str, oir.Value] = {}
    double = []
    for graph in graphs:
        for value in _values(graph):
            if value.name and owners.setdefault(value.name, value) is not value:
                double.append(value)
    for value in double:
        number = 1
        while f"{value.name}_{number}" in owners:
            number += 1
        value.name = f"{value.name}_{number}"
        owners[value.name] = value
    if double:
        model.meta.pop("burnish.names", None)


def release_name(model: oir.Model, value: oir.Value) -> str:
    """The name of a value that is about to be removed, free for the value that takes its place."""
    name = value.name or "value"
    _taken(model).discard(name)
    value.name = None
    return name


def _taken(model: oir.Model) -> set[str | None]:
    taken: set[str | None] | None = model.meta.get("burnish.names")
    if taken is None:
        taken = {value.name for graph in main_graphs(model) for value in _values(graph)}
        model.meta["burnish.names"] = taken
    return taken


def _values(graph: oir.Graph) -> Iterable[oir.Value]:
    yield from graph.inputs
    yield from graph.initializers.values()
    for node in graph:
        yield from node.outputs


def add_constant(model: oir.Model, name: str, array: np.ndarray | oir.TensorProtocol) -> oir.Value:
    """A new initializer of the main graph (nested graphs can read it), under `name` or the nearest free name.

    Args:
        model: the model.
        name: the wanted name.
        array: the values; pass `weights.rounded(...)` for weights that were computed in float64.
    """
    free = unique_name(model, name)
    tensor = oir.tensor(array, name=free) if isinstance(array, np.ndarray) else array
    tensor.name = free
    kind, shape = oir.TensorType(tensor.dtype), oir.Shape(tensor.shape.numpy())
    value = oir.Value(name=free, type=kind, shape=shape, const_value=tensor)
    model.graph.initializers.add(value)
    return value


def add_rounded(model: oir.Model, name: str, array: np.ndarray, dtype: oir.DataType) -> oir.Value:
    """`add_constant` for weights computed in float64 and stored in `dtype`."""
    return add_constant(model, name, weights.rounded(array, dtype))


def set_input(node: oir.Node, index: int, value: oir.Value | None) -> None:
    """Let input `index` of `node` be `value`, adding absent inputs before it, and drop what nobody reads any more."""
    if index >= len(node.inputs):
        node.resize_inputs(index + 1)
    old = node.inputs[index]
    node.replace_input_with(index, value)
    if old is not None and old is not value:
        drop_if_unused(old)
        if (above := old.producer()) is not None:
            remove_unused([above])
