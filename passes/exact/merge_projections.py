"""Merge linear layers that read the same value into one and a Split."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import onnx_ir as oir

from burnish.ir import match
from burnish.ir.errors import InputError
from burnish.ir.views.linear import Linear, linears
from burnish.passes.base import ExactPass, Outcome
from burnish.passes.projections import merge, mergeable

_WHEN = ("always", "equal")


@dataclass(frozen=True)
class MergeProjections(ExactPass):
    """Merge linear layers that read the same value (query, key and value; gate and up) into one layer and a Split.

    Attributes:
        when: `equal` merges layers of equal width only, `always` all that read the same value.
    """

    when: str = "equal"
    needs: ClassVar[tuple[str, ...]] = ("inlined",)

    def __post_init__(self) -> None:
        if self.when not in _WHEN:
            raise InputError(f"`when` is {self.when!r}", place="merge-projections", hint=f"one of {', '.join(_WHEN)}")

    def rewrite(self, model: oir.Model, outcome: Outcome) -> None:
        """See the class."""
        for group in _groups(model, self.when):
            kept = []
            for layer in group:
                reason = _reason(layer)
                if reason is not None:
                    outcome.skip(layer.node, reason)
                else:
                    kept.append(layer)
            if len(kept) < 2:
                continue
            if not outcome.take(kept[0].node):
                return
            merge(model, kept)


def _groups(model: oir.Model, when: str) -> Iterator[list[Linear]]:
    """The layers of one graph that read the same value in the same way, two or more."""
    found: dict[tuple[object, ...], list[Linear]] = {}
    for layer in linears(model):
        width = layer.out_features if when == "equal" else 0
        key = (id(layer.input), id(layer.node.graph), layer.node.op_type, layer.input_axis, layer.dtype, width)
        found.setdefault(key, []).append(layer)
    yield from (group for group in found.values() if len(group) > 1)


def _reason(layer: Linear) -> str | None:
    reason = mergeable(layer)
    if reason is not None:
        return reason
    reader = match.sole_consumer(layer.output, "MatMul", "Gemm")
    if reader is not None and reader.inputs[0] is layer.output and layer.out_features * 4 <= layer.in_features:
        return "it is the first factor of a low-rank pair"
    return None
