"""Let ONNX Runtime's skip-normalizations add the residual that a normalization reads."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal, NamedTuple

import onnx_ir as oir

from burnish.ir import edit, match
from burnish.ir.views.norm import Norm, find_norm
from burnish.ir.views.parameter import find_parameter
from burnish.ir.walk import walk
from burnish.passes.base import ExactPass, Outcome

MICROSOFT = "com.microsoft"
_NORMS = ("LayerNormalization", "RMSNormalization", "SimplifiedLayerNormalization")


class Residual(NamedTuple):
    """The sum a normalization reads: its two terms, the constant vector added to one of them, and the Adds."""

    input: oir.Value
    skip: oir.Value
    bias: oir.Value | None
    nodes: tuple[oir.Node, ...]


@dataclass(frozen=True)
class FuseSkipNorm(ExactPass):
    """Write Add and LayerNormalization (or RMS) as SkipLayerNormalization where ONNX Runtime on CUDA is the target.

    The sum is the operator's fourth output where other nodes read it too. A bias vector added to one of the terms goes
    in as well.

    Attributes:
        target: `onnx` does nothing, and neither does `ort-cpu`, where the operator is slower than the two it joins
            (see `split-skip-norm`).
    """

    target: Literal["onnx", "ort-cpu", "ort-cuda"] = "onnx"
    needs: ClassVar[tuple[str, ...]] = ("inlined",)

    def rewrite(self, model: oir.Model, outcome: Outcome) -> None:
        """Rewrite `model` in place."""
        for node in walk(model, *_NORMS) if self.target == "ort-cuda" else ():
            norm = find_norm(node)
            add = match.producer(node.inputs[0], "Add")
            if norm is None or add is None:
                continue
            found = _refused(node, norm, add) or _residual(add)
            if isinstance(found, str):
                outcome.skip(node, found)
                continue
            if not outcome.take(node):
                return
            _replace(model, node, norm, add, found)


def _refused(node: oir.Node, norm: Norm, add: oir.Node) -> str | None:
    """Why the operator cannot do what this normalization does."""
    if norm.axes != (-1,):
        return "it normalizes more than the last axis"
    if add.graph is not node.graph:
        return "the sum is computed in another graph"
    if any(out.uses() or out.is_graph_output() for out in node.outputs[1:]):
        return "its mean or deviation is read"
    size = match.dim(node.inputs[0], -1)
    if size is None or norm.scale is None or norm.scale.shape != (size,):
        return "its gain is no vector of the size of the last axis"
    if norm.bias is not None and norm.bias.shape != (size,):
        return "its bias is no vector of the size of the last axis"
    if node.inputs[0] is None or node.inputs[0].dtype not in (oir.DataType.FLOAT, oir.DataType.FLOAT16):
        return "the operator takes 32-bit and 16-bit floats only"
    return None


def _residual(add: oir.Node) -> Residual | str:
    """The terms of the sum in the order the operator wants them, or why it does not take them."""
    total = add.outputs[0]
    if match.rank(total) not in (2, 3):
        return "the operator takes matrices, or batches of them"
    first, second = add.inputs
    if first is None or second is None or _bias(add) is not None:
        return "what is added is a constant vector"
    for term, other in ((first, second), (second, first)):
        if not _same(term, total):
            continue
        inner = match.producer(other, "Add")
        vector = _bias(inner) if inner is not None and match.used_once(other) and _same(other, total) else None
        if inner is not None and vector is not None:
            base = inner.inputs[0] if inner.inputs[1] is vector else inner.inputs[1]
            if base is not None and _same(base, total):
                return Residual(base, term, vector, (inner, add))
    for term, other in ((first, second), (second, first)):
        if _same(term, total) and _spreads(other, total):
            return Residual(term, other, None, (add,))
    return "the terms of the sum cannot be shown to have the same shape"


def _bias(add: oir.Node) -> oir.Value | None:
    """The constant vector of an Add, one number an element of the last axis."""
    pair = match.with_constant(add)
    found = find_parameter(pair[1]) if pair is not None else None
    size = match.dim(add.outputs[0], -1)
    return pair[1] if pair is not None and found is not None and size is not None and found.shape == (size,) else None


def _same(value: oir.Value, total: oir.Value) -> bool:
    """Whether both have the same shape, known in every size."""
    left, right = value.shape, total.shape
    return left is not None and right is not None and left == right and not left.has_unknown_dim()


def _spreads(value: oir.Value, total: oir.Value) -> bool:
    """Whether the operator spreads `value` over `total`: of the same shape, or the same for every batch."""
    if _same(value, total):
        return True
    left, right = value.shape, total.shape
    if left is None or right is None or len(right) != 3 or left.has_unknown_dim() or right.has_unknown_dim():
        return False
    return list(left) == [1, *right[1:]] or list(left) == list(right[1:])


def _replace(model: oir.Model, node: oir.Node, norm: Norm, add: oir.Node, found: Residual) -> None:
    simplified = norm.kind == "rms"
    inputs = [found.input, found.skip, node.inputs[1]]
    if not simplified:
        inputs.append(match.input_of(node, 2))
    inputs.append(found.bias)
    total = add.outputs[0]
    shared = total.is_graph_output() or len(total.uses()) > 1
    fused = edit.make(
        "SkipSimplifiedLayerNormalization" if simplified else "SkipLayerNormalization",
        inputs,
        {"epsilon": norm.epsilon},
        like=(*found.nodes, node),
        domain=MICROSOFT,
        outputs=4 if shared else 1,
    )
    model.graph.opset_imports.setdefault(MICROSOFT, 1)
    edit.insert_before(add, [fused])
    edit.replace_value(node.outputs[0], fused.outputs[0])
    if shared:
        for unused in fused.outputs[1:3]:
            unused.name = ""
        edit.replace_value(total, fused.outputs[3])
    edit.remove_unused([node])
    edit.remove_unused([add])
