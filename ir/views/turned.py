"""Rotary embedding of queries or keys in any order of axes, of a whole head or a part of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import onnx_ir as oir

from burnish.ir import match
from burnish.ir.inference import Inference
from burnish.ir.views.heads import Axes, Walk
from burnish.ir.views.rotary import Rotary, read_rotary
from burnish.ir.walk import is_op, walk

if TYPE_CHECKING:
    from burnish.ir.dims import Dim


_OPERATORS = ("RotaryEmbedding", "GroupQueryAttention")


@dataclass(frozen=True)
class Turned:
    """Queries or keys that rotary embedding was applied to.

    Attributes:
        x, y: before and after.
        cos, sin: the tables, as the arithmetic reads them; caches of one row a position where `position` is given.
        position: which row of the tables each position takes; None where the tables are in order already.
        dims: how many elements of a head are turned.
        interleaved: pairs lie side by side.
        start: the first of the elements that are turned.
        nodes: the nodes from `x` to `y`.
    """

    x: oir.Value
    y: oir.Value
    cos: oir.Value
    sin: oir.Value
    position: oir.Value | None
    dims: int
    interleaved: bool
    start: int
    nodes: tuple[oir.Node, ...]

    @property
    def operator(self) -> oir.Node | None:
        """The operator that does it; None when it is spelled out."""
        return next((node for node in self.nodes if node.op_type in _OPERATORS), None)


class Turns:
    """The rotary embeddings of a model by their results."""

    def __init__(self, model: oir.Model, facts: Inference) -> None:
        self.facts = facts
        self._found: dict[oir.Value, Turned] = {}
        for node in walk(model):
            if is_op(node, "Neg", "Sub"):
                rotary = read_rotary(node, facts)
                if isinstance(rotary, Rotary):
                    self._enter(rotary)
            elif is_op(node, "RotaryEmbedding") or is_op(node, "RotaryEmbedding", domain="com.microsoft"):
                self._operator(node)

    def at(self, value: oir.Value) -> Turned | None:
        """The rotary embedding whose result is `value`."""
        return self._found.get(value)

    def axes(self, turned: Turned, axes: Axes, walk: Walk) -> Axes | None:
        """The axes before, when they are known to fit: what is turned is the elements of heads, by position."""
        before, after = self.facts.shape(turned.x), self.facts.shape(turned.y)
        if before is None or after is None or before != after:
            return None
        last = walk._plain(axes[-1])
        if turned.operator is not None:
            return axes if last in (walk._plain("d"), walk._plain("hd"), walk._plain("gd")) else None
        if last != walk._plain("d"):
            return None
        for table in (turned.cos, turned.sin):
            shape = self.facts.shape(table)
            if shape is None or len(shape) > len(axes):
                return None
            for letters, size in zip(axes[len(axes) - len(shape) : -1], shape[:-1], strict=True):
                if size != 1 and set(walk._plain(letters)) & set("hgrde"):
                    return None
        return axes

    def _enter(self, found: Rotary) -> None:
        whole = self.facts.shape(found.x)
        if whole is None or not isinstance(whole[-1], int):
            return
        width = whole[-1] if found.whole else whole[-1] // 2
        for table in (found.cos, found.sin):
            shape = self.facts.shape(table)
            if not shape or shape[-1] != width:
                return
        turned = Turned(found.x, found.y, found.cos, found.sin, None, whole[-1], found.interleaved, 0, found.nodes)
        self._found[found.y] = turned
        self._partial(turned)

    def _partial(self, turned: Turned) -> None:
        """Enter the tensor in which the turned elements are joined with those of the same heads that stay."""
        from burnish.ir.views.trail import section

        concat = match.sole_reader(turned.y, "Concat")
        if concat is None or len(concat.inputs) != 2:
            return
        rank = len(self.facts.shape(turned.y) or ())
        if match.attribute(concat, "axis", 0) % rank != rank - 1:
            return
        place = list(concat.inputs).index(turned.y)
        parts: list[tuple[oir.Node, oir.Value, int, Dim]] = []
        for value in (turned.x, concat.inputs[1 - place]):
            node = match.producer(value, "Split", "Slice")
            found = section(node, value, self.facts) if node is not None and value is not None else None
            if node is None or found is None or node.inputs[0] is None or found[0] != rank - 1:
                return
            parts.append((node, node.inputs[0], found[1], found[2]))
        (taker, source, start, size), (keeper, other, rest, left) = parts
        whole = self.facts.shape(source)
        if other is not source or whole is None or not isinstance(size, int) or not isinstance(left, int):
            return
        if whole[-1] != size + left or (start, rest) != ((0, size) if place == 0 else (left, 0)):
            return
        nodes = tuple(dict.fromkeys((taker, keeper, *turned.nodes, concat)))
        joined = concat.outputs[0]
        self._found[joined] = Turned(
            source, joined, turned.cos, turned.sin, turned.position, size, turned.interleaved, start, nodes
        )  # fmt: skip

    def _operator(self, node: oir.Node) -> None:
        contrib = node.domain == "com.microsoft"
        x = node.inputs[0]
        position, cos, sin = (match.input_of(node, index) for index in ((1, 2, 3) if contrib else (3, 1, 2)))
        width = self.facts.shape(cos)
        if x is None or cos is None or sin is None or not width or not isinstance(width[-1], int):
            return
        interleaved = bool(match.attribute(node, "interleaved", 0))
        y = node.outputs[0]
        turned = Turned(x, y, cos, sin, position, 2 * width[-1], interleaved, 0, (node,))
        self._found[y] = turned
        self._partial(turned)
