"""Exported models without some of their blocks, and whether they decode with caches as they compute at once."""

from __future__ import annotations

from functools import cache

import numpy as np
import onnx_ir as oir

from burnish.backends.decoding.parity import in_pieces
from burnish.passes import catalog
from burnish.passes.base import Outcome
from burnish.passes.pipeline import Pipeline
from burnish.passes.recipes import NORMAL_FORM
from burnish.tools.decoders import open_decoder
from burnish.tools.research import structures

COUNTED = ("genai-llama", "genai-window", "genai-qwen", "genai-moe")
"""GroupQueryAttention counts its keys from the left: no padding there, and one token at a time for several rows."""


@cache
def normal(name: str) -> oir.Model:
    """A packed model in normal form; not to be changed."""
    return Pipeline(NORMAL_FORM).rewrite(oir.from_proto(structures.load(name))).model


def removed(model: oir.Model, blocks: str, more: str = "") -> oir.Model:
    """A copy without blocks."""
    (one,) = catalog.parse(f"remove-blocks{{blocks={blocks}{more}}}")
    outcome = Outcome("remove-blocks")
    after = model.clone()
    one.rewrite(after, outcome)
    assert outcome.rewritten == len(blocks.split("+"))
    return after


def decoded(model: oir.Model, ids: np.ndarray, mask: np.ndarray, cuts: list[int]) -> np.ndarray:
    """The logits of `ids` given in pieces that end at `cuts`, each with the cache of those before."""
    decoder = open_decoder(model)
    found = in_pieces(decoder, ids, cuts, mask == 1)
    decoder.close()
    return found


def check_decoding(before: oir.Model, model: oir.Model, name: str) -> None:
    """A packed model that was changed computes with caches what it computes at once, and no longer what it did."""
    random, counted = np.random.default_rng(0), name.startswith(COUNTED)
    for rows in (1, 2):
        ids, mask = random.integers(1, 100, (rows, 9)), np.ones((rows, 9), np.int64)
        if rows > 1 and not counted:
            mask[1, :2] = 0
        whole = decoded(model, ids, mask, [])
        assert np.abs(whole - decoded(before, ids, mask, []))[mask == 1].max() > 1e-2
        for cuts in [[3, 4, 5, 6, 7, 8]] if rows > 1 and counted else [[1], [4, 5], [3, 4, 5, 6, 7, 8]]:
            found = decoded(model, ids, mask, cuts)
            np.testing.assert_allclose(found[mask == 1], whole[mask == 1], atol=1e-4 * float(np.abs(whole).max()))
