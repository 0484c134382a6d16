"""An If whose condition is known is replaced by the branch it takes."""

from __future__ import annotations

from dataclasses import dataclass

import onnx_ir as oir

from burnish.ir import edit
from burnish.ir.inference import Inference
from burnish.ir.walk import is_op, main_graphs, walk
from burnish.passes.base import ExactPass, Outcome


@dataclass(frozen=True)
class FoldBranches(ExactPass):
    """Put the branch that is taken in the place of an If whose condition is constant or follows from shapes."""

    def rewrite(self, model: oir.Model, outcome: Outcome) -> None:
        again = any(is_op(node, "If") for node in walk(model))
        while again:
            again = False
            facts = Inference(model)
            for graph in main_graphs(model):
                for node in list(graph):
                    if is_op(node, "If") and node.graph is not None and self._fold(model, facts, node, outcome):
                        again = True

    def _fold(self, model: oir.Model, facts: Inference, node: oir.Node, outcome: Outcome) -> bool:
        known = facts.content(node.inputs[0])
        if known is None or known.size != 1 or known.reshape(-1)[0] is None:
            outcome.skip(node, "its condition depends on the inputs", matched=False)
            return False
        body = node.attributes["then_branch" if known.reshape(-1)[0] else "else_branch"].as_graph()
        ends = list(body.outputs)
        if body.initializers or any(value.graph is not body for value in ends):
            outcome.skip(node, "the branch holds or returns constants of its own; lift them first")
            return False
        if not outcome.take(node):
            return False
        body.outputs.clear()
        nodes = list(body)
        body.remove(nodes)
        for inner in nodes:
            for out in inner.outputs:
                out.name = edit.unique_name(model, out.name or "value")
        edit.replace_node(node, nodes, ends)
        return True
