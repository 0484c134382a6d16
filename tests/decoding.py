"""Exported models without some of their blocks, and whether they decode with caches as they compute at once."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache

import numpy as np
import onnx_ir as oir
from laws import OrtRunner

from burnish.passes import catalog
from burnish.passes.base import Outcome
from burnish.passes.pipeline import Pipeline
from burnish.passes.recipes import NORMAL_FORM
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


def step(runner: OrtRunner, ids: np.ndarray, mask: np.ndarray, past: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """One call of a model with caches; positions count what the mask lets through."""
    positions = np.maximum(mask.cumsum(1) - 1, 0)[:, -ids.shape[1] :]
    wanted = {one.name for one in runner.session.get_inputs()}
    feeds = {"input_ids": ids, "attention_mask": mask, "position_ids": positions, **past}
    return runner.run({name: array for name, array in feeds.items() if name in wanted})


def decoded(model: oir.Model, ids: np.ndarray, mask: np.ndarray, cuts: list[int]) -> np.ndarray:
    """The logits of `ids` given in pieces that end at `cuts`, each with the cache of those before."""
    runner = OrtRunner(model, optimize=True)
    past = {
        str(value.name): np.zeros(
            [len(ids), *(n if isinstance(n, int) else 0 for n in value.shape[1:])], value.dtype.numpy()
        )
        for value in model.graph.inputs
        if value.dtype in (oir.DataType.FLOAT, oir.DataType.INT8)
    }
    logits = []
    for start, end in zip([0, *cuts], [*cuts, ids.shape[1]], strict=True):
        found = step(runner, ids[:, start:end], mask[:, :end], past)
        logits.append(found["logits"])
        past = {name: found[name.replace("past_key_values", "present")] for name in past}
    runner.close()
    return np.concatenate(logits, 1)
