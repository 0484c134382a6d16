"""Pooling over windows and over whole images."""

from __future__ import annotations

from typing import Any

from tvm import relax, te, tirx

from burnish.backends.tvm.maker import Maker
from burnish.backends.tvm.operators.network import HALVES, window_of
from burnish.backends.tvm.registry import Unsupported, lowers

op = relax.op
_WINDOW = ("kernel_shape", "strides", "pads", "dilations", "auto_pad", "ceil_mode")


class _Pool:
    """Windows over the last axes of an image: how many there are, and what one of them reads.

    Windows that `ceil_mode` adds are kept as ONNX Runtime does: not where they would begin behind the padded image.
    """

    def __init__(
        self,
        make: Maker,
        x: Any,
        kernel_shape: tuple[int, ...],
        strides: tuple[int, ...] | None = None,
        pads: tuple[int, ...] | None = None,
        dilations: tuple[int, ...] | None = None,
        auto_pad: str = "NOTSET",
        ceil_mode: int = 0,
    ) -> None:
        self.kernel = list(kernel_shape)
        given = window_of(make, x, self.kernel, strides, pads, dilations, auto_pad)
        self.steps, self.pads, self.wide = given
        self.rank = len(self.kernel)
        self.counts = [self._count(at, size, ceil_mode) for at, size in enumerate(make.shape(x)[2:])]

    def _count(self, at: int, size: Any, up: int) -> Any:
        room = size + self.pads[at] + self.pads[at + self.rank] - self.wide[at] * (self.kernel[at] - 1) - 1
        if not up:
            count = room // self.steps[at] + 1
            # An image that is smaller than the window has one place in ONNX Runtime, which rounds towards zero.
            return count if isinstance(size, int) else tirx.max(count, tirx.const(1, "int64"))
        if not isinstance(size, int):
            raise Unsupported("a pool that rounds up the size of a dynamic axis")
        count = -(-room // self.steps[at]) + 1
        return count - 1 if (count - 1) * self.steps[at] >= size + self.pads[at] else count

    def axes(self) -> list[Any]:
        """New axes over the places of a window."""
        return [te.reduce_axis((0, size), name=f"k{at}") for at, size in enumerate(self.kernel)]

    def read(self, t: Any, at: tuple[Any, ...], places: list[Any], outside: Any) -> Any:
        """The element of an image [batch, channels, ...] at places of the window of the output at `at`."""
        spots = self.spots(at, places)
        inside = [spot >= 0 for spot in spots] + [spot < size for spot, size in zip(spots, t.shape[2:], strict=True)]
        return tirx.if_then_else(tirx.all(*inside), t(*at[:2], *spots), outside)

    def spots(self, at: tuple[Any, ...], places: list[Any]) -> list[Any]:
        """Where in the image the places of a window are; outside of it in its padding."""
        return [
            spot * step + place * far - before
            for spot, step, place, far, before in zip(
                at[2:], self.steps, places, self.wide, self.pads[: self.rank], strict=True
            )
        ]


@lowers("MaxPool", more=_WINDOW)
def max_pool(make: Maker, x: Any, *, storage_order: int = 0, **window: Any) -> Any:
    if any(out.name for out in make.node.outputs[1:]):
        raise Unsupported("the indices of MaxPool")
    pool = _Pool(make, x, **window)

    def pooled(t: Any) -> Any:
        dtype, places = str(t.dtype), pool.axes()
        least = tirx.min_value(dtype)

        def element(*at: Any) -> Any:
            return te.max(pool.read(t, at, places, least), axis=places)

        return te.compute((*t.shape[:2], *pool.counts), element, name="max_pool")

    return make.te(pooled, x)


@lowers("AveragePool", more=_WINDOW)
def average_pool(make: Maker, x: Any, *, count_include_pad: int = 0, **window: Any) -> Any:
    pool = _Pool(make, x, **window)
    dtype = make.dtype(x)
    wide = "float32" if dtype in HALVES else dtype

    def pooled(t: Any) -> Any:
        places, shape = pool.axes(), (*t.shape[:2], *pool.counts)

        def total(*at: Any) -> Any:
            read = pool.read(t, at, places, tirx.const(0, dtype))
            return te.sum(tirx.Cast(wide, read), axis=places)

        sums = te.compute(shape, total, name="sums")

        def average(*at: Any) -> Any:
            return tirx.Cast(dtype, sums(*at) / tirx.Cast(wide, _counted(pool, t, at, bool(count_include_pad))))

        return te.compute(shape, average, name="average_pool")

    return make.te(pooled, x)


def _counted(pool: _Pool, t: Any, at: tuple[Any, ...], padded: bool) -> Any:
    """How many places of a window are in the image, or in the padded image."""
    found: Any = tirx.const(1, "int64")
    for axis, size in enumerate(t.shape[2:]):
        step, far, before, after = (
            pool.steps[axis],
            pool.wide[axis],
            pool.pads[axis],
            pool.pads[axis + pool.rank],
        )
        first = at[2 + axis].astype("int64") * step - before
        low, high = (-before, size + after) if padded else (0, size)
        skipped = tirx.max((low - first + far - 1) // far, tirx.const(0, "int64"))
        end = tirx.min((high - first + far - 1) // far, tirx.const(pool.kernel[axis], "int64"))
        found = found * (end - skipped)
    return found


@lowers("LpPool", since=2, more=_WINDOW)
def lp_pool(make: Maker, x: Any, *, p: int = 2, **window: Any) -> Any:
    pool = _Pool(make, x, **window)
    dtype = make.dtype(x)

    def pooled(t: Any) -> Any:
        places, shape = pool.axes(), (*t.shape[:2], *pool.counts)

        def total(*at: Any) -> Any:
            size = tirx.abs(pool.read(t, at, places, tirx.const(0, dtype)))
            return te.sum(tirx.pow(size, tirx.const(float(p), dtype)), axis=places)

        sums = te.compute(shape, total, name="sums")
        return te.compute(shape, lambda *at: tirx.pow(sums(*at), tirx.const(1.0 / p, dtype)), name="lp_pool")

    return make.te(pooled, x)


@lowers("GlobalAveragePool")
def global_average_pool(make: Maker, x: Any) -> Any:
    axes = list(range(2, make.rank(x)))
    return op.mean(make.filled(x, axes, make.shape(x)[:2]), axes, True)


@lowers("GlobalMaxPool")
def global_max_pool(make: Maker, x: Any) -> Any:
    axes = list(range(2, make.rank(x)))
    return op.max(make.filled(x, axes, make.shape(x)[:2]), axes, True)
