"""The part of a matrix that makes the queries, keys or values of an attention, or takes its result, head by head."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as oir

from burnish.ir import match
from burnish.ir.views.linear import Linear, find_linear
from burnish.ir.views.parameter import Parameter, find_parameter, write_input


@dataclass(frozen=True, eq=False)
class Projection:
    """Rows of a matrix, one for each element of each head; or columns, for the output of an attention.

    Attributes:
        holder: the node that has the matrix among its inputs.
        linear: the linear layer; None when `holder` is a whole attention with a matrix of its own.
        places: int64 [heads * size], which row or column of the matrix belongs to which element, head by head.
        heads, size: heads, and elements of each.
        columns: the elements are inputs of the matrix, not outputs.
        biases: constants added behind the matrix: (node, input index, places in its elements; empty for one number).
    """

    holder: oir.Node
    linear: Linear | None
    places: np.ndarray
    heads: int
    size: int
    columns: bool
    biases: tuple[tuple[oir.Node, int, np.ndarray], ...] = ()

    @property
    def read_only(self) -> str | None:
        """Why it cannot be written, in plain words; None when it can."""
        if self.linear is not None:
            return self.linear.read_only
        return None

    def matrix(self) -> np.ndarray:
        """The whole matrix, float64 [out, in]."""
        if (linear := self._linear()) is not None:
            return linear.weight()
        return np.asarray(_parameter(self.holder, 1).read().T)

    def weight(self) -> np.ndarray:
        """float64 [heads, size, in]; [out, heads, size] for columns."""
        matrix = self.matrix()
        if self.columns:
            return np.asarray(matrix[:, self.places].reshape(-1, self.heads, self.size))
        return np.asarray(matrix[self.places].reshape(self.heads, self.size, -1))

    def bias(self) -> np.ndarray | None:
        """float64 [heads, size], or [out] for columns, all constants added together; None when there are none."""
        total = self._own_bias()
        if total is not None and not self.columns:
            total = total[self.places]
        for node, index, places in self.biases:
            added = _parameter(node, index).read().reshape(-1)
            added = added[places] if places.size else np.full(self.places.size, added[0])
            total = added if total is None else total + added
        return total if total is None or self.columns else total.reshape(self.heads, self.size)

    def _linear(self) -> Linear | None:
        """`linear` as it is now: another layer, whose matrix it is as well, may have been written since."""
        return None if self.linear is None else find_linear(self.holder, with_add=self.linear.add is not None)

    def _own_bias(self) -> np.ndarray | None:
        if (linear := self._linear()) is not None:
            return linear.bias()
        if match.input_of(self.holder, 2) is None:
            return None
        return _parameter(self.holder, 2).read().reshape(-1)


def same_rows(own: Sequence[Projection | None], others: Iterable[Projection | None] = ()) -> str | None:
    """Why queries, keys and values cannot be written apart, and apart from others, in plain words; None if they can."""
    taken = [(one.holder, one.places) for one in others if one is not None]
    for one in (one for one in own if one is not None):
        if any(holder is one.holder and np.isin(one.places, places).any() for holder, places in taken):
            return (
                f"some of its queries, keys and values are rows of {match.describe(one.holder)} that make others, too"
            )
        taken.append((one.holder, one.places))
    return None


def write(model: oir.Model, changes: Sequence[tuple[Projection, np.ndarray, np.ndarray | None]]) -> None:
    """Give projections new weights and biases, of the shapes that `weight` and `bias` have; matrices may be shared.

    What stays as it is, is not touched, so writing what was read changes nothing.

    Raises:
        ValueError: a projection is read-only, a shape is another, or two that share rows get different ones.
    """
    by_holder: dict[oir.Node, list[tuple[Projection, np.ndarray, np.ndarray | None]]] = {}
    changed = set[oir.Node]()
    for projection, weight, bias in changes:
        if not (_equal(weight, projection.weight()) and _equal(bias, projection.bias())):
            _check(projection, weight, bias)
            changed.add(projection.holder)
        by_holder.setdefault(projection.holder, []).append((projection, weight, bias))
    for holder in changed:
        _write_matrix(model, by_holder[holder])


def _equal(one: np.ndarray | None, other: np.ndarray | None) -> bool:
    return (one is None) == (other is None) and (one is None or other is None or np.array_equal(one, other))


def _check(projection: Projection, weight: np.ndarray, bias: np.ndarray | None) -> None:
    if projection.read_only is not None:
        raise ValueError(f"{match.describe(projection.holder)} cannot be rewritten: {projection.read_only}")
    wanted = projection.weight().shape
    if weight.shape != wanted:
        raise ValueError(f"the graph splits heads into {wanted}, not {weight.shape}")
    shape = (wanted[0],) if projection.columns else wanted[:2]
    if bias is not None and bias.shape != shape:
        raise ValueError(f"a bias of {shape} is needed, not {bias.shape}")


def _write_matrix(model: oir.Model, group: list[tuple[Projection, np.ndarray, np.ndarray | None]]) -> None:
    first = group[0][0]
    matrix, own = first.matrix().copy(), first._own_bias()
    shift = np.zeros(matrix.shape[0]) if own is None else own.copy()
    moved, added = False, list[tuple[Projection, np.ndarray]]()
    for projection, weight, bias in group:
        if projection.columns:
            matrix[:, projection.places] = weight.reshape(matrix.shape[0], -1)
        else:
            matrix[projection.places] = weight.reshape(projection.places.size, -1)
        if _equal(bias, projection.bias()):
            continue
        wanted = np.zeros(matrix.shape[0] if projection.columns else projection.places.size)
        wanted = wanted if bias is None else bias.reshape(-1).astype(np.float64)
        if projection.biases:
            added.append((projection, wanted))
        elif projection.columns:
            shift, moved = wanted, True
        else:
            shift[projection.places], moved = wanted, True
    for projection, weight, bias in group:
        kept = matrix[:, projection.places] if projection.columns else matrix[projection.places]
        same = np.array_equal(kept.reshape(weight.shape), weight)
        if bias is not None and not projection.columns and not projection.biases:
            same = same and np.array_equal(shift[projection.places], bias.reshape(-1))
        if not same:
            raise ValueError(f"queries, keys and values share rows of {match.describe(projection.holder)}")
    for projection, wanted in added:
        _write_added(model, projection, wanted)
    if np.array_equal(matrix, first.matrix()) and not moved:
        return
    new_bias = shift if moved or own is not None else None
    if moved and all(bias is None for _, _, bias in group) and not shift.any():
        new_bias = None
    if (linear := first._linear()) is not None:
        linear.write(model, matrix, new_bias)
        return
    parameter = _parameter(first.holder, 1)
    dtype = parameter.dtype or oir.DataType.FLOAT
    write_input(model, first.holder, 1, matrix.T, dtype, parameter.source.name or "weight")
    if new_bias is not None:
        write_input(model, first.holder, 2, new_bias, dtype, f"{parameter.source.name or 'weight'}_bias")


def _write_added(model: oir.Model, projection: Projection, wanted: np.ndarray) -> None:
    """Let the last constant that is added make up for the difference to what the others give."""
    node, index, places = projection.biases[0]
    if not places.size:
        raise ValueError(f"{match.describe(node)} adds one number to all elements")
    before = projection.bias()
    parameter = _parameter(node, index)
    array = parameter.read()
    flat = array.reshape(-1).copy()
    flat[places] += wanted - (0.0 if before is None else before.reshape(-1))
    write_input(
        model, node, index, flat.reshape(array.shape), parameter.dtype or oir.DataType.FLOAT,
        parameter.source.name or "bias",
    )  # fmt: skip


def _parameter(node: oir.Node, index: int) -> Parameter:
    found = find_parameter(match.input_of(node, index))
    if found is None:
        raise ValueError(f"input {index} of {match.describe(node)} is no constant any more")
    return found
