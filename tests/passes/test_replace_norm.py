"""Norms with fixed statistics: the fit is that of least squares, and merging keeps what the replacement computes."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import onnx_ir as oir
import pytest
from golden import parse_graph, prepare
from laws import OrtRunner

import burnish
from burnish.backends.reference.runner import ReferenceRunner
from burnish.ir.errors import InputError
from burnish.ir.samples import Sample
from burnish.ir.views.norm import norms
from burnish.passes import catalog, lossy, recipes
from burnish.passes.base import Outcome
from burnish.passes.difference import change
from burnish.passes.lossy import Edit, LossyPass
from burnish.passes.norm_fit import NormFit, fitted, normalized
from burnish.passes.pipeline import Pipeline
from burnish.passes.replaced_norms import replaced
from burnish.tools.lossy_context import context_for
from burnish.tools.passes_command import describe

DEMO = Path(__file__).resolve().parents[2] / "tools" / "demo"

PRE = """
g (float[N, 9, 6] x) => (float[N, 9, 6] y)
    <float[6] g, float[6] c, float[6, 6] w, float[6] b, float[6, 12] u, float[12, 6] d, float[6] r> {
  n = LayerNormalization (x, g, c)
  p = MatMul (n, w)
  q = Add (p, b)
  s = Add (x, q)
  m = RMSNormalization (s, r)
  h = MatMul (m, u)
  e = Gelu (h)
  o = MatMul (e, d)
  y = Add (s, o)
}"""
POST = """
g (float[N, 9, 6] x) => (float[N, 9, 6] y) <float[6] g, float[6] c, float[6, 6] w> {
  n = LayerNormalization (x, g, c)
  p = MatMul (n, w)
  s = Add (n, p)
  y = LayerNormalization (s, c, g)
}"""
PADDED = """
g (float[N, 9, 6] x) => (float[N, 10, 6] y) <float[6] g, float[6] c, float[6, 6] w, int64[6] a = {0, 0, 0, 0, 1, 0}> {
  n = LayerNormalization (x, g, c)
  d = Pad (n, a)
  y = MatMul (d, w)
}"""
HEADS = """
g (float[N, 2, 9, 6] x, float[N, 2, 9, 6] k) => (float[N, 2, 9, 9] y) <float[6] g> {
  n = RMSNormalization (x, g)
  t = Transpose <perm = [0, 1, 3, 2]> (k)
  y = MatMul (n, t)
}"""
MASKED = """
g (int64[N, S] mask, float[N, S, 6] x) => (float[N, S, 6] y)
    <float[6] g, float[6] c, float[6, 6] w, int64[1] last = {2}> {
  n = LayerNormalization (x, g, c)
  a = MatMul (n, w)
  f = Cast <to = 1> (mask)
  u = Unsqueeze (f, last)
  y = Mul (a, u)
}"""


def rows(*shape: int, seed: int = 0) -> np.ndarray:
    """Rows of unequal lengths and channels of unequal means and sizes."""
    rng = np.random.default_rng(seed)
    sizes = rng.uniform(0.5, 2, (*shape[:-1], 1)) * rng.uniform(0.2, 3, shape[-1])
    return (rng.normal(0.3, 1, shape) * sizes).astype(np.float32)


def model_of(source: str) -> oir.Model:
    return prepare(parse_graph(source), catalog.make("replace-norm"))


def proposed(
    model: oir.Model, samples: list[Sample], spec: str = "replace-norm"
) -> tuple[LossyPass, list[Edit], Outcome]:
    (one,) = catalog.parse(spec)
    assert isinstance(one, LossyPass)
    outcome = Outcome(one.pass_name())
    return one, one.propose(model, context_for(model, samples), outcome), outcome


def without_norms(source: str, spec: str = "replace-norm") -> tuple[oir.Model, dict[str, np.ndarray]]:
    """The model with every norm replaced, and inputs."""
    model = model_of(f'<opset_import: ["": 23]>{source}')
    feeds = {
        str(value.name): rows(3, *(int(size) for size in list(value.shape or ())[1:]), seed=i)
        for i, value in enumerate(model.graph.inputs)
    }
    one, edits, _ = proposed(model, [Sample("rows", feeds)], spec)
    assert len(edits) == len(list(norms(model)))
    return lossy.apply(model, edits, [one])[0], feeds


def merged(model: oir.Model) -> oir.Model:
    return Pipeline(recipes.named("default", "ort-cpu", None)).rewrite(model).model


@pytest.mark.parametrize("centred", [True, False])
def test_the_fit_is_that_of_least_squares_however_the_rows_come(centred: bool) -> None:
    x = rows(700, 5)
    shifted = x - x.mean(1, keepdims=True) if centred else x
    normal = shifted / np.sqrt(np.square(shifted).mean(1, keepdims=True) + 1e-3)
    gain, bias = np.arange(5) - 2.0, np.ones(5)
    whole, parts, other = (NormFit(centred, 1e-3) for _ in range(3))
    whole.add(x)
    parts.add(x[:1])
    parts.add(x[1:300].reshape(13, 23, 5))
    other.add(x[300:])
    parts.merge(other.restored(other.state()))
    for seen in (whole, parts):
        found = fitted(seen, gain, bias)
        for channel in range(5):
            slope, shift = np.polyfit(x[:, channel].astype(float), gain[channel] * normal[:, channel] + 1, 1)
            assert found.scale[channel] == pytest.approx(slope, abs=1e-6)
            assert found.shift[channel] == pytest.approx(shift, abs=1e-6)
        assert np.allclose(found.mean, x.mean(0)) and np.allclose(found.variance, x.var(0), rtol=1e-5)


@pytest.mark.parametrize(
    ("source", "left"), [(PRE, {}), (POST, {"Mul": 1}), (PADDED, {"Mul": 1, "Pad": 1}), (HEADS, {"Mul": 1})]
)
@pytest.mark.parametrize("spec", ["replace-norm", "replace-norm{with=affine}"])
def test_merged_it_computes_the_same_and_what_no_layer_takes_in_is_a_mul_and_an_add(
    source: str, left: dict[str, int], spec: str
) -> None:
    model, feeds = without_norms(source, spec)
    after = merged(model)
    operators = Counter(node.op_type for node in after.graph)
    assert not {"BatchNormalization", "LayerNormalization", "RMSNormalization"} & set(operators)
    assert {name: operators[name] for name in ("Mul", "Pad") if operators[name]} == left
    one, other = (ReferenceRunner(each).run(feeds)["y"] for each in (model, after))
    assert np.abs(one - other).max() <= 1e-9 * np.abs(one).max()
    one, other = (OrtRunner(each, optimize=True).run(feeds)["y"] for each in (model, after))
    assert np.abs(one - other).max() <= 1e-5 * np.abs(one).max()


def test_a_stack_with_norms_behind_its_sums_keeps_one_mul_and_one_add_at_its_end() -> None:
    source = """
g (float[N, 9, 6] x) => (float[N, 9, 6] y) <float[6] g, float[6] c, float[6, 12] u, float[12, 6] d, float[6] e> {
  h0 = LayerNormalization (x, g, c)"""
    for i in range(4):
        source += f"""
  u{i} = MatMul (h{i}, u)
  r{i} = Relu (u{i})
  d{i} = MatMul (r{i}, d)
  b{i} = Add (d{i}, e)
  s{i} = Add (h{i}, b{i})
  h{i + 1} = LayerNormalization (s{i}, g, c)"""
    model, feeds = without_norms(source + "\n  y = Identity (h4)\n}")
    after = merged(model)
    operators = Counter(node.op_type for node in after.graph)
    assert operators == {"MatMul": 8, "Relu": 4, "Add": 4 + 4 + 4 + 1, "Mul": 1}
    one, other = (ReferenceRunner(each).run(feeds)["y"] for each in (model, after))
    assert np.abs(one - other).max() <= 1e-9 * np.abs(one).max()
    one, other = (OrtRunner(each, optimize=True).run(feeds)["y"] for each in (model, after))
    assert np.abs(one - other).max() <= 1e-5 * np.abs(one).max()


@pytest.mark.parametrize("spec", ["replace-norm", "replace-norm{start=statistics}", "replace-norm{with=affine}"])
def test_the_start_is_what_the_samples_tell_in_either_form(spec: str) -> None:
    model, feeds = without_norms(POST, spec)
    x, (first, last) = feeds["x"].astype(float), replaced(model)
    wanted = normalized(x.reshape(-1, 6), True, 1e-5) * first.former.gain + first.former.bias
    model.graph.outputs.append(first.output)
    found = ReferenceRunner(model).run(feeds)[str(first.output.name)]
    assert (first.batch is None) == ("affine" in spec) and last.output is model.graph.outputs[0]
    assert np.allclose(found.mean((0, 1)), first.former.bias if "statistics" in spec else wanted.mean(0), atol=1e-6)
    if "statistics" in spec:
        deviations = np.abs(first.former.gain) * np.sqrt(x.var((0, 1)) / (x.var((0, 1)) + 1e-5))
        assert np.allclose(found.std((0, 1)), deviations, rtol=1e-5)


def test_an_option_that_is_a_word_of_python_is_read_written_and_explained() -> None:
    (one,) = catalog.parse("replace-norm{with=affine}")
    assert (
        catalog.spec(one) == "replace-norm{with=affine}"
        and catalog.spec(catalog.make("replace-norm")) == "replace-norm"
    )
    option = next(option for option in describe("replace-norm")["options"] if option["name"] == "with")
    assert option["default"] == "repbn" and "writes" in option["help"]
    with pytest.raises(InputError, match="has no option `with_`"):
        catalog.parse("replace-norm{with_=affine}")


def test_an_edit_is_timed_with_the_layers_that_take_it_in() -> None:
    model = model_of(f'<opset_import: ["": 23]>{PRE}')
    one, edits, _ = proposed(model, [Sample("rows", {"x": rows(3, 9, 6)})])
    found = [change(model, lossy.apply(model, [edit], [one])[0]) for edit in edits]
    for side, kinds in zip(found, ({"MatMul": 1, "Add": 1}, {"MatMul": 1}), strict=True):
        assert side.removed is not None and side.added is not None
        before, after = (Counter(node.op_type for node in part.model.graph) for part in (side.removed, side.added))
        assert {name: before[name] for name in ("MatMul", "Add") if before[name]} == kinds
        assert after["BatchNormalization"] == 1 and after["MatMul"] == 1
        assert set(node.op_type for node in merged(side.added.model).graph) == {"MatMul", "Add"}


def test_rows_of_padding_do_not_count() -> None:
    model, real, mask = model_of(MASKED), rows(4, 8, 6), np.ones((4, 8), np.int64)
    mask[:, 5:] = 0
    payloads = []
    for junk in (0.0, 1e3):
        feeds = {"mask": mask, "x": np.where(mask[:, :, None] == 1, real, np.float32(junk))}
        payloads.append(proposed(model, [Sample("s", feeds)])[1][0].payload)
    own = proposed(model, [Sample("s", {"mask": mask[:, :5], "x": real[:, :5]})])[1][0].payload
    for name, array in own.items():
        assert np.allclose(payloads[0][name], array) and np.array_equal(payloads[0][name], payloads[1][name]), name


def test_nothing_seen_and_numbers_without_end_are_refused() -> None:
    model = model_of(MASKED)
    for mask, x, reason in ((0, 1.0, "no row was seen"), (1, np.inf, "NaN, infinity")):
        feeds = {"mask": np.full((1, 4), mask, np.int64), "x": np.full((1, 4, 6), x, np.float32)}
        _, edits, outcome = proposed(model, [Sample("s", feeds)])
        assert not edits and reason in outcome.skipped[0].reason


def test_the_fitted_start_of_a_vision_transformer_beats_its_statistics() -> None:
    data = np.load(DEMO / "digits.npz")
    found = {}
    for start in ("fitted", "statistics"):
        result = burnish.optimize(
            DEMO / "digits_vit.onnx", passes=[f"replace-norm{{start={start}}}"], data=DEMO / "digits.npz"
        )
        assert not list(norms(result.model))
        guesses = OrtRunner(result.model, optimize=True).run({"image": data["image"]})["logits"].argmax(1)
        found[start] = (guesses == data["label"]).mean()
    assert found["fitted"] > 0.8 > 0.3 > found["statistics"]
