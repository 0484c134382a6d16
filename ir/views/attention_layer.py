"""Attention layers: attention with the linear layers that make its queries, keys and values, and take its result.

    result = output(softmax(mask(scale * query(source) @ key(memory)^T)) @ value(memory))

Everything is found by data flow and proven shapes. A layer that nearly is one gives a `Miss` with the reason.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

import numpy as np
import onnx_ir as oir

from burnish.ir import match
from burnish.ir.inference import Inference
from burnish.ir.views import projection
from burnish.ir.views.attention import Miss
from burnish.ir.views.cache import Cache
from burnish.ir.views.heads import Axes
from burnish.ir.views.kept import Kept
from burnish.ir.views.linear import Linear
from burnish.ir.views.norm import Norm, norms
from burnish.ir.views.projection import Projection
from burnish.ir.views.scale import Factor, write_scale
from burnish.ir.views.scores import Mask
from burnish.ir.views.trail import HeadNorm
from burnish.ir.views.turned import Turned, Turns
from burnish.ir.walk import walk


@dataclass(frozen=True, eq=False)
class Heads:
    """The weights of an attention layer, float64, head by head; a bias is None where there is none.

    Attributes:
        query: [heads, head size, in].
        key: [key heads, head size, in]; None where keys are taken from a cache only. `value` likewise.
        value: [key heads, value size, in].
        output: [out, heads, value size].
        query_bias, key_bias, value_bias: [heads or key heads, size].
        output_bias: [out].
    """

    query: np.ndarray
    key: np.ndarray | None
    value: np.ndarray | None
    output: np.ndarray
    query_bias: np.ndarray | None = None
    key_bias: np.ndarray | None = None
    value_bias: np.ndarray | None = None
    output_bias: np.ndarray | None = None


@dataclass(frozen=True, eq=False)
class AttentionLayer:
    """One attention with its linear layers.

    Attributes:
        anchor: the Softmax, or the operator that is the whole attention.
        source: the hidden state that queries are made of.
        memory: the one that keys and values are made of; None where they come from a cache only.
        value_memory: what values are made of: `memory`, unless only keys are told their positions.
        result: what the output layer computes.
        query, key, value, output: the linear layers. Packed projections are one and the same. None where there is none:
            keys and values from a cache only, or inside com.microsoft Attention.
        heads, kv_heads: heads of queries, and of keys and values.
        head_size, value_size: elements of a head of queries and keys, and of values.
        scale: what the products of queries and keys are multiplied with, wherever that is written.
        mask: what is added or chosen, in order; an operator's own is_causal or window is not among them.
        causal: no query sees a later key; None when that is not known.
        window: how many keys, its own included, a query sees at most by a mask that moves with it, on its side or on
            both; None when unlimited or not known.
        softcap: scores are softcap * tanh(scores / softcap); 0 for none.
        rotary, key_rotary: rotary embedding of queries and of keys.
        query_norm, key_norm: norms of queries and keys.
        cross: keys and values are made of something else than the queries.
        cache: where keys and values are kept between two calls.
        spelling: "arithmetic", or the operator that is the whole attention, with its domain.
        nodes: all nodes from `source` and `memory` to `result`, without those that compute masks and rotary tables.
        product: the node that multiplies queries and keys, or the operator that is the whole attention.
        scales: the factors that make up the scale, an operator's own aside.
        shared: nodes that read the queries, keys or values for something else, as a layer without keys of its own reads
            those of another; such queries, keys and values can be read only.
        projections: query, key, value and output, as `read` and `write` use them; key and value None for a cache only.
        kept: queries, keys and values at the place where another layer could read them as its own.
        paths: of keys and of values: the values on the way from the product back to the linear layer, nearest to the
            product first, with their axes in the letters of `burnish.ir.views.heads`.
    """

    anchor: oir.Node
    source: oir.Value
    memory: oir.Value | None
    value_memory: oir.Value | None
    result: oir.Value
    query: Linear | None
    key: Linear | None
    value: Linear | None
    output: Linear | None
    heads: int
    kv_heads: int
    head_size: int
    value_size: int
    scale: float
    mask: tuple[Mask, ...]
    causal: bool | None
    window: int | None
    softcap: float
    rotary: Turned | None
    key_rotary: Turned | None
    query_norm: HeadNorm | None
    key_norm: HeadNorm | None
    cross: bool
    cache: Cache
    spelling: str
    nodes: tuple[oir.Node, ...]
    product: oir.Node
    scales: tuple[Factor, ...]
    shared: tuple[oir.Node, ...]
    projections: tuple[Projection, Projection | None, Projection | None, Projection]
    kept: tuple[Kept, Kept, Kept]
    paths: tuple[tuple[tuple[oir.Value, Axes], ...], tuple[tuple[oir.Value, Axes], ...]]

    @property
    def packed(self) -> bool:
        """Whether queries, keys and values, or the latter two, are made by one matrix."""
        holders = [one.holder for one in self.projections[:3] if one is not None]
        return len(set(holders)) < len(holders)

    def overlap(self, layers: Iterable[AttentionLayer] = ()) -> str | None:
        """Why queries, keys and values cannot be written apart, from those of these layers either, in plain words."""
        others = [part for one in layers if one.anchor is not self.anchor for part in one.projections[:3]]
        return projection.same_rows(self.projections[:3], others)

    def read(self) -> Heads:
        """The weights and biases, head by head."""
        q, k, v, o = self.projections
        return Heads(
            q.weight(), k.weight() if k is not None else None, v.weight() if v is not None else None, o.weight(),
            q.bias(), k.bias() if k is not None else None, v.bias() if v is not None else None, o.bias(),
        )  # fmt: skip

    def write(self, model: oir.Model, heads: Heads) -> None:
        """Give the layer new weights and biases of the same shapes, in the exporter's own spelling.

        Matrices that other nodes read as well are copied for this layer. The view is out of date afterwards when a bias
        came or went; writing what `read` gave changes nothing.

        Raises:
            ValueError: a weight has another shape than it had, or can only be read, or other layers read the result.
        """
        q, k, v, o = self.projections
        if self.shared and not _same(heads, self.read()):
            raise ValueError(f"{match.describe(self.shared[0])} reads its queries, keys or values as well")
        changes = [(q, heads.query, heads.query_bias), (o, heads.output, heads.output_bias)]
        for one, weight, bias in ((k, heads.key, heads.key_bias), (v, heads.value, heads.value_bias)):
            if (one is None) != (weight is None):
                raise ValueError("keys and values that come from a cache have no weights")
            if one is not None and weight is not None:
                changes.append((one, weight, bias))
        projection.write(model, changes)

    def write_scale(self, model: oir.Model, scale: float) -> None:
        """Let `scale` be the scale of the scores, where the model has it; the same scale changes nothing.

        Raises:
            ValueError: the scale is zero, or a computed number, or counts for something else as well.
        """
        write_scale(model, self.product, self.scales, self.nodes, self.scale, scale)


def _same(one: Heads, other: Heads) -> bool:
    """Whether the weights and biases of queries, keys and values are equal."""
    return all(
        np.array_equal(left, right) if left is not None and right is not None else left is right
        for left, right in (
            (getattr(one, name), getattr(other, name))
            for part in ("query", "key", "value")
            for name in (part, f"{part}_bias")
        )
    )


def attention_layers(model: oir.Model, facts: Inference | None = None) -> Iterator[AttentionLayer | Miss]:
    """The attention layers of all graphs of the model in order, and every near miss with its reason.

    Args:
        model: the model; not changed.
        facts: what is proven of the model as it is when the iteration begins.
    """
    from burnish.ir.views import attention_operators, spelled_attention

    known = facts if facts is not None else Inference(model)
    found_norms: dict[oir.Value, Norm] = {norm.output: norm for norm in norms(model)}
    order = {node: index for index, node in enumerate(walk(model))}
    context = Context(model, known, Turns(model, known), found_norms, order)
    seen: dict[object, bool] = {}
    for node in order:
        if node.graph is None:
            continue
        found: AttentionLayer | Miss | None = None
        if node.op_type == "Softmax":
            found = spelled_attention.read(node, context)
        elif node.op_type in attention_operators.OPERATORS:
            found = attention_operators.read(node, context)
        if isinstance(found, AttentionLayer):
            keys = found.projections[1]
            made = None if keys is None else (keys.holder, keys.places.tobytes())
            if made is not None and made in seen:
                cache = replace(found.cache, kind="shared") if found.cache else found.cache
                found = replace(found, cache=cache, cross=seen[made])
            elif made is not None:
                seen[made] = found.cross
            yield found
        elif found is not None and found.near:
            yield found


@dataclass(frozen=True)
class Context:
    """What is looked up once for all layers of a model."""

    model: oir.Model
    facts: Inference
    turns: Turns
    norms: dict[oir.Value, Norm]
    order: dict[oir.Node, int]

    def ordered(self, nodes: Iterable[oir.Node]) -> tuple[oir.Node, ...]:
        """Each of `nodes` once, in the order of the graph."""
        return tuple(sorted(set(nodes), key=lambda node: self.order[node]))
