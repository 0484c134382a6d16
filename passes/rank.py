"""How many directions a layer uses: of its weight alone, and of the data that passes through it.

With W [out, in] the weight, and Σ [in, in] the covariance of the rows it multiplies:

- stable rank: ‖W‖²_F / ‖W‖²₂;
- spectral energy rank: the fewest singular values of W whose squares sum to a share of ‖W‖²_F;
- feature rank: the fewest eigenvalues of Σ that sum to a share of its trace;
- utilized rank (Garg et al. 2024, arXiv:2407.04797): the smaller of the feature rank and the fewest eigenvalues of
  W Σ Wᵀ, the covariance of the outputs, that sum to a share of its trace. The mean of the rows passes through the
  bias, so it is taken off first;
- QSUR (Hu et al. 2025, arXiv:2501.13987): the share of the cube that quantization spans which an ellipsoid holding 99 %
  of the data fills. The cube's edge is that of the exact range of the ellipsoid over all coordinates, μ ± √(c diag Σ),
  not that of the end of its longest axis, as in the paper, which is too short. Directions that carry nothing (a layer
  norm leaves one) are left out: else one of them makes the share 0.

A grouped convolution is the block diagonal matrix of its groups.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from burnish.ir.errors import InputError
from burnish.ir.views.linear import Linear
from burnish.passes.gram import Gram
from burnish.passes.layers import Layer

NARROW, WIDE = 0.95, 0.5
"""The shares of the channels, used, from which a width is called narrow, and up to which it is called wide."""
SHARE = 0.99
"""The share of energy that counts as all of it, and the share of the data in the ellipsoid of QSUR."""

_NOTHING = 1e-12
"""Variances below this share of the largest are the rounding of float32 values, not a direction of the data."""


@dataclass(frozen=True)
class WeightRank:
    """Ranks of a weight.

    Attributes:
        full: the largest rank that a matrix of its sizes can have.
        stable: the stable rank; 0 of a zero matrix.
        energy_90: singular values that hold 90 % of the energy.
        energy_99: likewise 99 %.
    """

    full: int
    stable: float
    energy_90: int
    energy_99: int


@dataclass(frozen=True)
class DataRank:
    """Ranks of what passes through a layer.

    Attributes:
        rows: how many rows were seen.
        feature: the feature rank.
        utilized: the utilized rank.
        share: `utilized` over the full rank of the weight.
        few: there were no more rows than features: more rows could show more directions.
    """

    rows: int
    feature: int
    utilized: int
    share: float
    few: bool


@dataclass(frozen=True)
class Width:
    """The channels that a layer reads, and the feature rank of what they carry.

    Han et al. (ReXNet, CVPR 2021, arXiv:2007.00992) compare that rank with the width to find the layers that are too
    narrow: those whose channels are all used.

    Attributes:
        channels: how many there are.
        used: the feature rank.
        few: there were no more rows than channels.
    """

    channels: int
    used: int
    few: bool

    @property
    def kind(self) -> str:
        """`narrow` where nearly all channels are used, `wide` where half of them are not, else and if unknown empty."""
        if self.few or self.channels < 2:
            return ""
        return "narrow" if self.used >= NARROW * self.channels else "wide" if self.used <= WIDE * self.channels else ""


@dataclass(frozen=True)
class Fill:
    """QSUR of the input of a layer, as the edge of a cube of the same share: the root of its number of directions.

    Attributes:
        root: QSUR to the power 1 / directions; None when it cannot be told.
        directions: those that carry something.
        bound: the largest root that any invertible linear map of the data reaches.
        reason: why it cannot be told.
    """

    root: float | None
    directions: int
    bound: float
    reason: str = ""


def matrices(layer: Layer) -> np.ndarray:
    """The weight as float64 [groups, out / groups, rows' features]; one group unless it is a grouped convolution."""
    weight = layer.weight()
    if isinstance(layer, Linear):
        return weight[None]
    if layer.transposed:  # multiplies the channels of one position into a patch of outputs
        blocks = weight.reshape(layer.groups, layer.out_channels // layer.groups, weight.shape[1], -1)
        return blocks.transpose(0, 1, 3, 2).reshape(layer.groups, -1, weight.shape[1])
    return weight.reshape(layer.groups, layer.out_channels // layer.groups, -1)


def count_to(energies: np.ndarray, share: float) -> int:
    """The fewest of `energies`, float64 and not negative, that sum to `share` of all; 0 when all are 0."""
    ordered = np.sort(energies, axis=None)[::-1]
    total = ordered.sum()
    if total <= 0:
        return 0
    return min(int(np.searchsorted(np.cumsum(ordered), share * total * (1 - 1e-12))) + 1, ordered.size)


def weight_rank(layer: Layer) -> WeightRank:
    """The ranks of a layer's weight; raises InputError when its squares are not finite."""
    blocks = matrices(layer)
    tall = blocks.shape[1] > blocks.shape[2]
    with np.errstate(invalid="ignore", over="ignore"):
        squares = blocks.transpose(0, 2, 1) @ blocks if tall else blocks @ blocks.transpose(0, 2, 1)
    _check_finite(squares, "its weight")
    energies = np.maximum(np.linalg.eigvalsh(squares), 0)
    largest = float(energies.max(initial=0.0))
    return WeightRank(
        full=energies.size,
        stable=float(energies.sum() / largest) if largest > 0 else 0.0,
        energy_90=count_to(energies, 0.90),
        energy_99=count_to(energies, 0.99),
    )


def _check_finite(squares: np.ndarray, what: str) -> None:
    if not np.isfinite(squares).all():
        raise InputError(f"{what} holds NaN, infinity, or numbers too large to be squared")


def data_rank(layer: Layer, gram: Gram, share: float = SHARE) -> DataRank:
    """`utilized` for one layer.

    Args:
        layer: the layer.
        gram: of its input, as `burnish.passes.layers.gram_of` makes it with patches.
        share: of the energy.

    Raises:
        InputError: there are no rows, or they or the weight are not finite.
    """
    return utilized(matrices(layer), gram, share)


def width(gram: Gram, share: float = SHARE) -> Width:
    """How much of the channels that a layer reads is used.

    Args:
        gram: of rows of channels, at all positions.
        share: of the variance.
    """
    channels = len(gram.mean)
    used = count_to(np.maximum(np.linalg.eigvalsh(gram.covariance), 0), share)
    return Width(channels, used, gram.rows <= channels)


def features_of(layer: Layer) -> int:
    """The features of the rows that a layer multiplies: of a convolution a patch of one group's channels."""
    if isinstance(layer, Linear):
        return layer.in_features
    taps = 1 if layer.transposed else int(np.prod(layer.kernel))
    return layer.in_channels // layer.groups * taps


def by_group(matrix: np.ndarray, features: int) -> np.ndarray:
    """A moment of rows, [groups * features, ...] or [groups, features, features], as the latter."""
    if matrix.ndim == 3:
        return matrix
    if len(matrix) == features:
        return matrix[None]
    starts = range(0, len(matrix), features)
    return np.stack([matrix[at : at + features, at : at + features] for at in starts])


def utilized(blocks: np.ndarray, gram: Gram, share: float = SHARE) -> DataRank:
    """The ranks of the rows that a weight multiplies.

    Args:
        blocks: float64 [groups, out / groups, features], as `matrices` gives them.
        gram: of the rows.
        share: of the energy.

    Raises:
        InputError: there are no rows, or they or the weight are not finite.
    """
    groups, out, features = blocks.shape
    covariance = gram.covariance
    _check_finite(covariance, "its input")
    covariance = by_group(covariance, features)
    sources = np.empty((groups, features))
    results = np.empty((groups, min(out, features)))
    for index, (weight, one) in enumerate(zip(blocks, covariance, strict=True)):
        if out <= features:
            sources[index] = np.linalg.eigvalsh(one)
            results[index] = np.linalg.eigvalsh(weight @ one @ weight.T)
        else:  # the eigenvalues of W Σ Wᵀ that are not zero are those of the smaller matrix Σ^½ Wᵀ W Σ^½
            sources[index], vectors = np.linalg.eigh(one)
            root = weight @ (vectors * np.sqrt(np.maximum(sources[index], 0)))
            results[index] = np.linalg.eigvalsh(root.T @ root)
    feature = count_to(np.maximum(sources, 0), share)
    used = min(feature, count_to(np.maximum(results, 0), share))
    return DataRank(gram.rows, feature, used, used / max(results.size, 1), gram.rows <= features)


def fill(gram: Gram, share: float = SHARE) -> Fill:
    """QSUR of a normal distribution with the mean and the covariance of the rows.

    Args:
        gram: of rows with one matrix.
        share: of the data inside the ellipsoid.
    """
    from scipy.special import gammaincinv, gammaln

    mean, covariance = gram.mean, gram.covariance
    features = len(mean)
    if gram.rows <= features:
        return Fill(None, 0, 0.0, f"{gram.rows} rows do not span {features} features")
    energies = np.linalg.eigvalsh(covariance)
    energies = energies[energies > _NOTHING * max(energies[-1], 0)]
    count = len(energies)
    if not count:
        return Fill(None, 0, 0.0, "all rows are equal")
    unit = np.log(np.pi) / 2 - gammaln(count / 2 + 1) / count  # the logarithm of the root of the unit ball's volume
    reach = 2 * float(gammaincinv(count / 2, share))
    wide = np.sqrt(reach * np.maximum(np.diagonal(covariance), 0))
    edge = float((mean + wide).max() - (mean - wide).min())
    root = float(np.exp(unit + np.log(reach) / 2 + np.log(energies).mean() / 2) / edge)
    return Fill(root, count, float(np.exp(unit) / 2 * np.sqrt(features / count)))
