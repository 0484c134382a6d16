"""Decoders whose caches keep a part of the prompt, for tests."""

from __future__ import annotations

import numpy as np
import onnx_ir as oir

from burnish.backends.decoding import decoder as decoding
from burnish.passes import catalog
from burnish.passes.base import Outcome
from burnish.passes.lossy import LossyPass
from burnish.tools.decoders import open_decoder

WINDOW, POOL = 3, 3


def parsed(options: str) -> LossyPass:
    (one,) = catalog.parse(f"budget-kv{{{options}}}")
    assert isinstance(one, LossyPass)
    return one


def budgeted(model: oir.Model, options: str, window: int = WINDOW) -> oir.Model:
    """A copy with a uniform budget."""
    after, outcome = model.clone(), Outcome("budget-kv")
    parsed(f"{options};by=uniform;window={window};pool={POOL}").rewrite(after, outcome)
    assert outcome.rewritten == 1
    return after


def opened(model: oir.Model) -> decoding.Decoder:
    return open_decoder(model)


def prompts(*lengths: int, words: int = 60, seed: int = 0) -> list[list[int]]:
    random = np.random.default_rng(seed)
    return [random.integers(1, words, length).tolist() for length in lengths]
