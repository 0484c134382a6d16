"""Two factors become the layer that they are."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import onnx_ir as oir

from burnish.ir.walk import walk
from burnish.passes import products
from burnish.passes.base import ExactPass, Outcome


@dataclass(frozen=True)
class CollapseFactors(ExactPass):
    """Multiply two linear layers, or a convolution and one of single points behind it, where one holds no more numbers.

    Attributes:
        when: `smaller` where the one weight has no more numbers than the two, `always` wherever that is exact.
    """

    when: Literal["smaller", "always"] = "smaller"
    needs: ClassVar[tuple[str, ...]] = ("inlined",)

    def rewrite(self, model: oir.Model, outcome: Outcome) -> None:
        """See the class."""
        for node in walk(model, "MatMul", "Gemm", "Conv"):
            pair = (products.linear_pair(node) or products.convolution_pair(node)) if node.graph is not None else None
            if pair is None:
                continue
            reason, made = products.obstacle(pair), None
            if reason is None:
                made = products.product(pair)
                held = sum(layer.weight().size for layer in pair)
                if made is None:
                    reason = "the product does not fit the dtype"
                elif self.when == "smaller" and made[0].size > held:
                    reason = f"one layer would hold {made[0].size} numbers, the two hold {held}"
            if reason is not None or made is None:
                outcome.skip(node, reason or "")
                continue
            if not outcome.take(node):
                return
            products.merge(model, pair, *made)
