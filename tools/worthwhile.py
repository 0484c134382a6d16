"""Whether what a recipe's pass does to a model pays: a smaller file, or a shorter run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import closing

import onnx_ir as oir

from burnish.ir.samples import Sample
from burnish.ir.walk import walk
from burnish.passes import lossy
from burnish.passes.base import Outcome
from burnish.passes.lossy import Edit, LossyPass
from burnish.passes.pipeline import constant_bytes, structure_bytes
from burnish.passes.protocols import Judge

LEAST = 0.05
"""The share of the file that a pass has to save where it saves no time."""

SMALL = 4096
"""Bytes that an edit saves, at least, for which the nodes and names around it are not looked at."""


def worthwhile(
    model: oir.Model,
    one: LossyPass,
    edits: Sequence[Edit],
    outcome: Outcome,
    lower: Callable[[oir.Model], oir.Model],
    judge: Judge,
    sample: Sample | None,
) -> Sequence[Edit]:
    """The edits of a pass; none where together they do not make the file a twentieth smaller, nor the model faster.

    An edit counts the numbers that it saves. What it adds besides, nodes and names, takes more than that in models of a
    few thousand weights.

    Args:
        model: what the edits were proposed for.
        one: the pass.
        edits: all that it would make.
        outcome: takes the reason where none is left.
        lower: the exact passes behind.
        judge: what runs models, and times them.
        sample: for timing; None where there is none, and no time is looked at.
    """
    if not edits or sum(edit.savings.bytes for edit in edits) >= SMALL * len(edits):
        return edits
    plain, made = (lower(given) for given in (model.clone(), lossy.apply(model, edits, [one])[0]))
    before, after = (constant_bytes(given) + structure_bytes(given) for given in (plain, made))
    if after < (1 - LEAST) * before:
        return edits
    if sample is not None:
        with closing(judge.execute(plain)) as first, closing(judge.execute(made)) as second:
            if judge.clock(first, second, sample.feeds).faster:
                return edits
    nodes = {str(node.name): node for node in walk(model)}
    size = f"{before - after:,} bytes smaller" if after < before else f"{after - before:,} bytes larger"
    for edit in edits:
        outcome.skip(nodes[edit.anchors[0]], f"all edits of the pass together make the file {size} and no faster")
    return []
