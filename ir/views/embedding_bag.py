"""The view of an EmbeddingBag with weights as torch exports it: a loop that sums up one bag a time."""

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


def find_bags(node: oir.Node, facts: Inference) -> Bags | None:
    """The bags that a loop sums up one by one, where it is proven that all are of one size; else None.

    Args:
        node: a Loop that gives the sums, as TorchScript writes it, or the ConcatFromSequence of a loop's sums, as
            `torch.export` does.
        facts: what is proven of the model.
    """
    return _stacked(node, facts) if is_op(node, "Loop") else _sequence(node, facts)


def _stacked(loop: oir.Node, facts: Inference) -> Bags | None:
    (body,) = bodies(loop)
    if len(loop.inputs) != 2 or len(body.outputs) != 2 or weights.scalar(loop.inputs[1]) != 1.0:
        return None
    going = body.outputs[0]
    while (same := match.producer(going, "Identity")) is not None and same.inputs[0] is not None:
        going = same.inputs[0]
    total = match.producer(body.outputs[1], "ReduceSum")
    if total is None or match.axes_of(total) != [0] or match.attribute(total, "keepdims", 1):
        return None
    product = _product(total.inputs[0])
    if product is None:
        return None
    table, rows, weighted = product
    parts = [match.producer(value, "Slice") for value in (rows, weighted)]
    if parts[0] is None or parts[1] is None or not (going is body.inputs[1] or weights.scalar(going) == 1.0):
        return None
    first, second = (part for part in parts if part is not None)
    index, weight = first.inputs[0], second.inputs[0]
    if list(first.inputs[1:]) != list(second.inputs[1:]) or weights.integers(match.input_of(first, 3)) != [0]:
        return None
    if match.input_of(first, 4) is not None or index is None or weight is None:
        return None
    starts, ends = (_counted(first.inputs[side], body.inputs[0]) for side in (1, 2))
    cut = match.producer(ends, "Slice")
    if cut is None or cut.inputs[0] is not starts or not _counts(loop.inputs[0], ends):
        return None
    given = [weights.integers(match.input_of(cut, place)) for place in (1, 2, 3, 4)]
    if given[0] != [1] or given[1] is None or given[1][0] < 2**31 - 1 or given[2] != [0] or given[3] not in (None, [1]):
        return None
    return _bags(loop, table, index, weight, starts, facts)


def _sequence(concat: oir.Node, facts: Inference) -> Bags | None:
    loop = match.producer(concat.inputs[0], "Loop")
    if loop is None or len(loop.inputs) != 4 or loop.inputs[0] is not None or match.attribute(concat, "axis") != 0:
        return None
    if match.attribute(concat, "new_axis", 0) or loop.graph is not concat.graph:
        return None
    (body,) = bodies(loop)
    side = 0 if match.producer(loop.inputs[2], "SequenceEmpty") is not None else 1
    kept, counted = 2 + side, 3 - side
    if match.producer(loop.inputs[kept], "SequenceEmpty") is None or weights.scalar(loop.inputs[counted]) != 0.0:
        return None
    counter, made = body.inputs[counted], match.producer(body.outputs[kept - 1], "SequenceInsert")
    if made is None or len(made.inputs) != 2 or made.inputs[0] is not body.inputs[kept]:
        return None
    if concat.inputs[0] is not loop.outputs[kept - 2] or _step(body.outputs[counted - 1], counter) != 1:
        return None
    more = match.producer(body.outputs[0], "Less"), match.producer(loop.inputs[1], "Less")
    if more[0] is None or more[1] is None or more[0].inputs[0] is not body.outputs[counted - 1]:
        return None
    count = match.producer(more[0].inputs[1], "Size")
    if count is None or more[1].inputs[1] is not count.outputs[0] or weights.scalar(more[1].inputs[0]) != 0.0:
        return None
    chosen = match.producer(made.inputs[1], "If")
    empty = match.producer(chosen.inputs[0], "Equal") if chosen is not None else None
    if chosen is None or empty is None:
        return None
    # No bag is empty, so the other branch, zeros, is never taken.
    total = match.producer(chosen.attributes["else_branch"].as_graph().outputs[0], "ReduceSum")
    part = match.producer(total.inputs[0], "Slice") if total is not None else None
    if total is None or part is None or match.axes_of(total) != [0] or not match.attribute(total, "keepdims", 1):
        return None
    ends = [match.producer(value, "Slice") for value in part.inputs[1:3]]
    if len(part.inputs) != 3 or list(empty.inputs) != list(part.inputs[1:]) or ends[0] is None or ends[1] is None:
        return None
    places = [[_step(value, counter) for value in end.inputs[1:]] for end in ends if end is not None]
    if places != [[0, 1], [1, 2]] or ends[0].inputs[0] is not ends[1].inputs[0]:
        return None
    product, starts = _product(part.inputs[0]), ends[0].inputs[0]
    joined = match.producer(starts, "Concat")
    if product is None or joined is None or joined.inputs[0] is not count.inputs[0]:
        return None
    return _bags(concat, *product, starts, facts)


def _product(value: oir.Value | None) -> tuple[oir.Value, oir.Value, oir.Value] | None:
    """The table, the rows and their weights, of rows that are looked up and multiplied."""
    product = match.producer(value, "Mul")
    if product is None:
        return None
    rows, by = (match.producer(one, "Gather", "Unsqueeze") for one in product.inputs)
    if is_op(rows, "Unsqueeze"):
        rows, by = by, rows
    if rows is None or by is None or not is_op(rows, "Gather") or match.axes_of(by) != [1]:
        return None
    table, index, weight = rows.inputs[0], rows.inputs[1], by.inputs[0]
    if match.attribute(rows, "axis", 0) != 0 or table is None or index is None or weight is None:
        return None
    return table, index, weight


def _bags(
    node: oir.Node, table: oir.Value, index: oir.Value, weight: oir.Value, starts: oir.Value | None, facts: Inference
) -> Bags | None:
    found, size, shape = find_parameter(table), _size(starts, index, facts), facts.shape(weight)
    if found is None or len(found.shape) != 2 or size is None or shape is None or shape != facts.shape(index):
        return None
    if any(value.graph is not node.graph for value in (table, index, weight)):
        return None
    return Bags(table, index, weight, size, found.shape[1])


def _step(value: oir.Value | None, counter: oir.Value) -> int | None:
    """How much is added to a counter, as a number or a list of one."""
    added = 0
    while value is not None and value is not counter:
        node = match.producer(value, "Reshape", "Unsqueeze", "Identity", "Add")
        if node is None:
            return None
        if is_op(node, "Add"):
            more = node.inputs[1]
            while (cast := match.producer(more, "CastLike", "Cast")) is not None:
                more = cast.inputs[0]
            number = weights.scalar(more)
            if number is None:
                return None
            added += int(number)
        value = node.inputs[0]
    return None if value is None else added


def _counted(value: oir.Value | None, number: oir.Value) -> oir.Value | None:
    """The list of which a value is the element `number`, as a list of one."""
    spread = match.producer(value, "Unsqueeze")
    gather = match.producer(spread.inputs[0], "Gather") if spread is not None else None
    if gather is None or gather.inputs[1] is not number or match.attribute(gather, "axis", 0) != 0:
        return None
    return gather.inputs[0]


def _size(starts: oir.Value | None, index: oir.Value, facts: Inference) -> int | None:
    """How far starts are apart that begin at 0 and end with the length of `index`, a multiple of it."""
    joined = match.producer(starts, "Concat")
    counted = match.producer(joined.inputs[0], "Range") if joined is not None and len(joined.inputs) == 2 else None
    shape = facts.shape(index)
    if joined is None or counted is None or shape is None or len(shape) != 1:
        return None
    first, total, step, length = (facts.integers(value) for value in (*counted.inputs, joined.inputs[1]))
    if first != [0] or total != [shape[0]] or length != [shape[0]] or step is None:
        return None
    if not isinstance(step[0], int) or step[0] < 1 or dims.divide_exactly(shape[0], step[0]) is None:
        return None
    return step[0]


def _counts(value: oir.Value | None, what: oir.Value | None) -> bool:
    """Whether a number is the length of a list."""
    squeezed = match.producer(value, "Squeeze")
    shape = match.producer(squeezed.inputs[0], "Shape") if squeezed is not None else None
    return shape is not None and shape.inputs[0] is what
