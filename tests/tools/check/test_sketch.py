"""Distances told from sketches are the distances."""

from __future__ import annotations

import math

import ml_dtypes
import numpy as np
import pytest

from burnish.tools.check.sketch import distance, norm, rounded, sketch


@pytest.mark.parametrize("shape", [(1000,), (40, 30), (8, 4, 3, 3), (1, 5, 7), (1, 1, 300)])
def test_the_distance_is_right_in_the_mean(shape):
    rng = np.random.default_rng(0)
    ratios = []
    for _ in range(60):
        x = rng.standard_normal(shape)
        y = x + 1e-3 * rng.standard_normal(shape)
        told = distance(sketch(x), sketch(y), norm(x))
        ratios.append((told / (np.linalg.norm(x - y) / np.linalg.norm(x))) ** 2)
    assert np.mean(ratios) == pytest.approx(1, abs=0.25)
    assert min(ratios) > 0.02


def test_a_sketch_depends_on_shape_and_numbers_only():
    x = np.arange(12, dtype=np.float32).reshape(3, 4)
    assert sketch(x) == sketch(x.astype(np.float64)) == sketch(x.astype(np.int8)) == sketch(np.asfortranarray(x))
    assert sketch(x) == sketch(x.astype(ml_dtypes.bfloat16))
    assert sketch(x) != sketch(x.reshape(4, 3))


def test_a_sketch_is_the_same_for_all_time():
    """Locks are kept for years: the signs may never change."""
    assert sketch(np.arange(1.0, 7.0).reshape(2, 3)) == (-9.0, -3.0, 3.0, 3.0, -7.0, 3.0, -9.0, -3.0)


def test_sketches_of_several_arrays_add_up():
    x, y = np.random.default_rng(0).standard_normal((2, 500))
    both = np.add(sketch(x), sketch(y, 1))
    moved = np.add(sketch(x + 0.01), sketch(y - 0.01, 1))
    assert distance(both.tolist(), moved.tolist(), 1.0) == pytest.approx(0.01 * math.sqrt(1000), rel=0.7)


def test_parts_make_the_same_sketch_as_the_whole(monkeypatch):
    x = np.random.default_rng(0).standard_normal((300, 7))
    whole, length = sketch(x), norm(x)
    monkeypatch.setattr("burnish.tools.check.sketch._CHUNK", 50)
    assert sketch(x) == pytest.approx(whole, rel=1e-9)
    assert norm(x) == pytest.approx(length, rel=1e-12)


@pytest.mark.parametrize("shape", [(0,), (3, 0), (0, 4), ()])
def test_small_shapes_have_sketches(shape):
    assert len(sketch(np.zeros(shape))) == 8
    assert norm(np.zeros(shape)) == 0


def test_what_is_not_finite_counts_as_nothing():
    x = np.array([1.0, np.nan, np.inf, -2.0, -np.inf])
    assert sketch(x) == sketch(np.array([1.0, 0, 0, -2.0, 0]))
    assert norm(x) == pytest.approx(math.sqrt(5))


def test_huge_numbers_stay_finite():
    x = np.array([1.7e308, -1.7e308, 1.7e308])
    assert all(map(math.isfinite, sketch(x)))
    assert math.isfinite(norm(x))


def test_distances_without_a_norm():
    zero, one = sketch(np.zeros(4)), sketch(np.ones(4))
    assert distance(zero, zero, 0.0) == 0
    assert distance(zero, one, 0.0) == math.inf
    assert distance((), one, 1.0) == 0


@pytest.mark.parametrize(
    ("number", "largest", "kept"),
    [(1.23456789, 1.0, 1.23457), (0.00123456789, 100.0, 0.001), (-1e-9, 1.0, 0.0), (123456789.0, 1.2e8, 123457000.0),
     (0.0, 0.0, 0.0), (1.5e-310, 1.5e-310, 1.5e-310), (-0.0, 1.0, 0.0)],
)  # fmt: skip
def test_digits_count_from_the_largest(number, largest, kept):
    found = rounded(number, largest)
    assert found == kept
    assert math.copysign(1, found) == 1 or found
