"""How much worse a model does than the original, on the same samples, by a measure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx_ir as oir

from burnish.ir.errors import InputError
from burnish.ir.samples import Sample, kin
from burnish.passes import lossy
from burnish.passes.lossy import Edit, LossyPass
from burnish.passes.measures import RowMeasure, folds_of, spread
from burnish.passes.protocols import Executor, Measure, Runner
from burnish.passes.search import Judgement

LIMIT = 1 << 29
"""Bytes of the original's outputs that are kept; above, the original runs again beside each plan."""


@dataclass
class Judged:
    """Measures models, or plans for the original, against the original on one set of samples.

    Attributes:
        model: the original.
        samples: what it is run on.
        measure: what is measured.
        execute: makes runners.
        passes: the passes whose edits plans consist of.
        limit: bytes of the original's outputs that are kept.
        independent: rows of the samples' batches, those of one group counted once; the places of a text or a line that
            is one row do not make more. None where that is not known.
        original: the measure of the original.
        groups: the number of the group of each sample, as `burnish.ir.samples.kin`.
        rows: that are right or wrong as a whole, of a measure that counts such, and independent; else 0.
    """

    model: oir.Model
    samples: Sequence[Sample]
    measure: Measure
    execute: Executor
    passes: Sequence[LossyPass] = ()
    limit: int = LIMIT
    independent: int | None = None
    original: float = field(init=False)
    groups: list[int] = field(init=False)
    rows: int = field(init=False)
    _partials: list[Any] = field(init=False, default_factory=list)
    _outputs: list[Mapping[str, np.ndarray]] | None = field(init=False, default_factory=list)

    def __post_init__(self) -> None:
        self.groups = kin(self.samples)
        runner = self.execute(self.model)
        held = 0
        for sample in self.samples:
            outputs = _run(runner, sample)
            if isinstance(self.measure, RowMeasure):
                self.measure.check(outputs, sample)
            self._partials.append(self.measure.partial(outputs, outputs, sample))
            held += sum(array.nbytes for array in outputs.values() if isinstance(array, np.ndarray))
            if self._outputs is not None:
                self._outputs = [*self._outputs, outputs] if held <= self.limit else None
        runner.close()
        self.original = self.measure.value(self._partials)
        counted = self.measure.choices(self._partials) if isinstance(self.measure, RowMeasure) else 0
        self.rows = counted if self.independent is None else min(counted, self.independent)

    def reference(self, number: int) -> Mapping[str, np.ndarray]:
        """What the original computes on the sample of a number."""
        if self._outputs is not None:
            return self._outputs[number]
        runner = self.execute(self.model)
        try:
            return _run(runner, self.samples[number])
        finally:
            runner.close()

    def __call__(self, edits: Sequence[Edit]) -> Judgement:
        """What the edits together do to the measure; an infinite drop when they cannot be made or run."""
        if not edits:
            return Judgement(self.original, 0.0, 0.0)
        try:
            edited, _ = lossy.apply(self.model, edits, self.passes)
        except InputError:
            return Judgement(float("nan"), float("inf"), 0.0)
        return self.of(edited)

    def of(self, model: oir.Model) -> Judgement:
        """The same for any model that takes the inputs of the original, or fewer of them."""
        try:
            runner = self.execute(model)
        except InputError:
            return Judgement(float("nan"), float("inf"), 0.0)
        try:
            return self.of_runner(runner, model)
        finally:
            runner.close()

    def of_runner(self, runner: Runner, model: oir.Model) -> Judgement:
        """The same for what is loaded already.

        Args:
            runner: of `model`.
            model: made from the original by `lossy.apply` and exact passes: its ports tell what they were called.
        """
        original = None if self._outputs is not None else self.execute(self.model)
        partials = []
        try:
            for number, sample in enumerate(self.samples):
                reference = self._outputs[number] if self._outputs is not None else _run(original, sample)
                found = lossy.results(model, runner.run(lossy.feeds(model, sample.feeds)))
                partials.append(self.measure.partial(found, reference, sample))
            value = self.measure.value(partials)
        except InputError:
            return Judgement(float("nan"), float("inf"), 0.0)
        finally:
            if original is not None:
                original.close()
        sign = 1.0 if self.measure.higher_is_better else -1.0
        drop, error = sign * (self.original - value), spread(self.measure, self._partials, partials, self.groups)
        return Judgement(value, drop, error, folds_of(self.groups), self.rows)


def _run(runner: Runner | None, sample: Sample) -> Mapping[str, np.ndarray]:
    assert runner is not None
    try:
        return runner.run(sample.feeds)
    except InputError as error:
        raise InputError(error.cause, place=f"sample `{sample.name}`", hint=error.hint) from error
