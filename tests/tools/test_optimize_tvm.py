"""`optimize --target llvm|cuda:...` as a user runs it: the artefact, what is said of it, and what is refused."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest

from burnish.tools import cli

pytest.importorskip("tvm")

from burnish.backends import tvm as backend  # noqa: E402
from burnish.ir.errors import InputError  # noqa: E402

Run = Callable[..., tuple[int, str, str]]

MODEL = """
<ir_version: 8, opset_import: ["": 17]>
g (float[N, 6] x) => (float[N, 40] y)
<float[6, 40] w, float[40] scale> {
  a = MatMul (x, w)
  b = Mul (a, scale)
  y = Relu (b)
}
"""


@pytest.fixture
def model(tmp_path: Path) -> Path:
    proto = onnx.parser.parse_model(MODEL)
    weights = np.random.default_rng(0).standard_normal((6, 40)).astype(np.float32)
    proto.graph.initializer.append(onnx.numpy_helper.from_array(weights, "w"))
    proto.graph.initializer.append(onnx.numpy_helper.from_array(np.arange(40, dtype=np.float32), "scale"))
    path = tmp_path / "model.onnx"
    onnx.save(proto, path)
    return path


@pytest.fixture
def optimize(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], tmp_path: Path) -> Run:
    """Runs the command in this process: (exit code, stdout, stderr)."""
    monkeypatch.chdir(tmp_path)

    def run(*words: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["optimize", *map(str, words)])
        with pytest.raises(SystemExit) as stopped:
            cli.optimize_main()
        said = capfd.readouterr()
        return int(stopped.value.code or 0), said.out, said.err

    return run


def test_a_model_becomes_an_artefact_that_was_loaded_and_compared(model: Path, optimize: Run, tmp_path: Path) -> None:
    code, out, err = optimize(model, "-o", "out/", "--target", "llvm", "--report", "report.json")
    assert code == 0 and err == ""
    assert "compiled  1 kernel for llvm:" in out and "untuned   1 kernel of 1" in out
    assert "x the time of ONNX Runtime" in out and "(allowed 1e-04)" in out
    assert sorted(one.name for one in (tmp_path / "out").iterdir()) == [
        "code.so",
        "manifest.json",
        "weights.safetensors",
    ]
    said = json.loads((tmp_path / "report.json").read_text())["compiled"]
    assert said["verified"] is True and said["steps"][0]["kind"] == "tvm" and said["whole"]["error"] < 1e-4
    runner = backend.load(tmp_path / "out")
    x = np.random.default_rng(1).standard_normal((5, 6)).astype(np.float32)
    weights = onnx.numpy_helper.to_array(onnx.load(model).graph.initializer[0])
    expected = np.maximum(x @ weights * np.arange(40, dtype=np.float32), 0)
    np.testing.assert_allclose(runner.run({"x": x})["y"], expected, rtol=1e-4, atol=1e-5)


def test_without_a_gpu_code_for_one_is_compiled_and_said_not_to_have_run(
    model: Path, optimize: Run, tmp_path: Path
) -> None:
    import tvm

    if tvm.cuda(0).exist:
        pytest.skip("there is a GPU here")
    code, out, err = optimize(model, "-o", "out", "--target", "cuda:sm_90")
    assert code == 0 and err == "" and "compiled, not run: there is no GPU here" in out and "speed" not in out
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert manifest["verified"] is None and manifest["target"] == "cuda:sm_90"
    with pytest.raises(InputError, match="no such device here"):
        backend.load(tmp_path / "out")


def test_a_second_run_replaces_an_artefact_and_nothing_else(model: Path, optimize: Run, tmp_path: Path) -> None:
    words = (model, "-o", "out", "--target", "llvm", "--guard", "size")
    assert optimize(*words)[0] == 0
    assert optimize(*words)[0] == 0
    (tmp_path / "out" / "notes.txt").write_text("mine")
    code, _, err = optimize(*words)
    assert code == 2 and "`notes.txt`" in err and (tmp_path / "out" / "notes.txt").exists()
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "notes.txt").write_text("mine")
    assert "no artefact" in optimize(model, "-o", "other", "--target", "llvm")[2]
    (tmp_path / "link").symlink_to(tmp_path / "out")
    assert optimize(model, "-o", "link", "--target", "llvm")[0] == 2
    assert optimize(model, "-o", "out.onnx", "--target", "llvm")[0] == 2
    assert not list(tmp_path.glob(".burnish-*"))


def test_a_dry_run_compiles_and_writes_nothing(model: Path, optimize: Run, tmp_path: Path) -> None:
    before = sorted(tmp_path.iterdir())
    code, out, _ = optimize(model, "--dry-run", "--target", "llvm")
    assert code == 0 and "code      largest relative error" in out and sorted(tmp_path.iterdir()) == before


def test_code_that_is_slower_is_refused_when_latency_is_guarded_by_name(
    optimize: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    resnet = Path(__file__).parents[2] / "tools" / "demo" / "digits_resnet.onnx"
    code, _, err = optimize(resnet, "-o", "out", "--target", "llvm", "--guard", "latency")
    assert code == 1 and "times as long as ONNX Runtime" in err and not (tmp_path / "out").exists()


def test_nodes_that_cannot_be_compiled_are_named(optimize: Run, tmp_path: Path) -> None:
    text = '<ir_version: 8, opset_import: ["": 17]> g (float[4] x) => (int64[1, k] y) { y = NonZero (x) }'
    onnx.save(onnx.parser.parse_model(text), tmp_path / "model.onnx")
    code, _, err = optimize("model.onnx", "-o", "out", "--target", "llvm")
    assert code == 2 and "1 node of 1 cannot be compiled" in err and "NonZero" in err and "hint:" in err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("target", ["vulkan", "cuda:sm_12", "llvm:no-such-cpu", "llvm:", "onnx:3"])
def test_an_unknown_target_is_refused_before_any_work(model: Path, optimize: Run, target: str) -> None:
    code, _, err = optimize(model, "-o", "out", "--target", target)
    assert code == 2 and err.startswith("error: ") and "hint:" in err
