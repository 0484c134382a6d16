"""Keep residual sums and normalizations apart for ONNX Runtime on the CPU, where joined they are slower."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import onnx_ir as oir

from burnish.ir import edit, match
from burnish.ir.views.parameter import same_shape
from burnish.ir.walk import is_op, walk
from burnish.passes.base import ExactPass, Outcome

MICROSOFT = "com.microsoft"
_JOINED = ("SkipLayerNormalization", "SkipSimplifiedLayerNormalization")


@dataclass(frozen=True)
class SplitSkipNorm(ExactPass):
    """Write SkipLayerNormalization as Sum and LayerNormalization, and an Add before a LayerNormalization as Sum.

    On the CPU, SkipLayerNormalization takes several times as long as the two operators (ONNX Runtime 1.32, see
    docs/ideas/lowering.md). Its own optimizer joins an Add with the LayerNormalization behind it; a Sum it leaves.

    Attributes:
        target: only `ort-cpu` does something.
    """

    target: Literal["onnx", "ort-cpu", "ort-cuda"] = "onnx"
    needs: ClassVar[tuple[str, ...]] = ("inlined",)

    def rewrite(self, model: oir.Model, outcome: Outcome) -> None:
        """Rewrite `model` in place."""
        if self.target != "ort-cpu":
            return
        for node in walk(model):
            if is_op(node, *_JOINED, domain=MICROSOFT):
                if reason := _not_splittable(node):
                    outcome.skip(node, reason)
                elif outcome.take(node):
                    _split(node)
                else:
                    return
            elif is_op(node, "LayerNormalization") and (add := _joined_by_runtime(node)) is not None:
                if not outcome.take(node):
                    return
                total = edit.make("Sum", add.inputs, like=add)
                edit.replace_node(add, total)


def _not_splittable(node: oir.Node) -> str | None:
    if any(out.uses() or out.is_graph_output() for out in node.outputs[1:3]):
        return "its mean or deviation is read"
    return None if match.rank(node.inputs[0]) is not None else "the rank of its input is not known"


def _split(node: oir.Node) -> None:
    simplified = node.op_type == "SkipSimplifiedLayerNormalization"
    gamma, beta = node.inputs[2], None if simplified else match.input_of(node, 3)
    bias = match.input_of(node, 3 if simplified else 4)
    nodes: list[oir.Node] = []
    first = node.inputs[0]
    if bias is not None and node.inputs[0] is not None:
        nodes.append(edit.make("Add", [first, bias], like=node))
        first = same_shape(nodes[-1], node.inputs[0])
    total = edit.make("Sum", [first, node.inputs[1]], like=node)
    if node.inputs[0] is not None:
        same_shape(total, node.inputs[0])
    attributes = {"axis": -1, "epsilon": match.attribute(node, "epsilon", 1e-12)}
    name = "SimplifiedLayerNormalization" if simplified else "LayerNormalization"
    norm = edit.make(name, [total.outputs[0], gamma, beta], attributes, like=node)
    values = [norm.outputs[0], *(total.outputs[0] for _ in node.outputs[1:])]
    edit.replace_node(node, [*nodes, total, norm], values)


def _joined_by_runtime(node: oir.Node) -> oir.Node | None:
    """The Add of two computed values that nobody but this LayerNormalization reads."""
    add = match.producer(node.inputs[0], "Add")
    if add is None or not match.used_once(add.outputs[0]) or match.rank(add.outputs[0]) not in (None, 2, 3):
        return None
    vectors = [value for value in add.inputs if value is None or match.rank(value) in (0, 1)]
    return None if vectors else add
