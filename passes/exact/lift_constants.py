"""Constants, wherever an exporter put them, become initializers of the main graph."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import onnx_ir as oir

from burnish.ir import edit, weights
from burnish.ir.walk import is_op, main_graphs
from burnish.passes.base import ExactPass, Outcome


@dataclass(frozen=True)
class LiftConstants(ExactPass):
    """Turn `Constant` nodes, also those in nested graphs, into initializers of the main graph."""

    gives: ClassVar[tuple[str, ...]] = ("lifted",)

    def rewrite(self, model: oir.Model, outcome: Outcome) -> None:
        for graph in main_graphs(model):
            for node in list(graph):
                if is_op(node, "Constant"):
                    self._lift(model, node, outcome)
            if graph is not model.graph:
                self._lift_initializers(model, graph, outcome)

    def _lift(self, model: oir.Model, node: oir.Node, outcome: Outcome) -> None:
        tensor = weights.tensor_of(node.outputs[0])
        if tensor is None:
            outcome.skip(node, "its value is text, sparse or an attribute of a function")
            return
        if not outcome.take(node):
            return
        out = node.outputs[0]
        if not out.is_graph_output():
            value = edit.add_constant(model, edit.release_name(model, out), tensor)
        else:
            value = edit.add_constant(model, out.name or "constant", tensor)
        edit.replace_value(out, value)
        edit.remove_unused([node])

    def _lift_initializers(self, model: oir.Model, graph: oir.Graph, outcome: Outcome) -> None:
        for value in list(graph.initializers.values()):
            readers = [use.node for use in value.uses()]
            if value.is_graph_input() or value.is_graph_output() or value.const_value is None or not readers:
                continue
            if not outcome.take(readers[0]):
                return
            graph.initializers.pop(value.name or "")
            edit.replace_value(value, edit.add_constant(model, edit.release_name(model, value), value.const_value))
