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
