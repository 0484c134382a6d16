"""Nodes that several rewritten sites read, each made once and placed where all of them can read it."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import onnx_ir as oir

from burnish.ir import edit
from burnish.ir.dims import Dim
from burnish.ir.inference import Inference


@dataclass
class Shared:
    """Makes nodes and constants; asked for the same again, it gives what it made before."""

    model: oir.Model
    facts: Inference
    prefix: str
    _made: dict[tuple[object, ...], oir.Value] = field(default_factory=dict)

    def integers(self, numbers: list[int]) -> oir.Value:
        """A constant int64 vector."""
        return self._constant(("ints", *numbers), "sizes", np.array(numbers, np.int64))

    def number(self, number: float, dtype: oir.DataType) -> oir.Value:
        """A constant scalar."""
        return self._constant(("float", number, dtype), "number", np.array(number, np.float64).astype(dtype.numpy()))

    def scalar(self, number: int) -> oir.Value:
        """A constant int64 scalar."""
        return self._constant(("int", number), "size", np.array(number, np.int64))

    def constant(self, name: str, source: oir.Value, array: np.ndarray) -> oir.Value:
        """A constant made from the constant `source`, the same for the same source and name."""
        return self._constant((name, source), name, array)

    def _constant(self, key: tuple[object, ...], name: str, array: np.ndarray) -> oir.Value:
        if key not in self._made:
            self._made[key] = edit.add_constant(self.model, f"{self.prefix}.{name}", oir.tensor(array))
        return self._made[key]

    def length(self, size: Dim, otherwise: tuple[oir.Value, int]) -> oir.Value:
        """A vector of one element, `size`: a constant, or from a model input's shape, else from (value, axis)."""
        if isinstance(size, int):
            return self.integers([size])
        source, axis = self._measured(size) or otherwise
        if self.facts.opset >= 15:
            return self.step("Shape", source, start=axis, end=axis + 1)
        return self.step("Gather", self.step("Shape", source), self.integers([axis]))

    def _measured(self, size: Dim) -> tuple[oir.Value, int] | None:
        for value in self.model.graph.inputs:
            for axis, other in enumerate(self.facts.shape(value) or ()):
                if other == size:
                    return value, axis
        return None

    def squeezed(self, value: oir.Value, axis: int) -> oir.Value:
        """`value` without an axis of size 1."""
        return self._axes("Squeeze", value, [axis])

    def unsqueezed(self, value: oir.Value, count: int) -> oir.Value:
        """`value` with `count` axes of size 1 in front."""
        return self._axes("Unsqueeze", value, list(range(count)))

    def _axes(self, op: str, value: oir.Value, axes: list[int]) -> oir.Value:
        return self.step(op, value, self.integers(axes)) if self.facts.opset >= 13 else self.step(op, value, axes=axes)

    def step(self, op: str, *inputs: oir.Value | None, domain: str = "", **attributes: object) -> oir.Value:
        """The output of a node of these inputs: one that was made before, or a new one right behind its last input."""
        key = (op, *inputs, *sorted((name, str(x)) for name, x in attributes.items()))
        if key in self._made:
            return self._made[key]
        graph, last = self._behind(inputs)
        name = edit.unique_name(self.model, f"{self.prefix}.{op}")
        node = edit.make(op, inputs, attributes, like=last if last is not None else graph[0], domain=domain, name=name)
        node.outputs[0].name = name
        if last is None:
            graph.insert_before(graph[0], [node])
        else:
            graph.insert_after(last, [node])
        self.facts.follow(node)
        self._made[key] = node.outputs[0]
        return node.outputs[0]

    def _behind(self, inputs: tuple[oir.Value | None, ...]) -> tuple[oir.Graph, oir.Node | None]:
        """The innermost graph of these inputs, and the last of the nodes there that compute them."""
        computed = [node for value in inputs if value is not None and (node := value.producer()) is not None]
        inner = [node for node in computed if node.graph is not self.model.graph]
        here = inner or computed
        if not here:
            return self.model.graph, None
        graph = here[0].graph
        assert isinstance(graph, oir.Graph)
        if len(here) == 1:
            return graph, here[0]
        order = {id(node): index for index, node in enumerate(graph)}
        return graph, max(here, key=lambda node: order.get(id(node), -1))
