"""Write the model for a newer opset of the standard operators."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import onnx_ir as oir

from burnish.ir import opsets
from burnish.ir.walk import STANDARD_DOMAINS, graphs, walk
from burnish.passes.base import ExactPass, Outcome

IR_VERSIONS = {
    9: 4,
    10: 5,
    11: 6,
    12: 7,
    13: 7,
    14: 7,
    15: 8,
    16: 8,
    17: 8,
    18: 8,
    19: 9,
    20: 9,
    21: 10,
    22: 10,
    23: 11,
    24: 11,
    25: 12,
}
"""The IR version that came with each opset."""


@dataclass(frozen=True)
class RaiseOpset(ExactPass):
    """Raise the model to a newer opset of the standard operators.

    All nodes are raised or none: a node that cannot be is named with the reason. Nothing is ever lowered.

    Attributes:
        to: the opset to write.
        when: `always`, or `softmax`: only a model with a Softmax, since what a newer opset may gain is Attention.
    """

    to: int = opsets.NEWEST
    when: Literal["always", "softmax"] = "always"
    needs: ClassVar[tuple[str, ...]] = ("inlined", "lifted")

    def rewrite(self, model: oir.Model, outcome: Outcome) -> None:
        """Rewrite `model` in place."""
        domain = next((name for name in STANDARD_DOMAINS if name in model.opset_imports), None)
        old = model.opset_imports[domain] if domain is not None else self.to
        if old >= self.to or (self.when == "softmax" and not walk(model, "Softmax")):
            return
        nodes = _standard_nodes(model)
        trial = model.clone()
        reasons = [
            opsets.obstacle(node, old, self.to) or opsets.upgrade(trial, copy, old, self.to)
            for node, copy in zip(nodes, _standard_nodes(trial), strict=True)
        ]
        for node, reason in zip(nodes, reasons, strict=True):
            if reason is not None:
                outcome.skip(node, reason)
        if any(reasons) or not outcome.take_model(["opset"]):
            return
        for node in nodes:
            opsets.upgrade(model, node, old, self.to)
        for graph in graphs(model):
            for name in STANDARD_DOMAINS:
                graph.opset_imports.pop(name, None)
        model.graph.opset_imports[""] = self.to
        model.ir_version = max(model.ir_version, IR_VERSIONS[self.to])


def _standard_nodes(model: oir.Model) -> list[oir.Node]:
    return [node for node in walk(model) if node.domain in STANDARD_DOMAINS]
