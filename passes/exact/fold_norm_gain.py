"""Fold the gain and bias of a normalization into the linear layers that read it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import onnx_ir as oir

from burnish.ir import match
from burnish.ir.views.affine import Affine
from burnish.ir.views.norm import norms
from burnish.passes import absorb, norm_gains
from burnish.passes.base import ExactPass, Outcome


@dataclass(frozen=True)
class FoldNormGain(ExactPass):
    """Fold the gain and bias of a layer norm or RMS norm into the linear layers that read it.

    An operator keeps a gain of ones, since it demands one: nothing gets faster by itself. Rotations and scalings of the
    weights need it. It is in no default recipe.

    Attributes:
        largest_copy: bytes of a shared weight up to which it is copied.
    """

    largest_copy: int = absorb.LARGEST_COPY
    needs: ClassVar[tuple[str, ...]] = ("inlined",)

    def rewrite(self, model: oir.Model, outcome: Outcome) -> None:
        """See the class."""
        for norm in list(norms(model)):
            if norm.kind not in ("layer", "rms") or norm.scale is None:
                continue
            node, size = norm.nodes[0], norm.scale.shape[-1] if norm.scale.shape else 1
            rank = match.rank(norm.input)
            if reason := norm_gains.stays(norm):
                outcome.skip(node, reason)
                continue
            if norm.axes != (-1,) or rank is None:
                outcome.skip(node, "it is no normalization of the last axis", matched=False)
                continue
            scale, shift = norm.gain(size), norm.offset(size)
            if (scale == 1).all() and not shift.any():
                continue
            plan = absorb.into_layers_after(
                Affine(norm.nodes, norm.input, scale, shift, rank - 1), self.largest_copy, allow_new_bias=True
            )
            if isinstance(plan, str):
                outcome.skip(node, plan)
                continue
            if not outcome.take(node):
                return
            for layer, weight, bias in plan.layers:
                layer.write(model, weight, bias)
            norm_gains.take_out(model, norm, size)
