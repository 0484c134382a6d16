"""From a Relax function to code: the passes up to fused kernels, which tuning and building share, and those behind."""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
from contextlib import nullcontext
from pathlib import Path
from threading import Lock
from typing import Any

import tvm
from tvm import relax
from tvm.relax import transform

from burnish.backends.tvm import pairs, vector_math
from burnish.backends.tvm.quiet import quiet
from burnish.backends.tvm.target import Target
from burnish.ir.errors import InputError

_ROOM = 1 << 26
"""Bytes of temporary files that code may take before it is linked."""
_lock = Lock()


def fused(module: Any, target: Target) -> Any:
    """The module with every operator a kernel and neighbouring kernels joined; the same for tuning and for building.

    What a database of tuned kernels is asked for are these kernels, by their structure: nothing may be changed here for
    one of the two uses alone. `CanonicalizeBindings` is left out: it takes away comparisons of sizes (`match_cast`)
    that are not proven.
    """
    dispatch = {"cuda": tvm.relax.backend.cuda, "llvm": tvm.relax.backend.cpu_generic}[target.kind].pipeline
    with target.tvm(), tvm.transform.PassContext(opt_level=3):
        return tvm.transform.Sequential(
            [
                transform.DecomposeOpsForInference(),
                *dispatch.library_dispatch_passes(target.tvm()),
                *([tvm.transform.module_pass(_paired, opt_level=0)] if target.kind == "llvm" else []),
                transform.LegalizeOps(),
                transform.AnnotateTIROpPattern(),
                transform.FoldConstant(),
                transform.FuseOps(),
                transform.FuseTIR(),
                transform.DeadCodeElimination(),
            ]
        )(module)


def _paired(module: Any, context: Any) -> Any:
    return pairs.joined(module)


def scheduled(module: Any, target: Target) -> Any:
    """The module with a schedule for each kernel that has none: on a GPU by rules (dlight); on a CPU for products with
    weights that are unpacked, and plain loops for the rest."""
    from burnish.backends.tvm import processor_schedules, schedules

    if target.kind != "cuda":
        return processor_schedules.apply(copied(module))
    with target.tvm():
        return schedules.apply(copied(module))  # dlight puts schedules into the module that it is given


def copied(module: Any) -> Any:
    """Another module with the same functions."""
    return tvm.IRModule(dict(module.functions.items()), attrs=module.attrs, global_infos=module.global_infos)


def build(module: Any, target: Target, *, graphs: bool = False) -> Any:
    """Code of a module whose kernels are scheduled: a `tvm.runtime.Executable`, to be exported or run in place.

    Args:
        module: as `scheduled` gives it.
        target: what it was scheduled for.
        graphs: on a GPU, record what does not hang on dynamic sizes as CUDA graphs and replay them.
    """
    dispatch = {"cuda": tvm.relax.backend.cuda, "llvm": tvm.relax.backend.cpu_generic}[target.kind].pipeline
    made = target.tvm()

    def lowered(given: Any, context: Any) -> Any:
        passes = [*dispatch.dataflow_lower_passes(made), *dispatch.finalize_passes(made)]
        return tvm.transform.Sequential(passes)(given)

    pipeline = tvm.transform.module_pass(lowered, opt_level=0)
    with _lock, vector_math.enabled() if target.kind == "llvm" else nullcontext():
        with made, tvm.transform.PassContext(opt_level=3, config={"relax.backend.use_cuda_graph": graphs}):
            return relax.build(module, target=made, relax_pipeline=pipeline)


def export(code: Any, path: Path) -> None:
    """Write the library.

    Raises:
        InputError: there is no C++ compiler to link it, or it fails.
        OSError: the file cannot be written.
    """
    from tvm.support import cc

    aside = tempfile.gettempdir()
    if shutil.disk_usage(aside).free < _ROOM:  # LLVM ends the process when it cannot write an object
        raise InputError("the disk for temporary files is full", place=aside, hint="free some space, or set `TMPDIR`")
    linker = cc.get_cc()
    if not linker or shutil.which(linker) is None:
        raise InputError(
            "there is no C++ compiler to link the library", hint="install g++, or name one in the variable `CXX`"
        )
    try:
        with quiet() as said:
            code.export_library(str(path))
    except OSError:
        raise
    except Exception as error:
        if os.strerror(errno.ENOSPC) in str(error):  # as the linker's words
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)) from error
        lines = [line.strip() for line in (str(error) or said()).splitlines()]
        telling = [line for line in lines if line and not line.startswith(("Compilation error", "Command line"))]
        reason = telling[0] if telling else f"`{linker}` fails"
        raise InputError(f"the library cannot be linked: {reason}", hint="see what `CXX` names") from error


def kernels(module: Any) -> int:
    """How many kernels a module has."""
    return sum(isinstance(one, tvm.tirx.PrimFunc) for one in module.functions.values())
