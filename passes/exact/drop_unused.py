"""Nothing stays in the file that no output depends on."""

from __future__ import annotations

from dataclasses import dataclass

import onnx_ir as oir

from burnish.ir import edit
from burnish.ir.walk import graphs, main_graphs, walk
from burnish.passes.base import ExactPass, Outcome

_OPTIONAL = {"LayerNormalization", "MaxPool", "Dropout", "BatchNormalization", "LSTM", "GRU", "RNN"}


@dataclass(frozen=True)
class DropUnused(ExactPass):
    """Remove nodes, initializers, optional outputs, functions and operator sets that nothing uses."""

    def rewrite(self, model: oir.Model, outcome: Outcome) -> None:
        for graph in reversed(main_graphs(model)):
            for node in reversed(list(graph)):
                if node.graph is None:
                    continue
                if not any(out.uses() or out.is_graph_output() for out in node.outputs):
                    if outcome.take(node):
                        edit.remove_unused([node])
                elif node.op_type in _OPTIONAL:
                    self._outputs(node, outcome)
            for value in list(graph.initializers.values()):
                unused = not value.uses() and not value.is_graph_output() and not value.is_graph_input()
                if unused and outcome.take_model(["initializer"]):
                    edit.drop_if_unused(value)
        self._imports(model, outcome)

    def _outputs(self, node: oir.Node, outcome: Outcome) -> None:
        count = len(node.outputs)
        while count > 1 and not (node.outputs[count - 1].uses() or node.outputs[count - 1].is_graph_output()):
            count -= 1
        if count < len(node.outputs) and outcome.take(node):
            node.resize_outputs(count)

    def _imports(self, model: oir.Model, outcome: Outcome) -> None:
        called = {node.op_identifier() for node in walk(model)}
        for identifier in list(model.functions):
            if identifier not in called and outcome.take_model(["function"]):
                del model.functions[identifier]
        domains = {node.domain for graph in graphs(model) for node in graph}
        for domain in list(model.opset_imports):
            if domain not in ("", "ai.onnx") and domain not in domains and outcome.take_model(["opset"]):
                del model.opset_imports[domain]
