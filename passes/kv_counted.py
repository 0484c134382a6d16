"""com.microsoft GroupQueryAttention whose caches have different lengths: each layer counts its own keys.

The operator counts keys from the start of a cache and tells positions by the same count. So a layer whose cache has
lost tokens is told fewer keys, and the positions, which stay those of the text, in an input of their own. ONNX Runtime
1.32 computes with these what it computes without, where nothing is lost; the tests of `budget-kv` hold it to that.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import onnx_ir as oir

from burnish.ir import edit, match
from burnish.ir.views.attention_layer import AttentionLayer
from burnish.passes import kv_operators

if TYPE_CHECKING:
    from burnish.passes.kv_cuts import Cuts, Group

SPELLING = "com.microsoft:GroupQueryAttention"
_CONTRIB = "com.microsoft"
_LENGTHS, _TOTAL, _COS, _SIN, _POSITIONS, _BIAS = 5, 6, 7, 8, 9, 10
_FAR = np.iinfo(np.int64).max


def obstacle(cuts: Cuts, layer: AttentionLayer) -> str | None:
    """Why a layer cannot count keys of its own, in plain words; None when it can."""
    node = layer.anchor
    reason = kv_operators.obstacle(layer)
    if reason is not None:
        return reason
    if match.input_of(node, _BIAS) is not None:
        return "a bias is added to its scores"
    counts, total = (cuts.facts.shape(match.input_of(node, index)) for index in (_LENGTHS, _TOTAL))
    if counts is None or len(counts) != 1 or total is None or len(total) > 1:
        return "its counts of keys are laid out in an unknown way"
    tables = cuts.facts.shape(match.input_of(node, _COS))
    if match.attribute(node, "do_rotary", 0) and (tables is None or tables[-1] != layer.head_size // 2):
        return "it turns a part of each head only"
    if cuts.facts.shape(node.inputs[0]) != (cuts.batch, cuts.length, _width(layer)):
        return "its queries are laid out in an unknown way"
    return None


def _width(layer: AttentionLayer) -> int:
    packed = match.input_of(layer.anchor, 1) is None
    return layer.head_size * (layer.heads + (2 * layer.kv_heads if packed else 0))


class Writer:
    """Rewrites the layers of a decoder.

    Args:
        cuts: the decoder.
        hidden: the input that tells how many tokens each cache has lost, [caches, batch].
    """

    def __init__(self, cuts: Cuts, hidden: oir.Value) -> None:
        self._model, self._cuts, self._hidden = cuts.model, cuts, hidden
        self._new: list[oir.Node] = []
        self._like = next(iter(cuts.model.graph))
        self._places: dict[oir.Value, oir.Value] = {}

    def cut(self, group: Group, row: int) -> None:
        """Let the layers of a group count the keys that their cache has."""
        for one in group.readers:
            node = one.layer.anchor
            counts, total = node.inputs[_LENGTHS], node.inputs[_TOTAL]
            assert counts is not None and total is not None
            self._like = node
            self.positions(node)
            lost = self._add("Gather", [self._hidden, self._number(row)], axis=0)
            own = self._add("Sub", [counts, self._add("Cast", [lost], to=oir.DataType.INT32.value)])
            most = self._add("ReduceMax", [own], keepdims=0)
            whole = self._add("Add", [most, edit.add_constant(self._model, "cut", np.array(1, np.int32))])
            if len(self._cuts.facts.shape(total) or ()):
                whole = self._add("Unsqueeze", [whole, self._number([0])])
            edit.insert_before(node, self._new)
            self._new = []
            edit.set_input(node, _LENGTHS, own)
            edit.set_input(node, _TOTAL, whole)

    def positions(self, node: oir.Node) -> oir.Value | None:
        """The positions of the new tokens, [batch, tokens], told to the operator; None where it turns nothing."""
        given = match.input_of(node, _POSITIONS)
        if given is not None or not match.attribute(node, "do_rotary", 0):
            return given
        counts = node.inputs[_LENGTHS]
        assert counts is not None
        if counts not in self._places:
            before, self._new = self._new, []
            wide = self._add("Cast", [counts], to=oir.DataType.INT64.value)
            length = self._add("Squeeze", [self._add("Shape", [self._cuts.tokens], start=1, end=2)])
            one, zero = self._number(1), self._number(0)
            # A row with padding behind its first tokens counts fewer keys than there are tokens.
            start = self._add("Max", [self._add("Sub", [wide, self._add("Sub", [length, one])]), zero])
            steps = self._add("Range", [zero, length, one])
            self._places[counts] = self._add("Add", [self._add("Unsqueeze", [start, self._number([1])]), steps])
            edit.insert_behind(counts, self._new)
            self._new = before
        edit.set_input(node, _POSITIONS, self._places[counts])
        return self._places[counts]

    def queries(self, layer: AttentionLayer, window: int) -> oir.Value:
        """The last queries, turned, [batch, heads, queries, size]; behind `cut`."""
        node = self._like = layer.anchor
        query, places = node.inputs[0], match.input_of(node, _POSITIONS)
        assert query is not None
        last, end = self._number([-window]), self._number([_FAR])
        query = self._add("Slice", [query, last, end, self._number([1])])
        if match.input_of(node, 1) is None:
            sizes = [self._number([one]) for one in (0, layer.heads * layer.head_size, 2)]
            query = self._add("Slice", [query, *sizes])
        if match.attribute(node, "do_rotary", 0):
            cos, sin = node.inputs[_COS], node.inputs[_SIN]
            assert places is not None and cos is not None and sin is not None
            places = self._add("Slice", [places, last, end, self._number([1])])
            attributes = {
                "interleaved": match.attribute(node, "rotary_interleaved", 0),
                "num_heads": layer.heads,
            }
            turn = edit.make("RotaryEmbedding", [query, places, cos, sin], attributes, like=node, domain=_CONTRIB)
            self._new.append(turn)
            query = turn.outputs[0]
        query = self._add("Reshape", [query, self._number([0, 0, layer.heads, layer.head_size])])
        query = self._add("Transpose", [query], perm=[0, 2, 1, 3])
        edit.insert_before(node, self._new)
        self._new = []
        return query

    def _number(self, value: int | list[int]) -> oir.Value:
        return edit.add_constant(self._model, "cut", np.array(value, np.int64))

    def _add(self, op: str, inputs: list[oir.Value], **attributes: int | list[int]) -> oir.Value:
        self._new.append(edit.make(op, inputs, attributes, like=self._like))
        return self._new[-1].outputs[0]
