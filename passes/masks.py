"""Additive attention masks: what values they may have, and the form in which a fused operator gives the same result.

An operator that computes attention as a whole treats a row of scores that is masked from end to end in its own way.
ONNX Runtime's Attention gives zeros where every element of the mask's row is at or below the lowest finite number;
softmax gives equal weights for that number and NaN for -inf (measured with 1.32; docs/ideas/attention.md). So the pass
that writes it has to know what a mask may contain.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np
import onnx_ir as oir

from burnish.ir import match, weights
from burnish.ir.inference import Inference
from burnish.ir.views import heads
from burnish.ir.views.attention import Attention
from burnish.ir.views.scores import FILL_ABSORBS, Mask
from burnish.ir.walk import is_op
from burnish.passes.shared import Shared

MOST_LEVELS = 16
_SMALL = 1e5
_LARGEST = 1 << 20
_MOVES = (
    "Identity Expand Unsqueeze Squeeze Reshape Flatten Transpose Slice Gather GatherND GatherElements Tile Split"
).split()

Levels = frozenset[float] | None
"""All the values that the elements of a tensor can have; None when they are not known."""


def levels(value: oir.Value | None, facts: Inference) -> Levels:
    """The values that the elements of a floating-point `value` can have, where they are few and known."""
    tensor = weights.tensor_of(value)
    if tensor is not None:
        return _few(np.unique(tensor.numpy().astype(np.float64))) if 0 < tensor.size <= _LARGEST else None
    node = value.producer() if value is not None else None
    if node is None or value is None:
        return None
    if is_op(node, *_MOVES):
        return levels(node.inputs[0], facts)
    if is_op(node, "Cast"):
        return (
            frozenset((0.0, 1.0))
            if facts.dtype(node.inputs[0]) == oir.DataType.BOOL
            else _rounded(levels(node.inputs[0], facts), facts.dtype(value))
        )
    if is_op(node, "Where", "Concat", "Trilu"):
        parts = [levels(one, facts) for one in (node.inputs[1:] if node.op_type == "Where" else node.inputs)]
        if node.op_type == "Trilu":
            parts = [parts[0], frozenset((0.0,))]
        known = [part for part in parts if part is not None]
        return _few(np.array(sorted(frozenset[float]().union(*known)))) if len(known) == len(parts) else None
    if is_op(node, "ConstantOfShape"):
        fill = match.attribute(node, "value")
        return _few(np.unique(fill.numpy().astype(np.float64))) if fill is not None else frozenset((0.0,))
    if node.op_type in _ARITHMETIC and is_op(node, node.op_type):
        left, right = (levels(one, facts) for one in node.inputs)
        if left is None or right is None:
            return None
        with np.errstate(all="ignore"):
            return _rounded(
                _few(np.unique([_ARITHMETIC[node.op_type](a, b) for a in left for b in right])), facts.dtype(value)
            )
    return None


_ARITHMETIC: dict[str, Callable[..., float]] = {
    "Add": np.add, "Sub": np.subtract, "Mul": np.multiply, "Min": np.minimum, "Max": np.maximum,
}  # fmt: skip


def _few(found: np.ndarray) -> Levels:
    return frozenset(float(x) for x in found) if found.size <= MOST_LEVELS and not np.isnan(found).any() else None


def _rounded(found: Levels, dtype: oir.DataType | None) -> Levels:
    if found is None or dtype is None or not dtype.is_floating_point():
        return None
    with np.errstate(over="ignore"):
        return frozenset(float(np.float64(x).astype(dtype.numpy())) for x in found)


def lowest(dtype: oir.DataType) -> float:
    """The lowest finite number of a floating-point dtype."""
    import ml_dtypes

    return float(ml_dtypes.finfo(dtype.numpy()).min)  # type: ignore[no-untyped-call]


@dataclass(frozen=True)
class Ready:
    """A mask in the form for a fused operator.

    Attributes:
        bias: what to add to the scores, or None.
        dead: bool [batch or 1, 1, queries, 1]: rows of the result that have to be zeros; None when there are none.
    """

    bias: oir.Value | None = None
    dead: oir.Value | None = None


@dataclass
class Masks:
    """Makes masks ready, each once however many attentions share it."""

    model: oir.Model
    facts: Inference
    made: Shared

    def refused(self, attention: Attention, empty_row: Literal["zeros", "nan", "unknown"]) -> str | None:
        """Why the mask cannot be made ready, None when it can.

        Args:
            attention: whose mask.
            empty_row: what the operator gives for a row of only -inf.
        """
        mask = attention.mask
        if not mask:
            return None
        found = self._levels(mask)
        may_be_empty = (found is None or -np.inf in found) and not self._never_dead(mask)
        if may_be_empty and not attention.guard and empty_row != "nan":
            return "a row of -inf gives NaN without a guard, and the operator gives zeros"
        if sum(not self._adds_in_any_order(value) for value in mask.values) > 1:
            return "several masks of middling size, added one by one, do not round as their sum does"
        values = [*mask.values, *([mask.keep] if mask.keep is not None else [])]
        homes = {id(node.graph) for value in values if (node := value.producer()) is not None}
        if len(homes - {id(self.model.graph)}) > 1:
            return "parts of the mask are computed in different nested graphs"
        shapes = [self.facts.shape(value) for value in values]
        if any(shape is None or len(shape) > 4 for shape in shapes):
            return "the rank of the mask is not known"
        if not any(shape and shape[-1] == attention.total for shape in shapes):
            return "the mask is not known to have a column for each key"
        own = any(shape is not None and len(shape) > 2 and shape[-3] != 1 for shape in shapes)
        if own and may_be_empty and attention.guard and empty_row != "zeros":
            return "the heads have masks of their own, whose empty rows are guarded"
        return None

    def _levels(self, mask: Mask) -> Levels:
        if mask.keep is not None:
            return frozenset((0.0, mask.fill))
        parts = [levels(value, self.facts) for value in mask.values]
        total: Levels = parts[0]
        for part in parts[1:]:
            with np.errstate(over="ignore"):
                total = (
                    None
                    if total is None or part is None
                    else _rounded(
                        _few(np.unique([a + b for a in total for b in part])), self.facts.dtype(mask.values[0])
                    )
                )
        return total

    def _adds_in_any_order(self, value: oir.Value) -> bool:
        """Whether the elements are small, or so large that nothing but them counts."""
        array = weights.constant(value, largest=_LARGEST)
        found = levels(value, self.facts) if array is None else np.abs(array).reshape(-1)
        return found is not None and all(abs(x) <= _SMALL or abs(x) >= FILL_ABSORBS for x in found)

    def _never_dead(self, mask: Mask) -> bool:
        if len(mask.values) != 1:
            return False
        array = weights.constant(mask.values[0], largest=_LARGEST)
        return array is not None and bool(np.isfinite(array.max(-1)).all())

    def ready(self, attention: Attention, *, spare_lowest: bool, zero_dead: bool, rank: int | None = None) -> Ready:
        """The mask of `attention` in the form that keeps its meaning; adds nodes right behind the mask's own.

        Args:
            attention: whose mask; `refused` must be None.
            spare_lowest: the operator gives zeros for rows of the lowest number.
            zero_dead: rows of only -inf have to be zeros and the operator makes them NaN.
            rank: of the result; None for that of the mask.
        """
        mask, facts = attention.mask, self.facts
        if not mask:
            return Ready()
        dtype = facts.dtype(attention.nodes[0].outputs[0]) or oir.DataType.FLOAT
        found, low = self._levels(mask), lowest(dtype)
        spare = spare_lowest and (found is None or low in found)
        bias = self._sum(mask, dtype, spare and found is not None and found == frozenset((0.0, low)))
        spare = spare and not (found == frozenset((0.0, low)) and self._is_choice(mask))
        dead = None
        if zero_dead and (found is None or -np.inf in found):
            dead = self._dead(bias)
            bias = self.made.step("Where", dead, self.made.number(0.0, dtype), bias)
        if spare:
            reached = self.made.step("Equal", bias, self.made.number(low, dtype))
            bias = self.made.step(
                "Where",
                reached,
                self.made.number(float(np.nextafter(dtype.numpy().type(low), dtype.numpy().type(0))), dtype),
                bias,
            )
        return Ready(self._shaped(bias, attention, rank), dead)

    def _is_choice(self, mask: Mask) -> bool:
        return mask.keep is not None or match.producer(mask.values[0], "Where") is not None and len(mask.values) == 1

    def _sum(self, mask: Mask, dtype: oir.DataType, spare: bool) -> oir.Value:
        """The mask as one value to add. `spare`: put another number in the place of the lowest, as good as that."""
        fill = mask.fill / 2 if spare else mask.fill
        if mask.keep is not None:
            ends = [self.made.number(0.0, dtype), self.made.number(fill, dtype)]
            return self.made.step("Where", mask.keep, *(reversed(ends) if mask.inverted else ends))
        total = mask.values[0]
        for value in mask.values[1:]:
            total = self.made.step("Add", total, value)
        node = match.producer(total, "Where")
        if not spare or node is None:
            return total
        ends = [
            self.made.number(found / 2, dtype) if (found := heads.number(one, self.facts)) else one
            for one in node.inputs[1:]
            if one is not None
        ]
        return self.made.step("Where", node.inputs[0], *ends)

    def number(self, number: float, attention: Attention) -> oir.Value:
        """A scalar of the dtype of the scores."""
        return self.made.number(number, self.facts.dtype(attention.nodes[0].outputs[0]) or oir.DataType.FLOAT)

    def _dead(self, bias: oir.Value) -> oir.Value:
        dtype = self.facts.dtype(bias) or oir.DataType.FLOAT
        by_input = self.facts.opset >= 18
        axes = [self.made.integers([-1])] if by_input else []
        top = self.made.step("ReduceMax", bias, *axes, keepdims=1, axes=None if by_input else [-1])
        return self.made.step("Equal", top, self.made.number(-np.inf, dtype))

    def _shaped(self, bias: oir.Value, attention: Attention, rank: int | None) -> oir.Value:
        """With a row for each query, which the operators demand, and of `rank`."""
        shape = self.facts.shape(bias) or ()
        if rank is not None and len(shape) < rank:
            return self._shaped(self.made.unsqueezed(bias, rank - len(shape)), attention, rank)
        if len(shape) < 2:
            return self._shaped(self.made.unsqueezed(bias, 1), attention, rank)
        if shape[-2] == attention.sequence:
            return bias
        return self.made.step("Expand", bias, self._rows(attention))

    def _rows(self, attention: Attention) -> oir.Value:
        """The shape [queries, 1]."""
        length = self.made.length(attention.sequence, (attention.nodes[0].outputs[0], 2))
        return self.made.step("Concat", length, self.made.integers([1]), axis=0)
