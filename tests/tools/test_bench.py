"""`burnish bench`: what it states, on models small enough to be quick."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import onnx
import pytest
from click.testing import CliRunner, Result

from burnish.ir.errors import InputError
from burnish.tools.bench_command import bench_command

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
    assert all(row["a"]["low"] <= row["a"]["median"] <= row["a"]["high"] for row in found["latency"])
    assert found["shapes"] == {"x": [3, 16]}
    assert set(found["session_creation"]) == {"a"}
    assert "optimization level all" in found["runtime"]


def test_two_models_in_turns(model: str) -> None:
    (row,) = report(model, model)["latency"]
    ratio = row["b_over_a"]
    assert ratio["low"] <= ratio["median"] <= ratio["high"]
    shown = bench(model, model).stdout
    assert "B / A" in shown
    assert "Session creation" in shown


def test_models_with_other_inputs_are_refused(model: str, tmp_path: Path) -> None:
    other = tmp_path / "o.onnx"
    onnx.save(onnx.parser.parse_model(TEXT.replace("] x)", "] u)").replace("(x)", "(u)")), other)
    with pytest.raises(InputError, match="Required inputs"):
        bench(model, str(other))
