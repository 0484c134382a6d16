"""`optimize --emit kernels`: a model as one library that other programs call without TVM."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import onnx_ir as oir

import burnish
from burnish.ir.errors import InputError
from burnish.tools import choosing

if TYPE_CHECKING:
    from burnish.backends.tvm.artifact import Manifest
    from burnish.backends.tvm.target import Target
    from burnish.tools.compiled import Request

KERNELS = "kernels"


def check(emit: str | None, target: Target | None) -> None:
    """See, before any work is done, that what is asked for can be emitted.

    Raises:
        InputError: there is no such thing, no target for it, or no compiler.
    """
    if emit is None:
        return
    if emit != KERNELS:
        raise InputError(f"`{emit}` is nothing that can be emitted", place="--emit", hint=f"there is `{KERNELS}`")
    if target is None:
        raise InputError(
            "kernels are emitted for a target that they are compiled for",
            place="--emit kernels",
            hint="add `--target llvm` or `--target cuda:sm_90`",
        )
    from burnish.backends.tvm.kernels import compilers

    compilers.check(target)


def write(model: oir.Model, folder: Path, request: Request) -> Manifest:
    """Write the library and what lies beside it, and say what there is, but for the inputs and outputs.

    Raises:
        InputError: a part of the model cannot be compiled, or the compiler fails.
        MissingPackageError: a package that tuning needs is absent.
        OSError: the folder cannot be written.
    """
    from burnish.backends.tvm import artifact, processor, versions
    from burnish.backends.tvm.kernels import compilers, emitting
    from burnish.backends.tvm.quiet import quiet

    target, tuning = request.target, request.tuning
    title = str(model.graph.name or "a model")
    with quiet():
        prepared = emitting.prepare(model, target, title=title)
    if tuning is not None and tuning.budget:
        tuning.run(prepared.module, target, request.on_step)
    with quiet():
        scheduled, tuned = choosing.scheduled(prepared.module, target, tuning)
        emitted = emitting.write(prepared, scheduled, target, folder, title=title)
    if tuning is not None:
        tuning.write(folder / artifact.RECORDS, target)
    step = artifact.Step(
        "kernels",
        tuple(one[0] for one in emitted.inputs),
        tuple(one[0] for one in emitted.outputs),
        file=emitting.LIBRARY,
        weights=emitted.weights,
        nodes=len(model.graph),
    )
    return artifact.Manifest(
        target=str(target),
        versions={"burnish": burnish.__version__, **versions.found(), "compiler": compilers.version(target)},
        fingerprint=request.fingerprint,
        inputs=(),
        outputs=(),
        steps=(step,),
        tuned=tuned,
        kernels=len(emitted.kernels),
        extensions=processor.extensions(target),
        recipe=tuple(request.recipe),
    )
