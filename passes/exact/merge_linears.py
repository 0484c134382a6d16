"""Merge two linear layers with nothing between them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import onnx_ir as oir

from burnish.ir.views.linear import Linear, linears
from burnish.passes import products
from burnish.passes.base import ExactPass, Outcome


@dataclass(frozen=True)
class MergeLinears(ExactPass):
    """Merge two linear layers with nothing between them when one takes fewer multiply-adds; low-rank pairs stay."""

    needs: ClassVar[tuple[str, ...]] = ("inlined",)

    def rewrite(self, model: oir.Model, outcome: Outcome) -> None:
        """See the class."""
        for found in list(linears(model)):
            pair = products.linear_pair(found.node) if found.node.graph is not None else None
            if pair is None:
                continue
            first, second = pair
            reason = products.obstacle(pair) or _no_gain(first, second)
            if reason is not None:
                outcome.skip(second.node, reason)
                continue
            made = products.product((first, second))
            if made is None:
                outcome.skip(second.node, "the merged weight does not fit the dtype")
                continue
            if not outcome.take(second.node):
                return
            products.merge(model, (first, second), *made)


def _no_gain(first: Linear, second: Linear) -> str | None:
    before = first.in_features * first.out_features + second.in_features * second.out_features
    after = first.in_features * second.out_features
    if after >= before:
        return f"one layer would take {after} multiply-adds a row, the two take {before}"
    return None
