"""Fewer heads of keys and values: heads that are alike change nothing, and decoding is computing at once."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as oir
import pytest
from commands import runner
from decoding import COUNTED, check_decoding, decoded, normal
from golden import parse_graph, prepare
from laws import OrtRunner, make_samples

from burnish.ir.errors import InputError
from burnish.ir.samples import Sample
from burnish.ir.text import text
from burnish.ir.views.attention_layer import AttentionLayer, Heads
from burnish.passes import catalog, lossy
from burnish.passes.base import Outcome
from burnish.passes.kv_families import families, turn_of
from burnish.passes.kv_heads import Turn, pooled
from burnish.passes.kv_layers import KeyLayers
from burnish.passes.lossy import LossyPass
from burnish.tools.lossy_context import context_for
from burnish.tools.research import structures

SLOW = pytest.mark.slow
CACHED = "llama-kv-dynp llama-kv-op23 llama-kv-dynp-fuse genai-llama genai-mha qwen-dynp".split()
MORE = """
    llama-kv-ts llama-kv-eager llama-kv-dyn llama-kv-ts-ort qwen-op23 qwen-ts qwen-dynp-fuse genai-qwen genai-moe
    genai-window
""".split()
UNCACHED = "gpt2-ts gpt2-op23 phi-dynp".split()
FAMILIES = "gpt2-dynp-ort gpt2-eager phi-ts phi-op23 phi-dynp-fuse llama-nocache-dynp-fuse gemma-dynp".split()
ENCODERS = "bert-s-ts bert-s-op23 vit-timm-ts vit-timm-dynp-fuse t5-ts".split()


def parsed(options: str) -> LossyPass:
    (one,) = catalog.parse(f"pool-kv-heads{{{options}}}" if options else "pool-kv-heads")
    assert isinstance(one, LossyPass)
    return one


def fewer(model: oir.Model, options: str) -> oir.Model:
    """A copy with fewer heads of keys and values."""
    after = model.clone()
    parsed(options).rewrite(after, Outcome("pool-kv-heads"))
    return after


def caches(model: oir.Model) -> list[oir.Value]:
    return [value for value in model.graph.inputs if value.shape is not None and len(value.shape) == 4]


def heads_of(model: oir.Model) -> list[int]:
    return [one.layer.kv_heads for one in KeyLayers(model).layers]


@pytest.mark.parametrize("how", ["fit", pytest.param("mean", marks=SLOW)])
@pytest.mark.parametrize("name", [*CACHED, *(pytest.param(one, marks=SLOW) for one in MORE)])
def test_decoding_with_smaller_caches_is_computing_at_once(name: str, how: str) -> None:
    before = normal(name)
    model = fewer(before, f"groups=1,how={how}")
    old, new = caches(before), caches(model)
    assert [one.name for one in old] == [one.name for one in new]
    for one, other in zip(old, new, strict=True):
        assert one.shape is not None and other.shape is not None
        assert list(other.shape) == [one.shape[0], 1, *one.shape[2:]]
    check_decoding(before, model, name)


@pytest.mark.parametrize("name", [UNCACHED[0], *(pytest.param(one, marks=SLOW) for one in (*UNCACHED[1:], *FAMILIES))])
def test_caches_added_afterwards_have_fewer_heads(name: str) -> None:
    model = fewer(normal(name), "groups=1")
    plain = OrtRunner(model, optimize=True)
    (one,) = catalog.parse("add-kv-cache")
    cached = model.clone()
    one.rewrite(cached, Outcome("add-kv-cache"))
    assert {value.shape[1] for value in caches(cached) if value.shape is not None} == {1}
    ids = np.random.default_rng(0).integers(1, 100, (2, 7))
    feeds = {"input_ids": ids, "attention_mask": np.ones_like(ids), "position_ids": np.tile(np.arange(7), (2, 1))}
    whole = plain.run({str(one.name): feeds[str(one.name)] for one in model.graph.inputs})["logits"]
    plain.close()
    found = decoded(cached, ids, np.ones_like(ids), [3, 4, 5])
    np.testing.assert_allclose(found, whole, atol=1e-4 * float(np.abs(whole).max()))


def alike(layer: AttentionLayer, turn: Turn, groups: int, how: str, random: np.random.Generator) -> Heads:
    """Weights whose heads are the same up to what queries and outputs can make up for."""
    heads = layer.read()
    assert heads.key is not None and heads.value is not None
    members = np.repeat(np.arange(groups), layer.kv_heads // groups)
    if how == "fit" and not turn.fixed:
        members = random.permutation(members)
    parts = {name: getattr(heads, name) for name in ("key", "value", "key_bias", "value_bias")}
    parts = {name: None if one is None else one[:groups][members].copy() for name, one in parts.items()}
    for head in range(layer.kv_heads if how == "fit" else 0):
        for name, size in (("key", layer.head_size), ("value", layer.value_size)):
            through = random.standard_normal((size, size)) + 2 * np.eye(size)
            if name == "key":
                through = np.eye(size) if turn.normed else turned(through, turn, random)
            for part in (parts[name], parts[f"{name}_bias"]):
                if part is not None:
                    part[head] = through @ part[head]
    return replace(heads, **parts)


def turned(through: np.ndarray, turn: Turn, random: np.random.Generator) -> np.ndarray:
    """A matrix that may stand between the projection of keys and their rotary embedding."""
    if not turn.pairs.size:
        return through
    found, rest = np.zeros_like(through), np.setdiff1d(np.arange(len(through)), turn.pairs)
    found[np.ix_(rest, rest)] = through[np.ix_(rest, rest)]
    for a, b in turn.pairs.T:
        real, imaginary = random.standard_normal(2)
        found[a, a] = found[b, b] = real
        found[b, a], found[a, b] = imaginary, -imaginary
    return found


def sample(model: oir.Model) -> Sample:
    """A text of six tokens after empty caches, or what is made up for a model of something else."""
    ids = np.random.default_rng(3).integers(1, 100, (1, 6))
    known = {"input_ids": ids, "attention_mask": np.ones_like(ids), "position_ids": np.arange(6)[None]}
    empty = {str(v.name): np.zeros((1, v.shape[1], 0, v.shape[3]), np.float32) for v in caches(model) if v.shape}
    made = next(iter(make_samples(model))).feeds
    text = "input_ids" in made
    names = [str(value.name) for value in model.graph.inputs]
    told = {**known, **empty}
    return Sample("text", {name: told.get(name, np.zeros_like(ids)) if text else made[name] for name in names})


def outputs(model: oir.Model, given: oir.Model) -> np.ndarray:
    """The first output on a sample of another model."""
    runner = OrtRunner(model, optimize=True)
    found = next(iter(runner.run(lossy.feeds(model, sample(given).feeds)).values()))
    runner.close()
    return found


@pytest.mark.parametrize("how", ["fit", "mean"])
@pytest.mark.parametrize(
    "name",
    [
        *("llama-kv-dynp", "gpt2-ts", "bert-s-ts"),
        *(pytest.param(one, marks=SLOW) for one in (*CACHED[1:], *MORE, *UNCACHED[1:], *FAMILIES, *ENCODERS[1:])),
    ],
)
def test_heads_that_are_alike_become_one_without_loss(name: str, how: str) -> None:
    model, random = normal(name).clone(), np.random.default_rng(0)
    found = KeyLayers(model)
    for family in families(found):
        if family.layer.kv_heads > 1:
            family.layer.write(model, alike(family.layer, turn_of(found, family), 1, how, random))
    after, _ = lossy.apply(
        model, parsed(f"groups=1,how={how}").asked(model, Outcome("")), [parsed(f"groups=1,how={how}")]
    )
    assert set(heads_of(after)) == {1}
    expected = outputs(model, model)
    np.testing.assert_allclose(outputs(after, model), expected, atol=1e-4 * float(np.abs(expected).max()))


_OWN = """
<ir_version: 10, opset_import: ["": 20, "com.microsoft": 1]>
g (float[N, S, 16] x) => (float[N, S, 16] y)
<float[16, 16] qa, float[16, 16] ka, float[16, 16] va, float[48] bias, float[16, 16] oa> {
  q = MatMul (x, qa)  k = MatMul (x, ka)  v = MatMul (x, va)
  w = com.microsoft.MultiHeadAttention <num_heads = 4> (q, k, v, bias)  m = MatMul (w, oa)  y = Add (x, m)
}
"""
_PACKED = """
<ir_version: 10, opset_import: ["": 20, "com.microsoft": 1]>
g (float[N, S, 16] x) => (float[N, S, 16] y) <float[16, 48] a, float[48] bias, float[16, 16] oa> {
  f = MatMul (x, a)  q, k, v = Split <axis = 2, num_outputs = 3> (f)
  w = com.microsoft.MultiHeadAttention <num_heads = 4> (q, k, v, bias)  m = MatMul (w, oa)  y = Add (x, m)
}
"""
_GROUPED = """
<ir_version: 10, opset_import: ["": 21, "com.microsoft": 1]>
g (float[N, S, 64] x, float[N, 4, P, 16] past_key, float[N, 4, P, 16] past_value, int32[N] lengths, int32 total)
  => (float[N, S, 64] y, float[N, 4, T, 16] key, float[N, 4, T, 16] value)
<float[64, 192] a, float[192] bias, float[64, 64] oa, float[32, 8] cos, float[32, 8] sin> {
  h = MatMul (x, a)  f = Add (h, bias)
  w, key, value = com.microsoft.GroupQueryAttention <num_heads = 4, kv_num_heads = 4, do_rotary = 1>
    (f, , , past_key, past_value, lengths, total, cos, sin)
  m = MatMul (w, oa)  y = Add (x, m)
}
"""


@pytest.mark.parametrize("source", [_OWN, _PACKED, _GROUPED], ids=["own bias", "packed", "packed into the operator"])
def test_operators_with_packed_matrices_and_biases_of_their_own(source: str) -> None:
    model, random = prepare(parse_graph(source), parsed("groups=2")), np.random.default_rng(2)
    found = KeyLayers(model)
    (family,) = families(found)
    family.layer.write(model, alike(family.layer, turn_of(found, family), 2, "fit", random))
    width = 64 if source is _GROUPED else 16
    feeds = {"x": random.standard_normal((2, 5, width)).astype(np.float32)}
    if source is _GROUPED:
        empty = np.zeros((2, 4, 0, 16), np.float32)
        feeds |= {"past_key": empty, "past_value": empty, "lengths": np.full(2, 4, np.int32)}
        feeds |= {"total": np.array(5, np.int32)}
    edits = parsed("groups=2").asked(model, Outcome(""))
    after, _ = lossy.apply(model, edits, [parsed("groups=2")])
    assert heads_of(after) == [2]
    runners = [OrtRunner(one, optimize=True) for one in (model, after)]
    expected, got = (one.run(lossy.feeds(two, feeds))["y"] for one, two in zip(runners, (model, after), strict=True))
    for one in runners:
        one.close()
    np.testing.assert_allclose(got, expected, atol=1e-4 * float(np.abs(expected).max()))


@pytest.mark.parametrize("name", ["genai-mha", pytest.param("bert-s-ts", marks=SLOW)])
def test_heads_that_are_alike_find_each_other_wherever_they_are(name: str) -> None:
    model, random = normal(name).clone(), np.random.default_rng(1)
    found = KeyLayers(model)
    for family in families(found):
        family.layer.write(model, alike(family.layer, turn_of(found, family), 2, "fit", random))
    expected = outputs(model, model)
    losses = []
    for how in ("fit", "mean"):
        edits = parsed(f"groups=2,how={how}").asked(model, Outcome(""))
        after, _ = lossy.apply(model, edits, [parsed(f"groups=2,how={how}")])
        assert set(heads_of(after)) == {2}
        losses.append(float(np.abs(outputs(after, model) - expected).max() / np.abs(expected).max()))
    assert losses[0] < 1e-4 < 1e-2 < losses[1]


def test_the_fit_is_the_best_head_for_what_the_samples_show() -> None:
    """Of any head and any way to read it, none leaves less of what the outputs see of the values."""
    random = np.random.default_rng(0)
    count, size, inputs = 3, 4, 10
    heads = Heads(
        *(random.standard_normal((count, size, inputs)) for _ in range(3)), random.standard_normal((9, count, size))
    )
    x = random.standard_normal((200, inputs)) @ random.standard_normal((inputs, inputs))
    moment = np.ones((inputs + 1, inputs + 1))
    moment[:-1, :-1], moment[:-1, -1], moment[-1, :-1] = x.T @ x / len(x), x.mean(0), x.mean(0)
    turn = Turn(np.zeros((2, 0), np.int64), False, False)

    def left(new: Heads) -> float:
        assert new.value is not None and heads.value is not None
        total = 0.0
        for head in range(count):
            was = heads.output[:, head] @ heads.value[head]
            now = new.output[:, head] @ new.value[0]
            total += float(np.square((was - now) @ x.T).sum())
        return total

    best = pooled([heads], 1, "fit", turn, [moment], 0).heads[0]
    mean = pooled([heads], 1, "mean", turn, [moment], 0).heads[0]
    assert best.value is not None and left(best) < 0.9 * left(mean)
    for _ in range(20):
        other = replace(best, output=best.output + 0.01 * random.standard_normal(best.output.shape))
        assert left(other) > left(best)


def test_as_many_heads_as_before_change_no_byte_and_twice_is_once() -> None:
    before = normal("llama-kv-dynp")
    same, outcome = before.clone(), Outcome("pool-kv-heads")
    parsed("groups=2").rewrite(same, outcome)
    assert not outcome.rewritten and text(same) == text(before) and same.metadata_props == before.metadata_props
    once = fewer(before, "groups=1")
    assert text(fewer(once, "groups=1")) == text(once)
    part = fewer(before, "groups=1,layers=1+3")
    assert heads_of(part) == [2, 1, 2, 1]
    ids = np.random.default_rng(0).integers(1, 100, (2, 7))
    whole = decoded(part, ids, np.ones_like(ids), [])
    np.testing.assert_allclose(decoded(part, ids, np.ones_like(ids), [2, 3]), whole, atol=1e-4 * np.abs(whole).max())


@pytest.mark.parametrize("name", ["llama-kv-dynp", *(pytest.param(one, marks=SLOW) for one in CACHED[1:])])
def test_layers_share_before_or_after_heads_do(name: str) -> None:
    before = normal(name)
    (share,) = catalog.parse("share-kv{map=2:0,average=uniform}")

    def shared(model: oir.Model) -> oir.Model:
        after = model.clone()
        share.rewrite(after, Outcome("share-kv"))
        return after

    both = fewer(shared(before), "groups=1,how=mean"), shared(fewer(before, "groups=1,how=mean"))
    fitted = fewer(shared(before), "groups=1")
    counted = name.startswith(COUNTED)
    for rows in (1, 2):
        ids, mask = np.random.default_rng(0).integers(1, 100, (rows, 8)), np.ones((rows, 8), np.int64)
        if rows > 1 and not counted:
            mask[1, :2] = 0
        whole = [decoded(one, ids, mask, []) for one in (*both, fitted)]
        limit = 1e-4 * float(np.abs(whole[0]).max())
        np.testing.assert_allclose(whole[0][mask == 1], whole[1][mask == 1], atol=limit)
        for model, expected in zip((*both, fitted), whole, strict=True):
            for cuts in [[3, 4, 5, 6, 7]] if rows > 1 and counted else [[1], [3, 4]]:
                found = decoded(model, ids, mask, cuts)
                np.testing.assert_allclose(found[mask == 1], expected[mask == 1], atol=limit)
    for model in (*both, fitted):
        layers = KeyLayers(model).layers
        assert {one.layer.kv_heads for one in layers} == {1} and layers[2].owner == 0
        assert len(caches(model)) == len(caches(before)) - 2


@pytest.mark.parametrize(
    ("name", "options", "cause"),
    [
        ("genai-mha", "groups=3", "layer 0 has 4 heads of keys and values, which 3 does not divide"),
        ("llama-kv-dynp", "groups=1,layers=4", "layer 4 has no keys and values of its own; these have: 0, 1, 2, 3"),
        ("llama-kv-dynp", "groups=1,layers=1-2", "`layers` is no list of layers"),
        ("genai-llama-int4", "groups=1,layers=1", "its weight is held by a MatMulNBits"),
        ("llama-kv-dynp", "", "has to be told how much may be lost"),
    ],
)
def test_what_cannot_be_done_is_refused_with_the_reason(name: str, options: str, cause: str) -> None:
    with pytest.raises(InputError) as caught:
        fewer(normal(name), options)
    assert cause in str(caught.value)


@pytest.mark.parametrize("options", ["groups=-1", "seed=-1"])
def test_options_that_make_no_sense_are_refused(options: str) -> None:
    with pytest.raises(InputError):
        parsed(options)


def test_each_layer_and_number_is_an_edit_and_excludes_what_takes_its_keys_away() -> None:
    model = normal("genai-mha")
    context = context_for(model, [sample(model)])
    edits = {(one.site, one.option): one for one in parsed("").propose(model, context, Outcome(""))}
    assert len(edits) == 6
    few = edits["layer 1", "1 head of keys and values"]
    assert few.claims & edits["layer 1", "2 heads of keys and values"].claims
    assert not few.claims & edits["layer 0", "1 head of keys and values"].claims
    (share,) = catalog.parse("share-kv")
    assert isinstance(share, LossyPass)
    pairs = {(one.site, one.option): one for one in share.propose(model, context, Outcome(""))}
    assert few.claims & pairs["layer 2", "keys of layer 1"].claims
    assert few.claims & pairs["layer 1", "keys of layer 0"].claims
    assert not few.claims & pairs["layer 2", "keys of layer 0"].claims


def test_a_past_of_the_original_is_given_to_smaller_caches() -> None:
    """Heads that are alike: what the original was given as its past becomes that of the one head."""
    model, random = normal("llama-kv-dynp").clone(), np.random.default_rng(0)
    found = KeyLayers(model)
    for family in families(found):
        family.layer.write(model, alike(family.layer, turn_of(found, family), 1, "fit", random))
    after, _ = lossy.apply(model, parsed("groups=1").asked(model, Outcome("")), [parsed("groups=1")])
    ids = random.integers(1, 100, (1, 6))
    runners = [OrtRunner(one, optimize=True) for one in (model, after)]
    names = [str(one.name) for one in model.graph.inputs]

    def given(start: int, end: int, past: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        feeds = {"input_ids": ids[:, start:end], "attention_mask": np.ones((1, end), np.int64)}
        feeds |= {"position_ids": np.arange(start, end)[None]}
        return {name: feeds[name] if name in feeds else past[name] for name in names}

    empty = {str(one.name): np.zeros((1, 2, 0, 8), np.float32) for one in caches(model)}
    first = runners[0].run(given(0, 4, empty))
    past = {name: first[name.replace("past_key_values", "present")] for name in empty}
    expected = runners[0].run(given(4, 6, past))
    got = lossy.results(after, runners[1].run(lossy.feeds(after, given(4, 6, past))))
    for one in runners:
        one.close()
    for name, array in expected.items():
        np.testing.assert_allclose(got[name], array, atol=2e-3 * float(np.abs(array).max()))


@SLOW
def test_healing_gives_smaller_caches_what_the_samples_hold_for_the_original() -> None:
    from burnish.backends.fx.healing import HealOptions, heal

    model = normal("llama-kv-dynp")
    student, _ = lossy.apply(model, parsed("groups=1").asked(model, Outcome("")), [parsed("groups=1")])
    feeds = sample(model).feeds
    random, samples = np.random.default_rng(0), []
    for index in range(6):
        rows = {name: np.repeat(array, 4, 0) for name, array in feeds.items()}
        samples.append(Sample(str(index), rows | {"input_ids": random.integers(1, 100, (4, 6))}))
    healed = heal(student, model, samples, HealOptions(steps=15, batch=8, rate=2e-3))
    assert healed.improved and healed.after < 0.95 * healed.before
    assert heads_of(healed.model) == [1, 1, 1, 1] and lossy.mixed(caches(healed.model)[0]) is not None


def test_the_command_writes_a_model_and_its_configuration(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    onnx.save(structures.load("genai-llama"), tmp_path / "model.onnx")
    said = {"model": {"decoder": {"num_hidden_layers": 3, "num_key_value_heads": 2, "head_size": 16}}}
    (tmp_path / "genai_config.json").write_text(json.dumps(said))
    (tmp_path / "out").mkdir()
    run = runner(monkeypatch, capsys, tmp_path, "optimize")
    (tmp_path / "taken" / "genai_config.json").mkdir(parents=True)
    code, _, error = run("model.onnx", "-o", "taken/model.onnx", "-p", "pool-kv-heads{groups=1}")
    assert code == 2 and "it is a folder" in error
    assert [path.name for path in (tmp_path / "taken").iterdir()] == ["genai_config.json"]
    asked = ("model.onnx", "-o", "out/model.onnx", "-p", "pool-kv-heads{groups=1}")
    assert run(*asked)[0] == 0
    written = json.loads((tmp_path / "out" / "genai_config.json").read_text())
    assert written["model"]["decoder"] == said["model"]["decoder"] | {"num_key_value_heads": 1}
    code, _, error = run("out/model.onnx", "-o", "again.onnx", "-p", "pool-kv-heads{groups=1}")
    assert code == 4 and "1 head of keys and values already" in error
