"""What lossy passes look at and are run by: ONNX Runtime, the padding that masks tell of, gradients from torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    import onnx_ir as oir

    from burnish.ir.samples import Sample
    from burnish.passes.lossy import Context


def context_for(model: oir.Model, samples: Sequence[Sample], *, target: str = "ort-cpu", threads: int = 1) -> Context:
    """The context for proposing edits of `model`, judged on `samples`."""
    from burnish.backends.ort.observe import OrtObserver
    from burnish.backends.ort.session import executor
    from burnish.ir import cost
    from burnish.passes.lossy import Context
    from burnish.tools.observe import keeps_of

    largest = max(samples, key=lambda sample: sum(array.size for array in sample.feeds.values()))
    return Context(
        samples=samples,
        execute=executor(threads=threads, target=target),
        observe=lambda one: OrtObserver(one, threads=threads, target=target),
        keeps=keeps_of,
        gradients=_gradients if find_spec("torch") is not None else None,
        dims=cost.dims_of(model, largest.feeds),
    )


def _gradients(model: oir.Model, samples: Sequence[Sample]) -> Mapping[str, np.ndarray]:
    """The gradients of the task's loss, computed in torch, which is imported when they are asked for."""
    from burnish.backends.fx.gradients import gradients
    from burnish.tools.observe import keeps_of

    return gradients(model, samples, keeps_of)
