"""Softmax attention as attention with a ReLU kernel, whose cost is linear in the number of tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np
import onnx_ir as oir

from burnish.ir.errors import InputError
from burnish.ir.inference import Inference
from burnish.ir.views.attention import Attention, Miss, find_attentions
from burnish.passes import catalog, kernel_attention, lossy
from burnish.passes.base import Outcome
from burnish.passes.kernel_attention import Linear
from burnish.passes.lossy import Context, Edit, LossyPass, Savings


@dataclass(frozen=True)
class LinearAttention(LossyPass):
    """Replace softmax attention by attention with a ReLU kernel and a depthwise convolution of the values (SLA).

    Row i becomes `relu(q_i) S / (relu(q_i) z + 1e-6) + conv(v)_i`, where S is the sum of `relu(k_j)' v_j` over all
    tokens, and z that of `relu(k_j)'` (SLAB, arXiv:2405.11582). The convolution begins with zeros. What is left of
    a trained model is little before it is healed; while it is, the softmax fades out.

    Attributes:
        first: `kv` multiplies keys with values first, in time linear in the tokens; `qk` queries with keys; `auto` what
            takes fewer multiply-adds on the largest sample.
        taps: tokens that the convolution sees, an odd number; 0 for none. All heads share its weights.
    """

    first: Literal["auto", "kv", "qk"] = "auto"
    taps: int = 5
    order: ClassVar[int] = 16
    needs: ClassVar[tuple[str, ...]] = ("named", "inlined", "lifted")

    def __post_init__(self) -> None:
        if self.taps < 0 or (self.taps and self.taps % 2 == 0):
            raise InputError(f"`taps` is {self.taps}", place="linear-attention", hint="give an odd number, or 0")

    @property
    def decided(self) -> bool:
        return True

    def propose(self, model: oir.Model, context: Context, outcome: Outcome) -> list[Edit]:
        """See the class of passes."""
        facts, edits = Inference(model), []
        for found in find_attentions(model, facts):
            if isinstance(found, Miss):
                outcome.skip(found.anchor, found.reason, matched=found.near)
                continue
            reason = kernel_attention.refusal(model, found, facts)
            if reason is not None:
                outcome.skip(found.anchor, reason)
                continue
            name = str(found.anchor.name)
            first = kernel_attention.cheaper(found, context.dims) if self.first == "auto" else self.first
            claims = frozenset(str(node.name) for node in (found.anchor, *found.nodes))
            edit = Edit(catalog.spec(self), name, f"{first} first", claims, Savings(), anchors=(name, first))
            after = lossy.apply(model, [edit], [self])[0]
            savings = lossy.saved(model, after, context.dims)
            edits.append(Edit(edit.spec, name, edit.option, claims, savings, anchors=edit.anchors))
        return edits

    def apply(self, model: oir.Model, edits: Sequence[Edit], outcome: Outcome) -> None:
        """See the class of passes."""
        chosen = {edit.anchors[0]: edit.anchors[1] for edit in edits}
        facts = Inference(model)
        found: dict[str, Attention] = {
            str(one.anchor.name): one
            for one in find_attentions(model, facts)
            if isinstance(one, Attention) and str(one.anchor.name) in chosen
        }
        for name, first in chosen.items():
            if name not in found:
                raise InputError("it is not there any more: another edit has changed it", place=name)
            if not outcome.take(found[name].anchor):
                return
            weight = np.zeros((found[name].value_size, 1, 1, self.taps)) if self.taps else None
            kernel_attention.write(model, found[name], facts, Linear(first == "kv", weight))
