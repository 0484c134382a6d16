"""Every value gets the type and shape that follow from the graph's inputs; wrong declared shapes are corrected."""

from __future__ import annotations

from dataclasses import dataclass

import onnx_ir as oir

from burnish.ir import dims, origin
from burnish.ir.inference import Inference, Shape
from burnish.ir.walk import STANDARD_DOMAINS, main_graphs
from burnish.passes.base import ExactPass, Outcome


@dataclass(frozen=True)
class InferTypes(ExactPass):
    """Infer the type and the symbolic shape of every value, and correct declared shapes that are wrong."""

    def rewrite(self, model: oir.Model, outcome: Outcome) -> None:
        origin.note_annotations(model)
        facts = Inference(model)
        for graph in main_graphs(model):
            for node in graph:
                if node.domain in STANDARD_DOMAINS:
                    self._write(facts, node, outcome)

    def _write(self, facts: Inference, node: oir.Node, outcome: Outcome) -> None:
        found = []
        for out in node.outputs:
            if not out.name:
                continue
            dtype, shape = facts.dtype(out), facts.shape(out)
            wanted = _merged(out, shape) if shape is not None else out.shape
            wrong_type = dtype is not None and isinstance(out.type, oir.TensorType | None) and out.dtype != dtype
            if wrong_type or not _same(out.shape, wanted):
                found.append((out, dtype if wrong_type else None, wanted))
        if not found or not outcome.take(node):
            return
        for out, dtype, wanted in found:
            if dtype is not None:
                out.type = oir.TensorType(dtype)
            out.shape = wanted


def _merged(value: oir.Value, shape: Shape) -> oir.Shape:
    """The proven sizes; a graph output keeps the sizes it declares unless they are proven wrong."""
    declared = value.shape if value.is_graph_output() and value.shape is not None else None
    if declared is None or len(declared) != len(shape):
        return oir.Shape([_size(size) for size in shape])
    kept = [
        size if isinstance(size, int) and isinstance(old, int) and size != old else old
        for size, old in zip(shape, declared, strict=True)
    ]
    return oir.Shape(kept)


def _size(size: dims.Dim) -> int | str | None:
    return size if isinstance(size, int) else str(size) if dims.is_named(size) else None


def _same(left: oir.Shape | None, right: oir.Shape | None) -> bool:
    if left is None or right is None:
        return left is right
    return len(left) == len(right) and all(_text(a) == _text(b) for a, b in zip(left, right, strict=True))


def _text(size: int | oir.SymbolicDim) -> int | str | None:
    return size if isinstance(size, int) else size.value
