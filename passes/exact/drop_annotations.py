"""A model that came without inner types and shapes is written without them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import onnx_ir as oir

from burnish.ir import origin
from burnish.ir.walk import graphs
from burnish.passes.base import ExactPass, Outcome


@dataclass(frozen=True)
class DropAnnotations(ExactPass):
    """Drop the types and shapes of inner values again when the model came without them.

    The passes infer them for their own use. Written out they are not neutral: on the CPU, ONNX Runtime joins residual
    sums with norms where it knows the shapes, into a kernel that is slower than the two (docs/ideas/lowering.md).
    A model that came with them keeps them.
    """

    breaks: ClassVar[tuple[str, ...]] = ("typed",)

    def rewrite(self, model: oir.Model, outcome: Outcome) -> None:
        """Rewrite `model` in place."""
        if origin.came_annotated(model):
            return
        for node in (node for graph in graphs(model) for node in graph):
            noted = [out for out in node.outputs if out.shape is not None and not out.is_graph_output()]
            if not noted:
                continue
            if not outcome.take(node):
                return
            for out in noted:
                out.shape = None
                out.type = None
