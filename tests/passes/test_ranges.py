"""Ranges of activations: what each calibration promises, and that it holds no more memory than it says."""

from __future__ import annotations

import numpy as np
import pytest

from burnish.ir.errors import InputError
from burnish.passes import grids, ranges
from burnish.passes.grids import Grid
from burnish.passes.ranges import Method
from burnish.passes.reducers import Histogram

METHODS: tuple[Method, ...] = ("minmax", "percentile", "mse", "entropy")
BYTES = Grid(8, signed=False, symmetric=False)


def limits(values: np.ndarray, method: Method, grid: Grid = BYTES, percentile: float = 99.99) -> tuple[float, float]:
    seen = ranges.reducer(method)
    for part in np.array_split(values, 5):
        seen.add(part)
    return ranges.limits(seen, method, grid, percentile)


def error(values: np.ndarray, ends: tuple[float, float], grid: Grid) -> float:
    fitted = ranges.scales(*ends, grid)
    return float(np.square(grids.dequantize(grids.quantize(values, fitted), fitted) - values).mean())


def drawn(kind: str, count: int = 20000) -> np.ndarray:
    rng = np.random.default_rng(1)
    values = rng.standard_normal(count)
    if kind == "relu":
        return np.maximum(values, 0)
    if kind == "outliers":
        values[::1000] *= 100
    return values


@pytest.mark.parametrize("kind", ["normal", "relu", "outliers"])
@pytest.mark.parametrize("method", METHODS)
def test_a_range_holds_zero_and_lies_in_what_was_seen(kind: str, method: Method) -> None:
    values = drawn(kind)
    low, high = limits(values, method)
    width = (values.max() - values.min()) / 1000
    assert values.min() - width <= low <= 0 <= high <= values.max() + width
    assert kind != "relu" or (low == 0 and ranges.scales(low, high, BYTES).zero_point == 0)


@pytest.mark.parametrize("grid", [BYTES, Grid(8, signed=False), Grid(8), Grid(4, signed=False, symmetric=False)])
@pytest.mark.parametrize("kind", ["normal", "relu", "outliers"])
def test_mse_has_the_least_squared_error(kind: str, grid: Grid) -> None:
    values = drawn(kind)
    found = {method: error(values, limits(values, method, grid), grid) for method in METHODS}
    assert found["mse"] <= 1.02 * min(found.values())


def test_a_percentile_cuts_off_that_share() -> None:
    values = drawn("outliers")
    low, high = limits(values, "percentile", percentile=99.0)
    assert abs((values > high).mean() - 0.01) < 0.002 and abs((values < low).mean() - 0.01) < 0.002


def test_entropy_cuts_off_a_few_outliers_and_no_dense_end() -> None:
    low, high = limits(drawn("outliers"), "entropy")
    assert high < 40 and low > -40
    even = np.linspace(0, 1, 20000)
    assert limits(even, "entropy")[1] > 0.9


@pytest.mark.parametrize("method", METHODS)
def test_a_range_does_not_reach_over_what_makes_no_difference(method: Method) -> None:
    seen = ranges.reducer(method)
    values = drawn("normal")
    seen.add(values)
    low, high = ranges.limits(seen, method, BYTES, within=(-0.5, 9.0))
    assert -0.5 <= low < -0.4 and high <= values.max() + 0.01
    assert error(np.clip(values, -0.5, 9.0), (low, high), BYTES) < error(values, limits(values, method), BYTES)
    assert ranges.limits(seen, method, BYTES, within=(0.5, 1.0))[0] == 0


def test_symmetric_grids_without_a_sign() -> None:
    assert ranges.scales(0.0, 1.0, Grid(8, signed=False)).zero_point == 0
    assert ranges.scales(-1.0, 0.5, Grid(8, signed=False)).zero_point == 128


@pytest.mark.parametrize("method", METHODS)
def test_constant_zero_has_a_scale(method: Method) -> None:
    low, high = limits(np.zeros(100), method)
    fitted = ranges.scales(low, high, BYTES)
    assert fitted.scale > 0 and grids.dequantize(grids.quantize(np.zeros(3), fitted), fitted).tolist() == [0, 0, 0]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("wrong", [np.array([1.0, np.nan]), np.array([np.inf, 1.0]), np.zeros(0)])
def test_what_cannot_have_a_range(wrong: np.ndarray, method: Method) -> None:
    with pytest.raises(InputError, match="NaN|no number"):
        limits(wrong, method)


def test_memory_does_not_grow() -> None:
    seen = ranges.reducer("mse")
    assert isinstance(seen, Histogram)
    for _ in range(20):
        seen.add(drawn("outliers"))
    assert seen.counts is not None and seen.counts.nbytes <= seen.nbytes((20000,)) == 8 * ranges.BINS
