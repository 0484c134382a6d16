"""Layers that share keys and values: decoding is computing at once, in every spelling, and torch computes the same."""

from __future__ import annotations

import json

import numpy as np
import onnx_ir as oir
import pytest
import torch
from block_networks import exported
from decoding import check_decoding, decoded, normal
from golden import parse_graph, prepare
from laws import OrtRunner
from small_llama import HEADS, KEY_HEADS, SIZE, Decoder, decoder, turned
from torch.nn import functional as F

from burnish.frontends import synthesis
from burnish.ir.errors import InputError
from burnish.ir.samples import Sample
from burnish.ir.text import fingerprint, text
from burnish.passes import catalog, lossy, recipes
from burnish.passes.base import Outcome
from burnish.passes.kv_layers import KeyLayers
from burnish.passes.kv_layout import entries, layout
from burnish.passes.lossy import Edit, LossyPass
from burnish.passes.pipeline import Pipeline
from burnish.tools.lossy_context import context_for

FAST = "llama-kv-dynp llama-kv-op23 llama-kv-dynp-fuse genai-llama genai-window genai-mha qwen-dynp".split()
FAMILIES = """
    llama-kv-ts llama-kv-eager llama-kv-dyn llama-kv-ts-ort gemma-kv-dynp gemma-kv-op23 gemma-kv-ts gemma-kv-dynp-fuse
    qwen-op23 qwen-ts qwen-dynp-fuse genai-qwen genai-moe genai-llama-int4 a3-smollm2-kv
""".split()
SLOW = pytest.mark.slow
PAIRS = {"genai-window": "2:0+3:1", "gemma-kv": "1:0+3:0", "genai": "2:0"}


def parsed(options: str) -> LossyPass:
    (one,) = catalog.parse(f"share-kv{{{options}}}")
    assert isinstance(one, LossyPass)
    return one


def shared(model: oir.Model, options: str) -> oir.Model:
    """A copy in which layers share."""
    after = model.clone()
    parsed(options).rewrite(after, Outcome("share-kv"))
    return after


def pairs_of(name: str) -> str:
    return next((pairs for start, pairs in PAIRS.items() if name.startswith(start)), "2:0+3:1")


def proposed(model: oir.Model, options: str = "", samples: list[Sample] | None = None) -> list[Edit]:
    context = context_for(model, samples or synthesis.synthesise(model)[:1])
    (one,) = catalog.parse(f"share-kv{{{options}}}" if options else "share-kv")
    assert isinstance(one, LossyPass)
    return one.propose(model, context, Outcome("share-kv"))


@pytest.mark.parametrize("name", [*FAST, *(pytest.param(one, marks=SLOW) for one in FAMILIES)])
def test_decoding_with_the_caches_that_are_left_is_computing_at_once(name: str) -> None:
    before, pairs = normal(name), pairs_of(name)
    model = shared(before, f"map={pairs}")
    caches = [[v for v in one.graph.inputs if v.shape is not None and len(v.shape) == 4] for one in (before, model)]
    takers = pairs.count(":")
    assert len(caches[1]) == len(caches[0]) - 2 * takers == 2 * len(json.loads(model.metadata_props["burnish.states"]))
    assert [v.name for v in caches[1]] == [v.name for v in caches[0]][: len(caches[1])]
    check_decoding(before, model, name)


@pytest.mark.parametrize("name", ["genai-llama", "genai-window"])
def test_rows_of_different_lengths_where_keys_are_counted(name: str) -> None:
    """GroupQueryAttention counts the keys of each row: a row beside a longer one gets what it gets alone."""
    model = shared(normal(name), f"map={pairs_of(name)}")
    runner, ids = OrtRunner(model, optimize=True), np.random.default_rng(0).integers(1, 100, (2, 8))
    ports = [value for value in model.graph.inputs if value.shape is not None and len(value.shape) == 4]

    def step(ids: np.ndarray, lengths: list[int], before: dict[str, np.ndarray] | None) -> dict[str, np.ndarray]:
        mask = (np.arange(max(lengths))[None] < np.array(lengths)[:, None]).astype(np.int64)
        empty = {str(v.name): np.zeros([len(ids), v.shape[1], 0, v.shape[3]], np.float32) for v in ports}  # type: ignore[index]
        past = {name: (before or {}).get(name.replace("past_key_values", "present"), empty[name]) for name in empty}
        return runner.run({"input_ids": ids, "attention_mask": mask, **past})

    both, alone = step(ids, [8, 5], None), step(ids[1:, :5], [5], None)
    np.testing.assert_allclose(both["logits"][1, :5], alone["logits"][0], atol=1e-5)
    both, alone = step(ids[:, :1], [9, 6], both), step(ids[1:, :1], [6], alone)
    np.testing.assert_allclose(both["logits"][1], alone["logits"][0], atol=1e-5)
    runner.close()


def test_every_spelling_computes_the_same() -> None:
    """The exports of one model, some with the attention as arithmetic, some as one operator of either domain."""
    ids = np.random.default_rng(1).integers(1, 100, (2, 7))
    names = ("llama-kv-dynp", "llama-kv-op23", "llama-kv-dynp-fuse")
    found = [decoded(shared(normal(one), "map=3:1+2:0"), ids, np.ones_like(ids), [4]) for one in names]
    for other in found[1:]:
        np.testing.assert_allclose(other, found[0], atol=1e-4 * float(np.abs(found[0]).max()))


def by_torch(model: Decoder, ids: torch.Tensor, readers: dict[int, int]) -> torch.Tensor:
    """What the decoder computes when layers take the keys and values of others, in torch's own words."""
    x, kept = model.table(ids), {}
    batch, length = ids.shape
    angles = torch.arange(length)[:, None] * 0.3 ** torch.arange(SIZE // 2)
    for index, layer in enumerate(model.layers):
        y = layer.before(x)
        q, k, v = (one(y).view(batch, length, -1, SIZE).transpose(1, 2) for one in (layer.q, layer.k, layer.v))
        kept[index] = (turned(k, angles), v)
        k, v = (one.repeat_interleave(HEADS // KEY_HEADS, 1) for one in kept[readers.get(index, index)])
        z = F.scaled_dot_product_attention(turned(q, angles), k, v, is_causal=True)
        x = x + layer.o(z.transpose(1, 2).reshape(batch, length, HEADS * SIZE))
        y = layer.between(x)
        x = x + layer.down(F.silu(layer.gate(y)) * layer.up(y))
    return F.linear(model.last(x), model.table.weight)


def run(model: oir.Model, ids: np.ndarray) -> np.ndarray:
    runner = OrtRunner(model, optimize=True)
    found = runner.run({"ids": ids})["logits"]
    runner.close()
    return found


def test_it_is_what_torch_computes_with_the_keys_and_values_of_the_other_layer() -> None:
    torch.manual_seed(0)
    module, ids = Decoder().eval(), np.arange(12).reshape(2, 6)
    with torch.no_grad():
        plain, expected = (by_torch(module, torch.from_numpy(ids), readers).numpy() for readers in ({}, {1: 0}))
    np.testing.assert_allclose(run(decoder(), ids), plain, atol=1e-4)
    np.testing.assert_allclose(run(shared(decoder(), "map=1:0"), ids), expected, atol=1e-4)
    assert np.abs(plain - expected).max() > 0.1


def test_layers_of_equal_keys_and_values_on_equal_input_are_unchanged_by_sharing() -> None:
    """The first layer adds nothing, so both see one stream, and both make the same keys and values of it."""
    torch.manual_seed(1)
    module, ids = Decoder().eval(), np.arange(12).reshape(2, 6)
    first, second = module.layers
    with torch.no_grad():
        first.o.weight.zero_()
        first.down.weight.zero_()
    second.k, second.v, second.before = first.k, first.v, first.before
    example = (torch.arange(10).reshape(2, 5),)
    made = exported(module, example, ["ids"], ["logits"], {"ids": {0: "batch", 1: "words"}})
    model = Pipeline(recipes.named("normal-form", "onnx", None)).rewrite(made).model
    np.testing.assert_allclose(run(shared(model, "map=1:0"), ids), run(model, ids), atol=1e-6)


def test_a_layer_that_reads_itself_changes_no_byte_and_sharing_twice_is_sharing_once() -> None:
    before = normal("llama-kv-dynp")
    same = shared(before, "map=0:0+3:3")
    assert text(same) == text(before) and same.metadata_props == before.metadata_props
    once = shared(before, "map=3:1")
    twice = shared(once, "map=3:1")
    assert text(twice) == text(once) and twice.metadata_props == once.metadata_props
    assert [one.owner for one in KeyLayers(once).layers] == [0, 1, 2, 1]


def test_who_reads_a_layer_that_reads_another_reads_that() -> None:
    before = normal("llama-kv-op23")
    chain = shared(before, "map=3:2+2:0")
    assert fingerprint(chain) == fingerprint(shared(before, "map=3:0+2:0"))
    assert fingerprint(chain) == fingerprint(shared(shared(before, "map=3:2"), "map=2:0"))
    assert chain.metadata_props["burnish.keys"] == '{"2":0,"3":0}'
    assert shared(shared(before, "map=3:2"), "map=2:0").metadata_props == chain.metadata_props


def test_blocks_keep_their_numbers_of_the_original_where_others_were_removed() -> None:
    model = normal("llama-kv-dynp").clone()
    (one,) = catalog.parse("remove-blocks{blocks=1}")
    one.rewrite(model, Outcome("remove-blocks"))
    after = shared(model, "map=2:1")
    assert after.metadata_props["burnish.keys"] == '{"3":2}'
    assert after.metadata_props["burnish.states"] == "[0,2]"
    assert [str(v.name) for v in shared(model, "map=1:0,renumber=false").graph.outputs] == [
        "logits", "present.0.key", "present.0.value", "present.2.key", "present.2.value",
    ]  # fmt: skip


def test_the_recipe_behind_it_keeps_what_it_decodes() -> None:
    before = shared(normal("llama-kv-dynp"), "map=3:1")
    after = Pipeline(recipes.named("default", "ort-cpu", None)).rewrite(before.clone()).model
    ids = np.random.default_rng(2).integers(1, 100, (2, 8))
    expected = decoded(before, ids, np.ones_like(ids), [3])
    np.testing.assert_allclose(decoded(after, ids, np.ones_like(ids), [4, 5]), expected, atol=1e-3)
    again = Pipeline(recipes.named("default", "ort-cpu", None)).rewrite(after.clone()).model
    assert text(again) == text(after)


_CAUSAL = """
<ir_version: 10, opset_import: ["": 23]>
g (float[N, S, 4] x, float[N, 2, P, 2] pk0, float[N, 2, P, 2] pv0, float[N, 2, P, 2] pk1, float[N, 2, P, 2] pv1, MASK)
  => (float[N, S, 4] y, float[N, 2, T, 2] nk0, float[N, 2, T, 2] nv0, float[N, 2, T, 2] nk1, float[N, 2, T, 2] nv1)
<float[4, 4] qa, float[4, 4] ka, float[4, 4] va, float[4, 4] oa, float[4, 4] qb, float[4, 4] kb, float[4, 4] vb,
 float[4, 4] ob> {
  q0 = MatMul (x, qa)  k0 = MatMul (x, ka)  v0 = MatMul (x, va)
  w0, nk0, nv0 = Attention <is_causal = 1, q_num_heads = 2, kv_num_heads = 2> (q0, k0, v0, mask, pk0, pv0)
  m0 = MatMul (w0, oa)  r = Add (x, m0)
  q1 = MatMul (r, qb)  k1 = MatMul (r, kb)  v1 = MatMul (r, vb)
  w1, nk1, nv1 = Attention <is_causal = 1, q_num_heads = 2, kv_num_heads = 2> (q1, k1, v1, mask, pk1, pv1)
  m1 = MatMul (w1, ob)  y = Add (r, m1)
}
"""


@pytest.mark.parametrize("mask", ["float[N, 1, S, T] mask", "bool[N, 1, S, T] mask"])
def test_an_operator_that_hides_later_keys_itself_hides_them_with_keys_of_another(mask: str) -> None:
    model = prepare(parse_graph(_CAUSAL.replace("MASK", mask)), parsed("map=1:0"))
    after = shared(model, "map=1:0")
    kind = np.float32 if mask.startswith("float") else bool
    x = np.random.default_rng(0).standard_normal((2, 6, 4)).astype(np.float32)
    seen = np.zeros((2, 1, 6, 6), kind) if kind is not bool else np.ones((2, 1, 6, 6), bool)
    seen[1, ..., 1] = -1e9 if kind is not bool else False
    runner, found = OrtRunner(after, optimize=True), []
    whole = runner.run({"x": x, "mask": seen, "pk0": (nothing := np.zeros((2, 2, 0, 2), np.float32)), "pv0": nothing})
    keys, values = nothing, nothing
    for end in range(1, 7):
        feeds = {"x": x[:, end - 1 : end], "mask": seen[:, :, end - 1 : end, :end], "pk0": keys, "pv0": values}
        outputs = runner.run(feeds)
        keys, values = outputs["nk0"], outputs["nv0"]
        found.append(outputs["y"])
    runner.close()
    np.testing.assert_allclose(np.concatenate(found, 1), whole["y"], atol=1e-5)


@pytest.mark.parametrize(
    ("options", "cause"),
    [
        ("map=1:3", "layer 1 cannot read the keys of layer 3: layer 3 does not come before it"),
        ("map=2:0", "it sees all earlier keys, layer 0 a window of 6 keys"),
        ("map=9:0", "there is no layer 9: the model has 0 to 5"),
        ("map=1:0+1:0", "a layer reads two others"),
        ("map=1-0", "`map` is no list of pairs of layers"),
        ("layout=0_0_2", "it is for 3 layers, the model has 6"),
        ("layout=0_0_2_2_4_7", "there is no layer 7"),
        ("layout=CLA2", "layer 3 cannot read the keys of layer 2: it sees a window of 6 keys, layer 2 all"),
        ("layout=YOCO", "layer 2 has no sliding window"),
        ("layout=LCKV", "layer 1 would read the keys and values of layer 4, which comes after it"),
        ("layout=pizza-bottom-7", "7 layers cannot keep keys and values of 6"),
        ("layout=0_0_x", "it is no layout"),
    ],
)
def test_what_cannot_be_shared_is_refused_with_the_reason(options: str, cause: str) -> None:
    with pytest.raises(InputError) as caught:
        shared(normal("gemma-kv-dynp"), options)
    assert cause in str(caught.value)


_OWN_BIAS = """
<ir_version: 10, opset_import: ["": 20, "com.microsoft": 1]>
g (float[N, S, 4] x) => (float[N, S, 4] y)
<float[4, 4] qa, float[4, 4] ka, float[4, 4] va, float[12] ba, float[4, 4] oa,
 float[4, 4] qb, float[4, 4] kb, float[4, 4] vb, float[12] bb, float[4, 4] ob> {
  q0 = MatMul (x, qa)  k0 = MatMul (x, ka)  v0 = MatMul (x, va)
  w0 = com.microsoft.MultiHeadAttention <num_heads = 2> (q0, k0, v0, ba)  m0 = MatMul (w0, oa)  r = Add (x, m0)
  q1 = MatMul (r, qb)  k1 = MatMul (r, kb)  v1 = MatMul (r, vb)
  w1 = com.microsoft.MultiHeadAttention <num_heads = 2> (q1, k1, v1, bb)  m1 = MatMul (w1, ob)  y = Add (r, m1)
}
"""


def test_keys_to_which_an_operator_adds_a_bias_are_not_there_to_be_read() -> None:
    model = prepare(parse_graph(_OWN_BIAS), parsed("map=1:0"))
    with pytest.raises(InputError, match="an operator adds a bias to keys or values"):
        shared(model, "map=1:0")


@pytest.mark.parametrize(
    ("average", "shares"), [("uniform", (1 / 3, 1 / 3, 1 / 3)), ("sequential", (1 / 4, 1 / 4, 1 / 2))]
)
def test_a_layer_that_is_read_makes_averages_if_asked(average: str, shares: tuple[float, ...]) -> None:
    before = normal("llama-kv-dynp")
    own = [one.layer.read() for one in KeyLayers(before).layers]
    after = shared(before, f"map=2:0+3:0,average={average}")
    heads = KeyLayers(after).layers[0].layer.read()
    for name in ("key", "value"):
        wanted = sum(share * getattr(own[index], name) for share, index in zip(shares, (0, 2, 3), strict=True))
        np.testing.assert_allclose(getattr(heads, name), wanted, atol=1e-6)
    np.testing.assert_array_equal(heads.query, own[0].query)
    assert np.abs(KeyLayers(before).layers[0].layer.read().key - own[0].key).max() == 0


@pytest.mark.parametrize("options", ["average=uniform", "layout=CLA2,map=1:0", "layers=-1", "reach=-1", "tries=0"])
def test_options_that_make_no_sense_are_refused(options: str) -> None:
    with pytest.raises(InputError):
        parsed(options)


def test_each_pair_is_an_edit_and_excludes_what_takes_its_keys_away() -> None:
    model = normal("llama-kv-dynp")
    edits = {(one.site, one.option): one for one in proposed(model)}
    assert len(edits) == 6
    one = edits["layer 2", "keys of layer 1"]
    assert one.claims & edits["layer 1", "keys of layer 0"].claims
    assert one.claims & edits["layer 2", "keys of layer 0"].claims
    assert not one.claims & edits["layer 3", "keys of layer 1"].claims
    samples = synthesis.synthesise(model)[:1]
    for name, site in (("remove-blocks", "block 1"), ("drop-attention", "block 1")):
        (other,) = catalog.parse(name)
        assert isinstance(other, LossyPass)
        gone = {e.site: e for e in other.propose(model, context_for(model, samples), Outcome(name))}
        assert one.claims & gone[site].claims and not one.claims & gone["block 0"].claims
        assert one.claims & gone["block 2"].claims


@pytest.mark.parametrize("search", ["loss", "similar", "dissimilar", "random"])
def test_a_search_gives_as_many_layers_as_asked_for(search: str) -> None:
    model = normal("llama-kv-dynp")
    edits = proposed(model, f"search={search},layers=2,threshold=-1")
    assert len({one.site for one in edits}) == 2
    after, _ = lossy.apply(model, edits, [parsed(f"search={search},layers=2,threshold=-1")])
    assert len(after.graph.inputs) == len(model.graph.inputs) - 4


def test_the_pair_that_is_chosen_by_loss_is_the_one_that_loses_least() -> None:
    from burnish.passes.kv_search import Search, _Judge

    model = normal("llama-kv-dynp")
    context = context_for(model, synthesis.synthesise(model)[:1])
    pairs = [(taker, donor) for taker in range(4) for donor in range(taker)]
    (chosen,) = Search("loss", context, 0.5, 3, 0).choose(model, KeyLayers(model), pairs, 1).items()
    with _Judge(model, context) as judge:
        losses = {pair: judge.divergence(dict([pair])) for pair in pairs}
    assert chosen == min(losses, key=lambda pair: losses[pair])


def test_a_threshold_that_no_pair_reaches_is_said() -> None:
    with pytest.raises(InputError, match="2 layers cannot share, 0 can"):
        proposed(normal("llama-kv-dynp"), "search=similar,layers=2,threshold=1.1")
    with pytest.raises(InputError, match="has to be told how many layers"):
        proposed(normal("llama-kv-dynp"), "search=similar")


def test_a_model_whose_layers_share_learns_to_do_what_it_did() -> None:
    from burnish.backends.fx.healing import HealOptions, heal

    ids = np.random.default_rng(3).integers(0, 61, (48, 8))
    samples = [Sample(str(at), {"ids": ids[at : at + 8]}) for at in range(0, 48, 8)]
    found = heal(shared(decoder(), "map=1:0"), decoder(), samples, HealOptions(steps=40, batch=16, rate=2e-3))
    assert found.improved and found.after < 0.5 * found.before
    assert [one.owner for one in KeyLayers(found.model).layers] == [0, 0]


def test_the_layouts_of_the_study() -> None:
    """The strings are those of the study's own repository for 22 layers."""
    assert entries("sandwich", "top", 3, 22) == [0, *[20] * 20, 21]
    assert entries("sandwich", "middle", 3, 22) == [0, *[10] * 20, 21]
    assert entries("pizza", "bottom", 12, 22) == [*range(11), *[11] * 11]
    assert entries("lasagna", "bottom", 11, 22) == [index - index % 2 for index in range(22)]
    refused = 0
    for shape in ("pizza", "sandwich", "lasagna"):
        for position in ("bottom", "middle", "top"):
            found = entries(shape, position, 5, 22)
            assert len(found) == 22 and len(set(found)) == 5 and all(found[one] == one for one in found)
            try:
                assert layout(f"{shape}-{position}-5", 22, [None] * 22) == found
                assert layout("_".join(map(str, found)), 22, [None] * 22) == found
            except InputError as error:
                refused += 1
                assert "which comes after it" in str(error)
    assert refused == 6
    assert layout("cla3", 7, [None] * 7) == [0, 0, 0, 3, 3, 3, 6]
    assert layout("0s_0_2s", 3, [4, None, 4]) == [0, 0, 2]
    assert layout("YOCO", 4, [8, 8, None, None]) == [0, 1, 2, 2]
