"""Tuning for the commands: a model's kernels, tuned as far as the budget goes, and schedules taken from the records."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import onnx_ir as oir

from burnish.ir.errors import InputError
from burnish.tools import terminal

if TYPE_CHECKING:
    from burnish.backends.tvm.target import Target
    from burnish.backends.tvm.tuning import Progress, Tuned
    from burnish.backends.tvm.tuning.kernels import Kernel
    from burnish.backends.tvm.tuning.records import Record

DEFAULT = "~/.cache/burnish/tuning"
"""Where records are kept unless a folder is named."""


@dataclass(frozen=True)
class Tuning:
    """What is asked of tuning.

    Attributes:
        budget: `200` trials or `5m`; empty to use the records that are there.
        folder: of the records.
        rpc: `HOST:PORT` or `HOST:PORT/KEY` of a tracker whose servers time kernels; empty to time here.
        workers: kernels that are compiled at a time.
        used: kernels, by their hash, and the records that schedules came from; filled by `schedule`.
        looked_up: SHA-256 of the files of records that `schedule` looked up, by name; empty for one that is not there.
    """

    budget: str = ""
    folder: str = DEFAULT
    rpc: str = ""
    workers: int = 2
    used: dict[str, tuple[Kernel, Record]] = field(default_factory=dict, compare=False, repr=False)
    looked_up: dict[str, str] = field(default_factory=dict, compare=False, repr=False)

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
        self, module: Any, target: Target, on_step: Callable[[str, int, int], None] | None = None, rival: str = ""
    ) -> Tuned:
        """Tune the kernels of a fused module, as far as the budget is not spent already.

        Args:
            module: as `fused` gives it.
            target: what it is compiled for.
            on_step: told the kernel and the best times so far, the part of the budget that is spent, and the budget.
            rival: what the best is shown beside.

        Raises:
            InputError: the records cannot be written, or there is no tracker.
            MissingPackageError: a package that tuning needs is absent.
        """
        from burnish.backends.tvm.tuning import Database, budget, laboratory, tune

        def told(progress: Progress) -> None:
            if on_step is not None:
                best = "?" if progress.seconds is None else f"{progress.seconds * 1e3:.3g} ms"
                name = terminal.short(progress.kernel, longest=30)
                on_step(f"{name}  all kernels {best}{rival}", round(progress.done), round(progress.total))

        return tune(
            module,
            target,
            budget.parse(self.budget),
            Database(Path(self.folder).expanduser()),
            told,
            rpc=laboratory.tracker(self.rpc) if self.rpc else None,
            workers=self.workers,
        )

    def schedule(self, module: Any, target: Target) -> tuple[Any, int]:
        """The fused module with a schedule for each kernel, and how many kernels have one from the records."""
        from burnish.backends.tvm import compiling
        from burnish.backends.tvm.tuning import Database, apply

        applied = apply(module, Database(Path(self.folder).expanduser()), target)
        for name, digest in applied.looked_up.items():
            self.looked_up.setdefault(name, digest)
        self.used.update({kernel.hash: (kernel, record) for kernel, record in applied.used})
        return compiling.scheduled(applied.module, target), len(applied.seconds)

    def digest(self, name: str) -> str:
        """SHA-256 of a file of records, in hex; empty where there is none."""
        from burnish.backends.tvm.tuning import Database

        return Database(Path(self.folder).expanduser()).digest(name)

    def write(self, folder: Path, target: Target) -> None:
        """Write the records that were used into a folder, itself one for `--tuning-db`."""
        from burnish.backends.tvm.tuning import Database

        for kernel, record in self.used.values():
            Database(folder).append(kernel, target, 1, [record])


def asked(target: Target | None, tune: str | None, folder: str | Path | None, rpc: str | None) -> Tuning | None:
    """What the options of `optimize` ask for; None when they ask for nothing.

    Args:
        target: what is compiled for; None when nothing is.
        tune: the budget; None to use records only.
        folder: of the records.
        rpc: of a tracker.

    Raises:
        InputError: an option cannot be used.
    """
    if tune is None and folder is None and rpc is None:
        return None
    if target is None:
        raise InputError("tuning is for kernels, and none are compiled", hint="add `--target llvm` or `cuda:sm_90`")
    if rpc is not None and tune is None:
        raise InputError("servers time kernels while they are tuned", place="--rpc", hint="add `--tune 5m`")
    found = Tuning(tune or "", str(folder or DEFAULT), rpc or "")
    found.check(target)
    if tune is None and not Path(found.folder).expanduser().is_dir():
        raise InputError("there is no such folder", place=found.folder, hint="`burnish tune` or `--tune 5m` makes it")
    return found


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
