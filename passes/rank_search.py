"""The smallest rank of each layer at which the model's outputs stay near, each layer by itself."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import onnx_ir as oir

from burnish.passes import lossy, measure_choice
from burnish.passes.base import Outcome
from burnish.passes.lossy import Context, Edit, LossyPass
from burnish.passes.protocols import Measure


def smallest(
    one: LossyPass,
    model: oir.Model,
    edits: Mapping[str, Sequence[Edit]],
    context: Context,
    tolerance: float,
    outcome: Outcome,
) -> dict[str, list[Edit]]:
    """Of the edits of each site the first that keeps the divergence of the outputs within a tolerance, by bisection.

    It is made alone, so what several do together has to be measured afterwards (Garg et al. 2024, arXiv:2407.04797,
    whose threshold is validated layer by layer).

    Args:
        one: the pass that proposed the edits.
        model: the model.
        edits: by site, the one that changes most first.
        context: samples and what runs models.
        tolerance: of `burnish.passes.measures.Divergence` on all samples.
        outcome: takes the sites of which no edit stays within the tolerance.
    """
    measure = measure_choice.measure("divergence", model, context.samples, keeps=context.keeps).measure
    reference = _outputs(model, context)
    nodes = {node.name: node for node in model.graph}
    found: dict[str, list[Edit]] = {}
    for site, ordered in edits.items():
        low, high = 0, len(ordered)
        while low < high:
            middle = (low + high) // 2
            changed, _ = lossy.apply(model, [ordered[middle]], [one])
            if _apart(measure, _outputs(changed, context), reference, context) <= tolerance:
                high = middle
            else:
                low = middle + 1
        if low < len(ordered):
            found[site] = [ordered[low]]
        elif ordered:
            outcome.skip(nodes[ordered[0].anchors[0]], f"no rank keeps the divergence within {tolerance:g}")
    return found


def _outputs(model: oir.Model, context: Context) -> list[dict[str, np.ndarray]]:
    runner = context.execute(model)
    found = [runner.run(sample.feeds) for sample in context.samples]
    runner.close()
    return found


def _apart(
    measure: Measure,
    outputs: Sequence[Mapping[str, np.ndarray]],
    reference: Sequence[Mapping[str, np.ndarray]],
    context: Context,
) -> float:
    each = zip(outputs, reference, context.samples, strict=True)
    return measure.value([measure.partial(*one) for one in each])
