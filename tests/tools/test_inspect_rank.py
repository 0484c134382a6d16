"""`burnish inspect --rank` shows the ranks of weights, and with samples those of real inputs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from inspecting import run

from burnish.passes import layers

DEMO = Path(__file__).parents[2] / "tools" / "demo"


@pytest.fixture
def few(tmp_path: Path) -> str:
    """A file with 80 images in one batch."""
    with np.load(DEMO / "digits.npz") as arrays:
        np.savez(tmp_path / "few.npz", image=arrays["image"][:80].reshape(80, 1, 8, 8))
    return str(tmp_path / "few.npz")


def document(capsys: pytest.CaptureFixture[str], *words: str) -> dict[str, Any]:
    code, out, _ = run(capsys, *words, "--rank", "--json")
    assert code == 0
    found: dict[str, Any] = json.loads(out)["rank"]
    return found


def test_every_layer_has_its_ranks(few: str, capsys: pytest.CaptureFixture[str]) -> None:
    found = document(capsys, str(DEMO / "digits_resnet.onnx"), "--data", few)
    assert [one["operator"] for one in found["layers"]] == ["Conv"] * 9 + ["Gemm"]
    for one in found["layers"]:
        assert 1 <= one["stable_rank"] <= one["energy_rank_99"] <= one["full_rank"]
        assert one["energy_rank_90"] <= one["energy_rank_99"]
        data = one["data"]
        assert data["utilized_rank"] <= min(data["feature_rank"], one["full_rank"])
        assert data["qsur_root"] is None or 0 < data["qsur_root"] <= data["qsur_root_bound"]
    assert [one["data"]["few_rows"] for one in found["layers"]] == [False] * 7 + [True, False, False]
    shares = [one["data"]["utilized_share"] for one in found["layers"] if not one["data"]["few_rows"]]
    assert found["mean_utilized_share"] == pytest.approx(np.mean(shares))


def test_the_layers_may_be_taken_in_several_runs(
    few: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    words = (str(DEMO / "digits_vit.onnx"), "--data", few)
    whole = document(capsys, *words)
    monkeypatch.setattr(layers, "STATISTICS", 1 << 20)
    assert document(capsys, *words) == whole


def test_ranks_that_few_rows_limit_are_marked(few: str, capsys: pytest.CaptureFixture[str]) -> None:
    _, out, err = run(capsys, str(DEMO / "digits_resnet.onnx"), "--rank", "--data", few)
    (row,) = [line for line in out.splitlines() if ">=" in line]
    assert "blocks.2/second" in row and row.count(">=") == 3
    assert "1 layer saw no more rows than features" in err


def test_made_samples_do_not_count(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = run(capsys, str(DEMO / "digits_vit.onnx"), "--rank")
    assert code == 0 and "utilized" not in out and "`--data` adds what the layers use" in err
    assert document(capsys, str(DEMO / "digits_vit.onnx"))["layers"][0]["data"] is None


def test_a_layer_in_a_sub_graph_has_the_ranks_of_its_weight_only(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    proto = onnx.parser.parse_model("""<ir_version: 8, opset_import: ["": 17]>
      g (bool c, float[N, 2] x) => (float[N, 2] y) <float[2, 2] w = {1, 0, 0, 2}> {
        y = If (c) <then_branch = a () => (float[N, 2] p) { p = MatMul (x, w) },
                    else_branch = b () => (float[N, 2] q) { q = Relu (x) }> }""")
    onnx.save(proto, tmp_path / "model.onnx")
    np.savez(tmp_path / "data.npz", c=np.array(True), x=np.ones((5, 2), np.float32))
    found = document(capsys, str(tmp_path / "model.onnx"), "--data", str(tmp_path / "data.npz"))
    (layer,) = found["layers"]
    assert layer["stable_rank"] == pytest.approx(1.25) and layer["data"] is None and "sub-graph" in layer["unknown"]


def test_padding_is_left_out_or_the_reason_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    proto = onnx.parser.parse_model("""<ir_version: 8, opset_import: ["": 17]>
      g (float[b, s, 2] x, int64[b, s] m) => (float[b, t] y) <float[2, 2] w = {1, 2, 3, 4}, int64[1] last = {2}> {
        z = MatMul (x, w)  t = Transpose <perm = [1, 0, 2]> (z) r = Reshape (t, k) a = MatMul (r, w)
        f = Cast <to = 1> (m)  u = Unsqueeze (f, last)  p = Mul (z, u)  y = ReduceSum <keepdims = 0> (p, last) }""")
    proto.graph.initializer.append(onnx.numpy_helper.from_array(np.array([-1, 2]), "k"))
    onnx.save(proto, tmp_path / "model.onnx")
    rng = np.random.default_rng(0)
    x = np.concatenate([rng.standard_normal((4, 3, 1)).repeat(2, 2), rng.standard_normal((4, 3, 2))], 1)
    mask = np.array([1, 1, 1, 0, 0, 0]).repeat(4).reshape(6, 4).T
    np.savez(tmp_path / "data.npz", x=x.astype(np.float32), m=np.ascontiguousarray(mask))
    found = document(capsys, str(tmp_path / "model.onnx"), "--data", str(tmp_path / "data.npz"))
    first, second = found["layers"]
    assert (first["data"]["rows"], first["data"]["feature_rank"]) == (12, 1)
    assert second["data"] is None and "padding cannot be left out: the axes of" in second["unknown"]


def test_the_picture_is_drawn(tmp_path: Path, few: str, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    picture = tmp_path / "rank.svg"
    words = (str(DEMO / "digits_resnet.onnx"), "--rank", "--data", few, "--plot", str(picture))
    code, _, err = run(capsys, *words)
    assert code == 0 and str(picture) in err
    for label in ("weight, stable rank", "utilized on the data"):
        assert label in picture.read_text()


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.ones((2, 1, 9, 9), np.float32), "axis 2 has length 9"),
        (np.ones((0, 1, 8, 8), np.float32), "no row was seen"),
    ],
)
def test_samples_that_do_not_suit_are_refused(
    array: np.ndarray, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    np.savez(tmp_path / "data.npz", image=array)
    code, _, err = run(capsys, str(DEMO / "digits_resnet.onnx"), "--rank", "--data", str(tmp_path / "data.npz"))
    assert code == 2 and message in err


def test_a_length_leaves_the_layers_that_use_least(capsys: pytest.CaptureFixture[str]) -> None:
    words = (str(DEMO / "digits_resnet.onnx"), "--rank", "--top", "2")
    found = document(capsys, *words)["layers"]
    least = sorted(found, key=lambda one: one["energy_rank_99"] / one["full_rank"])[:2]
    code, out, _ = run(capsys, *words)
    assert code == 0 and len(found) == 10
    assert {one["name"] for one in found if f"{one['name']} " in out} == {one["name"] for one in least}


def test_weights_and_inputs_that_are_not_finite_have_no_ranks(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = "g (float[N, 2] x) => (float[N, 2] y) { a = MatMul (x, u) y = MatMul (a, v) }"
    proto = onnx.parser.parse_model(f'<ir_version: 8, opset_import: ["": 17]> {source}')
    for name, first in (("u", np.nan), ("v", 1.0)):
        weight = np.array([[first, 2], [3, 4]], np.float32)
        proto.graph.initializer.append(onnx.numpy_helper.from_array(weight, name))
    onnx.save(proto, tmp_path / "model.onnx")
    np.savez(tmp_path / "data.npz", x=np.ones((5, 2), np.float32))
    words = (str(tmp_path / "model.onnx"), "--data", str(tmp_path / "data.npz"))
    first, second = document(capsys, *words)["layers"]
    assert first["stable_rank"] is None and "its weight holds NaN" in first["unknown"]
    assert second["stable_rank"] > 0 and second["data"] is None and "its input holds NaN" in second["unknown"]
    code, out, err = run(capsys, *words, "--rank", "--plot", str(tmp_path / "rank.svg"))
    assert code == 0 and "?" in out and "holds NaN" in err and (tmp_path / "rank.svg").exists()


def test_widths_that_are_all_used_and_that_are_hardly_used(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    random = np.random.default_rng(5)
    thin = random.standard_normal((16, 4)) @ random.standard_normal((4, 32))
    weights = {"full": random.standard_normal((16, 16)), "thin": thin, "last": random.standard_normal((32, 8))}
    values = ["x", "a", "b", "y"]
    graph = onnx.helper.make_graph(
        [
            onnx.helper.make_node("MatMul", [values[i], name], [values[i + 1]], name=name)
            for i, name in enumerate(weights)
        ],
        "g",
        [onnx.helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, ["N", 16])],
        [onnx.helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, ["N", 8])],
        [onnx.numpy_helper.from_array(array.astype(np.float32), name) for name, array in weights.items()],
    )
    onnx.save(
        onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 18)], ir_version=10), tmp_path / "m"
    )
    np.savez(tmp_path / "d.npz", x=random.standard_normal((500, 16)).astype(np.float32))
    words = (str(tmp_path / "m"), "--data", str(tmp_path / "d.npz"))
    found = {one["name"]: one["data"] for one in document(capsys, *words)["layers"]}
    assert [(one["channels"], one["channels_used"], one["width"]) for one in found.values()] == [
        (16, 16, "narrow"), (16, found["thin"]["channels_used"], found["thin"]["width"]), (32, 4, "wide")
    ]  # fmt: skip
    _, out, _ = run(capsys, *words, "--rank")
    assert "narrow inputs" in out and "wide inputs" in out and "last (4 of 32)" in out
