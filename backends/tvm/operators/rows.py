"""Weighted sums of rows of a table as one kernel, which reads each row where it adds it.

This is the last step of memory layers with product keys (Lample et al. 2019, Large Memory Layers with Product Keys;
Berges et al. 2024, Memory Layers at Scale): a Gather of rows, times a weight for each, summed. As three operators, the
picked rows, [..., k, d], are stored and read again.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import onnx_ir as oir
from tvm import relax, te

from burnish.backends.tvm.maker import Maker
from burnish.backends.tvm.operators.indexing import within
from burnish.ir import match

_DTYPES = ("float32", "float16")
_LANES = 4
"""Columns are a multiple of it: the schedule for processors takes that many at a time, or more."""


def summed(make: Maker, axes: Sequence[int] | None, keep: bool) -> Any:
    """A ReduceSum of picked rows, [..., k, d], times weights [..., k, 1]; None where the node is none.

    Args:
        make: of the ReduceSum.
        axes: of the sum; the last axes but the one of columns.
        keep: whether they stay, with size 1.
    """
    product = match.producer(make.node.inputs[0], "Mul")
    if product is None or not axes or not match.used_once(product.outputs[0]):
        return None
    for rows, weights in (product.inputs, reversed(product.inputs)):
        gather = _picking(rows)
        if gather is not None and weights is not None:
            rank = make.rank(make.value(gather.inputs[1]))
            summed_axes = sorted(axis % (rank + 1) for axis in axes)
            if summed_axes == list(range(rank - len(axes), rank)):
                return _kernel(make, gather, weights, len(axes), columns=1, kept=len(axes) if keep else 0)
    return None


def multiplied(make: Maker) -> Any:
    """A MatMul of weights, [..., 1, k], by picked rows, [..., k, d], in one kernel; None where the node is none."""
    weights, gather = make.node.inputs[0], _picking(make.node.inputs[1])
    if gather is None or weights is None:
        return None
    return _kernel(make, gather, weights, 1, columns=0, kept=1)


def _picking(value: oir.Value | None) -> oir.Node | None:
    """The Gather of rows of a table that makes a value, which nothing else reads."""
    gather = match.producer(value, "Gather")
    if gather is None or value is None or not match.used_once(value):
        return None
    return gather if match.rank(gather.inputs[0]) == 2 and match.attribute(gather, "axis", 0) in (0, -2) else None


def _kernel(make: Maker, gather: oir.Node, weights: oir.Value, count: int, *, columns: int, kept: int) -> Any:
    """The sum over the last `count` axes of the indices.

    Args:
        make: of the node that sums.
        gather: the node that picks.
        weights: one number for each index: with an axis of size 1 behind those of the indices, or before the last.
        count: how many axes are summed.
        columns: whether the axis of size 1 is the one behind.
        kept: how many axes of size 1 stay before the columns.
    """
    table, picked, factor = (make.value(one) for one in (*gather.inputs[:2], weights))
    sizes, dtype = make.shape(picked), make.dtype(table)
    rank = len(sizes)
    over = sizes[rank - count :]
    width = make.shape(table)[1]
    if dtype not in _DTYPES or not isinstance(width, int) or width % _LANES:
        return None
    if not all(isinstance(size, int) and size > 0 for size in over):
        return None
    wanted = [*sizes, 1] if columns else [*sizes[:-1], 1, sizes[-1]]
    if rank < count or not make.same_sizes(make.shape(factor), wanted):
        return None

    def bag(rows: Any, indices: Any, numbers: Any) -> Any:
        places = [te.reduce_axis((0, size), name="k") for size in over]

        def element(*at: Any) -> Any:
            place = (*at[: rank - count], *places)
            row = rows(within(indices(*place), rows.shape[0]), at[-1])
            number = numbers(*place, 0) if columns else numbers(*place[:-1], 0, place[-1])
            return te.sum(row.astype("float32") * number.astype("float32"), axis=places)

        return te.compute((*indices.shape[: rank - count], *[1] * kept, rows.shape[1]), element, name="bag")

    found = make.te(bag, table, picked, factor)
    return found if dtype == "float32" else make.emit(relax.op.astype(found, dtype))
