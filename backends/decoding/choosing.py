"""Which token comes next: pure functions of scores."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from burnish.ir.errors import InputError


@dataclass(frozen=True)
class Sampling:
    """How a token is drawn. The default takes the one of the largest score, the first of several.

    Attributes:
        temperature: scores are divided by it; 0 takes the largest score.
        top_k: only so many of the largest scores count; 0 for all.
        top_p: of those, only the fewest whose probabilities sum up to at least this.
        seed: of the random numbers of one request.

    Raises:
        InputError: a number is out of its range.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < float("inf"):
            raise InputError(f"a temperature of {self.temperature} is negative or no number", hint="0 is greedy")
        if self.top_k < 0:
            raise InputError(f"`top_k` is {self.top_k}", hint="0 lets all tokens count")
        if not 0 < self.top_p <= 1:
            raise InputError(f"`top_p` is {self.top_p}", hint="give a part of 1, such as 0.9")
        if self.seed < 0:
            raise InputError(f"the seed {self.seed} is negative", hint="give a number from 0 on")

    @property
    def greedy(self) -> bool:
        """Whether nothing is drawn."""
        return self.temperature == 0


def probabilities(scores: NDArray[Any], sampling: Sampling) -> NDArray[np.float64]:
    """The distribution that the next token is drawn from.

    Args:
        scores: of every token, [..., vocabulary], in any floating point dtype.
        sampling: temperature first, then `top_k`, then `top_p`, each on what the one before left.

    Returns:
        float64 of the same shape; sums to 1 along the last axis. Greedy: 1 at the largest score.

    Raises:
        InputError: a score is NaN.
    """
    _check(scores)
    given = np.asarray(scores, np.float64)
    if sampling.greedy:
        made = np.zeros(given.shape)
        np.put_along_axis(made, given.argmax(-1)[..., None], 1.0, -1)
        return made
    scaled = given / sampling.temperature
    weights = np.exp(scaled - scaled.max(-1, keepdims=True))
    size = given.shape[-1]
    if 0 < sampling.top_k < size or sampling.top_p < 1:
        order = np.argsort(-weights, -1, kind="stable")
        ranked = np.take_along_axis(weights, order, -1)
        if 0 < sampling.top_k < size:
            ranked[..., sampling.top_k :] = 0
        before = np.cumsum(ranked, -1) - ranked
        ranked[before >= sampling.top_p * ranked.sum(-1, keepdims=True)] = 0
        np.put_along_axis(weights, order, ranked, -1)
    found: NDArray[np.float64] = weights / weights.sum(-1, keepdims=True)
    return found


def drawn(distribution: NDArray[np.float64], random: np.random.Generator) -> int:
    """One token of a distribution [vocabulary]; takes one number of `random`."""
    edges = np.cumsum(distribution)
    found = int(np.searchsorted(edges, random.random() * edges[-1], side="right"))
    return min(found, int(np.flatnonzero(distribution)[-1]))


def choose(scores: NDArray[Any], sampling: Sampling, random: np.random.Generator) -> int:
    """The next token, of scores [vocabulary].

    Raises:
        InputError: a score is NaN.
    """
    if sampling.greedy:
        _check(scores)
        return int(scores.argmax())
    return drawn(probabilities(scores, sampling), random)


def verified(
    wanted: NDArray[np.float64], said: NDArray[np.float64], tokens: Sequence[int], random: np.random.Generator
) -> tuple[int, int]:
    """How many tokens of a draft are taken, and the token behind them: together, they are drawn of `wanted`.

    A token x that was drawn of q is taken with probability min(1, p(x) / q(x)), and the first that is not taken is
    replaced by one of max(0, p - q), scaled to a sum of 1 (Leviathan et al. 2023, arXiv:2211.17192, algorithm 1). With
    the distributions of greedy decoding, a token is taken where it is the one of the largest score.

    Args:
        wanted: p, the distributions behind none, one, ... all tokens of the draft, [n + 1, vocabulary].
        said: q, those that the tokens of the draft were drawn of, [n, vocabulary].
        tokens: the draft, n tokens; may be none.
        random: takes one number for each token that is looked at, and one for the token behind.
    """
    for place, token in enumerate(tokens):
        if random.random() * said[place, token] >= wanted[place, token]:
            rest = np.maximum(wanted[place] - said[place], 0)
            # Nothing is left where the two differ by rounding only; then either is right.
            return place, drawn(rest if rest.any() else wanted[place], random)
    return len(tokens), drawn(wanted[len(tokens)], random)


def _check(scores: NDArray[Any]) -> None:
    if np.isnan(scores).any():
        raise InputError("the model's scores are NaN")
