"""Follow a tensor of attention heads through the operators that only move its elements.

The axes of a tensor are written as strings of letters, one letter an index: a value with axes `("b", "h", "s", "d")` is
[batch, heads, sequence, size], and `("b", "s", "hd")` is the same elements as [batch, sequence, heads * size]. Whatever
an exporter writes between the two (Reshape, Transpose, Squeeze, Slice of a packed projection, Expand of shared heads)
permutes, joins or drops letters, so every spelling ends in the same few words.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import onnx_ir as oir

from burnish.ir import dims, match, weights
from burnish.ir.dims import Dim
from burnish.ir.inference import Inference
from burnish.ir.walk import is_op

Axes = tuple[str, ...]

PACKED = "c"
"""The letter of an axis of which one index is selected: the projection (query, key or value) of a packed tensor."""

GROUP, REPEAT = "g", "r"
"""The letters that the heads `h` split into when keys or values are shared: h = g * repeats + r."""


@dataclass(frozen=True)
class Place:
    """A value on the way, with what its axes mean.

    Attributes:
        value: the tensor.
        axes: its axes in letters.
        scale: what its elements were multiplied with on the way from here to where the walk began.
        pick: the selected index of the letter `c`, when that is among the letters.
        repeated: the letter `r` was dropped: heads are repeated between here and where the walk began.
        path: the nodes from here to where the walk began, the last of them first.
    """

    value: oir.Value
    axes: Axes
    scale: float = 1.0
    pick: int | None = None
    repeated: bool = False
    path: tuple[oir.Node, ...] = ()


class Walk:
    """A walk through movement operators, with the sizes of the letters it uses."""

    def __init__(self, facts: Inference, sizes: dict[str, Dim]) -> None:
        self.facts = facts
        self.sizes = dict(sizes)

    def spelled(self, axes: Axes, wanted: Axes) -> bool:
        """Whether `axes` are `wanted`, where letters of size 1 do not count and `h` may be split into `g` and `r`."""
        return len(axes) == len(wanted) and all(
            self._plain(a) == self._plain(w) for a, w in zip(axes, wanted, strict=True)
        )

    def _plain(self, letters: str) -> str:
        split = letters.replace("h", GROUP + REPEAT) if GROUP in self.sizes else letters
        return "".join(letter for letter in split if self.sizes.get(letter) != 1)

    def up(self, value: oir.Value, axes: Axes, *, scaled: bool) -> Iterator[Place]:
        """The values that `value` is a rearrangement of, nearest first, beginning with itself.

        Args:
            value: where to begin.
            axes: the meaning of its axes.
            scaled: pass multiplications by a number too.
        """
        place = Place(value, axes)
        while True:
            yield place
            node = place.value.producer()
            before = self._before(node, place, scaled) if node is not None else None
            if before is None:
                return
            place = before

    def _before(self, node: oir.Node, place: Place, scaled: bool) -> Place | None:
        source = match.input_of(node, 0)
        shape = self.facts.shape(source)
        if source is None or shape is None:
            return None
        path = (node, *place.path)
        if scaled and is_op(node, "Mul", "Div"):
            found = scaled_by(node, self.facts)
            if found is None or self.facts.shape(found[0]) != self.facts.shape(place.value):
                return None
            return Place(found[0], place.axes, place.scale * found[1], place.pick, place.repeated, path)
        if is_op(node, "Expand"):
            axes = self._shared(place.axes, shape)
            return Place(source, axes, place.scale, place.pick, True, path) if axes is not None else None
        if is_op(node, "Split", "Slice", "Gather"):
            picked = self._picked(node, place, shape)
            if picked is None:
                return None
            axes, pick = picked
            return Place(source, axes, place.scale, pick, place.repeated, path)
        axes = self._moved_up(node, place.axes, shape)
        return Place(source, axes, place.scale, place.pick, place.repeated, path) if axes is not None else None

    def _moved_up(self, node: oir.Node, axes: Axes, shape: tuple[Dim, ...]) -> Axes | None:
        if keeps(node, self.facts):
            return axes
        if is_op(node, "Transpose"):
            perm = match.attribute(node, "perm") or tuple(reversed(range(len(shape))))
            return tuple(axes[perm.index(axis)] for axis in range(len(shape)))
        if is_op(node, "Reshape", "Flatten"):
            return self.regrouped("".join(axes), shape)
        if is_op(node, "Squeeze"):
            given = match.axes_of(node)
            gone = [axis % len(shape) for axis in given] if given else [i for i, size in enumerate(shape) if size == 1]
            rest = iter(axes)
            return (
                tuple("" if axis in gone else next(rest) for axis in range(len(shape))) if given is not None else None
            )
        if is_op(node, "Unsqueeze"):
            new = [axis % len(axes) for axis in match.axes_of(node) or ()]
            if not new or any(self._plain(axes[axis]) for axis in new):
                return None
            return tuple(axis for i, axis in enumerate(axes) if i not in new)
        return None

    def down(self, value: oir.Value, axes: Axes) -> Iterator[tuple[oir.Value, Axes]]:
        """The rearrangements of `value`, nearest first, as far as each has just one reader."""
        while True:
            yield value, axes
            node = match.sole_consumer(value)
            if node is None or node.inputs[0] is not value:
                return
            shape = self.facts.shape(node.outputs[0])
            after = self._moved_down(node, axes, shape) if shape is not None else None
            if after is None:
                return
            value, axes = node.outputs[0], after

    def _moved_down(self, node: oir.Node, axes: Axes, shape: tuple[Dim, ...]) -> Axes | None:
        if keeps(node, self.facts):
            return axes
        if is_op(node, "Transpose"):
            perm = match.attribute(node, "perm") or tuple(reversed(range(len(axes))))
            return tuple(axes[axis] for axis in perm)
        if is_op(node, "Reshape", "Flatten"):
            return self.regrouped("".join(axes), shape)
        if is_op(node, "Squeeze", "Unsqueeze"):
            return self.regrouped("".join(axes), shape)
        return None

    def regrouped(self, letters: str, shape: tuple[Dim, ...]) -> Axes | None:
        """The letters, in order, dealt out to axes of the sizes `shape`; `h` is split into `g` and `r` where needed.

        One axis may be of any size: since all the others are dealt, it has the letters that are left.
        """
        left, rest = self._dealt(letters, shape)
        if len(left) == len(shape):
            if self._plain(rest):
                return None
            return (*left[:-1], left[-1] + rest) if left else ()
        right, middle = self._dealt(rest[::-1], shape[: len(left) : -1], split=False)
        if len(right) != len(shape) - len(left) - 1:
            return None
        return (*left, middle[::-1], *(group[::-1] for group in reversed(right)))

    def _dealt(self, letters: str, shape: tuple[Dim, ...], split: bool = True) -> tuple[list[str], str]:
        """The groups of letters for the axes from the first on, as far as that goes, and the letters left over."""
        result, rest = list[str](), letters
        for size in shape:
            group, behind, have = "", rest, 1
            while have != size:
                if not behind:
                    return result, rest
                letter, behind = behind[0], behind[1:]
                if split and letter == "h" and self._splits_heads(have, size):
                    letter, behind = GROUP, REPEAT + behind
                group += letter
                have = dims.multiply(have, self.sizes[letter])  # type: ignore[assignment]
            result.append(group)
            rest = behind
        return result, rest

    def _splits_heads(self, have: Dim, size: Dim) -> bool:
        """Whether an axis of `size`, of which `have` are dealt, takes only the first part of the heads."""
        heads = self.sizes["h"]
        need = dims.divide_exactly(size, have)
        if not isinstance(need, int) or not isinstance(heads, int) or need <= 0 or need >= heads or heads % need:
            return False
        if self.sizes.get(GROUP, need) != need:
            return False
        self.sizes[GROUP], self.sizes[REPEAT] = need, heads // need
        return True

    def _shared(self, axes: Axes, shape: tuple[Dim, ...]) -> Axes | None:
        """The axes before an Expand that repeats each head of keys or values, and nothing else."""
        before = ("",) * (len(axes) - len(shape)) + axes[len(axes) - len(shape) :]
        result: list[str] = []
        for letters, size in zip(before[len(axes) - len(shape) :], shape, strict=True):
            whole = dims.product([self.sizes[letter] for letter in letters])
            if whole == size:
                result.append(letters)
            elif size == 1 and self._plain(letters) == REPEAT:
                result.append("")
            elif size == 1 and letters == "h" and GROUP not in self.sizes:
                self.sizes[GROUP], self.sizes[REPEAT] = 1, whole
                result.append(GROUP)
            else:
                return None
        return tuple(result) if not any(self._plain(a) for a in axes[: len(axes) - len(shape)]) else None

    def _picked(self, node: oir.Node, place: Place, shape: tuple[Dim, ...]) -> tuple[Axes, int] | None:
        """The axes before one index of an axis was selected, and that index."""
        found = selected(node, place.value, self.facts)
        if found is None or place.pick is not None:
            return None
        axis, index, kept = found
        parts = shape[axis]
        if not isinstance(parts, int) or parts < 2 or not 0 <= index < parts:
            return None
        if kept and self._plain(place.axes[axis]):
            return None
        self.sizes[PACKED] = parts
        behind = place.axes[axis + 1 :] if kept else place.axes[axis:]
        return (*place.axes[:axis], PACKED, *behind), index


def keeps(node: oir.Node, facts: Inference) -> bool:
    """Whether `node` passes its first input on unchanged: Identity, a Cast to the same dtype, Dropout at inference."""
    if is_op(node, "Identity") or (is_op(node, "Concat") and len(node.inputs) == 1):
        return True
    if is_op(node, "Cast", "CastLike"):
        return facts.dtype(node.inputs[0]) is not None and facts.dtype(node.inputs[0]) == facts.dtype(node.outputs[0])
    if is_op(node, "Dropout"):
        training = match.input_of(node, 2)
        off = training is None or weights.scalar(training) == 0.0
        return off and not any(out.uses() or out.is_graph_output() for out in node.outputs[1:])
    return False


def selected(node: oir.Node, value: oir.Value, facts: Inference) -> tuple[int, int, bool] | None:
    """(axis, index, whether the axis is kept with size 1) when `value` is one index of an axis of the node's input."""
    source = node.inputs[0]
    whole, part = facts.shape(source), facts.shape(value)
    if whole is None or part is None:
        return None
    if is_op(node, "Gather"):
        index = facts.content(match.input_of(node, 1))
        if index is None or index.ndim or not isinstance(index.item(), int):
            return None
        axis = match.attribute(node, "axis", 0) % len(whole)
        size = whole[axis]
        return (axis, index.item() % size, False) if isinstance(size, int) and size else None
    if is_op(node, "Split"):
        axis = match.attribute(node, "axis", 0) % len(whole)
        sizes = [facts.shape(out) for out in node.outputs]
        if any(shape is None or shape[axis] != 1 for shape in sizes):
            return None
        return axis, list(node.outputs).index(value), True
    return _slice(node, whole, facts)


def _slice(node: oir.Node, whole: tuple[Dim, ...], facts: Inference) -> tuple[int, int, bool] | None:
    given = [facts.numbers(match.input_of(node, i)) for i in (1, 2)]
    axes = facts.numbers(match.input_of(node, 3)) if match.input_of(node, 3) is not None else None
    steps = facts.numbers(match.input_of(node, 4)) if match.input_of(node, 4) is not None else [1]
    if len(node.inputs) == 1:
        given, axes = [_listed(node, "starts"), _listed(node, "ends")], _listed(node, "axes")
    starts, ends = given
    if not starts or not ends or not axes or len(starts) != 1 or steps != [1]:
        return None
    axis = axes[0] % len(whole)
    size = whole[axis]
    if not isinstance(size, int):
        return None
    kept = range(size)[starts[0] : ends[0]]
    return (axis, kept.start, True) if len(kept) == 1 else None


def _listed(node: oir.Node, name: str) -> list[int] | None:
    found = match.attribute(node, name)
    return list(found) if found is not None else None


def scaled_by(node: oir.Node, facts: Inference) -> tuple[oir.Value, float] | None:
    """For a Mul or Div by one number, (the other input, the factor)."""
    left, right = node.inputs
    if left is None or right is None:
        return None
    factor = number(right, facts)
    if factor is not None:
        return (left, factor) if node.op_type == "Mul" else (left, 1.0 / factor) if factor else None
    factor = number(left, facts) if node.op_type == "Mul" else None
    return (right, factor) if factor is not None else None


def number(value: oir.Value | None, facts: Inference) -> float | None:
    """The number that `value`, of one element, always is: a constant, or what roots and quotients make of constants."""
    if value is None:
        return None
    tensor = weights.tensor_of(value)
    if tensor is not None:
        if tensor.size != 1:
            return None
        exact = weights.exact(value)
        return float(exact.reshape(())) if exact is not None else weights.scalar(value)
    content = facts.content(value)
    if content is not None and content.size == 1 and isinstance(content.item(), int):
        return float(content.item())
    node = value.producer()
    if node is None or facts.shape(value) not in ((), (1,)):
        return None
    if is_op(node, "Identity", "Cast", "CastLike", "Squeeze", "Unsqueeze", "Reshape"):
        return (
            number(node.inputs[0], facts)
            if (value.dtype or facts.dtype(value) or oir.DataType.INT64).is_floating_point()
            else None
        )
    parts = [number(one, facts) for one in node.inputs]
    if is_op(node, "Sqrt") and parts[0] is not None and parts[0] >= 0:
        return math.sqrt(parts[0])
    if is_op(node, "Reciprocal") and parts[0]:
        return 1.0 / parts[0]
    if is_op(node, "Pow") and parts[0] is not None and parts[1] is not None and parts[0] > 0:
        return float(parts[0] ** parts[1])
    if is_op(node, "Div", "Mul") and len(parts) == 2 and parts[0] is not None and parts[1] is not None:
        if node.op_type == "Mul":
            return parts[0] * parts[1]
        return parts[0] / parts[1] if parts[1] else None
    return None
