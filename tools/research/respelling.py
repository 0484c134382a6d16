"""The same model in other words: other inner names, another order of independent nodes, other notes beside them."""

from __future__ import annotations

import heapq
import random
from typing import Any

import onnx

from burnish.ir.views.block_hash import COMMUTATIVE

_GRAPHS = (onnx.AttributeProto.GRAPH, onnx.AttributeProto.GRAPHS)


def respelled(source: onnx.ModelProto, seed: int, *, swap: bool = False) -> onnx.ModelProto:
    """A model that computes the same and differs in everything that is no part of its meaning.

    Nodes, values, initializers and the values of functions get new names, nodes another topological order,
    initializers, value infos and functions another order, metadata and documentation are replaced, in nested graphs
    and functions too. Names and order of the model's inputs and outputs stay.

    Args:
        source: any valid model; not changed. Its external data must be beside the result, too.
        seed: decides everything.
        swap: exchange operands of commutative operators, too.
    """
    model = onnx.ModelProto()
    model.CopyFrom(source)
    writer = _Writer(random.Random(seed), swap)
    writer.notes(model)
    model.producer_name, model.producer_version = writer.name(), "2"
    writer.graph(model.graph, {value.name: value.name for value in [*model.graph.input, *model.graph.output]})
    for function in model.functions:
        writer.function(function)
    writer.shuffle(model.functions)
    return model


class _Writer:
    def __init__(self, chance: random.Random, swap: bool) -> None:
        self.random, self.swap = chance, swap
        self.used: set[str] = set()

    def name(self) -> str:
        """A name that was not given before; one in ten is odd."""
        while True:
            found = "".join(self.random.choices("abcxyz_./:019", k=self.random.randint(1, 12)))
            found = f"{found} {found}" if self.random.random() < 0.1 else found
            if found not in self.used:
                self.used.add(found)
                return found

    def notes(self, part: onnx.ModelProto | onnx.GraphProto | onnx.NodeProto | onnx.FunctionProto) -> None:
        """New documentation and metadata."""
        part.doc_string = self.name()
        del part.metadata_props[:]
        part.metadata_props.add(key=self.name(), value=self.name())

    def shuffle(self, field: Any) -> None:
        """Another order for a repeated field."""
        items = list(field)
        self.random.shuffle(items)
        self._put(field, items)

    def _put(self, field: Any, items: list[Any]) -> None:
        del field[:]
        field.extend(items)

    def graph(self, graph: onnx.GraphProto, names: dict[str, str]) -> None:
        """Respell a graph in place; `names` has the new names of the values around it and of those that stay."""
        self.used |= set(names.values())
        self.notes(graph)
        graph.name = self.name()
        own = dict(names)
        for value in [*graph.input, *graph.initializer, *graph.output]:
            own.setdefault(value.name, self.name())
        for sparse in graph.sparse_initializer:
            own.setdefault(sparse.values.name, self.name())
        self._put(graph.node, self._nodes(list(graph.node), own))
        for value in [*graph.input, *graph.initializer, *graph.output, *graph.value_info]:
            value.name = own.get(value.name, value.name)
        for sparse in graph.sparse_initializer:
            sparse.values.name = own[sparse.values.name]
        for note in graph.quantization_annotation:
            note.tensor_name = own.get(note.tensor_name, note.tensor_name)
            for entry in note.quant_parameter_tensor_names:
                entry.value = own.get(entry.value, entry.value)
        self.shuffle(graph.initializer)
        self.shuffle(graph.value_info)

    def function(self, function: onnx.FunctionProto) -> None:
        """Respell a function in place."""
        self.notes(function)
        own = {name: self.name() for name in [*function.input, *function.output]}
        self._put(function.node, self._nodes(list(function.node), own))
        for field in (function.input, function.output):
            self._put(field, [own[name] for name in field])
        for value in function.value_info:
            value.name = own.get(value.name, value.name)

    def _nodes(self, nodes: list[onnx.NodeProto], own: dict[str, str]) -> list[onnx.NodeProto]:
        ordered = self._reordered(nodes)
        for node in ordered:
            for name in node.output:
                if name:
                    own.setdefault(name, self.name())
        for node in ordered:
            self.notes(node)
            node.name = self.name() if self.random.random() < 0.9 else ""
            inputs = [own.get(name, name) if name else "" for name in node.input]
            if self.swap and node.op_type in COMMUTATIVE and node.domain in ("", "ai.onnx"):
                self.random.shuffle(inputs)
            self._put(node.input, inputs)
            self._put(node.output, [own[name] if name else "" for name in node.output])
            self.shuffle(node.attribute)
            for attribute in node.attribute:
                for body in _bodies(attribute):
                    self.graph(body, own)
        return ordered

    def _reordered(self, nodes: list[onnx.NodeProto]) -> list[onnx.NodeProto]:
        """Another topological order, any of them."""
        maker = {name: index for index, node in enumerate(nodes) for name in node.output if name}
        needs = [{maker[name] for name in _read(node) if name in maker} - {i} for i, node in enumerate(nodes)]
        readers: list[list[int]] = [[] for _ in nodes]
        for index, found in enumerate(needs):
            for one in found:
                readers[one].append(index)
        waiting = [len(found) for found in needs]
        ready = [(self.random.random(), index) for index, count in enumerate(waiting) if not count]
        heapq.heapify(ready)
        result = []
        while ready:
            _, index = heapq.heappop(ready)
            result.append(nodes[index])
            for one in readers[index]:
                waiting[one] -= 1
                if not waiting[one]:
                    heapq.heappush(ready, (self.random.random(), one))
        if len(result) != len(nodes):
            raise ValueError("the nodes of the model depend on each other in a circle")
        return result


def _bodies(attribute: onnx.AttributeProto) -> list[onnx.GraphProto]:
    if attribute.ref_attr_name or attribute.type not in _GRAPHS:
        return []
    return [attribute.g] if attribute.type == onnx.AttributeProto.GRAPH else list(attribute.graphs)


def _read(node: onnx.NodeProto) -> set[str]:
    """All names that a node and its nested graphs read, those of its nested graphs' own values included."""
    found = {name for name in node.input if name}
    for attribute in node.attribute:
        for body in _bodies(attribute):
            found |= {value.name for value in body.output}
            for inner in body.node:
                found |= _read(inner)
    return found
