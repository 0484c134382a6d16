"""Parts of masks that belong to caches of different lengths, and lengths that are those of the text."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import numpy as np
import onnx_ir as oir

from burnish.ir import edit

if TYPE_CHECKING:
    from burnish.passes.kv_cuts import Cuts, Group


_LOW = {oir.DataType.FLOAT16: -6e4}
"""Added to the scores of slots that hold nothing, where it is another number than -1e30."""


class Writer:
    """Adds what computes lengths at the start of the graph, and what cuts masks behind these."""

    def __init__(self, cuts: Cuts, hidden: oir.Value) -> None:
        self._cuts, self._model, self._hidden = cuts, cuts.model, hidden
        self._like = next(iter(cuts.model.graph))
        self._made: dict[tuple[int, oir.Value], oir.Value] = {}
        self._new: list[oir.Node] = []
        axis = len(cuts.facts.shape(cuts.mask) or ()) - 1
        self._length = self._size(cuts.tokens, 1)
        self._total = self._size(cuts.mask, axis)
        self._past = self._add("Sub", [self._total, self._length])

    def anchor(self, sized: Iterable[oir.Node]) -> None:
        """Let what reads the length of caches read that of the text."""
        for node in sized:
            first, parts = self._cuts.first(node), list[oir.Value]()
            for axis, size in enumerate(self._cuts.dims(node), first):
                past = self._cuts.is_past(size)
                source = node.inputs[0]
                assert source is not None
                parts.append(self._size(source, axis) if past is None else self._past if past else self._total)
            new = parts[0] if len(parts) == 1 else self._add("Concat", parts, axis=0)
            node.outputs[0].replace_all_uses_with(new)
        edit.insert_before(self._like, self._new)
        edit.remove_unused(sized)
        self._new = []

    def end(self) -> None:
        """Remove what nothing reads."""
        edit.remove_unused([node for node in (self._past.producer(),) if node is not None])

    def cut(self, group: Group, row: int | None) -> None:
        """Let the layers of a group read the part of their masks that belongs to its cache."""
        for one in group.readers:
            for node in one.layer.nodes:
                sizes = self._cuts.stretch(node)
                if sizes is not None:
                    edit.set_input(node, 1, self._number(sizes))
            for value, kind in self._cuts.masks(one.layer):
                key = (group.owner.index, value)
                if key not in self._made:
                    self._made[key] = self._part(group, value, kind, row)
                for node in (*one.layer.nodes, one.layer.anchor):
                    for index, read in enumerate(node.inputs):
                        if read is value:
                            node.replace_input_with(index, self._made[key])

    def _part(self, group: Group, value: oir.Value, kind: str, row: int | None) -> oir.Value:
        rank, dtype = len(self._cuts.facts.shape(value) or ()), self._cuts.facts.dtype(value)
        assert dtype is not None
        own = self._add("Add", [self._size(group.past[0], 2), self._length])
        zero, one = self._number(0), self._number(1)
        slots = self._add("Range", [zero, self._add("Squeeze", [own]), one])
        places = self._add("Add", [slots, self._add("Sub", [self._total, own])])
        found = self._add("Gather", [value, places], axis=rank - 1)
        if row is not None:
            first = self._add("Gather", [self._hidden, self._number(row)], axis=0)
            first = self._add("Unsqueeze", [first, self._number([1, 2, 3])])
            empty = self._add("Less", [slots, first])
            if kind == "added":
                low = edit.add_rounded(self._model, "hidden", np.array(_LOW.get(dtype, -1e30)), dtype)
                found = self._add("Where", [empty, low, found])
            elif kind == "kept":
                found = self._add("And", [found, self._add("Not", [empty])])
            else:
                found = self._add("Or", [found, empty])
        found.type = oir.TensorType(dtype)
        edit.insert_behind(value, self._new)
        self._new = []
        return found

    def _size(self, value: oir.Value, axis: int) -> oir.Value:
        return self._add("Shape", [value], start=axis, end=axis + 1)

    def _number(self, value: int | list[int]) -> oir.Value:
        return edit.add_constant(self._model, "cut", np.array(value, np.int64))

    def _add(self, op: str, inputs: list[oir.Value], **attributes: int) -> oir.Value:
        self._new.append(edit.make(op, inputs, attributes, like=self._like))
        return self._new[-1].outputs[0]
