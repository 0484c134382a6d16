"""What is computed with caches that keep a part of the prompt is what is computed by hand with the kept keys."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import numpy as np
import onnx_ir as oir
import pytest
import torch
from block_networks import exported
from budgets import POOL, WINDOW, budgeted, opened, parsed, prompts
from golden import parse_graph, prepare
from laws import OrtRunner
from small_llama import HEADS, KEY_HEADS, SIZE, Decoder
from torch import nn
from torch.nn import functional as F

from burnish.backends.decoding import loop, parity
from burnish.passes import kv_compress
from burnish.passes.kv_budget import Budget, BudgetedCache, Queries
from burnish.passes.pipeline import Pipeline
from burnish.passes.recipes import NORMAL_FORM


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
