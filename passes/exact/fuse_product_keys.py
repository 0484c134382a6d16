"""Look for the best pairs of a product-key lookup among those that can be best."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np
import onnx_ir as oir

from burnish.ir import edit, match
from burnish.ir.inference import Inference
from burnish.ir.views.attention import Miss
from burnish.ir.views.product_keys import ProductKeys, best_pairs, product_keys
from burnish.passes.base import ExactPass, Outcome

_LEAST = 2
"""So many times as many pairs have to be there as can be best."""


@dataclass(frozen=True)
class FuseProductKeys(ExactPass):
    """Look up the rows of a product-key memory for the best pairs alone, and add only the pairs that can be best.

    Of two sorted lists, pair (i, j) can be among the k largest sums only where (i + 1) (j + 1) <= k, counted from 0:
    119 of 1024 pairs for k = 32. Ties come out as before: TopK takes the first of equal sums.

    Attributes:
        target: `ort-cpu` adds only those pairs, by one product with a constant of zeros and ones, in which sums of
            finite scores are exact. Elsewhere a product may round its inputs (TF32), so all pairs are added.
    """

    target: Literal["onnx", "ort-cpu", "ort-cuda"] = "onnx"
    needs: ClassVar[tuple[str, ...]] = ("inlined",)

    def rewrite(self, model: oir.Model, outcome: Outcome) -> None:
        """See the class."""
        facts = Inference(model)
        for found in list(product_keys(model, facts)):
            if isinstance(found, Miss):
                outcome.skip(found.anchor, found.reason)
                continue
            cut = self._pairs(found, facts, outcome)
            late = found.rows is not None and not found.rows.late
            if cut is None and not late:
                continue
            if not outcome.take(found.anchor):
                return
            _write(model, found, cut, facts)

    def _pairs(self, found: ProductKeys, facts: Inference, outcome: Outcome) -> np.ndarray | None:
        """The pairs to add in the place of all; None to add all."""
        if self.target != "ort-cpu":
            return None
        chosen = best_pairs(*found.lists, found.kept)
        if _LEAST * len(chosen) > found.lists[0] * found.lists[1]:
            outcome.skip(found.anchor, f"{len(chosen)} of {found.lists[0] * found.lists[1]} pairs can be best")
        elif any(one.parameter is None or not one.parameter.finite for one in (found.outer, found.inner)):
            outcome.skip(found.anchor, "its scores are no products with constant keys, and could be infinite")
        elif facts.dtype(found.pairs) not in (oir.DataType.FLOAT, oir.DataType.DOUBLE):
            outcome.skip(found.anchor, "its scores are not float32 or float64")
        else:
            return chosen
        return None


def _write(model: oir.Model, found: ProductKeys, cut: np.ndarray | None, facts: Inference) -> None:
    anchor, rows, (first, second) = found.anchor, found.rows, found.lists
    stem = anchor.name or "pairs"

    def add(op_type: str, inputs: list[oir.Value], attributes: dict[str, object] | None = None) -> oir.Value:
        node = edit.make(op_type, inputs, attributes, like=anchor)
        new.append(node)
        return node.outputs[0]

    def follow(before: oir.Node) -> None:
        edit.insert_before(before, new)
        for node in new:
            facts.follow(node)
        new.clear()

    new: list[oir.Node] = []
    at = anchor.outputs[1]
    if cut is not None:
        dtype = facts.dtype(found.pairs) or oir.DataType.FLOAT
        choice = np.zeros((first + second, len(cut)))
        choice[cut[:, 0], np.arange(len(cut))] = choice[first + cut[:, 1], np.arange(len(cut))] = 1.0
        both = add("Concat", [found.outer.values, found.inner.values], {"axis": -1})
        add("MatMul", [both, edit.add_rounded(model, f"{stem}_choice", choice, dtype)])
        sums = new[-1].outputs[0]
        attributes = {"axis": -1, "largest": 1, "sorted": match.attribute(anchor, "sorted", 1)}
        top = edit.make("TopK", [sums, anchor.inputs[1]], attributes, like=anchor, outputs=2)
        new.append(top)
        follow(anchor)
        edit.replace_value(anchor.outputs[0], top.outputs[0])
        at = top.outputs[1]
    if rows is not None:
        if cut is None:
            size = edit.add_constant(model, f"{stem}_second", np.array(second, np.int64))
            places = [add(op_type, [at, size], {"fmod": 0} if op_type == "Mod" else None) for op_type in ("Div", "Mod")]
        else:
            names = ((f"{stem}_outer", 0), (f"{stem}_inner", 1))
            tables = [edit.add_constant(model, name, np.ascontiguousarray(cut[:, side])) for name, side in names]
            places = [add("Gather", [table, at], {"axis": 0}) for table in tables]
        keys = [
            add("GatherElements", [keys, place], {"axis": -1})
            for keys, place in zip((rows.outer, rows.inner), places, strict=True)
        ]
        value = add("Add", [add("Mul", [keys[0], rows.stride]), keys[1]])
        follow(rows.last)
        edit.replace_value(rows.value, value)
        edit.remove_unused([rows.last])
    if cut is not None and anchor.graph is not None:
        if anchor.outputs[1].uses() or anchor.outputs[1].is_graph_output():
            numbers = edit.add_constant(model, f"{stem}_numbers", cut[:, 0] * second + cut[:, 1])
            add("Gather", [numbers, at], {"axis": 0})
            number = new[-1].outputs[0]
            follow(anchor)
            edit.replace_value(anchor.outputs[1], number)
        edit.remove_unused([anchor])
