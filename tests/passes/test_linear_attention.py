"""Attention with a ReLU kernel: both orders compute the same, and what it computes is the formula."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as oir
import pytest
from golden import parse_graph, prepare
from laws import OrtRunner

from burnish.backends.reference.runner import ReferenceRunner
from burnish.ir.edit import name_nodes
from burnish.ir.errors import InputError
from burnish.ir.samples import Sample
from burnish.passes import catalog, lossy, recipes
from burnish.passes.base import Outcome
from burnish.passes.kernel_attention import replaced
from burnish.passes.lossy import LossyPass
from burnish.passes.pipeline import Pipeline
from burnish.tools.lossy_context import context_for

DEMO = Path(__file__).resolve().parents[2] / "tools" / "demo"
SOURCE = """<opset_import: ["": 20]>
g (float[N, 2, S, 6] q, float[N, 2, S, 6] k, float[N, 2, S, 6] v) => (float[N, 2, S, 6] y) <float s = {0.5}> {
  t = Transpose <perm = [0, 1, 3, 2]> (k)
  a = MatMul (q, t)
  b = Mul (a, s)
  p = Softmax <axis = -1> (b)
  y = MatMul (p, v)
}"""


def feeds_of(tokens: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(tokens)
    return {name: rng.normal(0.3, 1, (3, 2, tokens, 6)).astype(np.float32) for name in "qkv"}


def linear(model: oir.Model, feeds: dict[str, np.ndarray], spec: str) -> oir.Model:
    (one,) = catalog.parse(spec)
    assert isinstance(one, LossyPass)
    edits = one.propose(model, context_for(model, [Sample("s", feeds)]), Outcome(""))
    assert edits
    return lossy.apply(model, edits, [one])[0]


@pytest.mark.parametrize("tokens", [1, 7, 49])
def test_both_orders_compute_the_formula_for_any_number_of_tokens(tokens: int) -> None:
    model, feeds = prepare(parse_graph(SOURCE), catalog.make("linear-attention")), feeds_of(tokens)
    q, k, v = (feeds[name].astype(float) for name in "qkv")
    weights = np.maximum(q, 0) @ np.maximum(k, 0).swapaxes(2, 3)
    taps = np.random.default_rng(0).normal(size=(6, 1, 1, 3))
    padded = np.pad(v, [(0, 0), (0, 0), (1, 1), (0, 0)])
    mixed = sum(padded[:, :, i : i + tokens] * taps[:, 0, 0, i] for i in range(3))
    wanted = weights @ v / (weights.sum(-1, keepdims=True) + 1e-6) + mixed
    for first in ("kv", "qk"):
        after = linear(model, feeds_of(9), f"linear-attention{{first={first},taps=3}}")
        (place,) = replaced(after)
        (weight,) = place.trained
        assert weight.const_value is not None and not weight.const_value.numpy().any()
        weight.const_value = oir.tensor(taps.astype(np.float32), name=weight.name)
        found = OrtRunner(after, optimize=True).run(feeds)["y"]
        assert np.abs(found - wanted).max() <= 1e-4 * np.abs(wanted).max()
        exact = ReferenceRunner(after).run(feeds)["y"]
        assert np.abs(exact - wanted).max() <= 1e-6 * np.abs(wanted).max()


def test_the_order_follows_the_largest_sample() -> None:
    model = prepare(parse_graph(SOURCE), catalog.make("linear-attention"))
    for tokens, first in ((5, "qk"), (7, "kv")):
        one = catalog.make("linear-attention")
        assert isinstance(one, LossyPass)
        (edit,) = one.propose(model, context_for(model, [Sample("s", feeds_of(tokens))]), Outcome(""))
        assert edit.option == f"{first} first"


def test_an_even_number_of_taps_is_refused() -> None:
    with pytest.raises(InputError, match="`taps` is 4"):
        catalog.parse("linear-attention{taps=4}")


def test_a_vision_transformer_keeps_most_of_its_digits_and_both_orders_agree() -> None:
    data = np.load(DEMO / "digits.npz")
    model = Pipeline(recipes.NORMAL_FORM).rewrite(oir.load(DEMO / "digits_vit.onnx")).model
    name_nodes(model)
    scores = []
    for first in ("kv", "qk"):
        after = linear(model, {"image": data["image"]}, f"linear-attention{{first={first}}}")
        merged = Pipeline(recipes.named("default", "ort-cpu", None)).rewrite(after).model
        assert not any(node.op_type in ("Softmax", "Attention") for node in merged.graph)
        scores.append(OrtRunner(merged, optimize=True).run({"image": data["image"]})["logits"])
    assert np.abs(scores[0] - scores[1]).max() <= 1e-4 * np.abs(scores[0]).max()
    assert (scores[0].argmax(1) == data["label"]).mean() > 0.6
