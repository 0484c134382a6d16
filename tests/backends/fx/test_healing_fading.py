"""Replaced norms in training: they begin as the original, end as the replacement, and count no padding."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import onnx_ir as oir
import pytest
import torch
from fx_checks import model_of

from burnish.backends.fx.bridge import bridge_of
from burnish.backends.fx.builder import to_graph_module
from burnish.backends.fx.healing import HealOptions, heal
from burnish.backends.fx.healing_fading import FadingParts, RowNorm
from burnish.backends.fx.healing_options import read_options
from burnish.backends.ort.session import executor
from burnish.ir.edit import name_nodes
from burnish.ir.errors import InputError
from burnish.ir.samples import Sample
from burnish.ir.views.norm import norms
from burnish.passes import catalog, lossy, recipes
from burnish.passes.base import Outcome
from burnish.passes.kernel_attention import replaced as replaced_attentions
from burnish.passes.lossy import Keeps, LossyPass
from burnish.passes.pipeline import Pipeline
from burnish.passes.replaced_norms import replaced
from burnish.passes.sites import Keep
from burnish.tools.lossy_context import context_for
from burnish.tools.observe import keeps_of

torch.set_num_threads(1)
DEMO = Path(__file__).resolve().parents[3] / "tools" / "demo"
QUICK = HealOptions(steps=40, batch=32, rate=2e-3, patience=10)

BLOCK = """
g (int64[N, S] mask, float[N, S, 6] x) => (float[N, S, 6] y)
    <float[6] g, float[6] c, float[6, 6] w, float[6] r, float[6, 6] v, int64[1] last = {2}> {
  n = LayerNormalization (x, g, c)
  a = MatMul (n, w)
  s = Add (x, a)
  m = RMSNormalization (s, r)
  b = MatMul (m, v)
  t = Add (s, b)
  f = Cast <to = 1> (mask)
  u = Unsqueeze (f, last)
  y = Mul (t, u)
}"""


def student_of(model: oir.Model, samples: list[Sample], spec: str = "replace-norm") -> oir.Model:
    """The model with all norms replaced."""
    name_nodes(model)
    (one,) = catalog.parse(spec)
    assert isinstance(one, LossyPass)
    edits = one.propose(model, context_for(model, samples), Outcome(""))
    assert len(edits) == len(list(norms(model)))
    return lossy.apply(model, edits, [one])[0]


def outputs(model: oir.Model, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    runner = executor(threads=1)(model)
    found = runner.run(feeds)
    runner.close()
    return found


@pytest.fixture(scope="module")
def feeds() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    mask = np.ones((5, 7), np.int64)
    mask[1:, 4:] = 0
    x = rng.normal(0.2, 1.5, (5, 7, 6)).astype(np.float32)
    return {"mask": mask, "x": np.where(mask[:, :, None] == 1, x, np.float32(50))}


@pytest.fixture(scope="module")
def block() -> oir.Model:
    return Pipeline(recipes.NORMAL_FORM).rewrite(model_of(f'<ir_version: 10, opset_import: ["": 23]>{BLOCK}')).model


@pytest.fixture(scope="module")
def digits() -> list[Sample]:
    data = np.load(DEMO / "digits.npz")
    return [Sample("digits", {"image": data["image"][:250]}, data["label"][:250])]


@pytest.mark.parametrize("spec", ["replace-norm", "replace-norm{with=affine}"])
def test_training_begins_as_the_original_and_ends_as_the_replacement(
    block: oir.Model, feeds: dict[str, np.ndarray], spec: str
) -> None:
    student = student_of(block, [Sample("s", feeds)], spec)
    module = to_graph_module(student)
    fading = FadingParts(student, module, 0.1, keeps_of)
    arrays = [torch.from_numpy(feeds[name]) for name in bridge_of(module).inputs]
    wanted = [outputs(model, feeds)["y"] for model in (block, student)]
    for training, share, index in ((True, 0.0, 0), (False, 0.0, 1), (False, 0.9, 1)):
        module.train(training)
        fading.at(0.5, share)
        assert np.allclose(module(*arrays)[0].detach().numpy(), wanted[index], atol=1e-4), (training, share)
    fading.at(0.5, 0.25)
    module.train()
    if "affine" in spec:
        first, half = module(*arrays)[0], fading
        half.at(0.5, 0.75)
        assert np.allclose(module(*arrays)[0].detach().numpy(), wanted[1], atol=1e-4)
        assert not torch.allclose(first, module(*arrays)[0], atol=1e-3)


def test_statistics_are_those_of_the_rows_that_count_and_are_averaged_once_a_step(
    block: oir.Model, feeds: dict[str, np.ndarray]
) -> None:
    student = student_of(block, [Sample("s", feeds)])
    module = to_graph_module(student)
    fading = FadingParts(student, module, 0.25, keeps_of)
    before = {path: one.clone() for path, one in fading.statistics().items()}
    module.train()
    arrays = [torch.from_numpy(feeds[name] * (2 if name == "x" else 1)) for name in bridge_of(module).inputs]
    cut = [array[:2] for array in arrays], [array[2:] for array in arrays]
    for part in cut:
        module(*part)
    fading.average(list)
    kept = 2.0 * feeds["x"][feeds["mask"] == 1].astype(np.float64)
    for path, now in zip(list(before)[:2], (kept.mean(0), kept.var(0)), strict=True):
        expected = 0.75 * before[path].numpy() + 0.25 * now
        assert np.allclose(fading.statistics()[path].detach().numpy(), expected, rtol=1e-4), path
    after = {path: one.clone() for path, one in fading.statistics().items()}
    fading.average(list)
    assert all(torch.equal(after[path], one) for path, one in fading.statistics().items())
    module.eval()
    module(*arrays)
    fading.average(list)
    assert all(torch.equal(after[path], one) for path, one in fading.statistics().items())


def test_a_row_alone_is_normalized_by_the_running_statistics() -> None:
    made = RowNorm(1e-5, Keep("mask", (0, 2))).train()
    x, mask = torch.randn(2, 3, 4), torch.zeros(2, 4, dtype=torch.int64)
    mask[0, 1] = 1
    (y,) = made(x, torch.ones(3), torch.zeros(3), torch.zeros(3), torch.ones(3), mask)
    assert torch.allclose(y, x, atol=1e-4) and not made.seen


@pytest.mark.parametrize("spec", ["replace-norm", "replace-norm{with=affine}"])
def test_a_healed_transformer_without_norms_does_what_the_original_does(
    vit: oir.Model, digits: list[Sample], spec: str
) -> None:
    student = student_of(vit, digits, spec)
    healed = heal(student, vit, digits, QUICK, keeps=keeps_of)
    again = heal(student, vit, digits, QUICK, keeps=keeps_of)
    assert healed.improved and healed.after < 0.5 * healed.before
    weights = [
        {name: value.const_value.numpy().tobytes() for name, value in one.model.graph.initializers.items()}
        for one in (healed, again)
    ]
    assert weights[0] == weights[1]
    found = list(replaced(student))
    names = {str(value.name) for one in found for value in (*one.trained, *one.statistics)}
    assert names <= set(healed.written) and len(names) == len(found) * (2 if "affine" in spec else 5)
    merged = Pipeline(recipes.named("default", "onnx", None)).rewrite(healed.model).model
    assert not list(norms(merged))
    one, other = (outputs(model, digits[0].feeds)["logits"] for model in (healed.model, merged))
    assert np.abs(one - other).max() <= 1e-5 * np.abs(one).max()


def test_statistics_stay_without_momentum_and_norms_are_trained_whatever_else_is(
    vit: oir.Model, digits: list[Sample]
) -> None:
    student = student_of(vit, digits)
    healed = heal(student, vit, digits, HealOptions(steps=3, batch=32, rate=1e-3, train="last", momentum=0, fade=0))
    found = list(replaced(student))
    assert {str(value.name) for one in found for value in one.trained} <= set(healed.written)
    assert not {str(value.name) for one in found for value in one.statistics} & set(healed.written)


def test_looks_while_norms_fade_out_are_no_reason_to_end(vit: oir.Model, digits: list[Sample]) -> None:
    student = student_of(vit, digits)
    options = HealOptions(steps=10, batch=32, rate=0.0, evaluations=10, patience=2, fade=0.6, momentum=0)
    assert heal(student, vit, digits, options).steps == 8


def test_rows_that_cannot_be_told_from_padding_are_refused(block: oir.Model, feeds: dict[str, np.ndarray]) -> None:
    samples = [Sample("s", feeds), Sample("t", feeds)]
    student = student_of(block, samples)
    why: Keeps = lambda model, values: dict.fromkeys(values, "two masks fit")  # noqa: E731
    with pytest.raises(InputError, match="padding cannot be left out of its statistics: two masks fit"):
        heal(student, block, samples, HealOptions(steps=1), keeps=why)
    with pytest.raises(InputError, match="`fade` is 1"):
        heal(student, block, samples, HealOptions(fade=1.0))


def test_options_are_read_from_text() -> None:
    wanted = HealOptions(steps=600, rate=1e-3, train="lora")
    assert read_options("steps=600, rate=1e-3,train=lora,memory=none") == wanted
    for text, message in {
        "step=1": "healing has no option `step`",
        "steps": "`steps` gives no value",
        "steps=x": "`steps` cannot be `x`",
        "fade=1": "`fade` is 1",
        "train=some": "`train` cannot be `some`",
    }.items():
        with pytest.raises(InputError, match=message):
            read_options(text)


def test_attention_fades_out_too(vit: oir.Model, digits: list[Sample]) -> None:
    (one,) = catalog.parse("linear-attention")
    assert isinstance(one, LossyPass)
    edits = one.propose(vit, context_for(vit, digits), Outcome(""))
    student, _ = lossy.apply(vit, edits, [one])
    module = to_graph_module(student)
    fading = FadingParts(student, module, 0.1, None)
    feeds = digits[0].feeds
    wanted = [outputs(model, feeds)["logits"] for model in (vit, student)]
    for training, share, index in ((True, 0.0, 0), (False, 0.0, 1), (True, 0.5, 1)):
        module.train(training)
        fading.at(0.5, share)
        found = module(torch.from_numpy(feeds["image"]))[0].detach().numpy()
        assert np.allclose(found, wanted[index], atol=1e-3), (training, share)
    healed = heal(student, vit, digits, QUICK)
    assert healed.improved and healed.after < 0.5 * healed.before
    assert {str(value.name) for place in replaced_attentions(student) for value in place.trained} <= set(healed.written)
