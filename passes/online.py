"""Rotations that are computed when the model runs, and undone by the weights or by each other.

A layer that reads y gets y H for a Hadamard matrix H, and its weight becomes W H; queries and keys both get H behind
their rotary embedding, so that their products stay. H is the Kronecker product of two matrices A and B about as large
as the root of its size, so that a row costs size * (len(A) + len(B)) multiply-adds.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import onnx_ir as oir

from burnish.ir import edit, match, weights
from burnish.ir.inference import Inference
from burnish.ir.views.attention_layer import AttentionLayer
from burnish.ir.views.linear import Linear
from burnish.ir.views.parameter import same_shape
from burnish.ir.views.stream import Stream
from burnish.passes import rotation

_WHOLE = 128
"""Features up to which one matrix is used."""


def pair(size: int) -> tuple[np.ndarray, np.ndarray]:
    """Two orthogonal matrices, float64, whose Kronecker product has `size` rows; the first is [1, 1] for few."""
    two = size & -size
    if size <= _WHOLE:
        return np.ones((1, 1)), rotation.hadamard(size)
    first = max((1 << power for power in range(two.bit_length())), key=lambda one: -(one + size // one))
    return rotation.hadamard(first), rotation.hadamard(size // first)


def inner_layers(stream: Stream, attention: list[AttentionLayer]) -> list[Linear]:
    """The layers that write a stream behind something that is no attention and reads the stream: those of MLPs.

    Args:
        stream: of the model.
        attention: its attention layers.
    """
    own = {one.output.node for one in attention if one.output is not None}
    read = {one.linear.node for one in stream.readers}
    written = (one for one in stream.writers if isinstance(one, Linear) and one.input_axis == -1)
    return [one for one in written if one.node not in own | read and _comes_from(one.input, read)]


def _comes_from(value: oir.Value, nodes: set[oir.Node]) -> bool:
    pending, seen = [value], {value}
    while pending:
        node = pending.pop().producer()
        if node is None:
            continue
        if node in nodes:
            return True
        for one in node.inputs:
            if one is not None and one not in seen and not weights.is_constant(one):
                seen.add(one)
                pending.append(one)
    return False


def score_refusal(layer: AttentionLayer, facts: Inference) -> str | None:
    """Why queries and keys cannot be rotated behind their rotary embedding, in plain words; None when they can."""
    if layer.rotary is None or layer.key_rotary is None:
        return "its queries and keys have no rotary embedding"
    if layer.cache.kind != "none":
        return "its keys are kept in a cache that the model takes or gives"
    if layer.shared:
        return f"{match.describe(layer.shared[0])} reads its queries, keys or values as well"
    for one in (layer.rotary, layer.key_rotary):
        shape = facts.shape(one.y)
        if one.operator is not None and one.operator.op_type == "GroupQueryAttention":
            return "one operator turns queries and keys and multiplies them"
        if not shape or shape[-1] != layer.head_size or one.y.is_graph_output():
            return "rotary embedding turns a part of each head only"
    return None


def input_refusal(layer: Linear, facts: Inference) -> str | None:
    """Why a layer cannot read its input times a Hadamard matrix, in plain words; None when it can."""
    if not facts.shape(layer.input):
        return "the rank of its input is not known"
    return layer.read_only if layer.dtype is not None else "its dtype is not known"


@dataclass
class Turner:
    """Puts Hadamard matrices into a model, each constant once.

    Attributes:
        model: the model.
        facts: what is proven of it as it was.
    """

    model: oir.Model
    facts: Inference
    held: dict[tuple[int, int, oir.DataType], oir.Value] = field(default_factory=dict)

    def turn_input(self, layer: Linear) -> None:
        """Let a layer for which `input_refusal` gives None read its input times a Hadamard matrix.

        The layer is out of date afterwards.
        """
        shape, first, second = self.facts.shape(layer.input), *pair(layer.in_features)
        assert shape is not None and layer.dtype is not None
        weight, bias = layer.weight() @ np.kron(first, second), layer.bias()
        made = self._made(layer.input, layer.node, (first, second), len(shape), layer.dtype)
        edit.insert_before(layer.node, made)
        layer.node.replace_input_with(0, made[-1].outputs[0])
        layer.write(self.model, weight, bias)

    def turn_scores(self, layer: AttentionLayer) -> oir.Value:
        """Rotate queries and keys of a layer for which `score_refusal` gives None; the keys as they are now."""
        assert layer.rotary is not None and layer.key_rotary is not None
        for value in dict.fromkeys((layer.rotary.y, layer.key_rotary.y)):
            node, shape = value.producer(), self.facts.shape(value)
            assert node is not None and node.graph is not None and shape is not None
            uses = [(use.node, use.idx) for use in value.uses() if use.node.op_type not in ("Shape", "Size")]
            dtype = value.dtype or oir.DataType.FLOAT
            made = self._made(value, node, pair(layer.head_size), len(shape), dtype)
            node.graph.insert_after(node, made)
            for user, index in uses:
                user.replace_input_with(index, made[-1].outputs[0])
        return made[-1].outputs[0]

    def _made(
        self,
        value: oir.Value,
        like: oir.Node,
        parts: tuple[np.ndarray, np.ndarray],
        rank: int,
        dtype: oir.DataType,
    ) -> list[oir.Node]:
        """The nodes that multiply `value` by the Kronecker product of two matrices."""
        first, second = len(parts[0]), len(parts[1])
        inner = self._constant(parts[1], first * second, dtype)
        if first == 1:
            made = [edit.make("MatMul", [value, inner], like=like)]
        else:
            outer = self._constant(parts[0].T, first * second, dtype)
            lead = [0] * (rank - 1)
            split, joined = (
                edit.add_constant(self.model, f"{value.name}_{name}", np.array([*lead, *sizes], np.int64))
                for name, sizes in (("split", (first, second)), ("joined", (first * second,)))
            )
            made = [edit.make("Reshape", [value, split], like=like)]
            made.append(edit.make("MatMul", [made[-1].outputs[0], inner], like=like))
            made.append(edit.make("MatMul", [outer, made[-1].outputs[0]], like=like))
            made.append(edit.make("Reshape", [made[-1].outputs[0], joined], like=like))
            for node in made[:-1]:
                node.outputs[0].type = value.type
                if value.shape is not None:
                    node.outputs[0].shape = oir.Shape([*list(value.shape)[:-1], first, second])
        same_shape(made[-1], value)
        return made

    def _constant(self, array: np.ndarray, whole: int, dtype: oir.DataType) -> oir.Value:
        key = (whole, len(array), dtype)
        if key not in self.held:
            self.held[key] = edit.add_rounded(self.model, f"hadamard_{len(array)}", array, dtype)
        return self.held[key]
