"""Measure low rank on trained models: `OMP_NUM_THREADS=1 python -m burnish.tools.research.lowrank [NAME...]`.

Every layer that can be written as two factors keeps the same share of its parameters, with the same rank whatever the
basis; then the outputs are compared with the original's on data that nothing was calibrated on. Writes
`docs/results/lowrank.json` (the numbers, those of models that are not named as they were), `lowrank.md` and
`lowrank.svg`.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import onnx_ir as oir

from burnish.backends.ort.session import executor
from burnish.ir.samples import Sample
from burnish.passes import catalog, factors, lossy
from burnish.passes.base import Outcome
from burnish.passes.gram import Gram
from burnish.passes.lossy import Context, Edit, LossyPass
from burnish.passes.reducers import Magnitudes, Reducer
from burnish.passes.reservoirs import Several
from burnish.passes.sites import LIMIT, Site
from burnish.tools.lossy_context import context_for
from burnish.tools.research.lowrank_beds import BEDS, Bed
from burnish.tools.research.lowrank_page import RESULTS, write
from burnish.tools.research.once import Once

SHARES = (0.9, 0.7, 0.5)
METHODS: dict[str, dict[str, Any]] = {
    "ours": {"basis": "data"},
    "ours, no bias": {"basis": "data", "centred": False},
    "ASVD": {"basis": "activation", "centred": False},
    "ASVD + bias": {"basis": "activation"},
    "SVD": {"basis": "weight", "centred": False},
    "SVD + bias": {"basis": "weight"},
}
ALONE_AT = 0.7
AS_PUBLISHED = ("ours", "ASVD", "SVD")
"""What large models are measured with; of small ones, at `ALONE_AT`, also each layer alone."""


class Statistics(Once):
    """An observer that sees the samples once, whatever is asked of it: statistics for every basis."""

    def observe(
        self,
        sites: Mapping[str, Site],
        reducers: Reducer | Mapping[str, Reducer],
        samples: Iterable[Sample],
        *,
        limit: int = LIMIT,
    ) -> dict[str, Reducer]:
        assert isinstance(reducers, Mapping)
        grams = {name: reducers[name].parts[0] for name in sites}  # type: ignore[attr-defined]
        both = {name: Several((gram, Magnitudes(axis=gram.axis))) for name, gram in grams.items()}
        found = {}
        for name, seen in super().observe(sites, both, samples, limit=limit).items():
            parts = seen.parts  # type: ignore[attr-defined]
            assert isinstance(parts[0], Gram)
            found[name] = Several(parts[: len(reducers[name].parts)])  # type: ignore[attr-defined]
        return dict(found)


def ranks(model: oir.Model, edits: Sequence[Edit], share: float) -> list[Edit]:
    """Edits at the largest rank that leaves `share` of the weight of each layer, a bias not counted."""
    nodes = {node.name: node for node in model.graph}
    found = []
    for edit in edits:
        groups, out, size = factors.stacked([factors.found(nodes[name]) for name in edit.anchors]).shape
        rank = int(share * out * size / (out + size))
        if rank:
            payload = {**edit.payload, "basis": edit.payload["basis"][:, :, :rank]}
            found.append(replace(edit, payload=payload, option=f"rank {rank}"))
    return found


def measure(bed: Bed, say: Any = print) -> dict[str, Any]:
    """Relative error of the outputs and the metric, by method and share, and what the layers hold."""
    reference = _outputs(bed.model, bed.evaluation)
    row: dict[str, Any] = {"name": bed.name, "metric_name": bed.metric_name, "metric": bed.metric(reference)}
    results: dict[str, list[dict[str, np.ndarray]]] = {}
    squares: dict[str, list[float]] = {}
    for samples, indices in bed.folds:
        context = context_for(bed.model, samples)
        observer = Statistics(context.observe(bed.model))
        context = replace(context, observe=observer.again)
        for method in METHODS if bed.small else AS_PUBLISHED:
            options = METHODS[method]
            start = time.perf_counter()
            one, edits, outcome = _proposed(bed.model, context, options)
            row |= {"layers": len(edits), "left_alone": len(outcome.skipped), "rows": samples and len(samples)}
            for share in SHARES:
                chosen = ranks(bed.model, edits, share)
                changed, _ = lossy.apply(bed.model, chosen, [one])
                held = lossy.saved(bed.model, changed, {}).parameters
                row[f"saved {share} {'bias' if options.get('centred', True) else 'plain'}"] = held
                outputs = results.setdefault(f"{method} | {share}", [{}] * len(bed.evaluation))
                for index, found in zip(indices, _outputs(changed, [bed.evaluation[i] for i in indices]), strict=True):
                    outputs[index] = found
                if method in AS_PUBLISHED and bed.small and share == ALONE_AT:
                    alone = _alone(bed, [bed.evaluation[i] for i in indices], reference, indices, one, chosen)
                    squares.setdefault(f"{method} | {share}", []).extend(alone)
            say(f"{bed.name}: {method}, {time.perf_counter() - start:.0f} s")
    row["results"] = {
        key: {
            "error": _error(reference, outputs),
            "metric": bed.metric(outputs),
            "alone": float(np.sqrt(np.mean(np.square(squares[key])))) if key in squares else None,
        }
        for key, outputs in results.items()
    }
    return row


def _alone(
    bed: Bed,
    samples: Sequence[Sample],
    reference: Sequence[Mapping[str, np.ndarray]],
    indices: Sequence[int],
    one: LossyPass,
    chosen: Sequence[Edit],
) -> list[float]:
    """The error of the outputs with each edit alone."""
    wanted = [reference[index] for index in indices]
    return [_error(wanted, _outputs(lossy.apply(bed.model, [edit], [one])[0], samples)) for edit in chosen]


def _proposed(model: oir.Model, context: Context, options: Mapping[str, Any]) -> tuple[LossyPass, list[Edit], Outcome]:
    given = {"policy": "uniform", "share": 0.95, "multiple": 1, "joint": False}
    one = catalog.make("project-rank", given | dict(options))
    assert isinstance(one, LossyPass)
    outcome = Outcome("project-rank")
    return one, one.propose(model, context, outcome), outcome


def _outputs(model: oir.Model, samples: Sequence[Sample]) -> list[dict[str, np.ndarray]]:
    runner = executor(threads=1)(model)
    found = [runner.run(sample.feeds) for sample in samples]
    runner.close()
    return found


def _error(reference: Sequence[Mapping[str, np.ndarray]], outputs: Sequence[Mapping[str, np.ndarray]]) -> float:
    """Frobenius error of all outputs, relative."""
    pairs = [(a[name], b[name]) for a, b in zip(reference, outputs, strict=True) for name in a]
    apart = sum(float(np.square(a - b, dtype=np.float64).sum()) for a, b in pairs)
    return float(np.sqrt(apart / sum(float(np.square(a, dtype=np.float64).sum()) for a, _ in pairs)))


def main(names: Sequence[str]) -> int:
    """Measure the named models, or all, and write the page; the exit code is 1 where ours is not the best."""
    file = RESULTS / "lowrank.json"
    kept: dict[str, Any] = {}
    for name in names or BEDS:
        row = measure(BEDS[name]())
        kept = json.loads(file.read_text()) if file.exists() else {}
        kept.setdefault("bases", {})[name] = row
        kept["bases"] = {one: kept["bases"][one] for one in BEDS if one in kept["bases"]}
        file.write_text(json.dumps(kept, indent=1) + "\n")
    return write(kept)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
