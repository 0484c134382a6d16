"""The speculative loop: a draft says several tokens, the model verifies them at once and takes what it would have said.

Leviathan et al. 2023, arXiv:2211.17192. Whatever the draft says, answers are those of the plain loop: the same tokens
where nothing is drawn, and tokens of the same distribution where they are.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from functools import partial

import numpy as np
from numpy.typing import NDArray

from burnish.backends.decoding.choosing import choose, drawn, probabilities, verified
from burnish.backends.decoding.decoder import Decoder
from burnish.backends.decoding.loop import Answer, Ask, Begin, Figures, Hear, padded, prefill, tell
from burnish.backends.decoding.state import State
from burnish.ir.errors import InputError

Odds = NDArray[np.float64]


def check(decoder: Decoder, draft: Decoder, *, calibrate: bool = False) -> None:
    """Refuse a draft that cannot speak for a decoder, at the price of a step of both.

    Raises:
        InputError: their vocabularies differ, the decoder scores the last token only, or one of the two is made for
            several rows, which could not accept different numbers of tokens. Where the draft is to be calibrated: its
            caches are others, or its range is shorter.
    """
    if decoder.ports.last_only:
        raise InputError(
            "the model scores the last token only, so that it verifies no others",
            place=decoder.name,
            hint="export it with the scores of all tokens, or leave out `--draft`",
        )
    for one in (decoder, draft):
        if one.ports.rows not in (None, 1):
            raise InputError(
                f"the model takes batches of {one.ports.rows}, whose rows would have to accept as many tokens each",
                place=one.name,
                hint="export it with a batch that can change, or leave out `--draft`",
            )
    token = np.zeros((1, 1), np.int64)
    sizes = [one.start().feed(token).shape[2] for one in (decoder, draft)]
    if sizes[0] != sizes[1]:
        raise InputError(
            f"the draft has {sizes[1]} tokens, the model {sizes[0]}",
            place=draft.name,
            hint="take a draft with the same vocabulary, such as the model after `optimize -p remove-blocks`",
        )
    if calibrate:
        _check_caches(decoder, draft)


def _check_caches(decoder: Decoder, draft: Decoder) -> None:
    """Refuse a draft that cannot go on from the keys and values of the decoder."""
    layouts = [
        [(one.shape, one.dtype, one.batch, one.time, one.in_place) for one in each.ports.caches]
        for each in (decoder, draft)
    ]
    cause = ""
    if layouts[0] != layouts[1] or decoder.ports.packing != draft.ports.packing:
        cause = f"its {len(layouts[1])} caches are not laid out as the {len(layouts[0])} of the model"
    elif decoder.keeper is not None or draft.keeper is not None:
        cause = "the caches of one of them have budgets"
    elif decoder.ports.decides or draft.ports.decides:
        cause = "one of them decides by the prompt which of its caches it computes"
    elif draft.limit is not None and (decoder.limit is None or decoder.limit > draft.limit):
        cause = f"it has positions for {draft.limit} tokens only"
    if cause:
        raise InputError(
            f"the draft cannot read the caches of the model: {cause}", place=draft.name, hint="leave out `--calibrate`"
        )


def generate(
    decoder: Decoder,
    asks: Sequence[Ask],
    hear: Hear | None = None,
    *,
    draft: Decoder,
    tokens: int = 4,
    calibrate: bool = False,
    begin: Begin | None = None,
) -> tuple[list[Answer], Figures]:
    """Answer a batch, as `loop.generate` does.

    Rows accept different numbers of tokens, and so have different lengths: where one of the models cannot tell such
    rows apart, they are computed one after the other. Beyond the range of the draft, tokens come one by one.

    Args:
        decoder: what decides.
        asks: the rows of one batch.
        hear: is told every token of an answer.
        draft: what says tokens that may be taken; `check` has it.
        tokens: that it says before they are verified, at most.
        calibrate: the draft goes on from the keys and values of the decoder, each time that they are verified, and not
            from its own (EasySpec, arXiv:2502.02493); it computes no prompt then.

    Returns:
        The answers in the order of `asks`, and what they took.

    Raises:
        InputError: a model refuses the batch, or its scores are NaN.
    """
    if len(asks) == 1 or (decoder.mixes and draft.mixes):
        return _together(decoder, asks, hear, draft, tokens, calibrate, begin or prefill)
    answers, figures = [], Figures()
    for index, ask in enumerate(asks):
        told = None if hear is None else partial(_told, hear, index)
        found, took = _together(decoder, [ask], told, draft, tokens, calibrate, begin or prefill)
        answers += found
        figures.add(took)
    return answers, figures


def _told(hear: Hear, index: int, _: int, token: int) -> bool:
    return hear(index, token)


def _together(
    decoder: Decoder,
    asks: Sequence[Ask],
    hear: Hear | None,
    draft: Decoder,
    tokens: int,
    calibrate: bool,
    begin: Begin,
) -> tuple[list[Answer], Figures]:
    rows = [_Row(ask, index, hear, decoder.limit) for index, ask in enumerate(asks)]
    answers, figures = [row.answer for row in rows], Figures(prompt_tokens=sum(len(ask.ids) for ask in asks))
    begun = time.perf_counter()
    state, scores = begin(decoder, [ask.ids for ask in asks])
    figures.prompt_bytes = state.prompt_bytes
    drafting = state.lent(draft) if calibrate else prefill(draft, [ask.ids[: draft.limit] for ask in asks])[0]
    for row, last in zip(rows, scores, strict=True):
        row.add([choose(last, row.ask.sampling, row.random)])
    figures.tokens = len(rows)
    figures.prefill_seconds = time.perf_counter() - begun
    begun = time.perf_counter()
    while True:
        figures.cache_bytes = max(figures.cache_bytes, state.cache_bytes + drafting.cache_bytes)
        left = [place for place, row in enumerate(rows) if not row.answer.ended]
        if not left:
            break
        if len(left) < len(rows):
            state, drafting, rows = state.select(left), drafting.select(left), [rows[place] for place in left]
        # Before it is fed, the state lacks the last token of each row only.
        known = [len(row.text) - 1 for row in rows]
        state.truncate(known)
        if calibrate:
            drafting = state.lent(draft)
        else:
            drafting.truncate(np.minimum(drafting.lengths, known))
        said = _drafts(drafting, rows, [row.room(tokens, draft.limit) for row in rows])
        ids, keep = padded([[row.text[-1], *each] for row, (each, _) in zip(rows, said, strict=True)])
        scores = state.feed(ids, keep)
        for row, found, (each, odds) in zip(rows, scores, said, strict=True):
            wanted = probabilities(found[: len(each) + 1], row.ask.sampling)
            count, token = verified(wanted, odds, each, row.random)
            figures.decode_tokens += row.add([*each[:count], token])
            figures.drafted += len(each)
            figures.accepted += count
        figures.steps += len(rows)
    figures.tokens += figures.decode_tokens
    figures.decode_seconds = time.perf_counter() - begun
    figures.fed = state.fed
    return answers, figures


class _Row:
    """A row while it is answered.

    Attributes:
        ask, answer: what is wanted, and what there is.
        random: the numbers of this row, so that its answer does not depend on the batch.
        text: the tokens of the prompt and of the answer.
    """

    def __init__(self, ask: Ask, index: int, hear: Hear | None, limit: int | None) -> None:
        self.ask, self.answer = ask, Answer()
        self.random = np.random.default_rng(ask.sampling.seed)
        self.text = list(ask.ids)
        self._hear = None if hear is None else partial(hear, index)
        self._limit = limit

    def add(self, tokens: Sequence[int]) -> int:
        """Add tokens until the answer ends; how many were looked at."""
        for count, token in enumerate(tokens, 1):
            tell(self.answer, self.ask, token, len(self.text), self._limit, self._hear)
            self.text.append(token)
            if self.answer.ended:
                return count
        return len(tokens)

    def room(self, tokens: int, limit: int | None) -> int:
        """How many tokens a draft with so many positions may say now, such that all can be taken and one behind."""
        most = min(tokens, self.ask.most - len(self.answer.ids) - 1)
        if self._limit is not None:
            most = min(most, self._limit - len(self.text))
        if limit is not None:
            most = min(most, limit - len(self.text) + 1)
        return max(most, 0)


def _drafts(state: State, rows: Sequence[_Row], counts: Sequence[int]) -> list[tuple[list[int], Odds]]:
    """What the draft says behind each row, at most `counts` tokens, and the distributions they were drawn of."""
    said: list[list[int]] = [[] for _ in rows]
    odds: list[list[Odds]] = [[] for _ in rows]
    behind = [row.text[state.length(place) :] if counts[place] else [] for place, row in enumerate(rows)]
    while any(behind):
        scores = state.feed(*padded(behind))
        for place, row in enumerate(rows):
            if behind[place]:
                found = probabilities(scores[place, len(behind[place]) - 1], row.ask.sampling)
                token = drawn(found, row.random)
                said[place].append(token)
                odds[place].append(found)
                more = len(said[place]) < counts[place] and token not in row.ask.stops
                behind[place] = [token] if more else []
    return [(one, np.asarray(each)) for one, each in zip(said, odds, strict=True)]
