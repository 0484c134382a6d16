"""What a graph computes or stores twice is computed or stored once."""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as oir

from burnish.ir import edit, weights
from burnish.ir.walk import STANDARD_DOMAINS, bodies
from burnish.passes.base import ExactPass, Outcome

_SAMPLE = 64
_COMMUTATIVE = {"Add", "Mul", "And", "Or", "Xor", "Equal", "Max", "Min", "Sum", "BitwiseAnd", "BitwiseOr", "BitwiseXor"}
_KINDS = oir.AttributeType
_COMPARABLE = {_KINDS.FLOAT, _KINDS.FLOATS, _KINDS.INT, _KINDS.INTS, _KINDS.STRING, _KINDS.STRINGS, _KINDS.TENSOR}
_RANDOM = {
    "RandomNormal",
    "RandomNormalLike",
    "RandomUniform",
    "RandomUniformLike",
    "Multinomial",
    "Bernoulli",
    "Dropout",
}


@dataclass(frozen=True)
class ShareRepeats(ExactPass):
    """Compute equal expressions once and store equal initializers once.

    Attributes:
        weights: share equal floating-point weights of more than one element too; files get smaller, but training the
            result would then change them together.
    """

    weights: bool = True

    def rewrite(self, model: oir.Model, outcome: Outcome) -> None:
        self._initializers(model, outcome)
        self._graph(model.graph, {}, outcome)

    def _initializers(self, model: oir.Model, outcome: Outcome) -> None:
        groups: dict[Any, list[oir.Value]] = defaultdict(list)
        for value in model.graph.initializers.values():
            tensor = weights.tensor_of(value)
            if tensor is None or value.is_graph_output() or not value.uses():
                continue
            if self.weights or tensor.size <= 1 or not tensor.dtype.is_floating_point():
                groups[tensor.dtype, tuple(tensor.shape)].append(value)
        for twins in groups.values():
            for same in _alike(twins, _sample):
                for first, *others in _alike(same, _content):
                    for value in others:
                        if outcome.take(next(iter(value.uses())).node):
                            edit.replace_value(value, first)
                            edit.drop_if_unused(value)

    def _graph(self, graph: oir.Graph, known: dict[Any, oir.Node], outcome: Outcome) -> None:
        for node in list(graph):
            nested = bodies(node)
            for body in nested:
                self._graph(body, dict(known), outcome)
            if nested or node.op_type in _RANDOM or node.domain not in STANDARD_DOMAINS:
                continue
            key = _key(node)
            first = known.setdefault(key, node) if key is not None else node
            if first is node or not _replaceable(node, first):
                continue
            if outcome.take(node):
                for old, new in zip(node.outputs, first.outputs, strict=True):
                    edit.replace_value(old, new)
                edit.remove_unused([node])


def _replaceable(node: oir.Node, first: oir.Node) -> bool:
    """Whether no graph output would lose its own value."""
    return not any(out.is_graph_output() for out in node.outputs)


def _key(node: oir.Node) -> Any:
    inputs = [id(value) if value is not None else None for value in node.inputs]
    if node.op_type in _COMMUTATIVE:
        inputs.sort(key=lambda x: x or 0)
    attributes = []
    for name, attribute in sorted(node.attributes.items()):
        if attribute.is_ref() or attribute.type not in _COMPARABLE:
            return None
        value = attribute.value
        if attribute.type == oir.AttributeType.TENSOR:
            if value.size > 16:
                return None
            value = (value.dtype, tuple(value.shape), value.tobytes())
        elif isinstance(value, list):
            value = tuple(value)
        attributes.append((name, attribute.type, value if not isinstance(value, float) else value.hex()))
    return node.op_type, tuple(inputs), tuple(attributes), len(node.outputs)


def _alike(values: list[oir.Value], key: Callable[[oir.TensorProtocol], Hashable]) -> list[list[oir.Value]]:
    """The groups of more than one value that have the same key."""
    groups: dict[Hashable, list[oir.Value]] = defaultdict(list)
    for value in values:
        if len(values) > 1 and value.const_value is not None:
            groups[key(value.const_value)].append(value)
    return [group for group in groups.values() if len(group) > 1]


def _sample(tensor: oir.TensorProtocol) -> Hashable:
    """A few elements, so that large weights that differ are told apart without being read."""
    if tensor.dtype == oir.DataType.STRING or tensor.size <= _SAMPLE:
        return None
    array = tensor.numpy()
    return array[tuple(slice(None, None, max(1, size // 4)) for size in array.shape)].tobytes()


def _content(tensor: oir.TensorProtocol) -> Hashable:
    if tensor.dtype == oir.DataType.STRING:
        return repr(tensor.numpy().tolist())
    kept = weights.unrounded_values(tensor)
    data = (
        np.ascontiguousarray(tensor.numpy()).reshape(-1).view(np.uint8).data
        if tensor.size > _SAMPLE
        else tensor.tobytes()
    )
    return hashlib.blake2b(data, digest_size=16).digest(), kept.tobytes() if kept is not None else None
