"""What a graph does with an input: followed forward to the first operators that give its numbers a meaning.

Numbers are followed through operators that only move, compare or affinely change them. Weights are not read, only their
shapes and single numbers.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import onnx_ir as oir

from burnish.ir import match, weights
from burnish.ir.walk import is_op

LARGE = 1e3
_MOVES = frozenset(
    "Identity Reshape Unsqueeze Squeeze Expand Transpose Flatten Slice GatherND Gather Tile Split Pad Cast CastLike "
    "Dropout DepthToSpace SpaceToDepth Resize Upsample".split()
)
_LOGIC = frozenset(("And", "Or", "Xor"))
_COMPARE = frozenset(("Equal", "Greater", "Less", "GreaterOrEqual", "LessOrEqual"))
_ARITHMETIC = frozenset(("Add", "Sub", "Mul", "Div"))
_SIZES = {"Reshape": (1,), "Expand": (1,), "Tile": (1,), "Range": (0, 1, 2), "ConstantOfShape": (0,), "TopK": (1,),
          "Resize": (3,), "Slice": (1, 2, 4), "Pad": (1,), "Loop": (0,), "Split": (1,)}  # fmt: skip
# What operators say themselves of their inputs, by position, and where the table of identifiers and positions stands.
_PORTS: dict[tuple[str, str], dict[int, str]] = {
    ("", "Attention"): {3: "mask", 4: "past", 5: "past"},
    ("", "RotaryEmbedding"): {3: "positions"},
    ("", "LSTM"): {4: "lengths", 5: "state", 6: "state"},
    ("", "GRU"): {4: "lengths", 5: "state"},
    ("", "RNN"): {4: "lengths", 5: "state"},
    ("com.microsoft", "Attention"): {3: "mask", 4: "past", 5: "mask"},
    ("com.microsoft", "MultiHeadAttention"): {4: "mask", 5: "mask", 6: "past", 7: "past"},
    ("com.microsoft", "GroupQueryAttention"): {3: "past", 4: "past", 5: "ends", 6: "total"},
    ("com.microsoft", "RotaryEmbedding"): {1: "positions"},
    ("com.microsoft", "EmbedLayerNormalization"): {0: "ids", 1: "ids", 7: "mask", 8: "positions"},
    ("com.microsoft", "GatherBlockQuantized"): {1: "ids"},
}
_TABLES: dict[tuple[str, str], dict[int, int]] = {
    ("", "RotaryEmbedding"): {3: 1},
    ("com.microsoft", "RotaryEmbedding"): {1: 2},
    ("com.microsoft", "EmbedLayerNormalization"): {0: 2, 1: 4, 8: 3},
    ("com.microsoft", "GatherBlockQuantized"): {1: 0},
}


class _Trace(NamedTuple):
    """How a value still depends on an input.

    `kind`: "value" (its own numbers, moved or affinely changed), "truth" (a comparison), "term" (a mask on its way to
    the scores), "score" (added to something computed), "angle" (a position times a frequency), "grown" (concatenated).
    `flipped`: whether ones and zeros are exchanged. `shift`: what was added to an integer.
    """

    kind: str
    flipped: bool = False
    shift: int = 0
    axis: int = 0


@dataclass
class Evidence:
    found: set[str] = field(default_factory=set)
    lowest: int = 0
    rows: int | None = None
    kept: int | None = None
    equals: set[int] = field(default_factory=set)
    axis: int | None = None
    channels: int | None = None
    kernels: list[tuple[int, int]] = field(default_factory=list)

    def bound(self, kind: str, rows: int | None, shift: int) -> None:
        """Note values of `kind` that stay below `rows` once `shift` is added."""
        self.found.add(kind)
        self.lowest = max(self.lowest, -shift)
        if rows is not None:
            self.rows = rows - shift if self.rows is None else min(self.rows, rows - shift)


def links_of(model: oir.Model) -> dict[int, list[oir.Value]]:
    """What a value becomes elsewhere: outputs of branches, loop bodies and functions, by the value's identity."""
    links: dict[int, list[oir.Value]] = {}

    def join(inside: oir.Value, outside: oir.Value) -> None:
        links.setdefault(id(inside), []).append(outside)

    for node in model.graph.all_nodes():
        function = model.functions.get(node.op_identifier())
        if function is not None:
            for inside, outside in zip(function.outputs, node.outputs, strict=False):
                join(inside, outside)
        elif is_op(node, "If", "Loop"):
            skipped = 1 if node.op_type == "Loop" else 0
            for attribute in node.attributes.values():
                if attribute.type == oir.AttributeType.GRAPH:
                    for inside, outside in zip(
                        list(attribute.as_graph().outputs)[skipped:], node.outputs, strict=False
                    ):
                        join(inside, outside)
    return links


def follow(start: oir.Value, model: oir.Model, links: dict[int, list[oir.Value]]) -> Evidence:
    """Collect what is learnt about `start` from the operators it reaches."""
    evidence = Evidence()
    first = _Trace("truth" if start.dtype == oir.DataType.BOOL else "value")
    pending: list[tuple[oir.Value, _Trace]] = [(start, first)]
    seen: set[tuple[int, _Trace]] = set()
    while pending:
        value, trace = pending.pop()
        if (id(value), trace) in seen:
            continue
        seen.add((id(value), trace))
        if trace.kind == "grown" and value.is_graph_output() and match.rank(value) == match.rank(start):
            evidence.found.add("past")
            evidence.axis = trace.axis
        pending.extend((outside, trace) for outside in links.get(id(value), ()))
        for node, index in value.uses():
            function = model.functions.get(node.op_identifier())
            if function is not None:
                pending.append((function.inputs[index], trace))
            elif is_op(node, "Loop") and index >= 2:
                pending.append((node.attributes["body"].as_graph().inputs[index], trace))
            else:
                pending.extend(_step(node, index, trace, evidence, start))
    return evidence


def _step(
    node: oir.Node, index: int, trace: _Trace, evidence: Evidence, start: oir.Value
) -> Iterator[tuple[oir.Value, _Trace]]:
    """What input `index` of `node` says about `start`, and the values to follow next."""
    op = node.op_type
    _ports(node, index, trace, evidence)
    follow: _Trace | None = None
    if index in _SIZES.get(op, ()) and trace.kind == "value":
        evidence.found.add("size")
    elif op in _MOVES and index == 0:
        to_truth = op == "Cast" and match.attribute(node, "to") == oir.DataType.BOOL and trace.kind == "value"
        if to_truth:
            evidence.found.add("mask")
        follow = trace._replace(kind="truth") if to_truth else trace
    elif op in ("Gather", "GatherND", "GatherElements", "ScatterElements") and index == 1 and trace.kind == "value":
        _indexed(node, trace, evidence)
    elif op == "OneHot" and index == 0:
        depth = weights.scalar(match.input_of(node, 1))
        evidence.bound("ids", int(depth) if depth else None, trace.shift)
    elif op == "Where":
        follow = _where(node, index, trace, evidence)
    elif op == "Concat":
        joins = trace.kind == "value" and len(node.inputs) > 1 and start.dtype is not None
        grows = joins and start.dtype.is_floating_point()  # type: ignore[union-attr]
        follow = trace._replace(kind="grown", axis=int(match.attribute(node, "axis", 0))) if grows else trace
    elif op in _COMPARE:
        follow = _compared(node, index, trace, evidence)
    elif op == "Not":
        follow = trace._replace(flipped=not trace.flipped)
    elif op in _LOGIC:
        evidence.found.add("mask")
        follow = trace._replace(kind="truth")
    elif op in _ARITHMETIC:
        follow = _arithmetic(node, index, trace, evidence, start)
    elif op == "MatMul" and trace.kind == "value" and start.dtype is not None and start.dtype.is_integer():
        follow = trace._replace(kind="angle")
    elif op in ("Sin", "Cos") and trace.kind == "angle":
        evidence.found.add("positions")
    elif op == "Softmax" and trace.kind in ("term", "score"):
        evidence.found.add("mask" if trace.kind == "term" else "additive")
    elif op in ("CumSum", "ReduceSum", "ReduceMax") and trace.kind in ("value", "truth"):
        evidence.found.add("counted")
    elif op in ("Conv", "ConvTranspose") and index == 0 and trace.kind in ("value", "grown"):
        _convolved(node, evidence)
    if follow is not None:
        yield from ((output, follow) for output in node.outputs)


def _ports(node: oir.Node, index: int, trace: _Trace, evidence: Evidence) -> None:
    """Operators that say themselves what an input is."""
    domain = "" if node.domain == "ai.onnx" else node.domain
    operator = (domain, node.op_type)
    kind = _PORTS.get(operator, {}).get(index, "")
    if kind in ("ids", "positions"):
        shape = table_shape(match.input_of(node, _TABLES[operator][index]))
        evidence.bound(kind, shape[0] if shape else None, trace.shift)
    elif kind == "mask":
        added = trace.kind in ("value", "score") and _is_float(match.input_of(node, index))
        evidence.found.add("additive" if added else "mask")
        if trace.kind == "truth":
            evidence.kept = 0 if trace.flipped else 1
    elif kind and trace.kind in ("value", "grown"):
        evidence.found.add(kind)
        if kind == "past":
            evidence.axis = -2


def _indexed(node: oir.Node, trace: _Trace, evidence: Evidence) -> None:
    """An index into a table of constants is an identifier; into something computed, an index of its known size."""
    data = match.input_of(node, 0)
    axis = int(match.attribute(node, "axis", 0))
    shape = table_shape(data)
    if shape is None or node.op_type != "Gather":
        evidence.bound("index", shape[axis] if shape else match.dim(data, axis), trace.shift)
        return
    evidence.bound("ids", shape[axis], trace.shift)
    readers: list[oir.Node] = [node]
    last: list[oir.Node] = []
    for reader in readers:
        for use in (use.node for output in reader.outputs for use in output.uses()):
            (readers if is_op(use, "Unsqueeze", "Cast", "Reshape", "Squeeze", "Identity") else last).append(use)
    # Rows that only scale something computed, one term of a rotation, are the cosines and sines of positions.
    if last and all(is_op(use, "Mul") and _scales_another(use, readers) for use in last):
        evidence.found.add("positions")


def _scales_another(product: oir.Node, rows: list[oir.Node]) -> bool:
    others = [value for value in product.inputs if match.producer(value) not in rows]
    uses = product.outputs[0].uses()
    added = bool(uses) and all(is_op(use.node, "Add", "Sub") for use in uses)
    return len(others) == 1 and not weights.is_constant(others[0]) and added


def _where(node: oir.Node, index: int, trace: _Trace, evidence: Evidence) -> _Trace:
    if index != 0:
        return trace
    evidence.found.add("mask")
    for branch, truth in ((1, True), (2, False)):
        if (_number(match.input_of(node, branch)) or 0.0) <= -LARGE:
            evidence.kept = int(truth == trace.flipped)
    return trace._replace(kind="term")


def _compared(node: oir.Node, index: int, trace: _Trace, evidence: Evidence) -> _Trace | None:
    """A comparison with one number makes a truth; an equality with many is a one-hot encoding."""
    if trace.kind != "value":
        return None
    constant = match.input_of(node, 1 - index)
    number = _number(constant)
    if number is not None:
        if node.op_type == "Equal":
            evidence.equals.add(int(number) - trace.shift)
        evidence.found.add("mask")
        upwards = node.op_type.startswith("Less") == (index == 1)
        flipped = number == 0 if node.op_type == "Equal" else not upwards
        return _Trace("truth", trace.flipped != flipped)
    listed = weights.constant(constant, largest=4096)
    if node.op_type == "Equal" and listed is not None and listed.dtype.kind in "iuf":
        evidence.bound("ids", int(listed.max()) + 1, trace.shift)
        evidence.lowest = max(evidence.lowest, int(listed.min()))
    return None


def _arithmetic(node: oir.Node, index: int, trace: _Trace, evidence: Evidence, start: oir.Value) -> _Trace | None:
    op = node.op_type
    other = match.input_of(node, 1 - index)
    integer = start.dtype is not None and start.dtype.is_integer()
    if trace.kind == "score" or (trace.kind == "term" and op in ("Add", "Sub")):
        return trace if op in ("Add", "Sub") else None
    number = _number(other)
    if number is None:
        if op == "Mul" and weights.is_constant(other) and trace.kind == "value" and integer:
            return trace._replace(kind="angle")
        if op == "Mul" and trace.kind in ("value", "truth", "term"):
            evidence.found.add("scales")
        if op == "Add" and trace.kind in ("value", "grown"):
            return trace._replace(kind="score") if not integer else None
        return trace if weights.is_constant(other) and trace.kind == "value" and not integer else None
    if op == "Sub" and index == 1 and number == 1 and trace.kind in ("value", "truth"):
        evidence.found.add("complement")
        return _Trace("term", not trace.flipped)
    if op == "Mul" and abs(number) >= LARGE and (trace.kind in ("term", "truth") or number < 0):
        evidence.found.add("mask")
        evidence.kept = int((number < 0) == trace.flipped)
        return trace._replace(kind="term")
    if integer and trace.kind == "value" and op in ("Add", "Sub") and number == int(number):
        if op == "Sub" and index == 1:
            return None
        return trace._replace(shift=trace.shift + int(number if op == "Add" else -number))
    return trace if trace.kind in ("truth", "term", "angle") or not integer else trace._replace(kind="angle")


def _convolved(node: oir.Node, evidence: Evidence) -> None:
    shape = table_shape(match.input_of(node, 1))
    evidence.found.add("convolved")
    if shape is None or len(shape) < 3:
        return
    groups = int(match.attribute(node, "group", 1))
    evidence.channels = shape[1] * groups if node.op_type == "Conv" else shape[0]
    dilation = (match.attribute(node, "dilations") or (1,))[-1]
    stride = (match.attribute(node, "strides") or (1,))[-1]
    evidence.kernels.append(((shape[-1] - 1) * int(dilation) + 1, int(stride)))


def table_shape(value: oir.Value | None) -> tuple[int, ...] | None:
    """The shape of a constant, seen through casts, transposes and dequantization; None for anything computed."""
    tensor = weights.tensor_of(value)
    if tensor is not None:
        return tuple(int(d) for d in tensor.shape)  # type: ignore[arg-type]
    node = match.producer(value)
    if node is None or node.op_type not in (
        "Identity",
        "Cast",
        "CastLike",
        "Transpose",
        "DequantizeLinear",
        "QuantizeLinear",
    ):
        return None
    shape = table_shape(match.input_of(node, 0))
    if shape is None or node.op_type != "Transpose":
        return shape
    order = match.attribute(node, "perm") or tuple(reversed(range(len(shape))))
    return tuple(shape[int(axis)] for axis in order)


def _number(value: oir.Value | None) -> float | None:
    """The number in a constant of one element, seen through casts and broadcasts."""
    for _ in range(6):
        number = weights.scalar(value)
        node = match.producer(value)
        if number is not None or node is None:
            return number
        if node.op_type == "ConstantOfShape":
            filled = match.attribute(node, "value")
            return 0.0 if filled is None else float(np.asarray(filled.numpy()).reshape(-1)[0])
        if node.op_type not in ("Cast", "CastLike", "Identity", "Expand", "Unsqueeze", "Squeeze", "Reshape"):
            return None
        value = match.input_of(node, 0)
    return None


def _is_float(value: oir.Value | None) -> bool:
    return value is not None and value.dtype is not None and value.dtype.is_floating_point()
