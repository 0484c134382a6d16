"""HardSigmoid and HardSwish between rounded values, as sums and products for which there are kernels on integers."""

from __future__ import annotations

import numpy as np
import onnx_ir as oir

from burnish.ir import edit, match
from burnish.ir.views.parameter import same_shape
from burnish.ir.walk import is_op
from burnish.passes import qdq
from burnish.passes.grids import Grid, Scales

_LEVELS = Grid(8, signed=False, symmetric=False)
_ENDS = (("low", 0.0), ("high", 1.0))
_UNIT = Scales(_LEVELS, np.asarray(1 / 255, np.float32), np.zeros((), np.uint8))
"""From 0 to 1."""


def spell_out(model: oir.Model, node: oir.Node) -> None:
    """Write a HardSigmoid or HardSwish that reads a rounded value and whose result is rounded as what integers do.

    HardSigmoid(x) = Clip(a x + b, 0, 1): a x has the integers of x with another scale, b is one integer, and the Clip
    vanishes in a range from 0 to 1. HardSwish(x) is x times that.

    Args:
        model: the model.
        node: the node; it is removed.
    """
    rounded = node.inputs[0]
    assert rounded is not None
    scales, back = qdq.scales_of(rounded), rounded.producer()
    if scales is None or back is None:
        return
    swish = is_op(node, "HardSwish")
    alpha = 1 / 6 if swish else float(match.attribute(node, "alpha", 0.2))
    beta = 0.5 if swish else float(match.attribute(node, "beta", 0.5))
    if alpha <= 0 or beta <= 0:
        return
    stem = str(node.outputs[0].name or "gate")
    slope = np.float32(float(scales.scale) * alpha)
    steeper = edit.make(
        "DequantizeLinear",
        [back.inputs[0], edit.add_constant(model, f"{stem}_slope", np.asarray(slope)), *back.inputs[2:]],
        like=node,
    )
    total = edit.make("Add", [steeper.outputs[0], steeper.outputs[0]], like=node)
    ends = [edit.add_constant(model, f"{stem}_{name}", np.asarray(end, np.float32)) for name, end in _ENDS]
    clipped = edit.make("Clip", [total.outputs[0], *ends], like=node)
    for one in (steeper, total, clipped):
        same_shape(one, node.outputs[0])
    edit.insert_before(node, [steeper, total])
    offset = Scales(_LEVELS, np.asarray(beta, np.float32), np.zeros((), np.uint8))
    edit.set_input(total, 1, edit.add_constant(model, f"{stem}_offset", np.asarray(beta, np.float32)))
    qdq.put_weight(model, total, 1, np.ones((), np.uint8), offset)
    if not swish:
        edit.replace_node(node, clipped)
        return
    product = edit.make("Mul", [rounded, clipped.outputs[0]], like=node)
    same_shape(product, node.outputs[0])
    edit.replace_node(node, [clipped, product])
    qdq.put_pair(model, clipped.outputs[0], _UNIT)
