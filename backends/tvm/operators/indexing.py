"""Operators that pick elements or make index tensors. Indices outside are not checked by TVM's code."""

from __future__ import annotations

from typing import Any

from tvm import relax, te, tirx

from burnish.backends.tvm import packing
from burnish.backends.tvm.maker import Maker
from burnish.backends.tvm.operators.attention import fixed
from burnish.backends.tvm.registry import Unsupported, lowers

op = relax.op


def within(index: Any, size: Any) -> Any:
    """An index of an axis as int64, counted from the end below zero. One outside reads the first or last place."""
    place, last = index.astype("int64"), tirx.Cast("int64", size) - 1
    if not str(index.ty.dtype).startswith("u"):
        place = tirx.Select(place < 0, place + last + 1, place)
    return tirx.max(tirx.min(place, last), tirx.const(0, "int64"))


@lowers("Gather")
def gather(make: Maker, x: Any, indices: Any, *, axis: int = 0) -> Any:
    axis %= make.rank(x)

    def gathered(t: Any, picked: Any) -> Any:
        end = axis + len(picked.shape)

        def element(*at: Any) -> Any:
            return t(*at[:axis], within(picked(*at[axis:end]), t.shape[axis]), *at[end:])

        return te.compute((*t.shape[:axis], *picked.shape, *t.shape[axis + 1 :]), element, name="gather")

    return make.te(gathered, x, indices)


@lowers("GatherElements", since=11)
def gather_elements(make: Maker, x: Any, indices: Any, *, axis: int = 0) -> Any:
    axis %= make.rank(x)

    def gathered(t: Any, picked: Any) -> Any:
        def element(*at: Any) -> Any:
            return t(*at[:axis], within(picked(*at), t.shape[axis]), *at[axis + 1 :])

        return te.compute(picked.shape, element, name="gather_elements")

    return make.te(gathered, x, indices)


@lowers("GatherND", since=11)
def gather_nd(make: Maker, x: Any, indices: Any, *, batch_dims: int = 0) -> Any:
    depth = fixed(make.shape(indices)[-1], "the length of an index")

    def gathered(t: Any, picked: Any) -> Any:
        outer = len(picked.shape) - 1

        def element(*at: Any) -> Any:
            found = [within(picked(*at[:outer], k), t.shape[batch_dims + k]) for k in range(depth)]
            return t(*at[:batch_dims], *found, *at[outer:])

        return te.compute((*picked.shape[:-1], *t.shape[batch_dims + depth :]), element, name="gather_nd")

    return make.te(gathered, x, indices)


@lowers("OneHot", since=9, sizes=(1,))
def one_hot(make: Maker, indices: Any, depth: list[Any], values: Any, *, axis: int = -1) -> Any:
    if "float" in make.dtype(indices):
        raise Unsupported("OneHot of floating point")
    count, rank = fixed(depth[0], "the depth"), make.rank(indices)
    axis %= rank + 1

    def hot(picked: Any, choice: Any) -> Any:
        def element(*at: Any) -> Any:
            index = picked(*at[:axis], *at[axis + 1 :]).astype("int64")
            same = at[axis].astype("int64") == tirx.Select(index < 0, index + count, index)
            return tirx.Select(same, choice(1), choice(0))

        return te.compute((*picked.shape[:axis], count, *picked.shape[axis:]), element, name="one_hot")

    return make.te(hot, indices, values)


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
    place, dtype = fixed(axis[0], "the axis") % make.rank(x), make.dtype(x)
    if reverse:
        x = make.emit(op.flip(x, place))
    if exclusive:
        around = [0] * (2 * make.rank(x))
        around[2 * place] = 1
        size = make.shape(x)[place]
        longer = make.emit(op.nn.pad(x, around, "constant", 0.0))
        x = make.emit(op.strided_slice(longer, [place], [0], [size], [1], assume_inbound=True))
    found = make.emit(op.cumsum(x, place, dtype=dtype))
    return op.flip(found, place) if reverse else found


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
