"""Random numbers. They come from torch's generator, which `torch.manual_seed` sets; a node's own `seed` is not used."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from burnish.backends.fx.registry import operator
from burnish.backends.fx.values import DTYPES, Tensor, Value, tensor


def _kind(x: Tensor, dtype: int | None) -> torch.dtype:
    return x.dtype if dtype is None else DTYPES[dtype]


@operator("RandomNormal")
def random_normal(
    shape: Sequence[int], dtype: int = 1, mean: float = 0.0, scale: float = 1.0, seed: float | None = None
) -> Tensor:
    """Normally distributed numbers."""
    return torch.randn(list(shape), dtype=DTYPES[dtype]) * scale + mean


@operator("RandomNormalLike")
def random_normal_like(
    x: Value, dtype: int | None = None, mean: float = 0.0, scale: float = 1.0, seed: float | None = None
) -> Tensor:
    """Normally distributed numbers, as many as x has."""
    x = tensor(x)
    return torch.randn(x.shape, dtype=_kind(x, dtype), device=x.device) * scale + mean


@operator("RandomUniform")
def random_uniform(
    shape: Sequence[int], dtype: int = 1, low: float = 0.0, high: float = 1.0, seed: float | None = None
) -> Tensor:
    """Numbers between `low` and `high`."""
    return torch.rand(list(shape), dtype=DTYPES[dtype]) * (high - low) + low


@operator("RandomUniformLike")
def random_uniform_like(
    x: Value, dtype: int | None = None, low: float = 0.0, high: float = 1.0, seed: float | None = None
) -> Tensor:
    """Numbers between `low` and `high`, as many as x has."""
    x = tensor(x)
    return torch.rand(x.shape, dtype=_kind(x, dtype), device=x.device) * (high - low) + low


@operator("Bernoulli")
def bernoulli(x: Tensor, dtype: int | None = None, seed: float | None = None) -> Tensor:
    """1 with the probability x, else 0."""
    return torch.bernoulli(x.detach()).to(_kind(x, dtype))


@operator("Multinomial")
def multinomial(x: Tensor, dtype: int = 6, sample_size: int = 1, seed: float | None = None) -> Tensor:
    """Classes drawn, `sample_size` for every row of unnormalized log-probabilities x [N, C]."""
    return torch.multinomial(torch.softmax(x.detach().float(), 1), sample_size, True).to(DTYPES[dtype])
