"""An observer for benchmarks that try many ways on the same samples: it runs the model over them once for each site."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import numpy as np
import onnx_ir as oir

from burnish.ir.samples import Sample
from burnish.passes.protocols import Observer
from burnish.passes.reducers import Reducer
from burnish.passes.sites import LIMIT, Site


class Once:
    """An observer that keeps what it saw of each site, with the reducer that it was first asked with."""

    def __init__(self, observer: Observer) -> None:
        self._observer = observer
        self._seen: dict[str, Reducer] = {}

    def again(self, model: oir.Model) -> Observer:
        """The same observer."""
        return self

    def run(self, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        return self._observer.run(feeds)

    def close(self) -> None:
        pass

    def observe(
        self,
        sites: Mapping[str, Site],
        reducers: Reducer | Mapping[str, Reducer],
        samples: Iterable[Sample],
        *,
        limit: int = LIMIT,
    ) -> dict[str, Reducer]:
        assert isinstance(reducers, Mapping)
        new = {name: site for name, site in sites.items() if name not in self._seen}
        if new:
            wanted = {name: reducers[name] for name in new}
            self._seen |= self._observer.observe(new, wanted, samples, limit=limit)
        return {name: self._seen[name] for name in sites}
