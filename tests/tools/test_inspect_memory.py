"""`burnish inspect --memory` shows true lifetimes; the options of sections and `--plot` are checked."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import onnx
import onnx.parser
import pytest
from inspecting import run

from burnish.tools import cli

MODEL = """
<ir_version: 8, opset_import: ["": 17]>
g (float[N, 4] x) => (float[N, 4] y) <float[4, 4] w = {1,2,3,4,5,6,7,8,9,10,11,12,13,14,15,16}> {
  a = MatMul (x, w)
  b = Relu (a)
  c = Softmax (b)
  y = Add (b, c)
}
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    onnx.save(onnx.parser.parse_model(MODEL), tmp_path / "model.onnx")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_document_holds_lifetimes_and_the_arena(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, "model.onnx", "--memory", "--dims", "N=5", "--json")
    document: dict[str, Any] = json.loads(out)
    found = document["memory"]
    assert (code, set(document)) == (0, {"file", "memory"})
    assert found["shapes"] == {"x": [5, 4]}
    assert (found["weights_bytes"], found["unplanned_bytes"], found["peak_bytes"]) == (64, 400, 320)
    assert (found["in_place_bytes"], found["arena_bytes"], found["arena_bound_bytes"]) == (240, 240, 240)
    spans = {one["name"]: (one["first_moment"], one["last_moment"]) for one in found["tensors"]}
    assert spans == {"x": (0, 3), "a": (0, 1), "b": (1, 3), "c": (2, 3), "y": (3, 3)}
    assert [one["bytes"] for one in found["moments"]] == [160, 240, 240, 320]
    assert found["peak_at"] == {"node": "y", "operator": "Add"}


def test_the_sizes_are_those_of_the_sample(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import numpy as np

    np.savez("data.npz", x=np.ones((7, 4), np.float32))
    code, out, _ = run(capsys, "model.onnx", "--memory", "--data", "data.npz", "--json")
    assert code == 0 and json.loads(out)["memory"]["peak_bytes"] == 4 * 4 * 4 * 7


def test_what_comes_of_weights_alone_is_said(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = MODEL.replace("a = MatMul (x, w)", "t = Transpose (w)  u = Abs (t)  a = MatMul (x, u)")
    onnx.save(onnx.parser.parse_model(text), folder / "model.onnx")
    code, out, _ = run(capsys, "model.onnx", "--memory", "--dims", "N=5")
    assert code == 0 and "(from weights) t" in out and "(from weights) a" not in out
    code, out, _ = run(capsys, "model.onnx", "--memory", "--dims", "N=5", "--json")
    found = json.loads(out)["memory"]
    assert found["from_weights_bytes"] == 128
    assert {one["name"] for one in found["tensors"] if one["from_weights"]} == {"t", "u"}


def test_what_the_runtime_takes_is_beside_the_plan(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, "model.onnx", "--memory", "--dims", "N=1000000", "--json")
    found = json.loads(out)["memory"]
    one = 16_000_000  # bytes of each activation; the input is the caller's
    measured = found["measured"]
    assert code == 0 and found["arena_bytes"] == 3 * one
    if measured["arena_requested_bytes"] is None:
        assert found["not_measured"] == ["this ONNX Runtime says nothing of its arena"]
    else:
        assert one <= measured["arena_requested_bytes"] <= 3 * one
        assert measured["arena_requested_bytes"] <= measured["arena_peak_bytes"] <= measured["arena_held_bytes"]
    assert 0.9 * one <= measured["resident_run_bytes"] <= 6 * one


@pytest.mark.parametrize("name", ["memory.svg", "memory.png"])
def test_the_picture_is_a_file_of_its_kind(name: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, _, err = run(capsys, "model.onnx", "--memory", "--plot", name)
    assert code == 0 and err.startswith(f"drawn: {name}\n")
    head = (folder / name).read_bytes()[:400]
    assert head.startswith(b"\x89PNG") if name.endswith("png") else b"<svg" in head
    assert sorted(path.name for path in folder.iterdir()) == sorted(["model.onnx", name])


@pytest.mark.parametrize(
    ("words", "cause"),
    [
        (["--plot", "out.svg"], "`--plot` draws one section: "),
        (["--data", "data.npz"], "`--data` goes with "),
        (["--memory", "--data", "data.npz"], "there is no such file or folder"),
        (["--memory", "--plot", "out.pdf"], "a picture cannot be written as `.pdf`"),
        (["--memory", "--plot", "out"], "a picture cannot be written as `out`"),
        (["--memory", "--plot", "no/out.svg"], "cannot be written there"),
        (["--memory", "--plot", "folder.svg"], "cannot be written there"),
        (["--memory", "--dims", "M=1"], "no input has a dimension `M`"),
    ],
)
def test_what_cannot_be_done_is_said_and_nothing_is_written(
    words: list[str], cause: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "folder.svg").mkdir()
    before = sorted(path.name for path in folder.rglob("*"))
    code, out, err = run(capsys, "model.onnx", *words)
    assert (code, out) == (2, "") and err.startswith("error: ") and cause in err, err
    assert sorted(path.name for path in folder.rglob("*")) == before


def test_without_a_runtime_the_plan_remains(folder: Path) -> None:
    block = (
        "import sys\nclass Absent:\n    def find_spec(self, name, *rest):\n"
        "        if name.split('.')[0] == 'onnxruntime': raise ModuleNotFoundError(name)\n"
        "sys.meta_path.insert(0, Absent())\nfrom burnish.tools.cli import main\nmain()"
    )
    words = [sys.executable, "-c", block, "inspect", "model.onnx", "--memory"]
    path = str(Path(cli.__file__).parents[2])
    found = subprocess.run(words, cwd=folder, env={"PYTHONPATH": path}, capture_output=True, text=True, check=False)
    assert found.returncode == 0 and "sharing one arena" in found.stdout, found.stderr
    assert "not measured: ONNX Runtime is not installed" in found.stderr


def test_without_matplotlib_the_error_gives_the_pip_line(folder: Path) -> None:
    block = (
        "import sys\nclass Absent:\n    def find_spec(self, name, *rest):\n"
        "        if name.split('.')[0] == 'matplotlib': raise ModuleNotFoundError(name)\n"
        "sys.meta_path.insert(0, Absent())\nfrom burnish.tools.cli import main\nmain()"
    )
    words = [sys.executable, "-c", block, "inspect", "model.onnx", "--memory", "--plot", "out.svg"]
    path = str(Path(cli.__file__).parents[2])
    found = subprocess.run(words, cwd=folder, env={"PYTHONPATH": path}, capture_output=True, text=True, check=False)
    assert found.returncode == 2 and "pip install 'burnish[plot]'" in found.stderr, found.stderr
    assert not (folder / "out.svg").exists()


@pytest.mark.parametrize(
    ("section", "graph"),
    [
        ("--memory", "g (float[N, 4] x) => (float[N, 4] x) { }"),
        ("--memory", "g (string[N] x) => (string[N] y) { y = Identity (x) }"),
        ("--utilization", "g () => (float[2] y) <float[2] w = {1, 2}> { y = Neg (w) }"),
        ("--utilization", "g (float[N, 4] x) => (int64[2] y) { y = Shape (x) }"),
    ],
)
def test_graphs_with_next_to_nothing_in_them(
    section: str, graph: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    onnx.save(onnx.parser.parse_model(f'<ir_version: 8, opset_import: ["": 17]>\n{graph}'), folder / "model.onnx")
    code, out, err = run(capsys, "model.onnx", section, "--plot", "out.svg")
    assert code == 0 and out and "defect" not in err, err
