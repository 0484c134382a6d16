"""The view of an EmbeddingBag with weights as TorchScript exports it: a loop that sums up one bag a time."""

from __future__ import annotations

from dataclasses import dataclass

import onnx_ir as oir

from burnish.ir import dims, match, weights
from burnish.ir.inference import Inference
from burnish.ir.views.parameter import find_parameter
from burnish.ir.walk import bodies, is_op


@dataclass(frozen=True)
class Bags:
    """Sums of rows of a table, each times a weight, for bags of the same size.

    Attributes:
        table: a constant [rows, width].
        index: which rows, [bags * size].
        by: their weights, [bags * size].
        size: of a bag.
        width: of a row.
    """

    table: oir.Value
    index: oir.Value
    by: oir.Value
    size: int
    width: int


def find_bags(loop: oir.Node, facts: Inference) -> Bags | None:
    """The bags that a Loop sums up one by one, where it is proven that all are of one size; else None."""
    (body,) = bodies(loop)
    if len(loop.inputs) != 2 or len(body.outputs) != 2 or weights.scalar(loop.inputs[1]) != 1.0:
        return None
    going = body.outputs[0]
    while (same := match.producer(going, "Identity")) is not None and same.inputs[0] is not None:
        going = same.inputs[0]
    total = match.producer(body.outputs[1], "ReduceSum")
    product = match.producer(total.inputs[0], "Mul") if total is not None else None
    if total is None or product is None or match.axes_of(total) != [0] or match.attribute(total, "keepdims", 1):
        return None
    rows, by = (match.producer(value, "Gather", "Unsqueeze") for value in product.inputs)
    if is_op(rows, "Unsqueeze"):
        rows, by = by, rows
    if rows is None or by is None or not is_op(rows, "Gather") or match.axes_of(by) != [1]:
        return None
    table = find_parameter(rows.inputs[0])
    if table is None or len(table.shape) != 2 or match.attribute(rows, "axis", 0) != 0:
        return None
    parts = [match.producer(value, "Slice") for value in (rows.inputs[1], by.inputs[0])]
    if parts[0] is None or parts[1] is None or not (going is body.inputs[1] or weights.scalar(going) == 1.0):
        return None
    first, second = (part for part in parts if part is not None)
    index, weight = first.inputs[0], second.inputs[0]
    if list(first.inputs[1:]) != list(second.inputs[1:]) or weights.integers(match.input_of(first, 3)) != [0]:
        return None
    if match.input_of(first, 4) is not None or index is None or weight is None:
        return None
    starts, ends = (_counted(first.inputs[side], body.inputs[0]) for side in (1, 2))
    size = _size(starts, ends, index, facts)
    shape = facts.shape(weight)
    if size is None or shape is None or shape != facts.shape(index) or not _counts(loop.inputs[0], ends):
        return None
    if rows.inputs[0] is None or any(value.graph is not loop.graph for value in (rows.inputs[0], index, weight)):
        return None
    return Bags(rows.inputs[0], index, weight, size, table.shape[1])


def _counted(value: oir.Value | None, number: oir.Value) -> oir.Value | None:
    """The list of which a value is the element `number`, as a list of one."""
    spread = match.producer(value, "Unsqueeze")
    gather = match.producer(spread.inputs[0], "Gather") if spread is not None else None
    if gather is None or gather.inputs[1] is not number or match.attribute(gather, "axis", 0) != 0:
        return None
    return gather.inputs[0]


def _size(starts: oir.Value | None, ends: oir.Value | None, index: oir.Value, facts: Inference) -> int | None:
    """How far starts are apart, where they begin at 0 and end, as `ends` does, with the length of `index`."""
    cut = match.producer(ends, "Slice")
    joined = match.producer(starts, "Concat")
    if cut is None or joined is None or cut.inputs[0] is not starts or len(joined.inputs) != 2:
        return None
    given = [weights.integers(match.input_of(cut, place)) for place in (1, 2, 3, 4)]
    if given[0] != [1] or given[1] is None or given[1][0] < 2**31 - 1 or given[2] != [0] or given[3] not in (None, [1]):
        return None
    counted, length = match.producer(joined.inputs[0], "Range"), facts.integers(joined.inputs[1])
    shape = facts.shape(index)
    if counted is None or shape is None or len(shape) != 1 or length != [shape[0]]:
        return None
    first, total, step = (facts.integers(value) for value in counted.inputs)
    if first != [0] or total != [shape[0]] or step is None or not isinstance(step[0], int) or step[0] < 1:
        return None
    return step[0] if dims.divide_exactly(shape[0], step[0]) is not None else None


def _counts(value: oir.Value | None, what: oir.Value | None) -> bool:
    """Whether a number is the length of a list."""
    squeezed = match.producer(value, "Squeeze")
    shape = match.producer(squeezed.inputs[0], "Shape") if squeezed is not None else None
    return shape is not None and shape.inputs[0] is what
