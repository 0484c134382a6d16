"""Merge the re-parameterized normalization `BN(x) + eta * x` (SLAB, ICML 2024)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_ir as oir

from burnish.ir import edit, match
from burnish.ir.views.affine import Affine, add_affine
from burnish.ir.views.parameter import fits, same_shape
from burnish.ir.walk import walk
from burnish.passes import absorb
from burnish.passes.base import ExactPass, Outcome


@dataclass(frozen=True)
class MergeRepbn(ExactPass):
    """Merge `BN(x) + eta * x` into the layers after or before it, or else into one Mul and Add.

    Per channel it is `a * x + c`, with s = gamma / sqrt(var + eps), a = s + eta and c = beta - s * mean.
    A layer after it becomes `W diag(a), b + W c`; a layer before it `diag(a) W, a * b + c`.

    Attributes:
        largest_copy: bytes of a shared weight up to which it is copied for the layer that takes the normalization in.
    """

    largest_copy: int = absorb.LARGEST_COPY
    needs: ClassVar[tuple[str, ...]] = ("inlined",)

    def rewrite(self, model: oir.Model, outcome: Outcome) -> None:
        """See the class."""
        version = model.graph.opset_imports.get("", 1)
        for node in walk(model, "Add"):
            affine = add_affine(node, version)
            if affine is None:
                continue
            before = absorb.into_layer_before(affine, self.largest_copy)
            plan = before
            if isinstance(before, str):
                plan = absorb.into_layers_after(affine, self.largest_copy, allow_new_bias=True)
            if not isinstance(plan, str):
                if not outcome.take(node):
                    return
                plan.apply(model)
                continue
            dtype, rank = affine.input.dtype, match.rank(affine.input)
            if dtype is None or rank is None or not (fits(affine.scale, dtype) and fits(affine.shift, dtype)):
                outcome.skip(
                    node, f"before: {before}; after: {plan}; and its own dtype and rank are unknown or too small"
                )
                continue
            if not outcome.take(node):
                return
            _spell_out(model, affine, dtype, rank)


def _spell_out(model: oir.Model, affine: Affine, dtype: oir.DataType, rank: int) -> None:
    node, shape = affine.nodes[-1], (affine.channels, *(1,) * (rank - 2))
    stem = node.outputs[0].name or "repbn"

    def stored(name: str, array: np.ndarray) -> oir.Value:
        return edit.add_rounded(
            model, f"{stem}_{name}", np.broadcast_to(array, (affine.channels,)).reshape(shape), dtype
        )

    scaled = edit.make("Mul", [affine.input, stored("scale", affine.scale)], like=affine.nodes)
    shifted = edit.make("Add", [same_shape(scaled, affine.output), stored("shift", affine.shift)], like=affine.nodes)
    same_shape(shifted, affine.output)
    edit.replace_node(node, [scaled, shifted])
