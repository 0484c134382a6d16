"""A residual of fewer channels is padded and added to all of them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_ir as oir

from burnish.ir import edit, match
from burnish.ir.indices import box
from burnish.ir.inference import Inference
from burnish.ir.views.parameter import match_perm, same_shape
from burnish.ir.walk import walk
from burnish.passes.base import ExactPass, Outcome
from burnish.passes.value_parts import Part, added_part, part_of

_FLOATS = (oir.DataType.FLOAT, oir.DataType.FLOAT16, oir.DataType.DOUBLE)


@dataclass(frozen=True)
class PadResidual(ExactPass):
    """Write a residual that is added to some of the channels, or joined with zeros for it, as one Pad and one Add."""

    needs: ClassVar[tuple[str, ...]] = ("inlined",)

    def rewrite(self, model: oir.Model, outcome: Outcome) -> None:
        """See the class."""
        facts = Inference(model)
        for node in reversed(list(walk(model, "Concat", "ScatterND"))):  # what writes again goes before what it repeats
            if node.graph is None:
                continue
            found, last, wider = None, node, None
            same = _rewritten(facts, node) if node.op_type == "ScatterND" else None
            if same is None:
                found, last = (_concat(node), node) if node.op_type == "Concat" else _scatter(facts, node)
                same = found.value if found is not None and found.added is None else None
            if found is None and node.op_type == "Concat":
                wider = _zeros_beside(facts, node)
            if (same or wider) is not None:
                if not outcome.take(node):
                    return
                if same is not None:
                    edit.bypass(last, same)
                elif wider is not None:
                    edit.replace_node(node, _padded(model, node, *wider))
                continue
            if found is None or found.added is None:
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
                pads = np.zeros((2, rank), np.int64)
                pads[:, found.axis] = found.start, whole - found.end
                padded = _padded(model, last, found.added, pads)
                add = edit.make("Add", [found.value, padded.outputs[0]], like=last)
                same_shape(add, last.outputs[0])
                edit.replace_node(last, [padded, add])


def _padded(model: oir.Model, like: oir.Node, value: oir.Value, pads: np.ndarray) -> oir.Node:
    """A Pad in the place of a node; `pads` is int64 [2, rank]: zeros before and behind on each axis."""
    inputs: list[oir.Value | None] = [value]
    attributes: dict[str, object] = {}
    if model.graph.opset_imports.get("", 1) >= 11:
        inputs.append(edit.add_constant(model, f"{like.outputs[0].name}_pads", pads.reshape(-1)))
    else:
        attributes["pads"] = pads.reshape(-1).tolist()
    padded = edit.make("Pad", inputs, attributes, like=like)
    if value.shape is not None:
        more = pads.sum(0).tolist()
        sizes = [size + extra if isinstance(size, int) else size for size, extra in zip(value.shape, more, strict=True)]
        padded.outputs[0].type, padded.outputs[0].shape = like.outputs[0].type, oir.Shape(sizes)
    return padded


def _concat(node: oir.Node) -> Part | None:
    """The changed part, when the pieces of the Concat are all of one value in order, and one of them was added to."""
    pieces = [part_of(value) or added_part(value) for value in node.inputs]
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


def _rewritten(facts: Inference, node: oir.Node) -> oir.Value | None:
    """What a ScatterND gives that writes all of its data in order, or what another has just written there."""
    data, indices, update = node.inputs[:3]
    before, places = match.producer(data, "ScatterND"), box(facts, indices)
    if any(match.attribute(one, "reduction", "none") != "none" for one in (node, before) if one is not None):
        return None
    if before is not None and list(before.inputs[1:]) == [indices, update]:
        return data
    shape = facts.shape(data)
    if places is None or shape is None or shape != facts.shape(update):
        return None
    return update if all(one == (0, size) for one, size in zip(places, shape, strict=False)) else None


def _scatter(facts: Inference, node: oir.Node) -> tuple[Part | None, oir.Node]:
    """The part that was read, changed or not, when a ScatterND writes it back in place; the node with the result."""
    data, update, last = node.inputs[0], node.inputs[2], node
    turned, places = match.producer(data, "Transpose"), box(facts, node.inputs[1])
    if places is None or match.attribute(node, "reduction", "none") != "none":
        return None, node
    axis, shape = len(places) - 1, facts.shape(data)
    if turned is not None:
        perm = match_perm(turned, match.rank(turned.inputs[0]) or 0)
        back, other = match.sole_consumer(node.outputs[0], "Transpose"), match.producer(update, "Transpose")
        if axis or back is None or other is None or match_perm(other, len(perm)) != perm:
            return None, node
        if tuple(perm[i] for i in match_perm(back, len(perm))) != tuple(range(len(perm))):
            return None, node
        data, update, last, axis = turned.inputs[0], other.inputs[0], back, perm[0]
    part = added_part(update) or part_of(update) or (_own(data, update) if turned is None else None)
    if part is None or part.value is not data or part.axis != axis or shape is None:
        return None, node
    whole = all(one == (0, size) for one, size in zip(places[:-1], shape, strict=False))
    return (part if whole and places[-1] == (part.start, part.end - part.start) else None), last


def _own(data: oir.Value | None, update: oir.Value | None) -> Part | None:
    """A part of the data that was taken from them transposed, and transposed back."""
    moved = match.producer(update, "Transpose")
    part = part_of(moved.inputs[0]) if moved is not None else None
    there = match.producer(part.value, "Transpose") if part is not None else None
    if moved is None or part is None or there is None or data is None or there.inputs[0] is not data:
        return None
    rank = match.rank(data) or 0
    perm, back = match_perm(there, rank), match_perm(moved, rank)
    same = tuple(perm[axis] for axis in back) == tuple(range(rank))
    return Part(data, perm[part.axis], part.start, part.end) if same else None


def _zeros_beside(facts: Inference, node: oir.Node) -> tuple[oir.Value, np.ndarray] | None:
    """What a Concat joins with zeros, and the pads, where a value of the same shape is added to the result."""
    add, shape = match.sole_consumer(node.outputs[0], "Add"), facts.shape(node.outputs[0])
    own = [place for place, value in enumerate(node.inputs) if not match.is_zeros(value)]
    if add is None or shape is None or len(own) != 1 or facts.dtype(node.outputs[0]) not in _FLOATS:
        return None
    axis = int(match.attribute(node, "axis", 0)) % len(shape)
    sizes = [(facts.shape(value) or shape)[axis] for value in node.inputs]
    value, pads = node.inputs[own[0]], np.zeros((2, len(shape)), np.int64)
    numbers = [size for size in sizes if isinstance(size, int)]
    if value is None or len(numbers) < len(sizes):
        return None
    wanted = tuple(sizes[own[0]] if place == axis else size for place, size in enumerate(shape))
    if facts.shape(value) != wanted or any(facts.shape(one) != shape for one in add.inputs):
        return None
    pads[:, axis] = sum(numbers[: own[0]]), sum(numbers[own[0] + 1 :])
    return value, pads
