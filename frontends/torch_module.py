"""Bring a PyTorch module in through torch.export.

The exporter's own optimizer is off: it ties parameters that happen to be equal and folds BatchNorm away, which later
rewrites need to see. Weights share memory with the module.
"""

from __future__ import annotations

import io
import json
import logging
import re
import warnings
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import onnx_ir as oir

from burnish.ir import origin
from burnish.ir.errors import InputError, MissingPackageError

_UNSAFE = ("custom_obj_", "opaque_obj_")
_HINTS = {
    r"No ONNX function found": (
        "rewrite the operator with standard ones; a mixture of experts in transformers needs "
        "`experts_implementation='batched_mm'`"
    ),
    r"data.dependent|GuardOnDataDependent": "let no Python branch or loop depend on the values of tensors",
    r"Cannot view a tensor|decompose": "load transformers' models with `attn_implementation='eager'`",
    r"is already registered|SSA": "rename the parameters or buffers whose names begin with `val_`",
    r"dynamic_shapes|Dim\(|Constraints violated": "name a dim by `torch.export.Dim`, one name for dims that are equal",
    r"(missing|takes|too many) .*positional argument|unexpected keyword|a required argument": (
        "pass all inputs that `forward` takes"
    ),
}


def trace(
    module: Any,
    inputs: Any = None,
    *,
    input_names: Sequence[str] | None = None,
    output_names: Sequence[str] | None = None,
    dynamic_shapes: Any = None,
    opset: int | None = None,
) -> oir.Model:
    """The ONNX model of a module in inference mode.

    Args:
        module: a `torch.nn.Module` (its mode is as before afterwards) or a `torch.export.ExportedProgram`.
        inputs: tensors or arrays: one, a tuple of positional arguments, or a dict of named ones; not needed for a
            program.
        input_names: names of the model's inputs, by default those of `forward`.
        output_names: names of the model's outputs.
        dynamic_shapes: which dims may vary, as `torch.export.export` takes it; all others are fixed. A program has its
            own.
        opset: the operator set, by default the exporter's.

    Raises:
        InputError: the module cannot be traced.
        MissingPackageError: PyTorch is not installed.
    """
    torch = _torch()
    place = type(module).__name__
    program = isinstance(module, torch.export.ExportedProgram)
    if program and dynamic_shapes is not None:
        hint = "give `dynamic_shapes` to torch.export.export"
        raise InputError("an exported program has its dynamic dims already", place=place, hint=hint)
    if not program and inputs is None:
        raise InputError("a module needs inputs to be traced with", place=place, hint="load(module, inputs)")
    args, kwargs = _arguments(torch, inputs)
    notes = []
    if not program and module.training:
        notes.append("the module was in training mode, and was traced in inference mode")
    with _quiet(), _inference_mode(module, program):
        try:
            exported = torch.onnx.export(
                module, args, kwargs=kwargs, dynamo=True, optimize=False, verbose=False, external_data=False,
                input_names=list(input_names) if input_names else None,
                output_names=list(output_names) if output_names else None,
                dynamic_shapes=dynamic_shapes, opset_version=opset,
            )  # fmt: skip
        except Exception as error:
            raise _trace_error(error, place) from error
    model: oir.Model = exported.model
    _unique_names(model)
    origin.record(model, (), notes)
    return model


def read_program(path: Path) -> Any:
    """The `torch.export.ExportedProgram` in a .pt2 file; refuses a file that could run code when it is opened.

    Raises:
        InputError: the file cannot be read, is no program, or holds pickles of anything but tensors.
        MissingPackageError: PyTorch is not installed.
    """
    torch = _torch()
    place = str(path)
    hint = "write it with torch.export.save"
    try:
        content = path.read_bytes()
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            _check_pickles(torch, archive, place)
        with _quiet():
            return torch.export.load(io.BytesIO(content))
    except InputError:
        raise
    except OSError as error:
        raise InputError(f"the file cannot be read: {error.strerror}", place=place, hint="check the path") from error
    except zipfile.BadZipFile as error:
        raise InputError("this is not a .pt2 file, or only a part of one", place=place, hint=hint) from error
    except Exception as error:
        raise InputError(f"the program cannot be loaded: {_first_line(error)}", place=place, hint=hint) from error


def _torch() -> Any:
    try:
        import torch
    except ImportError as error:
        raise MissingPackageError("PyTorch is not installed", hint="pip install 'burnish[torch]'") from error
    return torch


def _arguments(torch: Any, inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any] | None]:
    def tensor(value: Any) -> Any:
        return torch.as_tensor(value) if type(value).__module__ == "numpy" else value

    if inputs is None:
        return (), None
    if isinstance(inputs, Mapping):
        return (), {name: tensor(value) for name, value in inputs.items()}
    if isinstance(inputs, tuple | list):
        return tuple(tensor(value) for value in inputs), None
    return (tensor(inputs),), None


@contextmanager
def _inference_mode(module: Any, program: bool) -> Iterator[None]:
    """Put every sub-module that trains into inference mode, and back."""
    training = [] if program else [part for part in module.modules() if part.training]
    for part in training:
        part.training = False
    try:
        yield
    finally:
        for part in training:
            part.training = True


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep what the exporter warns, logs and prints, which speaks to its developers, from the user."""
    level = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    trace = logging.getLogger("torch.__trace")  # it has a mind of its own: `disable` does not count for it
    trace_level = trace.level
    trace.setLevel(logging.CRITICAL + 1)
    try:
        with warnings.catch_warnings(), redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        trace.setLevel(trace_level)
        logging.disable(level)


def _unique_names(model: oir.Model) -> None:
    """Rename inner values that have the name of an input, an output or another value."""
    from onnx_ir.passes.common import NameFixPass

    NameFixPass()(model)


def _check_pickles(torch: Any, archive: zipfile.ZipFile, place: str) -> None:
    """Raise InputError unless every pickle that torch would open is one that its safe loader accepts."""
    pickles: set[str] = set()
    for name in archive.namelist():
        folder, _, file = name.rpartition("/")
        if "aotinductor" in folder:
            raise InputError("the file holds compiled code", place=place, hint="save the program uncompiled")
        if file.endswith(".pt") or "sample_inputs" in folder:
            pickles.add(name)
        elif file.startswith(_UNSAFE):
            raise _unsafe(name, place)
        elif file.endswith("_config.json"):
            entries = json.loads(archive.read(name)).get("config", {}).values()
            names = [(entry["path_name"], entry.get("use_pickle", False)) for entry in entries]
            if any(str(path).startswith(_UNSAFE) for path, _ in names):
                raise _unsafe(name, place)
            pickles.update(f"{folder}/{path}" for path, pickled in names if pickled)
    for name in sorted(pickles):
        try:
            torch.load(io.BytesIO(archive.read(name)), weights_only=True)
        except Exception as error:
            raise _unsafe(name, place) from error


def _unsafe(name: str, place: str) -> InputError:
    cause = f"`{name}` in the file is a pickle of more than tensors, which could run code"
    return InputError(cause, place=place, hint="load it yourself if you trust it, and pass the program")


def _trace_error(error: Exception, place: str) -> InputError:
    text = []
    step: BaseException | None = error
    while step is not None:
        text.append(str(step))
        last, step = step, step.__cause__
    everything = "\n".join(text)
    hint = next((hint for pattern, hint in _HINTS.items() if re.search(pattern, everything)), None)
    cause = f"the module cannot be traced: {_first_line(last)}"
    return InputError(cause, place=place, hint=hint or "see whether torch.export.export(module, inputs) accepts it")


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0][:200] if lines else type(error).__name__
