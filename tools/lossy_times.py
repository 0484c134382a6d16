"""What edits save in time, each by itself and beside others, and what choices of them save as a whole."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import onnx_ir as oir

from burnish.backends.ort.kernel_times import KernelTimes, exceeds_cache
from burnish.ir.errors import BurnishError
from burnish.ir.samples import Sample
from burnish.passes import lossy
from burnish.passes.latency import Work, faster
from burnish.passes.lossy import Edit, LossyPass
from burnish.passes.pipeline import Pipeline
from burnish.passes.plan import Plan as Todo
from burnish.passes.score_store import Store
from burnish.tools.lossy import Lossy
from burnish.tools.lossy_context import largest, with_seconds
from burnish.tools.lossy_options import Options

SESSIONS = 3
"""Sessions that are made of each model that is timed as a whole."""


class WholeTimes:
    """Times models with edits in ONNX Runtime, each in turns with the one without, on one thread.

    No more than two models have a session at a time. What was timed before is looked up.

    Args:
        model: what the edits were proposed for; not changed.
        passes: the passes.
        sample: what they are run on.
        lower: what is done to each before it is run.
        target: `ort-cpu` or `ort-cuda`.
        store: where timings are kept; None to keep them as long as this object lives.
    """

    def __init__(
        self,
        model: oir.Model,
        passes: Sequence[LossyPass],
        sample: Sample,
        lower: Callable[[oir.Model], oir.Model],
        target: str,
        store: Store | None = None,
    ) -> None:
        self._model, self._passes, self._sample, self._lower = model, passes, sample, lower
        cold = target == "ort-cpu" and exceeds_cache(model)
        self._timer = KernelTimes(store, target=target, cold=cold, sessions=SESSIONS)

    def __call__(self, choices: Sequence[Sequence[Edit]]) -> list[float]:
        """The seconds that each choice saves; minus infinity where its model cannot be timed."""
        first = Work(self._lower(self._model), self._sample.feeds)
        return [self._saved(first, edits) if edits else 0.0 for edits in choices]

    def _saved(self, first: Work, edits: Sequence[Edit]) -> float:
        try:
            made = self._lower(lossy.apply(self._model, edits, self._passes)[0])
        except BurnishError:
            return float("-inf")
        before, after = self._timer(first, [Work(made, lossy.feeds(made, self._sample.feeds))])
        return before - after if isinstance(before, float) and isinstance(after, float) else float("-inf")


@dataclass(frozen=True)
class Times:
    """What was measured of edits; empty where time does not count.

    Attributes:
        edits: those that save time, with how much.
        together: what sets of them save beyond what each saves alone, by their keys.
        whole: measures what choices save as a whole; None where kernels are compiled, which would take too long.
    """

    edits: list[Edit] = field(default_factory=list)
    together: Mapping[frozenset[str], float] = field(default_factory=dict)
    whole: WholeTimes | None = None


def provider(todo: Todo) -> str:
    """Where ONNX Runtime runs models: `ort-cpu` or `ort-cuda`."""
    return "ort-cuda" if todo.target == "ort-cuda" else "ort-cpu"


def timed(found: Lossy, edits: Sequence[Edit], todo: Todo, samples: Sequence[Sample], options: Options) -> Times:
    """Measure what edits save on the target; `found` takes what the original takes, and where that was measured.

    Raises:
        BudgetError, UnchangedError: none saves time.
    """
    found.timed_in = "in ONNX Runtime" if options.kernels is None else options.kernels.words
    found.whole, looked = with_seconds(
        found.model,
        edits,
        todo.lossy,
        samples,
        target=provider(todo),
        store=options.store,
        last=todo.passes,
        kernels=options.kernels,
        on_step=lambda done, total: options.on_step("timing edits", done, total),
    )
    quick = faster(looked)
    if not quick:
        why = next(iter(looked.reasons.values()), "each was timed beside what it replaces")
        cause = f"none of {len(edits)} edits saves time {found.timed_in}: {why}"
        raise todo.budget.missed(cause, hint="ask for a size")
    whole = None
    if options.kernels is None:
        lowering = Pipeline(todo.passes)
        whole = WholeTimes(
            found.model,
            todo.lossy,
            largest(samples),
            lambda one: lowering.rewrite(one).model,
            provider(todo),
            options.store,
        )
    return Times(quick, looked.together, whole)
