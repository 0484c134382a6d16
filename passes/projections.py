"""Linear layers that read the same value, written as one."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as oir

from burnish.ir import edit, match
from burnish.ir.views.linear import Linear


def mergeable(layer: Linear) -> str | None:
    """Why a layer cannot be written as a part of a wider one, in plain words; None when it can."""
    if layer.read_only:
        return layer.read_only
    if layer.shared:
        return f"{layer.shared[0].op_type} shares the weight"
    rank = match.rank(layer.output)
    if rank is None or layer.output.dtype is None or (layer.parameter is not None and len(layer.parameter.shape) != 2):
        return "the rank of its result is unknown"
    return None


def merge(model: oir.Model, layers: Sequence[Linear]) -> None:
    """Write linear layers that read the same value as one, and a Split behind it.

    Args:
        model: the model they are in.
        layers: two or more, for which `mergeable` has no reason, of one operator, dtype and axis of the input.
    """
    version = model.graph.opset_imports.get("", 1)
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
