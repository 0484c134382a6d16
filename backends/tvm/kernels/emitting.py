"""A model as one C++ source, one library, a header, weights and examples."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as oir
import tvm
from tvm import relax

from burnish.backends.tvm import compiling, weights_file
from burnish.backends.tvm.kernels import compilers, entry, examples, expressions, plan
from burnish.backends.tvm.lowering import MAIN, lower
from burnish.backends.tvm.registry import Unsupported
from burnish.backends.tvm.target import Target
from burnish.ir.errors import InputError

LIBRARY = "model.so"


@dataclass(frozen=True)
class Emitted:
    """What was written.

    Attributes:
        files: names in the folder.
        inputs, outputs: name, dtype and sizes of each, symbols as text.
        weights: names in `weights.safetensors`, in the order in which the functions take them.
        calls: how many kernels one run calls.
        kernels: names of the kernels in the library.
    """

    files: tuple[str, ...]
    inputs: tuple[tuple[str, str, tuple[str, ...]], ...]
    outputs: tuple[tuple[str, str, tuple[str, ...]], ...]
    weights: tuple[str, ...]
    calls: int
    kernels: tuple[str, ...]


@dataclass(frozen=True)
class Prepared:
    """A model before its kernels have schedules.

    Attributes:
        plan: the calls of kernels.
        module: the fused module, with the kernels alone that the library will have.
    """

    plan: plan.Plan
    module: Any


def emit(
    model: oir.Model, target: Target, folder: Path, *, title: str = "a model", dims: Mapping[str, int] | None = None
) -> Emitted:
    """Write the kernels of a model with their default schedules into a folder: `prepare`, then `write`; raises as both.

    Args:
        model: in the normal form, sorted, functions inlined.
        title: named in the header.
        dims: sizes for symbols of the inputs; the others stay symbolic.
    """
    prepared = prepare(model, target, title=title, dims=dims)
    return write(prepared, compiling.scheduled(prepared.module, target), target, folder, title=title)


def prepare(
    model: oir.Model, target: Target, *, title: str = "a model", dims: Mapping[str, int] | None = None
) -> Prepared:
    """The calls and kernels of a model; arguments as for `emit`.

    Raises:
        InputError: a node that TVM is not given, a size that depends on data, or no compiler.
    """
    compilers.check(target)
    try:
        lowered = lower(model)
        if not lowered.inputs:
            raise Unsupported("it has no inputs")
        fused = compiling.fused(_sized(lowered.module, dims or {}), target)
        fused = relax.transform.RewriteDataflowReshape()(fused)
        planned = plan.of(
            fused[MAIN],
            lowered.inputs,
            lowered.outputs,
            [*lowered.arrays()],
            lambda steps, arrays: _once(steps, arrays, fused),
        )
    except Unsupported as reason:
        raise InputError(f"the model cannot be one library of kernels: {reason}", place=title) from None
    called = (MAIN, *planned.kernels)
    functions = {variable: one for variable, one in fused.functions.items() if variable.name_hint in called}
    return Prepared(planned, tvm.IRModule(functions))


def write(prepared: Prepared, scheduled: Any, target: Target, folder: Path, *, title: str = "a model") -> Emitted:
    """Write the library of a model and its source into a folder, which is empty or is made.

    On a GPU everything is in `model.cu` and `model.so`; on a CPU the kernels are in `kernels.o`, linked into `model.so`
    behind `model.cc`. Beside them: `model.h`, `weights.safetensors`, `example.py` and `example.cc`.

    Args:
        prepared: the calls.
        scheduled: its module with a schedule for each kernel.
        target: what it was scheduled for.
        folder: where.
        title: named in the header.

    Raises:
        InputError: the compiler fails, or the disk is full.
    """
    planned = prepared.plan
    try:
        folder.mkdir(exist_ok=True)
        code = _compiled(_only(scheduled, planned.kernels), target)
        (folder / "model.h").write_text(entry.header(planned, target, title), encoding="utf-8")
        names, offsets = _store(folder / "weights.safetensors", planned.arrays)
        objects = []
        if target.kind == "cuda":
            from tvm.backend.cuda import export_cuda_host

            source = folder / "model.cu"
            source.write_text(f"{export_cuda_host(code)}\n{entry.source(planned, target, offsets)}", encoding="utf-8")
        else:
            source, objects = folder / "model.cc", [folder / "kernels.o"]
            source.write_text(entry.source(planned, target, offsets), encoding="utf-8")
            code.write_to_file(str(objects[0]))
        compilers.library(source, folder / LIBRARY, target, objects=objects)
        examples.write(folder, planned, target)
    except OSError as error:
        raise InputError(
            f"cannot be written: {error.strerror or error}", place=str(error.filename or folder)
        ) from error
    return Emitted(
        tuple(sorted(one.name for one in folder.iterdir())),
        tuple(_described(planned.names[0], planned.inputs)),
        tuple(_described(planned.names[1], planned.outputs)),
        names,
        len(planned.steps),
        planned.kernels,
    )


def _sized(module: Any, dims: Mapping[str, int]) -> Any:
    """The module with numbers for the symbols that are named."""
    symbols = {str(one.name) for one in relax.analysis.free_symbolic_vars(module[MAIN])} | {
        str(one.name) for one in relax.analysis.defined_symbolic_vars(module[MAIN])
    }
    unknown = sorted(set(dims) - symbols)
    if unknown:
        known = ", ".join(f"`{one}`" for one in sorted(symbols)) or "none"
        raise InputError(f"no input has a dimension `{unknown[0]}`", place="--dims", hint=f"dimensions are: {known}")
    return relax.transform.BindSymbolicVars(dict(dims))(module) if dims else module


def _store(path: Path, arrays: Sequence[np.ndarray]) -> tuple[tuple[str, ...], list[int]]:
    """Write the weights, each from 64 bytes on; their names, and where they begin in the file.

    The format has no holes: what fills one up is an entry of its own.
    """
    entries: dict[str, np.ndarray] = {}
    offsets, position = [], 0
    for index, array in enumerate(arrays):
        entries[f"w{index}"] = array
        offsets.append(position)
        hole = -array.nbytes % 64
        if hole:
            entries[f"w{index}.fill"] = np.zeros(hole, np.uint8)
        position += array.nbytes + hole
    weights_file.write(path, entries)
    with path.open("rb") as stream:
        start = 8 + int.from_bytes(stream.read(8), "little")
    return tuple(f"w{index}" for index in range(len(arrays))), [start + one for one in offsets]


def _only(module: Any, names: Sequence[str]) -> Any:
    """The kernels with these names, each under its name."""
    functions = {one.name_hint: function for one, function in module.functions.items()}
    return tvm.IRModule({name: functions[name].with_attr("global_symbol", name) for name in names})


def _compiled(kernels: Any, target: Target) -> Any:
    made = target.tvm(host="cuda_host")
    with made, tvm.transform.PassContext(opt_level=3):
        return tvm.compile(kernels, made).mod


def _once(steps: Sequence[plan.Step], arrays: plan.Arrays, module: Any) -> None:
    """Run steps on this machine's CPU."""
    if not steps:
        return
    names = list(dict.fromkeys(step.kernel for step in steps))
    here = tvm.target.Target("llvm")
    with here:
        code = tvm.compile(_only(module, names), here)
    for step in steps:
        read = [tvm.runtime.tensor(arrays[one.place].reshape([int(size) for size in one.shape])) for one in step.reads]
        written = [tvm.runtime.empty([int(size) for size in one.shape], one.dtype) for one in step.writes]
        code[step.kernel](*read, *written)
        arrays.update((one.place, array.numpy()) for one, array in zip(step.writes, written, strict=True))


def _described(names: Sequence[str], tensors: Sequence[plan.Tensor]) -> Iterator[tuple[str, str, tuple[str, ...]]]:
    for name, one in zip(names, tensors, strict=True):
        yield name, one.dtype, tuple(expressions.plain(size) for size in one.shape)
