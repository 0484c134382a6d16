"""Rewrite a residual added to some of the channels as a padded residual added to all."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_ir as oir

from burnish.ir import edit, match, weights
from burnish.ir.views.parameter import match_perm, same_shape
from burnish.ir.walk import walk
from burnish.passes.base import ExactPass, Outcome


@dataclass(frozen=True)
class _Part:
    """`value` at `start` to `end` of axis `axis`; `added` is what was added to it."""

    value: oir.Value
    axis: int
    start: int
    end: int
    added: oir.Value | None = None


@dataclass(frozen=True)
class PadResidual(ExactPass):
    """Rewrite a residual added to some channels (Slice, Add, and Concat or ScatterND) as one Pad and one Add."""

    needs: ClassVar[tuple[str, ...]] = ("inlined",)

    def rewrite(self, model: oir.Model, outcome: Outcome) -> None:
        """See the class."""
        version = model.graph.opset_imports.get("", 1)
        for node in walk(model, "Concat", "ScatterND"):
            if node.graph is None:
                continue
            if node.op_type == "ScatterND" and _overwrites_all(node):
                if not outcome.take(node):
                    return
                edit.bypass(node, node.inputs[2])
                continue
            found, last = (_concat(node), node) if node.op_type == "Concat" else _scatter(node)
            if found is None:
                continue
            if found.added is None:
                if not outcome.take(node):
                    return
                edit.bypass(last, found.value)
                continue
            width, whole = found.end - found.start, match.dim(found.value, found.axis)
            rank = match.rank(found.value)
            if whole is None or rank is None or match.rank(found.added) != rank:
                outcome.skip(node, "the shape of the residual is unknown")
            elif match.dim(found.added, found.axis) != width:
                outcome.skip(node, "what is added is spread over the channels")
            elif not outcome.take(node):
                return
            else:
                _write(model, last, found, whole, rank, version)


def _write(model: oir.Model, last: oir.Node, part: _Part, whole: int, rank: int, version: int) -> None:
    pads = np.zeros((2, rank), np.int64)
    pads[:, part.axis] = part.start, whole - part.end
    inputs: list[oir.Value | None] = [part.added]
    attributes: dict[str, object] = {}
    if version >= 11:
        inputs.append(edit.add_constant(model, f"{last.outputs[0].name}_pads", pads.reshape(-1)))
    else:
        attributes["pads"] = pads.reshape(-1).tolist()
    padded = edit.make("Pad", inputs, attributes, like=last)
    shape = list(part.added.shape) if part.added is not None and part.added.shape is not None else []
    shape[part.axis] = whole
    padded.outputs[0].type, padded.outputs[0].shape = last.outputs[0].type, oir.Shape(shape)
    add = edit.make("Add", [part.value, padded.outputs[0]], like=last)
    same_shape(add, last.outputs[0])
    edit.replace_node(last, [padded, add])


def _part(value: oir.Value | None) -> _Part | None:
    """A Slice or an output of a Split along one axis whose size is known."""
    node = match.producer(value, "Slice", "Split")
    rank = match.rank(node.inputs[0]) if node is not None else None
    if node is None or rank is None or node.inputs[0] is None or value is None:
        return None
    source = node.inputs[0]
    if node.op_type == "Split":
        axis = int(match.attribute(node, "axis", 0)) % rank
        sizes = [match.dim(out, axis) for out in node.outputs]
        if None in sizes:
            return None
        start = sum(int(size or 0) for size in sizes[: value.index()])
        return _Part(source, axis, start, start + int(match.dim(value, axis) or 0))
    given = [weights.integers(match.input_of(node, i)) for i in range(1, 5)]
    if len(node.inputs) == 1:
        given = [list(match.attribute(node, name) or ()) or None for name in ("starts", "ends", "axes")] + [None]
    starts, ends, axes, steps = given
    if starts is None or ends is None or len(starts) != 1 or (steps or [1]) != [1]:
        return None
    axis = (axes or [0])[0] % rank
    size = match.dim(source, axis)
    if size is None or len(node.inputs) > 3 and axes is None:
        return None
    start, end = (min(max(at + size if at < 0 else at, 0), size) for at in (starts[0], ends[0]))
    return _Part(source, axis, start, end)


def _added(value: oir.Value | None) -> _Part | None:
    """An Add of a part and something else."""
    node = match.producer(value, "Add")
    for one, other in ((0, 1), (1, 0)) if node is not None else ():
        part = _part(node.inputs[one])  # type: ignore[union-attr]
        if part is not None:
            return _Part(part.value, part.axis, part.start, part.end, node.inputs[other])  # type: ignore[union-attr]
    return None


def _concat(node: oir.Node) -> _Part | None:
    """The changed part, when the pieces of the Concat are all of one value in order, and one of them was added to."""
    pieces = [_part(value) or _added(value) for value in node.inputs]
    parts = [part for part in pieces if part is not None]
    changed = [part for part in parts if part.added is not None]
    if len(parts) != len(pieces) or len(changed) != 1 or len({id(part.value) for part in parts}) != 1:
        return None
    rank = match.rank(node.outputs[0]) or match.rank(changed[0].value) or 1
    axis, place = int(match.attribute(node, "axis", 0)) % rank, 0
    for part in parts:
        if part.axis != axis or part.start != place:
            return None
        place = part.end
    return changed[0] if place == match.dim(changed[0].value, axis) else None


def _overwrites_all(node: oir.Node) -> bool:
    """Whether a ScatterND writes the rows 0, 1, 2 ... of all its data, in order."""
    data, indices, update = node.inputs[:3]
    if data is None or update is None or data.shape is None or data.shape != update.shape:
        return False
    if data.shape.has_unknown_dim() or match.attribute(node, "reduction", "none") != "none":
        return False
    if indices is None or indices.shape is None or len(indices.shape) != 2 or indices.shape[1] != 1:
        return False
    if indices.shape[0] != data.shape[0]:
        return False
    numbers = weights.constant(indices, largest=1 << 22)
    if numbers is not None:
        return bool((numbers.reshape(-1) == np.arange(numbers.size)).all())
    above = match.producer(indices, "Unsqueeze", "Reshape")
    counter = match.producer(above.inputs[0], "Range") if above is not None else None
    if counter is None:
        return False
    return weights.scalar(counter.inputs[0]) == 0 and weights.scalar(counter.inputs[2]) == 1


def _scatter(node: oir.Node) -> tuple[_Part | None, oir.Node]:
    """The part that was read, changed or not, when a ScatterND writes it back in place; the node with the result."""
    data, update, last = node.inputs[0], node.inputs[2], node
    axis = 0
    turned = match.producer(data, "Transpose")
    if turned is not None:
        perm = match_perm(turned, match.rank(turned.inputs[0]) or 0)
        back, other = match.sole_consumer(node.outputs[0], "Transpose"), match.producer(update, "Transpose")
        if back is None or other is None or match_perm(other, len(perm)) != perm:
            return None, node
        if tuple(perm[i] for i in match_perm(back, len(perm))) != tuple(range(len(perm))):
            return None, node
        data, update, last, axis = turned.inputs[0], other.inputs[0], back, perm[0]
    part = _added(update) or _part(update)
    indices = weights.constant(match.input_of(node, 1), largest=1 << 22)
    if (
        part is None
        or part.value is not data
        or indices is None
        or match.attribute(node, "reduction", "none") != "none"
    ):
        return None, node
    depth = indices.shape[-1]
    axis = depth - 1 if turned is None else axis
    if part.axis != axis or (turned is not None and depth != 1):
        return None, node
    sizes = [match.dim(data, i) for i in range(depth - 1)]
    if None in sizes:
        return None, node
    ranges = [range(int(size or 0)) for size in sizes] + [range(part.start, part.end)]
    grid = np.stack(np.meshgrid(*ranges, indexing="ij"), axis=-1)
    return (part if grid.shape == indices.shape and np.array_equal(grid, indices) else None), last
