"""Heads of keys and values that are alike become one without loss, and others the best one there is."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import onnx_ir as oir
import pytest
from decoding import normal
from golden import parse_graph, prepare
from laws import OrtRunner
from pooled_heads import (
    CACHED,
    ENCODERS,
    FAMILIES,
    MORE,
    SLOW,
    UNCACHED,
    alike,
    heads_of,
    parsed,
    sample,
)

from burnish.ir.views.attention_layer import Heads
from burnish.passes import lossy
from burnish.passes.base import Outcome
from burnish.passes.kv_families import families, turn_of
from burnish.passes.kv_heads import Turn, pooled
from burnish.passes.kv_layers import KeyLayers


def outputs(model: oir.Model, given: oir.Model) -> np.ndarray:
    """The first output on a sample of another model."""
    runner = OrtRunner(model, optimize=True)
    found = next(iter(runner.run(lossy.feeds(model, sample(given).feeds)).values()))
    runner.close()
    return found


@pytest.mark.parametrize("how", ["fit", "mean"])
@pytest.mark.parametrize(
    "name",
    [
        *("llama-kv-dynp", "gpt2-ts", "bert-s-ts"),
        *(pytest.param(one, marks=SLOW) for one in (*CACHED[1:], *MORE, *UNCACHED[1:], *FAMILIES, *ENCODERS[1:])),
    ],
)
def test_heads_that_are_alike_become_one_without_loss(name: str, how: str) -> None:
    model, random = normal(name).clone(), np.random.default_rng(0)
    found = KeyLayers(model)
    for family in families(found):
        if family.layer.kv_heads > 1:
            family.layer.write(model, alike(family.layer, turn_of(found, family), 1, how, random))
    after, _ = lossy.apply(
        model, parsed(f"groups=1,how={how}").asked(model, Outcome("")), [parsed(f"groups=1,how={how}")]
    )
    assert set(heads_of(after)) == {1}
    expected = outputs(model, model)
    np.testing.assert_allclose(outputs(after, model), expected, atol=1e-4 * float(np.abs(expected).max()))


_OWN = """
<ir_version: 10, opset_import: ["": 20, "com.microsoft": 1]>
g (float[N, S, 16] x) => (float[N, S, 16] y)
<float[16, 16] qa, float[16, 16] ka, float[16, 16] va, float[48] bias, float[16, 16] oa> {
  q = MatMul (x, qa)  k = MatMul (x, ka)  v = MatMul (x, va)
  w = com.microsoft.MultiHeadAttention <num_heads = 4> (q, k, v, bias)  m = MatMul (w, oa)  y = Add (x, m)
}
"""
_PACKED = """
<ir_version: 10, opset_import: ["": 20, "com.microsoft": 1]>
g (float[N, S, 16] x) => (float[N, S, 16] y) <float[16, 48] a, float[48] bias, float[16, 16] oa> {
  f = MatMul (x, a)  q, k, v = Split <axis = 2, num_outputs = 3> (f)
  w = com.microsoft.MultiHeadAttention <num_heads = 4> (q, k, v, bias)  m = MatMul (w, oa)  y = Add (x, m)
}
"""
_GROUPED = """
<ir_version: 10, opset_import: ["": 21, "com.microsoft": 1]>
g (float[N, S, 64] x, float[N, 4, P, 16] past_key, float[N, 4, P, 16] past_value, int32[N] lengths, int32 total)
  => (float[N, S, 64] y, float[N, 4, T, 16] key, float[N, 4, T, 16] value)
<float[64, 192] a, float[192] bias, float[64, 64] oa, float[32, 8] cos, float[32, 8] sin> {
  h = MatMul (x, a)  f = Add (h, bias)
  w, key, value = com.microsoft.GroupQueryAttention <num_heads = 4, kv_num_heads = 4, do_rotary = 1>
    (f, , , past_key, past_value, lengths, total, cos, sin)
  m = MatMul (w, oa)  y = Add (x, m)
}
"""


@pytest.mark.parametrize("source", [_OWN, _PACKED, _GROUPED], ids=["own bias", "packed", "packed into the operator"])
def test_operators_with_packed_matrices_and_biases_of_their_own(source: str) -> None:
    model, random = prepare(parse_graph(source), parsed("groups=2")), np.random.default_rng(2)
    found = KeyLayers(model)
    (family,) = families(found)
    family.layer.write(model, alike(family.layer, turn_of(found, family), 2, "fit", random))
    width = 64 if source is _GROUPED else 16
    feeds = {"x": random.standard_normal((2, 5, width)).astype(np.float32)}
    if source is _GROUPED:
        empty = np.zeros((2, 4, 0, 16), np.float32)
        feeds |= {"past_key": empty, "past_value": empty, "lengths": np.full(2, 4, np.int32)}
        feeds |= {"total": np.array(5, np.int32)}
    edits = parsed("groups=2").asked(model, Outcome(""))
    after, _ = lossy.apply(model, edits, [parsed("groups=2")])
    assert heads_of(after) == [2]
    runners = [OrtRunner(one, optimize=True) for one in (model, after)]
    expected, got = (one.run(lossy.feeds(two, feeds))["y"] for one, two in zip(runners, (model, after), strict=True))
    for one in runners:
        one.close()
    np.testing.assert_allclose(got, expected, atol=1e-4 * float(np.abs(expected).max()))


@pytest.mark.parametrize("name", ["genai-mha", pytest.param("bert-s-ts", marks=SLOW)])
def test_heads_that_are_alike_find_each_other_wherever_they_are(name: str) -> None:
    model, random = normal(name).clone(), np.random.default_rng(1)
    found = KeyLayers(model)
    for family in families(found):
        family.layer.write(model, alike(family.layer, turn_of(found, family), 2, "fit", random))
    expected = outputs(model, model)
    losses = []
    for how in ("fit", "mean"):
        edits = parsed(f"groups=2,how={how}").asked(model, Outcome(""))
        after, _ = lossy.apply(model, edits, [parsed(f"groups=2,how={how}")])
        assert set(heads_of(after)) == {2}
        losses.append(float(np.abs(outputs(after, model) - expected).max() / np.abs(expected).max()))
    assert losses[0] < 1e-4 < 1e-2 < losses[1]


def test_the_fit_is_the_best_head_for_what_the_samples_show() -> None:
    """Of any head and any way to read it, none leaves less of what the outputs see of the values."""
    random = np.random.default_rng(0)
    count, size, inputs = 3, 4, 10
    heads = Heads(
        *(random.standard_normal((count, size, inputs)) for _ in range(3)), random.standard_normal((9, count, size))
    )
    x = random.standard_normal((200, inputs)) @ random.standard_normal((inputs, inputs))
    moment = np.ones((inputs + 1, inputs + 1))
    moment[:-1, :-1], moment[:-1, -1], moment[-1, :-1] = x.T @ x / len(x), x.mean(0), x.mean(0)
    turn = Turn(np.zeros((2, 0), np.int64), False, False)

    def left(new: Heads) -> float:
        assert new.value is not None and heads.value is not None
        total = 0.0
        for head in range(count):
            was = heads.output[:, head] @ heads.value[head]
            now = new.output[:, head] @ new.value[0]
            total += float(np.square((was - now) @ x.T).sum())
        return total

    best = pooled([heads], 1, "fit", turn, [moment], 0).heads[0]
    mean = pooled([heads], 1, "mean", turn, [moment], 0).heads[0]
    assert best.value is not None and left(best) < 0.9 * left(mean)
    for _ in range(20):
        other = replace(best, output=best.output + 0.01 * random.standard_normal(best.output.shape))
        assert left(other) > left(best)
