"""Schedules for kernels of a GPU that nothing was tuned for: rules in order, the next one where one fails.

A rule of dlight can raise on a kernel that it means to take: its tensor-core rule does on convolutions whose sizes have
to be filled up to its tiles. Such a kernel gets the same rule without tensor cores, then the rules behind it; only the
last one, which takes everything, may fail.
"""

from __future__ import annotations

from typing import Any

from tvm.s_tir import dlight

from burnish.backends.tvm import intrinsics

_PLAIN = "dlight.do_not_tensorize"


class _Attempt(dlight.ScheduleRule):  # type: ignore[misc]
    """A rule that says it does not apply where it fails."""

    def __init__(self, rule: Any) -> None:
        self.rule = rule

    def apply(self, func: Any, target: Any, tunable: bool) -> Any:
        try:
            return self.rule.apply(func, target, tunable)
        except Exception:  # whatever TVM raises: the next rule is asked
            return None


class _Matmul(dlight.ScheduleRule):  # type: ignore[misc]
    """dlight's matrix product, without tensor cores where it fails with them."""

    def apply(self, func: Any, target: Any, tunable: bool) -> Any:
        rule = _Attempt(dlight.gpu.Matmul())
        return rule.apply(func, target, tunable) or rule.apply(func.with_attr(_PLAIN, True), target, tunable)


def apply(module: Any) -> Any:
    """The module with a schedule for each kernel that has none; the target is the one in scope."""
    intrinsics.load()
    rules = [_Matmul(), *map(_Attempt, (dlight.gpu.GEMV(), dlight.gpu.Reduction(), dlight.gpu.GeneralReduction()))]
    return dlight.ApplyDefaultSchedule(*rules, dlight.gpu.Fallback())(module)
