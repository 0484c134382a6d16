"""Criteria by which blocks go, against the same numbers computed in numpy from the hidden states."""

from __future__ import annotations

from functools import cache
from itertools import pairwise

import numpy as np
import onnx_ir as oir
import pytest
from golden import name_nodes, parse_graph
from laws import OrtRunner

from burnish.frontends import synthesis
from burnish.ir.errors import InputError
from burnish.ir.samples import Sample
from burnish.ir.views.blocks import stacks
from burnish.passes import catalog, lossy
from burnish.passes.base import Outcome
from burnish.passes.depth_criteria import Criterion, Ranking, without
from burnish.passes.lossy import Context
from burnish.passes.pipeline import Pipeline
from burnish.passes.recipes import NORMAL_FORM
from burnish.tools.lossy_context import context_for
from burnish.tools.research import structures


@cache
def language_model() -> tuple[oir.Model, Context]:
    """A small model of four blocks, and two samples with padding on the right."""
    model = Pipeline(NORMAL_FORM).rewrite(oir.from_proto(structures.load("llama-nocache-dynp"))).model
    random = np.random.default_rng(0)
    samples = []
    for length in (7, 5):
        mask = np.ones((2, length), np.int64)
        mask[1, 3:] = 0
        ids = random.integers(0, 99, (2, length))
        feeds = {"input_ids": ids, "attention_mask": mask, "position_ids": np.maximum(mask.cumsum(1) - 1, 0)}
        names = {value.name for value in model.graph.inputs}
        samples.append(Sample(f"length {length}", {name: one for name, one in feeds.items() if name in names}))
    return model, context_for(model, samples)


def states() -> list[tuple[np.ndarray, list[np.ndarray]]]:
    """For each sample its mask, and the stream before each block and behind the last."""
    model, context = language_model()
    copy = model.clone()
    blocks = stacks(copy).blocks
    copy.graph.outputs[:] = [*(block.entry for block in blocks), blocks[-1].exit]
    runner = OrtRunner(copy, optimize=False)
    return [(one.feeds["attention_mask"] == 1, list(runner.run(one.feeds).values())) for one in context.samples]


def cosine(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    one, other = one.astype(np.float64), other.astype(np.float64)
    lengths = np.linalg.norm(one, axis=-1) * np.linalg.norm(other, axis=-1)
    return np.where(lengths == 0, 0.5, (one * other).sum(-1) / np.where(lengths == 0, 1, lengths))


def scores(criterion: Criterion) -> list[float]:
    model, context = language_model()
    return list(Ranking(criterion, context).scores(model, stacks(model)).values())


def test_block_influence_is_the_mean_over_tokens_that_are_no_padding() -> None:
    seen = states()
    expected = []
    for before, behind in pairwise(range(5)):
        found = np.concatenate([cosine(hidden[before], hidden[behind])[mask] for mask, hidden in seen])
        expected.append(1 - found.mean())
    np.testing.assert_allclose(scores("block-influence"), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("count", [1, 2, 3])
def test_the_angle_is_that_of_the_last_token_that_is_no_padding(count: int) -> None:
    model, context = language_model()
    angles = []
    for start in range(5 - count):
        found: list[float] = []
        for mask, hidden in states():
            last = mask.shape[1] - 1 - mask[:, ::-1].argmax(1)
            rows = np.arange(len(mask)), last
            found += list(np.arccos(cosine(hidden[start][rows], hidden[start + count][rows])) / np.pi)
        angles.append(np.mean(found))
    first = int(np.argmin(angles))
    structure = stacks(model)
    chosen = Ranking("angular", context).choose(model, structure, count)
    assert [block.index for block in chosen] == list(range(first, first + count))
    if count == 1:
        np.testing.assert_allclose(scores("angular"), angles, rtol=1e-4)


def test_the_output_loss_is_the_mean_square_over_what_is_no_padding() -> None:
    model, context = language_model()
    expected = []
    for index in range(4):
        gaps = []
        for sample in context.samples:
            one, other = (
                OrtRunner(m, optimize=True).run(sample.feeds)["logits"] for m in (model, without(model, [index]))
            )
            gaps.append(np.square(one - other)[sample.feeds["attention_mask"] == 1])
        expected.append(np.concatenate(gaps).mean())
    np.testing.assert_allclose(scores("output-loss"), expected, rtol=1e-4)


def test_perplexity_is_that_of_the_next_tokens_that_are_no_padding() -> None:
    model, context = language_model()
    expected = []
    for index in range(4):
        losses = []
        for sample in context.samples:
            logits = OrtRunner(without(model, [index]), optimize=True).run(sample.feeds)["logits"].astype(np.float64)
            chances = np.log(np.exp(logits).sum(-1, keepdims=True))
            ids, mask = sample.feeds["input_ids"], sample.feeds["attention_mask"] == 1
            found = (chances - logits)[:, :-1][np.arange(2)[:, None], np.arange(ids.shape[1] - 1)[None], ids[:, 1:]]
            losses.append(found[mask[:, 1:]])
        expected.append(np.exp(np.concatenate(losses).mean()))
    np.testing.assert_allclose(scores("perplexity"), expected, rtol=1e-4)


def test_criteria_that_need_no_samples() -> None:
    model, _ = language_model()
    blocks = stacks(model).blocks
    held = [
        [value.const_value.numpy() for node in block.nodes for value in node.inputs if value and value.const_value]
        for block in blocks
    ]
    floats = [[array for array in one if array.dtype == np.float32 and array.size > 1] for one in held]
    np.testing.assert_allclose(scores("magnitude"), [sum(np.abs(a).sum() for a in one) for one in floats], rtol=1e-4)
    np.testing.assert_allclose(scores("magnitude-l2"), [sum((a**2).sum() for a in one) for one in floats], rtol=1e-4)
    assert scores("reverse") == [0, -1, -2, -3]
    assert sorted(scores("random")) == [0, 1, 2, 3]


def test_criticality_and_taylor_look_at_the_weights() -> None:
    pytest.importorskip("torch")
    model, context = language_model()
    for criterion in ("criticality", "taylor"):
        found = scores(criterion)
        assert len(found) == 4 and all(one > 0 for one in found) and len(set(found)) == 4
    assert context.gradients is not None
    slopes = context.gradients(model, context.samples)
    block = stacks(model).blocks[2]
    names = {str(v.name) for node in block.nodes for v in node.inputs if v is not None and v.is_initializer()}
    tensors = {name: model.graph.initializers[name].const_value.numpy() for name in names & set(slopes)}
    expected = sum(np.abs(array * slopes[name]).sum() for name, array in tensors.items() if array.size > 1)
    np.testing.assert_allclose(scores("taylor")[2], expected, rtol=1e-4)


def proposed(options: str) -> tuple[list[lossy.Edit], lossy.LossyPass]:
    model, context = language_model()
    (one,) = catalog.parse(f"remove-blocks{{{options}}}")
    assert isinstance(one, lossy.LossyPass)
    return one.propose(model, context, Outcome("remove-blocks")), one


@pytest.mark.parametrize("criterion", ["block-influence", "angular", "output-loss", "reverse", "magnitude", "random"])
def test_a_count_settles_what_goes(criterion: str) -> None:
    edits, one = proposed(f"criterion={criterion},count=2")
    assert one.decided and len(edits) == 2 and all(edit.option == "drop" for edit in edits)
    model, context = language_model()
    after, _ = lossy.apply(model, edits, [one])
    assert len(stacks(after).blocks) == 2
    if criterion == "reverse":
        assert [edit.site for edit in edits] == ["block 2", "block 3"]


def test_without_a_count_the_search_chooses_how_many() -> None:
    edits, one = proposed("criterion=reverse")
    assert not one.decided
    assert [edit.site for edit in edits] == ["block 3", "blocks 2+3", "blocks 1+2+3", "blocks 0+1+2+3"]
    assert all(a.claims & b.claims for a in edits for b in edits)
    model, context = language_model()
    for edit in edits[:3]:
        after, _ = lossy.apply(model, [edit], [one])
        assert lossy.saved(model, after, context.dims) == edit.savings


def test_one_after_the_other_scores_what_is_left() -> None:
    model, context = language_model()
    structure = stacks(model)
    chosen = Ranking("output-loss", context, iterative=True).choose(model, structure, 2)
    first = min(range(4), key=lambda index: scores("output-loss")[index])
    left = without(model, [first])
    again = list(Ranking("output-loss", context).scores(left, stacks(left)).values())
    second = [index for index in range(4) if index != first][int(np.argmin(again))]
    assert {block.index for block in chosen} == {first, second}


def test_more_blocks_than_there_are_cannot_go() -> None:
    with pytest.raises(InputError, match="5 blocks cannot go, 4 can together"):
        proposed("criterion=magnitude,count=5")
    with pytest.raises(InputError, match="no 5 blocks that follow each other can go together"):
        proposed("criterion=angular,count=5")


def test_pictures_turn_along_their_channels_and_have_no_last_token() -> None:
    graph = """g (float[N, 3, 8, 8] image) => (float[N, 4, 8, 8] y)
    <float[4, 3, 3, 3] stem, float[4, 4, 3, 3] a, float[4, 4, 3, 3] b> {
      f = Conv <pads = [1, 1, 1, 1]> (image, stem)  x = Relu (f)
      h = Conv <pads = [1, 1, 1, 1]> (x, a)  r = Relu (h)  m = Conv <pads = [1, 1, 1, 1]> (r, b)  y = Add (m, x) }"""
    model = Pipeline(NORMAL_FORM).rewrite(oir.from_proto(parse_graph(graph))).model
    name_nodes(model)
    image = np.random.default_rng(0).standard_normal((2, 3, 8, 8)).astype(np.float32)
    context = context_for(model, [Sample("pictures", {"image": image})])
    copy = model.clone()
    copy.graph.outputs.insert(0, stacks(copy).blocks[0].entry)
    before, behind = OrtRunner(copy, optimize=False).run({"image": image}).values()
    expected = 1 - cosine(np.moveaxis(before, 1, -1), np.moveaxis(behind, 1, -1)).mean()
    (found,) = Ranking("block-influence", context).scores(model, stacks(model)).values()
    np.testing.assert_allclose(found, expected, rtol=1e-4)
    with pytest.raises(InputError, match="there are no tokens"):
        Ranking("angular", context).scores(model, stacks(model))


@pytest.mark.parametrize("name", ["genai-llama", "tf-bert", pytest.param("swin-ts", marks=pytest.mark.slow)])
def test_streams_are_followed_however_they_are_spelled(name: str) -> None:
    """Sums inside a skip-normalization, rows of all texts in one matrix, a stream that is reshaped on the way."""
    model = Pipeline(NORMAL_FORM).rewrite(oir.from_proto(structures.load(name))).model
    context = context_for(model, synthesis.synthesise(model)[:1])
    structure = stacks(model)
    found = Ranking("block-influence", context).scores(model, structure)
    assert len(found) == len(structure.blocks) and all(0 < one < 1 for one in found.values())
    sizes = Ranking("magnitude", context).scores(model, structure)
    assert max(sizes.values()) < 20 * min(sizes.values())


def test_a_stream_whose_padding_is_not_known_is_refused() -> None:
    model = Pipeline(NORMAL_FORM).rewrite(oir.from_proto(structures.load("t5-ts"))).model
    context = context_for(model, synthesis.synthesise(model)[:1])
    with pytest.raises(InputError, match="it cannot be told which rows of the stream are padding"):
        Ranking("block-influence", context).scores(model, stacks(model))
