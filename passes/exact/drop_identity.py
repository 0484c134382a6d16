"""Nodes that hand on their input unchanged are taken out, where that is proven for every size of the inputs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import onnx_ir as oir

from burnish.ir import edit, match, weights
from burnish.ir.dims import Dim
from burnish.ir.inference import Inference
from burnish.ir.walk import STANDARD_DOMAINS, main_graphs
from burnish.passes.base import ExactPass, Outcome


@dataclass(frozen=True)
class DropIdentity(ExactPass):
    """Take out nodes that change nothing: Identity, Dropout, casts to the same type, `+ 0`, `* 1`, empty reshapes."""

    def rewrite(self, model: oir.Model, outcome: Outcome) -> None:
        facts = Inference(model)
        for graph in main_graphs(model):
            for node in list(graph):
                test = _TESTS.get(node.op_type)
                if test is None or node.domain not in STANDARD_DOMAINS or node.graph is None:
                    continue
                source = test(facts, node)
                if source is None:
                    continue
                if not _keeps_outputs(node, source):
                    if node.op_type != "Identity":
                        outcome.skip(node, "it gives a graph output its name")
                elif outcome.take(node):
                    edit.bypass(node, source)


def _keeps_outputs(node: oir.Node, source: oir.Value) -> bool:
    """Whether the node can go without a graph losing, merging or renaming an output."""
    out = node.outputs[0]
    if not out.is_graph_output():
        return True
    return not source.is_graph_output() and source.producer() is not None and source.graph is out.graph


Test = Callable[[Inference, oir.Node], "oir.Value | None"]


def _always(facts: Inference, node: oir.Node) -> oir.Value | None:
    return node.inputs[0]


def _dropout(facts: Inference, node: oir.Node) -> oir.Value | None:
    mode, mask = match.input_of(node, 2), node.outputs[1] if len(node.outputs) > 1 else None
    if mask is not None and (mask.uses() or mask.is_graph_output()):
        return None
    training = weights.constant(mode, largest=1) if mode is not None else np.array(False)
    return node.inputs[0] if training is not None and not training.any() else None


def _same_type(facts: Inference, node: oir.Node) -> oir.Value | None:
    before, after = facts.dtype(node.inputs[0]), facts.dtype(node.outputs[0])
    return node.inputs[0] if before is not None and before == after else None


def _same_shape(facts: Inference, node: oir.Node) -> oir.Value | None:
    before, after = facts.shape(node.inputs[0]), facts.shape(node.outputs[0])
    return node.inputs[0] if before is not None and before == after else None


def _reshape(facts: Inference, node: oir.Node) -> oir.Value | None:
    return _same_shape(facts, node) if facts.content(match.input_of(node, 1)) is not None else None


def _unmoved(facts: Inference, node: oir.Node) -> oir.Value | None:
    perm, shape = match.attribute(node, "perm"), facts.shape(node.inputs[0])
    if perm is None:
        return node.inputs[0] if shape is not None and len(shape) <= 1 else None
    return node.inputs[0] if list(perm) == list(range(len(perm))) else None


def _slice(facts: Inference, node: oir.Node) -> oir.Value | None:
    steps = match.input_of(node, 4)
    if steps is not None and facts.numbers(steps) != [1] * len(facts.numbers(steps) or []):
        return None
    return _same_shape(facts, node)


def _pad(facts: Inference, node: oir.Node) -> oir.Value | None:
    pads = match.attribute(node, "pads") or facts.numbers(match.input_of(node, 1))
    return node.inputs[0] if pads and not any(pads) else None


def _single(facts: Inference, node: oir.Node) -> oir.Value | None:
    return node.inputs[0] if len(node.inputs) == 1 else None


def _neutral(number: int, *, either: bool) -> Test:
    """The other input where one is constant, all of its elements are `number`, and it does not broadcast the other."""

    def test(facts: Inference, node: oir.Node) -> oir.Value | None:
        for index, source in ((1, node.inputs[0]), (0, node.inputs[1])):
            if index == 0 and not either:
                continue
            value = node.inputs[index]
            array = weights.constant(value, largest=65536) if weights.is_constant(value) else None
            if array is None or array.size == 0 or facts.dtype(source) != facts.dtype(value):
                continue
            if (array != number).any() or (number == 0 and np.signbit(array.astype(np.float64)).any()):
                continue
            if _broadcasts_into(array.shape, facts.shape(source)):
                return source
        return None

    return test


def _broadcasts_into(shape: tuple[int, ...], whole: tuple[Dim, ...] | None) -> bool:
    if all(size == 1 for size in shape):
        return len(shape) == 0 or (whole is not None and len(whole) >= len(shape))
    if whole is None or len(shape) > len(whole):
        return False
    return all(size in (1, other) for size, other in zip(shape, whole[len(whole) - len(shape) :], strict=True))


_TESTS: dict[str, Test] = {
    "Identity": _always,
    "Dropout": _dropout,
    "Cast": _same_type,
    "CastLike": _same_type,
    "Reshape": _reshape,
    "Expand": _same_shape,
    "Tile": _same_shape,
    "Slice": _slice,
    "Flatten": _same_shape,
    "Squeeze": _same_shape,
    "Unsqueeze": _same_shape,
    "Transpose": _unmoved,
    "Pad": _pad,
    "Concat": _single,
    "Sum": _single,
    "Max": _single,
    "Min": _single,
    "Mean": _single,
    "Add": _neutral(0, either=True),
    "Sub": _neutral(0, either=False),
    "Mul": _neutral(1, either=True),
    "Div": _neutral(1, either=False),
    "Pow": _neutral(1, either=False),
    "And": _neutral(True, either=True),
    "Or": _neutral(False, either=True),
}
