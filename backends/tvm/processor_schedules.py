"""Schedules for a processor of kernels that nothing was tuned for: products with weights that they unpack themselves,
weighted sums of rows that they pick, and pairs of products.

A kernel is taken by what it does: a sum of products over one axis whose second factor is computed, element by element,
from integers of at most 8 bits. The weight is then never written to memory: for one or two rows it is unpacked in
registers where it is multiplied, else a few columns of it at a time, which stay in the nearest cache for all rows. All
other kernels stay plain loops.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tvm import tirx
from tvm.ir import TensorLoad
from tvm.s_tir import Schedule, ScheduleError

_LANES = 16
"""Numbers of float32 that are multiplied at a time: a register of AVX-512, or two of AVX2."""
_FEW = 2
"""Rows up to which a weight is unpacked again for each."""
_STRETCH = 8
"""Registers that hold a stretch of columns while rows are added to it."""
_BLOCK = 64
"""Rows of a pair of products whose middle is computed at a time."""
_NARROW = ("int8", "uint8")
_SCHEDULED = "tirx.is_scheduled"


@dataclass(frozen=True)
class _Product:
    """A product in a kernel: `sum over k of x[m, k] * weight`.

    Attributes:
        block, weight: the names of the blocks that sum and that unpack.
        rows: m, or None when it is known only when the kernel runs.
        width, depth: n and k.
        along_depth: whether the weight lies in memory as [n, k].
        packed: how many elements a byte of it holds.
        run: elements along the axis that lies together in memory which have one scale.
    """

    block: str
    weight: str
    rows: int | None
    width: int
    depth: int
    along_depth: bool
    packed: int
    run: int


def apply(module: Any) -> Any:
    """The module, changed in place, with a schedule for each kernel that has none and is one of these."""
    for variable, function in module.functions_items():
        if not isinstance(function, tirx.PrimFunc) or (function.attrs and _SCHEDULED in function.attrs):
            continue
        made = scheduled(function)
        if made is not None:
            module.update_func(variable, made)
    return module


def scheduled(function: Any) -> Any:
    """A kernel with a schedule; None when it is none of these."""
    schedule = Schedule(function)
    try:
        schedule.get_sblock("root")
    except ScheduleError:  # one block that TVM wrote by hand, as of CumSum
        return None
    product = _recognised(schedule)
    if product is None:
        done = _rows(schedule) or _pair(schedule)
        return schedule.mod["main"].with_attr(_SCHEDULED, True) if done else None
    done = _along_depth(schedule, product) if product.along_depth else _along_width(schedule, product)
    return schedule.mod["main"].with_attr(_SCHEDULED, True) if done else None


def _recognised(schedule: Any) -> _Product | None:
    root = schedule.get_sblock("root")
    blocks = {schedule.get(one).name_hint: one for one in schedule.get_child_blocks(root)}
    sums = [one for one in blocks.values() if any(i.iter_type == _REDUCED for i in schedule.get(one).iter_vars)]
    if len(sums) != 1:
        return None
    block = schedule.get(sums[0])
    kinds = [one.iter_type for one in block.iter_vars]
    if len(kinds) != 3 or kinds[2] != _REDUCED or len(block.reads) != 2 or not _multiplies(block):
        return None
    m, n, k = (one.var for one in block.iter_vars)
    first, second = ([r.min for r in one.region] for one in block.reads)
    if not _same(first, (m, k)) or not (_same(second, (n, k)) or _same(second, (k, n))):
        return None
    makers = [one for one in schedule.get_producers(sums[0]) if _writes(schedule, one, block.reads[1].source)]
    rows, width, depth = (_number(one.dom.extent) for one in block.iter_vars)
    if len(makers) != 1 or width is None or depth is None:
        return None
    unpack = schedule.get(makers[0])
    read = [one.source for one in unpack.reads]
    narrow = [one for one in read if str(one.dtype) in _NARROW]
    if not narrow or any(i.iter_type == _REDUCED for i in unpack.iter_vars):
        return None
    along = _same(second, (n, k))
    stored = max(math.prod(_number(size) or 0 for size in one.shape) for one in narrow)
    inner = depth if along else width
    scales = [_number(one.shape[-1]) for one in read if len(one.shape) > 1 and str(one.dtype) not in _NARROW]
    run = min([inner // size for size in scales if size and 1 < size < inner], default=inner)
    packed = round(width * depth / stored) if stored else 0
    if packed not in (1, 2, 4):
        return None
    return _Product(block.name_hint, unpack.name_hint, rows, width, depth, along, packed, run if along else inner)


_REDUCED = 2


def _multiplies(block: Any) -> bool:
    """Whether a block adds the product of what it reads to what it writes, in float32."""
    store = block.body
    if not isinstance(store, tirx.BufferStore) or not isinstance(store.value, tirx.Add):
        return False
    return isinstance(store.value.b, tirx.Mul) and str(store.value.ty.dtype) == "float32"


def _same(found: Sequence[Any], wanted: Sequence[Any]) -> bool:
    return len(found) == len(wanted) and all(a.same_as(b) for a, b in zip(found, wanted, strict=True))


def _writes(schedule: Any, block: Any, buffer: Any) -> bool:
    return any(one.source.same_as(buffer) for one in schedule.get(block).writes)


def _number(size: Any) -> int | None:
    return int(size) if isinstance(size, int | tirx.IntImm) else None


def _largest(size: int, most: int) -> int:
    """The largest divisor of a size up to a bound."""
    return next(one for one in range(min(size, most), 0, -1) if size % one == 0)


def _along_depth(schedule: Any, product: _Product) -> bool:
    """[n, k] in memory: sums of 16 lanes along k, which are added at the end."""
    packed = product.packed
    lanes = next(
        (one for one in (_LANES, 8, 4) if not product.depth % (one * packed) and not product.run % (one * packed)), 0
    )
    if not lanes:
        return False
    step = lanes * packed

    def in_lanes(row: Any, place: Any) -> tuple[Any, ...]:
        return row, place // step, place % packed, place % step // packed

    block, weight = schedule.get_sblock(product.block), schedule.get_sblock(product.weight)
    k = schedule.get_loops(block)[-1]
    _, lane, _ = schedule.split(k, [None, lanes, packed])
    parts = schedule.rfactor(lane, -1)
    m, n, steps, lane, half = schedule.get_loops(parts)
    few = product.rows is not None and product.rows <= _FEW
    tall = 1 if product.rows is None else _largest(product.rows, 4)
    outer, inner = schedule.split(m, [None, tall])
    columns, column = schedule.split(n, [None, _largest(product.width, 4)])
    schedule.reorder(columns, outer, steps, half, inner, column, lane)
    schedule.reverse_compute_at(block, outer)
    if packed > 1:
        schedule.cache_read(parts, 0, "global")
        schedule.transform_layout(parts, ("read", 0), in_lanes)
    if few:
        schedule.compute_inline(weight)
    else:
        schedule.compute_at(weight, columns)
        if packed > 1:
            schedule.transform_layout(weight, ("write", 0), in_lanes)
        place = schedule.get_loops(weight)[-1]
        whole, one, part = schedule.split(place, [None, lanes, packed])
        schedule.reorder(whole, part, one)
        schedule.vectorize(one)
        schedule.unroll(part)
    schedule.vectorize(lane)
    for loop in (half, inner, column):
        schedule.unroll(loop)
    schedule.decompose_reduction(parts, steps)
    return True


def _along_width(schedule: Any, product: _Product) -> bool:
    """[k, n] in memory: 16 columns at a time, each row of the weight times one number of the input."""
    if product.width % _LANES or product.packed > 1:
        return False
    block, weight = schedule.get_sblock(product.block), schedule.get_sblock(product.weight)
    written = schedule.cache_write(block, 0, "local")
    m, n, k = schedule.get_loops(block)
    few = product.rows is not None and product.rows <= _FEW
    tall = 1 if product.rows is None else _largest(product.rows, 4)
    outer, inner = schedule.split(m, [None, tall])
    wide = _largest(product.width // _LANES, 4)
    columns, column, lane = schedule.split(n, [None, wide, _LANES])
    schedule.reorder(columns, outer, k, inner, column, lane)
    schedule.reverse_compute_at(written, outer)
    schedule.vectorize(schedule.split(schedule.get_loops(written)[-1], [None, _LANES])[1])
    if few:
        schedule.compute_inline(weight)
    else:
        schedule.compute_at(weight, columns)
        schedule.vectorize(schedule.split(schedule.get_loops(weight)[-1], [None, _LANES])[1])
    schedule.vectorize(lane)
    for loop in (inner, column):
        schedule.unroll(loop)
    schedule.decompose_reduction(block, k)
    return True


def _rows(schedule: Any) -> bool:
    """A sum, with weights, of rows that indices pick: a stretch of columns in registers, over which rows run by.

    False, and nothing is changed, where a kernel is something else.
    """
    blocks = schedule.get_child_blocks(schedule.get_sblock("root"))
    sums = [one for one in blocks if any(i.iter_type == _REDUCED for i in schedule.get(one).iter_vars)]
    variables = schedule.get(sums[0]).iter_vars if len(sums) == 1 else []
    kept = sum(one.iter_type != _REDUCED for one in variables)
    if not kept or kept == len(variables) or any(one.iter_type == _REDUCED for one in variables[:kept]):
        return False
    width = _number(variables[kept - 1].dom.extent) or 1
    lanes = next((one for one in (_LANES, 8, 4) if not width % one), 0)
    block = schedule.get(sums[0])
    if not lanes or not _multiplies(block) or not _picks(block, variables[kept - 1].var):
        return False
    written = schedule.cache_write(sums[0], 0, "local")
    loops = schedule.get_loops(sums[0])
    columns, column, lane = schedule.split(loops[kept - 1], [None, _largest(width // lanes, _STRETCH), lanes])
    schedule.reorder(columns, *loops[kept:], column, lane)
    schedule.reverse_compute_at(written, columns)
    schedule.vectorize(schedule.split(schedule.get_loops(written)[-1], [None, lanes])[1])
    schedule.vectorize(lane)
    schedule.unroll(column)
    schedule.decompose_reduction(sums[0], loops[kept])
    return True


def _picks(block: Any, column: Any) -> bool:
    """Whether one of two factors is read at a row that is computed of another thing that is read, and at a column."""
    product = block.body.value.b
    factors = [one.value if isinstance(one, tirx.Cast) else one for one in (product.a, product.b)]
    loads = [one.indices for one in factors if isinstance(one, TensorLoad) and len(one.indices) == 2]
    found = any(at[1].same_as(column) and not isinstance(at[0], tirx.Var) for at in loads)
    return found and len(block.reads) == 3


def _pair(schedule: Any) -> bool:
    """Two products, of which the second reads the first: the middle of some rows, then their columns, and so on.

    False, and nothing is changed, where a kernel is something else.
    """
    blocks = schedule.get_child_blocks(schedule.get_sblock("root"))
    parts = [schedule.get(one) for one in blocks]
    if len(blocks) < 2 or not all(_multiplies(one) for one in parts[:2]):
        return False
    if any([i.iter_type for i in one.iter_vars] != [0, 0] for one in parts[2:]):
        return False
    sizes = [[_number(one.dom.extent) for one in part.iter_vars] for part in parts]
    if any(len(one) != 3 or None in one[1:] or one[1] % _LANES for one in sizes[:2]):  # type: ignore[operator]
        return False
    if not _writes(schedule, blocks[0], parts[1].reads[0].source) or sizes[0][1] != sizes[1][2]:
        return False
    rows = _BLOCK if sizes[1][0] is None else _largest(sizes[1][0], _BLOCK)
    tall = 1 if sizes[1][0] is None else _largest(rows, 4)  # a tile that may end early is slower than no tile
    for one in blocks[2:-1]:
        schedule.compute_inline(one)
    behind = blocks[-1] if len(blocks) > 2 else schedule.cache_write(blocks[1], 0, "local")
    if len(blocks) > 2:
        schedule.set_scope(blocks[1], 0, "local")
    place = _columns(schedule, blocks[1], behind, schedule.get_loops(blocks[1]), [None, rows // tall, tall])
    schedule.compute_at(blocks[0], place, preserve_unit_loops=True)
    written = schedule.cache_write(blocks[0], 0, "local")
    _columns(schedule, blocks[0], written, schedule.get_loops(blocks[0])[-3:], [None, tall])
    return True


def _columns(schedule: Any, block: Any, written: Any, loops: Sequence[Any], heights: list[int | None]) -> Any:
    """A product with some rows and columns at a time in registers; the outermost loop.

    Args:
        schedule: of the kernel.
        block: the product.
        written: the block that copies its result to memory.
        loops: of rows, of columns, of the sum.
        heights: how the loop of rows is split: the last one goes over registers.
    """
    m, n, k = loops
    *outer, tile, row = schedule.split(m, heights)
    width = _number(schedule.get(n).extent) or _LANES
    wide = _largest(width // _LANES, 4 if (heights[-1] or 1) > 1 else 8)
    columns, column, lane = schedule.split(n, [None, wide, _LANES])
    schedule.reorder(*outer, columns, tile, k, row, column, lane)
    schedule.reverse_compute_at(written, tile)
    schedule.vectorize(schedule.split(schedule.get_loops(written)[-1], [None, _LANES])[1])
    schedule.vectorize(lane)
    for loop in (row, column):
        schedule.unroll(loop)
    schedule.decompose_reduction(block, k)
    return outer[0] if outer else columns
