"""Write attention as one operator, with the meaning of the mask kept for every mask."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import onnx_ir as oir

from burnish.ir.inference import Inference
from burnish.ir.views.attention import Attention, Miss, find_attentions
from burnish.passes.attention_writer import AttentionWriter, Plan
from burnish.passes.base import ExactPass, Outcome
from burnish.passes.masks import Masks
from burnish.passes.shared import Shared

FIRST_OPSET = 23
"""The first opset with Attention."""


@dataclass(frozen=True)
class FuseAttention(ExactPass):
    """Write softmax(q k^T + mask) v, self or cross, grouped or cached, as one Attention operator.

    The mask stays the value that is added to the scores; it is never read as lengths. Shared heads are no longer
    repeated, heads are split and joined inside the operator, and a cache is appended there.

    Attributes:
        target: `onnx` writes the standard's Attention (opset 23); `ort-cpu` the same where the opset has it, else
            com.microsoft's MultiHeadAttention where that was measured not to be slower; `ort-cuda` MultiHeadAttention.
        slower: also write operators that were measured slower than the nodes they replace.
    """

    target: Literal["onnx", "ort-cpu", "ort-cuda"] = "onnx"
    slower: bool = False
    needs: ClassVar[tuple[str, ...]] = ("inlined", "sorted")

    def rewrite(self, model: oir.Model, outcome: Outcome) -> None:
        """Rewrite `model` in place."""
        facts = Inference(model)
        writer = AttentionWriter(model, facts, Masks(model, facts, Shared(model, facts, "mask")), self.target)
        standard = model.opset_imports.get("", 1) >= FIRST_OPSET and self.target != "ort-cuda"
        # From the last to the first: shapes read from the first layer's cache are then read by nobody else.
        for found in reversed(list(find_attentions(model, facts))):
            if isinstance(found, Miss):
                if found.anchor.op_type == "Softmax" or found.near:
                    outcome.skip(found.anchor, found.reason, matched=found.near)
                continue
            if facts.dtype(found.anchor.inputs[0]) == oir.DataType.DOUBLE:
                outcome.skip(found.anchor, "ONNX Runtime has no fused attention of doubles")
                continue
            parts = [one[0].value for one in (found.queries, found.keys, found.values)]
            if len({facts.dtype(value) for value in (*parts, found.end.outputs[0])} - {None}) > 1:
                outcome.skip(found.anchor, "queries, keys, values and result are not of one dtype")
                continue
            plan = writer.standard(found) if standard else self._contrib(writer, found)
            if isinstance(plan, str):
                outcome.skip(found.anchor, plan)
            elif plan is not None:
                if not outcome.take(found.anchor):
                    return
                writer.write(found, plan)

    def _contrib(self, writer: AttentionWriter, found: Attention) -> Plan | str | None:
        if found.anchor.op_type == "Attention":
            return None
        if self.target == "onnx":
            return f"opset {writer.facts.opset} has no Attention; raise it with --opset {FIRST_OPSET}"
        if self.target == "ort-cpu" and not found.guard and not self.slower:
            return (
                f"MultiHeadAttention is no faster; raise the opset with --opset {FIRST_OPSET} for Attention, which is"
            )
        return writer.multi_head(found)
