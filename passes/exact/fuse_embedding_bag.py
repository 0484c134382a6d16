"""Sum up looked-up rows, each times a weight, as one product."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_ir as oir

from burnish.ir import edit, match
from burnish.ir.inference import Inference
from burnish.ir.views.embedding_bag import Bags, find_bags
from burnish.ir.views.parameter import find_parameter
from burnish.ir.walk import walk
from burnish.passes.base import ExactPass, Outcome


@dataclass(frozen=True)
class _Bag:
    """The sum of `rows` [lead, summed, width] times `by` [lead, summed] or [lead, summed, 1] over the summed axes."""

    rows: oir.Value
    by: oir.Value
    summed: int
    keeps: bool = False


@dataclass(frozen=True)
class FuseEmbeddingBag(ExactPass):
    """Write the weighted sum of rows of a table (Mul and ReduceSum, Einsum, or a loop over bags) as one MatMul.

    The rows times their weights, as large as all rows that are looked up, are never written to memory. torch writes
    an EmbeddingBag as a loop, which goes where all bags are proven to be of one size.
    """

    needs: ClassVar[tuple[str, ...]] = ("inlined",)

    def rewrite(self, model: oir.Model, outcome: Outcome) -> None:
        """See the class."""
        facts = Inference(model)
        for node in walk(model, "Loop", "ConcatFromSequence"):
            bags = find_bags(node, facts) if node.graph is model.graph else None
            if bags is None:
                continue
            if not outcome.take(node):
                return
            _write_bags(model, node, bags, facts)
        for node in walk(model, "ReduceSum", "Einsum"):
            found = next(_bags(node), None) if node.graph is not None else None
            if found is None:
                continue
            shape, weight = facts.shape(found.rows), facts.shape(found.by)
            if shape is None or weight is None:
                outcome.skip(node, "how many axes its rows have is not known")
                continue
            lead = len(shape) - 1 - found.summed
            sizes = [size for size in shape[lead:] if isinstance(size, int) and size > 0]
            plain = weight[:-1] if len(weight) == len(shape) else weight
            if lead < 0 or plain != shape[:-1]:
                outcome.skip(node, "its weights are not one for each row")
            elif len(sizes) != len(shape) - lead:
                outcome.skip(node, "how many rows are summed up is not constant")
            elif not outcome.take(node):
                return
            else:
                _write(model, node, found, lead, int(np.prod(sizes[:-1])), facts)


def _bags(node: oir.Node) -> Iterator[_Bag]:
    """What a node sums up, when it is rows of a constant table times other values."""
    if node.op_type == "Einsum":
        yield from _einsum(node)
        return
    rank, axes = match.rank(node.inputs[0]), match.axes_of(node)
    product = match.producer(node.inputs[0], "Mul")
    if product is None or rank is None or not axes or not match.used_once(product.outputs[0]):
        return
    summed = sorted(axis % rank for axis in axes)
    if summed != list(range(rank - 1 - len(summed), rank - 1)):
        return
    for rows, by in (product.inputs, product.inputs[::-1]):
        if _is_looked_up(rows) and match.rank(rows) == rank and match.rank(by) == rank and match.dim(by, -1) == 1:
            yield _Bag(rows, by, len(summed), bool(match.attribute(node, "keepdims", 1)))  # type: ignore[arg-type]


def _einsum(node: oir.Node) -> Iterator[_Bag]:
    read, _, out = str(match.attribute(node, "equation", "")).replace(" ", "").partition("->")
    terms = read.split(",")
    if len(terms) != 2 or "." in read or len(node.inputs) != 2:
        return
    for rows, by in ((0, 1), (1, 0)):
        letters, lead = terms[rows], out[:-1]
        distinct = len(set(letters)) == len(letters)
        if distinct and terms[by] == letters[:-1] and letters.startswith(lead) and out == lead + letters[-1]:
            if len(lead) < len(letters) - 1 and _is_looked_up(node.inputs[rows]):
                yield _Bag(node.inputs[rows], node.inputs[by], len(letters) - 1 - len(lead))  # type: ignore[arg-type]


def _is_looked_up(value: oir.Value | None) -> bool:
    gather = match.producer(value, "Gather") or match.producer(value, "GatherBlockQuantized", domain="com.microsoft")
    if gather is None or match.attribute(gather, "axis", 0) != 0 or match.attribute(gather, "gather_axis", 0) != 0:
        return False
    table = find_parameter(gather.inputs[0])
    return table is not None and len(table.shape) == 2


def _write_bags(model: oir.Model, node: oir.Node, bags: Bags, facts: Inference) -> None:
    new: list[oir.Node] = []

    def reshaped(value: oir.Value, stem: str, *sizes: int) -> oir.Value:
        target = edit.add_constant(model, stem, np.array(sizes, np.int64))
        new.append(edit.make("Reshape", [value, target], like=node))
        return new[-1].outputs[0]

    index, by = reshaped(bags.index, "bags_shape", -1, bags.size), reshaped(bags.by, "weights_shape", -1, 1, bags.size)
    rows = edit.make("Gather", [bags.table, index], {"axis": 0}, like=node)
    product = edit.make("MatMul", [by, rows.outputs[0]], like=node)
    new += [rows, product]
    result = reshaped(product.outputs[0], "sum_shape", -1, bags.width)
    edit.insert_before(node, new)
    for one in new:
        facts.follow(one)
    edit.replace_value(node.outputs[0], result)
    edit.remove_unused([node])


def _write(model: oir.Model, node: oir.Node, found: _Bag, lead: int, count: int, facts: Inference) -> None:
    width = int(facts.shape(found.rows)[-1])  # type: ignore[index, arg-type]
    new: list[oir.Node] = []

    def add(op_type: str, *inputs: oir.Value) -> oir.Value:
        new.append(edit.make(op_type, inputs, like=node))
        return new[-1].outputs[0]

    def reshaped(value: oir.Value, stem: str, *sizes: int) -> oir.Value:
        target = edit.add_constant(model, stem, np.array([*[0] * lead, *sizes], np.int64))
        return add("Reshape", value, target)

    by = found.by
    while (move := match.producer(by, "Reshape", "Unsqueeze", "Squeeze")) is not None:
        before, after = facts.shape(move.inputs[0]), facts.shape(by)
        if before is None or after is None or before[:lead] != after[:lead] or move.inputs[0] is None:
            break
        by = move.inputs[0]
    rows = reshaped(found.rows, "rows_shape", count, width) if found.summed > 1 else found.rows
    result = add("MatMul", reshaped(by, "weights_shape", 1, count), rows)
    if not found.keeps or found.summed > 1:
        result = reshaped(result, "sum_shape", *[1] * (found.summed if found.keeps else 0), width)
    edit.insert_before(node, new)
    for one in new:
        facts.follow(one)
    edit.replace_value(node.outputs[0], result)
    edit.remove_unused([node])
