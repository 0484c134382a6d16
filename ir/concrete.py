"""A copy of a model to measure: inputs of given sizes, functions inlined, shapes inferred."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager

import numpy as np
import onnx_ir as oir

from burnish.ir import match
from burnish.ir.functions import inline
from burnish.ir.sizes import Dims
from burnish.ir.walk import is_op, walk

_LARGEST_FOLDED = 1 << 16  # elements: room for the arithmetic of shapes, none for weights


def concrete(model: oir.Model, dims: Dims) -> oir.Model:
    """A copy of `model` to read sizes from; weights are shared with it and the model itself is not changed.

    Functions are inlined, dimensions of the inputs get the numbers in `dims`, and shapes are inferred from there, so
    that dimensions which the model computes become numbers as well. Where inference fails the declared shapes remain.

    Args:
        model: any model.
        dims: numbers for dimensions, by their name or as `INPUT.AXIS` (`x.2`), which goes first.
    """
    copy = model.clone()
    inline(copy)
    for value in copy.graph.inputs:
        if value.shape is not None:
            own = {axis: dims.get(f"{value.name}.{axis}") for axis in range(len(value.shape))}
            value.shape = _filled(value.shape, dims, own)
    for value in _written(copy):
        if value.shape is not None:
            value.shape = _filled(value.shape, dims, {})
    _infer(copy)
    if not all(_is_known(value) for value in _written(copy)):
        _infer_by_folding(copy)
    return copy


def open_dims(model: oir.Model, dims: Dims) -> list[str]:
    """The dimensions of the inputs that `dims` leaves without a number, as `concrete` takes them, each once."""
    found: list[str] = []
    for value in model.graph.inputs:
        for axis, size in enumerate(value.shape or ()):
            spelled = f"{value.name}.{axis}"
            name = (size.value or spelled) if not isinstance(size, int) else spelled if size < 0 else None
            if name is not None and name not in dims and spelled not in dims:
                found.append(name)
    return list(dict.fromkeys(found))


def _filled(shape: oir.Shape, dims: Dims, own: Mapping[int, int | None]) -> oir.Shape:
    """`shape` with its numbers; a negative size, which some exporters write, means that there is none."""
    sizes: list[int | oir.SymbolicDim | None] = []
    for axis, size in enumerate(shape):
        known = own.get(axis)
        if known is None:
            known = (size if size >= 0 else None) if isinstance(size, int) else dims.get(size.value or "")
        sizes.append(known if known is not None or isinstance(size, int) else size)
    return oir.Shape(sizes)


def _written(model: oir.Model) -> Iterable[oir.Value]:
    return (value for node in walk(model) for value in node.outputs)


def _is_known(value: oir.Value) -> bool:
    return value.shape is not None and value.shape.is_static()


def _infer(model: oir.Model) -> None:
    from onnx_ir.passes.common import ShapeInferencePass

    with _quiet("onnx_ir"):
        ShapeInferencePass(check_type=False, strict_mode=False, data_prop=True)(model)


def _infer_by_folding(model: oir.Model) -> None:
    """Shapes that inference finds once the arithmetic on shapes is folded, given to the values of the same names."""
    import onnxscript.optimizer

    folded = model.clone()
    wanted = [value for node in folded.graph for value in node.outputs if value.name and value.dtype is not None]
    folded.graph.outputs.extend(v for v in wanted if not _is_known(v) and not v.is_graph_output())  # else they vanish
    with _quiet("onnxscript"), np.errstate(all="ignore"):
        onnxscript.optimizer.fold_constants(
            folded, onnx_shape_inference=True, output_size_limit=_LARGEST_FOLDED, should_fold=_is_filled_shape
        )
    _infer(folded)
    better = {value.name: value for value in _written(folded)}
    for graph in folded.graphs():
        better.update(graph.initializers)
    for value in _written(model):
        other = better.get(value.name)
        if other is not None and not _is_known(value) and other.shape is not None:
            value.shape, value.type = other.shape, value.type or other.type


def _is_filled_shape(node: oir.Node) -> bool | None:
    """True for the short vectors of shape arithmetic that are written as ConstantOfShape; None: the usual rules."""
    small = (match.static_shape(node.outputs[0]) or (_LARGEST_FOLDED,))[0] < 64
    return True if is_op(node, "ConstantOfShape") and match.rank(node.outputs[0]) == 1 and small else None


@contextmanager
def _quiet(logger_name: str) -> Iterator[None]:
    """Keep a library's warnings about what it could not infer to itself; the cost names what is unknown."""
    logger = logging.getLogger(logger_name)
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(level)
