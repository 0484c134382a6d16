"""Recognise activations that exporters spell out, and write them as one operator."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal, NamedTuple

import onnx_ir as oir

from burnish.ir import edit, match, weights
from burnish.ir.walk import walk
from burnish.passes.base import ExactPass, Outcome

MICROSOFT = "com.microsoft"


class Found(NamedTuple):
    """A spelled-out activation: its input, its last node, all its nodes, and which function it is."""

    kind: str
    source: oir.Value
    end: oir.Node
    nodes: tuple[oir.Node, ...]
    alpha: float = 1.0


@dataclass(frozen=True)
class FuseActivation(ExactPass):
    """Write spelled-out Gelu (erf and tanh), SiLU, HardSwish and Mish as one operator where the target has it.

    Attributes:
        target: `onnx` writes what the model's opset has (Gelu from 20, HardSwish from 14, Mish from 18, Swish from 24);
            `ort-cpu` and `ort-cuda` also ONNX Runtime's Gelu, FastGelu and QuickGelu.
    """

    target: Literal["onnx", "ort-cpu", "ort-cuda"] = "onnx"
    needs: ClassVar[tuple[str, ...]] = ("inlined",)

    def rewrite(self, model: oir.Model, outcome: Outcome) -> None:
        """Rewrite `model` in place."""
        opset = model.opset_imports.get("", 0)
        for node in walk(model, "Erf", "Tanh", "Sigmoid", "HardSigmoid", "Softplus"):
            found = _gelu_erf(node) or _gelu_tanh(node) or _silu(node) or _hard_swish(node) or _mish(node)
            if found is None:
                continue
            if any(not _inner(one, found.nodes) for one in found.nodes if one is not found.end):
                outcome.skip(node, f"an inner value of this {found.kind} is read elsewhere")
                continue
            written = self._operator(found, opset)
            if isinstance(written, str):
                outcome.skip(node, written)
                continue
            if not outcome.take(node):
                return
            op, domain, attributes = written
            if domain:
                model.graph.opset_imports.setdefault(domain, 1)
            fused = edit.make(op, [found.source], attributes, like=found.nodes, domain=domain)
            edit.replace_node(found.end, fused)

    def _operator(self, found: Found, opset: int) -> tuple[str, str, dict[str, object]] | str:
        """The operator, its domain and attributes; or why there is none."""
        tanh = {"approximate": "tanh"} if found.kind == "Gelu (tanh)" else {}
        if found.kind.startswith("Gelu"):
            if opset >= 20:
                return "Gelu", "", dict(tanh)
            if self.target != "onnx":
                return ("FastGelu" if tanh else "Gelu"), MICROSOFT, {}
            return "opset 20 is the first with Gelu; raise it with `--opset 20`"
        if found.kind == "SiLU":
            if opset >= 24:
                return "Swish", "", {} if found.alpha == 1.0 else {"alpha": found.alpha}
            if self.target != "onnx":
                return "QuickGelu", MICROSOFT, {"alpha": found.alpha}
            return "opset 24 is the first with Swish; raise it with `--opset 24`"
        first = {"HardSwish": 14, "Mish": 18}[found.kind]
        return (found.kind, "", {}) if opset >= first else f"opset {first} is the first with {found.kind}"


def _inner(node: oir.Node, nodes: tuple[oir.Node, ...]) -> bool:
    return all(not out.is_graph_output() and all(use.node in nodes for use in out.uses()) for out in node.outputs)


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


def _gelu_erf(node: oir.Node) -> Found | None:
    if node.op_type != "Erf" or node.inputs[0] is None:
        return None
    source, factor, scaling = _scaled(node.inputs[0])
    plus = next((r for r in match.consumers(node.outputs[0]) if r.op_type == "Add" and match.with_scalar(r, 1.0)), None)
    if plus is None or abs(factor - math.sqrt(0.5)) > 1e-4:
        return None
    half = _half_of_product(plus, source)
    return None if half is None else Found("Gelu", source, half[0], (*scaling, node, plus, *half[1], half[0]))


def _gelu_tanh(node: oir.Node) -> Found | None:
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
            return Found(
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


def _silu(node: oir.Node) -> Found | None:
    """`x * sigmoid(alpha x)`."""
    if node.op_type != "Sigmoid" or node.inputs[0] is None:
        return None
    direct = _product(node.outputs[0], node.inputs[0])
    if direct is not None:
        return Found("SiLU", node.inputs[0], direct, (node, direct))
    source, factor, scaling = _scaled(node.inputs[0])
    end = _product(node.outputs[0], source)
    return None if end is None or not scaling else Found("SiLU", source, end, (*scaling, node, end), factor)


def _hard_swish(node: oir.Node) -> Found | None:
    """`x * HardSigmoid(x)` with alpha 1/6 and beta 1/2."""
    if node.op_type != "HardSigmoid" or node.inputs[0] is None:
        return None
    alpha, beta = match.attribute(node, "alpha", 0.2), match.attribute(node, "beta", 0.5)
    end = _product(node.outputs[0], node.inputs[0])
    if end is None or abs(alpha - 1 / 6) > 1e-6 or beta != 0.5:
        return None
    return Found("HardSwish", node.inputs[0], end, (node, end))


def _mish(node: oir.Node) -> Found | None:
    """`x * tanh(softplus(x))`."""
    tanh = match.sole_consumer(node.outputs[0], "Tanh") if node.op_type == "Softplus" else None
    end = _product(tanh.outputs[0], node.inputs[0]) if tanh is not None and node.inputs[0] is not None else None
    return Found("Mish", node.inputs[0], end, (node, tanh, end)) if end is not None and tanh and node.inputs[0] else None
