"""`burnish compare`: equal models, the first node where others part, and what cannot be compared."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from click.testing import CliRunner, Result
from onnx import numpy_helper

from burnish.ir.errors import InputError
from burnish.tools.compare_command import compare_command

BODY = """
<ir_version: 10, opset_import: ["": 21]>
g (float[N,4] x) => (float[N,4] y, float[N,4] z)
<float[4] a = {1.0, 2.0, 3.0, 4.0}, float[4] b = {0.5, 0.5, 0.5, 0.5}>
{
  [first] p = Mul (x, a)
  [second] q = Add (p, b)
  [third] r = Tanh (q)
  [fourth] s = Mul (r, a)
  [last] y = Add (s, x)
  [side] z = Neg (p)
}
"""


def compare(a: Path, b: Path, *options: str) -> Result:
    """The command's result; our own errors are raised."""
    result = CliRunner().invoke(compare_command, [str(a), str(b), *options], standalone_mode=False)
    if result.exception is not None:
        raise result.exception
    return result


def report(a: Path, b: Path, *options: str) -> dict[str, Any]:
    """The JSON document."""
    found: dict[str, Any] = json.loads(compare(a, b, *options, "--json").stdout)
    return found


def save(path: Path, text: str = BODY, *, weight: tuple[str, float] | None = None, prefix: str = "") -> Path:
    """A model's file; one weight scaled, inner values renamed."""
    model = onnx.parser.parse_model(text)
    for tensor in model.graph.initializer:
        if weight is not None and tensor.name == weight[0]:
            array = numpy_helper.to_array(tensor) * np.float32(weight[1])
            tensor.CopyFrom(numpy_helper.from_array(array, tensor.name))
    inner = {name for node in model.graph.node for name in node.output} - {o.name for o in model.graph.output}
    for node in model.graph.node:
        node.input[:] = [prefix + n if n in inner else n for n in node.input]
        node.output[:] = [prefix + n if n in inner else n for n in node.output]
    onnx.save(model, path)
    return path


def test_a_model_agrees_with_itself(tmp_path: Path) -> None:
    a, b = save(tmp_path / "a.onnx"), save(tmp_path / "b.onnx", prefix="other_")
    found = report(a, b)
    assert found["agree"]
    assert found["first_difference"] is None
    assert [one["error"] for one in found["outputs"]] == [0.0, 0.0]
    assert compare(a, b).return_value == 0


@pytest.mark.parametrize("prefix", ["", "other_"])
def test_the_first_differing_node_is_named(tmp_path: Path, prefix: str) -> None:
    a, b = save(tmp_path / "a.onnx"), save(tmp_path / "b.onnx", weight=("b", 1.1), prefix=prefix)
    found = report(a, b)
    assert not found["agree"]
    assert {one["output"]: one["agrees"] for one in found["outputs"]} == {"y": False, "z": True}
    parting = found["first_difference"]
    assert parting["node_in_a"] == "Add `second`"
    assert parting["value_in_b"] == f"{prefix}q"
    assert parting["last_agreeing"]["node_in_a"] == "Mul `first`"
    result = compare(a, b)
    assert result.return_value == 1
    assert "The models part at `q`" in result.stdout
    assert "DIFFERS" in result.stdout


def test_a_difference_at_the_very_start_hangs_on_the_inputs(tmp_path: Path) -> None:
    a = save(tmp_path / "a.onnx")
    b = save(tmp_path / "b.onnx", BODY.replace("p = Mul (x, a)", "p = Sub (x, a)"))
    parting = report(a, b)["first_difference"]
    assert (parting["node_in_a"], parting["node_in_b"]) == ("Mul `first`", "Sub `first`")
    assert parting["last_agreeing"] is None


def test_a_deep_model_is_searched_with_few_observations(tmp_path: Path) -> None:
    steps = "\n".join(f"v{i + 1} = Add (v{i}, {'w' if i == 150 else 'k'})" for i in range(300))
    text = f"""<ir_version: 10, opset_import: ["": 21]> g (float[N,4] x) => (float[N,4] v300)
        <float k = {{0.01}}, float w = {{0.02}}> {{ v0 = Identity (x) {steps} }}"""
    a, b = save(tmp_path / "a.onnx", text), save(tmp_path / "b.onnx", text, weight=("w", 50.0))
    parting = report(a, b)["first_difference"]
    assert parting["value_in_a"] == "v151"
    assert parting["values_observed"] < 60


def test_the_tolerance_decides(tmp_path: Path) -> None:
    a, b = save(tmp_path / "a.onnx"), save(tmp_path / "b.onnx", weight=("b", 1.001))
    assert not report(a, b)["agree"]
    assert report(a, b, "--tolerance", "0.01")["agree"]


def test_given_samples_are_used(tmp_path: Path) -> None:
    a = save(tmp_path / "a.onnx")
    np.savez(tmp_path / "d.npz", x=np.ones((3, 4), np.float32))
    found = report(a, a, "--data", str(tmp_path / "d.npz"))
    assert found["samples"]


def test_outputs_with_other_names_are_compared_by_position(tmp_path: Path) -> None:
    a = save(tmp_path / "a.onnx")
    renamed = BODY.replace("float[N,4] y", "float[N,4] out").replace("[last] y", "[last] out")
    found = report(a, save(tmp_path / "b.onnx", renamed))
    assert found["agree"]
    assert found["notes"] == ["the outputs have other names and are compared by position"]


def test_models_with_other_inputs_are_refused(tmp_path: Path) -> None:
    a = save(tmp_path / "a.onnx")
    other = BODY.replace("float[N,4] x)", "float[N,4] u)").replace("(x, a)", "(u, a)").replace("(s, x)", "(s, u)")
    with pytest.raises(InputError, match="the inputs differ: A has `x`, B has `u`"):
        compare(a, save(tmp_path / "b.onnx", other))
