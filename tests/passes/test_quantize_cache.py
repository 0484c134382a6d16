"""What must hold of caches of integers: a text gives the same at once and in pieces, and little is lost."""

from __future__ import annotations

import numpy as np
import onnx_ir as oir
import pytest
from decoding import decoded, normal

import burnish
from burnish.ir.errors import InputError
from burnish.ir.samples import Sample
from burnish.passes import catalog, lossy
from burnish.passes.base import Outcome
from burnish.passes.lossy import LossyPass
from burnish.tools import report
from burnish.tools.lossy_context import context_for
from burnish.tools.research import structures

MODELS = ["llama-kv-dynp", pytest.param("gemma-kv-dynp", marks=pytest.mark.slow)]


def text(rows: int, length: int) -> dict[str, np.ndarray]:
    ids = np.random.default_rng(3).integers(0, 100, (rows, length))
    return {"input_ids": ids, "attention_mask": np.ones_like(ids)}


def feeds(model: oir.Model, rows: int = 2, length: int = 12) -> dict[str, np.ndarray]:
    """A text with nothing before it, for all inputs."""
    given = text(rows, length)
    given["position_ids"] = np.tile(np.arange(length), (rows, 1))
    for value in model.graph.inputs:
        if value.dtype == oir.DataType.FLOAT and value.shape is not None:
            shape = [rows, *(n if isinstance(n, int) else 0 for n in value.shape[1:])]
            given[str(value.name)] = np.zeros(shape, np.float32)
    return {str(value.name): given[str(value.name)] for value in model.graph.inputs}


def quantized(name: str, **options: object) -> tuple[oir.Model, oir.Model]:
    model = normal(name)
    one = catalog.make("quantize-cache", options)
    assert isinstance(one, LossyPass)
    outcome = Outcome("")
    edits = one.propose(model, context_for(model, [Sample("text", feeds(model))]), outcome)
    assert edits and not outcome.skipped
    return model, lossy.apply(model, edits, [one])[0]


@pytest.mark.parametrize("scales", ["channel", "head"])
@pytest.mark.parametrize("name", MODELS)
def test_a_text_at_once_is_the_text_in_pieces_and_nearly_what_the_original_says(name: str, scales: str) -> None:
    model, after = quantized(name, scales=scales)
    given = text(2, 12)
    ids, mask = given["input_ids"], given["attention_mask"]
    whole = decoded(after, ids, mask, [])
    for cuts in ([5], list(range(1, 12))):
        pieces = decoded(after, ids, mask, cuts)
        np.testing.assert_allclose(pieces, whole, atol=2e-3 * np.abs(whole).max())
    before = decoded(model, ids, mask, [])
    assert 0 < np.linalg.norm(whole - before) <= 0.05 * np.linalg.norm(before)


def test_the_ports_keep_their_names_and_a_cache_takes_a_quarter() -> None:
    model, after = quantized("llama-kv-dynp")
    for old, new in zip(
        (*model.graph.inputs, *model.graph.outputs), (*after.graph.inputs, *after.graph.outputs), strict=True
    ):
        cache = "key" in str(old.name) or "value" in str(old.name)
        assert (old.name, list(old.shape or ())) == (new.name, list(new.shape or ()))
        assert new.dtype == (oir.DataType.INT8 if cache else old.dtype)


def test_optimize_measures_it_with_float_samples_of_the_original() -> None:
    name = "llama-kv-dynp"
    given = feeds(normal(name))
    data = [given, {**given, "input_ids": given["input_ids"][:, ::-1].copy()}]
    model = oir.from_proto(structures.load(name))
    result = burnish.optimize(model, passes=["quantize-cache"], data=data, metric="divergence")
    found = report.as_dict(result)["lossy"]
    assert len(found["edits"]) == 4
    assert 0 < found["result"]["drop"] < 0.05
    kinds = {value.name: value.dtype for value in result.model.graph.inputs}
    assert kinds["past_key_values.0.key"] == oir.DataType.INT8


def test_it_is_never_made_without_samples() -> None:
    with pytest.raises(InputError, match="there are no samples to measure on"):
        burnish.optimize(oir.from_proto(structures.load("llama-kv-dynp")), passes=["quantize-cache"])
