"""The view of an activation that exporters spell out as arithmetic."""

from __future__ import annotations

import math
from dataclasses import dataclass

import onnx_ir as oir

from burnish.ir import match, weights
from burnish.ir.walk import is_op

ROOTS = ("Erf", "Tanh", "Sigmoid", "HardSigmoid", "Softplus", "Clip")
"""The operators around which spelled-out activations are looked for."""


@dataclass(frozen=True)
class Activation:
    """A spelled-out activation.

    Attributes:
        kind: `Gelu`, `Gelu (tanh)`, `SiLU`, `HardSwish` or `Mish`.
        source: its input.
        end: the last of its nodes.
        nodes: all of them, in order.
        alpha: the factor of the input inside the sigmoid of a SiLU.
    """

    kind: str
    source: oir.Value
    end: oir.Node
    nodes: tuple[oir.Node, ...]
    alpha: float = 1.0

    @property
    def outside_reader(self) -> oir.Node | None:
        """A node that reads an inner value; None when there is none."""
        own = {id(node) for node in self.nodes}
        inner = (value for node in self.nodes if node is not self.end for value in node.outputs)
        return next((user for value in inner for user in match.consumers(value) if id(user) not in own), None)

    @property
    def inner_output(self) -> oir.Value | None:
        """An inner value that is an output of the graph; None when there is none."""
        inner = (value for node in self.nodes if node is not self.end for value in node.outputs)
        return next((value for value in inner if value.is_graph_output()), None)


def find_activation(node: oir.Node) -> Activation | None:
    """The activation around `node`, which is one of `ROOTS`; None when there is none."""
    return _gelu_erf(node) or _gelu_tanh(node) or _silu(node) or _hard_swish(node) or _mish(node)


def _product(value: oir.Value, other: oir.Value) -> oir.Node | None:
    """The Mul of `value` and `other`."""
    for reader in match.consumers(value):
        if reader.op_type == "Mul" and other in reader.inputs and value in reader.inputs:
            return reader
    return None


def _scaled(value: oir.Value) -> tuple[oir.Value, float, tuple[oir.Node, ...]]:
    """`value` as (source, factor): through Muls and Divs by a scalar."""
    node = match.producer(value, "Mul", "Div")
    if node is None:
        return value, 1.0, ()
    if node.op_type == "Div":
        divisor = weights.scalar(node.inputs[1])
        pair = (node.inputs[0], 1.0 / divisor) if divisor and node.inputs[0] is not None else None
    else:
        pair = match.with_scalar(node)
    if pair is None or pair[0] is None:
        return value, 1.0, ()
    source, factor, nodes = _scaled(pair[0])
    return source, factor * pair[1], (*nodes, node)


def _half_of_product(one_plus: oir.Node, source: oir.Value) -> tuple[oir.Node, tuple[oir.Node, ...]] | None:
    """`0.5 * source * one_plus` in any order: the last node and the inner ones."""
    value = one_plus.outputs[0]
    for reader in match.consumers(value):
        if reader.op_type != "Mul":
            continue
        half = match.with_scalar(reader, 0.5)
        if half is not None:
            end = _product(reader.outputs[0], source)
            if end is not None:
                return end, (reader,)
            continue
        other = reader.inputs[0] if reader.inputs[1] is value else reader.inputs[1]
        if other is source:
            for last in match.consumers(reader.outputs[0]):
                if last.op_type == "Mul" and match.with_scalar(last, 0.5) is not None:
                    return last, (reader,)
                if last.op_type == "Div" and weights.scalar(last.inputs[1]) == 2.0:
                    return last, (reader,)
        if other is not None:
            base, factor, nodes = _scaled(other)
            if base is source and abs(factor - 0.5) < 1e-6:
                return reader, nodes
    return None


def _gelu_erf(node: oir.Node) -> Activation | None:
    if node.op_type != "Erf" or node.inputs[0] is None:
        return None
    source, factor, scaling = _scaled(node.inputs[0])
    plus = next((r for r in match.consumers(node.outputs[0]) if r.op_type == "Add" and match.with_scalar(r, 1.0)), None)
    if plus is None or abs(factor - math.sqrt(0.5)) > 1e-4:
        return None
    half = _half_of_product(plus, source)
    return None if half is None else Activation("Gelu", source, half[0], (*scaling, node, plus, *half[1], half[0]))


def _gelu_tanh(node: oir.Node) -> Activation | None:
    """`0.5 x (1 + tanh(sqrt(2/pi) (x + 0.044715 x^3)))`."""
    if node.op_type != "Tanh" or node.inputs[0] is None:
        return None
    inner, factor, scaling = _scaled(node.inputs[0])
    total = match.producer(inner, "Add")
    plus = next((r for r in match.consumers(node.outputs[0]) if r.op_type == "Add" and match.with_scalar(r, 1.0)), None)
    if total is None or plus is None or abs(factor - math.sqrt(2 / math.pi)) > 1e-4:
        return None
    for source, cubic in (total.inputs, tuple(reversed(total.inputs))):
        if source is None or cubic is None:
            continue
        base, small, cubing = _scaled(cubic)
        power = _cube(base, source)
        if power is not None and abs(small - 0.044715) < 1e-6 and (half := _half_of_product(plus, source)) is not None:
            return Activation(
                "Gelu (tanh)", source, half[0], (*power, *cubing, total, *scaling, node, plus, *half[1], half[0])
            )
    return None


def _cube(value: oir.Value, source: oir.Value) -> tuple[oir.Node, ...] | None:
    """The nodes that compute `value` as the third power of `source`."""
    node = match.producer(value, "Pow", "Mul")
    if node is None:
        return None
    if node.op_type == "Pow":
        return (node,) if node.inputs[0] is source and weights.scalar(node.inputs[1]) == 3.0 else None
    for one, other in (node.inputs, tuple(reversed(node.inputs))):
        square = match.producer(one, "Mul", "Pow")
        if other is source and square is not None and square.inputs[0] is source:
            two = square.inputs[1]
            if (square.op_type == "Mul" and two is source) or weights.scalar(two) == 2.0:
                return square, node
    return None


def _silu(node: oir.Node) -> Activation | None:
    """`x * sigmoid(alpha x)`."""
    if node.op_type != "Sigmoid" or node.inputs[0] is None:
        return None
    direct = _product(node.outputs[0], node.inputs[0])
    if direct is not None:
        return Activation("SiLU", node.inputs[0], direct, (node, direct))
    source, factor, scaling = _scaled(node.inputs[0])
    end = _product(node.outputs[0], source)
    return None if end is None or not scaling else Activation("SiLU", source, end, (*scaling, node, end), factor)


def _hard_swish(node: oir.Node) -> Activation | None:
    """`x * HardSigmoid(x)` with alpha 1/6 and beta 1/2, or `x * Clip(x + 3, 0, 6) / 6`."""
    if node.op_type == "Clip":
        return _clipped_swish(node)
    if node.op_type != "HardSigmoid" or node.inputs[0] is None:
        return None
    alpha, beta = match.attribute(node, "alpha", 0.2), match.attribute(node, "beta", 0.5)
    end = _product(node.outputs[0], node.inputs[0])
    if end is None or abs(alpha - 1 / 6) > 1e-6 or beta != 0.5:
        return None
    return Activation("HardSwish", node.inputs[0], end, (node, end))


def _clipped_swish(node: oir.Node) -> Activation | None:
    """`x * Clip(x + 3, 0, 6) / 6`, the division before or behind the product."""
    plus = match.producer(node.inputs[0], "Add")
    shifted = None if plus is None else match.with_scalar(plus, 3.0)
    ends = [weights.scalar(match.input_of(node, index)) for index in (1, 2)]
    if plus is None or shifted is None or ends != [0.0, 6.0]:
        return None
    source = shifted[0]
    for reader in match.consumers(node.outputs[0]):
        if _is_sixth(reader, node.outputs[0]):
            end = _product(reader.outputs[0], source)
        else:
            product = _product(node.outputs[0], source)
            behind = [] if product is None or product is not reader else match.consumers(reader.outputs[0])
            end = next((one for one in behind if _is_sixth(one, reader.outputs[0])), None)
        if end is not None:
            return Activation("HardSwish", source, end, (plus, node, reader, end))
    return None


def _is_sixth(node: oir.Node, value: oir.Value) -> bool:
    """Whether a node computes a sixth of `value`."""
    if node.op_type == "Div":
        return node.inputs[0] is value and weights.scalar(node.inputs[1]) == 6.0
    return node.op_type == "Mul" and match.with_scalar(node, 1 / 6) is not None


def _mish(node: oir.Node) -> Activation | None:
    """`x * tanh(softplus(x))`."""
    tanh = match.sole_consumer(node.outputs[0], "Tanh") if is_op(node, "Softplus") else None
    if tanh is None or node.inputs[0] is None:
        return None
    end = _product(tanh.outputs[0], node.inputs[0])
    return Activation("Mish", node.inputs[0], end, (node, tanh, end)) if end is not None else None
