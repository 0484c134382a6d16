"""Move the constant Mul and Add of a residual stream behind the next sum."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_ir as oir

from burnish.ir import edit, match
from burnish.ir.views.affine import STEPS, Affine, step_affine
from burnish.ir.views.norm import norms
from burnish.ir.views.parameter import fits, same_shape
from burnish.ir.walk import is_op, walk
from burnish.passes import absorb
from burnish.passes.absorb import Plan
from burnish.passes.base import ExactPass, Outcome

_RANGE = 2.0**20
"""Scales are between this and its inverse: they multiply from sum to sum."""


@dataclass(frozen=True)
class PushAffine(ExactPass):
    """Move a constant `a * x + c` of a residual stream behind the sum that reads it, where it meets the next one.

    In `a * x + c + f(a * x + c)` the layers that begin `f` take it in, the layer that ends it becomes `diag(1 / a) W,
    (b + c) / a`, and of the sum the `a`-fold is left. In a stack of blocks whose norms were replaced behind the sums
    nothing stays but what follows the last one. Channels keep their relative rounding: each is scaled by itself.

    Attributes:
        largest_copy: bytes of a shared weight up to which it is copied for the layer that takes the constants in.
    """

    largest_copy: int = absorb.LARGEST_COPY
    needs: ClassVar[tuple[str, ...]] = ("inlined",)

    def rewrite(self, model: oir.Model, outcome: Outcome) -> None:
        """See the class."""
        normalizing = [node for norm in norms(model) if not norm.is_one_node for node in norm.nodes]
        for node in walk(model, *STEPS):
            affine = absorb.affine_at(node, normalizing)
            total = None if affine is None else _sum(affine)
            if affine is None or total is None:
                continue
            plan = self._plan(affine, total)
            if isinstance(plan, str):
                outcome.skip(node, plan)
                continue
            if not outcome.take(node):
                return
            _push(model, affine, total, plan)

    def _plan(self, affine: Affine, total: oir.Node) -> Plan | str:
        """What the layers that read the affine become, or why it has to stay."""
        size = np.abs(affine.scale)
        if not (size.min() >= 1 / _RANGE and size.max() <= _RANGE):
            return "a channel is scaled by nearly nothing, or by very much"
        dtype, reader = affine.input.dtype, match.sole_reader(total.outputs[0])
        if dtype not in (oir.DataType.FLOAT, oir.DataType.DOUBLE) or not fits(affine.scale, dtype):
            return "it is not in float32 or float64"
        step = step_affine(reader)
        if total.outputs[0].is_graph_output() or step is None or step.input is not total.outputs[0]:
            return "its scale would meet no other behind the sum"
        before = _before(affine, total, affine.output, self.largest_copy)
        if isinstance(before, str):
            return f"the sum adds something else to it: {before}"
        return absorb.into_layers_after(affine, self.largest_copy, allow_new_bias=True, besides=total)


def _sum(affine: Affine) -> oir.Node | None:
    """The only Add of two computed values that reads an affine with one number for each channel."""
    if affine.axis is None or affine.output.is_graph_output():
        return None
    found = [node for node in match.consumers(affine.output) if is_op(node, "Add") and step_affine(node) is None]
    sums = [node for node in found if absorb.layer_of(node.outputs[0]) is None]
    rank = match.rank(affine.output)
    same = len(sums) == 1 and rank is not None and all(match.rank(value) == rank for value in sums[0].inputs)
    return sums[0] if same and sums[0].inputs[0] is not sums[0].inputs[1] else None


def _before(affine: Affine, total: oir.Node, stream: oir.Value, largest_copy: int) -> Plan | str:
    """What the layer becomes whose result the sum adds to `stream`."""
    (other,) = (value for value in total.inputs if value is not stream)
    assert other is not None
    inverse = Affine((total,), other, 1 / affine.scale, affine.shift / affine.scale, affine.axis)
    return absorb.into_layer_before(inverse, largest_copy)


def _push(model: oir.Model, affine: Affine, total: oir.Node, after: Plan) -> None:
    dtype, rank = affine.input.dtype, match.rank(affine.input)
    assert dtype is not None and rank is not None and affine.axis is not None
    after.apply(model)
    # Only now: the layer may be one of those that have just taken the affine in. What is copied was asked before.
    before = _before(affine, total, affine.input, 1 << 62)
    assert not isinstance(before, str)
    for layer, weight, bias in before.layers:
        layer.write(model, weight, bias)
    shape = [-1 if axis == affine.axis else 1 for axis in range(rank)]
    number = np.broadcast_to(affine.scale, (affine.channels,)).reshape(shape)
    scale = edit.add_rounded(model, f"{total.outputs[0].name or 'sum'}_scale", number, dtype)
    (reader,) = match.readers(total.outputs[0])
    times = edit.make("Mul", [total.outputs[0], scale], like=affine.nodes)
    same_shape(times, total.outputs[0])
    edit.insert_behind(total.outputs[0], [times])
    for index, value in enumerate(reader.inputs):
        if value is total.outputs[0]:
            edit.set_input(reader, index, times.outputs[0])
