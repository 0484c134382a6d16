"""Give the attention of a decoder that has none a cache: inputs and outputs for the keys and values of past tokens."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import onnx_ir as oir

from burnish.ir import edit, match
from burnish.ir.errors import InputError
from burnish.ir.views.attention_layer import AttentionLayer
from burnish.ir.views.embedding import token_embedding
from burnish.ir.views.kept import Kept
from burnish.ir.walk import bodies, is_op, walk
from burnish.passes import kv_operators
from burnish.passes.kv_layers import KeyLayer, KeyLayers
from burnish.passes.kv_lengths import Lengths, sizes_of
from burnish.passes.kv_tokens import mixes

_SPELLED = ("arithmetic", "Attention", "com.microsoft:MultiHeadAttention")
_LAYOUTS = (("b", "h", "t", "d"), ("b", "t", "h", "d"), ("b", "t", "hd"), ("b", "t", "d"))


def obstacle(found: KeyLayers) -> str | None:
    """Why a model cannot be given caches, in plain words; None when it can."""
    model, tokens = found.model, token_embedding(found.model, found.facts)
    shape = found.facts.shape(tokens.input) if tokens is not None else None
    if tokens is None or shape is None or len(shape) != 2:
        return "no embedding reads tokens [batch, tokens] that are an input"
    if isinstance(shape[1], int) or shape[0] == shape[1]:
        return "the number of tokens is not open"
    if any(any(bodies(node)) for node in walk(model)):
        return "it has branches or loops"
    if not found.layers:
        return "it has no self-attention"
    for one in found.layers:
        reason = _layer(one)
        if reason is not None:
            return f"layer {one.index}: {reason}"
    return _mixed(found, tokens.input)


def _mixed(found: KeyLayers, tokens: oir.Value | None) -> str | None:
    """What computes something of several tokens besides attention that was read."""
    known = {node for one in found.layers for node in (*one.layer.nodes, one.layer.anchor)}
    stream = {tokens}
    for node in found.model.graph:
        if is_op(node, "Shape", "Size") or not any(value in stream for value in node.inputs):
            continue
        stream.update(node.outputs)
        if node not in known and mixes(node, found.facts):
            return f"{match.describe(node)} may compute something of several tokens"
    return None


def _layer(one: KeyLayer) -> str | None:
    layer = one.layer
    if layer.cache:
        return f"it has a cache, of the kind `{layer.cache.kind}`"
    if layer.spelling not in _SPELLED:
        return f"its attention is a {layer.spelling}"
    if not layer.causal:
        return "it is not proven that no token sees a later one, so those before could not be kept"
    for kept, size in zip(layer.kept[1:], "de", strict=True):
        axes = tuple(letters.replace("e", "d") if size == "e" else letters for letters in kept.axes)
        if kept.value is None or axes not in _LAYOUTS:
            return "its keys or values are laid out in an unknown way"
    if match.attribute(layer.anchor, "unidirectional", 0):
        return "`unidirectional` counts from the first key"
    return None


def add(found: KeyLayers) -> None:
    """Add the caches; `obstacle` has no reason. Shapes of inner values are forgotten.

    Raises:
        InputError: a mask or a table depends on more than sizes, masks and counted positions.
    """
    model, facts = found.model, found.facts
    embedding = token_embedding(model, facts)
    assert embedding is not None and embedding.input is not None
    tokens = embedding.input
    owners = [one for one in found.layers if one.owner == one.index]
    batch, length = (str(size) for size in facts.shape(tokens) or ())
    past, total = (_free(model, name) for name in ("past_sequence_length", "total_sequence_length"))
    masks = _masks(found, tokens)
    lengths = Lengths(model, facts, tokens, masks)
    ports = [_inputs(model, one, batch, past) for one in owners]
    lengths.begin(ports[0][0], 2)
    paths = _Paths(found)
    replaced = _rewire(lengths, paths)
    lengths.end()
    edit.remove_unused(replaced)
    for one, (keys, values) in zip(owners, ports, strict=True):
        if one.layer.spelling == "Attention" and match.attribute(one.layer.anchor, "is_causal", 0):
            keys_of = _joined(model, one, keys, values, batch, total)
            edit.set_input(one.layer.anchor, 3, kv_operators.causal_mask(model, one.layer, keys_of))
            one.layer.anchor.attributes.pop("is_causal")
        else:
            _joined(model, one, keys, values, batch, total)
    for value in masks:
        value.shape = oir.Shape([batch, total])
    outputs = set(model.graph.outputs)
    for node in model.graph:
        for out in node.outputs:
            out.shape = out.shape if out in outputs else None
    model.graph.sort()


def _free(model: oir.Model, name: str) -> str:
    taken = {str(size) for value in model.graph.inputs if value.shape is not None for size in value.shape}
    return name if name not in taken else f"cache_{name}"


def _masks(found: KeyLayers, tokens: oir.Value) -> set[oir.Value]:
    """The inputs [batch, tokens] that the masks of the layers are made of."""
    shape, inputs = found.facts.shape(tokens), set(found.model.graph.inputs)
    seen: set[oir.Value] = set()
    pending = [value for one in found.layers for mask in one.layer.mask for value in (*mask.values, mask.keep) if value]
    while pending:
        value = pending.pop()
        node = value.producer()
        if value in seen or is_op(node, "Shape"):
            continue
        seen.add(value)
        pending += [one for one in node.inputs if one is not None] if node is not None else []
    return {value for value in seen & inputs if value is not tokens and found.facts.shape(value) == shape}


def _inputs(model: oir.Model, one: KeyLayer, batch: str, past: str) -> tuple[oir.Value, oir.Value]:
    made = []
    for name, kept, size in (("key", one.keys, one.layer.head_size), ("value", one.values, one.layer.value_size)):
        assert kept.value is not None
        value = oir.Value(
            name=edit.unique_name(model, f"past_key_values.{one.index}.{name}"),
            type=kept.value.type,
            shape=oir.Shape([batch, one.layer.kv_heads, past, size]),
        )
        model.graph.inputs.append(value)
        made.append(value)
    return made[0], made[1]


class _Paths:
    """Which nodes work on scores, whose last axis is that of the keys, and which on keys and values that are kept."""

    def __init__(self, found: KeyLayers) -> None:
        self.scores: set[oir.Node] = set()
        self.keys: set[oir.Node] = set()
        for one in found.layers:
            own, layer = set(one.layer.nodes), one.layer
            if layer.spelling == "arithmetic":
                weights = self._behind([layer.product], own)
                self.scores |= {node for node in weights if self._before(node, layer)}
            else:
                self.scores.add(layer.anchor)
            starts = [node for kept in layer.kept[1:] if kept.value is not None for node in match.consumers(kept.value)]
            stop = {layer.product, *self._behind([layer.product], own)}
            self.keys |= self._behind([node for node in starts if node not in stop], own - stop)

    @staticmethod
    def _behind(starts: Iterable[oir.Node], own: set[oir.Node]) -> set[oir.Node]:
        found, pending = set[oir.Node](), list(starts)
        while pending:
            node = pending.pop()
            if node in own and node not in found:
                found.add(node)
                pending += [user for out in node.outputs for user in match.consumers(out)]
        return found

    @staticmethod
    def _before(node: oir.Node, layer: AttentionLayer) -> bool:
        """Whether a node behind the product of queries and keys comes before that with the values, or is it."""
        pending, seen = [node], set[oir.Node]()
        while pending:
            one = pending.pop()
            if one is layer.anchor:
                return True
            if one not in seen:
                seen.add(one)
                pending += [user for out in one.outputs for user in match.consumers(out) if user in layer.nodes]
        return False


def _rewire(lengths: Lengths, paths: _Paths) -> list[oir.Node]:
    """Let the nodes of the stream read masks, tables and positions of the new tokens; what made the old ones."""
    facts, graph, replaced = lengths.facts, lengths.model.graph, list[oir.Node | None]()
    for node in list(graph):
        if not any(out in lengths.stream for out in node.outputs):
            continue
        for index, value in enumerate(node.inputs):
            if value is None or value in lengths.stream or not lengths.counted(value):
                continue
            shape = facts.shape(value)
            if index >= sizes_of(node):
                if node in paths.scores:
                    raise InputError(f"{match.describe(node)} gives scores another shape")
                if node in paths.keys:
                    node.replace_input_with(index, lengths.full(value))
                    replaced.append(value.producer())
                continue
            if shape is None:
                raise InputError(f"the shape of what {match.describe(node)} reads is not known")
            places = [axis for axis, size in enumerate(shape) if size == lengths.length]
            if node in paths.scores:
                rank = len(shape)
                if any(axis < rank - 2 for axis in places) or (rank > 1 and shape[-2] not in (1, lengths.length)):
                    raise InputError(f"the mask that {match.describe(node)} reads is laid out in an unknown way")
                new = lengths.rows(value, rank - 2) if rank - 2 in places else lengths.full(value)
            elif lengths.given(value) and not _of_masks(lengths, value):
                continue
            elif len(places) == 1:
                new = lengths.rows(value, places[0])
            else:
                raise InputError(f"what {match.describe(node)} reads depends on the number of tokens")
            node.replace_input_with(index, new)
            replaced.append(value.producer())
    return [node for node in replaced if node is not None]


def _of_masks(lengths: Lengths, value: oir.Value) -> bool:
    """Whether a value is made of the numbers of a mask."""
    pending, seen = [value], set[oir.Value]()
    while pending:
        one = pending.pop()
        node = one.producer()
        if one in lengths.masks:
            return True
        if one not in seen and node is not None and not is_op(node, "Shape", "Size"):
            seen.add(one)
            pending += [below for below in node.inputs if below is not None]
    return False


def _joined(
    model: oir.Model, one: KeyLayer, past_keys: oir.Value, past_values: oir.Value, batch: str, total: str
) -> oir.Value:
    """Join past and new keys and values, give both, and let the attention read them; the joined keys."""
    layer, joined = one.layer, []
    for name, kept, past, size in (
        ("key", one.keys, past_keys, layer.head_size),
        ("value", one.values, past_values, layer.value_size),
    ):
        old = kept.value
        assert old is not None and isinstance(past.name, str)
        like = old.producer() or layer.anchor
        uses = list(old.uses())
        before = _four(model, kept, old, layer.kv_heads, size, like)
        new = before[-1].outputs[0] if before else old
        join = edit.make("Concat", [past, new], {"axis": 2}, like=like)
        present = join.outputs[0]
        present.name = edit.unique_name(model, f"present.{one.index}.{name}")
        present.type, present.shape = past.type, oir.Shape([batch, layer.kv_heads, total, size])
        after = _back(model, kept, present, layer.kv_heads, size, like)
        edit.insert_behind(old, [*before, join, *after])
        for use in uses:
            use.node.replace_input_with(use.idx, after[-1].outputs[0] if after else present)
        model.graph.outputs.append(present)
        joined.append(present)
    return joined[0]


def _four(model: oir.Model, kept: Kept, value: oir.Value, heads: int, size: int, like: oir.Node) -> list[oir.Node]:
    """The nodes that bring keys or values as they are made to [batch, heads, positions, size]."""
    nodes: list[oir.Node] = []
    if len(kept.axes) == 3:
        sizes = edit.add_constant(model, f"{value.name}_heads", np.array([0, 0, heads, size]))
        nodes.append(edit.make("Reshape", [value, sizes], like=like))
    if kept.axes[1] != "h":
        nodes.append(
            edit.make("Transpose", [nodes[-1].outputs[0] if nodes else value], {"perm": [0, 2, 1, 3]}, like=like)
        )
    return nodes


def _back(model: oir.Model, kept: Kept, value: oir.Value, heads: int, size: int, like: oir.Node) -> list[oir.Node]:
    """The nodes that bring them back to the layout in which the attention takes them."""
    nodes: list[oir.Node] = []
    if kept.axes[1] != "h":
        nodes.append(edit.make("Transpose", [value], {"perm": [0, 2, 1, 3]}, like=like))
    if len(kept.axes) == 3:
        sizes = edit.add_constant(model, f"{value.name}_flat", np.array([0, 0, heads * size]))
        nodes.append(edit.make("Reshape", [nodes[-1].outputs[0], sizes], like=like))
    return nodes
