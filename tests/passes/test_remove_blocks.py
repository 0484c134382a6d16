"""Blocks that are removed from exported models: what is promised is saved, and caches stay caches."""

from __future__ import annotations

import json

import numpy as np
import onnx_ir as oir
import pytest
from decoding import decoded, normal, removed
from laws import OrtRunner

from burnish.frontends import synthesis
from burnish.ir.errors import InputError
from burnish.ir.views.blocks import stacks
from burnish.passes import catalog, lossy
from burnish.passes.base import Outcome
from burnish.tools.lossy_context import context_for

FAST = "llama-kv-dynp mamba-dynp resnet-dynp t5-ts genai-llama".split()
FAMILIES = "bert-s-ts gemma-kv-op23 genai-moe mixtral-dynp swin-ts unet-dynp".split()
SLOW = pytest.mark.slow


@pytest.mark.parametrize("name", [*FAST, *(pytest.param(one, marks=SLOW) for one in FAMILIES)])
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


@pytest.mark.parametrize("blocks", ["0", "1", "3", "0+2", "1+2+3"])
@pytest.mark.parametrize(
    "name",
    [
        "llama-kv-dynp",
        pytest.param("llama-kv-ts", marks=SLOW),
        pytest.param("gemma-kv-op23", marks=SLOW),
        pytest.param("a3-smollm2-kv", marks=SLOW),
    ],
)
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
