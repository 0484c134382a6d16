"""Which parts of a model `optimize` compiles, and what it says of them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import onnx_ir as oir

import burnish
from burnish.ir import match
from burnish.ir.errors import InputError
from burnish.tools import terminal

if TYPE_CHECKING:
    from rich.console import Console

    from burnish.backends.tvm.artifact import Manifest, Step
    from burnish.backends.tvm.choose import Chooser, Chosen
    from burnish.backends.tvm.target import Target
    from burnish.tools.compiled import Request
    from burnish.tools.tuned import Tuning

REGIONS = ("measured", "all")
"""What is compiled of a model."""

_SHOWN = 5
_WHERE = {"tvm": "TVM", "ort": "ONNX Runtime", "kernels": "a library of its own"}
_WHY = {"tvm": "it computes the same", "ort": "", "kernels": "it was asked for"}


def everything(asked: str, *, compiles: bool) -> bool:
    """Whether all regions are compiled.

    Raises:
        InputError: there is no such choice, or nothing is compiled at all.
    """
    if asked not in REGIONS:
        raise InputError(f"`regions` cannot be `{asked}`", hint="it is `measured` or `all`")
    if asked == "all" and not compiles:
        raise InputError("regions are for kernels, and none are compiled", hint="add `--target llvm` or `cuda:sm_90`")
    return asked == "all"


def chooser(model: oir.Model, request: Request, *, measurable: bool) -> Chooser:
    """What chooses the regions of a model, as before where that was measured; all where nothing can be measured."""
    from burnish.backends.tvm.choices import Choices
    from burnish.backends.tvm.choose import Chooser
    from burnish.passes.score_store import Store

    target, tuning = request.target, request.tuning
    choices = None
    if measurable:
        records = () if tuning is None else (tuning.looked_up, tuning.digest)
        choices = Choices(Store(), target, burnish.__version__, *records, everything=request.everything)
    return Chooser(
        model,
        target,
        request.samples,
        request.judge if measurable else None,
        lambda fused: scheduled(fused, target, tuning),
        everything=request.everything,
        choices=choices,
    )


def built(module: Any, target: Target) -> Any:
    """Code of a scheduled module, as `compiling.build` makes it.

    Raises:
        InputError: TVM makes none.
    """
    from burnish.backends.tvm import compiling
    from burnish.backends.tvm.reasons import last_line

    try:
        return compiling.build(module, target)
    except Exception as error:  # TVM's errors have many types
        raise InputError(
            f"TVM makes no code for `{target}` of it: {last_line(error)}",
            hint="give its dynamic sizes numbers with `--dims`, or run the optimized ONNX file on ONNX Runtime",
        ) from error


def scheduled(fused: Any, target: Target, tuning: Tuning | None) -> tuple[Any, int]:
    """The fused module with a schedule for each kernel, and how many have a tuned one."""
    from burnish.backends.tvm import compiling

    return (compiling.scheduled(fused, target), 0) if tuning is None else tuning.schedule(fused, target)


def refuse_nothing(chosen: Sequence[Chosen], nodes: int) -> None:
    """Raise InputError when nothing can be compiled, with the commonest reasons."""
    if any(one.region.kind == "tvm" for one in chosen):
        return
    reasons = Counter(f"{match.describe(n)}: {why}" for one in chosen for n, why in one.region.reasons.items())
    shown = "".join(f"\n    {one}" for one in list(reasons)[:_SHOWN])
    more = f"\n    and {len(reasons) - _SHOWN} more" if len(reasons) > _SHOWN else ""
    raise InputError(
        f"none of {terminal.count(nodes, 'node')} can be compiled:{shown}{more}",
        hint="`--target onnx` optimizes the model for ONNX Runtime",
    )


def table(manifest: Manifest | None, console: Console) -> None:
    """Print where every region went, the error of its code and its time over that in ONNX Runtime."""
    from rich.table import Table

    if manifest is None:
        console.print("there are no regions: the target is not one that kernels are compiled for")
        return
    found = Table("region", "runs on", "nodes", "error", "time", "why", box=None, pad_edge=False)
    for index, step in enumerate(manifest.steps):
        known = step.evidence
        error = "" if known.error is None else f"{known.error:.1e}"
        ratio = "" if known.ratio is None else f"{known.ratio:.3g}x"
        found.add_row(str(index), _WHERE[step.kind], str(step.nodes), error, ratio, known.note or _why(step))
    terminal.show(found, console)


def _why(step: Step) -> str:
    faster = step.kind == "tvm" and step.evidence.ratio is not None and step.evidence.ratio < 1
    return "it is faster and computes the same" if faster else _WHY[step.kind]
