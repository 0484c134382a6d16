"""Fold the projection of a codebook, and search it with one product."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_ir as oir

from burnish.ir import edit, match, weights
from burnish.ir.views.affine import LAYOUT
from burnish.ir.views.codebook import Search, find_search, lookups
from burnish.ir.views.parameter import find_parameter, fits
from burnish.ir.walk import walk
from burnish.passes.base import ExactPass, Outcome


@dataclass(frozen=True)
class FoldCodebook(ExactPass):
    """Fold a constant codebook times a constant projection, search it with one product and ArgMax (SimVQ).

    Of `argmin |z|^2 + |e|^2 - 2 z e` the first term is the same for every code: `argmax z e - |e|^2 / 2`.
    Indices can differ where two codes are equally near to within rounding. The straight-through `z + (q - z)` of
    training becomes `q`.
    """

    needs: ClassVar[tuple[str, ...]] = ("inlined",)

    def rewrite(self, model: oir.Model, outcome: Outcome) -> None:
        """See the class."""
        for step in (_fold_projections, _rewrite_searches, _drop_straight_through):
            if not step(model, outcome):
                return


def _fold_projections(model: oir.Model, outcome: Outcome) -> bool:
    for node in walk(model, "MatMul", "Gemm", "Add"):
        found = [find_parameter(value) for value in node.inputs]
        parts = [one for one in found if one is not None]
        if node.graph is None or len(parts) != len(node.inputs) or any(one.quantized for one in parts):
            continue
        dtype = parts[0].dtype
        arrays = [one.read() for one in parts]
        if dtype is None or not dtype.is_floating_point() or (node.op_type == "Add" and arrays[0].size < 2):
            continue
        left, right = arrays[:2]
        if node.op_type == "Gemm":
            left = left.T if match.attribute(node, "transA", 0) else left
            right = right.T if match.attribute(node, "transB", 0) else right
            result = float(match.attribute(node, "alpha", 1.0)) * (left @ right)
            result = result + float(match.attribute(node, "beta", 1.0)) * (arrays[2] if len(arrays) > 2 else 0.0)
        else:
            result = left @ right if node.op_type == "MatMul" else left + right
        largest = max(parts, key=lambda one: int(np.prod(one.shape)))
        if result.size > int(np.prod(largest.shape)):
            outcome.skip(node, "the product is larger than the codebook", matched=False)
        elif others := largest.others(node):
            outcome.skip(node, f"{others[0].op_type} reads the codebook without the projection")
        elif not fits(result, dtype):
            outcome.skip(node, f"the product does not fit {dtype.name.lower()}")
        elif not outcome.take(node):
            return False
        else:
            edit.replace_value(
                node.outputs[0], edit.add_rounded(model, largest.source.name or "codebook", result, dtype)
            )
            edit.remove_unused([node])
    return True


def _rewrite_searches(model: oir.Model, outcome: Outcome) -> bool:
    for node in walk(model, "ArgMin", "ArgMax"):
        search = find_search(node)
        if search is None:
            continue
        bias = search.bias()
        if node.op_type == "ArgMax" and search.is_plain:
            continue
        if not fits(bias, search.dtype):
            outcome.skip(node, "the norms of the codes do not fit the dtype")
        elif not outcome.take(node):
            return False
        else:
            _write_search(model, node, search, bias)
    return True


def _write_search(model: oir.Model, node: oir.Node, search: Search, bias: np.ndarray) -> None:
    rank = match.rank(search.query)
    stem = search.codes.source.name or "codebook"
    norms = edit.add_rounded(model, f"{stem}_norms", bias, search.dtype)
    tables = [found.inputs[0] for found in lookups(node, search)]
    table = tables[0] if tables else None
    like = [*search.nodes, node]
    new: list[oir.Node] = []
    if rank == 2:
        value, transposed = (table, 1) if table is not None else (search.codes.value, int(not search.codes_last))
        new.append(edit.make("Gemm", [search.query, value, norms], {"transB": transposed or None}, like=like))
    else:
        value = search.codes.value
        if not search.codes_last:
            turned = edit.add_rounded(model, f"{stem}_turned", search.codes.read().T, search.dtype)
            value = turned
        new.append(edit.make("MatMul", [search.query, value], like=like))
        new.append(edit.make("Add", [new[0].outputs[0], norms], like=like))
    for one in new:
        one.outputs[0].type = oir.TensorType(search.dtype)
        if search.query.shape is not None:
            one.outputs[0].shape = oir.Shape([*search.query.shape[:-1], bias.size])
    attributes = {name: one for name, one in node.attributes.items()}
    best = edit.make("ArgMax", [new[-1].outputs[0]], attributes, like=like)
    edit.replace_node(node, [*new, best])


def _drop_straight_through(model: oir.Model, outcome: Outcome) -> bool:
    for node in walk(model, "Add"):
        pair = match.operand(node, "Sub")
        if pair is None or pair[0].inputs[1] is not pair[1] or pair[0].inputs[0] is None:
            continue
        quantized, source = pair[0].inputs[0], pair[0].inputs[0]
        while (above := match.producer(source, *LAYOUT)) is not None and above.inputs[0] is not None:
            source = above.inputs[0]
        gather = match.producer(source, "Gather")
        if gather is None or not weights.is_constant(gather.inputs[0]):
            continue
        shape = _gathered(gather) if source is quantized else quantized.shape
        if shape is None or shape != pair[1].shape or shape.has_unknown_dim():
            outcome.skip(node, "the shapes of the input and of the code are not known to be equal")
        elif not outcome.take(node):
            return False
        else:
            quantized.shape = shape
            edit.bypass(node, quantized)
    return True


def _gathered(gather: oir.Node) -> oir.Shape | None:
    """The shape of a Gather's result, from its table and indices."""
    table, indices = gather.inputs
    if match.attribute(gather, "axis", 0) != 0 or table is None or indices is None:
        return None
    if table.shape is None or indices.shape is None:
        return None
    return oir.Shape([*indices.shape, *table.shape[1:]])
