"""Follow queries, keys or values of an attention back to the linear layer that makes them.

A trail goes through movement (`heads`), one scale, rotary embedding, norms, biases, a cache in front, and repeated or
packed heads, and keeps the meaning of every axis in letters, so that at its end each output feature of the linear layer
is known by head and element, however the exporter packed them.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import onnx_ir as oir

from burnish.ir import dims, match
from burnish.ir.dims import Dim
from burnish.ir.inference import Inference
from burnish.ir.views import heads
from burnish.ir.views.heads import GROUP, REPEAT, Axes, Walk
from burnish.ir.views.linear import Linear, find_linear
from burnish.ir.views.norm import Norm
from burnish.ir.views.parameter import Parameter, find_parameter
from burnish.ir.views.turned import Turned, Turns
from burnish.ir.walk import is_op

_SECOND = ("Concat", "TensorScatter")
"""Operators whose second input is what joins; that of the other ones is the third."""

FEATURES = frozenset("hgrde")
"""Letters of heads and their elements; other small letters are batch and positions, capitals are packed axes."""


@dataclass(frozen=True)
class HeadNorm:
    """A norm of queries or keys.

    Attributes:
        norm: the normalization.
        per_head: its statistics are those of one head; else of all heads together.
    """

    norm: Norm
    per_head: bool


@dataclass(frozen=True)
class Bias:
    """A constant that is added to all heads on the way.

    Attributes:
        node: the Add, or the operator with the bias among its inputs.
        index: which input of it.
        parameter: the constant.
        letters: the letters of its elements in order.
    """

    node: oir.Node
    index: int
    parameter: Parameter
    letters: str


@dataclass(frozen=True)
class Store:
    """Where new keys or values meet older ones.

    Attributes:
        past: those kept so far, as this node reads them; None when there are none.
        present: past and new ones; None when nobody takes them.
        axes: the letters of both.
        form: "append" (Concat or an operator that does it), "update" (written into a buffer of full length).
        node: what joins them.
    """

    past: oir.Value | None
    present: oir.Value | None
    axes: Axes
    form: str
    node: oir.Node


@dataclass
class Trail:
    """The way from an operand of an attention up to where it comes from.

    Attributes:
        value: where the trail ends: the output of `linear`, or whatever could not be passed.
        axes: the letters of `value`.
        linear: the linear layer; None when there is none.
        scale: the product of the numbers multiplied on the way.
        scales: their nodes.
        turned: the rotary embedding.
        norm: the norm.
        biases: added behind the linear layer.
        store: the cache.
        repeated: each head serves several query heads.
        nodes: all nodes passed, the linear layer's included.
        places: the values passed and their axes, nearest to the attention first.
    """

    value: oir.Value
    axes: Axes
    linear: Linear | None = None
    scale: float = 1.0
    scales: list[oir.Node] = field(default_factory=list)
    turned: Turned | None = None
    norm: HeadNorm | None = None
    biases: list[Bias] = field(default_factory=list)
    store: Store | None = None
    repeated: bool = False
    nodes: list[oir.Node] = field(default_factory=list)
    places: list[tuple[oir.Value, Axes]] = field(default_factory=list)

    def is_stored(self, model: oir.Model) -> bool:
        """Whether the trail ends at an input of the model."""
        return self.value.is_graph_input() and self.value.graph is model.graph

    @property
    def stopped_by(self) -> str:
        """What made `value`, for messages."""
        node = self.value.producer()
        if node is not None:
            return node.op_type
        return f"the input `{self.value.name}`" if self.value.is_graph_input() else "a constant"


class Climber(Walk):
    """Climbs trails of one attention."""

    def __init__(self, facts: Inference, sizes: dict[str, Dim], turns: Turns, norms: dict[oir.Value, Norm]) -> None:
        super().__init__(facts, sizes)
        self.turns = turns
        self.norms = norms
        self.cuts: dict[str, tuple[str, int]] = {}

    def climb(self, value: oir.Value, axes: Axes) -> Trail:
        """The trail from `value`, whose axes are `axes`, as far as it goes."""
        trail = Trail(value, axes)
        trail.places.append((value, axes))
        while trail.linear is None and self._step(trail):
            trail.places.append((trail.value, trail.axes))
        return trail

    def cut(self, letters: str, start: int, size: Dim) -> str:
        """A new letter for an axis of `size` of which `letters` are the part from `start` on."""
        letter = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"[len(self.cuts)]
        self.cuts[letter] = (letters, start)
        self.sizes[letter] = size
        return letter

    def rows(self, letters: str, order: str) -> np.ndarray | None:
        """Where along an axis of `letters` the elements of `order` are, one after the other; None if it has not all."""
        found = self._positions(letters)
        if found is None:
            return None
        positions, names = found
        wanted = order.replace("h", GROUP + REPEAT) if GROUP in names or REPEAT in names else order
        wanted = "".join(letter for letter in wanted if letter in names or self.sizes.get(letter) != 1)
        extra = "".join(name for name in names if name not in wanted and self.sizes[name] != 1)
        if extra or any(letter not in names for letter in wanted):
            return None
        present = [name for name in names if name in wanted]
        kept = positions.reshape([size for name in present if isinstance(size := self.sizes[name], int)])
        return kept.transpose([present.index(letter) for letter in wanted]).reshape(-1)

    def _positions(self, letters: str) -> tuple[np.ndarray, str] | None:
        positions, names = np.zeros((), np.int64), ""
        for letter in letters:
            size = self.sizes[letter]
            inner: tuple[np.ndarray, str] | None
            if letter in self.cuts:
                held, start = self.cuts[letter]
                inner = self._positions(held)
                inner = (inner[0] + start, inner[1]) if inner is not None else None
            else:
                inner = (np.arange(size), letter) if isinstance(size, int) else None
            if inner is None or not isinstance(size, int):
                return None
            own, inside = inner
            positions = np.add.outer(positions * size, own)
            names += inside
        return positions, names

    def leads(self, axes: Axes, times: str) -> bool:
        """Whether the axes before the last hold batch and positions only, each letter of `times` once."""
        found = "".join(self._plain(letters) for letters in axes[:-1])
        return sorted(found) == sorted(letter for letter in times if self.sizes.get(letter) != 1)

    def _step(self, trail: Trail) -> bool:
        node = trail.value.producer()
        if node is None:
            return False
        linear = find_linear(node)
        if linear is not None and linear.output is trail.value:
            trail.linear = linear
            trail.nodes += reversed(linear.nodes)
            return True
        turned = self.turns.at(trail.value)
        if turned is not None:
            return trail.turned is None and self._turn(trail, turned)
        norm = self.norms.get(trail.value)
        if norm is not None:
            return trail.norm is None and self._normalize(trail, norm)
        if is_op(node, "Concat", "TensorScatter", "ScatterND", "ScatterElements") and not heads.keeps(node, self.facts):
            return trail.store is None and self._join(trail, node)
        if is_op(node, "Mul", "Div"):
            return self._scale(trail, node)
        if is_op(node, "Add"):
            return self._add(trail, node)
        source = match.input_of(node, 0)
        shape = self.facts.shape(source)
        if source is None or shape is None:
            return False
        axes = self._above(node, trail, shape)
        if axes is None:
            return False
        self._go(trail, source, axes, node)
        return True

    def _above(self, node: oir.Node, trail: Trail, shape: tuple[Dim, ...]) -> Axes | None:
        if is_op(node, "Expand", "Tile"):
            return self._repeat(trail, shape)
        if is_op(node, "Split", "Slice", "Gather"):
            return self._pick(node, trail, shape)
        if is_op(node, "Cast") and self._floats(node):
            return trail.axes
        if is_op(node, "DequantizeLinear", "QuantizeLinear"):
            return trail.axes
        return self._moved_up(node, trail.axes, shape)

    def _floats(self, node: oir.Node) -> bool:
        kinds = [self.facts.dtype(value) for value in (node.inputs[0], node.outputs[0])]
        return all(kind is not None and kind.is_floating_point() for kind in kinds)

    @staticmethod
    def _go(trail: Trail, value: oir.Value, axes: Axes, *nodes: oir.Node) -> None:
        trail.value, trail.axes = value, axes
        trail.nodes += nodes

    def _turn(self, trail: Trail, turned: Turned) -> bool:
        axes = self.turns.axes(turned, trail.axes, self)
        if axes is None or trail.biases:
            return False
        trail.turned = turned
        self._go(trail, turned.x, axes, *reversed(turned.nodes))
        return True

    def _normalize(self, trail: Trail, norm: Norm) -> bool:
        if norm.kind not in ("layer", "rms") or norm.axes != (-1,) or self.facts.shape(norm.input) is None:
            return False
        last = self._plain(trail.axes[-1])
        own = {self._plain("hd"): False, self._plain("gd"): False, self._plain("d"): True}
        if last not in own or trail.biases:
            return False
        trail.norm = HeadNorm(norm, own[last])
        self._go(trail, norm.input, trail.axes, *reversed(norm.nodes))
        return True

    def _scale(self, trail: Trail, node: oir.Node) -> bool:
        found = heads.scaled_by(node, self.facts)
        if found is None or self.facts.shape(found[0]) != self.facts.shape(trail.value):
            return False
        if trail.norm is not None or trail.biases:
            return False
        trail.scale *= found[1]
        trail.scales.append(node)
        self._go(trail, found[0], trail.axes, node)
        return True

    def _add(self, trail: Trail, node: oir.Node) -> bool:
        for index in (0, 1):
            parameter, other = find_parameter(node.inputs[index]), node.inputs[1 - index]
            if parameter is None or other is None or self.facts.shape(other) != self.facts.shape(trail.value):
                continue
            own = trail.axes[len(trail.axes) - len(parameter.shape) :]
            wide = [letters for letters, size in zip(own, parameter.shape, strict=True) if size != 1]
            letters = "".join(wide)
            if not all(self._whole(one) for one in wide):
                return False
            trail.biases.append(Bias(node, index, parameter, letters))
            self._go(trail, other, trail.axes, node)
            return True
        return False

    def _whole(self, letters: str) -> bool:
        """Whether an axis holds features only."""
        return set(self._plain(letters)) <= FEATURES or letters in self.cuts

    def _join(self, trail: Trail, node: oir.Node) -> bool:
        """A cache in front of new keys or values, or a buffer that they are written into."""
        past, new = match.input_of(node, 0), match.input_of(node, 1 if node.op_type in _SECOND else 2)
        before, after = self.facts.shape(past), self.facts.shape(new)
        if past is None or new is None or before is None or after is None or len(after) != len(trail.axes):
            return False
        if trail.axes.count("t") != 1 or any("t" in self._plain(axis) for axis in trail.axes if axis != "t"):
            return False
        axis = trail.axes.index("t")
        if node.op_type == "Concat":
            same = len(node.inputs) == 2 and match.attribute(node, "axis", 0) % len(trail.axes) == axis
            if not same or find_parameter(past) is not None:
                return False
        elif before != self.facts.shape(trail.value):
            return False
        if before[:axis] + before[axis + 1 :] != after[:axis] + after[axis + 1 :]:
            return False
        if trail.biases:
            return False
        form = "append" if node.op_type == "Concat" else "update"
        trail.store = Store(past, node.outputs[0], trail.axes, form, node)
        self.sizes["u"] = after[axis]
        self._go(trail, new, tuple(letters.replace("t", "u") for letters in trail.axes), node)
        return True

    def _repeat(self, trail: Trail, shape: tuple[Dim, ...]) -> Axes | None:
        if len(shape) > len(trail.axes):
            return None
        axes = self._shared(trail.axes, shape)
        if axes is not None and (REPEAT in self.sizes and axes != trail.axes[-len(shape) :]):
            trail.repeated = True
        return axes

    def _pick(self, node: oir.Node, trail: Trail, shape: tuple[Dim, ...]) -> Axes | None:
        """The axes before a part of one of them was taken."""
        if node.op_type == "Gather" and (found := self._spread(node, trail, shape)) is not None:
            return found
        part = section(node, trail.value, self.facts)
        if part is None:
            return None
        axis, start, length, kept = part
        letters = trail.axes[axis] if kept else ""
        if length == shape[axis] and kept:
            return trail.axes
        size = shape[axis]
        if not isinstance(size, int) or length != dims.product([self.sizes[letter] for letter in letters]):
            return None
        if not all(letter in FEATURES or letter in self.cuts or self.sizes[letter] == 1 for letter in letters):
            return None
        behind = trail.axes[axis + 1 :] if kept else trail.axes[axis:]
        return (*trail.axes[:axis], self.cut(letters, start, size), *behind)

    def _spread(self, node: oir.Node, trail: Trail, shape: tuple[Dim, ...]) -> Axes | None:
        """The axes before each head was repeated by a Gather of indices 0, 0, 1, 1, and so on."""
        indices = self.facts.numbers(match.input_of(node, 1))
        axis = match.attribute(node, "axis", 0) % len(shape)
        fewer = shape[axis]
        if indices is None or trail.axes[axis] != "h" or not isinstance(fewer, int) or GROUP in self.sizes:
            return None
        times = len(indices) // max(fewer, 1)
        if times < 2 or indices != np.repeat(np.arange(fewer), times).tolist():
            return None
        self.sizes[GROUP], self.sizes[REPEAT] = fewer, times
        trail.repeated = True
        return (*trail.axes[:axis], GROUP, *trail.axes[axis + 1 :])


def section(node: oir.Node, value: oir.Value, facts: Inference) -> tuple[int, int, Dim, bool] | None:
    """(axis, start, length, whether the axis is kept) when `value` is a run of one axis of the node's first input."""
    from burnish.ir.content_rules import slices

    whole, part = facts.shape(node.inputs[0]), facts.shape(value)
    if whole is None or part is None:
        return None
    if is_op(node, "Gather"):
        found = heads.selected(node, value, facts)
        return (found[0], found[1], 1, False) if found is not None else None
    if is_op(node, "Split"):
        axis = match.attribute(node, "axis", 0) % len(whole)
        start: Dim = 0
        for out in node.outputs:
            shape = facts.shape(out)
            if shape is None or not isinstance(shape[axis], int) or not isinstance(start, int):
                return None
            if out is value:
                return axis, start, shape[axis], True
            start = dims.add(start, shape[axis])
        return None
    spans = slices(facts, node, len(whole))
    if spans is None:
        return None
    moved = [axis for axis in spans if part[axis] != whole[axis]]
    if any(step != 1 for _, _, step in spans.values()) or len(moved) > 1:
        return None
    if not moved:
        axis = next(iter(spans))
        return axis, 0, whole[axis], True
    begin, size = spans[moved[0]][0], whole[moved[0]]
    if not isinstance(begin, int) or not isinstance(size, int):
        return None
    return moved[0], range(size)[begin:].start, part[moved[0]], True
