"""Whether a decoder computes with its caches what it computes at once, and how well it predicts a text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from burnish.backends.decoding.decoder import Decoder
from burnish.ir.errors import InputError
from burnish.passes.metrics import negative_log_likelihoods

Tokens = NDArray[np.int64]
_NOTHING = 0.25
"""Difference, relative to the largest score, from which on scores have nothing to do with each other."""


@dataclass(frozen=True)
class Parity:
    """How far scores with caches are from those of the whole text at once.

    Attributes:
        difference: the largest absolute difference of a score.
        scale: the largest absolute score.
        worst: which way of feeding it was: batch, cuts.
    """

    difference: float
    scale: float
    worst: str

    @property
    def relative(self) -> float:
        """The difference as a part of the scale; NaN counts as infinite."""
        ratio = self.difference / self.scale if self.scale else self.difference
        return float("inf") if np.isnan(ratio) else ratio


def in_pieces(decoder: Decoder, ids: Tokens, cuts: Sequence[int], keep: NDArray[np.bool_] | None = None) -> np.ndarray:
    """The scores of a text that is fed in pieces which end at `cuts` and at its end.

    Args:
        decoder: what computes.
        ids: [rows, n].
        cuts: places in the text, ascending, each more than 0 and less than n.
        keep: as for `State.feed`.

    Returns:
        float32 [rows, n, vocabulary].
    """
    state, found = decoder.start(len(ids)), []
    for start, end in zip([0, *cuts], [*cuts, ids.shape[1]], strict=True):
        part = None if keep is None else keep[:, start:end]
        if part is None or part.any():
            found.append(state.feed(ids[:, start:end], part))
        else:
            found.append(np.zeros((len(ids), end - start, 1), np.float32))
    width = max(one.shape[2] for one in found)
    return np.concatenate([np.broadcast_to(one, (*one.shape[:2], width)) for one in found], 1)


def parity(decoder: Decoder, *, length: int = 12, pads: int = 3, seed: int = 0, ids: Tokens | None = None) -> Parity:
    """Compare every way of feeding a text with feeding it at once to a single row: the law of a decoder with caches.

    Single rows, in two pieces at several places and token by token, so that several past lengths occur; and, where the
    model can tell rows of different lengths apart, two rows of which one has padding before it, likewise.

    A model that decides by the first tokens of a row is given some of them at once in all ways, more than are padding.

    Args:
        decoder: what computes.
        length: tokens of the text, at least 4.
        pads: padding before the shorter row, less than `length`.
        seed: of the tokens.
        ids: two texts to take instead, [2, n].
    """
    if ids is None:
        random = np.random.default_rng(seed)
        ids = random.integers(1, decoder.ports.vocabulary or 100, (2, length))
    length = ids.shape[1]
    found = Parity(-1.0, 0.0, "")
    if not decoder.ports.decides:
        return _parity(decoder, ids, pads, 0, found)
    pads = min(pads, length // 2 - 1)
    for first in dict.fromkeys((pads + 1, (pads + length) // 2)):
        found = _parity(decoder, ids, pads, first, found)
    return found


def _parity(decoder: Decoder, ids: Tokens, pads: int, first: int, known: Parity) -> Parity:
    """The worse of what is known and of all ways whose first piece has so many tokens, or more where that is 0."""
    length = ids.shape[1]
    texts = [ids[:1], ids[1:, pads:]]
    whole = [
        in_pieces(decoder, text, [first - skipped] if first else [])
        for text, skipped in zip(texts, (0, pads), strict=True)
    ]
    scale = max(known.scale, *(float(np.abs(one).max()) for one in whole))
    worst, largest = known.worst, known.difference
    places = [place for place in (1, length // 2, length - 1) if place > first]
    ways = {
        "token by token": list(range(max(first, 1), length)),
        **{f"cut at {place}": [place] if not first else [first, place] for place in places},
    }

    def compare(found: np.ndarray, row: int, way: str) -> None:
        nonlocal worst, largest
        scored = slice(-1 if decoder.ports.last_only else 0, None)
        apart = float(np.abs(found[scored] - whole[row][0, scored]).max())
        if not apart <= largest:
            worst, largest = way, apart

    for way, cuts in ways.items():
        compare(in_pieces(decoder, texts[0], cuts)[0], 0, f"batch 1, {way}")
    if decoder.mixes:
        keep = np.ones(ids.shape, bool)
        keep[1, :pads] = False
        for way, cuts in {"at once": [first] if first else [], **ways}.items():
            found = in_pieces(decoder, ids, cuts, keep)
            compare(found[0], 0, f"batch 2, {way}")
            compare(found[1, pads:], 1, f"batch 2, padded row, {way}")
    return Parity(largest, scale, worst)


def ensure(decoder: Decoder) -> None:
    """Refuse a decoder whose caches change what it computes altogether, at the price of a few short runs.

    Some graphs load and run and are wrong only behind a cache: a causal mask that counts from the first key, positions
    that begin anew. Rounding that depends on what else is computed, as that of dynamically quantized layers, is let
    through.

    Raises:
        InputError: scores behind a cache have nothing to do with those at once.
    """
    ids = (np.arange(1, 7) % (decoder.ports.vocabulary or 7))[None]
    if decoder.ports.rows not in (None, 1) or (decoder.limit or 6) < 6:
        return
    at_once = [3] if decoder.ports.decides else []
    whole, pieces = (in_pieces(decoder, ids, cuts)[:, -1] for cuts in (at_once, [3, 4, 5]))
    apart, scale = float(np.abs(whole - pieces).max()), float(np.abs(whole).max())
    if not apart <= _NOTHING * scale:
        raise InputError(
            f"with its caches the model gives other scores than at once, {apart:.2g} apart of up to {scale:.3g}",
            place=decoder.name,
            hint="export it again; `burnish generate --check` shows more",
        )


def perplexity(decoder: Decoder, texts: Sequence[Tokens], *, piece: int | None = None, first: int = 0) -> float:
    """Exponential of the mean negative log likelihood of each next token of all texts; lower is better.

    Args:
        decoder: what computes.
        texts: token ids [n], n at least 2.
        piece: tokens fed at once, with the caches of those before; None feeds a text at once.
        first: tokens that are fed at once before these; 0 for none.
    """
    losses = []
    for text in texts:
        step = len(text) if piece is None else piece
        scores = in_pieces(decoder, text[None], list(range(first or step, len(text), step)))
        losses.append(negative_log_likelihoods(scores[0, :-1], text[1:]))
    return float(np.exp(np.concatenate(losses).mean()))
