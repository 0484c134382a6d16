"""`burnish inspect --utilization` counts right, accounts for the whole latency, and finds what it must."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import onnx.parser
import pytest
from inspecting import run
from networks import dense_and_depthwise, simple_net

from burnish.frontends import onnx_file
from burnish.tools import cli, inspect_utilization
from burnish.tools.subject import Subject

FIXED = """
<ir_version: 8, opset_import: ["": 17]>
g (float[2, 4] x) => (float[2, 4] y) { y = Softmax (x) }
"""
BUILT_IN = """
<ir_version: 8, opset_import: ["": 17]>
g (float[N, 4] x) => (float[8] y) <int64[1] shape = {8}> { a = Softmax (x)  y = Reshape (a, shape) }
"""


@pytest.fixture(scope="module")
def document(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    path = tmp_path_factory.mktemp("net") / "net.onnx"
    document: dict[str, Any] = {"macs": simple_net(path), "path": path}
    return document | inspect_utilization.report(Subject(onnx_file.read(path), str(path)), "1,16")


def measured(check: Callable[[dict[str, Any]], bool], path: Path, batch: str | None) -> bool:
    """Whether a measurement shows it; a machine with other work to do is given three tries."""
    subject = Subject(onnx_file.read(path), str(path))
    return any(check(inspect_utilization.report(subject, batch)) for _ in range(3))


def test_multiply_adds_equal_the_closed_form(document: dict[str, Any]) -> None:
    for batch, rows in zip(document["batches"], (1, 16), strict=True):
        assert batch["multiply_adds"] == rows * document["macs"]
        assert sum(row["multiply_adds"] for row in batch["nodes"]) == rows * document["macs"]
        assert batch["shapes"] == {"image": [rows, 3, 16, 16]}
        assert batch["unknown"] == [] and batch["nodes_not_run"] == []


def test_the_numbers_of_a_row_fit_together(document: dict[str, Any]) -> None:
    for batch in document["batches"]:
        assert sum(row["share_of_time"] for row in batch["nodes"]) == pytest.approx(1)
        assert batch["rows_per_second"] == pytest.approx(batch["batch"] / batch["latency_seconds"])
        peak = document["machine"]["peak_operations_per_second"]["float32"]
        used = 2 * batch["multiply_adds"] / batch["latency_seconds"] / peak
        assert batch["utilization"] == pytest.approx(used) and 0 < used < 2
        for row in batch["nodes"]:
            assert row["limit"] in ("compute", "memory", "kernel", "overhead", "inserted")
            if row["operations_per_second"]:
                operations = 2 * row["multiply_adds"] + row["element_operations"]
                assert row["operations_per_second"] == pytest.approx(operations / row["seconds"])
                ceiling = min(peak, row["operations_per_byte"] * document["machine"]["bandwidth_bytes_per_second"])
                assert row["share_of_ceiling"] == pytest.approx(row["operations_per_second"] / ceiling)


def test_nodes_add_up_to_the_latency_and_a_larger_batch_uses_more(document: dict[str, Any]) -> None:
    def adds_up(found: dict[str, Any]) -> bool:
        one, sixteen = found["batches"]
        shares = [run["nodes_share_of_latency"] for run in found["batches"]]
        added = found["machine"]["profiler_seconds_per_empty_node"] * len(sixteen["nodes"])  # no more than that
        shares.append((sixteen["nodes_seconds_as_profiled"] - added) / sixteen["latency_seconds"])
        return all(0.9 < share < 1.1 for share in shares) and bool(sixteen["utilization"] > one["utilization"])

    assert adds_up(document) or measured(adds_up, document["path"], "1,16")


def test_a_dense_convolution_uses_at_least_twice_what_a_depthwise_one_does(tmp_path: Path) -> None:
    macs = dense_and_depthwise(tmp_path / "net.onnx")

    def twice(found: dict[str, Any]) -> bool:
        rows = {row["node"]: row for row in found["batches"][0]["nodes"]}
        assert rows["conv0"]["multiply_adds"] + rows["conv1"]["multiply_adds"] == macs
        assert rows["conv0"]["limit"] in ("compute", "kernel")
        return bool(rows["conv0"]["share_of_peak"] >= 2 * rows["conv1"]["share_of_peak"])

    assert measured(twice, tmp_path / "net.onnx", None)


def test_advice_is_what_was_tried(document: dict[str, Any]) -> None:
    (one,) = document["advice"]
    assert one["ratio"] is None or one["low"] <= one["ratio"] <= one["high"]
    if one["ratio"] is not None and one["ratio"] < 0.98 and one["high"] < 1:
        assert one["text"].startswith("`optimize --target ort-cpu`: ")
    else:
        assert one["text"].startswith("no pass of burnish ")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name, text in (("fixed", FIXED), ("model", FIXED.replace("2, 4", "N, 4")), ("built_in", BUILT_IN)):
        onnx.save(onnx.parser.parse_model(text), tmp_path / f"{name}.onnx")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("words", "cause"),
    [
        (["fixed.onnx", "--utilization", "--batch", "1,4"], "the batch is fixed"),
        (["model.onnx", "--utilization", "--batch", "1,x"], "`1,x` is no list of batch sizes"),
        (["model.onnx", "--utilization", "--batch", ""], "is no list of batch sizes"),
        (["model.onnx", "--utilization", "--batch", "0"], "`0` is no list of batch sizes"),
        (["model.onnx", "--utilization", "--batch", "2", "--dims", "N=3"], "`N` is the batch, which `--batch` varies"),
        (["built_in.onnx", "--utilization", "--batch", "2,4"], "the model takes no batch of 4"),
        (["model.onnx", "--batch", "2"], "`--batch` goes with "),
        (["model.onnx", "--threads", "2"], "`--threads` goes with "),
        (["model.onnx", "--utilization", "--threads", "0"], "0 is not in the range"),
        (["model.onnx", "--utilization", "--data", "none.npz"], "there is no such file or folder"),
        (["model.onnx", "--utilization", "--memory", "--plot", "a.svg"], "`--plot` draws one section"),
    ],
)
def test_what_cannot_be_measured(
    words: list[str], cause: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = sorted(path.name for path in folder.iterdir())
    code, out, err = run(capsys, *words)
    assert (code, out) == (2, "") and err.startswith("error: ") and cause in err, err
    assert sorted(path.name for path in folder.iterdir()) == before


def test_the_command_prints_tables_or_a_document_and_draws(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = run(capsys, "fixed.onnx", "--utilization", "--plot", "roof.png")
    assert code == 0 and err.startswith("drawn: roof.png\n")
    assert "as given" in out and "Slowest nodes" in out and "Softmax" in out
    assert (folder / "roof.png").read_bytes().startswith(b"\x89PNG")
    simple_net(folder / "model.onnx")
    code, out, _ = run(capsys, "model.onnx", "--utilization", "--batch", "3,1", "--json", "--plot", "roof.svg")
    found = json.loads(out)["utilization"]
    assert code == 0 and [one["batch"] for one in found["batches"]] == [3, 1]
    assert b"utilization (% of the peak)" in (folder / "roof.svg").read_bytes()


def test_without_a_runtime_the_error_gives_the_pip_line(folder: Path) -> None:
    block = (
        "import sys\nclass Absent:\n    def find_spec(self, name, *rest):\n"
        "        if name.split('.')[0] == 'onnxruntime': raise ModuleNotFoundError(name)\n"
        "sys.meta_path.insert(0, Absent())\nfrom burnish.tools.cli import main\nmain()"
    )
    words = [sys.executable, "-c", block, "inspect", "model.onnx", "--utilization"]
    path = str(Path(cli.__file__).parents[2])
    found = subprocess.run(words, cwd=folder, env={"PYTHONPATH": path}, capture_output=True, text=True, check=False)
    assert found.returncode == 2 and "pip install 'burnish[cpu]'" in found.stderr, found.stderr
