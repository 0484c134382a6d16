"""Blocks that are removed from exported models: what is promised is saved, and caches stay caches."""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import cache

import numpy as np
import onnx_ir as oir
import pytest
from laws import OrtRunner

from burnish.frontends import synthesis
from burnish.ir.errors import InputError
from burnish.ir.views.blocks import stacks
from burnish.passes import catalog, lossy
from burnish.passes.base import Outcome
from burnish.passes.pipeline import Pipeline
from burnish.passes.recipes import NORMAL_FORM
from burnish.tools.lossy_context import context_for
from burnish.tools.research import structures

FAMILIES = "bert-s-ts gemma-kv-op23 llama-kv-dynp mamba-dynp mixtral-dynp resnet-dynp swin-ts t5-ts unet-dynp".split()


@cache
def normal(name: str) -> oir.Model:
    return Pipeline(NORMAL_FORM).rewrite(oir.from_proto(structures.load(name))).model


def removed(model: oir.Model, blocks: str, more: str = "") -> oir.Model:
    (one,) = catalog.parse(f"remove-blocks{{blocks={blocks}{more}}}")
    outcome = Outcome("remove-blocks")
    after = model.clone()
    one.rewrite(after, outcome)
    assert outcome.rewritten == len(blocks.split("+"))
    return after


@pytest.mark.parametrize("name", [*FAMILIES, "genai-llama", "genai-moe"])
def test_each_block_saves_what_it_promises(name: str) -> None:
    model = normal(name)
    samples = synthesis.synthesise(model)[:1]
    context = context_for(model, samples)
    (one,) = catalog.parse("remove-blocks")
    assert isinstance(one, lossy.LossyPass)
    outcome = Outcome("remove-blocks")
    edits = one.propose(model, context, outcome)
    assert edits
    for edit in edits:
        after, _ = lossy.apply(model, [edit], [one])
        assert lossy.saved(model, after, context.dims) == edit.savings, edit.key
        OrtRunner(after, optimize=True).close()


def step(runner: OrtRunner, ids: np.ndarray, mask: np.ndarray, past: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """One call of a model with caches; positions count what the mask lets through."""
    positions = np.maximum(mask.cumsum(1) - 1, 0)[:, -ids.shape[1] :]
    wanted = {one.name for one in runner.session.get_inputs()}
    feeds = {"input_ids": ids, "attention_mask": mask, "position_ids": positions, **past}
    return runner.run({name: array for name, array in feeds.items() if name in wanted})


def decoded(model: oir.Model, ids: np.ndarray, mask: np.ndarray, cuts: list[int]) -> np.ndarray:
    """The logits of `ids` given in pieces that end at `cuts`, each with the cache of those before."""
    runner = OrtRunner(model, optimize=True)
    past = {
        str(value.name): np.zeros([len(ids), *(n if isinstance(n, int) else 0 for n in value.shape[1:])], np.float32)
        for value in model.graph.inputs
        if value.dtype == oir.DataType.FLOAT
    }
    logits = []
    for start, end in zip([0, *cuts], [*cuts, ids.shape[1]], strict=True):
        found = step(runner, ids[:, start:end], mask[:, :end], past)
        logits.append(found["logits"])
        past = {name: found[name.replace("past_key_values", "present")] for name in past}
    runner.close()
    return np.concatenate(logits, 1)


@pytest.mark.parametrize("blocks", ["0", "1", "3", "0+2", "1+2+3"])
@pytest.mark.parametrize("name", ["llama-kv-dynp", "llama-kv-ts", "gemma-kv-op23"])
def test_decoding_with_the_caches_that_are_left_is_computing_at_once(name: str, blocks: str) -> None:
    before = normal(name)
    gone = [int(one) for one in blocks.split("+")]
    found = stacks(before).blocks
    kept = [block.index for block in found if block.index not in gone]
    stateful = [block.index for block in found if block.inputs]
    model = removed(before, blocks)
    left = [str(v.name) for v in model.graph.inputs if v.dtype == oir.DataType.FLOAT]
    assert left == [str(v.name) for v in before.graph.inputs if v.dtype == oir.DataType.FLOAT][: len(left)]
    assert json.loads(model.metadata_props["burnish.blocks"]) == kept
    states = json.loads(model.metadata_props["burnish.states"])
    assert [stateful[index] for index in states] == [index for index in kept if index in stateful]
    random = np.random.default_rng(0)
    ids, mask = random.integers(1, 100, (2, 9)), np.ones((2, 9), np.int64)
    mask[1, :2] = 0
    whole = decoded(model, ids, mask, [])
    for cuts in ([1], [4, 5], [3, 4, 5, 6, 7, 8]):
        found = decoded(model, ids, mask, cuts)
        np.testing.assert_allclose(found[mask == 1], whole[mask == 1], atol=1e-4 * float(np.abs(whole).max()))


def test_blocks_removed_in_two_steps_are_those_removed_at_once() -> None:
    before = normal("llama-kv-dynp")
    twice, once = removed(removed(before, "1"), "1"), removed(before, "1+2")
    assert twice.metadata_props == once.metadata_props
    assert twice.metadata_props["burnish.blocks"] == "[0,3]"
    assert [v.name for v in twice.graph.inputs] == [v.name for v in once.graph.inputs]


def test_gaps_are_kept_on_request() -> None:
    model = removed(normal("llama-kv-dynp"), "1", ",renumber=false")
    names = [str(v.name) for v in model.graph.outputs]
    assert names == ["logits", *(f"present.{n}.{what}" for n in (0, 2, 3) for what in ("key", "value"))]


@pytest.mark.parametrize(
    ("blocks", "cause"),
    [
        ("9", "there is no block 9: the model has the blocks 0 to 3"),
        ("1+1", "is no list of blocks"),
        ("one", "is no list of blocks"),
        ("0+1+2+3", "block 0 stays: the size of its cache `past_key_values.0.key` is read outside"),
    ],
)
def test_what_cannot_be_removed_is_refused(blocks: str, cause: str) -> None:
    with pytest.raises(InputError, match=cause):
        removed(normal("llama-kv-dynp"), blocks)


def test_a_block_that_changes_the_shape_is_refused_by_name() -> None:
    model = normal("resnet-dynp")
    with pytest.raises(InputError, match="its shortcut changes the shape"):
        removed(model, "0")


def test_a_model_without_blocks_is_refused() -> None:
    model = normal("a4-silero")
    with pytest.raises(InputError, match="the model has no residual blocks: "):
        removed(model, "0")
