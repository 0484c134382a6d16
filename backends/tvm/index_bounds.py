"""Which numbers integer inputs may hold because they pick rows: compiled code does not look, and would pick others."""

from __future__ import annotations

import onnx_ir as oir

from burnish.ir import match
from burnish.ir.inference import Inference

_KEEPING = ("Identity", "Reshape", "Squeeze", "Unsqueeze", "Flatten", "Transpose", "Cast")
"""Operators behind which every element of the first input is still there."""
_WIDE = (oir.DataType.INT64, oir.DataType.INT32)


def bounds(model: oir.Model) -> dict[str, tuple[int, int]]:
    """The lowest and the highest number that each input may hold, by name; only inputs that have such.

    These are inputs all of whose elements are indices of a `Gather` from an axis of a known size n: from -n to n - 1,
    as the standard has it. What is computed before it picks is not bounded by this.
    """
    facts = Inference(model)
    found: dict[str, tuple[int, int]] = {}
    for value in model.graph.inputs:
        if value.const_value is None and value.dtype in _WIDE:
            sizes = _picked_from(value, facts)
            if sizes:
                found[str(value.name)] = (-min(sizes), min(sizes) - 1)
    return found


def _picked_from(value: oir.Value, facts: Inference) -> list[int]:
    """The sizes of the axes that a value's elements pick from, in the graph that it belongs to."""
    sizes: list[int] = []
    waiting, seen = [value], {value}
    while waiting:
        for use in waiting.pop().uses():
            node, out = use.node, use.node.outputs[0]
            if node.domain not in ("", "ai.onnx") or node.graph is not value.graph:
                continue
            if node.op_type == "Gather" and use.idx == 1:
                shape = facts.shape(node.inputs[0]) if node.inputs[0] is not None else None
                axis = match.attribute(node, "axis", 0)
                size = shape[axis] if shape is not None else None
                if isinstance(size, int):
                    sizes.append(size)
            elif node.op_type in _KEEPING and use.idx == 0 and out not in seen:
                if node.op_type != "Cast" or facts.dtype(out) in _WIDE:
                    seen.add(out)
                    waiting.append(out)
    return sizes
