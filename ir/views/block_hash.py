"""Hashes of what a block computes, the same for blocks that differ only in the numbers of their weights.

They do not depend on names, on the order of the nodes, nor on where the code stands that computes sizes.
"""

from __future__ import annotations

import hashlib
from functools import cache

import onnx_ir as oir

from burnish.ir import match, weights
from burnish.ir.inference import Inference
from burnish.ir.views.flow import Flow, Step
from burnish.ir.walk import STANDARD_DOMAINS, bodies, is_op

COMMUTATIVE = frozenset(("Add", "Mul", "And", "Or", "Xor", "Equal", "Max", "Min", "Sum"))
_NORMS = {"LayerNormalization": "layer", "SimplifiedLayerNormalization": "rms", "RMSNormalization": "rms"}
_INTEGERS = (oir.DataType.INT64, oir.DataType.INT32, oir.DataType.BOOL)


class BlockHash:
    """Hashes regions of one graph.

    Args:
        flow: the flow of the graph.
        facts: what is proven of the model.
        joins: the steps of the residual sums, as bits: what depends on one of them is the stream of another block.
    """

    def __init__(self, flow: Flow, facts: Inference, joins: int) -> None:
        self._flow, self._facts = flow, facts
        self._sides: list[str | None] = []
        for index, step in enumerate(flow.steps):
            stream = bool((flow.before[index] | 1 << index) & joins)
            self._sides.append(None if stream else self._step(step, {}, None))

    def of(self, region: int, entry: oir.Value, exit: oir.Value) -> str:
        """The hash of the expression of `exit`, computed from `entry` by the steps of `region`: 16 hexadecimal digits.

        Masks, tables and states from outside count as expressions of the inputs of the graph, the stream of other
        blocks only with its rank. Of weights the dtype and shape count, of small integers the values.
        """
        known: dict[int, str] = {}
        for step in self._flow.members(region):
            known[self._flow.source[step.outputs[0]]] = self._step(step, known, entry)
        return known[self._flow.source[exit]]

    def _step(self, step: Step, known: dict[int, str], entry: oir.Value | None) -> str:
        node = step.node
        if node is None:
            (value,) = step.outputs
            return _hash("input", str(value.dtype), match.rank(value))
        if step.op == "Add":
            return _hash("sum", sorted(self._value(value, known, entry) for value in self._summands(step, known)))
        if step.part or node.op_type in _NORMS:
            return self._normalized(step, node, known, entry)
        keys = [self._value(value, known, entry) for value in node.inputs]
        if node.op_type in COMMUTATIVE:
            keys.sort()
        return _hash(node.domain, node.op_type, keys, attributes_of(node, self._facts.opset))

    def _summands(self, step: Step, known: dict[int, str]) -> list[oir.Value]:
        """The terms of a sum, those of the sums among them in their place: fused operators group them differently."""
        found: list[oir.Value] = []
        for value in step.inputs:
            if value is None:
                continue
            inner = self._flow.step(value)
            if inner is not None and inner.op == "Add" and self._flow.source[value] in known and match.used_once(value):
                found += self._summands(inner, known)
            else:
                found.append(value)
        return found

    def _normalized(self, step: Step, node: oir.Node, known: dict[int, str], entry: oir.Value | None) -> str:
        kind = _NORMS.get(node.op_type.removeprefix("Skip"), "layer")
        source, *given = step.inputs
        parameters = [self._value(value, known, entry) for value in given[: 1 if kind == "rms" else 2]]
        epsilon = match.attribute(node, "epsilon", 1e-12 if step.part else 1e-5)
        return _hash(kind, self._value(source, known, entry), parameters, f"{float(epsilon):.3g}")

    def _value(self, value: oir.Value | None, known: dict[int, str], entry: oir.Value | None) -> str:
        if value is None:
            return "none"
        if value is entry:
            return "entry"
        tensor = weights.tensor_of(value)
        if tensor is not None:
            digits = _digits(tensor)
            if digits and tensor.dtype == oir.DataType.INT32:
                stored = any(is_op(one, "DequantizeLinear") for one in match.consumers(value))
                digits = "" if stored else digits
            return _hash("constant", str(tensor.dtype), tuple(tensor.shape.numpy()), digits)
        index = self._flow.source.get(value)
        if index is not None and index in known:
            return _hash(known[index], self._flow.steps[index].outputs.index(value))
        if self._is_size(value):
            content = self._facts.content(value)
            found = None if content is None else [x if isinstance(x, int) else "?" for x in content.reshape(-1)]
            return _hash("size", found)
        side = self._sides[index] if index is not None and index < len(self._sides) else None
        if index is None or side is None:
            return _hash("stream", match.rank(value))
        return _hash(side, self._flow.steps[index].outputs.index(value))

    def _is_size(self, value: oir.Value) -> bool:
        shape = self._facts.shape(value)
        small = shape is not None and len(shape) <= 1
        return small and self._facts.dtype(value) in _INTEGERS and not self._flow.varies(value)


def attributes_of(node: oir.Node, opset: int) -> list[tuple[str, str]]:
    """The attributes as text, those left out that have their default."""
    defaults = defaults_of(node.op_type, opset) if node.domain in STANDARD_DOMAINS else {}
    found = []
    for name, one in sorted(node.attributes.items()):
        if one.type == oir.AttributeType.TENSOR:
            text = f"{one.value.dtype} {tuple(one.value.shape.numpy())} {_digits(one.value)}"
        elif one.type in (oir.AttributeType.GRAPH, oir.AttributeType.GRAPHS):
            text = str([inner.op_type for body in bodies(node) for inner in body.all_nodes()])
        else:
            text = str(match.attribute(node, name))
        if defaults.get(name) != text:
            found.append((name, text))
    return found


@cache
def defaults_of(op_type: str, opset: int) -> dict[str, str]:
    """The default values of the attributes of a standard operator, as text."""
    import onnx

    try:
        schema = onnx.defs.get_schema(op_type, opset, "")
    except onnx.defs.SchemaError:
        return {}
    given = {name: one.default_value for name, one in schema.attributes.items() if one.default_value.name}
    values = {name: onnx.helper.get_attribute_value(one) for name, one in given.items()}
    return {name: one.decode() if isinstance(one, bytes) else str(one) for name, one in values.items()}


def _digits(tensor: oir.TensorProtocol) -> str:
    return str(tensor.numpy().tolist()) if tensor.dtype in _INTEGERS and tensor.size <= 64 else ""


def _hash(*parts: object) -> str:
    return hashlib.blake2b(repr(parts).encode(), digest_size=8).hexdigest()
