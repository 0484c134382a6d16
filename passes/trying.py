"""Versions of a model beside it, on some of the samples that edits are fitted to."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import numpy as np
import onnx_ir as oir

from burnish.ir.samples import Sample, interleaved, kin
from burnish.passes.lossy import Context
from burnish.passes.measure_choice import measure
from burnish.passes.measures import spread
from burnish.passes.sites import LIMIT

TRIED = 64
"""Samples that versions are compared on."""

K = TypeVar("K")


class Tried:
    """What versions of a model compute, compared with what it computes.

    Args:
        model: the original.
        context: samples, of which the first are taken, of each group in turn, and what runs models.
        by: the measure, one of which less is better.
        limit: bytes of outputs that are held at once: fewer samples are taken where they would be more.
    """

    def __init__(self, model: oir.Model, context: Context, by: str = "divergence", limit: int = LIMIT) -> None:
        self._context = context
        self._measure = measure(by, model, keeps=context.keeps).measure
        first = interleaved(context.samples)[:TRIED]
        self._reference = list(_fitting(_outputs(model, first, context), limit))
        self._samples = first[: len(self._reference)]
        self._partials: dict[object, list[Any]] = {}

    def run(self, versions: Mapping[K, Callable[[], oir.Model]]) -> None:
        """Run versions, each under a name.

        Raises:
            InputError: what one of them computes cannot be compared.
        """
        for name, make in versions.items():
            found = _outputs(make(), self._samples, self._context)
            pairs = zip(found, self._reference, self._samples, strict=True)
            self._partials[name] = [self._measure.partial(*pair) for pair in pairs]

    def value(self, name: object) -> float:
        """What is measured of a version."""
        return self._measure.value(self._partials[name])

    def gain(self, first: object, other: object) -> float:
        """By how much less `other` has, less the standard error of that."""
        apart = spread(self._measure, self._partials[first], self._partials[other], kin(self._samples))
        return self.value(first) - self.value(other) - apart


def _fitting(found: Iterable[Mapping[str, np.ndarray]], limit: int) -> Iterator[Mapping[str, np.ndarray]]:
    """The first outputs, as many as take no more bytes together than `limit`, or one."""
    held = 0
    for number, outputs in enumerate(found):
        held += sum(array.nbytes for array in outputs.values())
        if number and held > limit:
            return
        yield outputs


def _outputs(model: oir.Model, samples: Sequence[Sample], context: Context) -> Iterator[Mapping[str, np.ndarray]]:
    runner = context.execute(model)
    try:
        for sample in samples:
            yield runner.run(sample.feeds)
    finally:
        runner.close()
