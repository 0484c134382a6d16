"""Look inside a model that torch runs, node by node: each value is reduced when it is computed, and then forgotten."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager

import numpy as np
import onnx_ir as oir
import torch

from burnish.backends.fx import bridge
from burnish.backends.fx.runner import executor
from burnish.ir.errors import InputError
from burnish.ir.samples import Sample
from burnish.passes import observing
from burnish.passes.reducers import Reducer
from burnish.passes.sites import LIMIT, Site


class FxObserver:
    """A model that torch runs and observes. Made from the model as it is now; later edits are not seen.

    Args:
        model: the model.
        device: a torch device, `cpu` or `cuda`.
        fallback: let ONNX Runtime run the nodes that torch cannot.

    Raises:
        InputError: the model cannot be expressed in torch, or torch has no such device.
    """

    def __init__(self, model: oir.Model, *, device: str = "cpu", fallback: bool = True) -> None:
        self._model = model
        self._runner = executor(device=device, fallback=fallback)(model)

    def run(self, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """The model's own outputs by name; raises InputError when it refuses these inputs."""
        return self._runner.run(feeds)

    def close(self) -> None:
        """Free the module; it cannot run afterwards."""
        self._runner.close()

    def observe(
        self,
        sites: Mapping[str, Site],
        reducers: Reducer | Mapping[str, Reducer],
        samples: Iterable[Sample],
        *,
        limit: int = LIMIT,
    ) -> dict[str, Reducer]:
        """See `burnish.passes.protocols.Observer.observe`; one value is held at a time, so no limit is too low.

        Values that exist only as Python numbers in the module (shapes and what is computed from them) are refused.
        """
        return observing.observe(self._model, self._session, sites, reducers, samples, None)

    @contextmanager
    def _session(self, values: list[oir.Value]) -> Iterator[observing.Run]:
        def run(feeds: Mapping[str, np.ndarray], take: observing.Take) -> None:
            left = set(values)

            def watcher(value: oir.Value) -> Callable[[torch.Tensor], None]:
                def watch(tensor: torch.Tensor) -> None:
                    left.discard(value)
                    take(value, bridge.to_numpy(tensor))

                return watch

            self._runner.watch(feeds, {str(value.name): watcher(value) for value in values})
            if left:
                names = ", ".join(f"`{value.name}`" for value in left)
                raise InputError(f"in torch these values are no tensors: {names}", hint="observe it in ONNX Runtime")

        yield run
