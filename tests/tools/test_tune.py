"""`burnish tune`, and `optimize` with what it found."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import onnx_ir as oir
import pytest

tvm = pytest.importorskip("tvm")
pytest.importorskip("xgboost")

from commands import Run, runner  # noqa: E402

from burnish.backends.tvm import target as targets  # noqa: E402
from burnish.backends.tvm.kernels import emitting  # noqa: E402
from burnish.backends.tvm.tuning import Database, kernels, records, search  # noqa: E402
from burnish.frontends import onnx_file  # noqa: E402
from burnish.tools import demands  # noqa: E402

GPU = ("optimize", "m.onnx", "-o", "o", "--target", "cuda:sm_90", "--emit", "kernels")


@pytest.fixture
def burnish(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], tmp_path: Path) -> Run:
    """Runs the command in a folder with a model of one dynamic dimension: (exit code, stdout, stderr)."""
    monkeypatch.chdir(tmp_path)
    text = "g (float[n, 16] x, float[16, 16] w) => (float[n, 16] y) { y = MatMul(x, w) }"
    oir.save(oir.from_onnx_text(f'<ir_version: 10, opset_import: ["": 20]> {text}'), "m.onnx")
    return runner(monkeypatch, capfd, tmp_path, "burnish")


def test_what_was_tuned_is_compiled(burnish: Run, tmp_path: Path) -> None:
    assert "gives dynamic dimensions a number" in burnish("tune", "m.onnx", "--tune", "8", "--tuning-db", "db")[2]
    words = ["m.onnx", "--tuning-db", "db", "--dims", "n=16"]
    first = json.loads(burnish("tune", *words, "--tune", "8", "--workers", "1", "--json")[1])
    assert first["trials"] == 8 and first["kernels_seconds"] > 0 and first["onnxruntime_seconds"] > 0
    code, out, _ = burnish("tune", *words, "--tune", "8")
    assert code == 0 and "0 trials in" in out and "matmul" in out
    code, out, err = burnish(
        "optimize", *words, "-o", "out", "--target", "llvm", "--regions", "all", "--guard", "size", "--report", "r.json"
    )
    assert code == 0 and "untuned" not in out, err
    assert json.loads(Path("out/manifest.json").read_text())["tuned"] == 1
    [record] = Path("out/records").iterdir()
    assert record.name in [path.name for path in Path("db").iterdir()] and len(record.read_text().splitlines()) == 2
    assert (
        burnish("optimize", *words[:1], *words[3:], "--tuning-db", "out/records", "-o", "again", "--target", "llvm")[0]
        == 0
    )


def test_a_library_of_kernels_has_the_schedules_that_were_found(burnish: Run) -> None:
    words = ["optimize", "m.onnx", "--target", "llvm", "--emit", "kernels", "--tuning-db", "db", "--dims", "n=16"]
    code, out, err = burnish(*words, "--tune", "8", "-o", "out")
    assert code == 0 and "untuned" not in out and "(allowed 1e-04)" in out, err
    manifest = json.loads(Path("out/manifest.json").read_text())
    assert (manifest["tuned"], manifest["kernels"], manifest["inputs"][0]["shape"]) == (1, 1, [16, 16])
    [record] = Path("out/records").iterdir()
    assert record.name in [path.name for path in Path("db").iterdir()]
    assert "0 trials in" in burnish("tune", "m.onnx", *words[6:], "--tune", "8")[1], "records of one are the other's"
    code, out, err = burnish(*words, "-o", "again")
    assert code == 0 and json.loads(Path("again/manifest.json").read_text())["tuned"] == 1, err


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="there is no nvcc")
def test_records_of_a_gpu_are_used_where_there_is_none(burnish: Run) -> None:
    target = targets.parse("cuda:sm_90")
    [kernel] = kernels.kernels(emitting.prepare(demands.specialised(onnx_file.read("m.onnx"), "n=16"), target).module)
    schedule = tvm.s_tir.Schedule(kernel.module)
    rows, columns, _ = schedule.get_loops(schedule.get_sblock("matmul"))
    schedule.bind(rows, "blockIdx.x")
    schedule.bind(columns, "threadIdx.x")
    record = records.Record(seconds=1e-5, trace=search._plain(schedule.trace.as_json()))
    Database(Path("db")).append(kernel, target, 1, [record])
    words = ["optimize", "m.onnx", "--target", "cuda:sm_90", "--emit", "kernels", "--tuning-db", "db", "-o", "out"]
    code, out, err = burnish(*words, "--dims", "n=16")
    assert code == 0 and "compiled, not run" in out, err
    assert json.loads(Path("out/manifest.json").read_text())["tuned"] == 1
    assert "__launch_bounds__(16)" in Path("out/model.cu").read_text()


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (("tune", "none.onnx"), "no such file"),
        (("tune", "m.onnx", "--tune", "much"), "no budget"),
        (("tune", "m.onnx", "--target", "onnx"), "kernels are tuned for a target"),
        (("tune", "m.onnx", "--target", "cuda:sm_90"), "there is no GPU here"),
        (("tune", "m.onnx", "--tuning-db", "m.onnx"), "no folder"),
        (("tune", "m.onnx", "--rpc", "nowhere"), "host and port"),
        (("tune", "m.onnx", "--dims", "m=1"), "no input has a dimension"),
        (("optimize", "m.onnx", "-o", "o.onnx", "--tune", "8"), "tuning is for kernels"),
        (("optimize", "m.onnx", "-o", "o", "--target", "llvm", "--rpc", "a:1"), "--rpc"),
        ((*GPU, "--tune", "8"), "there is no GPU here"),
        ((*GPU, "--tune", "8"), "--rpc HOST:PORT"),
        ((*GPU, "--dims", "m=1"), "no input has a dimension"),
        (("optimize", "m.onnx", "-o", "o", "--target", "llvm", "--tuning-db", "none"), "no such folder"),
    ],
)
def test_what_cannot_be_done_is_said(burnish: Run, words: tuple[str, ...], expected: str) -> None:
    code, _, err = burnish(*words)
    assert code == 2 and expected in err and "Traceback" not in err
    assert not Path("o").exists() and not Path("o.onnx").exists()
