"""What `optimize` says of layers with fewer bits: what was made of them, which kernel they got, and why not."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
from golden import parse_graph

import burnish
from burnish.ir.errors import UnchangedError
from burnish.tools import cli, lossy_report, report

DEMO = Path(__file__).resolve().parents[2] / "tools" / "demo"

pytestmark = pytest.mark.usefixtures("own_cache")


def test_each_quantized_layer_is_told_with_its_kernel_and_each_other_with_the_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    page = tmp_path / "out.html"
    words = ["optimize", DEMO / "digits_vit.onnx", "-o", tmp_path / "out.onnx", "-p", "quantize-dynamic"]
    monkeypatch.setattr(sys, "argv", [*map(str, words), "--why", "quantize-dynamic", "--report", str(page)])
    with pytest.raises(SystemExit) as stopped:
        cli.optimize_main()
    assert not stopped.value.code
    said = capsys.readouterr().out
    assert "several times slower" in said and "DynamicQuantizeMatMul" in said
    assert "DynamicQuantizeMatMul" in page.read_text()


def test_kernels_are_part_of_the_result(tmp_path: Path) -> None:
    result = burnish.optimize(DEMO / "digits_vit.onnx", tmp_path / "out.onnx", passes=["quantize-dynamic"])
    made = report.as_dict(result)["lossy"]["edits"]
    assert {edit["kernel"] for edit in made} <= {"DynamicQuantizeMatMul", "MatMulIntegerToFloat"}
    assert len(made) == 13
    json.dumps(made)


@pytest.mark.parametrize(
    "spec",
    ["quantize-weights{bits=8,convolutions=true}", "quantize-dynamic{convolutions=true}", "cast-half{stored=true}"],
)
def test_norms_do_not_stay_beside_convolutions_that_are_stored(tmp_path: Path, spec: str) -> None:
    result = burnish.optimize(DEMO / "digits_resnet.onnx", tmp_path / "out.onnx", passes=[spec], verify="off")
    assert not any(node.op_type == "BatchNormalization" for node in result.model.graph)


def test_what_is_noted_of_layers_is_part_of_the_result(tmp_path: Path) -> None:
    source = """g (float[N, 4, 8, 8] x) => (float[N, 4, 6, 6] y) <float[4, 4, 3, 3] a, float[4, 4, 1, 1] b> {
      p = Conv (x, a)  q = Round (p)  y = Conv (q, b)
    }"""
    data = [{"x": np.random.default_rng(i).standard_normal((1, 4, 8, 8)).astype(np.float32)} for i in range(6)]
    spec = "quantize-static{stem=true}"
    result = burnish.optimize(parse_graph(source), tmp_path / "out.onnx", passes=[spec], data=data, verify="off")
    (note,) = report.as_dict(result)["lossy"]["notes"]
    assert note.startswith("before `Round` inside the model")
    assert result.lossy is not None and f"note      1 layer {note}" in lossy_report.lines(result.lossy)


def test_a_run_that_quantizes_nothing_ends_with_exit_code_4(tmp_path: Path) -> None:
    with pytest.raises(UnchangedError, match="several times slower"):
        burnish.optimize(_convolutional(tmp_path), tmp_path / "o.onnx", passes=["quantize-dynamic"])
    with pytest.raises(UnchangedError, match="it is a convolution") as stopped:
        burnish.optimize(_convolutional(tmp_path), tmp_path / "o.onnx", passes=["quantize-weights{bits=4}"])
    assert "--recipe int8" in str(stopped.value.hint)


def test_a_search_that_quantizes_nothing_ends_with_exit_code_4(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    data = [{"image": rng.random((1, 1, 8, 8)).astype(np.float32)} for _ in range(30)]
    given = {"data": data, "guard": (), "max_drop": "0.00001", "metric": "relative-error"}
    with pytest.raises(UnchangedError, match="no edit is made: no (edit stays|plan holds)") as stopped:
        burnish.optimize(DEMO / "digits_vit.onnx", tmp_path / "o.onnx", passes=["quantize-weights{bits=4}"], **given)
    assert stopped.value.exit_code == 4 and not (tmp_path / "o.onnx").exists()


RECIPES = {
    "int8": ["quantize-dynamic", "quantize-static", "quantize-weights"],
    "int4": ["quantize-weights"],
    "fptq": ["quantize-fptq", "quantize-weights"],
    "ostquant-w4": ["quantize-weights"],
}


@pytest.mark.parametrize("recipe", RECIPES)
def test_every_layer_that_a_recipe_rounds_has_bits_a_kernel_and_an_error(tmp_path: Path, recipe: str) -> None:
    told: list[str] = []
    result = burnish.optimize(
        DEMO / "digits_vit.onnx",
        tmp_path / "out.onnx",
        recipe=recipe,
        data=DEMO / "digits.npz",
        guard=["size"],
        on_step=lambda what, number, total: told.append(what),
    )
    made = report.as_dict(result)["lossy"]["edits"]
    assert {edit["pass"].partition("{")[0] for edit in made} <= set(RECIPES[recipe])
    assert len(made) >= 12  # all linear layers, and the last one where that loses little
    assert all(edit["option"].startswith("int") and edit["kernel"] for edit in made)
    assert all(0 < edit["layer_error"] < 0.2 for edit in made)
    assert ("rounding" in told) == (recipe != "int8") and "measuring what is written" in told


def _convolutional(tmp_path: Path) -> Path:
    import onnx
    from golden import parse_graph

    source = "g (float[N, 3, 8, 8] x) => (float[N, 6, 6, 6] y) <float[6, 3, 3, 3] w> { y = Conv (x, w) }"
    onnx.save(parse_graph(source), tmp_path / "conv.onnx")
    return tmp_path / "conv.onnx"


def test_a_recipe_leaves_what_gets_no_smaller_and_no_faster_and_a_named_pass_does_as_told(tmp_path: Path) -> None:
    import onnx
    from golden import parse_graph

    source = (
        "g (float[N, 6, 4, 4] x) => (float[N, 6, 4, 4] y) <float[6, 6, 1, 1] v, float[6, 6, 1, 1] w> "
        "{ c = Conv (x, v)  y = Conv (c, w) }"
    )
    onnx.save(parse_graph(source), tmp_path / "small.onnx")
    rng = np.random.default_rng(0)
    data = [{"x": rng.standard_normal((1, 6, 4, 4)).astype(np.float32)} for _ in range(8)]
    given = {"data": data, "guard": ("size",)}
    with pytest.raises(UnchangedError, match=r"all edits of the pass together make the file [\d,]+ bytes larger"):
        burnish.optimize(tmp_path / "small.onnx", tmp_path / "o.onnx", recipe="int8", **given)
    named = burnish.optimize(tmp_path / "small.onnx", tmp_path / "o.onnx", passes=["quantize-static"], **given)
    assert named.lossy is not None and len(named.lossy.edits) == 2
