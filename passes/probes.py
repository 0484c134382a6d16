"""How far a stream turns inside a model: cosines between its values, computed in the graph and reduced on the way."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import onnx_ir as oir

from burnish.ir import edit
from burnish.ir.errors import InputError
from burnish.ir.views.block import Block
from burnish.ir.views.blocks import stacks
from burnish.ir.views.flow import SKIP_NORMS
from burnish.ir.walk import is_op
from burnish.passes.lossy import Context
from burnish.passes.reducers import Array, Reducer, check_keep, numeric
from burnish.passes.sites import Site
from burnish.passes.skip_norms import not_splittable, split


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

    The features lie along axis 1 where convolutions read pictures of the stream's shape, else along the last axis. A
    vector of zeros has the cosine 0.5 with every other, as in ShortGPT's code.

    Args:
        model: the model; left untouched.
        pairs: blocks of it: the stream before the first and behind the second are compared.
        context: samples, observer and padding.
        reducer: makes a reducer for the axis of the features, which has size 1.

    Raises:
        InputError: the stream is no value of the main graph, or it cannot be told which of its rows are padding.
    """
    copy = model.clone()
    for node in list(copy.graph):
        if is_op(node, *SKIP_NORMS, domain="com.microsoft") and not_splittable(node) is None:
            split(node)
    blocks = stacks(copy).blocks
    ends = [(blocks[first.index].entry, blocks[last.index].exit) for first, last in pairs]
    axes = [_axis(blocks[first.index]) for first, _ in pairs]
    keeps = context.keeps(copy, {str(at): (ends[at][0], axis) for at, axis in enumerate(axes)})
    writer, sites = _Writer(copy), {}
    for at, (before, behind) in enumerate(ends):
        keep = keeps[str(at)]
        if isinstance(keep, str):
            cause = f"it cannot be told which rows of the stream are padding: {keep}"
            raise InputError(cause, place=f"block {pairs[at][0].index}", hint="take a criterion that needs no padding")
        sites[str(at)] = Site(writer.cosine(before, behind, axes[at]), keep)
    observer = context.observe(copy)
    try:
        found = observer.observe(sites, {str(at): reducer(axis) for at, axis in enumerate(axes)}, context.samples)
    finally:
        observer.close()
    return [found[str(at)] for at in range(len(ends))]


def _axis(block: Block) -> int:
    """The axis of the features of a block's stream."""
    shape = block.entry.shape
    pictures = (node for node in block.nodes if is_op(node, "Conv") and shape is not None and len(shape) > 2)
    return 1 if any(node.inputs[0] is not None and node.inputs[0].shape == shape for node in pictures) else -1


class _Writer:
    """Adds the nodes that compute cosines."""

    def __init__(self, model: oir.Model) -> None:
        self._model = model
        self._floats: dict[oir.Value, oir.Value] = {}
        self._lengths: dict[tuple[oir.Value, int], oir.Value] = {}
        self._half = self._constant("half", np.array(0.5, np.float32))
        self._zero = self._constant("zero", np.array(0.0, np.float32))
        self._axes: dict[int, oir.Value] = {}

    def cosine(self, one: oir.Value, other: oir.Value, axis: int) -> oir.Value:
        first, second = self._float(one), self._float(other)
        if one.shape != other.shape:
            sizes = self._add("Shape", first, dtype=oir.DataType.INT64, shape=oir.Shape([len(one.shape or ())]))
            second = self._add("Reshape", second, sizes, shape=one.shape)
        dot = self._sum(self._add("Mul", first, second), axis)
        size = self._add("Mul", self._length(first, axis), self._length(second, axis))
        nothing = self._add("Equal", size, self._zero, dtype=oir.DataType.BOOL)
        found = self._add("Where", nothing, self._half, self._add("Div", dot, size), shape=dot.shape)
        found.name = edit.unique_name(self._model, f"cosine of {one.name} and {other.name}")
        return found

    def _length(self, value: oir.Value, axis: int) -> oir.Value:
        key = value, axis
        if key not in self._lengths:
            self._lengths[key] = self._add("Sqrt", self._sum(self._add("Mul", value, value), axis))
        return self._lengths[key]

    def _float(self, value: oir.Value) -> oir.Value:
        owner = value.producer().graph if value.producer() is not None else value.graph  # type: ignore[union-attr]
        if owner is not self._model.graph or not value.name:
            raise InputError(f"the stream `{value.name}` is no value of the main graph, where it could be observed")
        if value not in self._floats:
            cast = value.dtype != oir.DataType.FLOAT
            self._floats[value] = self._add("Cast", value, to=int(oir.DataType.FLOAT)) if cast else value
        return self._floats[value]

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
