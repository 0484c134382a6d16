"""Decoders that are given caches: with an empty past they compute what they did, and step by step the same."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as oir
import pytest
from decoding import normal
from golden import parse_graph, prepare
from laws import OrtRunner
from small_llama import decoder

import burnish
from burnish.frontends.synthesis import synthesise
from burnish.ir.errors import InputError
from burnish.ir.text import text
from burnish.ir.views.attention_layer import AttentionLayer, attention_layers
from burnish.passes import catalog
from burnish.passes.base import Outcome
from burnish.tools.lossy_context import context_for

FAST = "llama-nocache-dynp llama-nocache-op23 phi-dynp gpt2-dynp gemma-ts".split()
FAMILIES = """
    llama-nocache-dynp-fuse llama-nocache-ts llama-nocache-dyn phi-ts phi-op23 phi-dynp-fuse gpt2-eager gpt2-ts
    gpt2-op23 gemma-dynp gemma-op23 a3-smollm2-nocache
""".split()
SLOW = pytest.mark.slow


def cached(model: oir.Model) -> oir.Model:
    """A copy with caches."""
    (one,) = catalog.parse("add-kv-cache")
    after = model.clone()
    one.rewrite(after, Outcome("add-kv-cache"))
    return after


def in_pieces(model: oir.Model, given: dict[str, np.ndarray], cuts: list[int], output: str = "logits") -> np.ndarray:
    """The output for tokens given in pieces; a mask covers what was before, positions are those of the new tokens."""
    runner, found = OrtRunner(model, optimize=True), []
    wanted = {value.name: value for value in model.graph.inputs}
    length = next(iter(given.values())).shape[1]
    past = {
        name: np.zeros([len(next(iter(given.values()))), *(n if isinstance(n, int) else 0 for n in v.shape[1:])], "f")
        for name, v in wanted.items()
        if str(name).startswith("past_key_values")
    }
    for start, end in zip([0, *cuts], [*cuts, length], strict=True):
        feeds = {name: array[:, (0 if "mask" in name else start) : end] for name, array in given.items()}
        outputs = runner.run({name: array for name, array in {**feeds, **past}.items() if name in wanted})
        past = {name: outputs[name.replace("past_key_values", "present")] for name in past}
        found.append(outputs[output])
    runner.close()
    return np.concatenate(found, 1)


@pytest.mark.parametrize("name", [*FAST, *(pytest.param(one, marks=SLOW) for one in FAMILIES)])
def test_pieces_compute_what_the_model_without_caches_does_at_once(name: str) -> None:
    before = normal(name)
    after = cached(before)
    layers = [one for one in attention_layers(after) if isinstance(one, AttentionLayer)]
    assert layers and all(one.cache.kind == "kv" for one in layers)
    random = np.random.default_rng(0)
    for rows in (1, 2):
        ids, mask = random.integers(1, 100, (rows, 9)), np.ones((rows, 9), np.int64)
        if rows == 2:
            mask[1, :2] = 0
        given = {"input_ids": ids, "attention_mask": mask, "position_ids": np.maximum(mask.cumsum(1) - 1, 0)}
        given = {name: array for name, array in given.items() if name in {v.name for v in before.graph.inputs}}
        runner = OrtRunner(before, optimize=True)
        expected = runner.run(given)["logits"][mask == 1]
        runner.close()
        for cuts in ([], [1], [4, 5], [3, 4, 5, 6, 7, 8]):
            found = in_pieces(after, given, cuts)[mask == 1]
            np.testing.assert_allclose(found, expected, atol=1e-4 * float(np.abs(expected).max()), err_msg=str(cuts))


def test_a_decoder_that_counts_its_positions_and_has_no_mask() -> None:
    ids = np.arange(14).reshape(2, 7)
    runner = OrtRunner(decoder(), optimize=True)
    expected = runner.run({"ids": ids})["logits"]
    runner.close()
    after = cached(decoder())
    for cuts in ([], [3], [1, 2, 3, 4, 5, 6]):
        np.testing.assert_allclose(in_pieces(after, {"ids": ids}, cuts), expected, atol=1e-4)


def test_layers_share_the_caches_that_were_added() -> None:
    given = {"input_ids": np.arange(2, 18).reshape(2, 8), "attention_mask": np.ones((2, 8), np.int64)}
    given["position_ids"] = np.arange(8)[None].repeat(2, 0)
    (one,) = catalog.parse("share-kv{map=2:0+3:1}")
    orders = []
    for first in (True, False):
        model = normal("llama-nocache-dynp")
        model = cached(model) if first else model.clone()
        one.rewrite(model, Outcome("share-kv"))
        orders.append(model if first else cached(model))
    found = [in_pieces(model, given, [3, 4]) for model in orders]
    np.testing.assert_allclose(found[0], found[1], atol=1e-4)
    assert [len(model.graph.inputs) for model in orders] == [3 + 4, 3 + 4]


def test_a_model_with_caches_stays_as_it_is() -> None:
    before = normal("llama-kv-dynp")
    assert text(cached(before)) == text(before)
    assert text(cached(once := cached(normal("phi-dynp")))) == text(once)


_SEES = """
<opset_import: ["": 23]>
g (int64[N, S] ids) => (float[N, S, 4] y)
<float[9, 4] table, float[4, 4] q, float[4, 4] k, float[4, 4] v, float[4, 4] o> {
  x = Gather (table, ids)  a = MatMul (x, q)  b = MatMul (x, k)  c = MatMul (x, v)
  w = Attention <is_causal = 1, q_num_heads = 2, kv_num_heads = 2> (a, b, c)
  n = MatMul (w, o)  y = Add (x, n)
}
"""
_GIVEN = _SEES.replace("is_causal = 1", "is_causal = 0")


def test_what_cannot_have_a_cache_is_refused() -> None:
    (one,) = catalog.parse("add-kv-cache")
    with pytest.raises(InputError, match="it is not proven that no token sees a later one"):
        cached(prepare(parse_graph(_GIVEN), one))
    with pytest.raises(InputError, match="no embedding reads tokens"):
        cached(normal("vit-timm-dynp"))
    with pytest.raises(InputError, match="it is not proven that no token sees a later one"):
        cached(normal("bert-s-dynp"))
    with pytest.raises(InputError, match="may compute something of several tokens"):
        cached(normal("mixtral-dynp"))
    model = normal("phi-dynp")
    with pytest.raises(InputError, match="the samples have no caches"):
        one.propose(model, context_for(model, synthesise(model)[:1]), Outcome("add-kv-cache"))  # type: ignore[attr-defined]


def test_what_looks_at_several_tokens_besides_attention_is_refused() -> None:
    (one,) = catalog.parse("add-kv-cache")
    shifted = _SEES.replace("y = Add (x, n)", "z = Add (x, n)  c1 = Constant <value_int = 1> ()  y = CumSum (z, c1)")
    with pytest.raises(InputError, match="CumSum .* may compute something of several tokens"):
        cached(prepare(parse_graph(shifted), one))
    found = cached(prepare(parse_graph(_SEES), one))
    ids = np.array([[1, 2, 3, 4, 5]])
    whole = in_pieces(found, {"ids": ids}, [], "y")
    np.testing.assert_allclose(in_pieces(found, {"ids": ids}, [2, 3], "y"), whole, atol=1e-5)


def test_optimize_proves_what_comes_behind_on_samples_with_caches(tmp_path: Path) -> None:
    result = burnish.optimize(
        decoder(), tmp_path / "out.onnx", passes=["add-kv-cache", "share-kv{map=1:0}"], guard=["size"]
    )
    names = [str(value.name) for value in result.model.graph.inputs]
    assert names == ["ids", "past_key_values.0.key", "past_key_values.0.value"]
    ids = np.arange(8).reshape(2, 4)
    whole = in_pieces(result.model, {"ids": ids}, [])
    np.testing.assert_allclose(in_pieces(result.model, {"ids": ids}, [1, 3]), whole, atol=1e-4)
