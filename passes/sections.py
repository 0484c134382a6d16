"""A model as a chain of sections, each a model of its own, cut before and behind its blocks.

An edit of one block changes one section. All others have what they had: the same nodes, attributes and weights, which
their keys say, so that what was loaded or computed for one of them serves the edited model too.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from dataclasses import dataclass, replace

import onnx_ir as oir

from burnish.ir import weights
from burnish.ir.network import reads
from burnish.ir.part import bounded
from burnish.ir.text import type_text
from burnish.ir.views.block import Structure

_SMALL = 64
"""A weight of up to so many elements is known by its values, a larger one by the tensor that holds it."""

_PIECES = 8
"""A model without blocks is cut into about so many sections."""


@dataclass(frozen=True, eq=False)
class Section:
    """Nodes of the main graph that run together.

    Attributes:
        number: its place in the chain.
        nodes: in order; a Constant is in every section that reads it.
        inputs: what they read of other sections and of the model's inputs, in order of first use.
        outputs: what they compute for other sections and for the caller, with the number of each among all that they
            compute.
        key: equal for sections that compute the same from their inputs, whatever the names; weights that are not small
            are the same tensors then. Good as long as the model lives. Where the model has functions it has keys of its
            own.
    """

    number: int
    nodes: tuple[oir.Node, ...]
    inputs: tuple[oir.Value, ...]
    outputs: Mapping[oir.Value, int]
    key: Hashable

    def model(self, whole: oir.Model) -> oir.Model:
        """The section as a model, whose inputs may be without a type.

        Args:
            whole: the model it was cut from; weights are shared.
        """
        return bounded(whole, self.nodes, self.inputs, list(self.outputs))


def places(model: oir.Model, structure: Structure) -> dict[str, int]:
    """The sections of a model's nodes by the nodes' names: one for each block, one for what lies between two blocks.

    Args:
        model: the model.
        structure: its blocks; without any the model is cut into about eight where one value alone passes.
    """
    if not structure.blocks:
        return _narrow(model)
    own = {node: 2 * block.index + 1 for block in structure.blocks for node in block.nodes}
    found: dict[oir.Node, int] = {}
    for node in model.graph:
        before = [found[source] for source in _sources(node)]
        if node in own:
            found[node] = max([own[node], *before])
        else:
            found[node] = max((place + place % 2 for place in before), default=0)
    return {str(node.name): place for node, place in found.items()}


def _narrow(model: oir.Model) -> dict[str, int]:
    nodes = [node for node in model.graph if not _spread(node)]
    weighty = [any(tensor.size > _SMALL for v in node.inputs if (tensor := weights.tensor_of(v))) for node in nodes]
    last = {value: index for index, node in enumerate(nodes) for value in reads(node)}
    last |= dict.fromkeys(model.graph.outputs, len(nodes))
    found: dict[str, int] = {}
    alive: set[oir.Value] = set()
    place = held = 0
    for index, node in enumerate(nodes):
        alive = {value for value in alive if last[value] >= index}
        if len(alive) == 1 and held >= sum(weighty) / _PIECES and weighty[index]:
            place, held = place + 1, 0
        found[str(node.name)] = place
        held += weighty[index]
        alive.update(value for value in node.outputs if value in last)
    return found


def cut(model: oir.Model, known: Mapping[str, int]) -> list[Section]:
    """The sections of a model, in an order in which they can run.

    Args:
        model: the model from which `known` was made, or a copy with edits.
        known: `places` of the nodes that were there before. Others go where they are read first.
    """
    nodes = [node for node in model.graph if not _spread(node)]
    read = {node: reads(node) for node in nodes}
    placed = _placed(nodes, read, known)
    outside = {value for value in model.graph.outputs}
    for node in nodes:
        outside.update(v for v in read[node] if (p := v.producer()) in placed and placed[p] != placed[node])
    members: dict[int, list[oir.Node]] = {}
    for node in nodes:
        members.setdefault(placed[node], []).append(node)
    found = [_section(number, members[number], read, outside) for number in sorted(members)]
    return [replace(one, key=(one.key, id(model))) for one in found] if model.functions else found


def _spread(node: oir.Node) -> bool:
    """Whether a node is a Constant that goes along with whoever reads it."""
    return weights.is_constant(node.outputs[0]) and not node.outputs[0].is_graph_output() if node.outputs else False


def _sources(node: oir.Node) -> list[oir.Node]:
    return [source for value in reads(node) if (source := value.producer()) is not None]


def _placed(
    nodes: list[oir.Node], read: Mapping[oir.Node, list[oir.Value]], known: Mapping[str, int]
) -> dict[oir.Node, int]:
    wanted: dict[oir.Node, int] = {}
    for node in reversed(nodes):
        place = known.get(str(node.name), wanted.get(node))
        if place is None:
            continue
        wanted[node] = place
        for value in read[node]:
            source = value.producer()
            if source is not None and str(source.name) not in known:
                wanted[source] = min(place, wanted.get(source, place))
    found: dict[oir.Node, int] = {}
    joined: list[tuple[int, int]] = []
    for node in nodes:
        sources = {value: found[s] for value in read[node] if (s := value.producer()) in found}
        found[node] = max([wanted.get(node, 0), *sources.values()])
        joined += [(place, found[node]) for value, place in sources.items() if not _is_tensor(value)]
    for first, last in sorted(joined):
        found = {node: last if first <= place < last else place for node, place in found.items()}
    return found


def _is_tensor(value: oir.Value) -> bool:
    """Whether a value may pass between sections; a sequence may not."""
    node = value.producer()
    made = node is not None and ("Sequence" in node.op_type or node.op_type.startswith("Optional"))
    return isinstance(value.type, oir.TensorType) or (value.type is None and not made)


def _section(
    number: int, own: list[oir.Node], read: Mapping[oir.Node, list[oir.Value]], outside: set[oir.Value]
) -> Section:
    made = {value for node in own for value in node.outputs}
    constants: dict[oir.Node, None] = {}
    inputs: dict[oir.Value, int] = {}
    for node in own:
        for value in read[node]:
            if value in made:
                continue
            if not weights.is_constant(value):
                inputs.setdefault(value, len(inputs))
            elif (producer := value.producer()) is not None:
                constants[producer] = None
    labels: dict[oir.Value, Hashable] = {value: ("in", index) for value, index in inputs.items()}
    lines = tuple(_line(node, labels) for node in own)
    numbered = [value for node in own for value in node.outputs]
    outputs = {value: index for index, value in enumerate(numbered) if value in outside}
    key = (tuple(map(type_text, inputs)), lines)
    return Section(number, (*constants, *own), tuple(inputs), outputs, key)


def _line(node: oir.Node, labels: dict[oir.Value, Hashable]) -> Hashable:
    """What a node does with what; its outputs get labels."""
    read = tuple(_label(value, labels) for value in node.inputs)
    attributes = _attributes(node, labels)
    for value in node.outputs:
        labels[value] = len(labels)
    return node.domain, node.op_type, node.overload, read, attributes, len(node.outputs)


def _attributes(node: oir.Node, labels: dict[oir.Value, Hashable]) -> Hashable:
    return tuple((name, _attribute(one, labels)) for name, one in sorted(node.attributes.items()))


def _label(value: oir.Value | None, labels: dict[oir.Value, Hashable]) -> Hashable:
    if value is None:
        return None
    found = labels.get(value)
    if found is None:
        node, tensor = value.producer(), value.const_value
        if node is not None:
            found = _attributes(node, labels)
        else:
            found = ("unknown", id(value)) if tensor is None else _tensor(tensor)
    return found


def _tensor(tensor: oir.TensorProtocol) -> Hashable:
    if tensor.size > _SMALL:
        return "large", id(tensor)
    return str(tensor.dtype), tuple(tensor.shape.numpy()), _bytes(tensor)


def _bytes(tensor: oir.TensorProtocol) -> Hashable:
    return repr(tensor.numpy().tolist()) if tensor.dtype == oir.DataType.STRING else tensor.tobytes()


def _attribute(attribute: oir.Attr, labels: dict[oir.Value, Hashable]) -> Hashable:
    kind, value = attribute.type, attribute.value
    if attribute.is_ref():
        return "ref", str(attribute.ref_attr_name)
    if kind in (oir.AttributeType.GRAPH, oir.AttributeType.GRAPHS):
        graphs = [value] if kind == oir.AttributeType.GRAPH else value
        return "graph", tuple(_graph(graph, labels) for graph in graphs)
    if kind in (oir.AttributeType.TENSOR, oir.AttributeType.TENSORS):
        tensors = [value] if kind == oir.AttributeType.TENSOR else value
        return "tensor", tuple(map(_tensor, tensors))
    return kind.name, repr(value)


def _graph(graph: oir.Graph, labels: dict[oir.Value, Hashable]) -> Hashable:
    for value in graph.inputs:
        labels[value] = len(labels)
    lines = tuple(_line(node, labels) for node in graph)
    return len(graph.inputs), lines, tuple(_label(value, labels) for value in graph.outputs)
