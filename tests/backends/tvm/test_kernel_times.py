"""Times of compiled parts: what is one kernel, what is looked up, and what ONNX Runtime has to say."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("tvm")

from compiled_operators import graph  # noqa: E402

from burnish.backends.ort.kernel_times import KernelTimes  # noqa: E402
from burnish.backends.tvm import compiling  # noqa: E402
from burnish.backends.tvm.kernel_times import CompiledTimes  # noqa: E402
from burnish.backends.tvm.target import parse  # noqa: E402
from burnish.passes.latency import Work  # noqa: E402
from burnish.passes.score_store import Store  # noqa: E402

Found = list[float | str]


def plain(fused: Any) -> tuple[Any, int]:
    return compiling.scheduled(fused, parse("llvm")), 0


def rival(first: Work, others: Sequence[Work]) -> Found:
    """A machine on which everything takes an hour."""
    return [3600.0 for _ in (first, *others)]


def timer(store: Store | None = None, other: Any = rival, schedule: Any = plain, **options: Any) -> CompiledTimes:
    chosen: dict[str, Any] = {"everything": True, "seconds": 0.02} | options
    return CompiledTimes(parse("llvm"), schedule, other, store, **chosen)


def work(body: str, rows: int = 8) -> Work:
    """A graph of x [N, 32] and w [32, 32] on so many rows."""
    model = graph(f"g (float[N, 32] x, float[32, 32] w) => (y) {{ {body} }}")
    draw = np.random.default_rng(0)
    feeds = {"x": draw.standard_normal((rows, 32), np.float32), "w": draw.standard_normal((32, 32), np.float32)}
    return Work(model, feeds)


ONE = "h = MatMul (x, w)  y = Relu (h)"
TWO = "h = MatMul (x, w)  i = Relu (h)  j = MatMul (i, w)  y = Relu (j)"


def test_equal_kernels_are_timed_once_and_add_up(tmp_path: Path) -> None:
    store = Store(tmp_path / "scores.sqlite")
    first = timer(store)
    one, two = first(work(ONE), [work(TWO)])
    assert first.measured == 1 and two == 2 * one > 0
    again = timer(store)
    assert again(work(TWO), [work(ONE)]) == [two, one] and again.measured == 0
    more = timer(store)
    (large,) = more(work(ONE, rows=64), [])
    assert more.measured == 1 and large > 2 * one


def test_another_schedule_of_a_kernel_is_another_kernel(tmp_path: Path) -> None:
    from tvm.s_tir import Schedule

    def unrolled(fused: Any) -> tuple[Any, int]:
        schedule = Schedule(fused)
        for name in (v.name_hint for v, f in fused.functions_items() if "matmul" in v.name_hint):
            schedule.work_on(name)
            schedule.unroll(schedule.get_loops(schedule.get_sblock("matmul"))[-1])
        return plain(schedule.mod)[0], 1

    store = Store(tmp_path / "scores.sqlite")
    timer(store)(work(ONE), [])
    other = timer(store, schedule=unrolled)
    other(work(ONE), [])
    assert other.measured == 1


def test_what_is_not_compiled_is_timed_in_onnx_runtime(tmp_path: Path) -> None:
    store = Store(tmp_path / "scores.sqlite")
    asked: list[list[str]] = []

    def told(first: Work, others: Sequence[Work]) -> Found:
        asked.append([node.op_type for node in first.model.graph])
        assert set(first.feeds) == {"h"} and first.feeds["h"].shape == (8, 32)
        return [0.25, *(0.25 for _ in others)]

    (found,) = timer(store, told)(work("h = MatMul (x, w)  y = NonZero (h)"), [])
    assert asked == [["NonZero"]] and isinstance(found, float) and 0.25 < found < 0.26


def test_where_regions_are_measured_the_smaller_time_counts() -> None:
    slow, quick = ((lambda first, others, s=s: [s for _ in (first, *others)]) for s in (3600.0, 1e-9))
    (own,) = timer(everything=True)(work(ONE), [])
    (found,) = timer(None, slow, everything=False)(work(ONE), [])
    assert isinstance(own, float) and isinstance(found, float) and found < 100 * own
    assert timer(None, quick, everything=False)(work(ONE), []) == [1e-9]
    refused = Work(graph("g (float[N] x) => (y) { y = NoSuchOperator (x) }"), {"x": np.ones(3, np.float32)})
    assert timer(None, quick, everything=False)(work(ONE), [refused]) == [1e-9, 1e-9]


def test_what_runs_nowhere_says_why_and_leaves_the_others() -> None:
    refused = Work(graph("g (float[N] x) => (y) { y = NoSuchOperator (x) }"), {"x": np.ones(3, np.float32)})
    one, why, two = timer(other=KernelTimes(seconds=0.01))(work(ONE), [refused, work(TWO)])
    assert isinstance(one, float) and two == 2 * one and "NoSuchOperator" in str(why)


def test_a_branch_counts_as_it_is_taken(tmp_path: Path) -> None:
    """One branch is sixteen products, so that no noise of a busy machine makes it the shorter one."""
    products = "p0 = MatMul (x, w)  " + "  ".join(f"p{i + 1} = MatMul (p{i}, w)" for i in range(15))
    body = f"""c = Constant <value_float = {{sign}}> ()  s = ReduceSum <keepdims = 0> (x)  b = Greater (s, c)
      y = If (b) <then_branch = t () => (float[N, 32] p15) {{{{ {products} }}}},
                  else_branch = e () => (float[N, 32] q) {{{{ q = Relu (x) }}}}>"""
    store = Store(tmp_path / "scores.sqlite")
    taken, left = timer(store)(work(body.format(sign="-1.0e30")), [work(body.format(sign="1.0e30"))])
    assert isinstance(taken, float) and isinstance(left, float) and taken > left > 0
    again = timer(store)
    assert again(work(body.format(sign="-1.0e30")), []) == [taken] and again.measured == 0


def test_times_with_weights_out_of_the_cache_are_kept_apart(tmp_path: Path) -> None:
    store = Store(tmp_path / "scores.sqlite")
    timer(store)(work(ONE), [])
    cold = timer(store, cold=True)
    (found,) = cold(work(ONE), [])
    assert cold.measured == 1 and isinstance(found, float) and found > 0
