"""Graphs in Relax compute what ONNX Runtime computes, with dynamic sizes, or are refused with the reason."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as oir
import pytest

from burnish.frontends import onnx_file
from burnish.ir.errors import InputError
from burnish.passes.pipeline import Pipeline
from burnish.passes.recipes import NORMAL_FORM

tvm = pytest.importorskip("tvm")

from burnish.backends.ort.session import executor  # noqa: E402
from burnish.backends.tvm import compiling  # noqa: E402
from burnish.backends.tvm.lowering import lower  # noqa: E402
from burnish.backends.tvm.runner import TvmRunner  # noqa: E402
from burnish.backends.tvm.target import Target, parse  # noqa: E402
from burnish.ir import weights  # noqa: E402
from burnish.tools.api import samples_for  # noqa: E402

DEMO = Path(__file__).parents[3] / "tools" / "demo"


def runner(model: oir.Model) -> TvmRunner:
    """The model compiled for this machine."""
    target = parse("llvm")
    lowered = lower(model)
    code = compiling.build(compiling.scheduled(compiling.fused(lowered.module, target), target), target)
    arrays = [tensor.numpy() for value in lowered.weights if (tensor := weights.tensor_of(value)) is not None]
    return TvmRunner(code, tvm.cpu(), lowered.inputs, lowered.outputs, arrays)


def graph(text: str) -> oir.Model:
    """A model from ONNX text at opset 18."""
    return oir.from_onnx_text(f'<ir_version: 10, opset_import: ["": 18]> {text}')


@pytest.mark.parametrize("name", ["digits_resnet", "digits_vit"])
def test_an_embedded_model_computes_the_same(name: str) -> None:
    model = onnx_file.read(DEMO / f"{name}.onnx")
    compiled = runner(Pipeline(NORMAL_FORM).rewrite(model).model)
    original = executor(level="basic")(model)
    for sample in samples_for(model):
        expected = original.run(sample.feeds)
        for output, array in compiled.run(sample.feeds).items():
            np.testing.assert_allclose(array, expected[output], rtol=1e-4, atol=1e-4 * np.abs(expected[output]).max())


def test_sizes_of_inputs_stay_symbolic_and_can_be_computed_with() -> None:
    compiled = runner(
        graph(
            """g (float[batch, seq, 4] x) => (float[batch, n] y, int64[2] size) <int64[1] minus = {-1}> {
            s = Shape<end=1>(x)  t = Concat<axis=0>(s, minus)  y = Reshape(x, t)  size = Shape(y) }"""
        )
    )
    for batch, length in ((1, 3), (5, 2)):
        x = np.random.default_rng(0).normal(size=(batch, length, 4)).astype(np.float32)
        found = compiled.run({"x": x})
        assert np.array_equal(found["y"], x.reshape(batch, -1)) and list(found["size"]) == [batch, length * 4]


def test_negative_indices_count_from_the_end() -> None:
    compiled = runner(graph("g (float[n, 4] x, int64[k] i) => (float[k, 4] y) { y = Gather<axis=0>(x, i) }"))
    x = np.arange(12, dtype=np.float32).reshape(3, 4)
    assert np.array_equal(compiled.run({"x": x, "i": np.array([-1, 0])})["y"], x[[-1, 0]])


def test_sizes_that_are_not_proven_equal_are_compared_when_the_code_runs() -> None:
    compiled = runner(graph("g (float[a, 4] x, float[b, 4] y) => (float[c, 4] z) { z = Add(x, y) }"))
    one, other = np.ones((3, 4), np.float32), np.ones((2, 4), np.float32)
    assert np.array_equal(compiled.run({"x": one, "y": one})["z"], one + one)
    with pytest.raises(InputError, match="refuses the inputs"):
        compiled.run({"x": one, "y": other})


@pytest.mark.parametrize(
    "text",
    [
        "g (float[n, 4] x) => (float[1, 4] y) <int64[1] a = {0}> { y = ReduceMean(x, a) }",
        "g (float[4, n] x, float[n, 3] w) => (float[4, 3] y) { y = MatMul(x, w) }",
        "g (float[n, 4] x) => (int64[1, 4] y) { y = ArgMax(x) }",
        "g (float[1, 2, n, 4] x) => (float[1, 2, 1, 1] y) { y = GlobalAveragePool(x) }",
    ],
)
def test_nothing_is_summed_over_nothing(text: str) -> None:
    model = graph(text)
    compiled = runner(model)
    for size in (3, 0):
        shapes = {
            str(one.name): [size if not isinstance(d, int) else d for d in one.shape] for one in model.graph.inputs
        }
        feeds = {name: np.random.default_rng(0).random(shape, np.float32) for name, shape in shapes.items()}
        if size:
            np.testing.assert_allclose(compiled.run(feeds)["y"], executor()(model).run(feeds)["y"], rtol=1e-5)
            continue
        with pytest.raises(InputError, match="an axis that is summed or searched over is empty"):
            compiled.run(feeds)


def test_a_result_that_is_empty_may_be_summed_over_nothing() -> None:
    compiled = runner(
        graph(
            """g (float[n, 4] x, float[m, 4] past) => (float[n, 4] y) {
            all = Concat<axis=0>(past, x)  t = Transpose<perm=[1, 0]>(all)
            s = MatMul(x, t)  p = Softmax(s)  y = MatMul(p, all) }"""
        )
    )
    for rows, before in ((0, 0), (2, 0), (2, 3)):
        feeds = {"x": np.ones((rows, 4), np.float32), "past": np.ones((before, 4), np.float32)}
        np.testing.assert_allclose(compiled.run(feeds)["y"], feeds["x"], rtol=1e-5)


def test_what_is_not_in_the_table_is_refused_with_the_reason() -> None:
    with pytest.raises(InputError, match="not in the table"):
        lower(graph("g (float[4] x) => (float[4] y) { y = RandomUniformLike(x) }"))
    with pytest.raises(InputError, match="depends on data"):
        lower(graph("g (float[4] x, int64[1] s) => (float[n] y) { y = Reshape(x, s) }"))


@pytest.mark.parametrize("text", ["vulkan", "cuda:sm_12", "llvm:no-such-cpu", "llvm:$(id)"])
def test_an_unknown_target_is_an_error_that_names_known_ones(text: str) -> None:
    with pytest.raises(InputError):
        parse(text)


def test_targets_print_as_they_are_written() -> None:
    assert parse("cuda:sm_90") == Target("cuda", "sm_90") and str(parse("llvm:znver3")) == "llvm:znver3"


@pytest.mark.parametrize("batch", [1, 2])
def test_what_acts_on_single_elements_joins_the_kernel_before_it(batch: int) -> None:
    model = graph(
        f"""g (float[{batch}, 4, 6, 6] x, float[4, 4, 1, 1] w) => (float[{batch}, 4, 6, 6] y) {{
        t = Conv(x, w)  y = Relu(t) }}"""
    )
    target = parse("llvm")
    assert compiling.kernels(compiling.fused(lower(model).module, target)) == 1


@pytest.mark.parametrize("op", ["MaxPool", "AveragePool"])
def test_an_image_smaller_than_the_window_has_one_place_as_in_onnx_runtime(op: str) -> None:
    model = graph(
        f"g (float[n, 2, h, w] x) => (float[n, 2, c, d] y) {{ y = {op}<kernel_shape = [2, 2], strides = [2, 2]>(x) }}"
    )
    compiled, original = runner(model), executor(level="basic")(model)
    for height, width in ((1, 4), (1, 1), (5, 4)):
        x = np.random.default_rng(0).normal(size=(2, 2, height, width)).astype(np.float32)
        expected = original.run({"x": x})["y"]
        np.testing.assert_allclose(compiled.run({"x": x})["y"], expected, rtol=1e-6)
