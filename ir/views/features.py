"""Where the features of a tensor are behind a node that treats all of them alike."""

from __future__ import annotations

import onnx_ir as oir

from burnish.ir import dims, match
from burnish.ir.inference import Inference, Shape
from burnish.ir.views.heads import keeps
from burnish.ir.views.parameter import match_perm
from burnish.ir.walk import is_op

_SHAPED = ("Reshape", "Flatten", "Squeeze", "Unsqueeze")
_MEANS = ("ReduceMean", "ReduceSum")


def features_below(node: oir.Node, source: oir.Value, out: oir.Value, axis: int, facts: Inference) -> int | None:
    """Where the features of a node's first input are in its output.

    Args:
        node: any node.
        source: its first input.
        out: one of its outputs.
        axis: the axis of features of `source`, counted from the end.
        facts: what is proven of the model.

    Returns:
        The axis of `out`, counted from the end, on which all features of `source` are found in order, treated alike;
        None when the node mixes or picks them, or it is not known.
    """
    before, after = facts.shape(source), facts.shape(out)
    if before is None or after is None:
        return None
    place = axis + len(before)
    if is_op(node, "Neg") or keeps(node, facts):
        return axis
    if is_op(node, "Cast", "CastLike"):
        dtype = facts.dtype(out)
        return axis if dtype is not None and dtype.is_floating_point() else None
    if is_op(node, "Expand"):
        return axis
    if is_op(node, "Transpose"):
        return match_perm(node, len(before)).index(place) - len(after)
    if is_op(node, *_SHAPED):
        return _same_place(before, axis, after)
    if is_op(node, "Split"):
        return axis if match.attribute(node, "axis", 0) % len(before) != place else None
    if is_op(node, "Slice"):
        starts = facts.numbers(match.input_of(node, 1))
        given = match.input_of(node, 3)
        axes = facts.numbers(given) if given is not None else list(range(len(starts or ())))
        free = starts is not None and axes is not None and place not in [one % len(before) for one in axes]
        return axis if free else None
    if is_op(node, "Gather"):
        across = match.attribute(node, "axis", 0) % len(before)
        if across == place:
            return None
        return axis if across < place else axis + len(before) - len(after)
    if is_op(node, *_MEANS):
        axes = match.axes_of(node)
        gone = {one % len(before) for one in axes or ()}
        if not gone or place in gone:
            return None
        return axis if match.attribute(node, "keepdims", 1) else axis + sum(one > place for one in gone)
    return None


def _same_place(before: Shape, axis: int, after: Shape) -> int | None:
    """The axis of `after` that runs over `axis` of `before`, two shapes of the same elements in order."""
    inner = dims.product(list(before[axis + 1 :] if axis != -1 else ()))
    for place in range(-1, -len(after) - 1, -1):
        rest = dims.product(list(after[place + 1 :] if place != -1 else ()))
        if after[place] == before[axis] and rest == inner:
            return place
    return None
