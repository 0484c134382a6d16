"""Matrices that weights of few bits can take the place of: each with all that reads it, or why it stays."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import onnx_ir as oir

from burnish.ir import match
from burnish.ir.inference import Inference
from burnish.ir.views.embedding import Head, embeddings, heads
from burnish.ir.views.linear import Linear, find_linear, linears
from burnish.ir.views.parameter import Parameter, find_parameter
from burnish.ir.walk import is_op, walk
from burnish.passes.layers import layers, others, unusable
from burnish.passes.rotation import ROTATED

LEAST_BLOCK = 16
"""The smallest block of ONNX Runtime's kernels; blocks are powers of two."""

_STORED = (oir.DataType.FLOAT, oir.DataType.FLOAT16)


@dataclass(frozen=True)
class Table:
    """A Gather of rows of a constant matrix by computed integers."""

    node: oir.Node
    parameter: Parameter

    @property
    def nodes(self) -> tuple[oir.Node, ...]:
        """The nodes it consists of."""
        return (self.node,)


@dataclass(frozen=True)
class Matrix:
    """A constant matrix and what reads it.

    Attributes:
        linears: layers that multiply by it.
        tables: lookups of its rows, which are the outputs of the layers.
    """

    linears: tuple[Linear, ...]
    tables: tuple[Table, ...] = ()

    @property
    def readers(self) -> tuple[Linear | Table, ...]:
        """All layers and lookups."""
        return (*self.linears, *self.tables)

    @property
    def parameter(self) -> Parameter:
        """The constant, as the first reader reads it."""
        found = self.readers[0].parameter
        assert found is not None
        return found

    @property
    def dtype(self) -> oir.DataType | None:
        """The dtype of the numbers."""
        return self.parameter.dtype

    @property
    def shape(self) -> tuple[int, int]:
        """Outputs and inputs; rows and width of a table."""
        first = self.readers[0]
        if isinstance(first, Linear):
            return first.out_features, first.in_features
        rows, width = first.parameter.shape
        return rows, width

    def weight(self) -> np.ndarray:
        """The numbers, float64 [out, in]: [rows, width] of a table."""
        first = self.readers[0]
        return first.weight() if isinstance(first, Linear) else first.parameter.read()


def find_table(node: oir.Node) -> Table | None:
    """The lookup that a Gather is; None for any other node, and for a Gather along other axes."""
    parameter = find_parameter(node.inputs[0]) if is_op(node, "Gather") else None
    if parameter is None or len(parameter.shape) != 2 or match.attribute(node, "axis", 0) not in (0, -2):
        return None
    return Table(node, parameter)


def found_again(nodes: dict[str, oir.Node], names: tuple[str, ...]) -> Matrix:
    """The matrix that the nodes of these names read."""
    linears = [layer for name in names if (layer := find_linear(nodes[name])) is not None]
    tables = [table for name in names if (table := find_table(nodes[name])) is not None]
    return Matrix(tuple(linears), tuple(tables))


def before_heads(model: oir.Model) -> tuple[set[oir.Node], set[oir.Node]]:
    """The linear layers that are heads, and those whose result heads alone read."""
    ends = {one.linear.node for one in heads(model) if isinstance(one, Head)}
    readers = {layer.node: {use.node for use in layer.output.uses()} for layer in linears(model)}
    return ends, {node for node, own in readers.items() if own and own <= ends}


def matrices(model: oir.Model) -> Iterator[tuple[str, Matrix | str, oir.Node]]:
    """The matrices of linear layers and of embeddings in the order of the layers, each with the name of its first
    reader; or why it cannot be stored otherwise, in plain words, with the node to say it of.
    """
    facts = Inference(model)
    named = {name: one for name, one in layers(model).items() if isinstance(one, Linear)}
    found: dict[int, tuple[str, list[Linear], list[Table]]] = {}
    for name, layer in named.items():
        if layer.parameter is None:
            yield name, f"its weight is held by a {layer.node.op_type} already", layer.node
        else:
            found.setdefault(id(layer.parameter.source), (name, [], []))[1].append(layer)
    for one in embeddings(model, facts):
        if one.node.op_type == "Gather":
            name = str(one.node.name or one.output.name)
            found.setdefault(id(one.table.source), (name, [], []))[2].append(Table(one.node, one.table))
        elif one.node.op_type != "MatMul":
            yield str(one.node.name), f"{one.node.op_type} reads its table itself", one.node
    for node in walk(model, "Gather"):
        stacked = find_parameter(node.inputs[0])
        if stacked is not None and len(stacked.shape) > 2 and stacked.dtype in _STORED:
            yield str(node.name), "it looks up matrices; only rows of a table are stored in blocks", node
    for node, why in others(model):
        yield str(node.name), why, node
    for node in walk(model, "LSTM", "GRU", "RNN"):
        kernel = "; `quantize-dynamic` has a kernel" if node.op_type == "LSTM" else ""
        yield str(node.name), f"no kernel reads weights of {node.op_type} in blocks{kernel}", node
    before = before_heads(model)[1] if ROTATED in model.metadata_props else set()
    for name, own, tables in found.values():
        matrix = Matrix(tuple(own), tuple(tables))
        reason = refusal(matrix, facts)
        if reason is None and matrix.shape[0] == matrix.shape[1] and any(one.node in before for one in own):
            reason = "it is the gain that a rotated stream has before its head, and its error would be in all scores"
        yield name, reason or matrix, matrix.readers[0].node


def refusal(matrix: Matrix, facts: Inference) -> str | None:
    """Why a matrix cannot be stored as integers, in plain words; None when it can."""
    nodes = {id(one.node) for one in matrix.readers}
    steps = {id(step) for one in matrix.readers if one.parameter is not None for step in one.parameter.steps}
    for one in matrix.readers:
        assert one.parameter is not None
        if one.parameter.quantized:
            return "its weight is quantized already"
        hidden = [step for step in one.parameter.steps if not is_op(step, "Transpose", "Identity")]
        if hidden:
            return f"its weight lies behind a {hidden[0].op_type}"
        others = [node for node in one.parameter.others(one.node) if id(node) not in nodes | steps]
        if others:
            return f"{others[0].op_type} shares the weight"
    if matrix.dtype not in _STORED:
        return "its weight is not float32 or float16"
    if (reason := unusable(matrix.parameter)) is not None:
        return reason
    for layer in matrix.linears:
        if layer.read_only is not None:
            return layer.read_only
        if _adds_offsets(layer):
            return "it adds the offsets of a matrix that is stored in few bits"
        if layer.input_axis != -1:
            return "its input is transposed"
        rank = match.rank(layer.input) or len(facts.shape(layer.input) or ())
        if rank < 2:
            return "its input is a vector" if rank else "it is not known how many axes its input has"
    alone = [Matrix((one,)) if isinstance(one, Linear) else Matrix((), (one,)) for one in matrix.readers]
    first = alone[0].weight() if len(alone) > 1 else None
    if any(not np.array_equal(first, one.weight()) for one in alone[1:] if first is not None):
        return "its weight is read in two ways"
    return None


def _adds_offsets(layer: Linear) -> bool:
    """Whether a layer multiplies sums of blocks for a matrix of integers, see `packed_layers`."""
    beside = [value for use in layer.output.uses() if is_op(use.node, "Add") for value in use.node.inputs]
    stored = any(
        value is not None and is_op(value.producer(), "MatMulNBits", domain="com.microsoft") for value in beside
    )
    return stored and is_op(layer.input.producer(), "ReduceSum")
