"""Self-attention layers whose keys and values another layer can read, and why a pair of them cannot share."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import onnx_ir as oir

from burnish.ir import match
from burnish.ir.inference import Inference
from burnish.ir.views.attention_layer import AttentionLayer
from burnish.ir.views.block import Block, Structure
from burnish.ir.views.cache import Port
from burnish.ir.views.kept import Kept
from burnish.ir.walk import is_op
from burnish.passes import kv_operators
from burnish.passes.depth_blocks import blocks_of


@dataclass(frozen=True, eq=False)
class KeyLayer:
    """A self-attention layer.

    Attributes:
        index: its number among the self-attention layers, from 0.
        layer: the view.
        block: the block that it is in.
        owner: the number of the layer whose keys and values it reads: its own, unless they are shared already.
        refusal: why it has to keep its keys and values, in plain words; None when it need not.
    """

    index: int
    layer: AttentionLayer
    block: Block
    owner: int
    refusal: str | None

    @property
    def keys(self) -> Kept:
        """Its keys, where another layer can read them."""
        return self.layer.kept[1]

    @property
    def values(self) -> Kept:
        """Its values, where another layer can read them."""
        return self.layer.kept[2]

    @property
    def ports(self) -> list[tuple[str, Port]]:
        """Its caches, of keys and of values."""
        cache = self.layer.cache
        return [(name, port) for name, port in (("keys", cache.key), ("values", cache.value)) if port is not None]


class KeyLayers:
    """The self-attention layers of a model, which must not be changed meanwhile.

    Args:
        model: in normal form.

    Raises:
        InputError: the model has no residual blocks.
    """

    def __init__(self, model: oir.Model) -> None:
        self.model = model
        self.facts = Inference(model)
        self.structure: Structure = blocks_of(model, self.facts)
        self.layers: list[KeyLayer] = []
        owners: dict[oir.Value, int] = {}
        inside = [(block, layer) for block in self.structure.blocks for layer in block.attention]
        for block, layer in inside:
            keys = layer.kept[1].value
            owner = owners.get(keys) if keys is not None else None
            if layer.cross and owner is None:
                continue
            index = len(self.layers)
            if keys is not None:
                owners.setdefault(keys, index)
            found = KeyLayer(index, layer, block, index if owner is None else owner, None)
            self.layers.append(KeyLayer(index, layer, block, found.owner, self._refusal(found)))

    def obstacle(self, taker: int, donor: int) -> str | None:
        """Why one layer cannot read the keys and values of another, in plain words; None when it can."""
        one, other = self.layers[taker], self.layers[donor]
        if donor >= taker:
            return f"layer {donor} does not come before it"
        if one.refusal is not None:
            return one.refusal
        if other.owner != donor:
            return f"layer {donor} has no keys and values of its own"
        if other.keys.value is None or other.values.value is None or other.layer.key is None:
            return f"the keys and values of layer {donor} are inside an operator"
        if other.layer.anchor.graph is not self.model.graph:
            return f"layer {donor} is not in the main graph"
        return self._mixed(one) or self._differ(one, other)

    def _refusal(self, one: KeyLayer) -> str | None:
        layer, cache = one.layer, one.layer.cache
        if one.owner != one.index:
            return f"it reads the keys and values of layer {one.owner} already"
        if layer.anchor.graph is not self.model.graph:
            return "it is not in the main graph"
        if layer.key is None or layer.value is None:
            return "its keys and values come from no linear layers of their own"
        if cache.kind not in ("none", "kv", "kv-output"):
            return f"its cache is of the kind `{cache.kind}`"
        if any(port.index for _, port in one.ports):
            return "its cache is packed with others into one tensor"
        if set(cache.past) != set(one.block.inputs) or set(cache.present) != set(one.block.outputs):
            return "its block has states or outputs that are not the cache of this attention alone"
        if one.keys.inside:
            reason = kv_operators.obstacle(layer)
        else:
            missing = one.keys.value is None or one.values.value is None
            reason = "its keys or values are packed with others up to the attention" if missing else None
        return reason or self._packed(layer) or self._read_elsewhere(one)

    def _packed(self, layer: AttentionLayer) -> str | None:
        if not kv_operators.shares_matrix(layer):
            return None
        assert layer.query is not None
        if layer.query.read_only is not None:
            return f"its packed matrix cannot be rewritten: {layer.query.read_only}"
        return kv_operators.not_narrowed(layer, self.facts)

    def _read_elsewhere(self, one: KeyLayer) -> str | None:
        kept = {one.keys.value, one.values.value, *(value for _, port in one.ports for value in (port.present,))}
        for node in one.layer.shared:
            if not kept & set(node.inputs):
                return f"{match.describe(node)} reads its queries, keys or values as well"
        for value in one.layer.cache.past:
            own = {*one.layer.nodes, one.layer.anchor}
            wrong = [node for node in match.consumers(value) if node not in own and not is_op(node, "Shape")]
            if wrong:
                return f"{match.describe(wrong[0])} reads its cache `{value.name}` too"
        return None

    def _mixed(self, one: KeyLayer) -> str | None:
        for x in self.layers:
            if _is(one.keys, x.values) or _is(one.values, x.keys):
                return f"its keys are values of layer {x.index}, or its values keys"
            if _is(one.values, x.values) != (one.index in (x.index, x.owner)):
                return f"it has only keys, or only values, in common with layer {x.index}"
        return None

    def _differ(self, one: KeyLayer, other: KeyLayer) -> str | None:
        a, b, j = one.layer, other.layer, other.index
        sizes = [(x.kv_heads, x.head_size, x.value_size) for x in (a, b)]
        if sizes[0] != sizes[1]:
            (n, d, _), (m, e, _) = sizes
            return f"it has {n} heads of {d} elements for keys and values, layer {j} has {m} of {e}"
        if a.window != b.window or a.causal != b.causal:
            return f"it sees {_reach(a)}, layer {j} {_reach(b)}"
        if any(_biased(x) for x in (one, other)):
            return "an operator adds a bias to keys or values behind the place where they could be read"
        if a.cache.kind != b.cache.kind or a.cache.form != b.cache.form:
            return f"its cache is of the kind `{a.cache.kind}`, that of layer {j} of the kind `{b.cache.kind}`"
        reason = self._turned(one.keys, other.keys, j)
        if reason is not None:
            return reason
        lengths = [kv_operators.lengths(x.anchor) for x in (a, b)]
        if len(lengths[0]) == len(lengths[1]) and not all(same(x, y) for x, y in zip(*lengths, strict=True)):
            return f"its operator counts keys by other numbers than that of layer {j}"
        for name, mine, theirs in (("keys", one.keys, other.keys), ("values", one.values, other.values)):
            if mine.scale != theirs.scale:
                return f"its {name} are multiplied by {mine.scale:g}, those of layer {j} by {theirs.scale:g}"
            if mine.inside != theirs.inside or (not mine.inside and mine.axes != theirs.axes):
                return f"its {name} are laid out in another way than those of layer {j}"
            if not mine.inside:
                if self.facts.dtype(mine.value) != self.facts.dtype(theirs.value):
                    return f"its {name} have another dtype than those of layer {j}"
                if not self._same_shape(mine.value, theirs.value):
                    return f"its {name} are not proven to be of the shape of those of layer {j}"
        for (name, mine_), (_, theirs_) in zip(one.ports, other.ports, strict=True):
            for p, q in ((mine_.past, theirs_.past), (mine_.present, theirs_.present)):
                if (p is None) != (q is None) or p is not None and q is not None and p.dtype != q.dtype:
                    return f"its cache of {name} is of another dtype than that of layer {j}"
                if p is not None and q is not None and not self._same_shape(p, q):
                    return f"its cache of {name} is not declared to have the shape of that of layer {j}"
        return None

    def _same_shape(self, one: oir.Value | None, other: oir.Value | None) -> bool:
        """Whether two tensors are proven, or declared, to have the same sizes."""
        proven = self.facts.shape(one)
        if proven is not None and proven == self.facts.shape(other):
            return True
        declared = [value.shape for value in (one, other) if value is not None and value.shape is not None]
        return len(declared) == 2 and declared[0] == declared[1] and not declared[0].has_unknown_dim()

    def _turned(self, one: Kept, other: Kept, j: int) -> str | None:
        a, b = one.turned, other.turned
        if (a is None) != (b is None):
            return f"only one of it and layer {j} has a rotary embedding"
        if a is None or b is None:
            return None
        if (a.dims, a.interleaved, a.start) != (b.dims, b.interleaved, b.start):
            return f"it turns {a.dims} elements of a head, layer {j} {b.dims}, or in another order"
        if not all(same(x, y) for x, y in ((a.cos, b.cos), (a.sin, b.sin), (a.position, b.position))):
            return f"its rotary embedding is not that of layer {j}: another base, scaling or position"
        return None


def _is(one: Kept, other: Kept) -> bool:
    return one.value is not None and one.value is other.value


def _biased(one: KeyLayer) -> bool:
    """Whether the operator of a layer adds a bias to keys or values, and does not give them with it."""
    parts = [part for part in one.layer.projections[1:3] if part is not None]
    return not one.keys.inside and any(node is one.layer.anchor for part in parts for node, _, _ in part.biases)


def _reach(layer: AttentionLayer) -> str:
    if layer.window is not None:
        return f"a window of {layer.window} keys"
    return "all earlier keys" if layer.causal else "keys for which no order is proven"


def same(one: oir.Value | None, other: oir.Value | None, depth: int = 24) -> bool:
    """Whether two values are computed alike from the same values and equal constants; False when that is not seen."""
    if one is other:
        return True
    if one is None or other is None or depth == 0:
        return False
    if one.const_value is not None and other.const_value is not None:
        a, b = one.const_value, other.const_value
        return a.dtype == b.dtype and a.shape == b.shape and np.array_equal(a.numpy(), b.numpy())
    p, q = one.producer(), other.producer()
    if p is None or q is None or (p.op_type, p.domain) != (q.op_type, q.domain) or one.index() != other.index():
        return False
    return _attributes(p) == _attributes(q) and _all_same(p.inputs, q.inputs, depth - 1)


def _all_same(one: Iterable[oir.Value | None], other: Iterable[oir.Value | None], depth: int) -> bool:
    a, b = list(one), list(other)
    return len(a) == len(b) and all(same(x, y, depth) for x, y in zip(a, b, strict=True))


def _attributes(node: oir.Node) -> dict[str, str]:
    return {name: str(attribute.value) for name, attribute in node.attributes.items()}
