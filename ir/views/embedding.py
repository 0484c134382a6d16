"""Tables of learnt rows that integers pick from, and the last linear layers, which may share a table.

An embedding is found by what it does, whoever's ids it looks up: words, positions or types of tokens.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import onnx_ir as oir

from burnish.ir import edit, match, weights
from burnish.ir.inference import Inference
from burnish.ir.views import heads as movement
from burnish.ir.views.attention import Miss
from burnish.ir.views.linear import Linear, find_linear
from burnish.ir.views.parameter import Parameter, find_parameter, write_input
from burnish.ir.walk import is_op, walk

_PIECE = 256
"""Rows of a table that are compared at once."""

_MOVES = ("Identity", "Cast", "Reshape", "Squeeze", "Unsqueeze", "Flatten", "Transpose", "Slice", "Expand", "Clip")


@dataclass(frozen=True)
class Embedding:
    """A table whose rows are picked by integers.

    Attributes:
        node: the Gather, EmbedLayerNormalization, or MatMul of numbers that are 1 at one place and 0 elsewhere.
        index: which input of `node` is the table.
        table: float [rows, width].
        ids: the integers that pick rows; None where the operator counts positions by itself.
        source: "input" (the integers are an input of the model), "positions" (they are counted from sizes alone), or
            "computed" (they are made of inputs in another way).
        input: that input of the model; None for the other sources.
        output: the rows that were picked, or their sum with others where the operator adds them.
    """

    node: oir.Node
    index: int
    table: Parameter
    ids: oir.Value | None
    source: str
    input: oir.Value | None
    output: oir.Value

    @property
    def rows(self) -> int:
        """Rows of the table."""
        return self.table.shape[0]

    @property
    def width(self) -> int:
        """Numbers in a row."""
        return self.table.shape[1]

    @property
    def shared(self) -> list[oir.Node]:
        """Other nodes that read the same table, at whatever step."""
        return self.table.others(self.node)

    def read(self) -> np.ndarray:
        """The table, float64 [rows, width]."""
        return self.table.read()

    def write(self, model: oir.Model, table: np.ndarray, *, everywhere: bool = False) -> None:
        """Put another table of the same width in its place; the same one changes nothing.

        Args:
            model: the model the embedding is in.
            table: float64 [rows, width]; fewer or more rows are the caller's concern.
            everywhere: for all readers of the table, such as a tied head, not for this one alone.

        Raises:
            ValueError: the table is quantized, of another width, or is not stored as it is read, with `everywhere`.
        """
        dtype = self.table.dtype
        if self.table.quantized or dtype is None:
            raise ValueError(f"the table of {match.describe(self.node)} is quantized")
        if table.ndim != 2 or table.shape[1] != self.width:
            raise ValueError(f"the table of {match.describe(self.node)} is [rows, {self.width}], not {table.shape}")
        if np.array_equal(table, self.read()):
            return
        name = self.table.source.name or "table"
        if not everywhere:
            write_input(model, self.node, self.index, table, dtype, name)
            return
        if self.table.steps:
            raise ValueError(f"the table of {match.describe(self.node)} is not stored as it is read")
        source = self.table.source
        source.replace_all_uses_with(edit.add_rounded(model, name, table, dtype))
        edit.drop_if_unused(source)


def embeddings(model: oir.Model, facts: Inference | None = None) -> Iterator[Embedding]:
    """The embeddings of all graphs of the model in order."""
    known = facts if facts is not None else Inference(model)
    for node in walk(model):
        if is_op(node, "Gather") and match.attribute(node, "axis", 0) in (0, -2):
            yield from _picked(node, 0, match.input_of(node, 1), known)
        elif is_op(node, "MatMul"):
            ids = _one_hot(node.inputs[0], known)
            if ids is not None:
                yield from _picked(node, 1, ids, known)
        elif is_op(node, "EmbedLayerNormalization", domain="com.microsoft"):
            for index, at in ((2, 0), (3, 7), (4, 1)):
                yield from _picked(node, index, match.input_of(node, at), known, counted=index == 3)


def token_embedding(model: oir.Model, facts: Inference | None = None) -> Embedding | None:
    """The embedding with the most rows of those whose ids are an input of the model; None when there is none."""
    found = [one for one in embeddings(model, facts) if one.source == "input"]
    return max(found, key=lambda one: one.rows, default=None)


def _picked(
    node: oir.Node, index: int, ids: oir.Value | None, facts: Inference, counted: bool = False
) -> Iterator[Embedding]:
    table = find_parameter(match.input_of(node, index))
    if table is None or len(table.shape) != 2 or (ids is None and not counted) or weights.is_constant(ids):
        return
    if table.dtype is None or not table.dtype.is_floating_point():
        return
    source, given = ("positions", None) if ids is None else _source(ids, facts.model)
    yield Embedding(node, index, table, ids, source, given, node.outputs[0])


def _source(ids: oir.Value, model: oir.Model) -> tuple[str, oir.Value | None]:
    """Where integers come from: as `Embedding.source`, and the input of the model."""
    value = ids
    while True:
        node = match.producer(value, *_MOVES)
        if node is None or node.inputs[0] is None:
            break
        value = node.inputs[0]
    if value.is_graph_input():
        return ("input", value) if value.graph is model.graph else ("computed", None)
    pending, seen = [value], set[oir.Value]()
    while pending:
        value = pending.pop()
        if value in seen:
            continue
        seen.add(value)
        node = value.producer()
        if value.is_graph_input():
            return "computed", None
        if node is not None and not is_op(node, "Shape", "Size"):
            pending += [one for one in node.inputs if one is not None]
    return "positions", None


def _one_hot(value: oir.Value | None, facts: Inference) -> oir.Value | None:
    """The integers behind numbers that are 1 at one place and 0 elsewhere: OneHot, or a comparison with 0, 1, 2, ..."""
    node = match.producer(value, "Cast", "OneHot", "Reshape")
    while node is not None and is_op(node, "Cast", "Reshape"):
        if is_op(node, "Reshape") and (facts.shape(node.inputs[0]) or (0,))[-1] != (facts.shape(value) or (1,))[-1]:
            return None
        value = node.inputs[0]
        node = match.producer(value, "Cast", "OneHot", "Reshape", "Equal")
        if is_op(node, "Equal"):
            break
    if node is None:
        return None
    if is_op(node, "OneHot"):
        values = weights.constant(node.inputs[2], largest=2)
        last = match.attribute(node, "axis", -1) == -1
        return node.inputs[0] if last and values is not None and values.tolist() == [0, 1] else None
    pair = match.with_constant(node)
    counted = weights.constant(pair[1], largest=1 << 20) if pair is not None else None
    shape = facts.shape(pair[0]) if pair is not None else None
    if pair is None or counted is None or not counted.ndim or not shape or shape[-1] != 1:
        return None
    return (
        pair[0]
        if np.array_equal(counted, np.arange(counted.size).reshape(counted.shape))
        and (counted.shape[-1] == counted.size)
        else None
    )


@dataclass(frozen=True)
class Head:
    """A linear layer whose result is an output of the model, but for steps that treat each number alone.

    Attributes:
        linear: the layer.
        output: the output of the model.
        nodes: the nodes from the layer to the output.
        softcap: scores are softcap * tanh(scores / softcap); 0 for none.
        embedding: the embedding with the same table; None when there is none.
        tie: "tied" (both read one table), "equal" (two tables of equal numbers), or "" for neither.
    """

    linear: Linear
    output: oir.Value
    nodes: tuple[oir.Node, ...]
    softcap: float = 0.0
    embedding: Embedding | None = None
    tie: str = ""

    @property
    def classes(self) -> int:
        """Scores that it gives."""
        return self.linear.out_features

    @property
    def width(self) -> int:
        """Features that it reads."""
        return self.linear.in_features

    def write(self, model: oir.Model, weight: np.ndarray, bias: np.ndarray | None) -> None:
        """Give the head a new weight [classes, width] and bias; a tied embedding keeps its table.

        To change both, write the embedding `everywhere`. What is the same as before is not touched.

        Raises:
            ValueError: the layer can only be read.
        """
        before = self.linear.bias()
        same = before is None if bias is None else before is not None and np.array_equal(before, bias)
        if not (same and np.array_equal(weight, self.linear.weight())):
            self.linear.write(model, weight, bias)


def heads(model: oir.Model, facts: Inference | None = None) -> Iterator[Head | Miss]:
    """The heads of the main graph by output, and for an output that is no head's the node at which that shows."""
    known = facts if facts is not None else Inference(model)
    tables = list(embeddings(model, known))
    for output in model.graph.outputs:
        found = _head(output, known)
        if isinstance(found, Head):
            embedding, tie = _tie(found.linear, tables)
            yield Head(found.linear, output, found.nodes, found.softcap, embedding, tie)
        elif found is not None:
            yield found


def _head(output: oir.Value, facts: Inference) -> Head | Miss | None:
    value, nodes, cap = output, list[oir.Node](), 0.0
    node = value.producer()
    while node is not None:
        linear = find_linear(node)
        if linear is not None and linear.output is value:
            return Head(linear, output, tuple(reversed(nodes)), cap)
        scaled = movement.scaled_by(node, facts) if is_op(node, "Mul", "Div") else None
        inner = scaled[0].producer() if scaled is not None else None
        if scaled is not None and is_op(inner, "Tanh") and inner is not None:
            nodes += [node, inner]
            source, cap = inner.inputs[0], scaled[1]
        elif scaled is not None:
            nodes.append(node)
            source = scaled[0]
        elif is_op(node, "Slice", "Gather") and not _keeps_last(node, facts):
            return Miss(node, "the output is a part of the scores of a linear layer")
        elif is_op(node, *_BEHIND):
            nodes.append(node)
            source = node.inputs[0]
        elif (whole := _softmax(node)) is not None:
            nodes += whole[1]
            source = whole[0]
        else:
            return Miss(node, f"the output comes from {node.op_type}, not from a linear layer")
        if source is None:
            return None
        value, node = source, source.producer()
    return None


def _keeps_last(node: oir.Node, facts: Inference) -> bool:
    """Whether the last axis is as long behind a node as it is before."""
    before, after = facts.shape(node.inputs[0]), facts.shape(node.outputs[0])
    return not before or (bool(after) and before[-1] == after[-1])  # type: ignore[index]


_BEHIND = (
    "Softmax LogSoftmax Sigmoid Identity Cast Reshape Squeeze Unsqueeze Flatten Transpose Slice Gather Clip".split()
)


def _softmax(node: oir.Node) -> tuple[oir.Value, list[oir.Node]] | None:
    """The input of a softmax spelled as Exp and a Div by the sum, with its nodes, the last first."""
    exp = match.producer(node.inputs[0], "Exp") if is_op(node, "Div") else None
    total = match.producer(node.inputs[1], "Reshape", "ReduceSum") if exp is not None else None
    nodes = [node]
    if total is not None and is_op(total, "Reshape"):
        nodes.append(total)
        total = match.producer(total.inputs[0], "ReduceSum")
    if exp is None or total is None or total.inputs[0] is not exp.outputs[0]:
        return None
    nodes += [total, exp]
    moved = match.producer(exp.inputs[0], "Sub")
    source = exp.inputs[0]
    if moved is not None and _is_maximum(moved.inputs[1], moved.inputs[0]):
        nodes.append(moved)
        source = moved.inputs[0]
    return (source, nodes) if source is not None else None


def _is_maximum(value: oir.Value | None, of: oir.Value | None) -> bool:
    node = match.producer(value, "Reshape", "Max", "ReduceMax")
    while node is not None and not is_op(node, "ReduceMax"):
        below = [match.producer(one, "Max", "ReduceMax") for one in node.inputs]
        node = next((one for one in below if one is not None), None)
    return node is not None and node.inputs[0] is of


def _tie(linear: Linear, tables: list[Embedding]) -> tuple[Embedding | None, str]:
    """The embedding whose table is the weight of `linear`, and how."""
    if linear.parameter is None:
        return None, ""
    for table in tables:
        if (table.rows, table.width) == (linear.out_features, linear.in_features):
            square = table.rows == table.width and not np.array_equal(table.read(), linear.weight())
            if table.table.source is linear.parameter.source and not square:
                return table, "tied"
    for table in tables:
        if (table.rows, table.width) == (linear.out_features, linear.in_features):
            if _same_numbers(table.table, linear):
                return table, "equal"
    return None, ""


def _same_numbers(table: Parameter, linear: Linear) -> bool:
    """Whether the table is the weight of `linear`; compared in pieces, as stored, where it can be."""
    weight = linear.parameter
    if weight is None or table.quantized or weight.quantized or match.attribute(linear.node, "alpha", 1.0) != 1.0:
        return False
    if table.steps or weight.steps:
        return table.dtype == weight.dtype and np.array_equal(table.read(), linear.weight())
    one, other = weights.constant(table.source), weights.constant(weight.source)
    if one is None or other is None or one.dtype != other.dtype:
        return False
    other = other.reshape(weight.shape[-2:])
    other = other if linear.stored_transposed else other.T
    pieces = range(0, one.shape[0], _PIECE)
    return one.shape == other.shape and all(
        np.array_equal(one[start : start + _PIECE], other[start : start + _PIECE]) for start in pieces
    )
