"""What lossy passes look at and are run by: ONNX Runtime, the padding that masks tell of, gradients from torch."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from importlib.util import find_spec
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    import onnx_ir as oir

    from burnish.ir.samples import Sample
    from burnish.passes.base import Pass
    from burnish.passes.book import Book
    from burnish.passes.latency import Timed, Timer
    from burnish.passes.lossy import Context, Edit, LossyPass
    from burnish.passes.routers import Routed, Routing
    from burnish.passes.score_store import Store
    from burnish.passes.search import OnStep
    from burnish.tools.compiled_times import KernelTiming


def context_for(
    model: oir.Model,
    samples: Sequence[Sample],
    *,
    target: str = "ort-cpu",
    threads: int = 1,
    book: Book | None = None,
    on_step: OnStep = lambda what, number, total: None,
) -> Context:
    """The context for proposing edits of `model`, judged on `samples`; what is observed is noted in `book`."""
    from burnish.backends.ort.observe import OrtObserver
    from burnish.backends.ort.session import executor
    from burnish.ir import cost
    from burnish.passes.lossy import Context
    from burnish.tools.observe import keeps_of

    return Context(
        samples=samples,
        execute=executor(threads=threads, target=target),
        observe=lambda one: OrtObserver(one, threads=threads, target=target, book=book),
        keeps=keeps_of,
        gradients=_gradients if find_spec("torch") is not None else None,
        routes=_routes if find_spec("torch") is not None else None,
        dims=cost.dims_of(model, largest(samples).feeds),
        on_step=on_step,
    )


def with_seconds(
    model: oir.Model,
    edits: Sequence[Edit],
    passes: Sequence[LossyPass],
    samples: Sequence[Sample],
    *,
    target: str = "ort-cpu",
    threads: int = 1,
    store: Store | None = None,
    last: Sequence[Pass] | None = None,
    kernels: KernelTiming | None = None,
    on_step: Callable[[int, int], None] = lambda done, total: None,
) -> tuple[float, Timed]:
    """Seconds of a run on the largest sample, and the edits with what they save of it, lowered as the model will be.

    Args:
        model: what the edits were proposed for.
        edits: edits of `passes`.
        passes: the passes.
        samples: at least one.
        target: `ort-cpu` or `ort-cuda`.
        threads: threads inside an operator.
        store: where timings are kept; None to forget them.
        last: the passes that lower the model; those of the default recipe when None.
        kernels: how they are timed where kernels are compiled; None to time them in ONNX Runtime.
        on_step: progress.

    Raises:
        InputError: the model cannot be timed.
    """
    from burnish.backends.ort.kernel_times import KernelTimes, exceeds_cache
    from burnish.backends.ort.observe import OrtObserver
    from burnish.ir.errors import InputError
    from burnish.passes import recipes
    from burnish.passes.latency import Work, timed
    from burnish.passes.pipeline import Pipeline

    lowering = Pipeline(recipes.named("default", target, None) if last is None else last)
    cold = target == "ort-cpu" and exceeds_cache(model)
    timer: Timer = KernelTimes(store, target=target, threads=threads, cold=cold)
    if kernels is not None:
        timer = kernels.timer(timer, store, cold=cold)
    feeds = largest(samples).feeds
    (whole,) = timer(Work(lowering.rewrite(model).model, feeds), [])
    if isinstance(whole, str):
        raise InputError(f"the model cannot be timed: {whole}", hint="take `--objective size`")
    observer = OrtObserver(model, threads=threads, target=target)
    try:
        found = timed(
            model,
            edits,
            passes,
            timer,
            observer,
            feeds,
            lower=lambda part: lowering.rewrite(part).model,
            fused=kernels is not None,
            on_step=on_step,
        )
    finally:
        observer.close()
    return whole, found


def largest(samples: Sequence[Sample]) -> Sample:
    """The sample with the most elements."""
    return max(samples, key=lambda sample: sum(array.size for array in sample.feeds.values()))


def _gradients(model: oir.Model, samples: Sequence[Sample]) -> Mapping[str, np.ndarray]:
    """The gradients of the task's loss, computed in torch, which is imported when they are asked for."""
    from burnish.backends.fx.gradients import gradients
    from burnish.tools.observe import keeps_of

    return gradients(model, samples, keeps_of)


def _routes(model: oir.Model, wanted: Routing, samples: Sequence[Sample]) -> Routed:
    """Routers that were learned in torch, which is imported when they are asked for."""
    from burnish.backends.fx.routing import route
    from burnish.tools.observe import keeps_of

    return route(model, wanted, samples, keeps_of)
