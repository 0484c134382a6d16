"""Reductions over axes, softmax and what picks the largest."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tvm import relax, tirx

from burnish.backends.tvm.maker import Maker, type_of
from burnish.backends.tvm.operators import rows
from burnish.backends.tvm.operators.attention import fixed
from burnish.backends.tvm.operators.elementwise import like, mapped
from burnish.backends.tvm.operators.movement import plain, times
from burnish.backends.tvm.operators.network import HALVES
from burnish.backends.tvm.registry import Unsupported, lowers

op = relax.op
Reduction = Callable[[Any, list[int] | None, bool], Any]


def _l2(x: Any, axes: list[int] | None, keep: bool) -> Any:
    return op.sqrt(op.sum(op.multiply(x, x), axes, keep))


def _log_sum_exp(x: Any, axes: list[int] | None, keep: bool) -> Any:
    most = op.max(x, axes, True)
    whole = op.where(op.isfinite(most), most, op.zeros_like(most))
    found = op.add(op.log(op.sum(op.exp(op.subtract(x, whole)), axes, True)), whole)
    return found if keep else op.squeeze(found, axes)


_REDUCTIONS: dict[str, tuple[Reduction, int]] = {
    "ReduceMean": (op.mean, 18),
    "ReduceSum": (op.sum, 13),
    "ReduceMax": (op.max, 18),
    "ReduceMin": (op.min, 18),
    "ReduceLogSum": (lambda x, axes, keep: op.log(op.sum(x, axes, keep)), 18),
    "ReduceLogSumExp": (_log_sum_exp, 18),
    "ReduceProd": (op.prod, 18),
    "ReduceL2": (_l2, 18),
    "ReduceL1": (lambda x, axes, keep: op.sum(op.abs(x), axes, keep), 18),
    "ReduceSumSquare": (lambda x, axes, keep: op.sum(op.multiply(x, x), axes, keep), 18),
}


def _reduced(make: Maker, reduction: Reduction, x: Any, axes: list[int] | None, keep: bool) -> Any:
    """Halves are reduced in float32; integers only where the result is exact; NaN makes a maximum NaN."""
    kind, dtype, shape = make.node.op_type, make.dtype(x), make.shape(x)
    rows_summed = rows.summed(make, axes, keep) if kind == "ReduceSum" else None
    if rows_summed is not None:
        return rows_summed
    if any(shape[axis] == 0 for axis in (axes or range(len(shape))) if isinstance(shape[axis], int)):
        raise Unsupported("a reduction over nothing, which TVM leaves unwritten")
    x = _filled(make, x, axes)
    if "float" not in dtype:
        if kind not in ("ReduceSum", "ReduceMax", "ReduceMin", "ReduceProd", "ReduceL1", "ReduceSumSquare"):
            raise Unsupported(f"{kind} of {dtype}")
        if dtype == "bool":
            found = _reduced(make, reduction, make.emit(op.astype(x, "int8")), axes, keep)
            return op.astype(found, "bool")
        return reduction(x, axes, keep)
    wide = make.emit(op.astype(x, "float32")) if dtype in HALVES else x
    found = make.emit(reduction(wide, axes, keep))
    if kind in ("ReduceMax", "ReduceMin"):
        found = _with_infinities(make, wide, found, axes, keep)
    return op.astype(found, dtype) if dtype in HALVES else found


def _filled(make: Maker, x: Any, axes: list[int] | None) -> Any:
    """`x`, whose axes that are reduced hold something whenever the others do."""
    over = {axis % max(make.rank(x), 1) for axis in (range(make.rank(x)) if axes is None else axes)}
    return make.filled(x, sorted(over), [size for axis, size in enumerate(make.shape(x)) if axis not in over])


def _with_infinities(make: Maker, x: Any, found: Any, axes: list[int] | None, keep: bool) -> Any:
    """A maximum or minimum with NaN where there is one, and an infinity where there is nothing else.

    TVM's reductions begin with the lowest or highest finite number and pass by NaN.
    """
    far = float("-inf") if make.node.op_type == "ReduceMax" else float("inf")

    def rank(t: Any) -> Any:
        other = tirx.Select(t != like(t, far), tirx.const(1, "int8"), tirx.const(0, "int8"))
        return tirx.Select(tirx.isnan(t), tirx.const(2, "int8"), other)

    most = make.emit(op.max(mapped(make, rank, x), axes, keep))
    number = op.where(op.equal(most, relax.const(1, "int8")), found, relax.const(far, make.dtype(found)))
    spoilt = op.equal(most, relax.const(2, "int8"))
    return make.emit(op.where(spoilt, relax.const(float("nan"), make.dtype(found)), number))


def _enter(name: str, reduction: Reduction, since: int) -> None:
    @lowers(name)
    def by_attribute(make: Maker, x: Any, *, axes: tuple[int, ...] | None = None, keepdims: int = 1) -> Any:
        return _reduced(make, reduction, x, list(axes) if axes else None, bool(keepdims))

    @lowers(name, since=since, sizes=(1,))
    def by_input(make: Maker, x: Any, axes: Any = None, *, keepdims: int = 1, noop_with_empty_axes: int = 0) -> Any:
        if not axes and noop_with_empty_axes:
            if name in ("ReduceL1", "ReduceL2", "ReduceLogSum", "ReduceLogSumExp", "ReduceSumSquare"):
                raise Unsupported(f"{name} over no axis")
            return x
        return _reduced(make, reduction, x, plain(axes, "an axis") if axes else None, bool(keepdims))


for _name, (_reduction, _since) in _REDUCTIONS.items():
    _enter(_name, _reduction, _since)


Along = Callable[[Any, int], Any]


def _along(make: Maker, function: Along, x: Any, axis: int) -> Any:
    """A function along an axis; halves in float32."""
    dtype = make.dtype(x)
    if dtype not in HALVES:
        return function(x, axis)
    return op.astype(make.emit(function(make.emit(op.astype(x, "float32")), axis)), dtype)


def _of_the_rest(make: Maker, function: Along, x: Any, axis: int) -> Any:
    """A function over all axes from one on, as Softmax was before opset 13."""
    shape = make.shape(x)
    axis %= max(len(shape), 1)
    flat = make.emit(op.reshape(x, [times(shape[:axis]), times(shape[axis:])]))
    return op.reshape(make.emit(_along(make, function, flat, 1)), shape)


def _hardmax(x: Any, axis: int) -> Any:
    """One at the place of the largest element, zero elsewhere."""
    sizes = type_of(x).shape.values
    places = op.reshape(op.arange(0, sizes[axis], 1, "int64"), [sizes[axis], *[1] * (len(sizes) - 1 - axis)])
    return op.astype(op.equal(op.argmax(x, axis, True), places), str(type_of(x).dtype))


_ALONG = {"Softmax": op.nn.softmax, "LogSoftmax": op.nn.log_softmax, "Hardmax": _hardmax}


def _enter_along(name: str, function: Along) -> None:
    @lowers(name)
    def of_the_rest(make: Maker, x: Any, *, axis: int = 1) -> Any:
        return _of_the_rest(make, function, x, axis)

    @lowers(name, since=13)
    def along(make: Maker, x: Any, *, axis: int = -1) -> Any:
        return _along(make, function, x, axis % max(make.rank(x), 1))


for _name, _function in _ALONG.items():
    _enter_along(_name, _function)


@lowers("ArgMax", "ArgMin", since=1)
def arg(make: Maker, x: Any, *, axis: int = 0, keepdims: int = 1, select_last_index: int = 0) -> Any:
    """The place of the largest or smallest element; a NaN is not looked for."""
    find = op.argmax if make.node.op_type == "ArgMax" else op.argmin
    axis %= make.rank(x)
    x = _filled(make, x, [axis])
    first = relax.const(0, "int64")
    if not select_last_index:
        return op.maximum(find(x, axis, bool(keepdims)), first)  # -1 where all are infinite
    last = fixed(make.shape(x)[axis], "the size of the axis") - 1
    turned = make.emit(find(make.emit(op.flip(x, axis)), axis, bool(keepdims)))
    return op.subtract(relax.const(last, "int64"), op.maximum(turned, first))
