"""Inputs and outputs of a model as a manifest has them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import onnx_ir as oir

from burnish.ir.errors import InputError
from burnish.ir.inference import is_told

if TYPE_CHECKING:
    from burnish.backends.tvm.artifact import Port


def inputs(model: oir.Model) -> tuple[Port, ...]:
    """Those that callers have to give, with the range of indices."""
    from burnish.backends.tvm import index_bounds

    bounded = index_bounds.bounds(model)
    given = [value for value in model.graph.inputs if value.const_value is None]
    return tuple(_port(value, *bounded.get(str(value.name), ())) for value in given)


def outputs(model: oir.Model) -> tuple[Port, ...]:
    """What callers get."""
    return tuple(map(_port, model.graph.outputs))


def _port(value: oir.Value, lowest: int | None = None, highest: int | None = None) -> Port:
    from burnish.backends.tvm.artifact import Port

    if value.dtype is None or value.shape is None:
        raise InputError("its rank and dtype are not known", place=f"`{value.name}`")
    told = [size if is_told(size) else None for size in value.shape]
    sizes = tuple(size.value if isinstance(size, oir.SymbolicDim) else size for size in told)
    return Port(str(value.name), value.dtype.numpy().name, sizes, lowest, highest)
