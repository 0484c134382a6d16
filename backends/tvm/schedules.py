"""Schedules for kernels of a GPU that nothing was tuned for: rules in order, the next one where one fails.

A rule of dlight can raise on a kernel that it means to take: its tensor-core rule does on convolutions whose sizes have
to be filled up to its tiles. Such a kernel gets the same rule without tensor cores, then the rules behind it; only the
last one, which takes everything, may fail.

dlight puts products of float16 on tensor cores. Those of bfloat16 (summed in float32) and of int8 (summed in int32) get
the same schedule here with the matrix instructions of their dtype, from sm_80 and sm_75 on.
"""

from __future__ import annotations

import threading
from typing import Any
from unittest import mock

from tvm import tirx
from tvm.s_tir import Schedule, TensorIntrin, dlight
from tvm.s_tir.dlight.analysis import get_root_block
from tvm.s_tir.dlight.gpu import matmul

from burnish.backends.tvm import intrinsics

_PLAIN = "dlight.do_not_tensorize"
_SMALLEST = 64
"""Products with a size up to this are left to the plain rule, as dlight does."""
_SINCE = {"bfloat16": 80, "int8": 75}
_SUMS = {"bfloat16": "float32", "int8": "int32"}
_lock = threading.Lock()


class _Attempt(dlight.ScheduleRule):  # type: ignore[misc]
    """A rule that says it does not apply where it fails."""

    def __init__(self, rule: Any) -> None:
        self.rule = rule

    def apply(self, func: Any, target: Any, tunable: bool) -> Any:
        try:
            return self.rule.apply(func, target, tunable)
        except Exception:  # whatever TVM raises: the next rule is asked
            return None


class _TensorCores(dlight.ScheduleRule):  # type: ignore[misc]
    """dlight's schedule for tensor cores with the instructions of another dtype."""

    def apply(self, func: Any, target: Any, tunable: bool) -> Any:
        dtype = _dtype(func)
        number = str(target.attrs.get("arch", "")).removeprefix("sm_")
        if dtype is None or not number.isdigit() or int(number) < _SINCE[dtype]:
            return None
        with _lock, mock.patch("tvm.s_tir.tensor_intrin.cuda.get_wmma_intrin_group", lambda **_: _group(dtype)):
            return _Attempt(matmul.MatmulTensorization()).apply(func, target, tunable)


class _Matmul(dlight.ScheduleRule):  # type: ignore[misc]
    """dlight's matrix product, without tensor cores where it fails with them."""

    def apply(self, func: Any, target: Any, tunable: bool) -> Any:
        rule = _Attempt(dlight.gpu.Matmul())
        return rule.apply(func, target, tunable) or rule.apply(func.with_attr(_PLAIN, True), target, tunable)


def apply(module: Any) -> Any:
    """The module with a schedule for each kernel that has none; the target is the one in scope."""
    intrinsics.load()
    _register()
    rules = [_TensorCores(), _Matmul(), dlight.gpu.GEMV(), dlight.gpu.Reduction(), dlight.gpu.GeneralReduction()]
    return dlight.ApplyDefaultSchedule(*map(_Attempt, rules), dlight.gpu.Fallback())(module)


def _dtype(func: Any) -> str | None:
    """The dtype of the factors, where a kernel is a product that the table above has, and large enough."""
    schedule = Schedule(func)
    blocks = matmul.get_reduction_blocks(schedule, schedule.get_child_blocks(get_root_block(schedule)))
    maps = matmul.get_index_map(schedule.get(blocks[0])) if blocks else None
    if not maps:
        return None
    block = schedule.get(blocks[0])
    factors = {str(one.source.dtype) for one in block.reads}
    dtype = factors.pop() if len(factors) == 1 else ""
    if dtype not in _SUMS or str(block.writes[0].source.dtype) != _SUMS[dtype]:
        return None
    ends = [schedule.reindex(blocks[0], end) for end in (("read", 0), ("read", 1), ("write", 0))]
    for end, side, index in zip(ends, ("write", "write", "read"), maps[1:], strict=True):
        schedule.transform_layout(end, (side, 0), index)
    schedule.transform_block_layout(blocks[0], maps[0])
    sizes = [one.dom.extent for one in schedule.get(blocks[0]).iter_vars[1:]]
    return None if any(isinstance(size, tirx.IntImm) and int(size) <= _SMALLEST for size in sizes) else dtype


def _group(dtype: str) -> dict[str, str]:
    """Names of the instructions of a dtype, as `get_wmma_intrin_group` gives them."""
    short, sums = {"bfloat16": ("bf16", "f32"), "int8": ("s8", "s32")}[dtype]
    return {
        "init": f"wmma_fill_16x16x16_{sums}",
        "load_a": f"wmma_load_16x16x16_{short}_a_shared_dyn",
        "load_b": f"wmma_load_16x16x16_{short}_b_trans_shared_dyn",
        "compute": f"wmma_sync_16x16x16_{short}{short}{sums}_trans",
        "store": f"wmma_store_16x16x16_{sums}_shared_dyn",
    }


def _register() -> None:
    """Give TVM the matrix instructions of bfloat16, which it lacks."""
    from tvm.s_tir.tensor_intrin import cuda

    names = _group("bfloat16")
    with _lock:
        if TensorIntrin.get(names["compute"], allow_missing=True) is not None:
            return
        load, size = cuda.get_wmma_load_intrin, (16, 16, 16)
        TensorIntrin.register(names["load_a"], *load(*size, "bfloat16", "shared.dyn", False, False))
        TensorIntrin.register(names["load_b"], *load(*size, "bfloat16", "shared.dyn", True, True))
        TensorIntrin.register(names["compute"], *cuda.get_wmma_sync_intrin(*size, "bfloat16", "float32", True))
