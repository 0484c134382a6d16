"""`burnish bench`: what it states, on models small enough to be quick."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import onnx
import pytest
from click.testing import CliRunner, Result

import burnish
from burnish.ir.errors import InputError, VerificationError
from burnish.tools import bench_backends
from burnish.tools.bench_command import bench_command
from burnish.tools.benchmark import benchmark

TEXT = """<ir_version: 10, opset_import: ["": 21]> g (float[N,16] x) => (float[N,16] y) { y = Tanh (x) }"""


@pytest.fixture
def model(tmp_path: Path) -> str:
    """A small model's file."""
    path = tmp_path / "m.onnx"
    onnx.save(onnx.parser.parse_model(TEXT), path)
    return str(path)


def bench(*arguments: str) -> Result:
    """The command's result; our own errors are raised."""
    result = CliRunner().invoke(bench_command, [*arguments, "--rounds", "3"], standalone_mode=False)
    if result.exception is not None:
        raise result.exception
    return result


def report(*arguments: str) -> dict[str, Any]:
    """The JSON document."""
    found: dict[str, Any] = json.loads(bench(*arguments, "--json").stdout)
    return found


def test_one_model(model: str) -> None:
    found = report(model, "--threads", "1,2", "--dims", "N=3")
    assert [row["threads"] for row in found["latency"]] == [1, 2]
    for row in found["latency"]:
        assert row["seconds"]["low"] <= row["seconds"]["median"] <= row["seconds"]["high"]
        assert row["error"] == 0
        assert "optimization level all" in row["runtime"]
    assert found["shapes"] == {"x": [3, 16]}
    assert set(found["session_creation"]) == {"a"}


def test_two_models_in_turns(model: str) -> None:
    first, second = report(model, model)["latency"]
    assert first["ratio"] == {"median": 1, "low": 1, "high": 1}
    assert second["ratio"]["low"] <= second["ratio"]["median"] <= second["ratio"]["high"]
    shown = bench(model, model).stdout
    assert "95 % interval" in shown
    assert "Session creation" in shown


def test_a_file_that_is_not_there(model: str) -> None:
    with pytest.raises(InputError, match="no such file"):
        bench(model, f"{model}.other")


def test_an_unknown_backend_is_refused_with_the_known_ones(model: str) -> None:
    with pytest.raises(InputError, match="no backend `jax`") as raised:
        bench(model, "--backend", "ort-cpu,jax")
    assert raised.value.hint is not None
    assert "torch-compile" in raised.value.hint


def test_tuning_records_are_for_tvm(model: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="for `tvm`"):
        bench(model, "--tuning-db", str(tmp_path))


def test_backends_side_by_side(model: str) -> None:
    pytest.importorskip("torch")
    ort, torch = report(model, "--backend", "ort-cpu,torch", "--dims", "N=3")["latency"]
    assert (ort["backend"], torch["backend"]) == ("ort-cpu", "torch")
    assert torch["error"] < torch["allowed"]
    assert torch["runtime"].startswith("torch ")
    assert torch["ratio"]["median"] > 0
    assert ort["rounds"] == torch["rounds"]


def test_what_computes_something_else_is_not_timed(model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    other = str(tmp_path / "o.onnx")
    onnx.save(onnx.parser.parse_model(TEXT.replace("Tanh", "Sin")), other)
    right = bench_backends.BACKENDS["ort-cpu"]
    monkeypatch.setitem(bench_backends.BACKENDS, "torch", lambda asked: right(replace(asked, path=other)))
    arguments = [model, "--backend", "torch,ort-cpu", "--rounds", "3"]
    result = CliRunner().invoke(bench_command, arguments, standalone_mode=False)
    assert isinstance(result.exception, VerificationError)
    assert result.exception.exit_code == 3
    assert "wrong: output `y` differs by" in result.stdout
    wrong, timed = benchmark(model, backends=("torch", "ort-cpu"), rounds=3)["latency"]
    assert wrong["status"] == "wrong"
    assert "seconds" not in wrong
    assert wrong["error"] > wrong["allowed"]
    assert timed["seconds"]["median"] > 0


def test_a_model_that_draws_random_numbers_is_timed_and_not_compared(tmp_path: Path) -> None:
    path = tmp_path / "r.onnx"
    onnx.save(onnx.parser.parse_model(TEXT.replace("Tanh", "RandomUniformLike")), path)
    (row,) = report(str(path))["latency"]
    assert row["status"] == "timed"
    assert "random" in row["reason"]
    assert "error" not in row


def test_a_backend_that_is_not_there_is_a_row_beside_others_and_an_error_alone(model: str) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    if "CUDAExecutionProvider" in onnxruntime.get_available_providers():
        pytest.skip("CUDA is there")
    _, row = report(model, "--backend", "ort-cpu,ort-cuda")["latency"]
    assert row["status"] == "not run"
    assert "CUDA" in row["reason"]
    with pytest.raises(InputError, match="CUDA"):
        bench(model, "--backend", "ort-cuda")


@pytest.mark.parametrize("backend", ["torch-cuda", "torch-compile-cuda"])
def test_torch_without_a_gpu_is_a_row_beside_others_and_an_error_alone(model: str, backend: str) -> None:
    torch = pytest.importorskip("torch")
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    _, row = report(model, "--backend", f"ort-cpu,{backend}")["latency"]
    assert row["status"] == "not run" and "torch cannot use the device `cuda`" in row["reason"]
    with pytest.raises(InputError, match="torch cannot use the device `cuda`") as raised:
        bench(model, "--backend", backend)
    assert raised.value.exit_code == 2 and "GPU" in str(raised.value.hint)


def test_a_compiler_that_fails_is_a_row_that_says_why(model: str) -> None:
    pytest.importorskip("torch")
    from torch._inductor import config

    with config.patch({"cpp.cxx": ("no-such-compiler",), "force_disable_caches": True}):
        _, row = report(model, "--backend", "ort-cpu,torch-compile", "--dims", "N=5")["latency"]
    assert row["status"] == "not run"
    assert row["reason"].startswith("torch.compile fails: ")
    assert "no-such-compiler" in row["reason"]


@pytest.mark.skipif(shutil.which("g++") is None, reason="there is no C++ compiler")
def test_inductor(model: str) -> None:
    pytest.importorskip("torch")
    _, row = report(model, "--backend", "ort-cpu,torch-compile", "--dims", "N=7")["latency"]
    assert row["status"] == "timed", row["reason"]
    assert row["error"] < row["allowed"]
    assert "inductor" in row["runtime"]


def test_a_compiled_model_beside_what_it_was_compiled_from(model: str, tmp_path: Path) -> None:
    pytest.importorskip("tvm")
    folder, other = str(tmp_path / "out"), str(tmp_path / "other.onnx")
    burnish.optimize(model, folder, target="llvm", regions="all", verify="off")
    found = report(model, folder, "--backend", "ort-cpu,tvm")["latency"]
    assert [(row["model"], row["backend"]) for row in found] == [("a", "ort-cpu"), ("a", "tvm"), ("b", "artefact")]
    for row in found[1:]:
        assert row["error"] < row["allowed"]
        assert "1 kernel untuned" in row["runtime"]
    onnx.save(onnx.parser.parse_model(TEXT.replace("Tanh", "Sin")), other)
    _, row = report(other, folder)["latency"]
    assert "another model" in row["reason"]
    with pytest.raises(InputError, match="does not say what its inputs mean"):
        bench(folder)


def test_models_with_other_inputs_are_refused(model: str, tmp_path: Path) -> None:
    other = tmp_path / "o.onnx"
    onnx.save(onnx.parser.parse_model(TEXT.replace("] x)", "] u)").replace("(x)", "(u)")), other)
    with pytest.raises(InputError, match="Required inputs"):
        bench(model, str(other))
