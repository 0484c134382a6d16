"""Attention and mlps dropped from exported models, against the same models with what they add times 0."""

from __future__ import annotations

import json

import numpy as np
import onnx_ir as oir
import pytest
from decoding import decoded, normal
from laws import OrtRunner

from burnish.frontends import synthesis
from burnish.ir.errors import InputError
from burnish.ir.views.blocks import stacks
from burnish.passes import catalog, lossy, recipes
from burnish.passes.base import Outcome
from burnish.passes.depth_branches import Branch, attention_of, mlp_of
from burnish.passes.pipeline import Pipeline
from burnish.tools.lossy_context import context_for

FAST = "llama-kv-dynp t5-ts genai-llama phi-dynp bert-s-ts".split()
SLOW = """
gpt2-ts-ort bert-s-ts-ort vit-timm-dynp-fuse gpt2-dynp gemma-kv-op23
genai-mha mixtral-dynp swin-ts tf-bert unet-dynp vit-timm-dynp
""".split()


def proposed(name: str, spec: str) -> tuple[lossy.LossyPass, list[lossy.Edit], lossy.Context]:
    model = normal(name)
    context = context_for(model, synthesis.synthesise(model)[:1])
    (one,) = catalog.parse(spec)
    assert isinstance(one, lossy.LossyPass)
    return one, one.propose(model, context, Outcome(spec)), context


def zeroed(model: oir.Model, branches: list[Branch]) -> oir.Model:
    """The model with a product by 0 behind what each of the branches adds, and without its bias in the join."""
    from burnish.ir import edit

    for one in branches:
        zero = edit.add_constant(model, "nothing", np.zeros((), np.float32))
        step = edit.make("Mul", [one.result, zero], like=one.join)
        edit.insert_before(one.join, [step])
        for use in [use for use in one.result.uses() if use.node is one.join]:
            use.node.replace_input_with(use.idx, step.outputs[0])
        step.outputs[0].name = edit.unique_name(model, "nothing")
        bias = {"SkipLayerNormalization": 4, "SkipSimplifiedLayerNormalization": 3}.get(one.join.op_type, 99)
        if len(one.join.inputs) > bias and step.outputs[0] is one.join.inputs[0]:
            width = one.join.inputs[bias].shape[0]
            one.join.replace_input_with(bias, edit.add_constant(model, "no bias", np.zeros(width, np.float32)))
    return model


@pytest.mark.parametrize("spec", ["drop-attention", "drop-mlp"])
@pytest.mark.parametrize("name", [*FAST, *(pytest.param(one, marks=pytest.mark.slow) for one in SLOW)])
def test_what_is_dropped_adds_nothing_and_saves_what_it_promises(name: str, spec: str) -> None:
    model = normal(name)
    one, edits, context = proposed(name, spec)
    assert edits
    for edit in edits:
        after, _ = lossy.apply(model, [edit], [one])
        found = lossy.saved(model, after, context.dims)
        assert (found.parameters, found.bytes) == (edit.savings.parameters, edit.savings.bytes), edit.key
        assert edit.savings.parameters > 0
        if None not in (found.macs, edit.savings.macs):
            assert found.macs == edit.savings.macs
    find = attention_of if spec == "drop-attention" else mlp_of
    chosen = edits[:1] if len(edits) <= 2 else [edits[0], edits[-1]]
    find = attention_of if spec == "drop-attention" else mlp_of
    copy = model.clone()
    branches = [found for block in stacks(copy).blocks if isinstance(found := find(block), Branch)]
    sites = [edit.site for edit in chosen]
    expected = OrtRunner(zeroed(copy, [b for b in branches if f"block {b.block.index}" in sites]), optimize=False)
    after, _ = lossy.apply(model, chosen, [one])
    runner = OrtRunner(after, optimize=False)
    wanted = {one.name for one in runner.session.get_inputs()}
    sample = context.samples[0]
    other = expected.run(sample.feeds)
    first = str(model.graph.outputs[0].name)
    result = runner.run({name: array for name, array in sample.feeds.items() if name in wanted})[first]
    assert np.isfinite(result).all()
    np.testing.assert_allclose(result, other[first], rtol=1e-4, atol=1e-5 * max(1.0, float(np.abs(other[first]).max())))


@pytest.mark.parametrize("blocks", ["0", "1+3", "0+1+2"])
def test_decoding_without_some_attention_is_computing_at_once(blocks: str) -> None:
    (one,) = catalog.parse(f"drop-attention{{blocks={blocks}}}")
    model = normal("llama-kv-dynp").clone()
    one.rewrite(model, Outcome("drop-attention"))
    kept = [index for index in range(4) if str(index) not in blocks.split("+")]
    assert json.loads(model.metadata_props["burnish.states"]) == kept
    assert json.loads(model.metadata_props["burnish.blocks"]) == [0, 1, 2, 3]
    past = [str(value.name) for value in model.graph.inputs if "past" in str(value.name)]
    assert past == [f"past_key_values.{n}.{what}" for n in range(len(kept)) for what in ("key", "value")]
    random = np.random.default_rng(0)
    ids, mask = random.integers(1, 100, (2, 9)), np.ones((2, 9), np.int64)
    mask[1, :2] = 0
    whole = decoded(model, ids, mask, [])
    for cuts in ([1], [3, 4, 5, 6, 7, 8]):
        found = decoded(model, ids, mask, cuts)
        np.testing.assert_allclose(found[mask == 1], whole[mask == 1], atol=1e-4 * float(np.abs(whole).max()))


def test_both_halves_of_a_block_can_go_together() -> None:
    model = normal("phi-dynp").clone()
    for spec in ("drop-attention{blocks=1}", "drop-mlp{blocks=1}"):
        (one,) = catalog.parse(spec)
        one.rewrite(model, Outcome(spec))
    (one,) = catalog.parse("remove-blocks{blocks=1}")
    other = normal("phi-dynp").clone()
    one.rewrite(other, Outcome("remove-blocks"))
    sample = synthesis.synthesise(other)[0]
    results = [OrtRunner(each, optimize=False).run(sample.feeds)["logits"] for each in (model, other)]
    np.testing.assert_allclose(*results, rtol=1e-4, atol=1e-5 * float(np.abs(results[0]).max()))


@pytest.mark.parametrize(
    ("name", "spec", "cause"),
    [
        ("llama-kv-dynp", "drop-attention{blocks=0+1+2+3}", "the size of its cache `past_key_values.0.key` is read"),
        ("resnet-dynp", "drop-attention{blocks=1}", "block 1: it has no attention"),
        ("resnet-dynp", "drop-mlp{blocks=1}", "block 1: it has no mlp"),
        ("llama-kv-dynp", "drop-mlp{blocks=4}", "there is no block 4"),
    ],
)
def test_what_cannot_be_dropped_is_refused(name: str, spec: str, cause: str) -> None:
    (one,) = catalog.parse(spec)
    with pytest.raises(InputError, match=cause):
        one.rewrite(normal(name).clone(), Outcome(spec))


def test_a_model_without_attention_is_refused() -> None:
    with pytest.raises(InputError, match="no block of the model has attention"):
        proposed("resnet-dynp", "drop-attention")


def test_outputs_that_exact_passes_compute_anew_are_still_known_by_their_original_names() -> None:
    model = normal("qwen-dynp-ort")
    (one,) = catalog.parse("drop-attention{blocks=0+2}")
    assert isinstance(one, lossy.LossyPass)
    after, _ = lossy.apply(model, one.asked(model, Outcome("drop-attention")), [one])
    run = Pipeline(recipes.named("default", "ort-cpu", None)).rewrite(after)
    assert "fuse-attention" in {step.outcome.name for step in run.steps if step.outcome.rewritten}
    ports = {str(value.name): lossy.port(value) for value in run.model.graph.outputs}
    assert ports["present.0.key"] == "present.1.key" and ports["present.1.value"] == "present.3.value"
