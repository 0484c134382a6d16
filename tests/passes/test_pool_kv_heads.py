"""Fewer heads of keys and values: decoding is computing at once, and what cannot be done is refused."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as oir
import pytest
from commands import runner
from decoding import COUNTED, check_decoding, decoded, normal
from laws import OrtRunner
from pooled_heads import (
    CACHED,
    FAMILIES,
    MORE,
    SLOW,
    UNCACHED,
    alike,
    caches,
    fewer,
    heads_of,
    parsed,
    sample,
)

from burnish.ir.errors import InputError
from burnish.ir.samples import Sample
from burnish.ir.text import text
from burnish.passes import catalog, lossy
from burnish.passes.base import Outcome
from burnish.passes.kv_families import families, turn_of
from burnish.passes.kv_layers import KeyLayers
from burnish.passes.lossy import LossyPass
from burnish.tools.lossy_context import context_for
from burnish.tools.research import structures


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
