"""Times of small models: how they are kept, and what is refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as oir
import pytest

from burnish.backends.ort.kernel_times import KernelTimes, processor
from burnish.passes.latency import Work
from burnish.passes.score_store import Store


def work(operator: str, size: int = 1000, repeat: int = 1) -> Work:
    steps = " ".join(f"h{i + 1} = {operator} (h{i})" for i in range(repeat - 1))
    body = f"{{ {steps} y = {operator} (h{repeat - 1}) }}"
    text = f'<ir_version: 10, opset_import: ["": 20]> g (float[N] h0) => (float[N] y) {body}'
    return Work(oir.from_onnx_text(text), {"h0": np.ones(size, np.float32)})


def test_twice_the_work_takes_longer_and_a_call_by_itself_takes_nothing() -> None:
    once, twice, small = KernelTimes(seconds=0.3)(work("Erf", 200_000), [work("Erf", 200_000, 2), work("Neg", 1)])
    assert isinstance(once, float) and isinstance(twice, float) and isinstance(small, float)
    assert 1.6 * once < twice < 2.4 * once
    assert small < 1e-5 < once


def test_times_are_found_again_by_shapes_threads_and_text(tmp_path: Path) -> None:
    store = Store(tmp_path / "scores.sqlite")
    first = KernelTimes(store, seconds=0.01)
    found = first(work("Neg"), [work("Abs")])
    assert first.measured == 2
    again = KernelTimes(store, seconds=0.01)
    assert again(work("Neg"), [work("Abs")]) == found and again.measured == 0
    assert again(work("Neg"), [work("Abs"), work("Exp")])[:2] == found and again.measured == 2
    again(work("Neg", 2000), [])
    assert again.measured == 3
    other = KernelTimes(store, threads=2, seconds=0.01)
    other(work("Neg"), [])
    assert other.measured == 1


def test_what_cannot_run_says_why_and_leaves_the_others(tmp_path: Path) -> None:
    unknown = work("NoSuchOperator")
    found = KernelTimes(seconds=0.01)(work("Neg"), [unknown, work("Abs")])
    assert isinstance(found[0], float) and isinstance(found[2], float)
    assert "NoSuchOperator" in str(found[1])
    refused = KernelTimes(seconds=0.01)(unknown, [work("Abs")])
    assert all(isinstance(one, str) for one in refused)
    wrong = Work(work("Neg").model, {"h0": np.ones((2, 2), np.float32)})
    assert "rank" in str(KernelTimes(seconds=0.01)(wrong, [])[0])


def test_times_that_cannot_be_kept_are_measured_all_the_same(tmp_path: Path) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("")
    store = Store(blocked / "scores.sqlite")
    timer = KernelTimes(store, seconds=0.01)
    assert timer(work("Neg"), []) == timer(work("Neg"), []) and timer.measured == 1


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "int64", "bool"])
def test_any_kind_of_number_can_be_timed(dtype: str) -> None:
    text = f'<ir_version: 10, opset_import: ["": 20]> g ({dtype}[N] x) => ({dtype}[N] y) {{ y = Identity (x) }}'
    kind = oir.DataType[{"float16": "FLOAT16", "bfloat16": "BFLOAT16", "int64": "INT64", "bool": "BOOL"}[dtype]]
    (found,) = KernelTimes(seconds=0.01)(Work(oir.from_onnx_text(text), {"x": np.ones(8, kind.numpy())}), [])
    assert isinstance(found, float)


def test_the_processor_has_a_name() -> None:
    assert "processors" in processor() and len(processor()) > len("1 processors, ")


def test_weights_that_are_not_in_the_cache_take_longer_to_multiply() -> None:
    text = '<ir_version: 10, opset_import: ["": 20]> g (float[1, 1024] x) => (float[1, 1024] y) { y = MatMul (x, w) }'
    model = oir.from_onnx_text(text)
    (node,) = model.graph
    weight = oir.tensor(np.ones((1024, 1024), np.float32), name="w")
    node.replace_input_with(
        1, oir.Value(name="w", const_value=weight, type=oir.TensorType(weight.dtype), shape=weight.shape)
    )
    model.graph.initializers.add(node.inputs[1])
    part = Work(model, {"x": np.ones((1, 1024), np.float32)})
    warm, cold = (KernelTimes(seconds=0.3, cold=cold)(part, [])[0] for cold in (False, True))
    assert isinstance(warm, float) and isinstance(cold, float) and cold > 1.2 * warm
