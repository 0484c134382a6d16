"""A search for time where kernels are compiled: what it chooses by, what it says, and what it refuses."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

tvm = pytest.importorskip("tvm")

import burnish  # noqa: E402
from burnish.backends.tvm import kernel_times, load  # noqa: E402
from burnish.ir.errors import BudgetError, BurnishError, InputError, UnchangedError  # noqa: E402
from burnish.passes.protocols import Verdict  # noqa: E402
from burnish.tools import api, lossy_report, report  # noqa: E402

QUICK = "project-rank{ranks=2,joint=False}"
TEXT = """<ir_version: 8, opset_import: ["": 17]> g (float[N, 96] x) => (float[N, 10] y)
<float[96, 96] a, float[96, 10] b> {
  c = MatMul (x, a)  d = Relu (c)  y = MatMul (d, b) }"""

pytestmark = pytest.mark.usefixtures("own_cache")


def optimize(tmp_path: Path, **arguments: Any) -> api.Result:
    """A run on two layers, the first nearly of rank 4, and the classes that these find."""
    draw = np.random.default_rng(0)
    first = draw.standard_normal((96, 4)) @ draw.standard_normal((4, 96)) + 1e-3 * draw.standard_normal((96, 96))
    weights = {"a": first.astype(np.float32), "b": draw.standard_normal((96, 10)).astype(np.float32)}
    proto = onnx.parser.parse_model(TEXT)
    proto.graph.initializer.extend(onnx.numpy_helper.from_array(array, name) for name, array in weights.items())
    x = draw.standard_normal((64, 96)).astype(np.float32)
    labels = (np.maximum(x @ weights["a"], 0) @ weights["b"]).argmax(1)
    np.savez(tmp_path / "data.npz", x=x, labels=labels)
    chosen = {"data": tmp_path / "data.npz", "passes": [QUICK], "max_drop": "20%", "objective": "latency"}
    chosen |= {"target": "llvm", "regions": "all", "guard": ["size"]} | arguments
    return burnish.optimize(proto, tmp_path / "out", **chosen)


def test_edits_are_chosen_by_kernels_that_ran_and_a_second_search_runs_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    counted: list[kernel_times.CompiledTimes] = []
    begin = kernel_times.CompiledTimes.__init__

    def noted(self: kernel_times.CompiledTimes, *given: Any, **options: Any) -> None:
        begin(self, *given, **options)
        counted.append(self)

    monkeypatch.setattr(kernel_times.CompiledTimes, "__init__", noted)
    result = optimize(tmp_path)
    assert result.lossy is not None and result.compiled is not None and result.lossy.edits
    found = report.as_dict(result)
    times = found["lossy"]["time"]
    assert times["timed_in"].startswith("in kernels compiled for llvm:") and "ONNX" not in times["timed_in"]
    assert 0 < times["saved"] < times["before"]
    assert any(times["timed_in"] in line for line in lossy_report.lines(result.lossy))
    assert found["latency"]["ratio"] < 1 and found["compiled"]["verified"]
    assert load(tmp_path / "out").run({"x": np.zeros((3, 96), np.float32)})["y"].shape == (3, 10)
    again = optimize(tmp_path)
    assert [one.measured > 0 for one in counted] == [True, False]
    assert again.lossy is not None and [one.key for one in again.lossy.edits] == [one.key for one in result.lossy.edits]


@pytest.mark.parametrize(("wanted", "error"), [({}, UnchangedError), ({"max_latency": "99%"}, BudgetError)])
def test_what_is_slower_together_is_not_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, wanted: dict[str, str], error: type[BurnishError]
) -> None:
    judge = api.ort_judge

    def biased(target: str, **options: Any) -> Any:
        return replace(judge(target, **options), clock=lambda *given: Verdict(1.5, 1.4, 1.6, True, False, 9))

    monkeypatch.setattr(api, "ort_judge", biased)
    with pytest.raises(error, match=r"takes 1\.5 times as long as the model without edits") as refused:
        optimize(tmp_path, **wanted)
    assert refused.value.hint and not (tmp_path / "out").exists()
    assert not [one for one in tmp_path.iterdir() if one.name not in ("cache", "data.npz")]


@pytest.mark.parametrize(
    "given, message, hint",
    [
        ({"target": "cuda:sm_90"}, "there is no GPU here", "`--objective size`, or run where the GPU is"),
        (
            {"target": "cuda:sm_90", "objective": None, "max_latency": "80%"},
            "there is no GPU here",
            "`--objective size`",
        ),
        ({"tune": "8"}, "tuning would change them", "`--tuning-db`"),
    ],
)
def test_times_that_would_not_be_those_of_the_artefact_are_refused(
    tmp_path: Path, given: dict[str, Any], message: str, hint: str
) -> None:
    if "target" in given and tvm.cuda(0).exist:
        pytest.skip("there is a GPU")
    with pytest.raises(InputError, match=message) as refused:
        optimize(tmp_path, **{"tuning_db": tmp_path / "records"} | given if "tune" in given else given)
    assert hint in str(refused.value.hint) and not (tmp_path / "out").exists()


def test_a_processor_that_is_not_here_cannot_be_timed(tmp_path: Path) -> None:
    from burnish.backends.tvm import processor, target

    other = "llvm:sapphirerapids"
    if not processor.elsewhere(target.parse(other)):
        pytest.skip("this is such a processor")
    with pytest.raises(InputError, match="this processor lacks .*") as refused:
        optimize(tmp_path, target=other)
    assert "on such a machine" in str(refused.value.hint)


@pytest.mark.slow
def test_a_size_is_searched_for_a_gpu_that_is_not_here_and_no_time_is_claimed(tmp_path: Path) -> None:
    if tvm.cuda(0).exist:
        pytest.skip("there is a GPU")
    result = optimize(tmp_path, target="cuda:sm_90", objective="size")
    assert result.lossy is not None and result.lossy.edits and result.lossy.final is not None
    assert result.timing == (None, "") and (tmp_path / "out" / "manifest.json").exists()
