"""Merge linear layers that read the same value into one and a Split."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_ir as oir

from burnish.ir import edit, match
from burnish.ir.errors import InputError
from burnish.ir.views.linear import Linear, linears
from burnish.passes.base import ExactPass, Outcome

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
        version = model.graph.opset_imports.get("", 1)
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
            _merge(model, kept, version)


def _groups(model: oir.Model, when: str) -> Iterator[list[Linear]]:
    """The layers of one graph that read the same value in the same way, two or more."""
    found: dict[tuple[object, ...], list[Linear]] = {}
    for layer in linears(model):
        width = layer.out_features if when == "equal" else 0
        key = (id(layer.input), id(layer.node.graph), layer.node.op_type, layer.input_axis, layer.dtype, width)
        found.setdefault(key, []).append(layer)
    yield from (group for group in found.values() if len(group) > 1)


def _reason(layer: Linear) -> str | None:
    if layer.read_only:
        return layer.read_only
    if layer.shared:
        return f"{layer.shared[0].op_type} shares the weight"
    rank = match.rank(layer.output)
    if rank is None or layer.output.dtype is None or (layer.parameter is not None and len(layer.parameter.shape) != 2):
        return "the rank of its result is unknown"
    reader = match.sole_consumer(layer.output, "MatMul", "Gemm")
    if reader is not None and reader.inputs[0] is layer.output and layer.out_features * 4 <= layer.in_features:
        return "it is the first factor of a low-rank pair"
    return None


def _merge(model: oir.Model, layers: list[Linear], version: int) -> None:
    first = layers[0]
    dtype = first.dtype
    if dtype is None or first.output.shape is None or first.parameter is None:
        raise ValueError(f"{match.describe(first.node)} has no dtype or shape")
    origin = [node for layer in layers for node in layer.nodes]
    weight = np.concatenate([layer.weight() for layer in layers])
    stored = weight if first.stored_transposed else weight.T
    stem = first.parameter.source.name or "weight"
    inputs: list[oir.Value | None] = [first.input, edit.add_rounded(model, f"{stem}_merged", stored, dtype)]
    bias = None
    if any(layer.bias_parameter is not None for layer in layers):
        parts = [layer.bias() for layer in layers]
        full = [np.zeros(one.out_features) if b is None else b for one, b in zip(layers, parts, strict=True)]
        bias = edit.add_rounded(model, f"{stem}_merged_bias", np.concatenate(full), dtype)
    gemm = first.node.op_type == "Gemm"
    attributes = {"transA": int(first.input_axis == 0) or None, "transB": int(first.stored_transposed) or None}
    product = edit.make(
        first.node.op_type, [*inputs, bias if gemm else None], attributes if gemm else None, like=origin
    )
    new = [product]
    if bias is not None and not gemm:
        new.append(edit.make("Add", [product.outputs[0], bias], like=origin))
    for node in new:
        value = node.outputs[0]
        value.type = first.output.type
        value.shape = oir.Shape([*first.output.shape[:-1], weight.shape[0]])
    sizes = [layer.out_features for layer in layers]
    axis = {"axis": len(first.output.shape) - 1}
    if version >= 13:
        lengths = edit.add_constant(model, f"{stem}_widths", np.asarray(sizes, np.int64))
        split = edit.make("Split", [value, lengths], axis, like=origin, outputs=len(layers))
    else:
        split = edit.make("Split", [value], {**axis, "split": sizes}, like=origin, outputs=len(layers))
    edit.insert_before(first.node, [*new, split])
    for layer, part in zip(layers, split.outputs, strict=True):
        edit.replace_value(layer.output, part)
    edit.remove_unused([layer.nodes[-1] for layer in layers])
