"""Caches that keep a part of the prompt: their sizes, what they go on with, and what is refused."""

from __future__ import annotations

import msgspec
import numpy as np
import onnx_ir as oir
import pytest
from budgets import budgeted, opened, parsed, prompts
from decoding import normal
from golden import parse_graph, prepare
from small_llama import decoder as small_decoder

from burnish.backends.decoding import feeding, loop, parity, speculating
from burnish.backends.decoding.loop import Ask
from burnish.ir.errors import InputError
from burnish.ir.inference import Inference
from burnish.ir.samples import Sample
from burnish.ir.views.ramps import read_ramp
from burnish.passes import catalog, kv_budget, recipes
from burnish.passes.base import Outcome
from burnish.passes.budget import Amount
from burnish.passes.kv_budget import MILLION
from burnish.passes.kv_needs import Seen, attention, pooled
from burnish.passes.pipeline import Pipeline
from burnish.passes.recipes import NORMAL_FORM
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
