"""Reductions over axes, softmax and what picks the largest."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tvm import relax

from burnish.backends.tvm.maker import Maker
from burnish.backends.tvm.operators.movement import plain
from burnish.backends.tvm.registry import Unsupported, lowers

op = relax.op
Reduction = Callable[[Any, list[int] | None, bool], Any]


def _l2(x: Any, axes: list[int] | None, keep: bool) -> Any:
    return op.sqrt(op.sum(op.multiply(x, x), axes, keep))


_REDUCTIONS: dict[str, tuple[Reduction, int]] = {
    "ReduceMean": (op.mean, 18),
    "ReduceSum": (op.sum, 13),
    "ReduceMax": (op.max, 18),
    "ReduceMin": (op.min, 18),
    "ReduceProd": (op.prod, 18),
    "ReduceL2": (_l2, 18),
    "ReduceL1": (lambda x, axes, keep: op.sum(op.abs(x), axes, keep), 18),
    "ReduceSumSquare": (lambda x, axes, keep: op.sum(op.multiply(x, x), axes, keep), 18),
}


def _enter(name: str, reduction: Reduction, since: int) -> None:
    @lowers(name)
    def by_attribute(make: Maker, x: Any, *, axes: tuple[int, ...] | None = None, keepdims: int = 1) -> Any:
        return reduction(x, list(axes) if axes is not None else None, bool(keepdims))

    @lowers(name, since=since, sizes=(1,))
    def by_input(
        make: Maker, x: Any, axes: Any = None, *, keepdims: int = 1, noop_with_empty_axes: int = 0
    ) -> Any:
        if not axes:
            if noop_with_empty_axes:
                return x
            return reduction(x, None, bool(keepdims))
        return reduction(x, plain(axes, "an axis"), bool(keepdims))


for _name, (_reduction, _since) in _REDUCTIONS.items():
    _enter(_name, _reduction, _since)


@lowers("Softmax")
def softmax_of_the_rest(make: Maker, x: Any, *, axis: int = 1) -> Any:
    if axis % make.rank(x) != make.rank(x) - 1:
        raise Unsupported("a Softmax over several axes")
    return op.nn.softmax(x, -1)


@lowers("Softmax", since=13)
def softmax(make: Maker, x: Any, *, axis: int = -1) -> Any:
    return op.nn.softmax(x, axis)


@lowers("LogSoftmax", since=13)
def log_softmax(make: Maker, x: Any, *, axis: int = -1) -> Any:
    return op.nn.log_softmax(x, axis)


@lowers("ArgMax", "ArgMin", since=11)
def arg(make: Maker, x: Any, *, axis: int = 0, keepdims: int = 1, select_last_index: int = 0) -> Any:
    if select_last_index:
        raise Unsupported("the last of equal elements")
    return (op.argmax if make.node.op_type == "ArgMax" else op.argmin)(x, axis, bool(keepdims))
