"""Time as the objective of a search where kernels are compiled: of each edit, and of what came of them together."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import onnx_ir as oir

from burnish.ir.errors import InputError
from burnish.passes.plan import Plan

if TYPE_CHECKING:
    from burnish.backends.tvm.target import Target
    from burnish.passes.latency import Timer
    from burnish.passes.protocols import Judge, Runner
    from burnish.passes.score_store import Store
    from burnish.tools.compiled import Request
    from burnish.tools.lossy import Lossy
    from burnish.tools.tuned import Tuning


@dataclass(frozen=True)
class KernelTiming:
    """How edits are timed.

    Attributes:
        target: what is compiled for; its code runs on this machine.
        tuning: where schedules come from; None for plain ones.
        everything: all that can be compiled is; else what ONNX Runtime runs faster stays there.
    """

    target: Target
    tuning: Tuning | None
    everything: bool

    @property
    def words(self) -> str:
        """Where edits are timed."""
        return f"in kernels compiled for {self.target}" + (
            "" if self.everything else ", or in ONNX Runtime where that is faster"
        )

    def timer(self, rival: Timer, store: Store | None, *, cold: bool) -> Timer:
        """The timer.

        Args:
            rival: of ONNX Runtime.
            store: where times are kept.
            cold: weights are not in the processor's cache when a kernel is called.
        """
        from burnish.backends.tvm.kernel_times import CompiledTimes
        from burnish.tools import choosing

        def schedule(fused: Any) -> tuple[Any, int]:
            return choosing.scheduled(fused, self.target, self.tuning)

        return CompiledTimes(self.target, schedule, rival, store, everything=self.everything, cold=cold)


def asked(
    todo: Plan, target: Target | None, tuning: Tuning | None, *, everything: bool, emit: str | None
) -> KernelTiming | None:
    """How edits are timed; None where they are not, or in ONNX Runtime.

    Raises:
        InputError: they cannot be timed on this machine, or not as what is written will run.
    """
    if target is None or not todo.budget or todo.budget.objective != "latency":
        return None
    from burnish.backends.tvm import processor

    why = processor.elsewhere(target)
    if why:
        where = "where the GPU is" if target.kind == "cuda" else "on such a machine"
        raise InputError(
            f"what edits save in time is measured by running kernels for `{target}`, and {why}",
            place="--objective latency",
            hint=f"take `--objective size`, or run {where}",
        )
    if tuning is not None and tuning.budget:
        raise InputError(
            "what edits save in time is measured with the kernels that are written, and tuning would change them after",
            place="--tune",
            hint="tune into a folder and give it with `--tuning-db`, or search first and tune what came of it",
        )
    return KernelTiming(target, tuning, everything or emit is not None or todo.verify == "off")


def accepting(request: Request, reduced: Lossy, model: oir.Model, todo: Plan, judge: Judge) -> Request:
    """The request, with what lossy passes left measured before the artefact gets its name.

    Code that runs here is measured itself; its time too, where that was the objective, beside the model without edits,
    compiled likewise.

    Args:
        request: how the model is compiled.
        reduced: what was done to it.
        model: what is compiled.
        todo: the passes and the budget.
        judge: runs the model where the code cannot, and times.
    """

    def accept(code: Runner | None) -> None:
        timed = code is not None and todo.budget.objective == "latency" and bool(todo.budget)
        written = judge.execute(model) if code is None else code
        original = partial(_unedited, todo=todo, request=request) if timed else None
        reduced.measure_written(written, model, judge.clock, original)
        written.close()

    return replace(request, accept=accept)


@contextmanager
def _unedited(original: oir.Model, *, todo: Plan, request: Request) -> Iterator[Runner]:
    """The model without edits, compiled as with them and loaded."""
    from burnish.backends.tvm import loading
    from burnish.passes.pipeline import Pipeline
    from burnish.tools import compiled

    with tempfile.TemporaryDirectory(prefix="burnish-") as aside:
        folder = Path(aside) / "unedited"
        tuning = None if request.tuning is None else replace(request.tuning, used={}, looked_up={})
        plain = replace(request, strict=False, timed=False, tuning=tuning)
        compiled.make(Pipeline(todo.passes).rewrite(original).model, original, folder, plain)
        runner = loading.load(folder, threads=1)
        try:
            yield runner
        finally:
            runner.close()
