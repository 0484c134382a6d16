"""Fewer heads of keys and values in the graph: projections, caches, and how heads are repeated for the queries."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

import numpy as np
import onnx_ir as oir

from burnish.ir import edit, match
from burnish.ir.inference import Inference, Shape
from burnish.ir.views import projection
from burnish.ir.views.attention_layer import AttentionLayer, Heads
from burnish.ir.views.heads import GROUP, REPEAT, Axes
from burnish.ir.walk import is_op
from burnish.passes import kv_operators, lossy
from burnish.passes.depth_blocks import BLOCKS
from burnish.passes.kv_families import CONTRIB, LAYOUTS, Family, native, plain, rebuilt, start_of
from burnish.passes.kv_heads import Merge, Pooled
from burnish.passes.kv_layers import KeyLayer, KeyLayers

HEADS = "burnish.kv_heads"
"""Key of the model's metadata: a JSON object that gives, for each block whose heads of keys and values became fewer,
how many they are, by the number that the block had in the original model, from 0."""


def pool(found: KeyLayers, wanted: Iterable[tuple[Family, int, Pooled]], *, settled: bool = True) -> None:
    """Give layers, and those that read their keys and values, fewer heads of these.

    Args:
        found: the layers of the model, which is changed in place; out of date afterwards.
        wanted: layers for which `kv_families.obstacle` has no reason, how many heads of keys and values they have then,
            and the new weights of each layer of the family.
        settled: infer the shapes of what has changed; else they are not known.
    """
    counts: dict[int, int] = {}
    for family, groups, new in wanted:
        work = _Pooling(found, family, groups)
        work.weights(new.heads)
        work.ports((new.keys, new.values))
        work.ways()
        work.forget()
        counts[family.readers[0].block.index] = groups
    _note(found.model, counts)
    if settled:
        settle(found.model)


def _note(model: oir.Model, counts: Mapping[int, int]) -> None:
    """Say how many heads blocks have, by the numbers that they have now."""
    blocks = json.loads(model.metadata_props.get(BLOCKS, "null"))
    known: dict[str, int] = json.loads(model.metadata_props.get(HEADS, "{}"))
    known |= {str(blocks[block] if blocks else block): count for block, count in counts.items()}
    ordered = {key: known[key] for key in sorted(known, key=int)}
    model.metadata_props[HEADS] = json.dumps(ordered, separators=(",", ":"))


def settle(model: oir.Model) -> None:
    """Infer the shapes that are not known."""
    facts, declared = Inference(model), [(value, value.shape) for value in model.graph.outputs]
    for node in model.graph:
        if any(out.shape is None and out.name != "" for out in node.outputs):
            facts.follow(node)
    for value, shape in declared:
        value.shape = shape


class _Pooling:
    """The steps; `swapped` tells what stands in the place of a value that is gone."""

    def __init__(self, found: KeyLayers, family: Family, groups: int) -> None:
        self.model, self.family, self.groups = found.model, family, groups
        self.layer, self.facts = family.layer, found.facts
        self.swapped: dict[oir.Value, oir.Value] = {}
        self.repeats: dict[oir.Value, oir.Value] = {}
        self.done: set[oir.Node] = set()
        self.starts = [len(path) - 1 for path in self.layer.paths]
        self.made: list[oir.Value] = []

    def weights(self, heads: Sequence[Heads]) -> None:
        """Write all weights."""
        own = heads[0]
        biased = is_op(self.layer.anchor, "MultiHeadAttention", domain=CONTRIB)
        for one, new in zip(self.family.readers, heads, strict=True):
            q, _, _, o = one.layer.projections
            changes = [(o, new.output, new.output_bias)]
            if not (one is self.family.readers[0] and kv_operators.shares_matrix(one.layer)):
                changes.append((q, new.query, new.query_bias))
            projection.write(self.model, changes)
        sources = (self.layer.memory, self.layer.value_memory)
        parts = ((own.key, own.key_bias, "keys"), (own.value, own.value_bias, "values"))
        for index, (weight, bias, name) in enumerate(parts):
            source = sources[index]
            assert weight is not None and source is not None
            self._made(index, source, weight, bias, name)
        if kv_operators.shares_matrix(self.layer):
            kv_operators.narrowed(self.model, self.layer, own.query, own.query_bias)
        if biased:
            kv_operators.queries_biased(self.model, self.layer)

    def _made(self, index: int, source: oir.Value, weight: np.ndarray, bias: np.ndarray | None, name: str) -> None:
        """Let keys (0) or values (1) be made with new weights."""
        path, projected = self.layer.paths[index], self.layer.projections[index + 1]
        assert projected is not None and projected.linear is not None
        if not rebuilt(self.layer):
            old = projected.linear.output
            flat = None if bias is None else bias.reshape(-1)
            new = projected.linear.write(self.model, weight.reshape(-1, weight.shape[-1]), flat)
            self.swapped[old] = new.output
            self.made += [node.outputs[0] for node in new.nodes]
            return
        start = start_of(self.layer, path)
        if start is None:
            nodes = kv_operators.matrix(self.model, projected, source, (weight, bias), name, LAYOUTS[0])
            edit.insert_before(self.layer.anchor, nodes)
            edit.set_input(self.layer.anchor, index + 1, nodes[-1].outputs[0])
        else:
            value, axes = path[start]
            nodes = kv_operators.matrix(self.model, projected, source, (weight, bias), name, plain(axes))
            edit.insert_behind(value, nodes)
            edit.replace_value(value, nodes[-1].outputs[0])
            edit.remove_unused([one for one in (value.producer(),) if one is not None])
            self.swapped[value], self.starts[index] = nodes[-1].outputs[0], start
        self.made.append(nodes[0].outputs[0])

    def ports(self, merges: tuple[Merge, Merge]) -> None:
        """Declare the sizes of the caches, and how they differ from those of the original."""
        cache = self.layer.cache
        for port, merge in zip((cache.key, cache.value), merges, strict=True):
            if port is None:
                continue
            for value, names, matrix in (
                (port.past, port.past_axes, merge.join),
                (port.present, port.present_axes, merge.part),
            ):
                now = self.swapped.get(value, value) if value is not None else None
                if now is None or now.shape is None:
                    continue
                sizes = [
                    size * self.groups // self.layer.kv_heads if "heads" in name and isinstance(size, int) else size
                    for size, name in zip(now.shape, names, strict=True)
                ]
                now.shape = oir.Shape(sizes)
                axes = [names.index(name) for name in ("heads", "size") if name in names]
                if len(axes) == 2:
                    lossy.set_mixed(now, axes, matrix)
                else:
                    flat = matrix.reshape(matrix.shape[0] * matrix.shape[1], -1)
                    lossy.set_mixed(now, [names.index("heads*size")], flat)

    def ways(self) -> None:
        """Change what lies between the linear layers and the products."""
        first = self.family.readers[0]
        for index in (0, 1):
            if start_of(self.layer, self.layer.paths[index]) is not None:
                self._follow(first, index, self.starts[index])
        joined = self._joined() if self.family.inside else None
        for one in self.family.readers:
            if joined is not None and (one is not first or not native(one.layer)):
                kv_operators.read(self.model, replace(one.layer, kv_heads=self.groups), *joined)
            elif one is not first:
                for index, kept in enumerate((first.keys, first.values)):
                    places = [value for value, _ in one.layer.paths[index]]
                    self._follow(one, index, places.index(kept.value))  # type: ignore[arg-type]
            if native(one.layer) and "kv_num_heads" in one.layer.anchor.attributes:
                one.layer.anchor.attributes["kv_num_heads"] = oir.AttrInt64("kv_num_heads", self.groups)

    def _follow(self, one: KeyLayer, index: int, first: int) -> None:
        """Change the nodes on the path of keys (0) or values (1) from a place on; repeat heads where nothing does."""
        path, kept = one.layer.paths[index], one.layer.kept[index + 1]
        repeated = any(GROUP in letters for _, axes in path for letters in axes)
        places = [value for value, _ in path]
        ends = places.index(kept.value) if kept.value in places else -1
        lacks = not repeated and not native(one.layer) and not kept.inside
        alone = [i for i in range(ends + 1) if "h" in path[i][1]]
        wide = [i for i in range(ends + 1) if path[i][1][-1] in ("hd", "he")]
        chosen = (alone or wide or [-1])[-1] if lacks else -1
        for i in range(first, -1, -1):
            value, axes = path[i]
            value = self.swapped.get(value, value)
            if i < first:
                self._node(one.layer, value, axes, repeated)
            if i == chosen:
                self._repeat(value, axes, self.facts.shape(path[i][0]) or ())
                return

    def _share(self, letters: str, repeated: bool) -> tuple[int, int]:
        """By what an axis of these letters is multiplied, and divided."""
        times = letters.count(GROUP) + (0 if repeated else letters.count("h")), letters.count(REPEAT)
        few, many = self.groups, self.layer.kv_heads
        return (few ** times[0] * many ** times[1], many ** times[0] * few ** times[1])

    def _node(self, layer: AttentionLayer, value: oir.Value, axes: Axes, repeated: bool) -> None:
        node = value.producer()
        assert node is not None
        shares = [self._share(letters, repeated) for letters in axes]
        turned = layer.key_rotary
        if turned is not None and value is turned.y is not turned.x:
            for one in turned.nodes:
                if is_op(one, "Reshape"):
                    self._reshaped(one, shares[:-1])
            head = turned.operator
            if head is not None and match.attribute(head, "num_heads", 0):
                head.attributes["num_heads"] = oir.AttrInt64("num_heads", self.groups)
        elif node in self.done:
            return
        elif is_op(node, "Reshape"):
            self._reshaped(node, shares)
        elif is_op(node, "Expand"):
            ones = [self._times() if letters == REPEAT else 1 for letters in axes]
            edit.set_input(node, 1, self._numbers(node, "repeats", ones))
        elif is_op(node, "Tile"):
            times = [self._times() if letters == REPEAT else 1 for letters in axes]
            edit.set_input(node, 1, self._numbers(node, "repeats", times))
        elif is_op(node, "Gather") and "h" in axes:
            heads = np.repeat(np.arange(self.groups), self._times()).tolist()
            edit.set_input(node, 1, self._numbers(node, "heads", heads))
        self.done.add(node)

    def _times(self) -> int:
        return self.layer.heads // self.groups

    def _numbers(self, node: oir.Node, what: str, numbers: Sequence[int]) -> oir.Value:
        return edit.add_constant(self.model, f"{node.name}_{what}", np.array(numbers, np.int64))

    def _reshaped(self, node: oir.Node, shares: Sequence[tuple[int, int]]) -> None:
        """Let a Reshape give axes that are this much longer; the first ones, where there are more."""
        if node in self.done or all(up == down for up, down in shares):
            return
        self.done.add(node)
        given, shape = self.facts.numbers(match.input_of(node, 1)), self.facts.shape(node.outputs[0])
        assert shape is not None
        if given is not None:
            sizes = list(given)
            for i, (up, down) in enumerate(shares):
                sizes[i] = sizes[i] * up // down if sizes[i] > 0 else sizes[i]
            edit.set_input(node, 1, self._numbers(node, "sizes", sizes))
            return
        moved = [i for i, (up, down) in enumerate(shares) if up != down and isinstance(shape[i], int)]
        wanted = np.zeros(len(shape), np.int64)
        for i in moved:
            wanted[i] = int(shape[i]) * shares[i][0] // shares[i][1]  # type: ignore[arg-type]
        chosen = edit.add_constant(self.model, f"{node.name}_moved", np.isin(np.arange(len(shape)), moved))
        choice = edit.make("Where", [chosen, self._numbers(node, "sizes", wanted.tolist()), node.inputs[1]], like=node)
        edit.insert_before(node, [choice])
        edit.set_input(node, 1, choice.outputs[0])

    def _repeat(self, value: oir.Value, axes: Axes, shape: Shape) -> oir.Value:
        """Let the layers read each head of a value, of this shape before, as often as queries need it."""
        if value in self.repeats:
            return self.repeats[value]
        letters = next(one for one in axes if "h" in one)
        axis, times = axes.index(letters), self._times()
        size = self.layer.head_size if "d" in letters else self.layer.value_size if "e" in letters else 1
        like = value.producer() or self.layer.anchor
        split = [0] * axis + [self.groups, 1, size] if len(letters) > 1 else None
        behind = [one if isinstance(one, int) else -1 for one in shape[axis + 1 :]]
        nodes = []
        if split is not None:
            nodes.append(edit.make("Reshape", [value, self._numbers(like, "split", split)], like=like))
        else:
            nodes.append(edit.make("Unsqueeze", [value, self._numbers(like, "axis", [axis + 1])], like=like))
        wide = [1] * (axis + 1) + [times] + [1] * (1 if split is not None else len(axes) - axis - 1)
        nodes.append(edit.make("Expand", [nodes[-1].outputs[0], self._numbers(like, "repeats", wide)], like=like))
        whole = [0] * axis + [self.groups * times * size, *behind]
        nodes.append(edit.make("Reshape", [nodes[-1].outputs[0], self._numbers(like, "whole", whole)], like=like))
        own = {node for one in self.family.readers for node in (*one.layer.nodes, one.layer.anchor)}
        uses = [use for use in value.uses() if use.node in own]
        edit.insert_behind(value, nodes)
        new = nodes[-1].outputs[0]
        for use in uses:
            use.node.replace_input_with(use.idx, new)
        self.repeats[value] = new
        return new

    def _joined(self) -> tuple[oir.Value, oir.Value]:
        """The keys and values, old and new, that an operator has inside, for layers that read them."""
        node, found = self.layer.anchor, []
        for index, kept in enumerate((self.family.readers[0].keys, self.family.readers[0].values)):
            if native(self.layer):
                assert kept.value is not None
                found.append(kept.value)
                continue
            new, past = node.inputs[index + 1], match.input_of(node, index + 6)
            assert new is not None
            nodes: list[oir.Node] = []
            if len(self.layer.paths[index][0][1]) == 3:
                size = (self.layer.head_size, self.layer.value_size)[index]
                sizes = self._numbers(node, "heads", [0, 0, self.groups, size])
                nodes.append(edit.make("Reshape", [new, sizes], like=node))
                nodes.append(edit.make("Transpose", [nodes[-1].outputs[0]], {"perm": [0, 2, 1, 3]}, like=node))
                new = nodes[-1].outputs[0]
            if past is not None:
                nodes.append(edit.make("Concat", [past, new], {"axis": 2}, like=node))
                new = nodes[-1].outputs[0]
            edit.insert_before(node, nodes)
            if kept.value is not None:
                edit.replace_value(kept.value, new)
            letters = ("b", "h", "t", "de"[index])
            shape = self.facts.shape(kept.value) or self.facts.shape(node.inputs[index + 1]) or ()
            found.append(self._repeat(new, letters, shape))
        return found[0], found[1]

    def forget(self) -> None:
        """Forget the shapes of what may have another one."""
        ends = {one.layer.projections[3].holder for one in self.family.readers}
        ends |= {one.layer.product for one in self.family.readers} - {self.layer.anchor}
        seen: set[oir.Node] = set()
        pending = [node for value in self.made for node in (value.producer(), *match.consumers(value)) if node]
        while pending:
            node = pending.pop()
            if node in seen or node in ends or is_op(node, "Shape", "Size"):
                continue
            seen.add(node)
            pending += [user for out in node.outputs for user in match.consumers(out)]
            for out in node.outputs:
                out.shape = out.shape if out.is_graph_output() else None
