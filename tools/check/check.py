"""Check a model against its lock: take it anew, say what differs, and where the numbers part from the old model's."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import onnx_ir as oir

from burnish.ir.errors import InputError
from burnish.tools.check.difference import Difference, Field, Report, Verdict
from burnish.tools.check.differences import differences
from burnish.tools.check.differences_values import Exact
from burnish.tools.check.lock import Lock
from burnish.tools.check.renew import renewed
from burnish.tools.check.take import Request, samples_of, take
from burnish.tools.check.tolerances import Tolerances, rounding

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    import numpy as np

    from burnish.backends.ort.session import OrtRunner
    from burnish.ir.samples import Sample


def check(
    model: oir.Model,
    lock: Lock,
    request: Request | None = None,
    tolerances: Tolerances | None = None,
    old: oir.Model | None = None,
    model_name: str = "",
    lock_name: str = "",
) -> Report:
    """Compare a model with the lock of what it was.

    Args:
        model: the model as it is; not changed.
        lock: what it was.
        request: what is compared, as it was asked for when the lock was taken. For a lock of what the graph says alone
            nothing is run.
        tolerances: what may differ; by default nothing but rounding.
        old: the model that was locked, if at hand: outputs are compared exactly and the first node that differs named.
        model_name, lock_name: what they are called in the report.

    Raises:
        InputError: the samples cannot be used, the model cannot be run, or `old` is not what was locked.
    """
    asked = request if request is not None else Request()
    if lock.samples is None:
        asked = replace(asked, run=False, latency=False)
    allowed = tolerances if tolerances is not None else Tolerances()
    if old is not None:
        _must_be(old, lock, lock_name)
    new, refusal = _taken(model, asked, lock)
    names = ({}, {}) if new.structure == lock.structure else (_names(old), _names(model))
    exact = None if old is None or refusal or new.samples is None else _exact(old, model, lock, new, asked, allowed)
    found = differences(lock, new, allowed, names, exact)
    if refusal:
        found = [refusal, *(one for one in found if one.key != ("values",))]
    return Report(model_name, lock_name, lock, renewed(lock, new, allowed), tuple(found))


def _must_be(old: oir.Model, lock: Lock, name: str) -> None:
    from burnish.ir.canonical import canonical

    if canonical(old).full_fingerprint != lock.weights:
        cause = "the old model is not the one that was locked"
        raise InputError(cause, place=name or None, hint="give the model that the lock was taken from, or leave it out")


def _taken(model: oir.Model, asked: Request, lock: Lock) -> tuple[Lock, Difference | None]:
    """The lock of the model; where it takes no sample any more, one without values and the regression that this is."""
    try:
        return take(model, asked, lock), None
    except InputError as error:
        if not asked.run or not lock.values:
            raise
        bare = take(model, replace(asked, run=False, latency=False), lock)
        if bare.inputs == lock.inputs and not _refuses(model, asked, lock):
            raise
        message = f"the model takes none of the samples: {error.cause.splitlines()[0]}"
        return bare, Difference(Field.VALUES, Verdict.REGRESSION, message, key=("samples",))


def _refuses(model: oir.Model, asked: Request, lock: Lock) -> bool:
    """Whether it is the model that refuses all samples, not the samples or the metric that cannot be read."""
    from burnish.backends.ort.session import executor

    runner = executor(threads=asked.threads)(model)
    try:
        return all(_outputs(runner, sample) is None for sample in samples_of(model, asked.data, lock))
    finally:
        runner.close()


def _names(model: oir.Model | None) -> dict[str, list[str]]:
    """The names of the nodes of each segment, by line."""
    if model is None:
        return {}
    from burnish.ir.segments import segments

    return {one.name: [line.node.name or "" for line in one.lines] for one in segments(model)}


def _outputs(runner: OrtRunner, sample: Sample) -> dict[str, np.ndarray] | None:
    try:
        return dict(runner.run(sample.feeds))
    except InputError:
        return None


def _exact(
    old: oir.Model, model: oir.Model, lock: Lock, new: Lock, asked: Request, tolerances: Tolerances
) -> Exact | None:
    """How the outputs of the two models differ; None where their inputs do, so that they take no common samples."""
    from burnish.backends.ort.session import executor
    from burnish.tools.check.differences_contract import ports

    if lock.inputs != new.inputs:
        return None
    pairs = ports(lock.outputs, new.outputs).pairs
    samples = samples_of(old, asked.data, lock)
    load = executor(threads=asked.threads)
    runners = [load(one) for one in (old, model)]
    try:
        errors: dict[str, dict[str, float]] = {}
        for sample in samples:
            for name, error in _errors(runners, sample, pairs, new):
                known = errors.setdefault(name, {})
                known[sample.name] = max(error, known.get(sample.name, 0.0))
    finally:
        for runner in runners:
            runner.close()
    partings = {}
    for name, found in errors.items():
        worst = max(found, key=found.__getitem__)
        if tolerances.values(name, lock.outputs[name].partition("[")[0], found[worst]) is not None:
            sample = next(one for one in samples if one.name == worst)
            allowed = rounding(lock.outputs[name].partition("[")[0])
            partings[name] = _parting(old, model, sample, name, allowed, asked.threads)
    return Exact(errors, partings)


def _errors(
    runners: Sequence[OrtRunner], sample: Sample, pairs: Mapping[str, str], lock: Lock
) -> Iterator[tuple[str, float]]:
    """The relative error of each output, without what is padding, on a sample that both models take."""
    from burnish.passes.verify import relative_error
    from burnish.tools.check.padding import Padding

    padding = Padding(sample.feeds, lock.samples.roles if lock.samples is not None else {})

    expected, found = (_outputs(runner, sample) for runner in runners)
    if expected is not None and found is not None:
        for name, now in pairs.items():
            if name in expected and now in found:
                yield name, relative_error(padding.without(found[now]), padding.without(expected[name]))


def _parting(old: oir.Model, model: oir.Model, sample: Sample, output: str, tolerance: float, threads: int) -> str:
    """The first node at which two models part on the way to an output; empty when none is found."""
    from burnish.tools.compare_command import parting

    found = parting(old, model, sample, output, tolerance, threads, [])
    return "" if found is None else str(found["node_in_b"])
