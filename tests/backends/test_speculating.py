"""Speculative decoding: whatever a draft says, answers are those of the plain loop."""

from __future__ import annotations

import functools
from collections import Counter
from dataclasses import replace
from functools import partial
from pathlib import Path
from unittest import mock

import numpy as np
import onnx_ir as oir
import pytest
from onnx import numpy_helper

from burnish.backends.decoding import loop, speculating
from burnish.backends.decoding.choosing import Sampling, probabilities, verified
from burnish.backends.decoding.decoder import Decoder
from burnish.backends.decoding.loop import Ask
from burnish.ir.errors import InputError
from burnish.passes import catalog
from burnish.passes.pipeline import Pipeline
from burnish.passes.recipes import NORMAL_FORM
from burnish.tools.decoders import open_decoder
from burnish.tools.research import structures, zoo_handmade

SPELLINGS = ("llama-kv-dynp", "llama-kv-op23", "genai-llama")


@functools.cache
def opened(name: str) -> Decoder:
    return open_decoder(oir.from_proto(structures.load(name)))


@functools.cache
def near(name: str) -> Decoder:
    """The model with other weights, by a tenth of their size: it agrees at times."""
    model, random = structures.load(name), np.random.default_rng(0)
    for tensor in model.graph.initializer:
        value = numpy_helper.to_array(tensor)
        if value.dtype == np.float32 and value.ndim > 1 and value.size > 100:
            moved = value + 0.1 * value.std() * random.standard_normal(value.shape)
            tensor.CopyFrom(numpy_helper.from_array(moved.astype(np.float32), tensor.name))
    return open_decoder(oir.from_proto(model))


@functools.cache
def shorter(name: str) -> Decoder:
    """The model without its second block, which was random: it hardly ever agrees."""
    model = oir.from_proto(structures.load(name))
    return open_decoder(Pipeline((*NORMAL_FORM, *catalog.parse("remove-blocks{blocks=1}"))).rewrite(model).model)


def prompts(lengths: list[int], seed: int = 0) -> list[tuple[int, ...]]:
    random = np.random.default_rng(seed)
    return [tuple(map(int, random.integers(1, 100, length))) for length in lengths]


def _keep(told: list[tuple[int, int]], row: int, token: int) -> bool:
    told.append((row, token))
    return False


@pytest.mark.parametrize("name", SPELLINGS)
@pytest.mark.parametrize(("tokens", "calibrate"), [(1, False), (4, False), (3, True)])
def test_greedy_answers_are_those_of_the_plain_loop(name: str, tokens: int, calibrate: bool) -> None:
    decoder, draft = opened(name), near(name)
    drafted = accepted = 0
    for seed, lengths in enumerate([[3], [5, 2, 9, 4], [6, 6, 6]]):
        asks = [Ask(ids, 20 + row) for row, ids in enumerate(prompts(lengths, seed))]
        expected, plain = loop.generate(decoder, asks)
        told: list[tuple[int, int]] = []
        hear = partial(_keep, told)
        answers, figures = speculating.generate(decoder, asks, hear, draft=draft, tokens=tokens, calibrate=calibrate)
        assert answers == expected
        assert [[token for index, token in told if index == row] for row in range(len(asks))] == [
            one.ids for one in answers
        ]
        assert (figures.prompt_tokens, figures.tokens, figures.decode_tokens) == (
            plain.prompt_tokens,
            plain.tokens,
            plain.decode_tokens,
        )
        assert figures.steps < plain.steps == plain.decode_tokens
        assert figures.decode_tokens == figures.accepted + figures.steps
        drafted, accepted = drafted + figures.drafted, accepted + figures.accepted
    assert 0 < accepted < drafted


@pytest.mark.parametrize("name", SPELLINGS)
@pytest.mark.parametrize("calibrate", [False, True])
def test_of_a_draft_that_is_the_model_all_is_taken(name: str, calibrate: bool) -> None:
    decoder = opened(name)
    asks = [Ask(ids, 21) for ids in prompts([5, 2, 9])]
    answers, figures = speculating.generate(decoder, asks, draft=decoder, tokens=4, calibrate=calibrate)
    assert answers == loop.generate(decoder, asks)[0]
    assert figures.accepted == figures.drafted == 3 * 16 and figures.steps == 3 * 4
    drawn = [Ask(ids, 21, Sampling(1.0, seed=row)) for row, ids in enumerate(prompts([5, 2, 9]))]
    _, figures = speculating.generate(decoder, drawn, draft=decoder, tokens=4, calibrate=calibrate)
    assert figures.accepted >= 0.95 * figures.drafted


@pytest.mark.parametrize("name", SPELLINGS)
def test_a_draft_that_knows_nothing_changes_nothing(name: str) -> None:
    decoder, draft = opened(name), shorter(name)
    asks = [Ask(ids, 12) for ids in prompts([5, 2])]
    answers, figures = speculating.generate(decoder, asks, draft=draft)
    assert answers == loop.generate(decoder, asks)[0] and figures.accepted < 0.5 * figures.drafted


@pytest.mark.parametrize("calibrate", [False, True])
def test_samples_do_not_depend_on_the_batch(calibrate: bool) -> None:
    decoder, draft = opened("llama-kv-dynp"), near("llama-kv-dynp")
    asks = [Ask(ids, 9 + row, Sampling(1.0, top_k=20, seed=row)) for row, ids in enumerate(prompts([4, 7, 2]))]
    answer = partial(speculating.generate, draft=draft, calibrate=calibrate)
    assert answer(decoder, asks)[0] == [answer(decoder, [ask])[0][0] for ask in asks]


@pytest.mark.parametrize("name", SPELLINGS)
def test_what_ends_an_answer(name: str) -> None:
    decoder, draft = opened(name), near(name)
    asks = [Ask(ids, 24) for ids in prompts([4, 6])]
    whole = loop.generate(decoder, asks)[0]
    for place in (0, 3, 7):
        ends = [Ask(ask.ids, 24, stops=frozenset({one.ids[place]})) for ask, one in zip(asks, whole, strict=True)]
        assert speculating.generate(decoder, ends, draft=draft)[0] == loop.generate(decoder, ends)[0]
        counts: Counter[int] = Counter()

        def hear(row: int, _: int, counts: Counter[int] = counts, place: int = place) -> bool:
            counts[row] += 1
            return counts[row] > place + row

        answers, figures = speculating.generate(decoder, asks, hear, draft=decoder)
        assert [(one.ids, one.ended) for one in answers] == [
            (one.ids[: place + row + 1], "stop") for row, one in enumerate(whole)
        ]
        assert figures.tokens == 2 * place + 3
    for limit in range(6, 16):
        short = Decoder(decoder.ports, decoder.engine, limit=limit)
        assert speculating.generate(short, asks, draft=draft)[0] == loop.generate(short, asks)[0]


@pytest.mark.parametrize("name", SPELLINGS)
def test_beyond_the_range_of_the_draft_tokens_come_one_by_one(name: str) -> None:
    decoder = opened(name)
    draft = Decoder(decoder.ports, decoder.engine, limit=10)
    asks = [Ask(ids, 20) for ids in prompts([12, 4, 10])]
    answers, figures = speculating.generate(decoder, asks, draft=draft)
    assert answers == loop.generate(decoder, asks)[0]
    # Only behind the prompt of four tokens there is room: four tokens after the first of the answer, and, once the
    # draft could remember the tenth token of the text and no more, one.
    assert figures.accepted == figures.drafted == 4 + 1


def test_rows_go_one_by_one_where_lengths_cannot_be_mixed() -> None:
    decoder, draft = opened("llama-kv-dynp"), near("llama-kv-dynp")
    alike = Decoder(decoder.ports, decoder.engine)
    alike._mixes = False
    asks = [Ask(ids, 10) for ids in prompts([5, 5])]
    told: list[tuple[int, int]] = []
    answers, figures = speculating.generate(alike, asks, partial(_keep, told), draft=draft)
    assert answers == loop.generate(decoder, asks)[0] and figures.prompt_tokens == 10
    assert told == [(row, token) for row, one in enumerate(answers) for token in one.ids]


def test_a_calibrated_draft_remembers_what_the_model_does() -> None:
    decoder, draft = opened("llama-kv-dynp"), near("llama-kv-dynp")
    (ids,) = prompts([7])
    state = decoder.start()
    state.feed(np.asarray([ids]))
    lent = state.lent(draft)
    found = lent.feed(np.asarray([[3, 4]]))
    other = draft.start()
    other.feed(np.asarray([ids]))
    assert np.abs(found - other.feed(np.asarray([[3, 4]]))).max() > 1e-3
    assert (state.length(), lent.length()) == (7, 9)
    with pytest.raises(InputError, match="its 6 caches are not laid out as the 8 of the model"):
        speculating.check(decoder, shorter("llama-kv-dynp"), calibrate=True)


def test_a_token_is_taken_or_replaced_such_that_the_distribution_stays() -> None:
    from scipy import stats

    random = np.random.default_rng(0)
    wanted = np.asarray([[0.5, 0.2, 0.3, 0.0], [0.1, 0.0, 0.6, 0.3], [0.25, 0.25, 0.25, 0.25]])
    said = np.asarray([[0.1, 0.6, 0.2, 0.1], [0.0, 0.4, 0.3, 0.3]])
    found: Counter[tuple[int, ...]] = Counter()
    for _ in range(8000):
        draft = [int(random.choice(4, p=odds)) for odds in said]
        count, token = verified(wanted, said, draft, random)
        text = [*draft[:count], token]
        for place in range(len(text), 3):
            text.append(int(random.choice(4, p=wanted[place])))
        found[tuple(text)] += 1
    every = [(one, two, three) for one in range(4) for two in range(4) for three in range(4)]
    expected = np.asarray([8000 * wanted[0, a] * wanted[1, b] * wanted[2, c] for a, b, c in every])
    counts = np.asarray([found[text] for text in every])
    assert counts[expected == 0].sum() == 0
    assert stats.chisquare(counts[expected > 0], expected[expected > 0]).pvalue > 0.01


@pytest.mark.parametrize("sampling", [Sampling(1.5, top_k=3), Sampling(0.9, top_p=0.3)])
def test_drawn_answers_have_the_distribution_of_the_model(sampling: Sampling) -> None:
    from scipy import stats

    decoder, draft = opened("llama-kv-dynp"), near("llama-kv-dynp")
    (ids,) = prompts([5])

    def odds(text: tuple[int, ...]) -> np.ndarray:
        return probabilities(decoder.start().feed(np.asarray([text]))[0, -1], sampling)

    first = odds(ids)
    both = {
        (int(one), int(two)): first[one] * second[two]
        for one in np.flatnonzero(first)
        for second in [odds((*ids, int(one)))]
        for two in np.flatnonzero(second)
    }
    found: Counter[tuple[int, ...]] = Counter()
    rows, drafted, accepted = 250, 0, 0
    for start in range(0, 1500, rows):
        drawn = [Sampling(sampling.temperature, sampling.top_k, sampling.top_p, start + row) for row in range(rows)]
        answers, figures = speculating.generate(decoder, [Ask(ids, 3, one) for one in drawn], draft=draft)
        found.update(tuple(one.ids[:2]) for one in answers)
        drafted, accepted = drafted + figures.drafted, accepted + figures.accepted
    assert 0.1 < accepted / drafted < 0.9
    assert set(found) <= set(both)
    often = [text for text, part in both.items() if part >= 0.005]
    counts = [found[text] for text in often]
    expected = [1500 * both[text] for text in often]
    rare = 1500 - sum(expected)
    if rare > 5:
        counts, expected = [*counts, 1500 - sum(counts)], [*expected, rare]
    assert stats.chisquare(counts, expected, sum_check=False).pvalue > 0.01


def test_drafts_that_cannot_be(tmp_path: Path) -> None:
    decoder, draft = opened("llama-kv-dynp"), near("llama-kv-dynp")
    speculating.check(decoder, draft)
    with mock.patch.dict(vars(zoo_handmade), {"VOCABULARY": 400}):
        zoo_handmade.Builder(layers=1).write(tmp_path / "other.onnx")
    other = open_decoder(tmp_path / "other.onnx")
    with pytest.raises(InputError, match="the draft has 400 tokens, the model 500"):
        speculating.check(decoder, other)
    for ports, cause in [
        (replace(decoder.ports, last_only=True), "the last token only"),
        (replace(decoder.ports, rows=2), "of 2"),
    ]:
        with pytest.raises(InputError, match=cause):
            speculating.check(Decoder(ports, decoder.engine), draft)
    with pytest.raises(InputError, match="NaN"):
        probabilities(np.asarray([0.0, np.nan]), Sampling(1.0))
