"""The laws of grids: errors stay within half a step, clipping makes them no larger, what is packed is read back."""

from __future__ import annotations

import itertools

import ml_dtypes
import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import helper, numpy_helper

from burnish.ir.errors import InputError
from burnish.ir.packing import pack, unpack
from burnish.passes.grids import Grid, Scales, dequantize, fit, quantize, too_small

GRIDS = [Grid(*one) for one in itertools.product((2, 3, 4, 8), (True, False), (True, False))]
PLACES = [(None, None), (0, None), (1, None), (-1, None), (0, 16), (1, 32), (-1, 7), (1, 64)]


def numbers(shape: tuple[int, ...] = (24, 50), seed: int = 0) -> np.ndarray:
    """Numbers with long tails, an empty row, a row of one sign, and very different sizes."""
    rng = np.random.default_rng(seed)
    found = rng.standard_t(3, shape) * 10.0 ** rng.integers(-3, 3, (shape[0], *[1] * (len(shape) - 1)))
    found[3], found[4] = 0.0, np.abs(found[4]) + 1
    return found


def step(scales: Scales, shape: tuple[int, ...]) -> np.ndarray:
    return np.abs(scales.spread(scales.scale.astype(np.float64), shape))


@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize(("axis", "block"), PLACES)
def test_rounding_to_the_whole_range_errs_by_half_a_step_at_most(
    grid: Grid, axis: int | None, block: int | None
) -> None:
    values = numbers()
    for mirrored in (False, True):
        scales = fit(values, grid, axis, block, mirrored=mirrored)
        levels = quantize(values, scales)
        assert levels.dtype == grid.dtype and grid.low <= levels.min() and levels.max() <= grid.high
        apart = np.abs(dequantize(levels, scales) - values)
        assert (apart <= 0.5 * step(scales, values.shape) * (1 + 1e-6 * 2**grid.bits)).all()
        if grid.symmetric:
            assert (scales.zero_point == grid.middle).all()
        assert mirrored or (scales.scale > 0).all()
        assert (dequantize(levels, scales)[3] == 0).all(), "zero is exact"


@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize(("axis", "block"), PLACES)
def test_clipping_by_the_squared_error_is_never_worse(grid: Grid, axis: int | None, block: int | None) -> None:
    values = numbers(seed=1)
    importance = np.random.default_rng(2).uniform(0, 3, values.shape[1])

    def error(scales: Scales, weights: np.ndarray | float) -> float:
        return float((weights * (dequantize(quantize(values, scales), scales) - values) ** 2).sum())

    plain, clipped = fit(values, grid, axis, block), fit(values, grid, axis, block, "mse")
    weighted = fit(values, grid, axis, block, "mse", importance=importance)
    mirrored = fit(values, grid, axis, block, "mse", mirrored=True)
    assert error(clipped, 1) <= error(plain, 1) * (1 + 1e-9)
    assert error(weighted, importance) <= error(plain, importance) * (1 + 1e-9)
    assert error(mirrored, 1) <= error(plain, 1) * (1 + 1e-9)
    if grid.bits <= 4 and block == 32:
        assert error(clipped, 1) < 0.97 * error(plain, 1)
        assert error(weighted, importance) < error(clipped, importance)


def test_the_search_finds_the_best_scale_of_a_fine_grid() -> None:
    rows = np.random.default_rng(0).standard_normal((40, 32))
    found = fit(rows, Grid(3), 1, 32, "mse")
    got = ((dequantize(quantize(rows, found), found) - rows) ** 2).sum(1)
    most = np.abs(rows).max(1)
    best = np.full(len(rows), np.inf)
    for share in np.linspace(0.05, 0.5, 2000):
        scale = (most * share)[:, None]
        apart = scale * np.clip(np.rint(rows / scale), -4, 3) - rows
        best = np.minimum(best, (apart**2).sum(1))
    assert got.sum() <= 1.01 * best.sum()


def test_scales_are_shaped_as_onnx_wants_them() -> None:
    values = np.ones((6, 10, 3))
    assert fit(values, Grid(8)).scale.shape == ()
    assert fit(values, Grid(8), 1).scale.shape == (10,)
    assert fit(values, Grid(4), 1, 4).scale.shape == (6, 3, 3)
    assert fit(values, Grid(4), 1, 4, dtype=np.float16).scale.dtype == np.float16
    assert Grid(32).dtype == np.int32 and Grid(12, signed=False).dtype == np.uint16


def test_numbers_too_small_or_not_finite() -> None:
    small = fit(np.array([[1e-44] * 4, [0.0] * 4]), Grid(8), 0)
    assert (small.scale == np.finfo(np.float32).tiny).all()
    assert too_small(np.full(3, 1e-38, np.float32)) and too_small(np.full(3, 4e-4, np.float16))
    assert not too_small(np.zeros(3, np.float32)) and not too_small(np.full(3, 1e-36, np.float32))
    with pytest.raises(InputError, match="not finite"):
        fit(np.array([1.0, np.nan]), Grid(8))
    assert quantize(np.zeros((0, 4)), fit(np.zeros((0, 4)), Grid(8))).shape == (0, 4)


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_packing_round_trips(bits: int) -> None:
    levels = np.random.default_rng(bits).integers(0, 2**bits, (3, 13))
    packed = pack(levels, bits)
    assert packed.shape == (3, -(-13 * bits // 8)) and packed.dtype == np.uint8
    assert (unpack(packed, bits)[:, :13] == levels).all()
    assert not unpack(packed, bits)[:, 13:].any()


def test_packing_is_that_of_onnx() -> None:
    levels = np.random.default_rng(0).integers(-8, 8, (2, 6)).astype(np.int8)
    tensor = numpy_helper.from_array(levels.astype(ml_dtypes.int4), "x")
    assert tensor.raw_data == pack(levels.reshape(-1), 4).tobytes()


def run(nodes: list[onnx.NodeProto], constants: dict[str, np.ndarray], size: int) -> np.ndarray:
    """What ONNX Runtime makes of the unit matrix [size, size] as `x`; its output is `y`."""
    tensors = [numpy_helper.from_array(array, name) for name, array in constants.items()]
    given = [helper.make_tensor_value_info("x", 1, [size, size])]
    graph = helper.make_graph(nodes, "g", given, [helper.make_tensor_value_info("y", 1, None)], tensors)
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, ["CPUExecutionProvider"])
    return session.run(None, {"x": np.eye(size, dtype=np.float32)})[0]


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [4, 8])
def test_onnx_runtime_reads_the_same_numbers(bits: int, symmetric: bool) -> None:
    weight = np.random.default_rng(0).standard_normal((10, 80))
    grid = Grid(bits, False, symmetric)
    scales = fit(weight, grid, 1, 32, "mse", mirrored=True)
    levels = quantize(weight, scales)
    filled = np.pad(levels, ((0, 0), (0, 16))).reshape(10, 3, 32)
    constants = {"b": pack(filled, bits), "s": scales.scale, "z": pack(scales.zero_point, bits).reshape(-1)}
    attributes = {"K": 80, "N": 10, "bits": bits, "block_size": 32, "domain": "com.microsoft"}
    nodes = [helper.make_node("MatMulNBits", ["x", "b", "s", "z"], ["y"], **attributes)]
    assert np.abs(run(nodes, constants, 80).T - dequantize(levels, scales)).max() < 1e-6
    kinds = {4: ml_dtypes.uint4, 8: np.uint8}
    constants = {name: one.T for name, one in {"w": levels, "s": scales.scale, "z": scales.zero_point}.items()}
    constants |= {name: constants[name].astype(kinds[bits]) for name in ("w", "z")}
    nodes = [
        helper.make_node("DequantizeLinear", ["w", "s", "z"], ["d"], axis=0, block_size=32),
        helper.make_node("MatMul", ["x", "d"], ["y"]),
    ]
    assert np.abs(run(nodes, constants, 80).T - dequantize(levels, scales)).max() < 1e-6
