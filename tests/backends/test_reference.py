"""The float64 interpreter on the standard's operators, nested graphs and functions, against ONNX Runtime."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import onnx
import onnx_ir as oir
import pytest

from burnish.backends.ort.session import executor
from burnish.backends.reference.runner import ReferenceRunner
from burnish.ir import weights
from burnish.ir.errors import InputError
from burnish.passes.verify import relative_error


def parse(text: str) -> oir.Model:
    """A model from ONNX text."""
    return oir.serde.deserialize_model(onnx.parser.parse_model(text))


def assert_agrees(model: oir.Model, feeds: dict[str, np.ndarray], tolerance: float = 2e-6) -> None:
    """Both runners give the same values, and the interpreter gives float64."""
    found, expected = ReferenceRunner(model).run(feeds), executor()(model).run(feeds)
    assert list(found) == list(expected)
    for name, wanted in expected.items():
        assert found[name].dtype == (np.float64 if wanted.dtype.kind == "f" else wanted.dtype)
        assert relative_error(found[name], wanted) < tolerance, name


def random(*shape: int, seed: int = 0) -> np.ndarray:
    """Normal float32 numbers."""
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


HEAD = '<ir_version: 10, opset_import: ["": 21]>'


@pytest.mark.parametrize(
    ("op", "extra"),
    [("LSTM", ""), ("GRU", ""), ("GRU", ", linear_before_reset = 1"), ("RNN", ""), ("LSTM", ", clip = 0.3")],
)
@pytest.mark.parametrize("direction", ["forward", "reverse", "bidirectional"])
def test_recurrent_networks_of_every_direction_and_length(op: str, direction: str, extra: str) -> None:
    gates, ways = {"LSTM": 4, "GRU": 3, "RNN": 1}[op], 2 if direction == "bidirectional" else 1
    model = parse(f"""{HEAD} g (float[5,3,4] x, float[{ways},{gates * 6},4] w, float[{ways},{gates * 6},6] r,
        float[{ways},{2 * gates * 6}] b, int32[3] n, float[{ways},3,6] h) => (float[A,B,C,D] y, float[E,F,G] last)
        {{ y, last = {op} <hidden_size = 6, direction = "{direction}"{extra}> (x, w, r, b, n, h) }}""")
    shapes = [(5, 3, 4), (ways, gates * 6, 4), (ways, gates * 6, 6), (ways, 2 * gates * 6), (ways, 3, 6)]
    feeds = {name: random(*shape, seed=i) for i, (name, shape) in enumerate(zip("xwrbh", shapes, strict=True))}
    assert_agrees(model, feeds | {"n": np.array([5, 2, 3], np.int32)})


def test_the_clip_of_an_lstm_leaves_the_cell_alone() -> None:
    model = parse(f"""{HEAD} g (float[2,3,4] x, float[1,8,4] w, float[1,8,2] r, float[1,3,2] c) => (float[A,B,C,D] y)
        {{ y = LSTM <hidden_size = 2, clip = 0.3> (x, w, r, , , , c) }}""")
    feeds = {"x": random(2, 3, 4), "w": random(1, 8, 4, seed=1), "r": random(1, 8, 2, seed=2)}
    assert_agrees(model, feeds | {"c": 2 * random(1, 3, 2, seed=3)})


@pytest.mark.parametrize(
    "attributes",
    [
        "kernel_shape = [3, 3], pads = [1, 0, 1, 2]",
        "group = 2, strides = [2, 1]",
        "group = 4, dilations = [2, 1]",
        'auto_pad = "SAME_UPPER", strides = [2, 2]',
        'auto_pad = "SAME_LOWER", strides = [2, 2]',
    ],
)
@pytest.mark.parametrize("op", ["Conv", "ConvTranspose"])
def test_convolutions_of_every_form(op: str, attributes: str) -> None:
    group = int(attributes[8]) if attributes.startswith("group") else 1
    shape = (8, 4 // group, 3, 3) if op == "Conv" else (4, 8 // group, 3, 3)
    model = parse(f"""{HEAD} g (float[2,4,9,8] x, float[{",".join(map(str, shape))}] w, float[8] b)
        => (float[N,C,H,W] y) {{ y = {op} <{attributes}> (x, w, b) }}""")
    assert_agrees(model, {"x": random(2, 4, 9, 8), "w": random(*shape, seed=1), "b": random(8, seed=2)})


@pytest.mark.parametrize("op", ["MaxPool", "AveragePool"])
@pytest.mark.parametrize(
    "attributes",
    [
        "kernel_shape = [3, 2], strides = [2, 2], ceil_mode = 1",
        "kernel_shape = [3, 3], pads = [1, 1, 1, 1], strides = [2, 2], ceil_mode = 1",
        "kernel_shape = [2, 8], strides = [1, 3]",
        'kernel_shape = [3, 3], auto_pad = "SAME_LOWER"',
    ],
)
def test_pooling_at_the_borders(op: str, attributes: str) -> None:
    model = parse(f"{HEAD} g (float[2,3,8,7] x) => (float[N,C,H,W] y) {{ y = {op} <{attributes}> (x) }}")
    assert_agrees(model, {"x": random(2, 3, 8, 7)})


def test_nested_graphs_read_outer_values_and_loops_collect() -> None:
    model = parse(f"""{HEAD} g (float[3] x, int64 count, bool flag) => (float[3] total, float[N,3] all, float[3] picked)
    {{
      yes = Constant <value = bool {{1}}> ()
      two = Constant <value = float {{2.0}}> ()
      total, all = Loop (count, yes, x) <body = step (int64 i, bool c, float[3] s)
        => (bool go, float[3] n, float[3] row) {{ go = Identity (c)  n = Mul (s, two)  row = Add (n, x) }}>
      picked = If (flag) <then_branch = t () => (float[3] a) {{ a = Neg (total) }},
                          else_branch = e () => (float[3] b) {{ b = Exp (x) }}>
    }}""")
    x = np.array([1.0, -2.0, 0.5], np.float32)
    for count, flag in ((3, True), (1, False), (0, True)):
        assert_agrees(model, {"x": x, "count": np.array(count), "flag": np.array(flag)})


def test_functions_take_their_callers_attributes() -> None:
    model = parse("""<ir_version: 10, opset_import: ["": 21, "own": 1]>
    g (float[4] x) => (float[4] y) { a = own.Scale <by = 0.5> (x)  y = own.Scale <by = 3.0> (a) }
    <domain: "own", opset_import: ["": 21]>
    Scale <by> (v) => (w) { k = Constant <value_float: float = @by> ()  u = LeakyRelu <alpha: float = @by> (v)
      w = Mul (u, k) }""")
    assert_agrees(model, {"x": np.array([1, -2, 3, -4], np.float32)})


def test_huge_mask_values_stay_masks() -> None:
    model = parse(f"""{HEAD} g (float[2,3] x, float[2,3] keep) => (float[2,3] y)
        <float low = {{-3.4028234663852886e38}}, float one = {{1.0}}>
        {{ drop = Sub (one, keep)  bias = Mul (drop, low)  z = Add (x, bias)  y = Softmax (z) }}""")
    keep = np.array([[1, 0, 1], [0, 0, 1]], np.float32)
    assert_agrees(model, {"x": random(2, 3), "keep": keep})


def test_a_model_in_half_precision_is_judged_in_float64() -> None:
    model = parse(f"""{HEAD} g (float16[2,3] x) => (float y) {{ s = ReduceSum <keepdims = 0> (x)
        y = Cast <to = 1> (s) }}""")
    x = np.array([[1, 1e-3, 2048], [0.5, 0.25, 3]], np.float16)
    assert ReferenceRunner(model).run({"x": x})["y"] == x.astype(np.float64).sum()


def test_rewritten_weights_are_read_unrounded() -> None:
    model = parse(f"{HEAD} g (float[2] x) => (float[2] y) <float[2] w = {{1.0, 2.0}}> {{ y = Mul (x, w) }}")
    third = np.array([1 / 3, 2 / 3])
    model.graph.initializers["w"].const_value = weights.rounded(third, oir.DataType.FLOAT, "w")
    found = ReferenceRunner(model).run({"x": np.ones(2, np.float32)})["y"]
    assert np.array_equal(found, third)


def test_a_long_table_is_gathered_before_it_is_widened() -> None:
    model = parse(f"{HEAD} g (int64[N] i) => (float[N,64] y) {{ y = Gather (table, i) }}")
    table = random(1000, 64)
    value = oir.Value(name="table", const_value=oir.tensor(table, name="table"))
    model.graph.register_initializer(value)
    model.graph.node(0).replace_input_with(0, value)
    assert_agrees(model, {"i": np.array([3, 999, 0])})


def test_errors_name_the_node_and_the_input() -> None:
    model = parse(f"{HEAD} g (float[2,3] x) => (float[N,3] y) {{ [bad] y = MatMul (x, x) }}")
    with pytest.raises(InputError) as caught:
        ReferenceRunner(model).run({"x": np.ones((2, 3), np.float32)})
    assert caught.value.place == "MatMul `bad`"
    with pytest.raises(InputError, match="input `x` is missing"):
        ReferenceRunner(model).run({})
    with pytest.raises(InputError, match="there is no input `z`"):
        ReferenceRunner(model).run({"z": np.ones(1)})
    strange = parse('<ir_version: 10, opset_import: ["": 21, "far": 1]> g (float x) => (float y) { y = far.Away (x) }')
    with pytest.raises(InputError, match="no float64 implementation of far::Away"):
        ReferenceRunner(strange)


DIFFERENT = {
    "test_attention_4d_with_past_and_present_qk_matmul_bias_3d_mask_causal": "-inf and the lowest float32",
    "test_attention_4d_with_past_and_present_qk_matmul_bias_4d_mask_causal": "-inf and the lowest float32",
    "test_bitcast_float32_to_int32": "the bits of a float32 are not there",
    "test_bitcast_2d_float32_to_int32": "the bits of a float32 are not there",
    "test_bitcast_scalar_float32_to_int32": "the bits of a float32 are not there",
    "test_dynamicquantizelinear": "a tie in float32 is none in float64",
    "test_dynamicquantizelinear_expanded": "a tie in float32 is none in float64",
    "test_if_opt": "a sequence in an optional",
    "test_maxunpool_export_with_output_shape": "ONNX Runtime departs from the standard",
    "test_resize_downsample_scales_linear_align_corners": "ONNX Runtime departs from the standard",
    "test_resize_downsample_scales_cubic_align_corners": "ONNX Runtime departs from the standard",
    "test_scan_sum": "Scan of opset 8",
}
"""Node tests of the onnx package on which the interpreter and ONNX Runtime differ, and why."""


def _same(found: Any, expected: Any) -> bool:
    if isinstance(expected, list):
        return len(found) == len(expected) and all(_same(a, b) for a, b in zip(found, expected, strict=True))
    if isinstance(found, list):
        return False
    if expected is None or expected.dtype.kind == "O":
        return bool(np.array_equal(found, expected))
    tolerance = {"float16": 4e-3, "bfloat16": 3e-2}.get(expected.dtype.name, 2e-5)
    return relative_error(found, expected) < tolerance


@pytest.mark.slow
def test_the_onnx_packages_node_tests_agree_with_onnx_runtime() -> None:
    import onnxruntime
    from onnx.backend.test.case.node import collect_testcases

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        cases = collect_testcases(None)
    agreed, differ = 0, []
    for case in cases:
        names = [value.name for value in case.model.graph.input]
        feeds = dict(zip(names, case.data_sets[0][0], strict=False))
        try:
            expected = onnxruntime.InferenceSession(case.model.SerializeToString(), options).run(None, feeds)
        except Exception:
            continue
        try:
            found = ReferenceRunner(oir.serde.deserialize_model(case.model)).run(feeds)
            same = all(_same(a, b) for a, b in zip(found.values(), expected, strict=True))
        except InputError:
            same = False
        agreed += same
        if not same:
            differ.append(case.name)
    assert set(differ) <= set(DIFFERENT)
    assert agreed >= 1500
