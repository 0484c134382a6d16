"""`burnish inspect` shows true numbers, and says what it does not know."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as oir
import pytest
from click.testing import CliRunner

from burnish.ir.errors import InputError
from burnish.tools import inspect_summary
from burnish.tools.inspect_command import inspect_command
from burnish.tools.subject import Subject, parse_counts, parse_dims


def printed(*arguments: str) -> str:
    """What the command writes to stdout, without blanks at the ends of lines."""
    result = CliRunner().invoke(inspect_command, list(arguments), catch_exceptions=False)
    assert result.exit_code == 0
    return "\n".join(line.rstrip() for line in result.stdout.splitlines()) + "\n"


@pytest.fixture
def linear(tmp_path: Path) -> Path:
    """A file with a linear layer on [N, 4] whose weight is in a Constant node."""
    proto = onnx.parser.parse_model("""
      <ir_version: 10, opset_import: ["": 20], producer_name: "hand">
      g (float[N, 4] x) => (float[N, 3] y) <float[3] b = {1, 2, 3}> { m = MatMul (x, w)  y = Add (m, b) }""")
    weight = onnx.numpy_helper.from_array(np.ones((4, 3), np.float32))
    proto.graph.node.insert(0, onnx.helper.make_node("Constant", [], ["w"], name="weight", value=weight))
    file = tmp_path / "linear.onnx"
    onnx.save(proto, file)
    return file


def test_the_document_holds_the_numbers_of_the_model(linear: Path) -> None:
    found: dict[str, Any] = json.loads(printed(str(linear), "--dims", "N=5", "--json"))
    assert found["opsets"] == {"ai.onnx": 20}
    assert found["inputs"] == [{"name": "x", "dtype": "FLOAT", "shape": ["N", 4]}]
    assert found["parameters"] == {"total": 15, "bytes": 60, "by_dtype": {"FLOAT": {"parameters": 15, "bytes": 60}}}
    assert (found["cost"]["multiply_adds"], found["cost"]["element_operations"]) == (60, 15)
    assert found["operators"]["MatMul"] == {"nodes": 1, "multiply_adds": 60, "element_operations": 0}
    assert [one["operator"] for one in found["costliest_nodes"]] == ["MatMul", "Add"]
    assert [one["shape"] for one in found["largest_tensors"]] == [[4, 3], [3]]
    assert found["activations"]["peak_bytes"] == 4 * (20 + 15 + 15)
    assert found["unknown"] == []


def test_unknown_numbers_are_null_and_the_hint_makes_them_known(linear: Path) -> None:
    result = CliRunner().invoke(inspect_command, [str(linear)], catch_exceptions=False)
    assert "unknown; at least 0" in result.stdout
    assert "`--dims N=1`" in result.stderr
    assert "unknown; at least" not in printed(str(linear), "--dims", "N=1")
    found = json.loads(printed(str(linear), "--json"))
    assert found["cost"]["multiply_adds"] is None
    assert found["operators"]["MatMul"]["multiply_adds"] is None
    assert found["activations"]["peak_bytes"] is None


def test_the_lists_are_as_long_as_asked(linear: Path) -> None:
    found = inspect_summary.report(Subject(oir.load(linear), dims="x.0=5", top=1))
    assert [len(found[name]) for name in ("costliest_nodes", "largest_tensors")] == [1, 1]
    assert found["dims"] == {"x.0": 5}
    assert found["cost"]["multiply_adds"] == 60


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("n=1", "did you mean `N`?"),
        ("height=1", "the dimensions are: `N`, `x.0`, `x.1`"),
        ("N=-1", "`N=-1` is not NAME=NUMBER"),
        ("N", "`N` is not NAME=NUMBER"),
        ("N=1,N=2", "`N` is given twice"),
    ],
)
def test_a_dimension_that_cannot_be_used_is_an_error_with_a_hint(linear: Path, text: str, message: str) -> None:
    with pytest.raises(InputError) as raised:
        parse_dims(text, oir.load(linear))
    assert message in str(raised.value)


def test_a_name_with_markup_is_printed_as_it_is(linear: Path) -> None:
    proto = onnx.load(linear)
    proto.graph.node[1].name = "layer[bold]"
    onnx.save(proto, linear)
    assert "layer[bold]" in printed(str(linear), "--dims", "N=1")


@pytest.mark.parametrize("text", ["", "0", "1,", "two", "-1", "1.5", "9999999999"])
def test_counts_are_positive_numbers(text: str) -> None:
    with pytest.raises(InputError, match="no list of thread counts"):
        parse_counts(text, "--threads", "thread counts")


def test_counts_keep_their_order_and_come_once() -> None:
    assert parse_counts("4,1,4", "--batch", "batch sizes") == [4, 1]


def test_names_cannot_move_the_cursor_or_colour_the_screen(linear: Path) -> None:
    proto = onnx.load(linear)
    proto.producer_name, proto.graph.node[1].name = "\x1b[2Jhand", "\x1b[31mred\nfile  forged.onnx"
    onnx.save(proto, linear)
    shown = printed(str(linear), "--dims", "N=1")
    assert "\x1b" not in shown and "\nfile  forged.onnx" not in shown
    assert r"\x1b[2Jhand" in shown and r"\x1b[31mred\nfile  forged.onnx" in shown
