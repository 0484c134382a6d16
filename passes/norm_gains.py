"""Taking the gain and bias out of a normalization whose readers have taken them in."""

from __future__ import annotations

import numpy as np
import onnx_ir as oir

from burnish.ir import edit
from burnish.ir.views.norm import Norm
from burnish.ir.views.parameter import Parameter
from burnish.ir.walk import is_op


def stays(norm: Norm) -> str | None:
    """Why the gain and bias of a norm over the last axis cannot be taken out, in plain words; None when they can."""
    if norm.is_one_node:
        return norm.read_only
    for parameter, kind in ((norm.scale, "Mul"), (norm.bias, "Add")):
        if parameter is not None and not is_op(_reader(norm, parameter), kind):
            return "its arithmetic holds gain and bias in one"
    return norm.read_only


def take_out(model: oir.Model, norm: Norm, size: int) -> None:
    """Leave a norm of `size` features a gain of ones, where its operator demands one, and no bias."""
    if norm.is_one_node:
        node = norm.nodes[0]
        if norm.scale is not None and norm.scale.dtype is not None:
            name = norm.scale.source.name or "gain"
            edit.set_input(node, 1, edit.add_rounded(model, f"{name}_ones", np.ones(size), norm.scale.dtype))
        if norm.bias is not None:
            edit.set_input(node, 2, None)
            node.resize_inputs(2)
        return
    for parameter in (norm.scale, norm.bias):
        if parameter is not None:
            step = _reader(norm, parameter)
            edit.bypass(step, next(one for one in step.inputs if one is not parameter.value))


def _reader(norm: Norm, parameter: Parameter) -> oir.Node:
    return next(node for node in norm.nodes if any(one is parameter.value for one in node.inputs))
