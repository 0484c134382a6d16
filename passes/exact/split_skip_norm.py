"""Keep residual sums and normalizations apart for ONNX Runtime on the CPU, where joined they are slower."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import onnx_ir as oir

from burnish.ir import edit, match
from burnish.ir.views.flow import SKIP_NORMS
from burnish.ir.walk import is_op, walk
from burnish.passes.base import ExactPass, Outcome
from burnish.passes.skip_norms import not_splittable, split

MICROSOFT = "com.microsoft"


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
            if is_op(node, *SKIP_NORMS, domain=MICROSOFT):
                if reason := not_splittable(node):
                    outcome.skip(node, reason)
                elif outcome.take(node):
                    split(node)
                else:
                    return
            elif is_op(node, "LayerNormalization") and (add := _joined_by_runtime(node)) is not None:
                if not outcome.take(node):
                    return
                total = edit.make("Sum", add.inputs, like=add)
                edit.replace_node(add, total)


def _joined_by_runtime(node: oir.Node) -> oir.Node | None:
    """The Add of two computed values that nobody but this LayerNormalization reads."""
    add = match.producer(node.inputs[0], "Add")
    if add is None or not match.used_once(add.outputs[0]) or match.rank(add.outputs[0]) not in (None, 2, 3):
        return None
    vectors = [value for value in add.inputs if value is None or match.rank(value) in (0, 1)]
    return None if vectors else add
