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
        nodes, first = walk(model, "BatchNormalization"), len(outcome.skipped)
        while nodes:
            del outcome.skipped[first:]
            left = []
            for node in nodes:
                plan = self._plan(node, version, outcome)
                if plan is None:
                    left.append(node)
                elif outcome.take(node):
                    plan.apply(model)
                else:
                    return
            # One that is gone may have stood between another and its layer.
            nodes = left if len(left) < len(nodes) else []

    def _plan(self, node: oir.Node, version: int, outcome: Outcome) -> absorb.Plan | None:
        affine = batch_affine(node, version)
        if not isinstance(affine, Affine):
            outcome.skip(node, affine, matched=False)
            return None
        before = absorb.into_layer_before(affine, self.largest_copy)
        if not isinstance(before, str):
            return before
        after = absorb.into_layers_after(affine, self.largest_copy)
        if not isinstance(after, str):
            return after
        outcome.skip(node, f"before: {before}; after: {after}")
        return None
