"""Fold BatchNormalization into its neighbours."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import onnx_ir as oir

from burnish.ir.views.affine import Affine, batch_affine
from burnish.ir.walk import walk
from burnish.passes import absorb
from burnish.passes.base import ExactPass, Outcome


@dataclass(frozen=True)
class FoldBatchnorm(ExactPass):
    """Merge an inference BatchNormalization into the convolution or linear layer before it, or into those after it.

    Attributes:
        largest_copy: bytes of a shared weight up to which it is copied for the layer that takes the normalization in.
    """

    largest_copy: int = absorb.LARGEST_COPY
    needs: ClassVar[tuple[str, ...]] = ("inlined",)

    def rewrite(self, model: oir.Model, outcome: Outcome) -> None:
        """See the class."""
        version = model.graph.opset_imports.get("", 1)
        for node in walk(model, "BatchNormalization"):
            affine = batch_affine(node, version)
            if not isinstance(affine, Affine):
                outcome.skip(node, affine, matched=False)
                continue
            plan = absorb.into_layer_before(affine, self.largest_copy)
            if isinstance(plan, str):
                before = plan
                plan = absorb.into_layers_after(affine, self.largest_copy)
                if isinstance(plan, str):
                    outcome.skip(node, f"before: {before}; after: {plan}")
                    continue
            if not outcome.take(node):
                return
            plan.apply(model)
