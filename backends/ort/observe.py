"""Look inside a model that ONNX Runtime runs: sessions whose outputs are inner values.

A value that is an output is computed as the model defines it: ONNX Runtime fuses no operator over it. The values of one
session are in memory together, so there are as many sessions, one after the other, as a limit in bytes asks for.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import numpy as np
import onnx_ir as oir

from burnish.backends.ort.session import Level, OrtRunner, executor
from burnish.ir.samples import Sample
from burnish.passes import observing
from burnish.passes.book import Book
from burnish.passes.reducers import Reducer
from burnish.passes.sites import LIMIT, Site


@contextmanager
def outputs_exchanged(model: oir.Model, values: Sequence[oir.Value]) -> Iterator[oir.Model]:
    """The model with exactly `values` as its outputs."""
    kept = list(model.graph.outputs)
    model.graph.outputs[:] = values
    try:
        yield model
    finally:
        model.graph.outputs[:] = kept


class OrtObserver:
    """A model that ONNX Runtime runs and observes; it must not be edited meanwhile.

    Args:
        model: the model; its outputs are exchanged while a session is made, and put back.
        threads: threads inside an operator.
        level: ONNX Runtime's own graph optimizations.
        target: `ort-cpu` or `ort-cuda`.
        book: notes what was observed; None to note nothing.
    """

    def __init__(
        self,
        model: oir.Model,
        *,
        threads: int = 1,
        level: Level = "all",
        target: str = "ort-cpu",
        book: Book | None = None,
    ) -> None:
        self._model, self._book = model, book
        self._load = executor(threads=threads, level=level, target=target)
        self._runner: OrtRunner | None = None

    def run(self, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """The model's own outputs by name; raises InputError when it refuses these inputs."""
        if self._runner is None:
            self._runner = self._load(self._model)
        return self._runner.run(feeds)

    def close(self) -> None:
        """Free the session."""
        if self._runner is not None:
            self._runner.close()
            self._runner = None

    def observe(
        self,
        sites: Mapping[str, Site],
        reducers: Reducer | Mapping[str, Reducer],
        samples: Iterable[Sample],
        *,
        limit: int = LIMIT,
    ) -> dict[str, Reducer]:
        """See `burnish.passes.protocols.Observer.observe`."""
        return observing.observe(self._model, self._session, sites, reducers, samples, limit, self._book)

    @contextmanager
    def _session(self, values: list[oir.Value]) -> Iterator[observing.Run]:
        with outputs_exchanged(self._model, values):
            runner = self._load(self._model)

        def run(feeds: Mapping[str, np.ndarray], take: observing.Take) -> None:
            found = runner.run(feeds)
            for value in values:
                take(value, found.pop(str(value.name)))

        try:
            yield run
        finally:
            runner.close()
