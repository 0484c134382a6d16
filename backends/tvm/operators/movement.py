"""Operators that move elements without computing."""

from __future__ import annotations

from typing import Any

from tvm import relax, te, tirx

from burnish.backends.tvm.maker import Maker
from burnish.backends.tvm.registry import Unsupported, lowers

op = relax.op


def plain(sizes: list[Any], what: str) -> list[int]:
    """Sizes that must be numbers."""
    if not all(isinstance(one, int) for one in sizes):
        raise Unsupported(f"{what} is not a number")
    return sizes


@lowers("Reshape", since=5, sizes=(1,))
def reshape(make: Maker, x: Any, shape: list[Any], *, allowzero: int = 0) -> Any:
    source = make.shape(x)
    if not allowzero:
        shape = [source[axis] if isinstance(size, int) and size == 0 else size for axis, size in enumerate(shape)]
    if any(isinstance(size, int) and size == -1 for size in shape):
        proven = make.result()
        if proven is not None:
            shape = proven
    return op.reshape(x, shape)


@lowers("Flatten", since=9)
def flatten(make: Maker, x: Any, *, axis: int = 1) -> Any:
    shape = make.shape(x)
    axis += len(shape) if axis < 0 else 0
    return op.reshape(x, [times(shape[:axis]), times(shape[axis:])])


def times(sizes: list[Any]) -> Any:
    """The product of sizes."""
    total: Any = 1
    for size in sizes:
        total = total * size
    return total


@lowers("Transpose")
def transpose(make: Maker, x: Any, *, perm: tuple[int, ...] | None = None) -> Any:
    return op.permute_dims(x, list(perm) if perm is not None else None)


@lowers("Concat", since=4)
def concat(make: Maker, *inputs: Any, axis: int) -> Any:
    rank = make.rank(inputs[0])
    return op.concat(make.alike(*inputs, apart=rank - axis % rank), axis)


@lowers("Split", since=2, several=True)
def split_by_attribute(make: Maker, x: Any, *, axis: int = 0, split: tuple[int, ...] | None = None) -> Any:
    return _parts(make, x, list(split) if split is not None else None, axis)


@lowers("Split", since=13, sizes=(1,), several=True)
def split(make: Maker, x: Any, sizes: Any = None, *, axis: int = 0, num_outputs: int | None = None) -> Any:
    return _parts(make, x, sizes, axis)


def _parts(make: Maker, x: Any, sizes: list[Any] | None, axis: int) -> tuple[Any, ...]:
    whole, count = make.shape(x)[axis], len(make.node.outputs)
    if sizes is None:
        if not isinstance(whole, int):
            raise Unsupported("the size of the split axis is not a number")
        each = -(-whole // count)
        sizes = [min(each, whole - each * index) for index in range(count)]
    start: Any = 0
    found = []
    for size in sizes:
        found.append(part(make, x, axis % make.rank(x), start, start + size))
        start = start + size
    return tuple(found)


@lowers("Squeeze")
def squeeze_by_attribute(make: Maker, x: Any, *, axes: tuple[int, ...] | None = None) -> Any:
    return op.squeeze(x, list(axes) if axes is not None else None)


@lowers("Squeeze", since=13, sizes=(1,))
def squeeze(make: Maker, x: Any, axes: list[Any] | None = None) -> Any:
    return op.squeeze(x, plain(axes, "an axis") if axes is not None else None)


@lowers("Unsqueeze")
def unsqueeze_by_attribute(make: Maker, x: Any, *, axes: tuple[int, ...]) -> Any:
    return op.expand_dims(x, list(axes))


@lowers("Unsqueeze", since=13, sizes=(1,))
def unsqueeze(make: Maker, x: Any, axes: list[Any]) -> Any:
    return op.expand_dims(x, plain(axes, "an axis"))


@lowers("Expand", since=8, sizes=(1,))
def expand(make: Maker, x: Any, shape: list[Any]) -> Any:
    proven = make.result()
    return op.broadcast_to(x, proven if proven is not None else shape)


@lowers("Tile", since=6, sizes=(1,))
def tile(make: Maker, x: Any, repeats: list[Any]) -> Any:
    """By broadcasting: TVM 0.27 drops a remainder from the index that `topi.tile` writes and reads outside."""
    shape, between, spread, whole = make.shape(x), [], [], []
    for size, count in zip(shape, plain(repeats, "a number of repeats"), strict=True):
        between += [size] if count == 1 else [1, size]
        spread += [size] if count == 1 else [count, size]
        whole.append(size * count)
    apart = make.emit(op.reshape(x, between))
    return op.reshape(make.emit(op.broadcast_to(apart, spread)), whole)


def part(make: Maker, x: Any, axis: int, start: Any, stop: Any) -> Any:
    """The elements from `start` to `stop` of an axis, both inside of it."""
    return make.emit(op.strided_slice(x, [axis], [start], [stop], [1], assume_inbound=True))


@lowers("Slice")
def slice_by_attributes(
    make: Maker, x: Any, *, starts: tuple[int, ...], ends: tuple[int, ...], axes: tuple[int, ...] | None = None
) -> Any:
    return sliced(make, x, list(starts), list(ends), list(axes) if axes is not None else None, None)


@lowers("Slice", since=10, sizes=(1, 2, 3, 4))
def sliced(make: Maker, x: Any, starts: list[Any], ends: list[Any], axes: Any = None, steps: Any = None) -> Any:
    shape = make.shape(x)
    axes = plain(axes, "an axis") if axes is not None else list(range(len(starts)))
    steps = plain(steps, "a step") if steps is not None else [1] * len(starts)
    axes = [axis % len(shape) for axis in axes]
    ahead = [at for at, step in enumerate(steps) if step > 0]
    for at in set(range(len(steps))) - set(ahead):
        x = _backward(make, x, axes[at], starts[at], ends[at], steps[at])
    bounds = [_bounds(shape[axes[at]], starts[at], ends[at]) for at in ahead]
    if not bounds:
        return x
    begin, end = (list(side) for side in zip(*bounds, strict=True))
    kept = [axes[at] for at in ahead]
    return op.strided_slice(x, kept, begin, end, [steps[at] for at in ahead], assume_inbound=True)


_FAR = 10**9
"""Ends from here on mean the end of the axis: exporters write 2**31 - 1, 2**63 - 1 and 10**9."""


def _backward(make: Maker, x: Any, axis: int, start: Any, stop: Any, step: int) -> Any:
    """Elements of an axis from the end to the beginning; TVM gives the slice another size."""
    size = make.shape(x)[axis]
    if not all(isinstance(one, int) for one in (size, start, stop)):
        raise Unsupported("a backward slice of a dynamic axis")
    places = range(*slice(start, stop if stop >= -_FAR else None, step).indices(size))

    def picked(t: Any) -> Any:
        shape = [*t.shape[:axis], len(places), *t.shape[axis + 1 :]]
        return te.compute(
            shape, lambda *at: t(*at[:axis], places.start + at[axis] * step, *at[axis + 1 :]), name="backward"
        )

    return make.te(picked, x)


def _bounds(size: Any, start: Any, stop: Any) -> tuple[Any, Any]:
    """Begin and end with the meaning of negative and of far away numbers resolved."""
    return _clamped(size, start), _clamped(size, stop)


def _clamped(size: Any, place: Any) -> Any:
    if isinstance(place, int) and isinstance(size, int):
        return max(0, min(size, place + size if place < 0 else place))
    if isinstance(place, int) and place >= _FAR:
        return size
    if isinstance(place, int) and place < 0:
        return tirx.max(size + place, tirx.const(0, "int64")) if place >= -_FAR else 0
    if isinstance(place, int):
        return place if place == 0 else tirx.min(size, tirx.const(place, "int64"))
    return place


@lowers("Pad", since=2)
def pad_by_attributes(make: Maker, x: Any, *, pads: tuple[int, ...], mode: str = "constant", value: float = 0.0) -> Any:
    return _padded(make, x, list(pads), mode, value)


@lowers("Pad", since=11, sizes=(1, 3))
def pad(make: Maker, x: Any, pads: list[Any], value: Any = None, axes: Any = None, *, mode: str = "constant") -> Any:
    filler = None if value is None else make.array(value)
    if value is not None and filler is None:
        raise Unsupported("padding with a computed value")
    widths, rank = plain(pads, "a width"), make.rank(x)
    if axes is not None:
        places = [axis % rank for axis in plain(axes, "an axis")]
        spread = [0] * (2 * rank)
        for index, axis in enumerate(places):
            spread[axis], spread[axis + rank] = widths[index], widths[index + len(places)]
        widths = spread
    return _padded(make, x, widths, mode, 0.0 if filler is None else float(filler.reshape(())))


def _padded(make: Maker, x: Any, widths: list[int], mode: str, value: float) -> Any:
    if min(widths, default=0) < 0 or mode not in ("constant", "reflect", "edge"):
        raise Unsupported(f"Pad of mode {mode} with these widths")
    rank = len(widths) // 2
    pairs = [width for axis in range(rank) for width in (widths[axis], widths[axis + rank])]
    return op.nn.pad(x, pairs, {"constant": "constant", "reflect": "reflect", "edge": "replicate"}[mode], value)


@lowers("DepthToSpace", since=11)
def depth_to_space(make: Maker, x: Any, *, blocksize: int, mode: str = "DCR") -> Any:
    n, c, h, w = make.shape(x)
    b = blocksize
    if mode == "DCR":
        apart = op.permute_dims(op.reshape(x, [n, b, b, c // (b * b), h, w]), [0, 3, 4, 1, 5, 2])
    else:
        apart = op.permute_dims(op.reshape(x, [n, c // (b * b), b, b, h, w]), [0, 1, 4, 2, 5, 3])
    return op.reshape(make.emit(apart), [n, c // (b * b), h * b, w * b])


@lowers("SpaceToDepth")
def space_to_depth(make: Maker, x: Any, *, blocksize: int) -> Any:
    n, c, h, w = make.shape(x)
    b = blocksize
    apart = op.permute_dims(op.reshape(x, [n, c, h // b, b, w // b, b]), [0, 3, 5, 1, 2, 4])
    return op.reshape(make.emit(apart), [n, c * b * b, h // b, w // b])
