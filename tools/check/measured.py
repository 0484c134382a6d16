"""A metric on all samples, and the time of a run over that of a reference product."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_ir as oir

from burnish.ir.errors import InputError
from burnish.tools.check.lock import LatencyLock, MetricLock
from burnish.tools.check.sketch import DIGITS, rounded

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from burnish.backends.ort.session import OrtRunner
    from burnish.ir.samples import Sample
    from burnish.passes.protocols import Measure
    from burnish.tools.check.take import Request

RELATIVE = ("agreement", "cosine", "divergence", "fidelity", "psnr", "relative-error")
"""Measures that compare with the outputs of an original, of which a lock has sketches only."""

SIDE = 512
_ROUNDS, _SECONDS = 30, 6.0


class Metered:
    """The metric of a model: asked for, or suggested by labels; none where neither is there."""

    def __init__(self, model: oir.Model, samples: Sequence[Sample], asked: Request) -> None:
        self._measure = _measure(model, samples, asked.metric)
        self._partials: list[Any] = []
        self._refusal: InputError | None = None

    def add(self, outputs: Mapping[str, np.ndarray], sample: Sample) -> None:
        """Take the outputs on a sample; that the metric cannot be told of them is not the model's fault."""
        if self._measure is None or self._refusal is not None:
            return
        try:
            self._partials.append(self._measure.partial(outputs, outputs, sample))
        except InputError as error:
            self._refusal = error

    def lock(self) -> MetricLock | None:
        """The metric on all that was taken.

        Raises:
            InputError: it cannot be told of the outputs on a sample.
        """
        if self._refusal is not None:
            raise self._refusal
        if self._measure is None:
            return None
        value = self._measure.value(self._partials)
        name, better = self._measure.name, self._measure.higher_is_better
        return MetricLock(name=name, value=rounded(value, value, DIGITS), higher_is_better=better)


def _measure(model: oir.Model, samples: Sequence[Sample], asked: Any) -> Measure | None:
    from burnish.frontends.functions import is_function
    from burnish.frontends.measures import user_measure
    from burnish.passes.measure_choice import measure
    from burnish.tools.observe import keeps_of

    if asked is None and any(sample.labels is None for sample in samples):
        return None
    if callable(asked) or (isinstance(asked, str) and is_function(asked)):
        return user_measure(asked)
    found = measure(asked, model, samples, keeps=keeps_of).measure
    if found.name not in RELATIVE:
        return found
    if asked is None:
        return None
    cause = f"the metric `{found.name}` compares with an original's outputs, which a lock does not hold"
    raise InputError(cause, place="--metric", hint="take one of the labels, or compare with `burnish compare`")


def latency(runner: OrtRunner, sample: Sample, threads: int) -> LatencyLock:
    """The time of a run on a sample over the time of a product of two matrices, timed in turns in this process.

    Raises:
        InputError: the model refuses the sample.
    """
    from burnish.backends.ort.machine import product
    from burnish.backends.ort.session import executor
    from burnish.backends.ort.timing import paired

    model, feeds = product(SIDE, "float32")
    reference = executor(threads=threads)(model)
    try:
        found = paired(reference.bound(feeds), runner.bound(sample.feeds), rounds=_ROUNDS, seconds=_SECONDS)
    finally:
        reference.close()
    ratio, low, high = (rounded(one, one, 4) for one in (found.ratio, found.low, found.high))
    said = f"MatMul float[{SIDE},{SIDE}] by a constant float[{SIDE},{SIDE}], {threads} thread{'s' * (threads > 1)}"
    return LatencyLock(ratio=ratio, low=low, high=high, sample=sample.name, reference=said)
