"""Choosing tokens, saying them, and the plain loop over a batch."""

from __future__ import annotations

import numpy as np
import onnx_ir as oir
import pytest

from burnish.backends.decoding import loop
from burnish.backends.decoding.choosing import Sampling, choose, drawn, probabilities
from burnish.backends.decoding.decoder import Decoder
from burnish.backends.decoding.loop import Ask
from burnish.backends.decoding.speaking import Speech
from burnish.ir.errors import InputError
from burnish.tools.decoders import open_decoder
from burnish.tools.research import structures


@pytest.fixture(params=["llama-kv-dynp", "genai-llama"])
def decoder(request: pytest.FixtureRequest) -> Decoder:
    return open_decoder(oir.from_proto(structures.load(request.param)))


def test_greedy_takes_the_first_of_the_largest() -> None:
    scores = np.asarray([1.0, 3.0, 3.0, -1.0])
    assert choose(scores, Sampling(), np.random.default_rng(0)) == 1
    assert probabilities(scores, Sampling()).tolist() == [0, 1, 0, 0]
    with pytest.raises(InputError, match="NaN"):
        choose(np.asarray([1.0, np.nan]), Sampling(), np.random.default_rng(0))


def test_temperature_top_k_and_top_p() -> None:
    parts = np.asarray([0.1, 0.4, 0.2, 0.3])
    scores = np.log(parts)
    np.testing.assert_allclose(probabilities(scores, Sampling(1.0)), parts)
    np.testing.assert_allclose(probabilities(scores, Sampling(0.5)), parts**2 / (parts**2).sum())
    np.testing.assert_allclose(probabilities(scores, Sampling(1.0, top_k=2)), [0, 4 / 7, 0, 3 / 7])
    np.testing.assert_allclose(probabilities(scores, Sampling(1.0, top_p=0.4)), [0, 1, 0, 0])
    np.testing.assert_allclose(probabilities(scores, Sampling(1.0, top_p=0.41)), [0, 4 / 7, 0, 3 / 7])
    np.testing.assert_allclose(probabilities(scores, Sampling(1.0, top_k=3, top_p=0.9)), [0, 4 / 9, 2 / 9, 3 / 9])
    both = probabilities(np.stack([scores, scores[::-1]]), Sampling(1.0, top_k=1))
    assert both.tolist() == [[0, 1, 0, 0], [0, 0, 1, 0]]


def test_tokens_are_drawn_as_often_as_they_are_probable() -> None:
    from scipy import stats

    parts, random = np.asarray([0.5, 0.0, 0.3, 0.2]), np.random.default_rng(0)
    counts = np.bincount([drawn(parts, random) for _ in range(4000)], minlength=4)
    assert counts[1] == 0
    assert stats.chisquare(counts[[0, 2, 3]], 4000 * parts[[0, 2, 3]]).pvalue > 0.01


@pytest.mark.parametrize("given", [{"temperature": -1.0}, {"top_k": -1}, {"top_p": 0.0}, {"top_p": 1.5}, {"seed": -1}])
def test_numbers_out_of_range_are_refused(given: dict[str, float]) -> None:
    with pytest.raises(InputError):
        Sampling(**given)  # type: ignore[arg-type]


def speech(pieces: list[bytes], stops: tuple[str, ...] = ()) -> tuple[list[str], Speech]:
    """Each token is some bytes; an incomplete character shows as the replacement character, as tokenizers have it."""
    made = Speech(lambda ids: b"".join(pieces[i] for i in ids).decode(errors="replace"), stops)
    return [*(made.add(index) for index in range(len(pieces))), made.finish()], made


def test_no_half_character_is_said() -> None:
    said, made = speech([b"a", b"\xc3", b"\xa9", b"b", b"\xe2\x82"])
    assert said == ["a", "", "\xe9", "b", "", "\N{REPLACEMENT CHARACTER}"]
    assert made.text == "a\xe9b\N{REPLACEMENT CHARACTER}"


def test_nothing_is_said_behind_a_stop_string_nor_its_beginning() -> None:
    said, made = speech([b"one. ", b"tw", b"o\n", b"\nthree", b" four"], ("\n\n", "STOP"))
    assert said == ["one. ", "tw", "o", "", "", ""]
    assert made.stopped and made.text == "one. two"
    said, made = speech([b"end S", b"TO"], ("STOP",))
    assert said == ["end ", "", "STO"] and not made.stopped


def test_the_blank_of_the_first_word_is_kept() -> None:
    words = ["Once", " upon", " a"]
    made = Speech(lambda ids: "".join(words[i] for i in ids).lstrip(), before=[0])
    assert [made.add(1), made.add(2)] == [" upon", " a"]


def prompts(lengths: list[int]) -> list[tuple[int, ...]]:
    random = np.random.default_rng(0)
    return [tuple(map(int, random.integers(1, 100, length))) for length in lengths]


def greedy(decoder: Decoder, ids: tuple[int, ...], count: int) -> list[int]:
    """What comes of computing everything again for each token."""
    text = list(ids)
    for _ in range(count):
        text.append(int(decoder.start().feed(np.asarray([text]))[0, -1].argmax()))
    return text[len(ids) :]


def test_a_batch_answers_as_each_row_alone(decoder: Decoder) -> None:
    asks = [Ask(ids, most) for ids, most in zip(prompts([5, 2, 9]), [6, 3, 8], strict=True)]
    told: list[tuple[int, int]] = []
    answers, figures = loop.generate(decoder, asks, lambda row, token: told.append((row, token)) is not None)
    for row, (ask, answer) in enumerate(zip(asks, answers, strict=True)):
        assert answer.ids == greedy(decoder, ask.ids, ask.most) == [token for index, token in told if index == row]
        assert answer.ended == "length"
    assert (figures.prompt_tokens, figures.tokens) == (16, 17) and figures.decode_tokens == 14
    assert figures.cache_bytes > 0 and figures.prefill_seconds > 0 and figures.decode_seconds > 0


def test_samples_do_not_depend_on_the_batch(decoder: Decoder) -> None:
    asks = [Ask(ids, 6, Sampling(1.0, top_k=20, seed=row)) for row, ids in enumerate(prompts([4, 7]))]
    together = [one.ids for one in loop.generate(decoder, asks)[0]]
    assert together == [loop.generate(decoder, [ask])[0][0].ids for ask in asks]
    other = Ask(asks[0].ids, 6, Sampling(1.0, top_k=20, seed=9))
    assert loop.generate(decoder, [other])[0][0].ids != together[0]


def test_what_ends_an_answer(decoder: Decoder) -> None:
    (ids,) = prompts([4])
    expected = greedy(decoder, ids, 5)
    third = expected.index(expected[2])
    (answer,), figures = loop.generate(decoder, [Ask(ids, 5, stops=frozenset({expected[2]}))])
    assert answer == loop.Answer(expected[:third], "stop") and figures.tokens == third + 1
    (answer,), _ = loop.generate(decoder, [Ask(ids, 5)], lambda row, token: True)
    assert answer == loop.Answer(expected[:1], "stop")
    short = Decoder(decoder.ports, decoder.engine, limit=6)
    (answer,), _ = loop.generate(short, [Ask(ids, 5)])
    assert answer == loop.Answer(expected[:3], "range")


def test_long_prompts_are_computed_in_pieces(decoder: Decoder, monkeypatch: pytest.MonkeyPatch) -> None:
    given = prompts([40, 3, 17])
    state, scores = loop.prefill(decoder, given)
    monkeypatch.setattr(loop, "_PIECE_BYTES", 0)
    pieces, same = loop.prefill(decoder, given)
    assert pieces.lengths.tolist() == state.lengths.tolist() == [40, 3, 17]
    np.testing.assert_allclose(same, scores, atol=1e-4 * float(np.abs(scores).max()))


def test_batches_are_of_one_length_where_they_have_to_be(decoder: Decoder) -> None:
    given = prompts([3, 5, 3, 4, 3])
    assert list(loop.batches(decoder, given, 4)) == [[0, 2, 4, 3], [1]]
    decoder._mixes = False
    assert list(loop.batches(decoder, given, 2)) == [[0, 2], [4], [3], [1]]
    assert list(loop.batches(decoder, given, 2, range(5))) == [[0], [1], [2], [3], [4]]


def test_what_cannot_be_asked(decoder: Decoder) -> None:
    for ids, most, cause in [((), 1, "empty"), ((1,), 0, "no answer"), ((500,), 1, "no token 500")]:
        with pytest.raises(InputError, match=cause):
            loop.check(decoder, Ask(ids, most))
