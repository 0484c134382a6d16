"""Ranks that can be worked out by hand, and the laws between them."""

from __future__ import annotations

import numpy as np
import onnx
import pytest

from burnish.frontends import load
from burnish.passes import rank
from burnish.passes.gram import ConvolutionGram, Gram
from burnish.passes.layers import Layer, gram_of, layers


def linear(weight: np.ndarray) -> Layer:
    """A MatMul with the weight [out, in]."""
    proto = onnx.parser.parse_model(
        f'<ir_version: 10, opset_import: ["": 20]> g (float[N, {weight.shape[1]}] x) => (float[N, {len(weight)}] y) '
        f"{{ y = MatMul (x, w) }}"
    )
    proto.graph.initializer.append(onnx.numpy_helper.from_array(weight.T.astype(np.float32), "w"))
    (layer,) = layers(load(proto)).values()
    return layer


def convolution(weight: np.ndarray, attributes: str, operator: str = "Conv", channels: int = 4) -> Layer:
    proto = onnx.parser.parse_model(
        f'<ir_version: 10, opset_import: ["": 20]> g (float[N, {channels}, 8, 8] x) => (float[N, M, H, W] y) '
        f"{{ y = {operator} <{attributes}> (x, w) }}"
    )
    proto.graph.initializer.append(onnx.numpy_helper.from_array(weight.astype(np.float32), "w"))
    (layer,) = layers(load(proto)).values()
    return layer


def seen(rows: np.ndarray) -> Gram:
    found = Gram(exact=True)
    found.add(rows)
    return found


def rotation(size: int, seed: int = 0) -> np.ndarray:
    return np.linalg.qr(np.random.default_rng(seed).standard_normal((size, size)))[0]


def test_the_ranks_of_a_weight_come_from_its_singular_values() -> None:
    weight = rotation(6)[:, :4] @ np.diag([3.0, 2, 1, 0.1]) @ rotation(4, 1)
    for one in (weight, weight.T):
        found = rank.weight_rank(linear(one))
        assert (found.full, found.energy_90, found.energy_99) == (4, 2, 3)
        assert found.stable == pytest.approx((9 + 4 + 1 + 0.01) / 9, rel=1e-6)
    assert rank.weight_rank(linear(np.zeros((3, 5)))) == rank.WeightRank(3, 0.0, 0, 0)


@pytest.mark.parametrize("out", [3, 12])
def test_data_of_few_directions_use_that_many(out: int) -> None:
    rng = np.random.default_rng(0)
    rows = rng.standard_normal((3000, 2)) @ rng.standard_normal((2, 8)) + 5
    found = rank.data_rank(linear(rng.standard_normal((out, 8))), seen(rows))
    assert (found.rows, found.feature, found.utilized, found.share, found.few) == (3000, 2, 2, 2 / min(out, 8), False)
    assert rank.data_rank(linear(rng.standard_normal((out, 8))), seen(rows[:8])).few


def test_the_weight_can_use_less_than_the_data_have() -> None:
    rng = np.random.default_rng(0)
    weight = np.outer(rng.standard_normal(6), rng.standard_normal(8))
    found = rank.data_rank(linear(weight), seen(rng.standard_normal((3000, 8))))
    assert (found.feature, found.utilized) == (8, 1)


@pytest.mark.parametrize("out", [4, 20])
def test_utilized_rank_is_the_energy_of_the_outputs(out: int) -> None:
    rng = np.random.default_rng(1)
    rows = rng.standard_normal((4000, 10)) * np.geomspace(1, 0.01, 10)
    layer = linear(rng.standard_normal((out, 10)))
    outputs = rows @ layer.weight().T
    found = rank.data_rank(layer, seen(rows))
    energies = np.linalg.svd(outputs - outputs.mean(0), compute_uv=False) ** 2
    assert found.utilized == min(found.feature, rank.count_to(energies, 0.99))


def test_a_grouped_convolution_is_the_block_diagonal_of_its_groups() -> None:
    rng = np.random.default_rng(0)
    weight = rng.standard_normal((6, 2, 3, 3))
    layer = convolution(weight, "group = 2")
    dense = np.zeros((6, 36))
    dense[:3, :18], dense[3:, 18:] = weight[:3].reshape(3, -1), weight[3:].reshape(3, -1)
    one, other = rank.weight_rank(layer), rank.weight_rank(linear(dense))
    assert (one.full, one.energy_90, one.energy_99) == (other.full, other.energy_90, other.energy_99)
    gram = gram_of(layer, exact=True)
    assert isinstance(gram, ConvolutionGram) and gram.groups == 2
    gram.add(rng.standard_normal((20, 4, 8, 8)))
    assert rank.data_rank(layer, gram).utilized == 6


@pytest.mark.parametrize("groups", [1, 2])
def test_a_transposed_convolution_multiplies_channels(groups: int) -> None:
    rng = np.random.default_rng(0)
    layer = convolution(rng.standard_normal((4, 3, 2, 2)), f"group = {groups}", "ConvTranspose")
    gram = gram_of(layer, exact=True)
    gram.add(np.concatenate([rng.standard_normal((9, 2, 8, 8)), np.zeros((9, 2, 8, 8))], 1))
    assert rank.weight_rank(layer).full == 4
    assert rank.data_rank(layer, gram).utilized == 2


def normal(rows: int, covariance: np.ndarray, mean: np.ndarray) -> Gram:
    """A reducer that has seen rows of exactly this mean and covariance."""
    x = np.random.default_rng(0).standard_normal((rows, len(mean)))
    x -= x.mean(0)
    root = np.linalg.cholesky(np.cov(x.T, bias=True))
    return seen(x @ np.linalg.inv(root).T @ np.linalg.cholesky(covariance).T + mean)


def test_the_share_of_the_cube_in_two_dimensions() -> None:
    turned = rotation(2) @ np.diag([4.0, 1]) @ rotation(2).T
    expected = np.pi * np.sqrt(np.linalg.det(turned)) / (4 * np.diag(turned).max())
    found = rank.fill(normal(500, turned, np.zeros(2)))
    assert found.root is not None and found.root**2 == pytest.approx(expected, rel=1e-9)
    # Variances 4 and 1 with correlation 0.6: the end of the longest axis would claim more than .62832.
    skewed = np.array([[1.0, 0.6], [0.6, 1.0]])
    found = rank.fill(normal(500, skewed, np.zeros(2)))
    assert found.root is not None and found.root**2 == pytest.approx(np.pi / 4 * 0.8, rel=1e-9)


def test_whitened_data_reach_the_bound_and_a_shift_costs() -> None:
    for size in (2, 16, 64):
        whitened = rank.fill(normal(1000, np.eye(size), np.zeros(size)))
        assert whitened.root == pytest.approx(whitened.bound, rel=1e-9)
        mean = np.zeros(size)
        mean[0] = 3
        shifted = rank.fill(normal(1000, np.eye(size), mean))
        assert shifted.root is not None and shifted.root < whitened.bound
    assert rank.fill(normal(1000, np.eye(64), np.zeros(64))).bound == pytest.approx(0.248, abs=1e-3)


def test_what_no_sample_can_tell_is_said() -> None:
    rng = np.random.default_rng(0)
    assert rank.fill(seen(rng.standard_normal((5, 8)))).reason == "5 rows do not span 8 features"
    assert rank.fill(seen(np.ones((50, 2)))).reason == "all rows are equal"


def test_a_direction_that_carries_nothing_is_left_out() -> None:
    rows = np.random.default_rng(0).standard_normal((500, 8)).astype(np.float32)
    normed = (rows - rows.mean(1, keepdims=True)) / rows.std(1, keepdims=True)
    found = rank.fill(seen(normed))
    assert found.directions == 7 and found.root is not None and 0.5 * found.bound < found.root < found.bound


def test_every_layer_has_a_name_of_its_own() -> None:
    source = """<ir_version: 10, opset_import: ["": 20]>
      g (bool c, float[N, 2] x) => (float[N, 2] y) <float[2, 2] w = {1, 2, 3, 4}> {
        y = If (c) <then_branch = a () => (float[N, 2] p) { p = MatMul (x, w) },
                    else_branch = b () => (float[N, 2] p) { p = MatMul (x, w) }> }"""
    assert list(layers(load(onnx.parser.parse_model(source)))) == ["p", "p #2"]
