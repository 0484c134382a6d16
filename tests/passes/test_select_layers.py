"""Layers that come again or in another order, against models whose weights were moved instead."""

from __future__ import annotations

import json

import numpy as np
import onnx_ir as oir
import pytest
from decoding import decoded, normal, removed

from burnish.ir import weights
from burnish.ir.errors import InputError
from burnish.ir.views.blocks import stacks
from burnish.passes import catalog
from burnish.passes.base import Outcome
from burnish.passes.pipeline import Pipeline


def selected(name: str, ranges: str) -> oir.Model:
    (one,) = catalog.parse(f"select-layers{{ranges={ranges}}}")
    model = normal(name).clone()
    one.rewrite(model, Outcome("select-layers"))
    return model


def with_weights_of(name: str, order: list[int]) -> oir.Model:
    """The model whose block i has the weights of block `order[i]`; all blocks are alike."""
    model = normal(name).clone()
    blocks = stacks(model).blocks
    held = [
        [value for node in block.nodes for value in node.inputs if value is not None and value.is_initializer()]
        for block in blocks
    ]
    tensors = [[weights.tensor_of(value) for value in own] for own in held]
    for place, source in enumerate(order):
        assert blocks[place].hash == blocks[source].hash
        for value, tensor in zip(held[place], tensors[source], strict=True):
            if len(value.uses()) == 1:
                value.const_value = tensor
    return model


def logits(model: oir.Model, cuts: list[int]) -> np.ndarray:
    random = np.random.default_rng(0)
    ids, mask = random.integers(1, 100, (2, 9)), np.ones((2, 9), np.int64)
    mask[1, :2] = 0
    return decoded(model, ids, mask, cuts)[mask == 1]


@pytest.mark.parametrize("name", ["llama-kv-dynp", pytest.param("llama-kv-op23", marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    ("ranges", "order"),
    [("0:2+1:2+3:4", [0, 1, 1, 3]), ("3:4+1:3+0:1", [3, 1, 2, 0]), ("0:1+0:1+2:+2:3", [0, 0, 2, 3, 2])],
)
def test_layers_in_another_order_are_layers_with_the_weights_of_others(
    name: str, ranges: str, order: list[int]
) -> None:
    model = selected(name, ranges)
    names = [str(value.name) for value in model.graph.inputs]
    cached = [f"past_key_values.{n}.{what}" for n in range(len(order)) for what in ("key", "value")]
    assert [one for one in names if "past" in one] == cached
    assert [str(value.name) for value in model.graph.outputs][1:] == [
        one.replace("past_key_values", "present") for one in cached
    ]
    assert json.loads(model.metadata_props["burnish.blocks"]) == order
    whole = logits(model, [])
    for cuts in ([1], [4, 5], [3, 4, 5, 6, 7, 8]):
        np.testing.assert_allclose(logits(model, cuts), whole, atol=1e-4 * float(np.abs(whole).max()))
    if len(order) == 4:
        expected = logits(with_weights_of(name, order), [])
        np.testing.assert_allclose(whole, expected, atol=1e-4 * float(np.abs(expected).max()))


def test_ranges_that_rise_remove_the_others() -> None:
    one, other = selected("llama-kv-dynp", "0:1+2:"), removed(normal("llama-kv-dynp"), "1")
    assert oir.to_proto(one).SerializeToString() == oir.to_proto(other).SerializeToString()


def test_the_whole_model_is_the_model() -> None:
    model = selected("llama-kv-dynp", "0:2+2:4")
    assert oir.to_proto(model).SerializeToString() == oir.to_proto(normal("llama-kv-dynp")).SerializeToString()


def test_layers_that_come_again_come_out_of_a_pipeline_that_cleans_up() -> None:
    run = Pipeline(["select-layers{ranges=0:2+1:4}", "drop-unused", "share-repeats"]).rewrite(normal("llama-kv-dynp"))
    assert run.rewritten == 1
    assert len(stacks(run.model).blocks) == 5


@pytest.mark.parametrize(
    ("name", "ranges", "cause"),
    [
        ("llama-kv-dynp", "0:9", "`0:9` are no ranges of the blocks 0 to 3"),
        ("llama-kv-dynp", "2:2", "are no ranges"),
        ("llama-kv-dynp", "", "are no ranges"),
        ("llama-kv-dynp", "a", "are no ranges"),
        ("resnet-dynp", "0:1+0:", "block 0 cannot come in another place: its shortcut changes the shape"),
        ("swin-ts", "0:1+2:4+1:2", "cannot come in another place: the stream has another shape there"),
        ("t5-ts", "0:2+3:4+2:3+4:", "block 2 cannot come in another place: the stream has another shape there"),
        ("unet-dynp", "0:2+1:", "does not go on from the block before it alone|is read elsewhere"),
        ("a4-silero", "0:1", "the model has no residual blocks"),
    ],
)
def test_what_cannot_be_selected_is_refused(name: str, ranges: str, cause: str) -> None:
    with pytest.raises(InputError, match=cause):
        selected(name, ranges)
