"""Attention layers with those that read their keys and values, and whether these can have fewer heads."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as oir

from burnish.ir import match
from burnish.ir.views import projection
from burnish.ir.views.attention_layer import AttentionLayer
from burnish.ir.views.heads import GROUP, REPEAT, Axes
from burnish.ir.walk import STANDARD_DOMAINS, is_op
from burnish.passes import kv_operators
from burnish.passes.kv_heads import Turn
from burnish.passes.kv_layers import KeyLayer, KeyLayers

LAYOUTS = (("b", "t", "hd"), ("b", "t", "h", "d"), ("b", "h", "t", "d"))
CONTRIB = "com.microsoft"

Path = Sequence[tuple[oir.Value, Axes]]


@dataclass(frozen=True, eq=False)
class Family:
    """A layer with keys and values of its own, first, and those that read them."""

    readers: tuple[KeyLayer, ...]

    @property
    def layer(self) -> AttentionLayer:
        """The view of the layer that makes the keys and values."""
        return self.readers[0].layer

    @property
    def inside(self) -> bool:
        """Whether an operator joins new and older keys."""
        return self.readers[0].keys.inside


def families(found: KeyLayers) -> list[Family]:
    """The layers with keys and values of their own, each with those that read them, in order."""
    owners = [one for one in found.layers if one.owner == one.index]
    return [Family((one, *(two for two in found.layers if two.owner == one.index != two.index))) for one in owners]


def obstacle(found: KeyLayers, family: Family) -> str | None:
    """Why the heads of keys and values cannot become fewer, in plain words; None when they can."""
    layer, cache = family.layer, family.layer.cache
    if any(one.layer.heads != layer.heads for one in family.readers):
        return "layers with other numbers of queries read its keys and values"
    if any(one.values.value is not family.readers[0].values.value for one in family.readers):
        return "layers with other values read its keys"
    if any(one.layer.anchor.graph is not found.model.graph for one in family.readers):
        return "it is not in the main graph"
    if layer.key is None or layer.value is None:
        return "its keys and values come from no linear layers of their own"
    for one in family.readers:
        own = (
            one.layer.projections if one is family.readers[0] else (one.layer.projections[0], one.layer.projections[3])
        )
        for part in own:
            if part is not None and (part.linear is None or part.read_only is not None):
                return part.read_only or "its matrix is inside an operator"
    if cache.kind not in ("none", "kv", "kv-output"):
        return f"its cache is of the kind `{cache.kind}`"
    if any(port.index for _, port in family.readers[0].ports):
        return "its cache is packed with others into one tensor"
    for _, port in family.readers[0].ports:
        for names in (port.past_axes, port.present_axes):
            if names and not ({"heads", "size"} <= set(names) or "heads*size" in names):
                return "its cache is laid out in an unknown way"
    if cache.form == "update" and not family.inside:
        return "its cache is a buffer that is written into"
    if layer.key_norm is not None:
        if not layer.key_norm.per_head:
            return "its keys are normed over all heads together"
        gains = (layer.key_norm.norm.scale, layer.key_norm.norm.bias)
        if any(one is not None and any(size != 1 for size in one.shape[:-1]) for one in gains):
            return "the norm of its keys has gains for each head"
    return _read_elsewhere(family) or _same_rows(found, family) or _shaped(found, family)


def _read_elsewhere(family: Family) -> str | None:
    own = {node for one in family.readers for node in (*one.layer.nodes, one.layer.anchor)}
    ports = {value for _, port in family.readers[0].ports for value in (port.past, port.present)}
    for node in family.layer.shared:
        if node not in own:
            return f"{match.describe(node)} reads its queries, keys or values as well"
    for value, _ in (*family.layer.paths[0], *family.layer.paths[1]):
        if value.is_graph_output() and value not in ports and not packed(family.layer):
            return f"its keys or values are the output `{value.name}`"
    for value in family.layer.cache.past:
        wrong = [node for node in match.consumers(value) if node not in own and not is_op(node, "Shape")]
        if wrong:
            return f"{match.describe(wrong[0])} reads its cache `{value.name}` too"
    return None


def _same_rows(found: KeyLayers, family: Family) -> str | None:
    rest = [part for one in found.layers if one not in family.readers for part in one.layer.projections[:3]]
    queries = [one.layer.projections[0] for one in family.readers[1:]]
    return projection.same_rows([*family.layer.projections[:3], *queries], rest)


def packed(layer: AttentionLayer) -> bool:
    """Whether the matrix of the keys or values makes something else as well."""
    key, value = layer.projections[1:3]
    return kv_operators.shares_matrix(layer) or key is not None and value is not None and key.holder is value.holder


def _shaped(found: KeyLayers, family: Family) -> str | None:
    """Why the way of keys and values cannot be given other sizes."""
    layer = family.layer
    if kv_operators.shares_matrix(layer):
        reason = kv_operators.not_narrowed(layer, found.facts)
        if reason is not None:
            return reason
    if rebuilt(layer):
        for path, source in zip(layer.paths, (layer.memory, layer.value_memory), strict=True):
            if grouped(layer) and match.input_of(layer.anchor, 1) is None:
                continue
            start, shape = start_of(layer, path), found.facts.shape(source)
            if start is None or shape is None or len(shape) != 3:
                return "its keys or values are packed in a way that is not undone"
            value, axes = path[start]
            place, letters = found.facts.shape(value), plain(axes)
            if letters not in LAYOUTS or place is None or shape[:2] != (place[0], place[letters.index("t")]):
                return "its keys or values are packed in a way that is not undone"
            if shape[0] == shape[1] != 1:
                return "batch and positions are equally long, so the order of its keys is not proven"
    for one in family.readers:
        for path in one.layer.paths:
            if any(REPEAT in letters for letters in path[0][1]) and one.layer.spelling == "arithmetic":
                if not _merged(path[0][1]):
                    return "its queries have their groups on an axis of their own"
    if is_op(layer.anchor, "MultiHeadAttention", domain=CONTRIB) and family.inside:
        return kv_operators.obstacle(layer)
    return None


def _merged(axes: Axes) -> bool:
    """Whether heads and their repeats are on one axis."""
    return any(GROUP + REPEAT in letters for letters in axes)


def plain(axes: Axes) -> Axes:
    """The letters of keys for those of values, and of old positions for new ones."""
    return tuple(letters.replace("e", "d").replace("u", "t").replace("s", "t").replace(GROUP, "h") for letters in axes)


def grouped(layer: AttentionLayer) -> bool:
    return is_op(layer.anchor, "GroupQueryAttention", domain=CONTRIB)


def native(layer: AttentionLayer) -> bool:
    """Whether the operator itself lets several queries read one head."""
    return grouped(layer) or layer.anchor.domain in STANDARD_DOMAINS and layer.anchor.op_type == "Attention"


def rebuilt(layer: AttentionLayer) -> bool:
    """Whether keys and values get matrices of their own in the place of packed ones, or with biases further behind."""
    parts = [one for one in layer.projections[1:3] if one is not None]
    if packed(layer) or any(node is not layer.anchor for one in parts for node, _, _ in one.biases):
        return True
    return any(not np.array_equal(one.places, np.arange(one.linear.out_features)) for one in parts if one.linear)


def start_of(layer: AttentionLayer, path: Path) -> int | None:
    """The place on a path, counted from the product, where keys or values are in no packed tensor and have a bias."""
    parts = [one for one in layer.projections[1:3] if one is not None]
    biased = {out for one in parts for node, _, _ in one.biases for out in node.outputs}
    stop = next((i for i, (value, _) in enumerate(path) if value in biased), len(path) - 1)
    places = [i for i, (_, axes) in enumerate(path[: stop + 1]) if not any(map(str.isupper, "".join(axes)))]
    return places[-1] if places and places == list(range(len(places))) else None


def turn_of(found: KeyLayers, family: Family) -> Turn:
    """What lies between the projections of keys and queries and their product."""
    turned, size = family.layer.key_rotary, family.layer.head_size
    pairs = np.zeros((2, 0), np.int64)
    if turned is not None:
        half = np.arange(turned.dims // 2)
        pairs = np.stack((2 * half, 2 * half + 1) if turned.interleaved else (half, half + len(half))) + turned.start
        assert pairs.max() < size
    layers = [one.layer for one in family.readers]
    normed = any(one.query_norm is not None or one.key_norm is not None for one in layers)
    return Turn(pairs, normed, any(_told_apart(found, one) for one in layers))


def _told_apart(found: KeyLayers, layer: AttentionLayer) -> bool:
    """Whether query heads must stay in their order: a mask or a norm has numbers for each of them."""
    norm = layer.query_norm
    gains = (norm.norm.scale, norm.norm.bias) if norm is not None else ()
    if norm is not None and (not norm.per_head or any(one is not None and len(one.shape) > 1 for one in gains)):
        return True
    values = [value for mask in layer.mask for value in (*mask.values, mask.keep) if value is not None]
    shapes = [found.facts.shape(value) for value in values]
    return any(shape is None or any(size != 1 for size in shape[-3:-2]) and len(shape) > 2 for shape in shapes)
