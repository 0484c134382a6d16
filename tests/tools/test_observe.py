"""`burnish.observe`: sites by name, by value or by default; padding found in the graph; errors that say what to do."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as oir
import pytest

import burnish
from burnish.ir.errors import InputError
from burnish.passes.gram import ConvolutionGram, Gram
from burnish.passes.reducers import Moments, Range
from burnish.passes.sites import Keep, Site
from burnish.tools.observe import keeps_of

DEMO = Path(__file__).parents[2] / "tools" / "demo"


def parsed(source: str) -> oir.Model:
    return burnish.load(onnx.parser.parse_model(f'<ir_version: 10, opset_import: ["": 20]> {source}'))


TRANSLATOR = """g (int64[b, s] ids, int64[b, s] m, int64[b, t] out, int64[b, t] k)
  => (float[b, t, 2] y, float[b, s, 2] e)
  <float[5, 2] table = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9}, float[2, 2] w = {1, 2, 3, 4}, float lost = {-10000.0},
   float unit = {1}, int64[1] one = {1}, float[2, 2] v = {1, 0, 1, 1}> {
  x = Gather (table, ids)  e = MatMul (x, w)
  z = Gather (table, out)  q = MatMul (z, v)
  turned = Transpose <perm = [0, 2, 1]> (e)  scores = MatMul (q, turned)
  mf = Cast <to = 1> (m)  mi = Sub (unit, mf)  mu = Unsqueeze (mi, one)  ml = Mul (mu, lost)
  masked = Add (scores, ml)  p = Softmax (masked)  c = MatMul (p, e)
  kf = Cast <to = 1> (k)  last = Constant <value = int64[1] {2}> ()  ku = Unsqueeze (kf, last)  y = Mul (c, ku) }"""


def test_by_default_the_layers_inputs_are_observed() -> None:
    model = burnish.load(str(DEMO / "digits_resnet.onnx"))
    data = [{"image": np.random.default_rng(0).standard_normal((30, 1, 8, 8)).astype(np.float32)}]
    found = burnish.observe(model, data=data)
    assert [type(one) for one in found.values()] == [ConvolutionGram] * 9 + [Gram]
    assert all(isinstance(one, Gram) and one.rows % 30 == 0 for one in found.values())
    ranges = burnish.observe(model, reducer=Range(), data=data)
    assert ranges.keys() == found.keys()


def test_sites_are_names_values_or_sites() -> None:
    model = burnish.load(str(DEMO / "digits_resnet.onnx"))
    logits = next(value for value in model.graph.outputs if value.name == "logits")
    data = [{"image": np.ones((2, 1, 8, 8), np.float32)}]
    given: list[Any] = [["logits"], {"a": "logits"}, {"a": logits}, {"a": Site(logits)}]
    found = [burnish.observe(model, sites, Moments(), data=data) for sites in given]
    assert [list(one) for one in found] == [["logits"], ["a"], ["a"], ["a"]]
    means = [one.mean for each in found for one in each.values() if isinstance(one, Moments)]
    for mean in means:
        np.testing.assert_array_equal(mean, means[0])


def test_made_samples_are_used_when_there_are_none_and_a_module_is_traced() -> None:
    torch = pytest.importorskip("torch")
    module = torch.nn.Sequential(torch.nn.Linear(3, 2)).eval()
    (found,) = burnish.observe(module, inputs=(torch.zeros(4, 3),)).values()
    assert isinstance(found, Gram) and found.matrix.shape == (3, 3)


def test_of_several_masks_the_one_that_fits_counts() -> None:
    model = parsed(TRANSLATOR)
    values = {str(out.name): (out, -1) for node in model.graph for out in node.outputs}
    keeps = keeps_of(model, {name: values[name] for name in ("x", "e", "q", "c", "y")})
    assert all(isinstance(one, Keep) for one in keeps.values())
    assert {name: one.input for name, one in keeps.items() if isinstance(one, Keep)} == {
        "x": "m", "e": "m", "q": "k", "c": "k", "y": "k"
    }  # fmt: skip


@pytest.mark.parametrize(
    ("sites", "options", "message"),
    [
        (["logit"], {"reducer": Gram()}, "did you mean `logits`?"),
        (["logits"], {}, "there is no reducer"),
        (["logits"], {"reducer": {"other": Gram()}}, "site `logits`: there is no reducer"),
        (["logits"], {"reducer": Gram(), "mask": "padding"}, "the model has no input `padding`"),
        (["logits"], {"reducer": Gram(), "data": [{"pixels": np.ones(1)}]}, "input `image` is missing"),
        (["logits"], {"reducer": Gram(), "limit": 10}, "more than 10"),
    ],
)
def test_what_cannot_be_observed_is_an_error_with_a_hint(sites: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError) as raised:
        burnish.observe(str(DEMO / "digits_resnet.onnx"), sites, **options)
    assert message in str(raised.value)


def test_padding_that_cannot_be_told_is_refused_until_it_is_said() -> None:
    model = parsed(
        """g (float[b, s, 2] x, int64[b, s] m) => (float[s, b, 2] t, float[b] y) <int64[1] last = {2}> {
      t = Transpose <perm = [1, 0, 2]> (x)  f = Cast <to = 1> (m)  u = Unsqueeze (f, last)  p = Mul (x, u)
      q = ReduceSum <keepdims = 0> (p, last)  y = ReduceMax <keepdims = 0> (q, r) }
      """.replace("int64[1] last", "int64[1] r = {1}, int64[1] last")
    )
    data = [{"x": np.ones((2, 3, 2), np.float32), "m": np.array([[1, 1, 0], [1, 0, 0]])}]
    with pytest.raises(InputError, match="cannot be told which of its rows are padding.*\n*.*mask=None"):
        burnish.observe(model, ["t"], Moments(), data=data)
    every = burnish.observe(model, ["t"], Moments(), data=data, mask=None)["t"]
    kept = burnish.observe(model, ["x"], Moments(), data=data, mask="m")["x"]
    said = burnish.observe(model, {"x": Site(model.graph.inputs[0], Keep("m", (0, 1)))}, Moments(), data=data)["x"]
    assert [one.rows for one in (every, kept, said) if isinstance(one, Moments)] == [6, 3, 3]
