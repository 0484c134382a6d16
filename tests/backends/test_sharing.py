"""Prompts computed behind what is held of others: the same answers, as many tokens as predicted, no byte too many."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import onnx_ir as oir
import pytest
from decoding import normal

from burnish.backends.decoding import grouping, loop, sharing, speculating
from burnish.backends.decoding.choosing import Sampling
from burnish.backends.decoding.decoder import Decoder
from burnish.backends.decoding.engine import Engine
from burnish.backends.decoding.loop import Ask
from burnish.backends.decoding.radix import Tree, Work
from burnish.backends.decoding.sharing import Caches, Schedule
from burnish.backends.decoding.state import State
from burnish.ir.errors import InputError
from burnish.ir.samples import Sample
from burnish.passes import catalog, lossy
from burnish.passes.base import Outcome
from burnish.passes.lossy import LossyPass
from burnish.passes.pipeline import Pipeline
from burnish.passes.recipes import NORMAL_FORM
from burnish.tools.decoders import open_decoder
from burnish.tools.lossy_context import context_for
from burnish.tools.research import structures

SLOW = pytest.mark.slow
FAST = "llama-kv-dynp llama-kv-op23 genai-llama genai-window gemma-kv-ts-ort shared cached-gpt2".split()
REST = """
    llama-kv-dynp-fuse llama-kv-ts gemma-kv-dynp gemma-kv-op23 qwen-op23 genai-qwen genai-mha genai-moe int8 fx
""".split()
WAYS = ("grouped", "lru", "flops")


@functools.cache
def opened(name: str) -> Decoder:
    if name == "shared":  # two layers of four read the keys and values of others
        spec = "share-kv{layout=0_1_0_1}"
        model = (
            Pipeline((*NORMAL_FORM, *catalog.parse(spec)))
            .rewrite(oir.from_proto(structures.load("llama-kv-dynp")))
            .model
        )
        return open_decoder(model)
    if name == "cached-gpt2":  # counts its positions by slots: only rows of one length are computed together
        model = normal("gpt2-dynp").clone()
        (one,) = catalog.parse("add-kv-cache")
        one.rewrite(model, Outcome("add-kv-cache"))
        return open_decoder(model)
    if name == "int8":
        model = normal("llama-kv-dynp")
        ids = np.random.default_rng(3).integers(0, 100, (2, 12))
        given: dict[str, np.ndarray] = {"input_ids": ids, "attention_mask": np.ones_like(ids)}
        given["position_ids"] = np.tile(np.arange(12), (2, 1))
        for value in model.graph.inputs:
            if value.dtype == oir.DataType.FLOAT and value.shape is not None:
                given[str(value.name)] = np.zeros(
                    [2, *(n if isinstance(n, int) else 0 for n in value.shape[1:])], np.float32
                )
        one = catalog.make("quantize-cache", {})
        assert isinstance(one, LossyPass)
        sample = Sample("text", {str(value.name): given[str(value.name)] for value in model.graph.inputs})
        edits = one.propose(model, context_for(model, [sample]), Outcome(""))
        return open_decoder(lossy.apply(model, edits, [one])[0])
    if name == "fx":  # a runner that writes into no array of ours
        return open_decoder(oir.from_proto(structures.load("genai-llama")), runtime="fx")
    return open_decoder(oir.from_proto(structures.load(name)))


def asked(count: int = 14, seed: int = 0, most: int = 4) -> list[Ask]:
    """Questions on a few texts with one instruction before all, some twice, some on their own."""
    random = np.random.default_rng(seed)

    def text(length: int) -> tuple[int, ...]:
        return tuple(map(int, random.integers(1, 100, length)))

    instruction, documents = text(19), [text(length) for length in (23, 30, 17)]
    made = []
    for index in range(count):
        document = documents[int(random.integers(3))]
        kind = index % 7
        ids = text(5) if kind == 6 else (*instruction, *(document if kind else ()), *text(int(random.integers(1, 6))))
        sampling = Sampling(0.8, top_k=20, seed=index) if index % 3 == 0 else Sampling()
        made.append(Ask(ids, most, sampling))
    return [*made, *made[2:4]]


@dataclass
class Watching:
    """An engine that counts the tokens it is given."""

    inner: Engine
    ids: str
    tokens: int = 0
    writes: bool = field(init=False)

    def __post_init__(self) -> None:
        self.writes = self.inner.writes

    def call(self, feeds: Mapping[str, Any], into: Mapping[str, Any]) -> dict[str, Any]:
        self.tokens += feeds[self.ids].size
        return self.inner.call(feeds, into)

    def close(self) -> None:
        self.inner.close()


def watched(decoder: Decoder) -> tuple[Decoder, Watching]:
    (ids,) = [port.name for port in decoder.ports.inputs if port.kind == "ids"]
    engine = Watching(decoder.engine, ids)
    made = Decoder(decoder.ports, engine, limit=decoder.limit)
    made._mixes = decoder.mixes
    return made, engine


def scheduled(decoder: Decoder, asks: list[Ask], way: str, size: int, budget: int) -> Schedule:
    prompts = [ask.ids for ask in asks]
    if way == "grouped":
        return sharing.grouped(decoder, prompts, size, budget)
    alphas = (0.0,) if way == "lru" else (0.5, 1.5)
    return sharing.in_order(decoder, prompts, size, budget, alphas, Work(1.0, 0.1))


def answered(
    decoder: Decoder, asks: list[Ask], schedule: Schedule, begun: Any = loop.generate
) -> tuple[list[Any], Any]:
    shared = schedule.start(decoder)
    found: dict[int, Any] = {}
    for batch in schedule.batches:
        answers, _ = begun(decoder, [asks[index] for index in batch], begin=shared.prefill)
        found.update(zip(batch, answers, strict=True))
    return [found[index] for index in range(len(asks))], shared


@functools.cache
def alone(name: str) -> list[loop.Answer]:
    return [loop.generate(opened(name), [ask])[0][0] for ask in asked()]


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The bytes of all arrays that a tree holds, at each time that it counts; more than the budget is an error."""
    found: list[int] = []
    count = Tree._count

    def checked(self: Tree, more: int) -> None:
        count(self, more)
        assert 0 <= self.bytes <= self.budget
        arrays = [one for node in self.nodes() for one in node.held or ()]
        assert all(one.base is None for one in arrays)
        assert sum(one.nbytes for one in arrays) <= self.budget
        found.append(sum(one.nbytes for one in arrays))

    monkeypatch.setattr(Tree, "_count", checked)
    return found


@pytest.mark.parametrize("name", [*FAST, *(pytest.param(one, marks=SLOW) for one in REST)])
def test_answers_are_those_of_prompts_that_share_nothing(name: str, measured: list[int]) -> None:
    decoder, asks = opened(name), asked()
    token = Caches(decoder).token_bytes
    for way in WAYS:
        for size, budget in ((3, 1 << 30), (4, 60 * token), (1, 7 * token)):
            schedule = scheduled(decoder, asks, way, size, budget)
            answers, shared = answered(decoder, asks, schedule)
            assert answers == alone(name), (way, size)
            assert shared.counts == schedule.predicted
            assert shared.tree.most <= budget and not shared.tree._root.pins
            if way == "grouped":
                assert shared.tree.bytes == 0 and not list(shared.tree.nodes())
            assert all(node.pins == 0 for node in shared.tree.nodes())
    assert max(measured) > 0


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", ["llama-kv-dynp", "genai-llama"])
def test_the_model_is_given_as_many_tokens_as_predicted(name: str, way: str) -> None:
    asks = [Ask(ask.ids, 1) for ask in asked()]
    decoder, engine = watched(opened(name))
    schedule = scheduled(decoder, asks, way, 1, 1 << 30)  # rows of a batch would be padded
    shared = schedule.start(decoder)
    took = [loop.generate(decoder, [asks[index]], begin=shared.prefill)[1] for (index,) in schedule.batches]
    assert engine.tokens == sum(one.fed for one in took)
    assert engine.tokens == shared.counts.computed == schedule.predicted.computed
    assert shared.counts.prompts == sum(len(ask.ids) for ask in asks)
    if way == "grouped":
        tree = {ask.ids[:k] for ask in asks for k in range(1, len(ask.ids))}
        plan = grouping.choose([ask.ids for ask in asks], price=sharing.PRICE)
        assert plan.tokens == engine.tokens >= len(tree) + len(asks)
        assert engine.tokens < 0.6 * shared.counts.prompts


def test_rows_of_one_batch_share_what_nobody_held_before() -> None:
    asks = [Ask((*range(1, 41), 50 + row), 2) for row in range(5)]
    decoder = opened("llama-kv-dynp")
    schedule = scheduled(decoder, asks, "lru", 5, 1 << 30)
    _, shared = answered(decoder, asks, schedule)
    assert shared.counts.computed == 40 + 5
    assert len(shared.tree) == 45  # and it stays


def test_a_batch_that_fails_leaves_no_pins(monkeypatch: pytest.MonkeyPatch) -> None:
    asks = asked()
    decoder = opened("llama-kv-dynp")
    for way in ("grouped", "lru"):
        schedule = scheduled(decoder, asks, way, 3, 1 << 30)
        shared = schedule.start(decoder)
        prompts = [[asks[index].ids for index in batch] for batch in schedule.batches]
        for number, batch in enumerate(prompts):
            if number in (1, 3):
                with monkeypatch.context() as context, pytest.raises(InputError, match="refused"):
                    context.setattr(State, "feed", _refused)
                    shared.prefill(decoder, batch)
            else:
                shared.prefill(decoder, batch)
        assert all(node.pins == 0 for node in shared.tree.nodes()) and not shared._pins and not shared._left
        if way == "grouped":
            assert shared.tree.bytes == 0


def _refused(self: State, ids: np.ndarray, keep: np.ndarray | None = None) -> np.ndarray:
    raise InputError("refused")


@pytest.mark.parametrize("name", ["llama-kv-dynp", "genai-llama", "cached-gpt2"])
def test_a_draft_says_the_same(name: str) -> None:
    decoder, asks = opened(name), [Ask(ask.ids, 5) for ask in asked()]
    plain = [loop.generate(decoder, [ask])[0][0] for ask in asks]
    for way in ("grouped", "lru"):
        for calibrate in (False, True):
            schedule = scheduled(decoder, asks, way, 3 if decoder.mixes else 1, 1 << 30)
            begun = partial(speculating.generate, draft=decoder, tokens=2, calibrate=calibrate)
            answers, shared = answered(decoder, asks, schedule, begun)
            assert answers == plain and shared.counts == schedule.predicted


def test_the_weight_of_the_work_is_that_with_the_least_of_it() -> None:
    decoder, asks = opened("llama-kv-dynp"), [ask for seed in range(4) for ask in asked(20, seed, most=1)]
    prompts, work, budget = [ask.ids for ask in asks], Work(1.0, 0.5), 150 * Caches(decoder).token_bytes
    each = {
        alpha: sharing.in_order(decoder, prompts, 2, budget, (alpha,), work).predicted.work for alpha in sharing.ALPHAS
    }
    assert len(set(each.values())) > 1
    best = sharing.in_order(decoder, prompts, 2, budget, sharing.ALPHAS, work)
    assert best.predicted.work == min(each.values()) <= each[0.0]
    assert best.alpha == min(alpha for alpha in each if each[alpha] == best.predicted.work)
    wide = sharing.in_order(decoder, prompts, 2, 1 << 30, sharing.ALPHAS, work)
    assert wide.alpha == 0 and wide.predicted.evicted == 0  # nothing has to go: least recently used is kept


def test_parts_of_caches_own_their_memory() -> None:
    decoder = opened("llama-kv-dynp")
    state = decoder.start()
    state.feed(np.arange(1, 10)[None])
    whole = state.kept(0, 2, 9)
    head, tail = Caches(decoder).part([one.copy() for one in whole], 3)
    for one, first, rest, port in zip(whole, head, tail, decoder.ports.caches, strict=True):
        assert first.base is None and rest.base is None
        np.testing.assert_array_equal(np.concatenate([first, rest], port.time), one)
        assert first.shape == port.sizes(1, 3) and rest.shape == port.sizes(1, 4)


def test_models_of_several_rows_and_models_with_states_are_refused() -> None:
    from dataclasses import replace

    decoder = opened("llama-kv-dynp")
    single = Decoder(replace(decoder.ports, rows=1), decoder.engine)
    answers, _ = answered(single, asked(), scheduled(single, asked(), "grouped", 8, 1 << 30))
    assert answers == alone("llama-kv-dynp")
    fixed = Decoder(replace(decoder.ports, rows=4), decoder.engine)
    with pytest.raises(InputError, match="takes batches of 4, and a beginning of prompts is one row"):
        sharing.grouped(fixed, [(1, 2)], 4, 1 << 20)
    with pytest.raises(InputError, match="is a state that no output is found to continue token by token"):
        opened("mamba-dynp")


def test_rows_are_parted_so_that_the_least_is_paid() -> None:
    def paid(counts: list[int], parts: list[list[int]]) -> int:
        return sum(sharing.PRICE + len(rows) * max(counts[row] for row in rows) for rows in parts)

    def divisions(rows: list[int]) -> Iterator[list[list[int]]]:
        if not rows:
            yield []
            return
        first, rest = rows[0], rows[1:]
        for some in divisions(rest):
            yield [[first], *some]
            for at in range(len(some)):
                yield [*some[:at], [first, *some[at]], *some[at + 1 :]]

    assert sharing.parted([5, 200, 7, 190]) == [[0, 2], [1, 3]]
    assert sharing.parted([5]) == [[0]] and sharing.parted([4, 4, 4]) == [[0, 1, 2]]
    random = np.random.default_rng(0)
    for _ in range(30):
        counts = list(map(int, random.integers(1, 60, 5)))
        found = sharing.parted(counts)
        assert sorted(row for rows in found for row in rows) == list(range(5))
        assert paid(counts, found) == min(paid(counts, one) for one in divisions(list(range(5))))
