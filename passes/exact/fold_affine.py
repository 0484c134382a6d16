"""Fold constant Mul, Add, Sub, Div and Neg into their neighbours."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_ir as oir

from burnish.ir import edit, match, weights
from burnish.ir.views.affine import LAYOUT, STEPS, Affine, step_affine
from burnish.ir.views.linear import find_linear
from burnish.ir.views.norm import norms
from burnish.ir.views.parameter import fits, same_shape
from burnish.ir.walk import is_op, walk
from burnish.passes import absorb
from burnish.passes.base import ExactPass, Outcome


@dataclass(frozen=True)
class FoldAffine(ExactPass):
    """Fold constant Mul, Add, Sub, Div and Neg into the layer before or after them, or merge them with each other.

    The constants of a spelled-out Gelu, SiLU or normalization stay: with them gone, nobody recognises the function.

    Attributes:
        attention_scale: also fold the scale of the scores into the query's or the key's layer; ONNX Runtime no longer
            recognises the attention then.
        largest_copy: bytes of a shared weight up to which it is copied for the layer that takes the constants in.
    """

    attention_scale: bool = False
    largest_copy: int = absorb.LARGEST_COPY
    needs: ClassVar[tuple[str, ...]] = ("inlined",)

    def rewrite(self, model: oir.Model, outcome: Outcome) -> None:
        """See the class."""
        normalizing = [node for norm in norms(model) if not norm.is_one_node for node in norm.nodes]
        for node in walk(model, *STEPS):
            affine = absorb.affine_at(node, normalizing)
            if affine is None:
                continue
            if _ends_activation(affine):
                outcome.skip(node, "it is part of an activation", matched=False)
                continue
            if not self.attention_scale and affine.axis is None and _scales_scores(affine.output):
                outcome.skip(node, "it is the scale of attention, which `attention_scale` would fold")
                continue
            before = absorb.into_layer_before(affine, self.largest_copy)
            plan = before if isinstance(before, absorb.Plan) else absorb.into_layers_after(affine, self.largest_copy)
            if not isinstance(plan, str):
                if not outcome.take(node):
                    return
                plan.apply(model)
                continue
            dtype = affine.input.dtype or affine.output.dtype
            steps = _steps(affine)
            shorter = len(steps) < len(affine.nodes)
            if not shorter or dtype is None or not all(fits(number, dtype) for _, number in steps):
                outcome.skip(node, f"before: {before}; after: {plan}", matched=False)
                continue
            if not outcome.take(node):
                return
            _spell_out(model, affine, steps, dtype)


def _ends_activation(affine: Affine) -> bool:
    """Whether the input is `x * g(x)` or `x * (g(x) + c)` with g the core of an activation."""
    product = match.producer(affine.input, "Mul")
    for value in product.inputs if product is not None else ():
        node = value.producer() if value is not None else None
        inner = step_affine(node)
        core = inner.input.producer() if inner is not None else node
        if is_op(core, "Erf", "Tanh", "Sigmoid", "HardSigmoid", "Softplus"):
            return True
    return False


def _scales_scores(value: oir.Value) -> bool:
    """Whether a product of two computed values reads `value`, possibly through what only moves elements."""
    for user in match.consumers(value):
        if is_op(user, "MatMul", "Einsum") and not any(weights.is_constant(one) for one in user.inputs):
            return find_linear(user) is None
        if is_op(user, *LAYOUT) and _scales_scores(user.outputs[0]):
            return True
    return False


def _steps(affine: Affine) -> list[tuple[str, np.ndarray]]:
    """The fewest nodes that compute `affine`: operator and constant."""
    certain = affine.channels == 1 or (
        affine.axis is not None and match.dim(affine.input, affine.axis) == affine.channels
    )
    steps = [("Mul", affine.scale), ("Add", affine.shift)]
    neutral = {"Mul": 1.0, "Add": 0.0}
    kept = [(op, number) for op, number in steps if not (number == neutral[op]).all()]
    return kept if kept or certain else steps[1:]


def _spell_out(model: oir.Model, affine: Affine, steps: list[tuple[str, np.ndarray]], dtype: oir.DataType) -> None:
    last, value = affine.nodes[-1], affine.input
    rank = match.rank(affine.input)
    new: list[oir.Node] = []
    for op_type, number in steps:
        tail = (1,) * (rank - affine.axis - 1) if rank is not None and affine.axis is not None else ()
        shaped = number.reshape(()) if number.size == 1 else number.reshape(-1, *tail)
        constant = edit.add_rounded(model, f"{last.outputs[0].name or 'affine'}_{op_type.lower()}", shaped, dtype)
        new.append(edit.make(op_type, [value, constant], like=affine.nodes))
        value = same_shape(new[-1], affine.output)
    if new:
        edit.replace_node(last, new)
    else:
        edit.bypass(last, affine.input)
