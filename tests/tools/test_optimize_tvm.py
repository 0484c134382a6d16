"""`optimize --target llvm|cuda:...` as a user runs it: the artefact, what is said of it, and what is refused."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
from commands import Run, runner  # noqa: E402

pytest.importorskip("tvm")

from burnish.backends import tvm as backend  # noqa: E402
from burnish.ir.errors import InputError  # noqa: E402

ROOT = Path(__file__).parents[2]

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
    return runner(monkeypatch, capfd, tmp_path, "optimize")


def test_a_model_becomes_an_artefact_that_was_loaded_and_compared(model: Path, optimize: Run, tmp_path: Path) -> None:
    code, out, err = optimize(model, "-o", "out/", "--target", "llvm", "--regions", "all", "--report", "report.json")
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
    code, out, _ = optimize(model, "--dry-run", "--target", "llvm", "--regions", "all")
    assert code == 0 and "code      largest relative error" in out and sorted(tmp_path.iterdir()) == before


def test_code_that_is_slower_is_refused_when_latency_is_guarded_by_name(optimize: Run, tmp_path: Path) -> None:
    resnet = ROOT / "tools" / "demo" / "digits_resnet.onnx"
    code, _, err = optimize(resnet, "-o", "out", "--target", "llvm", "--regions", "all", "--guard", "latency")
    assert code == 1 and "times as long as ONNX Runtime" in err and not (tmp_path / "out").exists()


def test_nodes_that_cannot_be_compiled_are_named(optimize: Run, tmp_path: Path) -> None:
    text = '<ir_version: 8, opset_import: ["": 17]> g (float[4] x) => (int64[1, k] y) { y = NonZero (x) }'
    onnx.save(onnx.parser.parse_model(text), tmp_path / "model.onnx")
    code, _, err = optimize("model.onnx", "-o", "out", "--target", "llvm", "--regions", "all")
    assert code == 2 and "none of 1 node can be compiled" in err and "NonZero" in err and "hint:" in err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("target", ["vulkan", "cuda:sm_12", "llvm:no-such-cpu", "llvm:", "onnx:3"])
def test_an_unknown_target_is_refused_before_any_work(model: Path, optimize: Run, target: str) -> None:
    code, _, err = optimize(model, "-o", "out", "--target", target)
    assert code == 2 and err.startswith("error: ") and "hint:" in err


def child(code: str, tmp_path: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run Python in a folder, in a process of its own."""
    settings = os.environ | {"PYTHONPATH": str(ROOT / ".src"), **environment}
    return subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=settings, capture_output=True, text=True, check=False
    )


def test_a_run_that_is_killed_leaves_the_older_artefact_and_the_next_one_cleans_up(
    model: Path, optimize: Run, tmp_path: Path
) -> None:
    words = (model, "-o", "out", "--target", "llvm", "--guard", "size")
    assert optimize(*words)[0] == 0
    before = {one.name: one.read_bytes() for one in (tmp_path / "out").iterdir()}
    ran = child(
        """
import os, signal, burnish
def told(what, number, total):
    if what == "comparing":
        os.kill(os.getpid(), signal.SIGKILL)
burnish.optimize("model.onnx", "out", target="llvm", guard=[], on_step=told)
""",
        tmp_path,
    )
    assert ran.returncode == -signal.SIGKILL
    assert {one.name: one.read_bytes() for one in (tmp_path / "out").iterdir()} == before
    assert len(list(tmp_path.glob(".burnish-*"))) == 1
    assert optimize(*words)[0] == 0
    assert sorted(os.listdir(tmp_path)) == ["model.onnx", "out"]


def test_a_full_disk_is_an_error_and_nothing_is_left(tmp_path: Path) -> None:
    """The disk is a limit on the size of files, between that of the code and that of the weights."""
    proto = onnx.parser.parse_model(
        '<ir_version: 8, opset_import: ["": 17]> g (float[N, 512] x) => (float[N, 2048] y) { y = MatMul (x, w) }'
    )
    proto.graph.initializer.append(onnx.numpy_helper.from_array(np.ones((512, 2048), np.float32), "w"))
    onnx.save(proto, tmp_path / "model.onnx")
    ran = child(
        """
import resource, burnish
from burnish.ir.errors import InputError
resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))
try:
    burnish.optimize("model.onnx", "out", target="llvm", verify="off")
except InputError as error:
    print(error)
""",
        tmp_path,
    )
    assert ran.returncode == 0 and "the artefact cannot be written: File too large" in ran.stdout and not ran.stderr
    assert os.listdir(tmp_path) == ["model.onnx"]


@pytest.mark.parametrize(
    "linker, message",
    [("/nonexistent/g++", "no C++ compiler"), ("/bin/false", "`/bin/false` fails"), ("./cc.sh", "no ld here")],
)
def test_a_missing_or_failing_linker_is_named(
    model: Path, optimize: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, linker: str, message: str
) -> None:
    (tmp_path / "cc.sh").write_text("#!/bin/sh\necho 'cc: no ld here' >&2\nexit 1\n")
    (tmp_path / "cc.sh").chmod(0o755)
    monkeypatch.setenv("CXX", linker)
    code, out, err = optimize(model, "-o", "out", "--target", "llvm", "--regions", "all")
    assert code == 2 and out == "" and message in err and "hint:" in err and not (tmp_path / "out").exists()


def test_code_for_another_processor_is_compiled_and_not_run(model: Path, optimize: Run, tmp_path: Path) -> None:
    code, out, _ = optimize(model, "-o", "out", "--target", "llvm:sapphirerapids")
    assert code == 0
    if "this processor lacks" in out:
        assert json.loads((tmp_path / "out" / "manifest.json").read_text())["verified"] is None
        with pytest.raises(InputError, match="this processor lacks"):
            backend.load(tmp_path / "out")
    else:
        assert "largest relative error" in out


def test_python_writes_the_same_and_as_python_says_how(model: Path, optimize: Run, tmp_path: Path) -> None:
    code, out, _ = optimize(model, "-o", "out", "--target", "llvm", "--guard", "size", "--as-python")
    assert code == 0 and not (tmp_path / "out").exists()
    exec(compile(out, "<as-python>", "exec"), {})
    assert json.loads((tmp_path / "out" / "manifest.json").read_text())["verified"] is True


def test_a_recipe_names_the_target(model: Path, optimize: Run, tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text("passes:\n  - fold-constants\ntarget: llvm:znver9\n")
    code, _, err = optimize(model, "-o", "out", "--recipe", "recipe.yaml")
    assert code == 2 and "LLVM knows no processor `znver9`" in err


def test_code_that_computes_something_else_is_not_written(
    model: Path, optimize: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The weights are written with one number changed, as an error of the compiler would show."""
    from burnish.backends.tvm import weights_file

    write = weights_file.write

    def wrong(path: Path, arrays: dict[str, np.ndarray]) -> None:
        write(path, {name: array * np.float32(1.001) for name, array in arrays.items()})

    monkeypatch.setattr(weights_file, "write", wrong)
    code, out, err = optimize(model, "-o", "out", "--target", "llvm", "--regions", "all")
    assert code == 3 and out == "" and "computes something else: output `y` differs by 0.001" in err
    assert os.listdir(tmp_path) == ["model.onnx"]


def test_float16_is_held_to_its_own_rounding(optimize: Run, tmp_path: Path) -> None:
    text = """<ir_version: 8, opset_import: ["": 17]> g (float16[N, 64] x) => (float16[N, 32] y) {
        a = MatMul (x, w)  y = Relu (a) }"""
    proto = onnx.parser.parse_model(text)
    weights = np.random.default_rng(0).standard_normal((64, 32)).astype(np.float16)
    proto.graph.initializer.append(onnx.numpy_helper.from_array(weights, "w"))
    onnx.save(proto, tmp_path / "model.onnx")
    code, out, err = optimize("model.onnx", "-o", "out", "--target", "llvm", "--regions", "all")
    assert (code, err) == (0, "") and "(allowed 4e-03) in `y`" in out


def test_the_page_to_read_tells_of_the_code(model: Path, optimize: Run, tmp_path: Path) -> None:
    assert optimize(model, "-o", "out", "--target", "llvm", "--regions", "all", "--report", "out.html")[0] == 0
    page = (tmp_path / "out.html").read_text()
    assert "; its code for llvm:" in page and "agrees with it" in page and "kernel for llvm" in page


def test_emitted_kernels_are_compared_and_run_like_any_compiled_model(
    model: Path, optimize: Run, tmp_path: Path
) -> None:
    code, out, err = optimize(model, "-o", "out/", "--target", "llvm", "--emit", "kernels")
    assert (code, err) == (0, "") and "(allowed 1e-04)" in out
    files = {one.name for one in (tmp_path / "out").iterdir()}
    assert files >= {"model.cc", "model.h", "model.so", "weights.safetensors", "example.py", "example.cc"}
    runner = backend.load(tmp_path / "out")
    assert [one.kind for one in runner.manifest.steps] == ["kernels"] and runner.inputs[0].shape == ("N", 6)
    assert runner.run({"x": np.ones((3, 6), np.float32)})["y"].shape == (3, 40)
    with pytest.raises(InputError, match="`x` has shape"):
        runner.run({"x": np.ones((3, 5), np.float32)})
    runner.close()


def test_kernels_are_emitted_for_a_target_with_its_compiler_or_not_at_all(
    model: Path, optimize: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    code, _, err = optimize(model, "-o", "out/", "--emit", "kernels")
    assert code == 2 and "add `--target llvm`" in err
    for name in ("CUDA_HOME", "CUDA_PATH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    code, _, err = optimize(model, "-o", "out/", "--target", "cuda:sm_90", "--emit", "kernels")
    assert code == 2 and "compiled by nvcc, which is not here" in err
    assert not (tmp_path / "out").exists()
