"""Pairs of QuantizeLinear and DequantizeLinear: put once, found again, and computing what the grid says."""

from __future__ import annotations

import numpy as np
import onnx_ir as oir
import pytest
from golden import name_nodes, parse_graph
from laws import OrtRunner

from burnish.ir.walk import is_op, walk
from burnish.passes import grids, qdq
from burnish.passes.grids import Grid
from burnish.passes.ranges import scales

BYTES = Grid(8, signed=False, symmetric=False)
TWO_READERS = """g (float[2, 6] x) => (float[2, 6] y, float[2, 6] z) {
  h = Relu (x)
  y = Exp (h)
  z = Neg (h)
}"""


def model_of(source: str) -> oir.Model:
    model = oir.from_proto(parse_graph(source))
    name_nodes(model)
    return model


def value(model: oir.Model, name: str) -> oir.Value:
    return next(one for node in model.graph for one in node.outputs if one.name == name)


def count(model: oir.Model, op_type: str) -> int:
    return len(walk(model, op_type))


def run(model: oir.Model, x: np.ndarray) -> dict[str, np.ndarray]:
    runner = OrtRunner(model, optimize=False)
    found = runner.run({"x": x})
    runner.close()
    return found


def x_of(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).standard_normal(shape).astype(np.float32)


def test_a_pair_rounds_what_all_readers_see() -> None:
    model, x = model_of(TWO_READERS), x_of(2, 6)
    fitted = scales(0.0, 2.0, BYTES)
    rounded = qdq.put_pair(model, value(model, "h"), fitted)
    seen = grids.dequantize(grids.quantize(np.maximum(x, 0).astype(np.float64), fitted), fitted)
    found = run(model, x)
    assert np.allclose(found["z"], -seen, atol=1e-6) and np.allclose(found["y"], np.exp(seen), atol=1e-5)
    assert qdq.scales_of(rounded) is not None
    assert count(model, "QuantizeLinear") == count(model, "DequantizeLinear") == 1


def test_a_second_pair_is_the_first_one() -> None:
    model = model_of(TWO_READERS)
    first = qdq.put_pair(model, value(model, "h"), scales(0.0, 2.0, BYTES), [])
    reader = walk(model, "Neg")[0]
    second = qdq.put_pair(model, value(model, "h"), scales(0.0, 3.0, BYTES), [reader])
    assert second is first and reader.inputs[0] is first
    assert qdq.put_pair(model, first, scales(0.0, 4.0, BYTES)) is first
    assert count(model, "QuantizeLinear") == 1


def test_only_the_readers_that_are_named_read_it() -> None:
    model = model_of(TWO_READERS)
    qdq.put_pair(model, value(model, "h"), scales(0.0, 2.0, BYTES), walk(model, "Exp"))
    assert is_op(walk(model, "Exp")[0].inputs[0].producer(), "DequantizeLinear")
    assert is_op(walk(model, "Neg")[0].inputs[0].producer(), "Relu")


@pytest.mark.parametrize("name", ["x", "y"])
def test_inputs_and_outputs_of_the_graph_keep_their_names(name: str) -> None:
    model, x = model_of(TWO_READERS), x_of(2, 6)
    one = model.graph.inputs[0] if name == "x" else value(model, name)
    qdq.put_pair(model, one, scales(-4.0, 4.0, BYTES))
    assert [out.name for out in model.graph.outputs] == ["y", "z"]
    assert [given.name for given in model.graph.inputs] == ["x"]
    assert set(run(model, x)) == {"y", "z"}


@pytest.mark.parametrize(
    ("grid", "axis", "block", "opset"),
    [(Grid(8), None, None, 10), (Grid(8), 1, None, 13), (Grid(4), 0, 16, 21), (Grid(4, signed=False), 0, 16, 21)],
)
def test_a_weight_is_read_as_the_grid_says(grid: Grid, axis: int | None, block: int | None, opset: int) -> None:
    source = "g (float[2, 32] x) => (float[2, 8] y) <float[32, 8] w> { y = MatMul (x, w) }"
    model, x = model_of(f'<opset_import: ["": {max(opset, 20)}]>\n{source}'), x_of(2, 32)
    node = walk(model, "MatMul")[0]
    weight = node.inputs[1].const_value.numpy().astype(np.float64)  # type: ignore[union-attr]
    fitted = grids.fit(weight, grid, axis, block)
    assert qdq.least_opset(fitted) == opset
    levels = grids.quantize(weight, fitted)
    qdq.put_weight(model, node, 1, levels, fitted)
    assert list(model.graph.initializers) == ["w_quantized", "w_scale", "w_zero_point"]
    assert np.allclose(run(model, x)["y"], x @ grids.dequantize(levels, fitted), atol=1e-5)


def test_a_bias_that_needs_more_than_31_bits_enlarges_the_scale_of_its_output() -> None:
    weight = grids.fit(np.array([[1e-6, 1.0], [0.5, 2.0]]), Grid(8), 0)
    small = grids.fit(np.array([[1e-9, 0.0], [0.5, 2.0]]), Grid(8), 0)
    bias = np.array([3.0, 1.0])
    assert np.array_equal(qdq.fitting_bias(weight, bias, 0.01).scale, weight.scale)
    fitted = qdq.fitting_bias(small, bias, 0.01)
    assert fitted.scale[0] > small.scale[0] and fitted.scale[1] == small.scale[1]
    into = qdq.bias_scales(0.01, fitted)
    assert np.allclose(grids.dequantize(grids.quantize(bias, into), into), bias, atol=1e-6)
