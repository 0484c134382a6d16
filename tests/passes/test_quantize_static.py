"""What static quantization promises: kernels on integers from end to end, small errors, the same bytes every time."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx_ir as oir
import pytest
from golden import parse_graph
from integer_models import ATTENTIVE, GATED, HARD, RESIDUAL, kernels, model_of, proposed, quantized, samples_of
from laws import OrtRunner

import burnish
from burnish.ir.errors import InputError, UnchangedError
from burnish.ir.samples import Sample
from burnish.ir.text import fingerprint
from burnish.ir.views.convolution import convolutions
from burnish.passes import catalog, lossy, recipes
from burnish.passes.moments import moments
from burnish.passes.pipeline import Pipeline
from burnish.tools.lossy_context import context_for


def error(model: oir.Model, other: oir.Model) -> float:
    """The relative error of all outputs on samples of another seed than those of the calibration."""
    (given,) = model.graph.inputs
    shape = [int(size) for size in given.shape]  # type: ignore[union-attr, arg-type]
    feeds = {str(given.name): np.random.default_rng(1).standard_normal(shape).astype(np.float32)}
    found = []
    for one in (model, other):
        runner = OrtRunner(one, optimize=True)
        found.append(np.concatenate([array.ravel() for array in runner.run(feeds).values()]))
        runner.close()
    return float(np.linalg.norm(found[1] - found[0]) / np.linalg.norm(found[0]))


FLOAT = {
    "HardSigmoid",
    "HardSwish",
    "Conv",
    "FusedConv",
    "MatMul",
    "Gemm",
    "FusedGemm",
    "Relu",
    "Clip",
    "Add",
    "Mul",
    "Sigmoid",
    "MaxPool",
}


@pytest.mark.parametrize(
    ("source", "wanted", "float_left"),
    [
        (
            RESIDUAL,
            {"QLinearConv": 4, "QGemm": 1, "QLinearAdd": 1, "QLinearConcat": 1, "QLinearGlobalAveragePool": 1},
            {"MaxPool"},
        ),
        (GATED, {"QLinearConv": 3, "QLinearSigmoid": 2, "QLinearMul": 2, "QLinearGlobalAveragePool": 1}, set()),
        (HARD, {"QLinearConv": 3, "QLinearAdd": 3, "QLinearMul": 2, "QLinearGlobalAveragePool": 1}, set()),
        (ATTENTIVE, {"MatMulIntegerToFloat": 2}, {"Add"}),
    ],
    ids=["residual", "gated", "hard", "attentive"],
)
def test_everything_between_layers_runs_on_integers(
    source: str, wanted: dict[str, int], float_left: set[str], tmp_path: Path
) -> None:
    model = model_of(source)
    after = quantized(model)
    found = kernels(after, tmp_path)
    assert {name: found[name] for name in wanted} == wanted
    assert not (FLOAT - float_left) & set(found), found
    convolutional = source is not ATTENTIVE
    assert found["QuantizeLinear"] == (1 if convolutional else 2)
    assert found["DequantizeLinear"] == (1 if source in (GATED, HARD) else 0)
    assert error(model, after) < 0.05


@pytest.mark.parametrize("calibration", ["best", "minmax", "percentile", "mse", "entropy"])
@pytest.mark.parametrize("symmetric", ["true", "false"])
def test_every_calibration_keeps_the_function(calibration: str, symmetric: str, tmp_path: Path) -> None:
    model = model_of(RESIDUAL)
    after = quantized(model, f"{{calibration={calibration},symmetric={symmetric}}}")
    assert error(model, after) < (0.2 if calibration == "entropy" else 0.06)
    assert kernels(after, tmp_path)["QLinearConv"] == 4


def test_the_calibration_is_the_best_of_three() -> None:
    spiky = model_of(ATTENTIVE.replace("(x, w0)", "(t, w0)").replace("p = MatMul", "t = Tan (x)\n  p = MatMul"))
    _, edits, _ = proposed(spiky, samples_of(spiky))
    errors = {}
    for rule in ("minmax", "percentile", "mse"):
        _, tried, _ = proposed(spiky, samples_of(spiky), f"{{calibration={rule}}}")
        errors[rule] = tried[0].payload["t"]
    assert any(np.array_equal(edits[0].payload["t"], ends) for ends in errors.values())
    assert len({tuple(ends) for ends in errors.values()}) == 3


def test_few_samples_do_not_speak_against_the_least_squared_error() -> None:
    model = model_of(RESIDUAL)
    samples = samples_of(model)
    best, squared = (proposed(model, samples[:1], text)[1][0].payload for text in ("", "{calibration=mse}"))
    assert all(np.array_equal(best[name], squared[name]) for name in best)


@pytest.mark.parametrize(
    ("reader", "ends"),
    [
        ("u = HardSwish (c0)", (-3, None)),
        ("u = HardSigmoid <alpha = 0.2, beta = 0.6> (c0)", (-3, 2)),
        ("t = HardSwish (c0)  n = Neg (c0)  u = Add (t, n)", (None, None)),
    ],
)
def test_what_no_reader_tells_apart_takes_up_no_range(reader: str, ends: tuple[float | None, float | None]) -> None:
    model = model_of(HARD.replace("u = HardSwish (c0)", reader))
    low, high = proposed(model, samples_of(model), "{calibration=minmax}")[1][0].payload["c0"]
    assert low == pytest.approx(ends[0]) if ends[0] is not None else low < -3.5
    assert high == pytest.approx(ends[1]) if ends[1] is not None else high > 3.5


def test_what_a_relu_behind_a_sum_makes_zero_of_takes_up_no_range() -> None:
    """The convolution gives -8, -1 and 5; with 1 added, what is below -1 makes no difference to the Relu."""
    model = model_of("""g (float[1, 3, 1, 1] x, float[1, 3, 1, 1] b) => (float[1, 3, 1, 1] y)
        <float[3, 3, 1, 1] w, float[3, 3, 1, 1] v>
    {
      a = Conv (x, w)
      s = Add (a, b)
      r = Relu (s)
      y = Conv (r, v)
    }""")
    weight = np.diag([-8.0, -1.0, 5.0]).astype(np.float32)[:, :, None, None]
    model.graph.initializers["w"].const_value = oir.tensor(weight, name="w")
    ones = np.ones((1, 3, 1, 1), np.float32)
    samples = [Sample(str(index), {"x": ones * scale, "b": ones}) for index, scale in enumerate((1.0, 0.5))]
    known = proposed(model, samples, "{calibration=minmax,stem=true}")[1][0].payload
    assert known["a"].tolist() == [-1.0, 5.0] and known["r"].tolist() == [0.0, 6.0]


def test_single_layers_and_pairs_of_them_can_be_edited() -> None:
    model = model_of(RESIDUAL)
    one, edits, _ = proposed(model, samples_of(model))
    whole = error(model, lossy.apply(model, edits, [one])[0])
    alone = [error(model, lossy.apply(model, [edit], [one])[0]) for edit in edits]
    assert 0 < max(alone) <= 1.5 * whole and whole < 2 * sum(alone)
    for first, second in zip(edits, edits[1:], strict=False):
        assert error(model, lossy.apply(model, [first, second], [one])[0]) < 3 * whole


def test_the_mean_of_rounded_weights_is_put_into_the_bias() -> None:
    source = RESIDUAL.replace("w4, float[10] b4", "w4")
    model = model_of(source.replace("(f, w4, b4)", "(f, w4)"))
    kept, moved = (
        quantized(model, f"{{per_channel=false,weight_bits=7,correct_bias={one}}}") for one in ("false", "true")
    )
    assert error(model, moved) < error(model, kept)


def test_a_bias_that_is_huge_beside_its_weight_keeps_its_value() -> None:
    source = "g (float[2, 6, 6, 6] x) => (float[2, 2, 6, 6] y) <float[2, 6, 1, 1] w, float[2] b> { y = Conv (x, w, b) }"
    model = model_of(source)
    weight, bias = (model.graph.initializers[name] for name in "wb")
    weight.const_value = oir.tensor((weight.const_value.numpy() * np.float32(1e-7)), name="w")  # type: ignore[union-attr]
    bias.const_value = oir.tensor(np.array([300.0, -200.0], np.float32), name="b")
    assert error(model, quantized(model)) < 0.01


def test_the_same_samples_give_the_same_bytes() -> None:
    model = model_of(GATED)
    assert fingerprint(quantized(model)) == fingerprint(quantized(model))


def test_a_model_that_is_quantized_stays_what_it_is() -> None:
    after = quantized(model_of(RESIDUAL))
    _, edits, outcome = proposed(after, samples_of(after))
    assert not edits and {skip.reason for skip in outcome.skipped} == {"its weight is quantized"}


@pytest.mark.parametrize("target", ["onnx", "ort-cpu"])
@pytest.mark.parametrize("source", [RESIDUAL, GATED, HARD, ATTENTIVE], ids=["residual", "gated", "hard", "attentive"])
def test_exact_passes_leave_the_kernels_alone(source: str, target: str, tmp_path: Path) -> None:
    before = quantized(model_of(source))
    after = Pipeline(tuple(recipes.named("default", target, None))).rewrite(before).model
    folders = tmp_path / "before", tmp_path / "after"
    for folder in folders:
        folder.mkdir()
    wanted, found = (kernels(one, folder) for one, folder in zip((before, after), folders, strict=True))
    integers = ("Q", "MatMulInteger", "Dequantize")
    assert {op: count for op, count in found.items() if op.startswith(integers)} == {
        op: count for op, count in wanted.items() if op.startswith(integers)
    }
    assert error(before, after) < 0.01


def test_values_that_are_not_finite_are_named() -> None:
    model = model_of(RESIDUAL.replace("(x, w0, b0)", "(l, w0, b0)").replace("c0 = Conv", "l = Log (x)\n  c0 = Conv"))
    _, edits, outcome = proposed(model, samples_of(model))
    assert not edits and "`l` cannot be rounded: it holds NaN or infinity" in {one.reason for one in outcome.skipped}


def test_weights_that_no_kernel_takes_are_refused() -> None:
    source = "g (float[2, 4, 3, 32] x) => (float[2, 4, 3, 64] y) <float[1, 1, 32, 64] w> { y = MatMul (x, w) }"
    model = model_of(source)
    _, edits, outcome = proposed(model, samples_of(model))
    assert not edits and "more than two axes" in outcome.skipped[0].reason
    model = model_of(source.replace("1, 1, 32", "32"))
    held = model.graph.initializers["w"]
    held.const_value = oir.tensor(np.full((32, 64), np.nan, np.float32))
    _, edits, outcome = proposed(model, samples_of(model))
    assert not edits and [one.reason for one in outcome.skipped] == ["its weight holds NaN or infinity"]


@pytest.mark.parametrize("options", ["{percentile=20}", "{weight_bits=4}", "{memory=0}", "{calibration=most}"])
def test_options_that_make_no_sense_are_refused(options: str) -> None:
    with pytest.raises(InputError):
        catalog.parse(f"quantize-static{options}")


OLD = """<opset_import: ["": 11]> g (float[2, 6, 8, 8] x) => (float[2, 4, 8, 8] y)
<float[4, 6, 3, 3] w, float[4] scale, float[4] bias, float[4] mean, float[4] var> {
  c = Conv <pads = [1, 1, 1, 1]> (x, w)
  n = BatchNormalization (c, scale, bias, mean, var)
  y = Relu (n)
}"""


def test_norms_are_folded_and_old_opsets_raised_before(tmp_path: Path) -> None:
    path, data = tmp_path / "old.onnx", tmp_path / "data.npz"
    onnx.save(parse_graph(OLD), path)
    np.savez(data, x=np.random.default_rng(0).standard_normal((8, 2, 6, 8, 8)).astype(np.float32))
    found = burnish.optimize(path, tmp_path / "new.onnx", passes=["quantize-static"], data=data)
    assert kernels(found.model, tmp_path)["QLinearConv"] == 1
    assert found.model.opset_imports[""] >= 13


@pytest.mark.parametrize(("opset", "options", "said"), [(12, "", "13"), (9, "{per_channel=false}", "10")])
def test_an_opset_that_lacks_the_form_is_refused(opset: int, options: str, said: str) -> None:
    source = f'<opset_import: ["": {opset}]> g (float[2, 6, 8, 8] x) => (float[2, 4, 8, 8] y) <float[4, 6, 1, 1] w> '
    model = model_of(source + "{ y = Conv (x, w) }")
    with pytest.raises(InputError, match=f"opset {opset}") as caught:
        proposed(model, samples_of(model), options)
    assert f"--opset {said}" in str(caught.value.hint)


def test_passes_named_before_a_lossy_one_run_before_it() -> None:
    from burnish.passes import plan

    todo = plan.resolve(passes=["fold-affine", "quantize-static", "fuse-norm"])
    before, behind = ([one.pass_name() for one in part] for part in (todo.prepare, todo.passes))
    assert "fold-affine" in before and "fold-affine" not in behind
    assert "fuse-norm" in behind and before.index("fold-batchnorm") < before.index("fold-affine")


GELU = """<ir_version: 10, opset_import: ["": 17]>
g (float[2, 6, 9] x) => (float[2, 8, 9] y)
  <float[8, 6, 3] w, float a = {0.044715}, float b = {0.7978845608}, float one = {1.0}, float half = {0.5}> {
  c = Conv <pads = [1, 1]> (x, w)
  small = Mul (c, a)
  square = Mul (small, c)
  cube = Mul (square, c)
  sum = Add (c, cube)
  inner = Mul (sum, b)
  t = Tanh (inner)
  u = Add (t, one)
  h = Mul (c, half)
  y = Mul (h, u)
}"""


def test_powers_of_a_value_are_not_rounded(tmp_path: Path) -> None:
    model = model_of(GELU)
    after = quantized(model)
    found = kernels(after, tmp_path)
    assert found["QLinearConv"] == 1 and not {"QLinearMul", "QLinearAdd"} & set(found)
    assert error(model, after) < 0.02


@pytest.mark.parametrize("bits", [7, 8])
def test_weights_are_rounded_for_what_layers_read(bits: int) -> None:
    model = model_of(
        "g (float[N, 6, 9, 9] x) => (float[N, 12, 5, 5] y) <float[12, 3, 3, 3] w, float[12] b> "
        "{ y = Conv <pads = [1, 1, 1, 1], strides = [2, 2], group = 2> (x, w, b) }"
    )
    rng = np.random.default_rng(0)
    smooth = np.cumsum(np.cumsum(rng.standard_normal((40, 6, 9, 9)), 2), 3) + 3
    samples = [Sample(str(index), {"x": one[None].astype(np.float32)}) for index, one in enumerate(smooth)]
    (exact,) = convolutions(model)
    ((_, moment),) = moments(model, {"": [exact]}, context_for(model, samples), [""])
    changes, texts = {}, set()
    for rounding in ("nearest", "mse", "gptq", "gptq"):
        one, edits, _ = proposed(model, samples, f"{{weight_bits={bits},rounding={rounding}}}")
        after, made = lossy.apply(model, edits, [one])
        (layer,) = convolutions(after)  # its moment is steadied, which is less than a tenth of the error
        whole, apart = (matrix.reshape(2, 6, -1) for matrix in (exact.weight(), layer.weight() - exact.weight()))
        seen = moment if rounding == "gptq" else np.eye(27)[None].repeat(2, 0)
        lost, size = (np.einsum("goi,gij,goj->", part, np.asarray(seen), part) for part in (apart, whole))
        assert made[catalog.spec(one)].errors == {edits[0].key: pytest.approx(float((lost / size) ** 0.5), rel=0.1)}
        changes[rounding] = float(np.einsum("goi,gij,goj->", apart, np.asarray(moment), apart))
        texts.add((rounding, fingerprint(after)))
    assert changes["gptq"] < 0.5 * min(changes["mse"], changes["nearest"]) and len(texts) == 3
    one, edits, _ = proposed(model, samples, f"{{weight_bits={bits}}}")
    assert ("gptq", fingerprint(lossy.apply(model, edits, [one])[0])) in texts, "the default for convolutions"
    with pytest.raises(InputError, match="a scale for each output"):
        catalog.make("quantize-static", {"rounding": "gptq", "per_channel": False})


def test_every_layer_has_its_error_whatever_rounded_it() -> None:
    model = model_of(RESIDUAL)
    for options in ("", "{rounding=gptq}", "{per_channel=false}"):
        one, edits, _ = proposed(model, samples_of(model), options)
        errors = lossy.apply(model, edits, [one])[1][catalog.spec(one)].errors
        assert set(errors) == {edit.key for edit in edits} and all(0 < lost < 0.05 for lost in errors.values())


def test_a_channel_far_from_zero_is_rounded_by_its_moment_about_the_mean() -> None:
    model = model_of(RESIDUAL)
    bias = model.graph.initializers["b1"]
    bias.const_value = oir.tensor(np.full(8, 1e6, np.float32))
    one, edits, _ = proposed(model, samples_of(model), "{rounding=gptq}")
    for edit in edits:
        assert all(np.isfinite(array.astype(np.float64)).all() for array in edit.payload.values())
    assert error(model, lossy.apply(model, edits, [one])[0]) < 0.05


@pytest.mark.parametrize(
    "rounded",
    [
        "q = QuantizeLinear <axis = 2> (x, s, z)  d = DequantizeLinear <axis = 2> (q, s, z)",
        "q, t, u = DynamicQuantizeLinear (x)  d = DequantizeLinear (q, t, u)",
    ],
    ids=["each channel", "each run"],
)
def test_a_value_that_is_rounded_by_other_scales_is_rounded_by_one_scale(rounded: str) -> None:
    zeros, scales = ", ".join(["128"] * 32), ", ".join(["0.04"] * 32)
    source = f"""g (float[2, 9, 32] x) => (float[2, 9, 16] y)
    <float[32, 16] w, float[32] s = {{{scales}}}, uint8[32] z = {{{zeros}}}> {{ {rounded}  y = MatMul (d, w) }}"""
    model = model_of(source)
    assert error(model, quantized(model)) < 0.05


def test_a_weight_that_callers_may_change_is_told(tmp_path: Path) -> None:
    proto = parse_graph("g (float[N, 32] x) => (float[N, 8] y) <float[32, 8] w> { y = MatMul (x, w) }")
    proto.graph.input.append(onnx.helper.make_tensor_value_info("w", onnx.TensorProto.FLOAT, [32, 8]))
    onnx.save(proto, tmp_path / "m.onnx")
    data = [{"x": np.random.default_rng(seed).standard_normal((4, 32)).astype(np.float32)} for seed in range(6)]
    for name in ("quantize-static", "quantize-dynamic", "quantize-fptq", "quantize-weights{bits=8}"):
        with pytest.raises(UnchangedError, match="`w` is an input with a default"):
            burnish.optimize(tmp_path / "m.onnx", tmp_path / "o.onnx", data=data, passes=[name])


@pytest.mark.parametrize(
    ("operator", "layers"),
    [
        ("AveragePool <kernel_shape = [3, 3], strides = [2, 2], ceil_mode = 1, count_include_pad = 1> (a)", 1),
        ("AveragePool <kernel_shape = [3, 3], strides = [2, 2], ceil_mode = 1> (a)", 2),
        ("AveragePool <kernel_shape = [3, 3], pads = [1, 1, 1, 1], count_include_pad = 1> (a)", 2),
        ("AveragePool <kernel_shape = [3, 3], dilations = [2, 2]> (a)", 1),
        (
            'Resize <mode = "nearest", coordinate_transformation_mode = "tf_crop_and_resize",'
            " extrapolation_value = 7.0> (a, roi, factors)",
            2,
        ),
    ],
    ids=["rounded up, padding counted", "rounded up", "padding counted", "dilated", "numbers from outside"],
)
@pytest.mark.parametrize("behind", ["b = Identity (q)", "b = Relu (q)"])
def test_what_kernels_on_integers_compute_otherwise_stays_in_float32(operator: str, layers: int, behind: str) -> None:
    source = f"""<opset_import: ["": 19]> g (float[2, 8, 10, 10] x) => (float y)
    <float[8, 8, 3, 3] w0, float[6, 8, 1, 1] w1, float[8] roi = {{0, 0, 0, 0, 1, 1, 1.5, 1.5}},
     float[4] factors = {{1, 1, 2, 2}}> {{
      a = Conv <pads = [1, 1, 1, 1]> (x, w0)
      q = {operator}
      {behind}
      y = Conv (b, w1)
    }}"""
    proto = parse_graph(source)
    proto.graph.output[0].type.tensor_type.ClearField("shape")
    model = oir.from_proto(onnx.shape_inference.infer_shapes(proto, data_prop=True))
    for index, node in enumerate(model.graph):
        node.name = f"{node.op_type}_{index}"
    _, edits, outcome = proposed(model, samples_of(model))
    assert len(edits) == layers
    assert layers == 2 or "the AveragePool before it wrongly" in outcome.skipped[0].reason
    assert error(model, quantized(model)) < 0.05


@pytest.mark.parametrize("name", ["quantize-static", "quantize-dynamic", "quantize-fptq", "quantize-weights{bits=8}"])
def test_a_weight_without_numbers_is_told(name: str, tmp_path: Path) -> None:
    proto = parse_graph("g (float[N, 32] x) => (float[N, 0] y) <float[32, 8] w> { y = MatMul (x, w) }")
    proto.graph.initializer[0].CopyFrom(onnx.numpy_helper.from_array(np.zeros((32, 0), np.float32), "w"))
    onnx.save(proto, tmp_path / "m.onnx")
    data = [{"x": np.random.default_rng(seed).standard_normal((4, 32)).astype(np.float32)} for seed in range(6)]
    with pytest.raises((InputError, UnchangedError)):
        burnish.optimize(tmp_path / "m.onnx", tmp_path / "o.onnx", data=data, passes=[name])
