"""The data flow of one graph: which values depend on which, shapes left out, with skip-normalizations taken apart."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import onnx_ir as oir

from burnish.ir import match, weights
from burnish.ir.network import reads
from burnish.ir.walk import is_op

SKIP_NORMS = ("SkipLayerNormalization", "SkipSimplifiedLayerNormalization")

CONTRACTIONS = frozenset(
    """MatMul Gemm Conv ConvTranspose Einsum MatMulInteger ConvInteger QLinearConv QLinearMatMul DeformConv LSTM GRU RNN
    Attention FusedMatMul FusedConv FusedGemm MatMulNBits MultiHeadAttention GroupQueryAttention QAttention MoE QMoE
    DynamicQuantizeMatMul MatMulIntegerToFloat PackedAttention PackedMultiHeadAttention NhwcFusedConv""".split()
)
"""Operators that mix the elements of a tensor, nearly always with weights."""

_SIZES_ONLY = ("Shape", "Size", "ConstantOfShape", "EyeLike", "RandomNormalLike", "RandomUniformLike")
_FIRST_ONLY = ("CastLike", "Reshape", "Expand", "Tile")


@dataclass(frozen=True)
class Step:
    """A node, half of a skip-normalization, or a value that the graph is given.

    Attributes:
        node: the node; None for an input of the graph, and for a value of a graph around it.
        part: `sum` and `norm` for the halves of a skip-normalization, else empty.
        data: the values it computes with, constants and sizes left out.
        inputs: all the values it reads, None where one is absent.
        outputs: the values it computes. A sum that its skip-normalization does not put out is a value of no node.
    """

    node: oir.Node | None
    part: str
    data: tuple[oir.Value, ...]
    inputs: tuple[oir.Value | None, ...]
    outputs: tuple[oir.Value, ...]

    @property
    def op(self) -> str:
        """The operator: that of the node, `Add` for the sum of a skip-normalization, empty for an input."""
        return "" if self.node is None else "Add" if self.part == "sum" else self.node.op_type


class Flow:
    """The steps of a graph in topological order, and for each the set of steps before and behind it as bits.

    A node that reads a tensor only for its shape does not depend on it. So what all layers share (sizes that the first
    layer's input gave, masks made from them) does not tie the layers together.

    Attributes:
        graph: the graph.
        steps: the inputs of the graph, then its nodes in order, a skip-normalization as two steps.
        source: the step that computes a value, by value.
        before: for each step the steps that it depends on, as a set of bits.
        behind: for each step the steps that depend on it.
        sums: skip-normalizations by the value of their sum.
    """

    def __init__(self, graph: oir.Graph) -> None:
        self.graph = graph
        self.steps: list[Step] = []
        self.source: dict[oir.Value, int] = {}
        self.before: list[int] = []
        self.sums: dict[oir.Value, oir.Node] = {}
        self._known_sums: dict[frozenset[oir.Value], oir.Value] = {}
        for value in graph.inputs:
            if not value.is_initializer():
                self._append(Step(None, "", (), (), (value,)))
        for node in graph:
            if is_op(node, *SKIP_NORMS, domain="com.microsoft"):
                self._append_skip_norm(node)
            else:
                outputs = tuple(node.outputs)
                self._append(Step(node, "", _data(node), tuple(node.inputs), outputs))
                if is_op(node, "Add"):
                    self._known_sums.setdefault(frozenset(v for v in node.inputs if v is not None), outputs[0])
        self.behind = [0] * len(self.steps)
        for index in range(len(self.steps) - 1, -1, -1):
            for value in self.steps[index].data:
                self.behind[self.source[value]] |= self.behind[index] | 1 << index
        self._inputs = sum(1 << index for index, step in enumerate(self.steps) if step.node is None)
        self.contractions = sum(
            1 << index for index, step in enumerate(self.steps) if step.node is not None and step.op in CONTRACTIONS
        )

    def _append(self, step: Step) -> None:
        for value in step.data:
            if value not in self.source:
                self._append(Step(None, "", (), (), (value,)))
        index, before = len(self.steps), 0
        for value in step.data:
            above = self.source[value]
            before |= self.before[above] | 1 << above
        self.steps.append(step)
        self.before.append(before)
        for value in step.outputs:
            self.source[value] = index

    def _append_skip_norm(self, node: oir.Node) -> None:
        bias = match.input_of(node, 4 if node.op_type == SKIP_NORMS[0] else 3)
        terms = [value for value in (node.inputs[0], node.inputs[1], bias) if value is not None]
        total = node.outputs[3] if len(node.outputs) > 3 else None
        key = frozenset(terms)
        if total is None or (not total.uses() and not total.is_graph_output()):
            total = self._known_sums.get(key)
        if total is None:
            first = node.inputs[0]
            total = oir.Value(name=None, type=first.type if first is not None else None)
        self._known_sums.setdefault(key, total)
        if total not in self.source:
            computed = tuple(value for value in terms if not weights.is_constant(value))
            self._append(Step(node, "sum", computed, tuple(terms), (total,)))
        self.sums.setdefault(total, node)
        parameters = (node.inputs[2], match.input_of(node, 3) if node.op_type == SKIP_NORMS[0] else None)
        self._append(Step(node, "norm", (total,), (total, *parameters), tuple(node.outputs[:3])))

    def step(self, value: oir.Value) -> Step | None:
        """The step that computes `value`; None for a constant and for a value of another graph."""
        index = self.source.get(value)
        return None if index is None else self.steps[index]

    def varies(self, value: oir.Value) -> bool:
        """Whether `value` depends on what the graph is given, and not on sizes and constants alone."""
        index = self.source.get(value)
        return index is not None and bool((self.before[index] | 1 << index) & self._inputs)

    def depends(self, value: oir.Value, on: oir.Value) -> bool:
        """Whether `value` is computed from `on`, by other means than its shape."""
        below, above = self.source.get(value), self.source.get(on)
        return below is not None and above is not None and bool(self.before[below] >> above & 1)

    def between(self, entry: oir.Value, exit: oir.Value) -> int:
        """The steps from `entry`, left out, to `exit`, the step that computes it included, as a set of bits."""
        first, last = self.source[entry], self.source[exit]
        return (self.behind[first] & self.before[last]) | 1 << last

    def members(self, bits: int) -> Iterator[Step]:
        """The steps of a set, in topological order."""
        while bits:
            lowest = bits & -bits
            yield self.steps[lowest.bit_length() - 1]
            bits ^= lowest


def _data(node: oir.Node) -> tuple[oir.Value, ...]:
    values: Sequence[oir.Value] = reads(node)
    if is_op(node, *_SIZES_ONLY):
        return ()
    if is_op(node, *_FIRST_ONLY):
        values = [value for value in node.inputs[:1] if value is not None]
    return tuple(value for value in values if not weights.is_constant(value))


class Flows:
    """The flows of the graphs of one model, each made once; the model must not be changed meanwhile."""

    def __init__(self) -> None:
        self._known: dict[oir.Graph, Flow] = {}

    def around(self, node: oir.Node) -> Flow:
        """The flow of the graph that holds `node`."""
        graph = node.graph
        assert isinstance(graph, oir.Graph)
        if graph not in self._known:
            self._known[graph] = Flow(graph)
        return self._known[graph]
