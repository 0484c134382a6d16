"""Operators that pick elements or make index tensors. Indices outside are not checked by TVM's code."""

from __future__ import annotations

from typing import Any

from tvm import relax

from burnish.backends.tvm import packing
from burnish.backends.tvm.maker import Maker
from burnish.backends.tvm.registry import Unsupported, lowers

op = relax.op


def wrapped(make: Maker, indices: Any, size: Any) -> Any:
    """Indices with the negative ones counted from the end; constants are computed here."""
    array = make.array(indices)
    if array is not None:
        if (array >= 0).all():
            return indices
        if isinstance(size, int):
            return relax.const(array % size, make.dtype(indices))
    dtype = make.dtype(indices)
    if dtype.startswith("u"):
        return indices
    whole = relax.const(size, dtype) if isinstance(size, int) else make.sizes_as_tensor([size], dtype)
    return make.emit(op.where(op.less(indices, relax.const(0, dtype)), op.add(indices, whole), indices))


@lowers("Gather")
def gather(make: Maker, x: Any, indices: Any, *, axis: int = 0) -> Any:
    axis %= make.rank(x)
    found = wrapped(make, indices, make.shape(x)[axis])
    if make.rank(found):
        return op.take(x, found, axis, mode="clip")
    return op.squeeze(make.emit(op.take(x, make.emit(op.reshape(found, [1])), axis, mode="clip")), [axis])


@lowers("GatherElements", since=11)
def gather_elements(make: Maker, x: Any, indices: Any, *, axis: int = 0) -> Any:
    axis %= make.rank(x)
    return op.gather_elements(x, wrapped(make, indices, make.shape(x)[axis]), axis)


@lowers("GatherND", since=11)
def gather_nd(make: Maker, x: Any, indices: Any, *, batch_dims: int = 0) -> Any:
    return op.gather_nd(x, indices, batch_dims)


@lowers("Range", since=11, sizes=(0, 1, 2))
def arange(make: Maker, start: list[Any], limit: list[Any], delta: list[Any]) -> Any:
    dtype = make.node.outputs[0].dtype or make.node.inputs[0].dtype  # type: ignore[union-attr]
    name = "int64" if dtype is None else dtype.name.lower()
    return op.arange(start[0], limit[0], delta[0], name)


@lowers("Trilu", since=14, sizes=(1,))
def trilu(make: Maker, x: Any, k: list[Any] | None = None, *, upper: int = 1) -> Any:
    offset = 0 if k is None else k[0]
    return op.triu(x, offset) if upper else op.tril(x, offset)


@lowers("CumSum", since=11, sizes=(1,))
def cumsum(make: Maker, x: Any, axis: list[Any], *, exclusive: int = 0, reverse: int = 0) -> Any:
    if exclusive or reverse:
        raise Unsupported("an exclusive or reversed CumSum")
    return op.cumsum(x, axis[0] % make.rank(x), dtype=make.dtype(x))


@lowers("ConstantOfShape", since=9, sizes=(0,))
def constant_of_shape(make: Maker, shape: list[Any], *, value: Any = None) -> Any:
    array = None if value is None else value.numpy().reshape(())
    number = relax.const(0.0, "float32") if array is None else packing.constant(array)
    return op.full(shape, number, make.dtype(number))


@lowers("Shape", "Size")
def runtime_shape(make: Maker, x: Any, *, start: int = 0, end: int | None = None) -> Any:
    sizes = make.shape(x)
    if make.node.op_type == "Size":
        raise Unsupported("Size of data")
    return make.sizes_as_tensor(sizes[start : len(sizes) if end is None else end])
