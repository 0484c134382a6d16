"""`burnish tune`, and `optimize` with what it found."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import onnx_ir as oir
import pytest

from burnish.tools import cli

pytest.importorskip("tvm")
pytest.importorskip("xgboost")
Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def burnish(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], tmp_path: Path) -> Run:
    """Runs the command in a folder with a model of one dynamic dimension: (exit code, stdout, stderr)."""
    monkeypatch.chdir(tmp_path)
    text = "g (float[n, 16] x, float[16, 16] w) => (float[n, 16] y) { y = MatMul(x, w) }"
    oir.save(oir.from_onnx_text(f'<ir_version: 10, opset_import: ["": 20]> {text}'), "m.onnx")

    def run(*words: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["burnish", *map(str, words)])
        with pytest.raises(SystemExit) as stopped:
            cli.main()
        said = capfd.readouterr()
        return int(stopped.value.code or 0), said.out, said.err

    return run


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
        (("optimize", "m.onnx", "-o", "o", "--target", "llvm", "--tuning-db", "none"), "no such folder"),
    ],
)
def test_what_cannot_be_done_is_said(burnish: Run, words: tuple[str, ...], expected: str) -> None:
    code, _, err = burnish(*words)
    assert code == 2 and expected in err and "Traceback" not in err
    assert not Path("o").exists() and not Path("o.onnx").exists()
