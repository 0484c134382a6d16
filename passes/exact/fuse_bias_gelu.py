"""Let ONNX Runtime's BiasGelu and FastGelu add the bias that a Gelu reads."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import onnx_ir as oir

from burnish.ir import edit, match
from burnish.ir.views.parameter import find_parameter
from burnish.ir.walk import is_op, walk
from burnish.passes.base import ExactPass, Outcome

MICROSOFT = "com.microsoft"


@dataclass(frozen=True)
class FuseBiasGelu(ExactPass):
    """Write Add of a vector and Gelu as BiasGelu (FastGelu for the one with tanh) where ONNX Runtime is the target.

    Attributes:
        target: `onnx` does nothing.
    """

    target: Literal["onnx", "ort-cpu", "ort-cuda"] = "onnx"
    needs: ClassVar[tuple[str, ...]] = ("inlined",)

    def rewrite(self, model: oir.Model, outcome: Outcome) -> None:
        """Rewrite `model` in place."""
        for node in walk(model) if self.target != "onnx" else ():
            operator = _with_bias(node)
            add = match.producer(node.inputs[0], "Add") if operator is not None else None
            if operator is None or add is None:
                continue
            found = _terms(add, self.target)
            if isinstance(found, str):
                outcome.skip(node, found)
                continue
            if not outcome.take(node):
                return
            model.graph.opset_imports.setdefault(MICROSOFT, 1)
            edit.replace_node(node, edit.make(operator, found, like=(add, node), domain=MICROSOFT))


def _with_bias(node: oir.Node) -> str | None:
    """The operator that does what this Gelu does and adds a bias; None when the node is no Gelu or has its bias."""
    if is_op(node, "FastGelu", domain=MICROSOFT):
        return "FastGelu" if match.input_of(node, 1) is None else None
    if is_op(node, "Gelu", domain=MICROSOFT):
        return "BiasGelu"
    if is_op(node, "Gelu"):
        return "FastGelu" if match.attribute(node, "approximate", "none") == "tanh" else "BiasGelu"
    return None


def _terms(add: oir.Node, target: str) -> tuple[oir.Value, oir.Value] | str:
    """What is added, the vector last; or why the operator does not take it."""
    value = add.outputs[0]
    if not match.used_once(value):
        return "the sum is read elsewhere"
    if value.dtype != oir.DataType.FLOAT and (target == "ort-cpu" or value.dtype != oir.DataType.FLOAT16):
        return "ONNX Runtime has no kernel for these numbers"
    pair = match.with_constant(add)
    vector = find_parameter(pair[1]) if pair is not None else None
    if pair is None or vector is None:
        return "neither term of the sum is a constant"
    size = match.dim(pair[0], -1)
    if size is None or vector.shape != (size,):
        return "the constant is no vector of the size of the last axis"
    return pair
