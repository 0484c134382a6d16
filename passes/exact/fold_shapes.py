"""The arithmetic of shapes in one short spelling: numbers where they are known, else pieces of the inputs' shapes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as oir

from burnish.ir import edit, match, weights
from burnish.ir.dims import Dim, Expr
from burnish.ir.inference import Inference, reshape_target
from burnish.ir.walk import bodies, is_op
from burnish.passes.base import ExactPass, Outcome

Key = tuple[oir.DataType | None, tuple[int, ...], tuple[Any, ...]]
Sources = dict[Expr, tuple[oir.Value, int]]


@dataclass(frozen=True)
class FoldShapes(ExactPass):
    """Replace shape arithmetic by numbers, by `0` and `-1` in Reshape, or by pieces of the inputs' shapes."""

    def rewrite(self, model: oir.Model, outcome: Outcome) -> None:
        _Folder(model, outcome).run()


class _Folder:
    def __init__(self, model: oir.Model, outcome: Outcome) -> None:
        self.model, self.outcome, self.facts = model, outcome, Inference(model)
        self.constants: dict[Key, oir.Value] = {}

    def run(self) -> None:
        for value in self.model.graph.initializers.values():
            elements = self.facts.integers(value)
            if elements is not None and weights.is_constant(value):
                self.constants.setdefault(self.key(value, elements), value)
        sources: Sources = {}
        for value in self.model.graph.inputs:
            self.offer(value, sources)
        self.graph(self.model.graph, {}, sources)

    def key(self, value: oir.Value, elements: list[Dim]) -> Key:
        content = self.facts.content(value)
        return self.facts.dtype(value), content.shape if content is not None else (), tuple(elements)

    def offer(self, value: oir.Value, sources: Sources) -> None:
        """Let the sizes of `value` be read from its shape from here on."""
        for axis, size in enumerate(self.facts.shape(value) or ()):
            if isinstance(size, Expr):
                sources.setdefault(size, (value, axis))

    def graph(self, graph: oir.Graph, known: dict[Key, oir.Value], sources: Sources) -> None:
        for node in list(graph):
            if node.graph is None:
                continue
            if is_op(node, "Shape") and node.inputs[0] is not None:
                self.offer(node.inputs[0], sources)
            for body in bodies(node):
                self.graph(body, dict(known), dict(sources))
            if is_op(node, "Reshape"):
                self.reshape(node)
            for out in node.outputs:
                if node.graph is not None and out.uses() and not out.is_graph_output():
                    self.value(node, out, known, sources)

    def value(self, node: oir.Node, out: oir.Value, known: dict[Key, oir.Value], sources: Sources) -> None:
        elements = self.facts.integers(out)
        if elements is None:
            return
        key = self.key(out, elements)
        if all(isinstance(size, int) for size in elements):
            if self.outcome.take(node):
                edit.replace_value(out, self.number(key, out.name))
                edit.remove_unused([node])
            return
        same = known.get(key)
        if same is not None and not _is_alive(same):
            same = None
            del known[key]
        if same is None and self.facts.dtype(out) == oir.DataType.INT64 and self.is_read_as_data(out):
            same = self.rebuilt(node, elements, key[1], known, sources)
        if same is None or same is out:
            known.setdefault(key, out)
        elif self.outcome.take(node):
            known[key] = same
            edit.replace_value(out, same)
            edit.remove_unused([node])

    def is_read_as_data(self, value: oir.Value) -> bool:
        """Whether a node reads `value` that is no shape arithmetic itself."""
        return any(self.facts.integers(reader.outputs[0]) is None for reader in match.consumers(value))

    def number(self, key: Key, name: str | None) -> oir.Value:
        if key not in self.constants or not self.constants[key].is_initializer():
            dtype, shape, elements = key
            array = np.array(elements, dtype.numpy() if dtype is not None else np.int64).reshape(shape)
            self.constants[key] = edit.add_constant(self.model, name or "sizes", array)
        return self.constants[key]

    def reshape(self, node: oir.Node) -> None:
        """Give a Reshape the target with `0` for kept sizes and at most one `-1`."""
        target = reshape_target(self.facts.shape(node.inputs[0]), self.facts.shape(node.outputs[0]))
        if target is None or self.facts.content(node.inputs[1]) is None:
            return
        if self.facts.numbers(node.inputs[1]) == target and not match.attribute(node, "allowzero", 0):
            return
        if self.outcome.take(node):
            key = (oir.DataType.INT64, (len(target),), tuple(target))
            edit.set_input(node, 1, self.number(key, f"{node.outputs[0].name}.shape"))
            node.attributes.pop("allowzero", None)

    def rebuilt(
        self, node: oir.Node, elements: list[Dim], shape: tuple[int, ...], known: dict[Key, oir.Value], sources: Sources
    ) -> oir.Value | None:
        """The value in its one spelling; the output of `node` itself where `node` is spelled so already."""
        if self.facts.opset < 15 or len(shape) > 1:
            return None
        parts = self.parts(elements, sources)
        if parts is None:
            return None
        if shape == () and is_op(node, "Squeeze") and self.is_piece(node.inputs[0], parts[0]):
            return node.outputs[0]
        if shape and len(parts) == 1 and self.is_piece(node.outputs[0], parts[0]):
            return node.outputs[0]
        if is_op(node, "Concat") and len(node.inputs) == len(parts):
            if all(self.is_piece(value, part) for value, part in zip(node.inputs, parts, strict=True)):
                return node.outputs[0]
        if self.outcome.limit is not None and self.outcome.rewritten >= self.outcome.limit:
            return None
        values = [self.piece(node, part, known) for part in parts]
        if len(values) == 1 and shape:
            return values[0]
        step = edit.make("Concat", values, {"axis": 0}, like=node) if shape else edit.make("Squeeze", values, like=node)
        return self.insert(node, step, elements, shape)

    def parts(self, elements: list[Dim], sources: Sources) -> list[Any] | None:
        """Runs of numbers as lists, runs of a value's shape as (value, start, end); None where a size has no source."""
        parts: list[Any] = []
        at = 0
        while at < len(elements):
            size = elements[at]
            if isinstance(size, int):
                if not parts or not isinstance(parts[-1], list):
                    parts.append([])
                parts[-1].append(size)
                at += 1
                continue
            value, axis = sources.get(size, (None, 0))
            if value is None or not _is_alive(value):
                return None
            whole = self.facts.shape(value) or ()
            length = 1
            while (
                at + length < len(elements)
                and axis + length < len(whole)
                and elements[at + length] == whole[axis + length]
            ):
                length += 1
            parts.append((value, axis, axis + length))
            at += length
        return parts

    def is_piece(self, value: oir.Value | None, part: Any) -> bool:
        if isinstance(part, list):
            return self.facts.numbers(value) == part and weights.is_constant(value)
        node = match.producer(value, "Shape")
        span = node is not None and (match.attribute(node, "start", 0), match.attribute(node, "end"))
        return node is not None and node.inputs[0] is part[0] and span == part[1:]

    def piece(self, node: oir.Node, part: Any, known: dict[Key, oir.Value]) -> oir.Value:
        if isinstance(part, list):
            return self.number((oir.DataType.INT64, (len(part),), tuple(part)), "sizes")
        value, start, end = part
        elements = list((self.facts.shape(value) or ())[start:end])
        key = (oir.DataType.INT64, (len(elements),), tuple(elements))
        if key not in known or not _is_alive(known[key]) or not self.is_piece(known[key], part):
            step = edit.make("Shape", [value], {"start": start, "end": end}, like=node)
            known[key] = self.insert(node, step, elements, (len(elements),))
        return known[key]

    def insert(self, before: oir.Node, node: oir.Node, elements: list[Dim], shape: tuple[int, ...]) -> oir.Value:
        out = node.outputs[0]
        out.name = edit.unique_name(self.model, f"{before.outputs[0].name}.{node.op_type}")
        node.name = out.name
        edit.insert_before(before, [node])
        out.type, out.shape = oir.TensorType(oir.DataType.INT64), oir.Shape(shape)
        self.facts.set(out, oir.DataType.INT64, shape)
        self.facts.learn(out, elements)
        return out


def _is_alive(value: oir.Value) -> bool:
    """Whether the node that computes `value` has not been removed."""
    node = value.producer()
    return node is None or node.graph is not None
