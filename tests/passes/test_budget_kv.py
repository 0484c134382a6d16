"""Caches that keep a part of the prompt: what is computed is what torch computes with the kept keys and values."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import msgspec
import numpy as np
import onnx_ir as oir
import pytest
import torch
from block_networks import exported
from decoding import normal
from golden import parse_graph, prepare
from laws import OrtRunner
from small_llama import HEADS, KEY_HEADS, SIZE, Decoder
from small_llama import decoder as small_decoder
from torch import nn
from torch.nn import functional as F

from burnish.backends.decoding import decoder as decoding
from burnish.backends.decoding import feeding, loop, parity, speculating
from burnish.backends.decoding.loop import Ask
from burnish.ir.errors import InputError
from burnish.ir.inference import Inference
from burnish.ir.samples import Sample
from burnish.ir.views.ramps import read_ramp
from burnish.passes import catalog, kv_budget, kv_compress, recipes
from burnish.passes.base import Outcome
from burnish.passes.budget import Amount
from burnish.passes.kv_budget import MILLION, Budget, BudgetedCache, Queries
from burnish.passes.kv_needs import Seen, attention, pooled
from burnish.passes.lossy import LossyPass
from burnish.passes.pipeline import Pipeline
from burnish.passes.recipes import NORMAL_FORM
from burnish.tools.decoders import open_decoder
from burnish.tools.lossy_context import context_for

SPELLINGS = ("llama-kv-dynp", "llama-kv-op23", "llama-kv-dynp-fuse", "genai-mha", "genai-llama", "genai-window")
MORE = (
    "genai-qwen",
    "genai-moe",
    "llama-kv-ts",
    "llama-kv-eager",
    "llama-kv-dyn",
    "qwen-ts",
    "qwen-op23",
    "gemma-kv-dynp",
    "gemma-kv-op23",
)
WINDOW, POOL = 3, 3


def parsed(options: str) -> LossyPass:
    (one,) = catalog.parse(f"budget-kv{{{options}}}")
    assert isinstance(one, LossyPass)
    return one


def budgeted(model: oir.Model, options: str, window: int = WINDOW) -> oir.Model:
    """A copy with a uniform budget."""
    after, outcome = model.clone(), Outcome("budget-kv")
    parsed(f"{options};by=uniform;window={window};pool={POOL}").rewrite(after, outcome)
    assert outcome.rewritten == 1
    return after


def opened(model: oir.Model) -> decoding.Decoder:
    return open_decoder(model)


def prompts(*lengths: int, words: int = 60, seed: int = 0) -> list[list[int]]:
    random = np.random.default_rng(seed)
    return [random.integers(1, words, length).tolist() for length in lengths]


class Cached(nn.Module):
    """The small decoder with a mask, positions and caches."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = Decoder()

    def forward(self, ids, seen, positions, *past):  # type: ignore[no-untyped-def]
        x, kept = self.inner.table(ids), []
        before, (batch, new) = past[0].shape[2], ids.shape
        later = torch.arange(before + new)[None] > before + torch.arange(new)[:, None]
        bias = torch.where(later | (seen[:, None, None] == 0), -1e9, 0.0)
        angles = positions[:, None, :, None] * 0.3 ** torch.arange(SIZE // 2)
        for index, layer in enumerate(self.inner.layers):
            q, k, v = projected(layer, layer.before(x), angles)
            k, v = (torch.cat([old, one], 2) for old, one in zip(past[2 * index : 2 * index + 2], (k, v), strict=True))
            kept += [k, v]
            z = attended(q, k, v, bias).transpose(1, 2).reshape(batch, new, HEADS * SIZE)
            x = through(layer, x, z)
        return (F.linear(self.inner.last(x), self.inner.table.weight), *kept)


def rotated(x, angles):  # type: ignore[no-untyped-def]
    first, second = x.chunk(2, -1)
    cos, sin = (torch.cat((one, one), -1) for one in (angles.cos(), angles.sin()))
    return x * cos + torch.cat((-second, first), -1) * sin


def projected(layer, y, angles):  # type: ignore[no-untyped-def]
    batch, length, _ = y.shape
    q, k, v = (one(y).view(batch, length, -1, SIZE).transpose(1, 2) for one in (layer.q, layer.k, layer.v))
    return rotated(q, angles), rotated(k, angles), v


def attended(q, k, v, bias):  # type: ignore[no-untyped-def]
    batch, heads, total, _ = k.shape
    k, v = (
        one[:, :, None].expand(batch, heads, HEADS // heads, total, SIZE).reshape(batch, HEADS, total, SIZE)
        for one in (k, v)
    )
    return (q @ k.transpose(2, 3) * SIZE**-0.5 + bias).softmax(-1) @ v


def through(layer, x, z):  # type: ignore[no-untyped-def]
    x = x + layer.o(z)
    y = layer.between(x)
    return x + layer.down(F.silu(layer.gate(y)) * layer.up(y))


@cache
def small() -> tuple[Cached, oir.Model]:
    """The module and its graph in normal form."""
    torch.manual_seed(3)
    module = Cached().eval()
    past = [torch.randn(2, KEY_HEADS, 4, SIZE) for _ in range(4)]
    names = [f"past.{index}" for index in range(4)]
    ids, seen = torch.arange(6).reshape(2, 3), torch.ones(2, 7, dtype=torch.int64)
    positions = torch.arange(4, 7)[None].repeat(2, 1)
    axes = {"ids": {0: "batch", 1: "new"}, "seen": {0: "batch", 1: "total"}, "positions": {0: "batch", 1: "new"}}
    axes |= {name: {0: "batch", 2: "past"} for name in names}
    model = exported(
        module, (ids, seen, positions, *past), [*axes], ["logits", *(f"present.{index}" for index in range(4))], axes
    )
    return module, Pipeline(NORMAL_FORM).rewrite(model).model


def by_hand(module: Cached, prompt: Sequence[int], after: Sequence[int], counts: Sequence[int]) -> np.ndarray:
    """The scores behind each token of `after`, one row, token by token, with what each layer keeps of the prompt."""
    decoder, kept = module.inner, []
    x = decoder.table(torch.tensor([list(prompt)]))
    length = len(prompt)
    steps = 0.3 ** torch.arange(SIZE // 2)
    later = torch.arange(length)[None] > torch.arange(length)[:, None]
    for layer, count in zip(decoder.layers, counts, strict=True):
        q, k, v = projected(layer, layer.before(x), torch.arange(length)[:, None] * steps)
        z = attended(q, k, v, torch.where(later, -torch.inf, 0.0))
        x = through(layer, x, z.transpose(1, 2).reshape(1, length, HEADS * SIZE))
        kept.append([])
        for head in range(KEY_HEADS):
            weights = torch.zeros(length - WINDOW)
            for query in range(head * (HEADS // KEY_HEADS), (head + 1) * (HEADS // KEY_HEADS)):
                for place in range(length - WINDOW, length):
                    seen = (q[0, query, place] @ k[0, head, : place + 1].T * SIZE**-0.5).softmax(-1)
                    weights += seen[: length - WINDOW]
            near = F.pad(weights, (POOL // 2, POOL // 2)).unfold(0, POOL, 1).mean(-1)
            best = near.argsort(descending=True, stable=True)[: count - WINDOW].tolist()
            chosen = sorted(best) + list(range(length - WINDOW, length))
            kept[-1].append((k[0, head, chosen], v[0, head, chosen]))
    scores = []
    for position, token in enumerate(after, length):
        x = decoder.table(torch.tensor([[token]]))
        for layer, heads in zip(decoder.layers, kept, strict=True):
            q, k, v = projected(layer, layer.before(x), torch.tensor([[position]]) * steps)
            results = []
            for head, (keys, values) in enumerate(heads):
                heads[head] = keys, values = torch.cat([keys, k[0, head]]), torch.cat([values, v[0, head]])
                own = q[0, head * (HEADS // KEY_HEADS) : (head + 1) * (HEADS // KEY_HEADS), 0]
                results.append((own @ keys.T * SIZE**-0.5).softmax(-1) @ values)
            x = through(layer, x, torch.cat(results).reshape(1, 1, HEADS * SIZE))
        scores.append(F.linear(decoder.last(x), decoder.table.weight)[0, 0])
    return torch.stack(scores).numpy()


def test_prompts_of_several_lengths_go_on_as_torch_computes_with_what_is_kept() -> None:
    module, model = small()
    decoder = opened(budgeted(model, "keep=40%"))
    assert decoder.keeper is not None
    texts, after = prompts(25, 11, 17), prompts(6, 6, 6, seed=1)
    state, _ = loop.prefill(decoder, texts)
    got = [state.feed(np.array([row[at : at + 1] for row in after])) for at in range(3)]
    got.append(state.feed(np.array([row[3:] for row in after])))
    found = np.concatenate(got, 1)
    with torch.no_grad():
        for row, (text, more) in enumerate(zip(texts, after, strict=True)):
            counts = decoder.keeper.budget.counts(len(text)).tolist()
            assert sum(counts) == int(0.4 * 2 * len(text)) and max(counts) < len(text)
            np.testing.assert_allclose(found[row], by_hand(module, text, more, counts), atol=1e-4)
            whole = opened(model)
            other = parity.in_pieces(whole, np.array([[*text, *more]]), [])[0, len(text) :]
            assert np.abs(found[row] - other).max() > 1e-2


@pytest.mark.parametrize("name", [*SPELLINGS, *(pytest.param(one, marks=pytest.mark.slow) for one in MORE)])
def test_a_budget_of_everything_changes_nothing(name: str) -> None:
    before = normal(name)
    after = budgeted(before, "keep=100%")
    asks = [Ask(tuple(text), 6) for text in prompts(21, 13)]
    plain, _ = loop.generate(opened(before), asks)
    kept, figures = loop.generate(opened(after), asks)
    assert [one.ids for one in kept] == [one.ids for one in plain]
    found = parity.parity(opened(after), length=9)
    assert found.relative < 1e-4
    one = opened(after)
    ids = np.array(prompts(9, 9))
    np.testing.assert_array_equal(parity.in_pieces(one, ids, [4]), parity.in_pieces(opened(before), ids, [4]))


@pytest.mark.parametrize("name", SPELLINGS)
@pytest.mark.parametrize("keep", ["30%", "8"])
def test_caches_are_as_large_as_the_budget_and_rows_go_on_as_alone(name: str, keep: str) -> None:
    decoder = opened(budgeted(normal(name), f"keep={keep}"))
    assert decoder.keeper is not None
    texts, budget = prompts(40, 23, 6), decoder.keeper.budget
    state, _ = loop.prefill(decoder, texts[:1])
    layers, whole = len(budget.caches), len(decoder.ports.caches) // 2
    assert budget.counts(40).sum() == (layers * 12 if keep == "30%" else layers * 8)
    one = next(port for port in decoder.ports.caches)
    token = int(np.prod([size or 1 for size in one.sizes(1, 1)])) * one.dtype.itemsize
    assert state.cache_bytes == 2 * (int(budget.counts(40).sum()) + 40 * (whole - layers)) * token
    asks = [Ask(tuple(text), 7) for text in texts]
    together, figures = loop.generate(decoder, asks)
    assert [one.ids for one in together] == [loop.generate(decoder, [ask])[0][0].ids for ask in asks]


CAUSAL = """<opset_import: ["": 23]>
g (int64[N, S] ids, bool[N, 1, S, T] seen, float[N, 2, P, 2] past_key, float[N, 2, P, 2] past_value)
  => (float[N, S, 60] y, float[N, 2, L, 2] key, float[N, 2, L, 2] value)
<float[60, 4] table, float[4, 4] q, float[4, 4] k, float[4, 4] v, float[4, 4] o, float[4, 60] head> {
  x = Gather (table, ids)  a = MatMul (x, q)  b = MatMul (x, k)  c = MatMul (x, v)
  w, key, value = Attention <is_causal = 1, q_num_heads = 2, kv_num_heads = 2> (a, b, c, seen, past_key, past_value)
  n = MatMul (w, o)  r = Add (x, n)  y = MatMul (r, head)
}"""
"""A model without positions, whose operator hides later keys itself."""


def cached(name: str) -> oir.Model:
    """A packed model, with caches."""
    if name == "causal":
        return prepare(parse_graph(CAUSAL), parsed("by=uniform"))
    if not name.startswith("gpt2"):
        return normal(name)
    model = normal(name).clone()
    catalog.parse("add-kv-cache")[0].rewrite(model, Outcome("add-kv-cache"))
    return Pipeline(NORMAL_FORM).rewrite(model).model


@pytest.mark.parametrize("name", [*SPELLINGS[:4], "gpt2-dynp", "causal"])
def test_keeping_the_last_tokens_is_masking_the_others(name: str) -> None:
    """With explicit positions and with those that the model counts itself, which are those of the whole text."""
    model, window, length, steps = cached(name), 5, 20, 4
    decoder, (text,) = opened(budgeted(model, "keep=1%", window)), prompts(length + steps)
    state, _ = loop.prefill(decoder, [text[:length]])
    assert {one.shape[port.time] for one, port in zip(state._caches, decoder.ports.caches, strict=True)} == {window}
    plain = opened(model)
    known, _ = loop.prefill(plain, [text[:length]])
    caches = {port.past: cache_ for port, cache_ in zip(plain.ports.caches, known._caches, strict=True)}
    for at in range(length, length + steps):
        feeds = feeding.inputs(plain.ports, np.array([text[at : at + 1]]), np.array([at]), at)
        (mask,) = [port.name for port in plain.ports.inputs if port.kind == "mask"]
        feeds[mask][..., : length - window] = 0
        wanted = plain.engine.call({**feeds, **caches}, {})
        caches = {port.past: wanted[port.present] for port in plain.ports.caches}
        found, scores = state.feed(np.array([text[at : at + 1]])), wanted[plain.ports.logits]
        np.testing.assert_allclose(found, scores, atol=1e-4 * float(np.abs(scores).max()))


def test_every_spelling_keeps_the_same() -> None:
    found = []
    for name in ("llama-kv-dynp", "llama-kv-op23", "llama-kv-dynp-fuse"):
        decoder = opened(budgeted(normal(name), "keep=30%"))
        state, _ = loop.prefill(decoder, prompts(30, 17))
        found.append(state.feed(np.array([[5, 6], [7, 8]])))
    for other in found[1:]:
        np.testing.assert_allclose(other, found[0], atol=1e-4 * float(np.abs(found[0]).max()))


def test_short_prompts_and_windows_stay_whole() -> None:
    model = normal("llama-kv-dynp")
    decoder = opened(budgeted(model, "keep=12", window=4))
    state, _ = loop.prefill(decoder, prompts(12))
    assert state.cache_bytes == loop.prefill(opened(model), prompts(12))[0].cache_bytes
    decoder = opened(budgeted(model, "keep=10%", window=8))
    assert decoder.keeper is not None and decoder.keeper.budget.counts(20).tolist() == [8, 8, 8, 8]
    plain, _ = loop.prefill(opened(model), prompts(20))
    state, _ = loop.prefill(decoder, prompts(20))
    for kept, whole in zip(state._caches, plain._caches, strict=True):
        np.testing.assert_array_equal(kept, whole[:, :, -8:])


def test_the_last_piece_of_a_long_prompt_has_the_whole_window(monkeypatch: pytest.MonkeyPatch) -> None:
    decoder = opened(budgeted(normal("llama-kv-dynp"), "keep=30%", window=10))
    (text,) = prompts(37)
    once, _ = loop.prefill(decoder, [text])
    monkeypatch.setattr(loop, "_PIECE_BYTES", 4 * 500 * 16)
    pieces, _ = loop.prefill(decoder, [text])
    for one, other in zip(once._caches, pieces._caches, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5)


@pytest.mark.parametrize(("name", "pairs"), [("llama-kv-dynp", "1:0+3:2"), ("genai-llama", "2:1")])
def test_layers_that_share_keys_are_all_asked_what_they_look_at(name: str, pairs: str) -> None:
    model = normal(name).clone()
    catalog.parse(f"share-kv{{map={pairs}}}")[0].rewrite(model, Outcome("share-kv"))
    after = budgeted(model, "keep=40%")
    budget = kv_budget.read(after)
    assert budget is not None and [len(one.queries) for one in budget.caches][-1] == 2
    whole = budgeted(model, "keep=100%")
    asks = [Ask(tuple(text), 6) for text in prompts(21, 13)]
    both = [loop.generate(opened(one), asks)[0] for one in (model, whole)]
    assert [one.ids for one in both[0]] == [one.ids for one in both[1]]
    decoder = opened(after)
    together, _ = loop.generate(decoder, asks)
    assert [one.ids for one in together] == [loop.generate(decoder, [ask])[0][0].ids for ask in asks]


@pytest.mark.parametrize("name", ["llama-kv-dynp", "genai-llama"])
def test_drafts_verify_tokens_behind_what_is_kept(name: str) -> None:
    """Whether a draft is always right or hardly ever: rows grow by different numbers of tokens, or by one."""
    decoder, whole = opened(budgeted(normal(name), "keep=30%")), opened(normal(name))
    asks = [Ask(tuple(text), most) for text, most in zip(prompts(31, 18), (9, 12), strict=True)]
    plain, _ = loop.generate(decoder, asks)
    for draft, right in ((decoder, True), (whole, False)):
        found, figures = speculating.generate(decoder, asks, draft=draft, tokens=3)
        assert [one.ids for one in found] == [one.ids for one in plain]
        assert (figures.accepted > figures.drafted // 2) == right
    with pytest.raises(InputError, match="budgets"):
        speculating.check(decoder, whole, calibrate=True)


@pytest.mark.parametrize("name", ["llama-kv-dynp", "genai-llama"])
def test_a_prompt_that_is_not_there_any_more_cannot_be_cut(name: str) -> None:
    state, _ = loop.prefill(opened(budgeted(normal(name), "keep=30%")), prompts(20))
    state.feed(np.array([[1, 2, 3]]))
    state.truncate(20)
    with pytest.raises(InputError, match="every token"):
        state.truncate(10)
    fork = state.fork()
    state.feed(np.array([[4]]))
    np.testing.assert_array_equal(fork.select([0]).feed(np.array([[4]])), fork.feed(np.array([[4]])))


def chosen(odds: np.ndarray, count: int, window: int, pool: int) -> list[int]:
    near = np.convolve(odds[:-window], np.ones(pool) / pool)[pool // 2 : len(odds) - window + pool // 2]
    return sorted(np.argsort(-near, kind="stable")[: count - window]) + [*range(len(odds) - window, len(odds))]


@pytest.mark.parametrize(("softcap", "relative"), [(0.0, True), (2.0, False)])
def test_the_graph_keeps_the_keys_that_are_looked_at(softcap: float, relative: bool) -> None:
    random, length, window = np.random.default_rng(0), 50, 4
    shapes = {"q": (1, 4, window, 6), "r": (1, 2, window, 6), "k": (1, 2, length, 6), "v": (1, 2, length, 5)}
    feeds = {name: random.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}
    queries = (Queries("q", 0.7, softcap), Queries("r", 1.3, softcap))
    cache_ = BudgetedCache(("pk", "pv"), ("k", "v"), queries, 230_000 if relative else 17)
    budget = Budget("hidden", window, 5, relative, (cache_,))
    ports = [
        oir.Value(name=name, type=oir.TensorType(oir.DataType.FLOAT), shape=oir.Shape(shape))
        for name, shape in shapes.items()
    ]
    decoder_ = oir.Model(oir.Graph(ports, [], nodes=[]), ir_version=10)
    runner = OrtRunner(kv_compress.compressor(decoder_, budget), optimize=True)
    found = runner.run(feeds)
    runner.close()
    count = 50 * 23 // 100 if relative else 17
    assert budget.counts(length).tolist() == [count]
    for head in range(2):
        sums = np.zeros(length)
        for name, scale, heads in (("q", 0.7, (2 * head, 2 * head + 1)), ("r", 1.3, (head,))):
            for one in heads:
                scores = scale * feeds[name][0, one] @ feeds["k"][0, head].T
                scores = softcap * np.tanh(scores / softcap) if softcap else scores
                scores = np.where(np.tri(window, length, length - window), np.exp(scores), 0)
                sums += (scores / scores.sum(1, keepdims=True)).sum(0)
        places = chosen(sums, count, window, 5)
        np.testing.assert_array_equal(found["pk"][0, head], feeds["k"][0, head, places])
        np.testing.assert_array_equal(found["pv"][0, head], feeds["v"][0, head, places])


@pytest.mark.parametrize("keep", [0.2, 0.5, 0.9, 1.0])
def test_shares_sum_to_the_budget_and_no_cache_keeps_more_than_everything(keep: float) -> None:
    amount, random = Amount(keep, True), np.random.default_rng(0)
    for weights in (np.ones(7), np.eye(7)[2] + 1e-9, random.random(7) ** 6):
        found = kv_budget.shares(weights.tolist(), amount, 0.2)
        assert abs(int(found.sum()) - round(7 * keep * MILLION)) <= 1
        assert found.max() <= MILLION and found.min() >= int(0.2 * keep * MILLION) - 1
        assert np.all(np.diff(found[np.argsort(weights, kind="stable")]) >= -1)
    assert np.ptp(kv_budget.shares([3.0] * 7, amount, 0.2)) <= 1
    lines = kv_budget.shares([1.0, 3.0], Amount(100, False), 0.2)
    assert lines.tolist() == [20 + 40, 20 + 120]


def seen(odds: np.ndarray, values: np.ndarray | None = None) -> Seen:
    return Seen(odds, np.ones((len(odds), odds.shape[3], 3)) if values is None else values)


def test_even_attention_needs_every_key_and_attention_to_one_key_needs_one() -> None:
    even = np.full((2, 3, 4, 104), 1 / 104)
    one = np.zeros_like(even)
    one[..., 17] = 1
    assert abs(seen(even).spread(0.9) - 0.9) < 0.011 and seen(one).spread(0.9) == 0.01
    random = np.random.default_rng(0).standard_normal((2, 104, 3))
    values = random.copy()
    values[:, 17] = 5
    assert seen(one, values).enough(0.99, 1) == 0.01
    assert seen(even, random).enough(0.99, 1) > 0.5
    np.testing.assert_allclose(pooled(np.array([3.0, 0, 0, 6]), 3), [1, 1, 2, 2])
    np.testing.assert_allclose(attention(np.ones((2, 2, 4)), np.ones((1, 5, 4)), 1.0, 0.0)[0, 0, 0], [*[0.25] * 4, 0])


def sample(model: oir.Model, ids: np.ndarray, pads: int = 0) -> Sample:
    feeds = {}
    for value in model.graph.inputs:
        name, shape = str(value.name), list(value.shape or ())
        if len(shape) == 4:
            feeds[name] = np.zeros([len(ids), int(shape[1]), 0, int(shape[3])], np.float32)  # type: ignore[arg-type]
        elif "position" in name:
            feeds[name] = np.maximum(np.arange(ids.shape[1]) - pads, 0)[None].repeat(len(ids), 0)
        else:
            feeds[name] = ids if "ids" in name else (np.arange(ids.shape[1]) >= pads)[None].repeat(len(ids), 0) * 1
    return Sample("text", feeds)


@pytest.mark.parametrize("by", ["mass", "cosine"])
def test_what_layers_need_is_measured_and_padding_does_not_count(by: str) -> None:
    model, (text,) = normal("llama-kv-dynp"), prompts(30)
    one = parsed(f"keep=40%;by={by};window=4")
    padded = np.array([[9] * 5 + text])
    found = []
    for example in (sample(model, np.array([text])), sample(model, padded, pads=5)):
        (edit,) = one.propose(model, context_for(model, [example]), Outcome("budget-kv"))
        found.append(edit.payload["keep"])
    assert abs(int(found[0].sum()) - round(1.6 * MILLION)) <= 1 and len(set(found[0].tolist())) > 1
    np.testing.assert_allclose(found[0], found[1], atol=1e-3 * MILLION)
    with pytest.raises(InputError, match="no sample"):
        one.propose(model, context_for(model, [sample(model, np.array([text[:4]]))]), Outcome("budget-kv"))


def test_layers_with_a_window_keep_every_token() -> None:
    model, outcome = normal("gemma-kv-dynp").clone(), Outcome("budget-kv")
    parsed("keep=40%;by=uniform;window=2").rewrite(model, outcome)
    assert len(outcome.skipped) == 4 and outcome.skipped[0].reason == "layer 0 sees a window of 6 keys"
    budget = kv_budget.read(model)
    assert budget is not None and len(budget.caches) == 2
    state, _ = loop.prefill(opened(model), prompts(20))
    assert sorted({cache_.shape[2] for cache_ in state._caches}) == [8, 20]


def test_numbers_that_hide_are_no_places() -> None:
    facts = Inference(normal("llama-kv-dynp"))
    found = []
    for number in (-1e30, np.inf, 7.0):
        tensor = oir.tensor(np.array(number, np.float32))
        found.append(read_ramp(oir.Value(name="low", const_value=tensor), facts))
    assert found[:2] == [None, None] and found[2] is not None


@pytest.mark.parametrize("target", ["onnx", "ort-cpu"])
def test_fused_attention_reads_the_part_of_the_mask(target: str) -> None:
    """Shapes that have nothing to do with caches stay known, so that the passes behind it find what they look for."""
    before, after = recipes.named("normal-form", "onnx", None), recipes.named("default", target, 23)
    model = budgeted(Pipeline(before).rewrite(normal("llama-kv-dynp")).model, "keep=40%")
    fused = Pipeline(after).rewrite(model).model
    assert sum(node.op_type in ("Attention", "MultiHeadAttention") for node in fused.graph) == 4
    asks = [Ask(tuple(text), 6) for text in prompts(30, 17)]
    found = [[one.ids for one in loop.generate(opened(one), asks)[0]] for one in (model, fused)]
    assert found[0] == found[1]


def test_twice_is_once() -> None:
    model, outcome = budgeted(normal("llama-kv-dynp"), "keep=40%"), Outcome("budget-kv")
    parsed("by=uniform").rewrite(model, outcome)
    assert not outcome.rewritten and outcome.skipped[0].reason == "its caches have budgets already"


GROUPED = """<opset_import: ["": 20, "com.microsoft": 1]>
g (int64[N, S] ids, int64[N, T] seen, float[N, 2, P, 16] past_key, float[N, 2, P, 16] past_value)
  => (float[N, S, 60] y, float[N, 2, L, 16] key, float[N, 2, L, 16] value)
<float[60, 8] table, float[8, 64] q, float[8, 32] k, float[8, 32] v, float[64, 8] o, float[8, 60] head,
 float[64, 8] cos, float[64, 8] sin, int64[1] ends = {1}, int64[1] one = {1}> {
  x = Gather (table, ids)  a = MatMul (x, q)  b = MatMul (x, k)  c = MatMul (x, v)
  sums = ReduceSum <keepdims = 0> (seen, ends)  last = Sub (sums, one)  counts = Cast <to = 6> (last)
  size = Shape <start = 1, end = 2> (seen)  all = Squeeze (size)  total = Cast <to = 6> (all)
  w, key, value = com.microsoft.GroupQueryAttention <num_heads = 4, kv_num_heads = 2, do_rotary = 1, scale = 0.4>
    (a, b, c, past_key, past_value, counts, total, cos, sin)
  n = MatMul (w, o)  r = Add (x, n)  y = MatMul (r, head)
}"""


def test_grouped_attention_goes_on_as_computed_by_hand() -> None:
    """Rows of different lengths in buffers that are written in place, keys turned by positions of the whole text."""
    model = prepare(parse_graph(GROUPED), parsed("by=uniform"))
    read = {name: value.const_value.numpy() for name, value in model.graph.initializers.items() if value.const_value}
    decoder = opened(budgeted(model, "keep=40%"))
    assert decoder.keeper is not None and decoder.ports.packing == "start" and decoder.ports.caches[0].in_place
    texts, after = prompts(25, 11), prompts(5, 5, seed=1)
    state, _ = loop.prefill(decoder, texts)
    found = np.concatenate([state.feed(np.array([row[at : at + 1] for row in after])) for at in range(3)], 1)
    found = np.concatenate([found, state.feed(np.array([row[3:] for row in after]))], 1)

    def placed(x: np.ndarray, place: int) -> np.ndarray:
        one, two, cos, sin = x[..., :8], x[..., 8:], read["cos"][place], read["sin"][place]
        return np.concatenate([one * cos - two * sin, one * sin + two * cos], -1)

    for row, (text, more) in enumerate(zip(texts, after, strict=True)):
        length = len(text)
        x = read["table"][[*text, *more]]
        q, k, v = ((x @ read[name]).reshape(len(x), -1, 16) for name in "qkv")
        q, k = (np.stack([placed(one, place) for place, one in enumerate(each)]) for each in (q, k))
        (count,) = decoder.keeper.budget.counts(length).tolist()
        kept = []
        for head in range(2):
            sums = np.zeros(length)
            for place in range(length - WINDOW, length):
                odds = np.exp(0.4 * q[place, 2 * head : 2 * head + 2] @ k[: place + 1, head].T)
                sums[: place + 1] += (odds / odds.sum(1, keepdims=True)).sum(0)
            kept.append(chosen(sums, count, WINDOW, POOL))
        for step in range(length, length + len(more)):
            heads = []
            for head in range(4):
                places = [*kept[head // 2], *range(length, step + 1)]
                odds = np.exp(0.4 * k[places, head // 2] @ q[step, head])
                heads.append(odds / odds.sum() @ v[places, head // 2])
            wanted = (x[step] + np.concatenate(heads) @ read["o"]) @ read["head"]
            np.testing.assert_allclose(found[row, step - length], wanted, atol=1e-4 * float(np.abs(wanted).max()))


@pytest.mark.parametrize("name", ["past_key_values.0.key", "present.1.value"])
def test_a_cache_that_something_else_reads_has_to_be_whole(name: str) -> None:
    model = normal("llama-kv-dynp").clone()
    (value,) = [one for one in (*model.graph.inputs, *model.graph.outputs) if one.name == name]
    size = oir.node("ReduceMean", [value], {"keepdims": 0}, name="mean")
    model.graph.append(size)
    size.outputs[0].name, size.outputs[0].type, size.outputs[0].shape = "mean", value.type, oir.Shape([])
    model.graph.outputs.append(size.outputs[0])
    with pytest.raises(InputError, match="ReduceMean `mean` reads its cache"):
        budgeted(model, "keep=40%")


def test_sizes_of_caches_are_those_of_the_text_however_they_are_asked_for() -> None:
    """A Shape that counts its axes from the end, and gives several."""
    model = normal("llama-kv-dynp").clone()
    for node in [one for one in model.graph if one.op_type == "Shape" and "past" in str(one.inputs[0].name)]:  # type: ignore[union-attr]
        whole = oir.node("Shape", [node.inputs[0]], {"start": -3, "end": -1}, name=f"{node.name}_whole")
        place = oir.Value(
            name=f"{node.name}_place", const_value=oir.tensor([1]), type=oir.TensorType(oir.DataType.INT64)
        )
        place.shape = oir.Shape([1])
        model.graph.initializers.add(place)
        part = oir.node("Gather", [whole.outputs[0], place], {"axis": 0}, name=f"{node.name}_part")
        whole.outputs[0].name, part.outputs[0].name = f"{node.name}_sizes", f"{node.name}_size"
        model.graph.insert_before(node, [whole, part])
        node.outputs[0].replace_all_uses_with(part.outputs[0])
    ids = np.array(prompts(12))
    expected = parity.in_pieces(opened(normal("llama-kv-dynp")), ids, [7, 8])
    np.testing.assert_array_equal(parity.in_pieces(opened(budgeted(model, "keep=100%")), ids, [7, 8]), expected)
    kept = [opened(budgeted(one, "keep=40%")) for one in (model, normal("llama-kv-dynp"))]
    found = [loop.generate(one, [Ask(tuple(ids[0].tolist()), 6)])[0][0].ids for one in kept]
    assert found[0] == found[1]


def test_without_caches_nothing_can_be_cut() -> None:
    with pytest.raises(InputError, match="its cache is of the kind `none`"):
        budgeted(normal("llama-nocache-dynp"), "keep=40%")


def test_without_a_mask_nothing_tells_how_many_tokens_there_are() -> None:
    model = small_decoder()
    catalog.parse("add-kv-cache")[0].rewrite(model, Outcome("add-kv-cache"))
    with pytest.raises(InputError, match="no input with a mask"):
        budgeted(Pipeline(NORMAL_FORM).rewrite(model).model, "keep=40%")


@pytest.mark.parametrize("later", ["remove-blocks{blocks=1}", "share-kv{map=1:0}"])
def test_caches_that_were_renamed_since_are_refused(later: str) -> None:
    """The names that are left may be those of other layers."""
    model = normal("llama-kv-dynp").clone()
    budget = kv_budget.read(budgeted(model, "keep=40%"))
    assert budget is not None
    catalog.parse(later)[0].rewrite(model, Outcome("later"))
    after = budgeted(model, "keep=40%")
    again = kv_budget.read(after)
    assert again is not None and len(again.caches) == len(budget.caches) - 1
    kept = tuple(one for one in budget.caches if one.past in {other.past for other in again.caches})
    stale = msgspec.structs.replace(budget, caches=(kept[0],))
    after.metadata_props[kv_budget.BUDGET] = msgspec.json.encode(stale).decode()
    with pytest.raises(InputError, match="renamed"):
        kv_budget.read(after)


def test_budgets_that_the_model_outgrew_are_refused() -> None:
    model = budgeted(normal("llama-kv-dynp"), "keep=40%")
    model.graph.outputs[1].name = "other"
    with pytest.raises(InputError, match="which the model lacks"):
        kv_budget.read(model)
    model.metadata_props[kv_budget.BUDGET] = "{}"
    with pytest.raises(InputError, match="cannot be read"):
        kv_budget.read(model)


@pytest.mark.parametrize(
    "options",
    ["keep=0%", "keep=120%", "keep=some", "keep=2.5", "window=0", "pool=4", "share=1.5", "floor=-1", "by=luck"],
)
def test_bad_options_are_refused(options: str) -> None:
    with pytest.raises(InputError):
        parsed(options)
