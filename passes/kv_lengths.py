"""Masks and tables of positions for past and new tokens together, of which the new ones take their rows.

A decoder without a cache computes masks and positions for as many tokens as it is given. With a cache it is given the
new ones only. What it computes of sizes, masks and counted positions alone is computed once more for all tokens, and
cut to the last rows, so whatever the mask is (causal, windows, biases by distance), it is the one that the model had.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as oir

from burnish.ir import edit, match
from burnish.ir.dims import Dim
from burnish.ir.errors import InputError
from burnish.ir.inference import Inference
from burnish.ir.walk import is_op

_SIZED = {"Reshape": 1, "Expand": 1, "Tile": 1, "Slice": 1, "Pad": 1, "Resize": 1}
"""Operators whose inputs from this one on are sizes, or places along axes."""


class Lengths:
    """What of a model depends on how many tokens there are, and not on which.

    Args:
        model: changed in place by `full` and `rows`: they add nodes at the start of the graph.
        facts: what is proven of it, before it was changed.
        tokens: the input with the tokens, [batch, tokens].
        masks: inputs of the same shape that will have the past tokens too.
    """

    def __init__(self, model: oir.Model, facts: Inference, tokens: oir.Value, masks: set[oir.Value]) -> None:
        self.model, self.facts, self.tokens, self.masks = model, facts, tokens, masks
        shape = facts.shape(tokens)
        assert shape is not None
        self.batch, self.length = shape
        self.stream: set[oir.Value] = {tokens}
        for node in model.graph:
            if not is_op(node, "Shape", "Size") and any(value in self.stream for value in node.inputs):
                self.stream.update(node.outputs)
        self._counted: dict[oir.Value, bool] = {}
        self._full: dict[oir.Value, oir.Value] = {}
        self._new: list[oir.Node] = []
        self._like = next(iter(model.graph))
        self._sizes: dict[str, oir.Value] = {}

    def begin(self, past: oir.Value, axis: int) -> None:
        """Count past tokens along an axis of an input."""
        node = self._like
        size = edit.make("Shape", [past], {"start": axis, "end": axis + 1}, like=node)
        own = edit.make("Shape", [self.tokens], {"start": 1, "end": 2}, like=node)
        rows = edit.make("Shape", [self.tokens], {"start": 0, "end": 1}, like=node)
        total = edit.make("Add", [size.outputs[0], own.outputs[0]], like=node)
        self._new += [size, own, rows, total]
        self._sizes = {"past": size.outputs[0], "batch": rows.outputs[0], "total": total.outputs[0]}

    def end(self) -> None:
        """Put the nodes that were made into the graph, as far as something reads them."""
        edit.insert_before(self._like, self._new)
        edit.remove_unused(reversed(self._new))

    def counted(self, value: oir.Value | None) -> bool:
        """Whether a value that is not of the stream depends on how many tokens there are, or on a mask."""
        if value is None or value in self.stream:
            return False
        if value not in self._counted:
            node = value.producer()
            self._counted[value] = False
            if node is None:
                found = value in self.masks
            elif is_op(node, "Shape"):
                found = self.length in self._asked(node)
            elif is_op(node, "Size"):
                found = True
            else:
                found = any(self.counted(one) for one in node.inputs)
            self._counted[value] = found
        return self._counted[value]

    def given(self, value: oir.Value | None) -> bool:
        """Whether a value is made of the numbers of an input that is neither the tokens nor a mask."""
        if value is None or value in self.stream:
            return False
        node = value.producer()
        if node is None:
            return value.is_graph_input() and value not in self.masks and value.const_value is None
        return not is_op(node, "Shape", "Size") and any(self.given(one) for one in node.inputs)

    def full(self, value: oir.Value) -> oir.Value:
        """The same for all tokens.

        Raises:
            InputError: it depends on tokens, or on something else that only the new ones have.
        """
        if not self.counted(value):
            return value
        if value not in self._full:
            self._full[value] = self._made(value)
        return self._full[value]

    def rows(self, value: oir.Value, axis: int) -> oir.Value:
        """The last ones along an axis of what `full` gives, those of the new tokens."""
        far = edit.add_constant(self.model, f"{value.name}_end", np.array([np.iinfo(np.int64).max]))
        where = edit.add_constant(self.model, f"{value.name}_axis", np.array([axis]))
        whole = self.full(value)
        part = edit.make("Slice", [whole, self._sizes["past"], far, where], like=self._like)
        part.outputs[0].type = value.type
        self._new.append(part)
        return part.outputs[0]

    def _asked(self, node: oir.Node) -> list[Dim]:
        """The sizes that a Shape node gives."""
        shape = self.facts.shape(node.inputs[0])
        if shape is None:
            raise InputError(f"the shape that {match.describe(node)} gives is not known")
        begin, stop = match.attribute(node, "start", 0), match.attribute(node, "end", len(shape))
        return list(shape)[begin:stop]

    def _made(self, value: oir.Value) -> oir.Value:
        if value in self.masks:
            return value
        node = value.producer()
        if node is None or self.given(value):
            raise InputError("it depends on numbers that are given for the new tokens only")
        if is_op(node, "Shape"):
            return self._shape(node)
        for one in node.inputs:
            if one is not None and one in self.stream:
                raise InputError(f"{match.describe(node)} makes it of tokens")
        if is_op(node, "Size") or any(self._bodies(node)):
            raise InputError(f"{match.describe(node)} makes it")
        values = {one: self.full(one) for one in node.inputs if one is not None}
        copy = edit.copied(node, values)
        for out in copy.outputs:
            out.shape = None
        self._new.append(copy)
        for old, new in zip(node.outputs, copy.outputs, strict=True):
            self._full[old] = new
        return self._full[value]

    @staticmethod
    def _bodies(node: oir.Node) -> list[str]:
        return [name for name, one in node.attributes.items() if one.type == oir.AttributeType.GRAPH]

    def _shape(self, node: oir.Node) -> oir.Value:
        parts = []
        for size in self._asked(node):
            if size == self.length:
                parts.append(self._sizes["total"])
            elif size == self.batch:
                parts.append(self._sizes["batch"])
            elif isinstance(size, int):
                parts.append(edit.add_constant(self.model, f"{node.name}_size", np.array([size])))
            else:
                raise InputError(f"{match.describe(node)} gives the size {size}")
        if len(parts) == 1:
            return parts[0]
        joined = edit.make("Concat", parts, {"axis": 0}, like=node)
        self._new.append(joined)
        return joined.outputs[0]


def sizes_of(node: oir.Node) -> int:
    """From which input on a node reads sizes or places; beyond its inputs where it reads none."""
    return _SIZED.get(node.op_type, len(node.inputs)) if node.domain in ("", "ai.onnx") else len(node.inputs)
