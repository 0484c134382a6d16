"""The plain loop: prompts are computed together, then one token at a time; a row that is done leaves the batch."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from burnish.backends.decoding.choosing import Sampling, choose
from burnish.backends.decoding.decoder import Decoder
from burnish.backends.decoding.state import State
from burnish.ir.errors import InputError

_PIECE_BYTES = 1 << 26
"""Scores that a piece of the prompts may take."""


@dataclass(frozen=True)
class Ask:
    """What is wanted of one row.

    Attributes:
        ids: the tokens of the prompt, at least one.
        most: tokens of the answer at most.
        sampling: how they are chosen; its seed is the row's own, so that an answer does not depend on the batch.
        stops: tokens that end the answer; they are not in it.
    """

    ids: tuple[int, ...]
    most: int
    sampling: Sampling = Sampling()
    stops: frozenset[int] = frozenset()


@dataclass
class Answer:
    """What came of one row.

    Attributes:
        ids: the tokens, without the one that ended it.
        ended: "stop" (a token or the listener ended it), "length" (as many as asked for), or "range" (the model has no
            positions for more).
    """

    ids: list[int] = field(default_factory=list)
    ended: str = ""


@dataclass
class Figures:
    """What it took.

    Attributes:
        prompt_tokens, tokens: of the prompts, and chosen, the stop tokens included.
        prefill_seconds, decode_seconds: for the prompts with the first token of each answer, and for the rest.
        decode_tokens: tokens that were chosen in `decode_seconds`.
        steps: rows of all steps behind the prompts; a plain step chooses one token for each of its rows.
        drafted, accepted: tokens that a draft said, and those of them that were taken.
        fed: tokens that the model computed, padding included.
        cache_bytes: of the arrays that held the caches, those of a draft included, the most at any time behind the
            prompts.
        prompt_bytes: of the caches of the longest prompt, where then only a part of it is kept; 0 elsewhere.
    """

    prompt_tokens: int = 0
    tokens: int = 0
    prefill_seconds: float = 0.0
    decode_seconds: float = 0.0
    decode_tokens: int = 0
    steps: int = 0
    drafted: int = 0
    accepted: int = 0
    fed: int = 0
    cache_bytes: int = 0
    prompt_bytes: int = 0

    def add(self, other: Figures) -> None:
        """Count another batch."""
        self.prompt_tokens += other.prompt_tokens
        self.tokens += other.tokens
        self.prefill_seconds += other.prefill_seconds
        self.decode_seconds += other.decode_seconds
        self.decode_tokens += other.decode_tokens
        self.steps += other.steps
        self.drafted += other.drafted
        self.accepted += other.accepted
        self.fed += other.fed
        self.cache_bytes = max(self.cache_bytes, other.cache_bytes)
        self.prompt_bytes = max(self.prompt_bytes, other.prompt_bytes)


Hear = Callable[[int, int], bool]
"""`hear(row, token)` is told each token of an answer as it is chosen, and gives True to end the answer after it."""
Begin = Callable[[Decoder, Sequence[tuple[int, ...]]], tuple[State, NDArray[np.float32]]]
"""Computes prompts, as `prefill` does."""


class Loop(Protocol):
    """Answers a batch, as `generate` does."""

    def __call__(
        self, decoder: Decoder, asks: Sequence[Ask], hear: Hear | None = None, *, begin: Begin | None = None
    ) -> tuple[list[Answer], Figures]: ...


def check(decoder: Decoder, ask: Ask) -> None:
    """Refuse what cannot be asked of a decoder, before anything is computed.

    Raises:
        InputError: an empty prompt, tokens that the model does not have, or a prompt longer than its range.
    """
    if not ask.ids:
        raise InputError("the prompt is empty", hint="give at least one token")
    if ask.most < 1:
        raise InputError(f"{ask.most} tokens are no answer", hint="ask for at least one")
    decoder.check(np.asarray(ask.ids, np.int64), np.asarray([len(ask.ids)]))


def batches(
    decoder: Decoder, prompts: Sequence[Sequence[int]], size: int, order: Iterable[int] | None = None
) -> Iterator[list[int]]:
    """Which prompts are computed together: neighbours, and of one length where the model needs that.

    Args:
        decoder: what computes.
        prompts: all of them.
        size: rows of a batch at most; a model of a fixed batch has its own.
        order: of all prompts; None is that of their lengths.
    """
    if order is None:
        order = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))
    most = decoder.ports.rows or size
    together: list[int] = []
    for index in order:
        differs = bool(together) and len(prompts[together[0]]) != len(prompts[index])
        if together and (len(together) == most or (differs and not decoder.mixes)):
            yield together
            together = []
        together.append(index)
    if together:
        yield together


def generate(
    decoder: Decoder, asks: Sequence[Ask], hear: Hear | None = None, *, begin: Begin | None = None
) -> tuple[list[Answer], Figures]:
    """Answer a batch.

    Args:
        decoder: what computes.
        asks: the rows of one batch, each as `check` has it; of one length where the decoder does not mix lengths.
        hear: is told every token of an answer.
        begin: what computes the prompts; `prefill` by default.

    Returns:
        The answers in the order of `asks`, and what they took.

    Raises:
        InputError: the model refuses the batch, or its scores are NaN.
    """
    answers, figures = [Answer() for _ in asks], Figures(prompt_tokens=sum(len(ask.ids) for ask in asks))
    randoms = [np.random.default_rng(ask.sampling.seed) for ask in asks]
    begun = time.perf_counter()
    state, scores = (begin or prefill)(decoder, [ask.ids for ask in asks])
    figures.prompt_bytes = state.prompt_bytes
    alive = list(range(len(asks)))
    prompts = True
    while True:
        figures.cache_bytes = max(figures.cache_bytes, state.cache_bytes)
        chosen = [choose(scores[row], asks[index].sampling, randoms[index]) for row, index in enumerate(alive)]
        figures.tokens += len(chosen)
        now = time.perf_counter()
        if prompts:
            figures.prefill_seconds, begun, prompts = now - begun, now, False
        else:
            figures.decode_tokens += len(chosen)
            figures.steps += len(chosen)
        for row, index in enumerate(alive):
            told = None if hear is None else partial(hear, index)
            tell(answers[index], asks[index], chosen[row], state.length(row), decoder.limit, told)
        left = [row for row, index in enumerate(alive) if not answers[index].ended]
        if not left:
            break
        if len(left) < len(alive):
            state = state.select(left)
            alive, chosen = [alive[row] for row in left], [chosen[row] for row in left]
        scores = state.feed(np.asarray(chosen, np.int64)[:, None])[:, 0]
    figures.decode_seconds = time.perf_counter() - begun
    figures.fed = state.fed
    return answers, figures


def tell(
    answer: Answer, ask: Ask, token: int, length: int, limit: int | None, hear: Callable[[int], bool] | None
) -> None:
    """Add a token to an answer, and end the answer where it has to.

    Args:
        answer: gets the token, unless that is one that ends answers, and the reason of its end.
        ask: what is wanted.
        token: the one that was chosen.
        length: tokens that lie before it, those of the prompt included.
        limit: positions that the model has.
        hear: is told the token, and gives True to end the answer after it.
    """
    if token in ask.stops:
        answer.ended = "stop"
        return
    answer.ids.append(token)
    if len(answer.ids) >= ask.most:
        answer.ended = "length"
    elif limit is not None and length >= limit:
        answer.ended = "range"
    if hear is not None and hear(token):
        answer.ended = "stop"


def prefill(decoder: Decoder, prompts: Sequence[Sequence[int]]) -> tuple[State, NDArray[np.float32]]:
    """A state that remembers the prompts, and the scores of the token after each, float32 [rows, vocabulary].

    Where caches have a budget, one prompt is computed after the other, and only what is kept of it is held meanwhile;
    likewise where each prompt decides what is computed, since what all prompts of a batch can do without is little.
    """
    if decoder.keeper is None and (decoder.ports.rows not in (None, 1) or not decoder.ports.decides):
        state = decoder.start(len(prompts))
        return state, fed(state, prompts)
    states, scores = [], []
    for prompt in prompts:
        state = decoder.start()
        scores.append(fed(state, [prompt], 1 if decoder.keeper is None else decoder.keeper.budget.window))
        state.release()
        states.append(state)
    return State.joined(states) if len(states) > 1 else states[0], np.concatenate(scores)


def fed(state: State, texts: Sequence[Sequence[int]], least: int = 1) -> NDArray[np.float32]:
    """Add a text to each row of a state: the scores of the token after each, float32 [rows, vocabulary].

    Long texts are computed in pieces, so that the scores of their tokens, which nobody reads, take little memory. The
    last piece of several has at least so many tokens. What decides for all later tokens is computed at once.
    """
    ids, keep = padded(texts)
    rows, longest = ids.shape
    piece = max(16, min(512, _PIECE_BYTES // (4 * rows * (state.decoder.ports.vocabulary or 1 << 16))))
    piece = longest if state.decoder.ports.decides else piece
    last = np.zeros((rows, 0), np.float32)
    starts = [start for start in range(0, longest, piece) if start == 0 or longest - start >= least]
    for start, end in zip(starts, [*starts[1:], longest], strict=True):
        part = keep[:, start:end]
        scores = state.feed(ids[:, start:end], part)
        if not last.shape[1]:
            last = np.zeros((rows, scores.shape[2]), np.float32)
        ends = keep.sum(1) - 1 - start
        for row in map(int, np.flatnonzero((ends >= 0) & (ends < part.shape[1]))):
            last[row] = scores[row, ends[row]]
    return last


def padded(texts: Sequence[Sequence[int]]) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    """Ids and where there are any, both [rows, tokens of the longest], as `State.feed` takes them."""
    rows, longest = len(texts), max(map(len, texts))
    ids, keep = np.zeros((rows, longest), np.int64), np.zeros((rows, longest), bool)
    for row, text in enumerate(texts):
        ids[row, : len(text)], keep[row, : len(text)] = text, True
    return ids, keep
