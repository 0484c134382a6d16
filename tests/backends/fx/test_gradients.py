"""Gradients by initializer: equal to differences of the loss, whatever the spelling of the output."""

from __future__ import annotations

import numpy as np
import onnx_ir as oir
import pytest
import torch
from fx_checks import floats, model_of

from burnish.backends.fx.gradients import gradients
from burnish.backends.ort.session import executor
from burnish.ir.errors import InputError
from burnish.ir.samples import Sample
from burnish.tools.lossy_context import context_for

torch.set_num_threads(1)

MLP = """
g (float[N, 4] x) => (float[N, 3] y) <float[4, 8] w, float[8] b, float[8, 3] v> {
    h = MatMul (x, w)  a = Add (h, b)  r = Tanh (a)  %s
}
"""
LOGITS = MLP % "y = MatMul (r, v)"
PROBABILITIES = MLP % "s = MatMul (r, v)  y = Softmax (s)"
LANGUAGE = """
g (int64[N, S] ids, int64[N, S] mask) => (float[N, S, 7] y)
    <float[7, 4] table, float[4, 7] v, int64[1] axis = {1}, int64[1] last = {-1}, float[1] nothing = {0}> {
    m = Cast <to = 9> (mask)  e = Unsqueeze (m, last)  h = Gather (table, ids)  k = Where (e, h, nothing)
    c = CumSum <reverse = %d> (k, axis)  r = Tanh (c)  y = MatMul (r, v)
}
"""


def language(*, backwards: bool = False) -> oir.Model:
    """A causal language model, or one that sums from the end."""
    return model_of(LANGUAGE % backwards)


def loss(model: oir.Model, sample: Sample, probabilities: bool = False) -> float:
    """The cross-entropy of the labels, in float64 arithmetic behind ONNX Runtime."""
    (y,) = executor()(model).run(sample.feeds).values()
    wide = y.astype(np.float64)
    wide = np.log(wide) if probabilities else wide - np.log(np.exp(wide).sum(-1, keepdims=True))
    return -float(wide[np.arange(len(wide)), sample.labels].sum())


@pytest.mark.parametrize("text", [LOGITS, PROBABILITIES])
def test_they_are_the_slopes_of_the_loss(text: str) -> None:
    model = model_of(text)
    samples = [Sample(str(i), {"x": floats(5, 4, seed=i)}, np.array([0, 1, 2, 1, 0])) for i in range(2)]
    found = gradients(model, samples)
    assert {name: array.shape for name, array in found.items()} == {"w": (4, 8), "b": (8,), "v": (8, 3)}
    assert all(array.dtype == np.float64 for array in found.values())
    for name, array in found.items():
        way = floats(*array.shape, seed=9)
        weight = model.graph.initializers[name]
        held, values = weight.const_value, []
        for step in (1e-2, -1e-2):
            weight.const_value = oir.tensor((held.numpy() + step * way).astype(np.float32), name=name)
            values.append(sum(loss(model, sample, text == PROBABILITIES) for sample in samples))
        weight.const_value = held
        assert (values[0] - values[1]) / 2e-2 == pytest.approx(float((array * way).sum()), rel=2e-3, abs=1e-3)


def test_a_language_model_is_asked_for_the_next_token_and_padding_does_not_count() -> None:
    model = language()
    ids = np.array([[1, 4, 2, 6], [3, 5, 0, 0]])
    mask = np.array([[1, 1, 1, 1], [1, 1, 0, 0]])
    padded = context_for(model, [Sample("s", {"ids": ids, "mask": mask})])
    assert padded.gradients is not None
    together = padded.gradients(model, padded.samples)
    apart = [gradients(model, [Sample("s", {"ids": row, "mask": np.ones_like(row)})]) for row in (ids[:1], ids[1:, :2])]
    for name, array in together.items():
        np.testing.assert_allclose(array, apart[0][name] + apart[1][name], atol=1e-6)
    given = gradients(model, [Sample("s", {"ids": ids[:1], "mask": mask[:1]}, ids[:1])])
    np.testing.assert_allclose(given["v"], apart[0]["v"], atol=1e-6)


def test_a_weight_read_twice_has_the_sum_and_an_unread_one_zero() -> None:
    model = model_of("""
        g (float[N, 3] x) => (float[N, 3] y, float[3, 3] z) <float[3, 3] w, float[3, 3] u> {
            a = MatMul (x, w)  b = Tanh (a)  y = MatMul (b, w)  z = MatMul (u, u)
        }""")
    sample = Sample("s", {"x": floats(4, 3)}, np.array([0, 1, 2, 0]))
    found = gradients(model, [sample])
    assert np.abs(found["w"]).max() > 0 and not found["u"].any()


@pytest.mark.parametrize(
    ("model", "sample", "message"),
    [
        (model_of(LOGITS), Sample("s", {"x": floats(2, 4)}), "there are no labels"),
        (model_of(LOGITS), Sample("s", {"x": floats(2, 4)}, np.array([0])), "do not fit"),
        (model_of(LOGITS), Sample("s", {"x": floats(2, 4)}, np.array([0.5, 1.0])), "do not fit"),
        (model_of(LOGITS), Sample("s", {"x": floats(2, 4)}, np.array([0, 3])), "beyond the 3 classes"),
        (model_of(LOGITS), Sample("s", {}, np.array([0, 3])), "input `x` is missing"),
        (model_of(MLP % "y = Tanh (r)"), Sample("s", {"x": floats(2, 4)}, np.array([0, 1])), "no classification"),
        (
            language(),
            Sample("s", {"ids": np.array([[1, 2]]), "mask": np.ones((1, 2), np.int64)}, np.zeros((3, 1), np.int64)),
            "do not fit",
        ),
    ],
)  # fmt: skip
def test_what_cannot_be_answered_is_refused(model: oir.Model, sample: Sample, message: str) -> None:
    with pytest.raises(InputError, match=message):
        gradients(model, [sample])


def test_a_model_that_looks_ahead_has_no_next_token() -> None:
    feeds = {"ids": np.array([[1, 4, 2]]), "mask": np.ones((1, 3), np.int64)}
    with pytest.raises(InputError, match="sees the tokens"):
        gradients(language(backwards=True), [Sample("s", feeds)])


def test_no_samples_are_refused() -> None:
    with pytest.raises(InputError, match="no samples"):
        gradients(model_of(LOGITS), [])
