"""Tuning for the commands: a model's kernels, tuned as far as the budget goes, and schedules taken from the records."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import onnx_ir as oir

from burnish.ir.errors import InputError

if TYPE_CHECKING:
    from burnish.backends.tvm.target import Target
    from burnish.backends.tvm.tuning import Progress, Tuned

DEFAULT = "~/.cache/burnish/tuning"
"""Where records are kept unless a folder is named."""


@dataclass(frozen=True)
class Tuning:
    """What is asked of tuning.

    Attributes:
        budget: `200` trials or `5m`; empty to use the records that are there.
        folder: of the records.
        rpc: `HOST:PORT` or `HOST:PORT/KEY` of a tracker whose servers time kernels; empty to time here.
        threads: that kernels run on.
        workers: kernels that are compiled at a time.
        files: names of the folder's files that schedules came from; filled by `schedule`.
    """

    budget: str = ""
    folder: str = DEFAULT
    rpc: str = ""
    threads: int = 1
    workers: int = 2
    files: set[str] = field(default_factory=set, compare=False)

    def check(self, target: Target) -> None:
        """Raise InputError for an option that cannot be used, before any work is done."""
        from burnish.backends.tvm.tuning import Database, budget, laboratory

        if self.budget:
            budget.parse(self.budget)
        if self.rpc:
            laboratory.tracker(self.rpc)
        Database(Path(self.folder).expanduser())
        if not self.budget or self.rpc:
            return
        if target.kind == "cuda":
            import tvm

            if not tvm.cuda(0).exist:
                hint = "give `--rpc HOST:PORT` of a machine that has one, or leave `--tune` out to use records"
                raise InputError(
                    "kernels are tuned by timing them, and there is no GPU here", place="--tune", hint=hint
                )
        else:
            from burnish.backends.tvm import processor

            lacking = processor.lacking(processor.extensions(target))
            if lacking:
                cause = f"kernels are tuned by timing them, and this processor lacks {', '.join(lacking)}"
                raise InputError(cause, place=str(target), hint="tune on such a machine, or with `--rpc HOST:PORT`")

    def run(
        self, model: oir.Model, target: Target, on_progress: Callable[[Progress], None] = lambda progress: None
    ) -> Tuned:
        """Tune the kernels of all that can be compiled of a model, as far as the budget is not spent already.

        Args:
            model: after the passes.
            target: what it is compiled for.
            on_progress: called after each round.

        Raises:
            InputError: the records cannot be written, or there is no tracker.
            MissingPackageError: a package that tuning needs is absent.
        """
        from burnish.backends.tvm.tuning import Database, budget, laboratory, tune

        return tune(
            fused(model, target),
            target,
            budget.parse(self.budget),
            Database(Path(self.folder).expanduser()),
            on_progress,
            rpc=laboratory.tracker(self.rpc) if self.rpc else None,
            threads=self.threads,
            workers=self.workers,
        )

    def schedule(self, module: Any, target: Target) -> tuple[Any, int]:
        """The fused module with a schedule for each kernel, and how many kernels have one from the records."""
        from burnish.backends.tvm import compiling
        from burnish.backends.tvm.tuning import Database, apply

        applied = apply(module, Database(Path(self.folder).expanduser()), target, threads=self.threads)
        self.files.update(applied.files)
        return compiling.scheduled(applied.module, target), len(applied.seconds)


def fused(model: oir.Model, target: Target) -> Any:
    """The kernels of all that can be compiled of a model, fused.

    Raises:
        InputError: nothing can be.
    """
    from burnish.backends.tvm import compiling
    from burnish.backends.tvm.choose import Chooser
    from burnish.backends.tvm.lowering import lower
    from burnish.backends.tvm.merging import merged
    from burnish.backends.tvm.quiet import quiet
    from burnish.tools import choosing

    chooser = Chooser(model, target, [], None, lambda module: (module, 0), everything=True)
    chosen = chooser.choose()
    choosing.refuse_nothing(chosen, len(model.graph))
    parts = [one.region.model for one in chosen if one.region.kind == "tvm" and one.region.outputs]
    with quiet():
        lowered = [lower(part, f"region_{index}").module for index, part in enumerate(parts)]
        return compiling.fused(merged(lowered), target)
