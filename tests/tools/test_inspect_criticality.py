"""`burnish inspect --criticality` ranks layers, says what it compares, and repeats itself."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from inspecting import run

DEMO = Path(__file__).parents[2] / "tools" / "demo"


@pytest.fixture
def few(tmp_path: Path) -> str:
    """A file with 40 images in one batch."""
    with np.load(DEMO / "digits.npz") as arrays:
        np.savez(tmp_path / "few.npz", image=arrays["image"][:40].reshape(40, 1, 8, 8))
    return str(tmp_path / "few.npz")


def document(capsys: pytest.CaptureFixture[str], *words: str) -> dict[str, Any]:
    code, out, _ = run(capsys, *words, "--criticality", "--json")
    assert code == 0
    found: dict[str, Any] = json.loads(out)["criticality"]
    return found


def test_layers_are_ranked_and_the_seed_repeats_them(few: str, capsys: pytest.CaptureFixture[str]) -> None:
    words = (str(DEMO / "digits_resnet.onnx"), "--data", few, "--trials", "2")
    found = document(capsys, *words)
    assert (found["compared_as"], found["output"], found["classes"], found["rows"]) == ("logits", "logits", 10, 40)
    numbers = [one["criticality"] for one in found["layers"]]
    assert numbers == sorted(numbers, reverse=True) and len(numbers) == 19
    assert found["mean_criticality"] == pytest.approx(np.mean(numbers))
    for one in found["layers"]:
        assert one["criticality"] == pytest.approx(np.mean(one["trials"])) and len(one["trials"]) == 2
    assert document(capsys, *words) == found
    other = document(capsys, *words, "--seed", "5")
    assert other["layers"] != found["layers"] and other["seed"] == 5


def test_a_model_that_classifies_nothing_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    proto = onnx.parser.parse_model("""<ir_version: 8, opset_import: ["": 17]>
      g (float[N, 2] x) => (float[N, 2] y) <float[2, 2] w = {1, 2, 3, 4}> { m = MatMul (x, w) y = Tanh (m) }""")
    onnx.save(proto, tmp_path / "model.onnx")
    code, out, err = run(capsys, str(tmp_path / "model.onnx"), "--criticality", "--trials", "1")
    assert code == 0 and "y: plain values, since it ends in no softmax, linear layer or sigmoid" in out
    assert "these are made samples" in err
    (row,) = [line.split() for line in out.splitlines() if "MatMul" in line]
    assert "%" not in row[-1]


def test_a_layer_without_which_the_model_cannot_run_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    proto = onnx.parser.parse_model("""<ir_version: 8, opset_import: ["": 17]>
      g (float[2, 2] x) => (float[2, 2] y) <float[2, 2] w = {1, 2, 3, 4}, float[2, 2] v = {1, 1, 1, 1},
        int64[1] whole = {-1}> {
        m = MatMul (x, w)  y = Softmax (m)  a = MatMul (x, v)  s = ReduceSum <keepdims = 0> (a)  n = Floor (s)
        i = Cast <to = 7> (n)  r = Reshape (i, whole)  z = Expand (x, r)  q = ReduceSum <keepdims = 0> (z)
        u = Mul (q, q) }""")
    proto.graph.output.append(onnx.helper.make_tensor_value_info("u", onnx.TensorProto.FLOAT, []))
    onnx.save(proto, tmp_path / "model.onnx")
    np.savez(tmp_path / "data.npz", x=np.array([[1, 0], [0, 0]], np.float32))
    found = document(capsys, str(tmp_path / "model.onnx"), "--data", str(tmp_path / "data.npz"))
    assert len(found["layers"]) == 1 and found["padding"] is None
    (skipped,) = found["skipped"]
    assert "the model cannot run with other weights" in skipped["reason"]


def test_the_picture_is_drawn(tmp_path: Path, few: str, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    picture = tmp_path / "criticality.svg"
    words = (str(DEMO / "digits_resnet.onnx"), "--criticality", "--data", few, "--trials", "1", "--plot", str(picture))
    code, _, err = run(capsys, *words)
    assert code == 0 and str(picture) in err and "BatchNormalization" in picture.read_text()


@pytest.mark.parametrize(
    ("source", "words", "message"),
    [
        ("g (float[2] x) => (float[2] y) { y = Relu (x) }", (), "no layer's weights can be drawn anew: there is none"),
        (
            "g (float[N, 2] x) => (float[N, 2] y) <int8[2, 2] q = {1, 2, 3, 4}, float s = {1}> "
            "{ w = DequantizeLinear (q, s) y = MatMul (x, w) }",
            (),
            "its weight is quantized",
        ),
        (
            "g (float[N, 2] x) => (int64[N] y) <float[2, 2] w = {1, 2, 3, 4}> { m = MatMul (x, w) "
            "y = ArgMax <axis = 1, keepdims = 0> (m) }",
            (),
            "no output of floating point",
        ),
        (
            "g (float[N, 2] x) => (float[N, 2] y) <float[2, 2] w = {1, 2, 3, 4}, float[2] z = {0, 1}> "
            "{ m = MatMul (x, w)  y = Div (m, z) }",
            (),
            "holds NaN or infinity with the model's own weights",
        ),
        ("g (float[2] x) => (float[2] y) { y = Relu (x) }", ("--trials", "0"), "--trials"),
        ("g (float[2] x) => (float[2] y) { y = Relu (x) }", ("--seed", "-1"), "--seed"),
        (
            "g (float[N, 2] x) => (float[N, 2] y) <float[2, 2] w = {1, 2, 3, 4}> { y = MatMul (x, w) }",
            ("--data", "missing.npz"),
            "no such file",
        ),
    ],
)
def test_what_cannot_work_is_an_error(
    source: str, words: tuple[str, ...], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    proto = onnx.parser.parse_model(f'<ir_version: 8, opset_import: ["": 17]> {source}')
    onnx.save(proto, tmp_path / "model.onnx")
    code, _, err = run(capsys, str(tmp_path / "model.onnx"), "--criticality", *words)
    assert code == 2 and message in err


def test_options_of_other_sections_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    code, _, err = run(capsys, str(DEMO / "digits_resnet.onnx"), "--rank", "--trials", "2")
    assert code == 2 and "`--trials` goes with `--criticality`" in err


def test_a_length_leaves_the_most_critical_layers(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, str(DEMO / "digits_resnet.onnx"), "--criticality", "--trials", "1", "--top", "1")
    assert code == 0 and len(out.split("criticality  ")[-1].strip().splitlines()) == 2
