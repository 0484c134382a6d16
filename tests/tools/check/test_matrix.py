"""`burnish check matrix`: models of two folders in pairs; what is broken is a row and not the end."""

from __future__ import annotations

import json
from pathlib import Path
from xml.etree import ElementTree as ET

import check_or_die
import numpy as np
import onnx
import pytest
from click.testing import CliRunner, Result
from onnx import numpy_helper

from burnish.ir.errors import InputError
from burnish.tools import check_api
from burnish.tools.check.matrix import Options, State, in_processes
from burnish.tools.check_command import check_command

BODY = """
<ir_version: 10, opset_import: ["": 21]>
g (float[N,4] x) => (float[N,4] y)
<float[4] a = {1.0, 2.0, 3.0, 4.0}>
{ p = Mul (x, a)  y = Tanh (p) }
"""


def save(path: Path, text: str = BODY, scale: float = 1.0) -> Path:
    """A model's file; the weight scaled."""
    path.parent.mkdir(parents=True, exist_ok=True)
    model = onnx.parser.parse_model(text)
    for tensor in model.graph.initializer:
        array = numpy_helper.to_array(tensor) * np.float32(scale)
        tensor.CopyFrom(numpy_helper.from_array(array, tensor.name))
    onnx.save(model, path)
    return path


def matrix(*arguments: str | Path) -> Result:
    """The command's result; our own errors are raised."""
    result = CliRunner().invoke(check_command, ["matrix", *map(str, arguments)], standalone_mode=False)
    if result.exception is not None:
        raise result.exception
    return result


def test_every_pair_is_a_row(tmp_path: Path) -> None:
    old, new = tmp_path / "old", tmp_path / "new"
    for folder in (old, new):
        save(folder / "same.onnx")
    save(old / "a" / "weights.onnx")
    save(new / "a" / "weights.onnx", scale=1.5)
    save(old / "nodes.onnx")
    save(new / "nodes.onnx", BODY.replace("Tanh", "Sigmoid"))
    check_api.lock(old / "nodes.onnx", old / "nodes.lock.yaml", run=False)
    save(old / "gone.onnx")
    save(new / "new.onnx")
    save(old / "broken.onnx")
    (new / "broken.onnx").write_bytes(b"no model")
    result = matrix(old, new, "--jobs", "1", "--json", tmp_path / "all.json", "--junit", tmp_path / "all.xml")
    assert result.return_value == 2
    found = json.loads((tmp_path / "all.json").read_text(encoding="utf-8"))
    rows = {one["model"]: one for one in found["models"]}
    assert {name: one["state"] for name, one in rows.items()} == {
        "a/weights.onnx": "regression",
        "broken.onnx": "failed",
        "gone.onnx": "removed",
        "new.onnx": "added",
        "nodes.onnx": "regression",
        "same.onnx": "fine",
    }
    assert list(rows) == sorted(rows)
    assert float(rows["a/weights.onnx"]["outputs_moved"]) > 0.01
    assert rows["same.onnx"]["outputs_moved"] == "no"
    assert rows["nodes.onnx"]["report"]["lock"] == str(old / "nodes.lock.yaml")
    assert str(new / "broken.onnx") in rows["broken.onnx"]["reason"]
    assert "6 models: 1 failed, 2 regression, 1 removed, 1 added, 1 fine" in result.stdout
    table = {line.split()[0]: line for line in result.stdout.splitlines() if ".onnx" in line}
    assert "Sigmoid" in table["nodes.onnx"]
    root = ET.parse(tmp_path / "all.xml").getroot()
    assert (len(root), root.get("errors")) == (5, "2")


@pytest.mark.parametrize("jobs", [1, 3])
def test_a_process_that_ends_is_a_row(jobs: int) -> None:
    names = ["a.onnx", "b.onnx", "dies.onnx", "y.onnx", "z.onnx"]
    found = list(in_processes(check_or_die.work, {one: ("", "") for one in names}, Options(), jobs))
    rows = {row.name: row for row in found}
    assert sorted(row.name for row in found) == names
    assert rows.pop("dies.onnx").state is State.FAILED
    assert {row.state for row in rows.values()} == {State.FINE}


def test_the_step_summary_is_one_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GITHUB_ACTIONS", "true")
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(tmp_path / "summary.md"))
    for folder, scale in (("old", 1.0), ("new", 1.5)):
        save(tmp_path / folder / "a.onnx")
        save(tmp_path / folder / "b.onnx", scale=scale)
    result = matrix(tmp_path / "old", tmp_path / "new", "--jobs", "1", "--no-run")
    assert result.return_value == 1
    page = (tmp_path / "summary.md").read_text(encoding="utf-8")
    assert page.count("\n| a&#46;onnx | fine |") == page.count("\n| b&#46;onnx | regression |") == 1
    assert page.count("### ") == 1
    assert "::error file=" in result.stderr


def test_samples_stand_at_the_path_of_their_model(tmp_path: Path) -> None:
    for folder in ("old", "new"):
        save(tmp_path / folder / "a" / "m.onnx")
    data = tmp_path / "data" / "a" / "m.npz"
    data.parent.mkdir(parents=True)
    np.savez(data, x=np.ones((3, 4), np.float32))
    options = ["--data", tmp_path / "data", "--jobs", "1", "--json", tmp_path / "out.json"]
    matrix(tmp_path / "old", tmp_path / "new", *options)
    found = json.loads((tmp_path / "out.json").read_text(encoding="utf-8"))["models"]
    assert [one["state"] for one in found] == ["fine"]


@pytest.mark.parametrize(
    ("arguments", "cause"),
    [
        (["nowhere", "new"], "this is no folder"),
        (["empty", "empty"], "no .onnx file in either folder"),
        (["new", "new", "--data", "nowhere"], "this is no folder"),
        (["new", "new", "--tolerance", "nowhere"], "read"),
        (["new", "new", "--json", "new"], "this is a folder"),
        (["new", "new", "--json", "-", "--sarif", "-"], "goes there already"),
    ],
)
def test_what_cannot_be_done_is_said(
    arguments: list[str], cause: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    save(tmp_path / "new" / "m.onnx")
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match=cause):
        matrix(*arguments)
