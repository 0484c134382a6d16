"""Writing the scale of an attention where its model has it: an attribute, a constant, or a new node."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as oir

from burnish.ir import edit, match
from burnish.ir.inference import Inference
from burnish.ir.views.heads import scaled_by
from burnish.ir.views.parameter import find_parameter, same_shape, write_input
from burnish.ir.walk import is_op

_FACTORS = {"FusedMatMul": "alpha"}
"""Operators with the scale as an attribute, by operator where it is not called `scale`."""


@dataclass(frozen=True)
class Factor:
    """A Mul or Div by one number.

    Attributes:
        node: the node.
        index: which of its inputs is the number.
        number: what it multiplies with; for a Div one over its input.
    """

    node: oir.Node
    index: int
    number: float

    def write(self, model: oir.Model, number: float) -> None:
        """Multiply with another number."""
        value = self.node.inputs[self.index]
        parameter = find_parameter(value)
        shape = parameter.shape if parameter is not None else ()
        dtype = parameter.dtype if parameter is not None else self.node.outputs[0].dtype
        array = np.full(shape, number if self.node.op_type == "Mul" else 1.0 / number)
        write_input(model, self.node, self.index, array, dtype or oir.DataType.FLOAT, "scale")


def find_factor(node: oir.Node, facts: Inference) -> Factor:
    """The factor of a Mul or Div by one number."""
    found = scaled_by(node, facts)
    if found is None:
        raise ValueError(f"{match.describe(node)} multiplies with more than one number")
    return Factor(node, 1 if node.inputs[0] is found[0] else 0, found[1])


def write_scale(
    model: oir.Model,
    product: oir.Node,
    scales: Sequence[Factor],
    own: Collection[oir.Node],
    before: float,
    after: float,
) -> None:
    """Let the products of queries and keys be multiplied with `after` where it was `before`.

    Args:
        model: the model.
        product: the node that multiplies queries and keys, or the operator that is the whole attention.
        scales: the factors in front of it or behind it, in the order of preference.
        own: the nodes of the layer.
        before: the scale of the layer; all factors together.
        after: the new one, not zero.

    Raises:
        ValueError: a scale of zero, or the only factor counts for something else as well.
    """
    if after == before:
        return
    if not after or not np.isfinite(after):
        raise ValueError("the scale of an attention is a number other than zero")
    ratio = after / before
    if not is_op(product, "MatMul"):
        name = _FACTORS.get(product.op_type, "scale")
        known = float(match.attribute(product, name, 0.0)) or before / math.prod(one.number for one in scales)
        product.attributes[name] = oir.AttrFloat32(name, known * ratio)
        return
    for one in scales:
        if _is_private(one.node, product, set(own)):
            one.write(model, one.number * ratio)
            return
    if scales:
        raise ValueError(f"the scale of {match.describe(product)} counts for something else as well")
    _insert(model, product, ratio)


def _is_private(node: oir.Node, product: oir.Node, own: set[oir.Node]) -> bool:
    """Whether what `node` computes reaches the scores of this layer only."""
    pending, seen = [node], set[oir.Node]()
    while pending:
        one = pending.pop()
        if one in seen:
            continue
        seen.add(one)
        if one is product or one.op_type in ("Softmax", "Tanh"):
            continue
        if any(out.is_graph_output() for out in one.outputs):
            return False
        readers = [reader for out in one.outputs for reader in match.readers(out)]
        if any(reader not in own for reader in readers):
            return False
        pending += readers
    return True


def _insert(model: oir.Model, product: oir.Node, ratio: float) -> None:
    scores = product.outputs[0]
    factor = edit.add_rounded(model, "scale", np.array(ratio), scores.dtype or oir.DataType.FLOAT)
    readers = match.consumers(scores)
    step = edit.make("Mul", [scores, factor], like=product)
    same_shape(step, scores)
    product.graph.insert_after(product, step)  # type: ignore[union-attr]
    for reader in readers:
        for index, value in enumerate(reader.inputs):
            if value is scores:
                reader.replace_input_with(index, step.outputs[0])
