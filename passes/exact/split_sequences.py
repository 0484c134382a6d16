"""Sequences of parts that are taken out again at fixed positions."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as oir

from burnish.ir import edit, match, weights
from burnish.ir.inference import Inference
from burnish.ir.walk import is_op, walk
from burnish.passes.base import ExactPass, Outcome


@dataclass(frozen=True)
class SplitSequences(ExactPass):
    """Write Split for a SplitToSequence whose parts are read one by one at positions that are known."""

    def rewrite(self, model: oir.Model, outcome: Outcome) -> None:
        """Rewrite `model` in place."""
        facts = Inference(model)
        for node in walk(model, "SplitToSequence"):
            sizes = _sizes(node, facts)
            if isinstance(sizes, str):
                outcome.skip(node, sizes)
                continue
            readers = match.consumers(node.outputs[0])
            places = [weights.scalar(one.inputs[1]) if is_op(one, "SequenceAt") else None for one in readers]
            known = [int(place) for place in places if place is not None]
            if node.outputs[0].is_graph_output() or len(known) < len(places) or node.graph is None:
                outcome.skip(node, "its parts are not all read at fixed positions")
            elif any(not -len(sizes) <= place < len(sizes) for place in known):
                outcome.skip(node, "a part is read that it does not have")
            elif outcome.take(node):
                _write(model, node, sizes, dict(zip(readers, known, strict=True)), facts)
                facts = Inference(model)  # nothing was known of what the parts of a sequence are computed into


def _sizes(node: oir.Node, facts: Inference) -> list[int] | str:
    """The sizes of the parts, or in plain words why they are not known."""
    shape = facts.shape(node.inputs[0])
    if shape is None:
        return "the rank of what it splits is not known"
    size = shape[match.attribute(node, "axis", 0) % len(shape)]
    given = match.input_of(node, 1)
    if given is None:
        return "its parts lose an axis" if not match.attribute(node, "keepdims", 1) else _equal(size, 1)
    numbers = facts.numbers(given)
    scalar = facts.shape(given) == ()
    if not numbers:
        return "the sizes of its parts are computed"
    return _equal(size, numbers[0]) if scalar else numbers


def _equal(size: object, part: int) -> list[int] | str:
    if not isinstance(size, int) or part < 1:
        return "the number of its parts is not known"
    return [min(part, size - start) for start in range(0, size, part)]


def _write(model: oir.Model, node: oir.Node, sizes: list[int], readers: dict[oir.Node, int], facts: Inference) -> None:
    axis = match.attribute(node, "axis", 0)
    inputs, attributes = [node.inputs[0]], {"axis": axis}
    if facts.opset >= 13:
        inputs.append(edit.add_constant(model, "parts", np.array(sizes, np.int64)))
    else:
        attributes["split"] = sizes
    split = edit.make("Split", inputs, attributes, like=node, outputs=len(sizes))
    edit.insert_before(node, [split])
    facts.follow(split)
    for reader, place in readers.items():
        edit.replace_value(reader.outputs[0], split.outputs[place])
    edit.remove_unused(list(readers))
