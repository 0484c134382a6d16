"""The laws of orthogonal matrices that spread."""

from __future__ import annotations

import numpy as np
import pytest

from burnish.passes import rotation

SIZES = (1, 2, 3, 4, 7, 12, 20, 28, 36, 48, 64, 96, 100, 172, 192, 384, 576, 1536)


@pytest.mark.parametrize("size", SIZES)
def test_every_size_has_an_orthogonal_matrix_that_spreads(size: int) -> None:
    found = rotation.hadamard(size)
    assert np.abs(found @ found.T - np.eye(size)).max() < 1e-12
    assert np.abs(found).max() <= np.sqrt(2 / size) + 1e-12
    parts = rotation.factors(size)
    assert np.prod(parts) == size


@pytest.mark.parametrize("size", [2, 4, 12, 20, 28, 36, 48, 64, 96, 192, 384, 576, 1536])
def test_sizes_with_a_known_hadamard_matrix_get_one(size: int) -> None:
    assert np.allclose(np.abs(rotation.hadamard(size)), size**-0.5)


def test_seeds_decide() -> None:
    for make in (rotation.random_hadamard, rotation.random_orthogonal):
        assert np.array_equal(make(12, 3), make(12, 3))
        assert not np.array_equal(make(12, 3), make(12, 4))
        assert np.abs(make(12, 3) @ make(12, 3).T - np.eye(12)).max() < 1e-12


def test_a_flattening_rotation_gives_every_channel_the_mean_variance() -> None:
    rows = np.random.default_rng(0).standard_normal((500, 64)) @ np.diag(np.linspace(0.1, 5, 64))
    rows[:, 3] *= 50
    covariance = rows.T @ rows / 500
    turned = rotation.flattening(covariance, 0)
    spread = np.diagonal(turned.T @ covariance @ turned)
    assert np.allclose(spread, np.trace(covariance) / 64)
    assert rotation.standing_out(rows) > 4 and rotation.standing_out(rows @ turned) == pytest.approx(1)


def test_a_rotation_that_keeps_ones_commutes_with_a_layer_norm_and_still_spreads() -> None:
    found = rotation.keeping_ones(rotation.random_hadamard(96, 1))
    assert np.abs(found @ found.T - np.eye(96)).max() < 1e-12
    assert np.abs(found).max() < 96**-0.5 + 20 / 96
    x = np.random.default_rng(0).standard_normal((5, 96))

    def norm(rows: np.ndarray) -> np.ndarray:
        centred = rows - rows.mean(axis=1, keepdims=True)
        return np.asarray(centred / np.sqrt(np.square(centred).mean(axis=1, keepdims=True) + 1e-5))

    assert np.allclose(norm(x @ found), norm(x) @ found, atol=1e-12)
    eye = np.eye(5)
    assert np.array_equal(rotation.keeping_ones(eye), eye)
