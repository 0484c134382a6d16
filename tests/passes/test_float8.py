"""8-bit floating point: what is written computes what the numbers say, on ONNX Runtime with all its rewrites, too."""

from __future__ import annotations

from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as oir
import pytest
from golden import parse_graph
from integer_models import ATTENTIVE, GATED, HARD, RESIDUAL, proposed, samples_of
from laws import OrtRunner

import burnish
from burnish.ir.errors import InputError
from burnish.passes import catalog, grids, lossy
from burnish.passes.grids import Float8
from burnish.passes.pipeline import constant_bytes
from burnish.passes.simulated import LABEL
from burnish.tools import report

KINDS = {"float8e4m3fn": ml_dtypes.float8_e4m3fn, "float8e5m2": ml_dtypes.float8_e5m2}
MODELS = {"residual": RESIDUAL, "gated": GATED, "hard": HARD, "attentive": ATTENTIVE}


def model_of(source: str) -> oir.Model:
    text = f'<ir_version: 10, opset_import: ["": 21]>\n{source}'
    model = oir.from_proto(onnx.shape_inference.infer_shapes(parse_graph(text), strict_mode=True, data_prop=True))
    for index, node in enumerate(model.graph):
        node.name = f"{node.op_type}_{index}"
    return model


def outputs(model: oir.Model, feeds: dict[str, np.ndarray], *, optimize: bool) -> np.ndarray:
    runner = OrtRunner(model, optimize=optimize)
    found = np.concatenate([array.ravel() for array in runner.run(feeds).values()])
    runner.close()
    return found


def unseen(model: oir.Model) -> dict[str, np.ndarray]:
    (given,) = model.graph.inputs
    shape = [int(size) for size in given.shape]  # type: ignore[union-attr, arg-type]
    return {str(given.name): np.random.default_rng(5).standard_normal(shape).astype(np.float32)}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("axis", [None, 0])
@pytest.mark.parametrize("clip", ["minmax", "mse"])
def test_numbers_are_rounded_to_the_nearest(kind: str, axis: int | None, clip: grids.Clip) -> None:
    values = np.random.default_rng(0).standard_t(3, (20, 60)) * 10.0 ** np.arange(-10, 10)[:, None]
    scales = grids.fit(values, Float8(kind=kind), axis, clip=clip)
    found = grids.dequantize(grids.quantize(values, scales), scales)
    every = np.arange(256, dtype=np.uint8).view(KINDS[kind]).astype(np.float64)
    every = np.unique(every[np.isfinite(every)])
    steps = values / scales.spread(scales.scale.astype(np.float64), values.shape)
    nearest = np.abs(steps[..., None] - every).min(-1)
    there = np.abs(steps - found / scales.spread(scales.scale.astype(np.float64), values.shape))
    np.testing.assert_allclose(there, nearest, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize(
    ("kind", "options"),
    [("float8e4m3fn", ""), ("float8e5m2", ""), ("float8e5m2", ",per_channel=false,correct_bias=false")],
)
def test_it_computes_the_same_with_and_without_the_rewrites_of_the_runtime(name: str, kind: str, options: str) -> None:
    model = model_of(MODELS[name])
    one, edits, _ = proposed(model, samples_of(model), f"{{dtype={kind}{options}}}")
    after = lossy.apply(model, edits, [one])[0]
    feeds = unseen(model)
    before, plain, rewritten = (
        outputs(model, feeds, optimize=False),
        *(outputs(after, feeds, optimize=way) for way in (False, True)),
    )
    size = np.linalg.norm(before)
    assert np.linalg.norm(plain - before) / size < (0.08 if kind == "float8e4m3fn" else 0.16)
    # sums in another order move a few numbers to the neighbouring one of the grid
    assert np.linalg.norm(plain - rewritten) / size < 0.02
    assert constant_bytes(model) - constant_bytes(after) == sum(edit.savings.bytes for edit in edits)
    assert kind in after.metadata_props[LABEL]


def test_negative_numbers_do_not_come_through_a_relu_and_large_biases_do_not_overflow() -> None:
    source = """g (float[2, 8, 6, 6] x) => (float[2, 8, 4, 4] y)
    <float[8, 8, 1, 1] w0, float[8] b0, float[8, 8, 3, 3] w1> {
      c = Conv (x, w0, b0)
      r = Relu (c)
      y = Conv (r, w1)
    }"""
    model = model_of(source)
    bias = model.graph.initializers["b0"]
    bias.const_value = oir.tensor(np.linspace(-60, 60, 8).astype(np.float32))
    one, edits, _ = proposed(model, samples_of(model), "{dtype=float8e5m2}")
    after = lossy.apply(model, edits, [one])[0]
    assert all(len(node.inputs) == 2 for node in after.graph if node.op_type in ("QuantizeLinear", "DequantizeLinear"))
    feeds = unseen(model)
    before, now = (outputs(one, feeds, optimize=True) for one in (model, after))
    assert np.linalg.norm(now - before) / np.linalg.norm(before) < 0.1


def test_pairs_of_floating_point_numbers_that_are_there_are_taken() -> None:
    source = """g (float[2, 9, 32] x) => (float[2, 9, 16] y) <float[32, 16] w, float s = {0.01}, uint8 z = {0}> {
      q = QuantizeLinear (x, s, z)
      d = DequantizeLinear (q, s, z)
      y = MatMul (d, w)
    }"""
    model = model_of(source)
    zero = np.zeros((), ml_dtypes.float8_e4m3fn)
    model.graph.initializers["z"].const_value = oir.tensor(zero)
    for value in (model.graph.initializers["z"], model.graph.node("QuantizeLinear_0").outputs[0]):
        value.type = oir.TensorType(oir.DataType.FLOAT8E4M3FN)
    for spec in ("", "{dtype=float8e4m3fn}"):
        one, edits, _ = proposed(model, samples_of(model), spec)
        after = lossy.apply(model, edits, [one])[0]
        assert sum(node.op_type == "QuantizeLinear" for node in after.graph) == 1


@pytest.mark.parametrize("option", ["calibration=entropy", "symmetric=true", "rounding=gptq", "weight_bits=7"])
def test_what_is_for_integers_is_refused(option: str) -> None:
    with pytest.raises(InputError, match="is for integers"):
        catalog.parse(f"quantize-static{{dtype=float8e5m2,{option}}}")


def test_the_command_says_that_it_is_simulated_and_what_an_old_opset_lacks(tmp_path: Path) -> None:
    onnx.save(parse_graph(ATTENTIVE), tmp_path / "m.onnx")
    data = [{"x": np.random.default_rng(seed).standard_normal((2, 9, 32)).astype(np.float32)} for seed in range(8)]
    given = {"data": data, "passes": ["quantize-static{dtype=float8e4m3fn}"], "guard": ("size",)}
    with pytest.raises(InputError, match="8-bit floats need 21") as stopped:
        burnish.optimize(tmp_path / "m.onnx", tmp_path / "o.onnx", **given)
    assert "--opset 21" in str(stopped.value.hint)
    made = [burnish.optimize(tmp_path / "m.onnx", tmp_path / f"{i}.onnx", opset=21, **given) for i in range(2)]
    assert "multiplied in floating point" in report.as_dict(made[0])["lossy"]["simulated"]
    assert Path(tmp_path / "0.onnx").read_bytes() == Path(tmp_path / "1.onnx").read_bytes()
    onnx.checker.check_model(tmp_path / "0.onnx", full_check=True)
