"""Orthogonal matrices that spread what few channels hold over all of them.

Rows are multiplied from the right: `x @ R`. Matrices are float64 [size, size], and the same for the same seed.
"""

from __future__ import annotations

from functools import cache

import numpy as np

ROTATED = "burnish.rotated"
"""The key under which a model says, among its metadata, how its stream is rotated: that is done once."""


def hadamard(size: int) -> np.ndarray:
    """An orthogonal matrix of any size whose entries are all equally large, or nearly.

    Products of Hadamard matrices by Sylvester (powers of two) and Paley (1933: from the squares modulo a prime q, of
    size q + 1 where q = 3 modulo 4, and 2 q + 2 where q = 1 modulo 4), as far as they divide the size; what is left of
    it is a Hartley matrix, cos + sin of 2 pi i j / n, whose entries are at most sqrt(2 / n).
    """
    return np.array(_hadamard(size))


@cache
def _hadamard(size: int) -> np.ndarray:
    return np.asarray(_kron([_block(one) for one in factors(size)]))


def factors(size: int) -> tuple[int, ...]:
    """The sizes of the blocks whose Kronecker product, in this order, is `hadamard(size)`: at most three.

    First a power of two, then a Hadamard matrix of another size, then what none is known for; ones are left out.
    """
    best = (1, 1, size)
    for paley in (1, *(order for order in range(12, size + 1, 4) if size % order == 0 and _paley_prime(order))):
        rest = size // paley
        two = rest & -rest
        found = (two, paley, rest // two)
        if (found[2], paley) < (best[2], best[1]):
            best = found
    return tuple(one for one in best if one > 1) or (1,)


def blocks(size: int) -> list[np.ndarray]:
    """The blocks of `factors`."""
    return [np.array(_block(one)) for one in factors(size)]


def _kron(parts: list[np.ndarray]) -> np.ndarray:
    found = parts[0]
    for one in parts[1:]:
        found = np.kron(found, one)
    return found


@cache
def _block(size: int) -> np.ndarray:
    if size & (size - 1) == 0:
        found = np.ones((1, 1))
        while len(found) < size:
            found = np.block([[found, found], [found, -found]])
        return np.asarray(found / np.sqrt(size))
    if _paley_prime(size):
        return np.asarray(_paley(size) / np.sqrt(size))
    turns = 2 * np.pi * (np.outer(np.arange(size), np.arange(size)) % size) / size
    return np.asarray((np.cos(turns) + np.sin(turns)) / np.sqrt(size))


def _paley_prime(order: int) -> int:
    """The prime that Paley's constructions make a Hadamard matrix of this order from; 0 where there is none."""
    for prime, remainder in ((order - 1, 3), (order // 2 - 1, 1)):
        if order % 4 == 0 and prime > 2 and prime % 4 == remainder and all(prime % i for i in range(2, prime // 2 + 1)):
            return prime
    return 0


def _paley(order: int) -> np.ndarray:
    """Entries 1 and -1."""
    prime = _paley_prime(order)
    squares = {i * i % prime for i in range(1, prime)}
    sign = np.array([0.0] + [1.0 if i in squares else -1.0 for i in range(1, prime)])
    core = np.zeros((prime + 1, prime + 1))
    core[0, 1:] = 1.0
    core[1:, 0] = -1.0 if prime % 4 == 3 else 1.0
    core[1:, 1:] = sign[(np.arange(prime)[:, None] - np.arange(prime)[None, :]) % prime]
    eye = np.eye(prime + 1)
    if prime % 4 == 3:
        return np.asarray(core + eye)
    return np.asarray(np.kron(core, [[1.0, 1.0], [1.0, -1.0]]) + np.kron(eye, [[1.0, -1.0], [-1.0, -1.0]]))


def random_hadamard(size: int, seed: int) -> np.ndarray:
    """`hadamard` between random signs, as QuaRot (Ashkboos et al. 2024, arXiv:2404.00456) rotates."""
    before, behind = np.random.default_rng([seed, size]).integers(0, 2, (2, size)) * 2.0 - 1.0
    return np.asarray(before[:, None] * _hadamard(size) * behind)


def random_orthogonal(size: int, seed: int) -> np.ndarray:
    """A uniformly random orthogonal matrix."""
    q, r = np.linalg.qr(np.random.default_rng([seed, size]).standard_normal((size, size)))
    return np.asarray(q * np.where(np.diagonal(r) < 0, -1.0, 1.0))


def flattening(covariance: np.ndarray, seed: int) -> np.ndarray:
    """The rotation behind which all channels have the same variance: to the principal axes, then a random Hadamard.

    With Hadamard matrices of the size exactly, else nearly. No rotation fills more of the cube that quantization spans
    (Hu et al. 2025, arXiv:2501.13987, section 4: T = H Uᵀ for columns).

    Args:
        covariance: float64 [size, size], symmetric, of rows.
        seed: of the signs.
    """
    _, vectors = np.linalg.eigh(covariance)
    largest = np.abs(vectors).argmax(axis=0)
    vectors = vectors * np.where(vectors[largest, np.arange(len(vectors))] < 0, -1.0, 1.0)
    return np.asarray(vectors @ random_hadamard(len(covariance), seed))


def keeping_ones(matrix: np.ndarray) -> np.ndarray:
    """An orthogonal matrix turned so that it leaves the row of ones as it is: a rotation that keeps each row's mean.

    What a layer norm takes off then stays what it was, `LN(x R) = LN(x) R`. The reflection that does so (Householder)
    changes entries by about 1 / size, so a matrix that spreads still spreads.
    """
    size = len(matrix)
    ones = np.full(size, size**-0.5)
    turned = ones @ matrix
    across = turned - ones
    length = across @ across
    if length < 1e-24:
        return matrix
    return np.asarray(matrix - np.outer(matrix @ across, across) * (2.0 / length))


def standing_out(rows: np.ndarray) -> float:
    """The largest column's root mean square over that of all, of float64 [rows, size]: 1 when none stands out."""
    energy = np.square(rows).mean(axis=0)
    return float(np.sqrt(energy.max() / energy.mean())) if energy.any() else 1.0
