"""A lock written anew: what changed is taken over, what is within tolerance stays as it was written."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from burnish.tools.check.difference import Difference, Report, Verdict
from burnish.tools.check.differences_sizes import latency, metric
from burnish.tools.check.differences_values import movement
from burnish.tools.check.lock import Lock, OutputLock, SampleLock
from burnish.tools.check.tolerances import Tolerances


def renewed(old: Lock, new: Lock, tolerances: Tolerances | None = None) -> Lock:
    """The new lock, with the old figures wherever they are within tolerance.

    Updating on another machine therefore changes nothing in the file but what changed in the model. What the model
    computes is kept only where its samples are the same; what was not measured now is kept where the model is the same.

    Args:
        old: the lock as it was written.
        new: the lock of the model as it is.
        tolerances: what may differ.
    """
    allowed = tolerances if tolerances is not None else Tolerances()
    same = (old.structure, old.weights, old.inputs, old.outputs, old.opsets) == (
        new.structure, new.weights, new.inputs, new.outputs, new.opsets)  # fmt: skip
    samples, values = _ran(old, new, allowed, same)
    kept = msgspec.structs.replace(new, samples=samples, values=values)
    if (new.metric is None and same) or (old.metric and new.metric and not list(metric(old, new, allowed))):
        kept = msgspec.structs.replace(kept, metric=old.metric)
    if (new.latency is None and same) or (old.latency and new.latency and not list(latency(old, new, allowed))):
        kept = msgspec.structs.replace(kept, latency=old.latency)
    ordered = [list(one.inputs) + list(one.outputs) for one in (old, new)]  # equal mappings may stand in other orders
    if msgspec.structs.replace(kept, made_with=old.made_with) == old and ordered[0] == ordered[1]:
        return old
    return kept


def accepted(report: Report) -> list[str]:
    """What is taken over when the lock of a report is written anew, one sentence each: regressions, then the rest."""
    return [one.message for one in _accepted(report.differences)]


def _accepted(differences: Sequence[Difference]) -> list[Difference]:
    return [one for one in differences if one.verdict is not Verdict.NOTE]


def _ran(old: Lock, new: Lock, tolerances: Tolerances, same: bool) -> tuple[object, list[SampleLock]]:
    """The samples and values to keep."""
    if new.samples is None:
        return (old.samples, old.values) if same else (None, [])
    if old.samples is None or old.samples.fingerprint != new.samples.fingerprint:
        return new.samples, new.values
    before = {one.sample: one for one in old.values}
    values = [
        SampleLock(
            sample=one.sample,
            outputs={
                name: _output(before[one.sample].outputs.get(name) if one.sample in before else None, output, name,
                              tolerances)
                for name, output in one.outputs.items()
            },
        )
        for one in new.values
    ]  # fmt: skip
    return (old.samples if old.samples.refused == new.samples.refused else new.samples), values


def _output(old: OutputLock | None, new: OutputLock, name: str, tolerances: Tolerances) -> OutputLock:
    if old is None or old.type != new.type or old.finite != new.finite:
        return new
    dtype = new.type.partition("[")[0]
    verdict = tolerances.values(name, dtype, movement(old, new))
    return new if verdict is Verdict.REGRESSION else old
