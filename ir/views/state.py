"""States that a model takes and gives updated, other than the caches of attention layers.

What kind of state it is, is read from how the new one is made of the old: moved along (convolution), decayed and added
to (state-space models), or passed through a recurrent cell.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import onnx_ir as oir

from burnish.ir import match
from burnish.ir.inference import Inference
from burnish.ir.views.parameter import find_parameter
from burnish.ir.walk import bodies, is_op

_MOVES = (
    "Identity Cast Slice Concat Transpose Reshape Squeeze Unsqueeze Flatten Split Gather Pad ScatterND ScatterElements"
    " Where Dropout"
).split()
_CUTS = ("Slice", "Concat", "ScatterND", "ScatterElements", "Pad", "Split")
_ELEMENTWISE = ("Add", "Sub", "Mul", "Div", "Tanh", "Clip", "Min", "Max", "Neg", "Sum")
_CELLS = ("LSTM", "GRU", "RNN")
_FARTHEST = 64


@dataclass(frozen=True)
class State:
    """An input of the model that an output of the model continues.

    Attributes:
        kind: "conv-state" (the last inputs of a convolution), "ssm-state" (a linear recurrence), "rnn-state" (a
            recurrent cell), "shifted" (moved along, read by no convolution), "appended" (grows), or "kept" (unchanged).
        past, present: the input and the output.
        nodes: the nodes from the output to the input.
    """

    kind: str
    past: oir.Value
    present: oir.Value
    nodes: tuple[oir.Node, ...]


@dataclass(frozen=True)
class _Step:
    value: oir.Value
    nodes: tuple[oir.Node, ...] = ()


def states(
    model: oir.Model, facts: Inference | None = None, taken: frozenset[oir.Value] = frozenset()
) -> Iterator[State]:
    """The states of the model in the order of its inputs.

    Args:
        model: the model; not changed.
        facts: what is proven of it.
        taken: inputs and outputs that are the caches of attention layers.
    """
    known = facts if facts is not None else Inference(model)
    found = [
        (len(nodes), past, output, nodes)
        for output in model.graph.outputs
        if output not in taken
        for past, nodes in _sources(output, known)
        if past not in taken and _alike(past, output, nodes, known)
    ]
    chosen: dict[oir.Value, State] = {}
    for _, past, output, nodes in sorted(found, key=lambda one: one[0]):
        if past not in chosen and all(one.present is not output for one in chosen.values()):
            chosen[past] = State(_kind(past, nodes, known, output), past, output, nodes)
    _hidden(model, chosen, taken, known)
    yield from (chosen[value] for value in model.graph.inputs if value in chosen)


def _alike(past: oir.Value, present: oir.Value, nodes: tuple[oir.Node, ...], facts: Inference) -> bool:
    before, after = facts.shape(past), facts.shape(present)
    if facts.dtype(past) != facts.dtype(present) and facts.dtype(present) is not None:
        return False
    if before is None or after is None:
        return True
    if len(before) != len(after):
        return False
    differ = [axis for axis, pair in enumerate(zip(before, after, strict=True)) if pair[0] != pair[1]]
    numbers = all(isinstance(before[axis], int) and isinstance(after[axis], int) for axis in differ)
    return not differ or not numbers


def _sources(output: oir.Value, facts: Inference) -> Iterator[tuple[oir.Value, tuple[oir.Node, ...]]]:
    """The inputs of the model that `output` is an update of, nearest first."""
    pending, seen = [_Step(output)], {output}
    while pending:
        step = pending.pop(0)
        if step.value.is_graph_input() and step.nodes and step.value.graph is output.graph:
            yield step.value, step.nodes
        node = step.value.producer()
        if node is None or len(step.nodes) >= _FARTHEST:
            continue
        for value in _before(node, step.value, facts):
            if value not in seen:
                seen.add(value)
                pending.append(_Step(value, (*step.nodes, node)))


def _before(node: oir.Node, value: oir.Value, facts: Inference) -> list[oir.Value]:
    """The inputs of `node` that may be the state before."""
    place = list(node.outputs).index(value)
    if is_op(node, *_CELLS):
        index = 5 if place == 1 else 6 if place == 2 else -1
        given = [match.input_of(node, index)] if index > 0 else []
    elif is_op(node, "If"):
        given = [body.outputs[place] for body in bodies(node)]
    elif is_op(node, "Loop"):
        given = [match.input_of(node, place + 2)]
    elif is_op(node, "Scan"):
        count = len(node.inputs) - int(match.attribute(node, "num_scan_inputs", 0))
        given = [match.input_of(node, place)] if place < count else []
    elif is_op(node, *_MOVES):
        skipped = 1 if node.op_type == "Where" else 0
        given = list(node.inputs) if node.op_type == "Concat" else list(node.inputs[skipped : skipped + 2])
        given = given[:1] if node.op_type not in ("Concat", "Where") else given
    elif is_op(node, *_ELEMENTWISE):
        whole = facts.shape(value)
        given = [one for one in node.inputs if whole is None or facts.shape(one) in (whole, None)]
    else:
        given = []
    return [one for one in given if one is not None]


def _kind(past: oir.Value, nodes: tuple[oir.Node, ...], facts: Inference, present: oir.Value) -> str:
    ops = {node.op_type for node in nodes}
    if ops & set(_CELLS):
        return "rnn-state"
    if ops & {"Loop", "Scan", *_ELEMENTWISE}:
        return "rnn-state" if _is_multiplied(past, 0) else "ssm-state"
    if not ops & set(_CUTS):
        return "kept"
    if facts.shape(past) != facts.shape(present):
        return "appended"
    made = [past, *(node.outputs[0] for node in nodes)]
    return "conv-state" if any(_is_convolved(value, 0) for value in made) else "shifted"


def _is_multiplied(value: oir.Value, depth: int) -> bool:
    """Whether a recurrent cell or a constant matrix takes it, after movement only."""
    for node in match.readers(value):
        if is_op(node, *_CELLS):
            return True
        if is_op(node, "Gemm", "MatMul") and find_parameter(node.inputs[1]) is not None and node.inputs[0] is value:
            return True
        if depth < 8 and is_op(node, *_MOVES) and any(_is_multiplied(out, depth + 1) for out in node.outputs):
            return True
    return False


def _is_convolved(value: oir.Value, depth: int) -> bool:
    """Whether a convolution, or a product with a constant that is summed up, takes it after movement only."""
    for node in match.readers(value):
        if is_op(node, "Conv") and node.inputs[0] is value:
            return True
        if is_op(node, "Mul", "MatMul", "Einsum") and any(find_parameter(one) is not None for one in node.inputs):
            return True
        if depth < 6 and is_op(node, *_MOVES) and any(_is_convolved(out, depth + 1) for out in node.outputs):
            return True
    return False


def _hidden(model: oir.Model, chosen: dict[oir.Value, State], taken: frozenset[oir.Value], facts: Inference) -> None:
    """The hidden state of a cell that is spelled out goes through a matrix: the only pair that is left, if one is."""
    if not any(state.kind == "rnn-state" or state.kind == "ssm-state" for state in chosen.values()):
        return
    used = {*taken, *chosen, *(state.present for state in chosen.values())}
    pasts = [value for value in model.graph.inputs if value not in used and _is_multiplied(value, 0)]
    if len(pasts) != 1:
        return
    shape = facts.shape(pasts[0])
    presents = [value for value in model.graph.outputs if value not in used and facts.shape(value) == shape]
    cells = [state for state in chosen.values() if state.kind != "kept" and facts.shape(state.past) == shape]
    if len(presents) == 1 and cells:
        node = presents[0].producer()
        chosen[pasts[0]] = State("rnn-state", pasts[0], presents[0], (node,) if node is not None else ())
