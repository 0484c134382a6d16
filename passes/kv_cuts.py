"""Decoders whose layers may have caches of different lengths: masks are cut to each cache, queries are given.

A decoder is exported for caches of one length: what it computes of their lengths are masks and positions. Here these
are computed of the length of the mask that the model is given instead, which is that of the whole text, and each layer
reads the part of the mask that belongs to its cache: the last tokens, of which some slots may hold nothing.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as oir

from burnish.ir import edit, match
from burnish.ir.dims import Dim
from burnish.ir.errors import InputError
from burnish.ir.views.attention_layer import AttentionLayer
from burnish.ir.views.bands import HIDDEN, Bands
from burnish.ir.views.embedding import token_embedding
from burnish.ir.views.scores import Mask
from burnish.ir.walk import bodies, is_op, walk
from burnish.passes import kv_counted, lossy
from burnish.passes.kv_budget import Queries
from burnish.passes.kv_layers import KeyLayer, KeyLayers
from burnish.passes.kv_lengths import sizes_of
from burnish.passes.kv_masks import Writer

_SPELLED = ("arithmetic", "Attention", "com.microsoft:MultiHeadAttention", kv_counted.SPELLING)
_PAST, _TOTAL = ("batch", "heads", "past", "size"), ("batch", "heads", "total", "size")


@dataclass(frozen=True, eq=False)
class Group:
    """A layer with a cache, and those that read its keys and values.

    Attributes:
        owner: the layer with the cache.
        readers: all that read it, the owner first.
        refusal: why the cache has to keep every token, in plain words; None when it need not.
    """

    owner: KeyLayer
    readers: tuple[KeyLayer, ...]
    refusal: str | None

    @property
    def past(self) -> tuple[oir.Value, oir.Value]:
        """The inputs of the model with its keys and its values."""
        return self._port(0), self._port(1)

    @property
    def present(self) -> tuple[oir.Value, oir.Value]:
        """The outputs of the model with its keys and its values."""
        return self._port(0, past=False), self._port(1, past=False)

    def _port(self, index: int, *, past: bool = True) -> oir.Value:
        port = self.owner.ports[index][1]
        value = port.past if past else port.present
        assert value is not None
        return value


class Cuts:
    """A decoder in normal form, before it is changed.

    Args:
        found: its layers.

    Raises:
        InputError: its caches cannot be of different lengths, with the reason.
    """

    def __init__(self, found: KeyLayers) -> None:
        self.model, self.facts = found.model, found.facts
        embedding = token_embedding(self.model, self.facts)
        shape = None if embedding is None else self.facts.shape(embedding.input)
        if embedding is None or embedding.input is None or shape is None or len(shape) != 2:
            raise InputError("no embedding reads tokens [batch, tokens] that are an input")
        if isinstance(shape[1], int) or any(any(bodies(node)) for node in walk(self.model)):
            raise InputError("the number of its tokens is not open, or it has branches or loops")
        self.tokens, (self.batch, self.length) = embedding.input, shape
        owners = [one for one in found.layers if one.owner == one.index]
        inside = {node for one in found.layers for node in (*one.layer.nodes, one.layer.anchor)}
        for one in owners:
            reason = self._no_cache(one, inside)
            if reason is not None:
                raise InputError(f"layer {one.index}: {reason}")
        self._dims: dict[Dim, bool] = {}
        for one in owners:
            for _, port in one.ports:
                for value, past in ((port.past, True), (port.present, False)):
                    size = (self.facts.shape(value) or (None,) * 3)[2]
                    if size is None or isinstance(size, int):
                        raise InputError(f"layer {one.index}: the length of its cache is not open")
                    self._dims[size] = past
        spelled = {one.layer.spelling for one in found.layers}
        if kv_counted.SPELLING in spelled and len(spelled) > 1:
            raise InputError("only some of its layers are GroupQueryAttention, which counts keys from the other end")
        self.grouped = kv_counted.SPELLING in spelled
        self.mask = self.tokens if self.grouped else self._covering(found.layers)
        self._sized = [node for node in self.model.graph if is_op(node, "Shape") and self._asks(node)]
        if self.grouped and self._sized:
            raise InputError(f"{match.describe(self._sized[0])} reads the length of a cache")
        counted = self._counted()
        self.groups = [
            Group(one, readers, next((why for why in (self._kept(r, one, counted) for r in readers) if why), None))
            for one in owners
            for readers in [(one, *(r for r in found.layers if r.owner == one.index and r is not one))]
        ]

    def apply(self, groups: Sequence[Group], window: int) -> tuple[str, list[tuple[Queries, ...]]]:
        """Let these caches, none of which has a refusal, be shorter than the text; the others keep every token.

        Args:
            groups: some of `self.groups`.
            window: how many of the last queries are given at most.

        Returns:
            The name of the input that tells how many slots of each cache hold nothing, or with GroupQueryAttention how
            many tokens it has lost, [groups, batch], and the outputs with the last queries of each.
        """
        model = self.model
        hidden = oir.Value(
            name=edit.unique_name(model, "cache_hidden"),
            type=oir.TensorType(oir.DataType.INT64),
            shape=oir.Shape([len(groups), _symbol(self.batch)]),
        )
        lossy.set_default(hidden, np.zeros((len(groups), 1), np.int64))
        model.graph.inputs.append(hidden)
        if self.grouped:
            counts = kv_counted.Writer(self, hidden)
            for row, group in enumerate(groups):
                counts.cut(group, row)
            last = counts.queries
        else:
            self._cut(groups, hidden)
            last = self._last
        queries = [
            tuple(self._queries(one.layer, one.index, last(one.layer, window)) for one in group.readers)
            for group in groups
        ]
        for row, group in enumerate(groups):
            self._declare(group, row)
        outputs, own = set(model.graph.outputs), self._symbols()
        for node in model.graph:
            for out in node.outputs:
                shape = self.facts.shape(out)
                if out not in outputs and (shape is None or any(_named(size) & own for size in shape)):
                    out.shape = None
        model.graph.sort()
        return str(hidden.name), queries

    def _symbols(self) -> set[str]:
        """The symbols that the lengths of the caches are made of, and nothing else."""
        return set().union(*map(_named, self._dims)) - _named(self.length) - _named(self.batch)

    def _cut(self, groups: Sequence[Group], hidden: oir.Value) -> None:
        writer = Writer(self, hidden)
        writer.anchor(self._sized)
        rows = {group.owner.index: row for row, group in enumerate(groups)}
        for group in self.groups:
            writer.cut(group, rows.get(group.owner.index))
        writer.end()

    def dims(self, node: oir.Node) -> list[Dim]:
        """The sizes that a Shape node gives."""
        shape = self.facts.shape(node.inputs[0]) or ()
        return list(shape)[self.first(node) : match.attribute(node, "end", len(shape))]

    def first(self, node: oir.Node) -> int:
        """The axis of the first size that a Shape node gives."""
        start: int = match.attribute(node, "start", 0)
        return max(start + len(self.facts.shape(node.inputs[0]) or ()), 0) if start < 0 else start

    def is_past(self, size: Dim) -> bool | None:
        """Whether a size is the length of the caches before a call, or (False) behind it; None for another."""
        return self._dims.get(size)

    def _asks(self, node: oir.Node) -> bool:
        if self.facts.shape(node.inputs[0]) is None:
            raise InputError(f"the shape that {match.describe(node)} gives is not known")
        return any(size in self._dims for size in self.dims(node))

    def _no_cache(self, one: KeyLayer, inside: Collection[oir.Node]) -> str | None:
        """Why a layer has no cache of its own whose length can be told, in plain words; None when it has."""
        layer, ports = one.layer, [port for _, port in one.ports]
        if layer.spelling not in _SPELLED:
            return f"its attention is a {layer.spelling}"
        if layer.cache.kind != "kv" or layer.cache.form != "append" or len(ports) != 2:
            return f"its cache is of the kind `{layer.cache.kind}`"
        if any(port.index or (port.past_axes, port.present_axes) != (_PAST, _TOTAL) for port in ports):
            return "its cache is packed with others, or not laid out as [batch, heads, tokens, size]"
        own = {*layer.nodes, layer.anchor}
        for value, readers in [(one, own) for one in layer.cache.past] + [(one, inside) for one in layer.cache.present]:
            other = next((node for node in match.readers(value) if node not in readers), None)
            if other is not None:
                return f"{match.describe(other)} reads its cache `{value.name}` too"
        if match.attribute(layer.anchor, "unidirectional", 0):
            return "`unidirectional` counts from the first key"
        return None

    def _covering(self, layers: Sequence[KeyLayer]) -> oir.Value:
        """The input with the mask, whose last axis is that of past and new tokens."""
        pending = [value for one in layers for mask in one.layer.mask for value in (*mask.values, mask.keep) if value]
        seen, found = set[oir.Value](), dict[oir.Value, None]()
        while pending:
            value = pending.pop()
            node = value.producer()
            if value not in seen and node is not None:
                pending += [one for one in node.inputs if one is not None]
            elif value not in seen and value.is_graph_input() and value.const_value is None:
                shape = self.facts.shape(value) or ()
                covers = len(shape) in (2, 4) and shape[-1] not in (self.length, *self._dims_of_past())
                if covers and not isinstance(shape[-1], int):
                    found[value] = None
            seen.add(value)
        if len(found) != 1:
            raise InputError(
                "no input with a mask tells how many tokens there are besides the caches, so positions would count "
                "those that are kept only",
                hint="export the model with a mask of past and new tokens",
            )
        return next(iter(found))

    def _dims_of_past(self) -> list[Dim]:
        return [size for size, past in self._dims.items() if past]

    def _counted(self) -> set[oir.Value]:
        """What is computed of the lengths of caches or of the mask, and not of tokens."""
        stream, found = {self.tokens}, {self.mask, *(out for node in self._sized for out in node.outputs)}
        for node in self.model.graph:
            if is_op(node, "Shape", "Size") and node not in self._sized:
                found.update(node.outputs if any(value in found for value in node.inputs) else ())
            elif any(value in stream for value in node.inputs) and not is_op(node, "Shape", "Size"):
                stream.update(node.outputs)
            elif any(value in found for value in node.inputs):
                found.update(node.outputs)
        return found

    def _kept(self, one: KeyLayer, owner: KeyLayer, counted: set[oir.Value]) -> str | None:
        """Why what a layer reads has to be every token, in plain words; None when it need not."""
        layer = one.layer
        if layer.spelling not in _SPELLED:
            return f"the attention of layer {one.index} is a {layer.spelling}"
        if layer.window is not None:
            return f"layer {one.index} sees a window of {layer.window} keys"
        if not layer.causal:
            return f"it is not proven that no token of layer {one.index} sees a later one"
        if any(port.past is None or not _is_float(port.past) for _, port in owner.ports):
            return "its cache is not of floating-point numbers"
        if self.grouped:
            return kv_counted.obstacle(self, layer)
        if _place(self, layer) is None:
            return f"the queries of layer {one.index} are laid out in an unknown way"
        masks = {value for value, _ in self.masks(layer)}
        if not masks:
            return f"layer {one.index} has no mask"
        if any(not self._hides(mask) for mask in layer.mask):
            return f"the mask of layer {one.index} may add more than it hides, as a bias by distance does"
        for node in (*layer.nodes, layer.anchor):
            for index, value in enumerate(node.inputs):
                if value is None or value not in counted or value in masks or is_op(node, "Shape"):
                    continue
                if index == 1 and self.stretch(node) is not None:
                    continue
                shape = self.facts.shape(value)
                if index >= sizes_of(node) or shape is None or any(size in self._dims for size in shape):
                    return f"{match.describe(node)} of layer {one.index} reads the length of all caches"
        return None

    def stretch(self, node: oir.Node) -> list[int] | None:
        """What an Expand repeats along each axis, where that is told without the sizes that stay."""
        before, after = (self.facts.shape(value) for value in (node.inputs[0], node.outputs[0]))
        if not is_op(node, "Expand") or before is None or after is None or len(before) != len(after):
            return None
        sizes = [1 if old == new else new for old, new in zip(before, after, strict=True)]
        numbers = [size for size in sizes if isinstance(size, int)]
        return numbers if len(numbers) == len(sizes) else None

    def _hides(self, mask: Mask) -> bool:
        """Whether a mask leaves the scores of what it does not hide alone."""
        bands = Bands(self.facts)
        runs = [run for value in mask.values for run in bands.of(value) if run.high > HIDDEN]
        return all(run.low == run.high == 0 for run in runs)

    def masks(self, layer: AttentionLayer) -> list[tuple[oir.Value, str]]:
        """The masks of a layer that have an axis of keys: "added", "kept" or, where true hides, "hidden"."""
        found = [(value, "added") for mask in layer.mask for value in mask.values]
        found += [(m.keep, "hidden" if m.inverted else "kept") for m in layer.mask if m.keep is not None]
        shapes = [(self.facts.shape(value), value, kind) for value, kind in found]
        return [(v, kind) for shape, v, kind in shapes if shape is not None and 2 <= len(shape) <= 4 and shape[-1] != 1]

    def _last(self, layer: AttentionLayer, window: int) -> oir.Value:
        """The last queries of a layer, [batch, heads, queries, size]."""
        model = self.model
        query, place = layer.product.inputs[0], _place(self, layer)
        assert query is not None and place is not None
        spans = [edit.add_constant(model, f"queries_{n}", np.array([n], np.int64)) for n in (-window, _FAR, place)]
        nodes = [edit.make("Slice", [query, *spans], like=layer.product)]
        if place == 1:
            sizes = edit.add_constant(model, "queries_heads", np.array([0, 0, layer.heads, layer.head_size], np.int64))
            nodes.append(edit.make("Reshape", [nodes[-1].outputs[0], sizes], like=layer.product))
            nodes.append(edit.make("Transpose", [nodes[-1].outputs[0]], {"perm": [0, 2, 1, 3]}, like=layer.product))
        edit.insert_behind(query, nodes)
        return nodes[-1].outputs[0]

    def _queries(self, layer: AttentionLayer, index: int, out: oir.Value) -> Queries:
        query = layer.product.inputs[0]
        dtype = self.facts.dtype(query)
        assert query is not None and dtype is not None
        out.name = edit.unique_name(self.model, f"queries.{index}")
        out.type = oir.TensorType(dtype)
        out.shape = oir.Shape([_symbol(self.batch), layer.heads, "window", layer.head_size])
        self.model.graph.outputs.append(out)
        scale = layer.scale / layer.kept[1].scale
        for factor in layer.scales:
            scale /= factor.number if factor.node in _above(query, layer) else 1.0
        return Queries(str(out.name), scale, layer.softcap)

    def _declare(self, group: Group, row: int) -> None:
        """Give the caches a length of their own."""
        name, length = f"past_{row}", _symbol(self.length)
        for value, size in ((one, name) for one in group.past):
            self._set(value, size)
        for value in group.present:
            self._set(value, f"{name} + {length}")

    @staticmethod
    def _set(value: oir.Value, size: str) -> None:
        shape = list(value.shape or ())
        shape[2] = oir.SymbolicDim(size)
        value.shape = oir.Shape(shape)


_FAR = np.iinfo(np.int64).max


def _symbol(size: Dim) -> int | str:
    return size if isinstance(size, int) else str(size)


def _named(size: Dim) -> set[str]:
    """The symbols that a size is made of."""
    return set() if isinstance(size, int) else {atom for atoms, _ in size.terms for atom in atoms}


def _is_float(value: oir.Value) -> bool:
    return value.dtype is not None and value.dtype.is_floating_point()


def _place(cuts: Cuts, layer: AttentionLayer) -> int | None:
    """The axis of the tokens of the queries, [batch, heads, tokens, size] or [batch, tokens, heads * size]."""
    shape, h, d = cuts.facts.shape(layer.product.inputs[0]), layer.heads, layer.head_size
    if is_op(layer.anchor, "MultiHeadAttention", domain="com.microsoft") and match.input_of(layer.anchor, 3):
        return None  # a bias is added inside
    if shape is None or match.attribute(layer.product, "transA", 0):
        return None
    ways: dict[int, tuple[Dim, ...]] = {2: (cuts.batch, h, cuts.length, d), 1: (cuts.batch, cuts.length, h * d)}
    return next((axis for axis, way in ways.items() if tuple(shape) == way), None)


def _above(value: oir.Value, layer: AttentionLayer) -> set[oir.Node]:
    """The nodes of a layer that a value is made by."""
    own, found, pending = set(layer.nodes), set[oir.Node](), [value]
    while pending:
        node = pending.pop().producer()
        if node is not None and node in own and node not in found:
            found.add(node)
            pending += [one for one in node.inputs if one is not None]
    return found
