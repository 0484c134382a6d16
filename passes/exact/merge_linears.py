"""Merge two linear layers with nothing between them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import onnx_ir as oir

from burnish.ir import edit, match
from burnish.ir.views.linear import Linear, find_linear, linears
from burnish.ir.views.parameter import fits
from burnish.passes.base import ExactPass, Outcome


@dataclass(frozen=True)
class MergeLinears(ExactPass):
    """Merge two linear layers with nothing between them when one takes fewer multiply-adds; low-rank pairs stay."""

    needs: ClassVar[tuple[str, ...]] = ("inlined",)

    def rewrite(self, model: oir.Model, outcome: Outcome) -> None:
        """See the class."""
        for found in list(linears(model)):
            second = find_linear(found.node) if found.node.graph is not None else None
            first = find_linear(second.input.producer()) if second is not None else None
            if second is None or first is None or first.output is not second.input:
                continue
            reason = _reason(first, second)
            if reason is not None:
                outcome.skip(second.node, reason)
                continue
            last = second.weight()
            weight = last @ first.weight()
            bias, inner = second.bias(), first.bias()
            if inner is not None:
                bias = last @ inner + (bias if bias is not None else 0.0)
            dtype = second.dtype
            if dtype is None or not fits(weight, dtype) or (bias is not None and not fits(bias, dtype)):
                outcome.skip(second.node, "the merged weight does not fit the dtype")
                continue
            if not outcome.take(second.node):
                return
            edit.set_input(second.node, 0, first.input)
            second.write(model, weight, bias)


def _reason(first: Linear, second: Linear) -> str | None:
    for layer in (first, second):
        if layer.read_only:
            return f"{layer.node.op_type} cannot be rewritten: {layer.read_only}"
        if layer.shared:
            return f"{layer.shared[0].op_type} shares the weight of {layer.node.op_type}"
    if first.input_axis != -1 or second.input_axis != -1:
        return "the features are on the first axis"
    if first.node.graph is not second.node.graph:
        return "the first is in another graph"
    if not match.used_once(first.output):
        return "other nodes read what lies between them"
    ranks = (match.rank(first.input), match.rank(second.input))
    if second.node.op_type == "Gemm" and first.node.op_type != "Gemm" and ranks[0] != 2:
        return "a Gemm reads two axes only"
    before = first.in_features * first.out_features + second.in_features * second.out_features
    after = first.in_features * second.out_features
    if after >= before:
        return f"one layer would take {after} multiply-adds a row, the two take {before}"
    return None
