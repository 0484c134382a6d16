"""How far a stream turns inside a model: cosines between its values, computed in the graph and reduced on the way."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import onnx_ir as oir

from burnish.ir import edit
from burnish.ir.errors import InputError
from burnish.ir.views.block import Block
from burnish.passes.lossy import Context
from burnish.passes.reducers import Array, Reducer, check_keep, numeric
from burnish.passes.sites import Keep, Site


@dataclass
class LastAngle(Reducer):
    """The angle, as a share of a half turn, whose cosine the last token of each row of the batch is; their mean.

    Attributes:
        axis: the axis of the features, which has size 1; the tokens lie along axis 1.
        total: the sum of the angles.
        rows: how many there were.
    """

    axis: int = -1
    total: float = field(init=False, default=0.0)
    rows: int = field(init=False, default=0)

    def add(self, array: Array, keep: Array | None = None) -> None:
        if array.ndim != 3:
            raise InputError(f"there are no tokens in an array of shape {list(array.shape)}")
        if keep is not None:
            check_keep(array, self.axis, keep)
        counts = np.broadcast_to(True if keep is None else keep, array.shape)[..., 0]
        last = counts.shape[1] - 1 - counts[:, ::-1].argmax(1)
        found = numeric(array)[np.arange(len(array)), last, 0][counts.any(1)]
        self.total += float(np.arccos(np.clip(found.astype(np.float64), -1, 1)).sum() / np.pi)
        self.rows += len(found)

    def nbytes(self, shape: Sequence[int]) -> int:
        return 16

    def _join(self, other: LastAngle) -> None:
        self.total, self.rows = self.total + other.total, self.rows + other.rows

    @property
    def mean(self) -> float:
        """The mean angle, 0 to 1; NaN when nothing was seen."""
        return self.total / self.rows if self.rows else float("nan")


def cosines(
    model: oir.Model, pairs: Sequence[tuple[Block, Block]], context: Context, reducer: Callable[[int], Reducer]
) -> list[Reducer]:
    """What reducers see of the cosines between the stream before one block and behind another, one for each token.

    The features lie along the last axis, or along axis 1 in blocks of convolutions. A vector of zeros has the cosine
    0.5 with every other, as in ShortGPT's code.

    Args:
        model: the model; left untouched.
        pairs: blocks of it: the stream before the first and behind the second are compared.
        context: samples, observer and padding.
        reducer: makes a reducer for the axis of the features, which has size 1.

    Raises:
        InputError: the stream is no value of the main graph, or it cannot be told which of its rows are padding.
    """
    copy = model.clone()
    writer = _Writer(copy)
    values, axes = {}, {}
    for number, (first, last) in enumerate(pairs):
        axis = 1 if first.form == "cnn" else -1
        name = f"cosine {number}"
        values[name], axes[name] = writer.cosine(first.entry, last.exit, axis), axis
    keeps = context.keeps(copy, {name: (value, axes[name]) for name, value in values.items()})
    sites = {}
    for name, value in values.items():
        keep = keeps[name]
        if isinstance(keep, str):
            raise InputError(f"it cannot be told which rows of the stream are padding: {keep}")
        sites[name] = Site(value, keep if isinstance(keep, Keep) else None)
    observer = context.observe(copy)
    try:
        found = observer.observe(sites, {name: reducer(axis) for name, axis in axes.items()}, context.samples)
    finally:
        observer.close()
    return [found[name] for name in values]


class _Writer:
    """Adds the nodes that compute cosines."""

    def __init__(self, model: oir.Model) -> None:
        self._model = model
        self._named = {str(value.name): value for value in model.graph.inputs}
        self._named |= {str(value.name): value for node in model.graph for value in node.outputs}
        self._floats: dict[oir.Value, oir.Value] = {}
        self._lengths: dict[tuple[oir.Value, int], oir.Value] = {}
        self._half = self._constant("half", np.array(0.5, np.float32))
        self._zero = self._constant("zero", np.array(0.0, np.float32))
        self._axes: dict[int, oir.Value] = {}

    def cosine(self, one: oir.Value, other: oir.Value, axis: int) -> oir.Value:
        first, second = self._float(one), self._float(other)
        dot = self._sum(self._add("Mul", first, second), axis)
        size = self._add("Mul", self._length(first, axis), self._length(second, axis))
        nothing = self._add("Equal", size, self._zero, dtype=oir.DataType.BOOL)
        return self._add("Where", nothing, self._half, self._add("Div", dot, size), shape=dot.shape)

    def _length(self, value: oir.Value, axis: int) -> oir.Value:
        key = value, axis
        if key not in self._lengths:
            self._lengths[key] = self._add("Sqrt", self._sum(self._add("Mul", value, value), axis))
        return self._lengths[key]

    def _float(self, value: oir.Value) -> oir.Value:
        own = self._named.get(str(value.name))
        if own is None:
            raise InputError(f"the stream `{value.name}` is no value of the main graph, where it could be observed")
        if own not in self._floats:
            cast = own.dtype != oir.DataType.FLOAT
            self._floats[own] = self._add("Cast", own, to=int(oir.DataType.FLOAT)) if cast else own
        return self._floats[own]

    def _sum(self, value: oir.Value, axis: int) -> oir.Value:
        shape = None
        if value.shape is not None:
            shape = oir.Shape([1 if index == axis % len(value.shape) else d for index, d in enumerate(value.shape)])
        if self._model.opset_imports.get("", 13) < 13:
            return self._add("ReduceSum", value, shape=shape, axes=[axis], keepdims=1)
        if axis not in self._axes:
            self._axes[axis] = self._constant("axis", np.array([axis], np.int64))
        return self._add("ReduceSum", value, self._axes[axis], shape=shape, keepdims=1)

    def _constant(self, name: str, array: np.ndarray) -> oir.Value:
        return edit.add_constant(self._model, name, array)

    def _add(
        self,
        op: str,
        *inputs: oir.Value,
        dtype: oir.DataType = oir.DataType.FLOAT,
        shape: oir.Shape | None = None,
        **attributes: object,
    ) -> oir.Value:
        node = edit.make(op, inputs, attributes, like=self._model.graph[0])
        self._model.graph.append(node)
        out = node.outputs[0]
        out.name = edit.unique_name(self._model, f"{inputs[0].name}_{op}")
        out.type, out.shape = oir.TensorType(dtype), shape if shape is not None else inputs[0].shape
        return out
