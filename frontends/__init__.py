"""Bring a model in, and the samples it is judged on."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import onnx_ir as oir

from burnish.ir.errors import InputError

_OTHER_FORMATS = {
    (".pt", ".pth", ".ckpt", ".pkl", ".bin"): "a pickle is never opened: load the module and pass it with its inputs",
    (".safetensors", ".gguf"): "it holds weights without a graph: load the module and pass it with its inputs",
    (".h5", ".hdf5", ".keras", ".pb"): "convert it to ONNX with tf2onnx",
    (".tflite",): "convert it to ONNX with `python -m tf2onnx.convert --tflite`",
    (".ort",): "give the .onnx file it was made from",
}


def load(source: Any, inputs: Any = None, **options: Any) -> oir.Model:
    """The model in a file or an object.

    Args:
        source: the path of an .onnx or .pt2 file, an `onnx_ir.Model` (given back as it is), an `onnx.ModelProto`, a
            `torch.nn.Module` or a `torch.export.ExportedProgram`.
        inputs: what a module is traced with: a tensor, a tuple of positional or a dict of named arguments.
        options: the other arguments of `burnish.frontends.torch_module.trace`.

    Raises:
        InputError: the source is no model, or of a kind that is not understood.
        MissingPackageError: PyTorch is needed and not installed.
    """
    if isinstance(source, oir.Model):
        return source
    if isinstance(source, str | Path):
        return _load_file(Path(source), inputs, options)
    if type(source).__name__ == "ModelProto":
        from burnish.frontends import onnx_file

        try:
            data = source.SerializeToString()
        except Exception as error:
            hint = "save it with external data, and give the path"
            raise InputError(f"the model cannot be serialized: {error}", hint=hint) from error
        return onnx_file.read_bytes(data)
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(source, torch.nn.Module | torch.export.ExportedProgram):
        from burnish.frontends import torch_module

        return torch_module.trace(source, inputs, **options)
    hint = "give the path of an .onnx or .pt2 file, an onnx_ir.Model, an onnx.ModelProto, or a torch module"
    raise InputError(f"a `{type(source).__name__}` is not a model", hint=hint)


def _load_file(path: Path, inputs: Any, options: dict[str, Any]) -> oir.Model:
    suffix = path.suffix.lower()
    if suffix == ".pt2":
        from burnish.frontends import torch_module

        return torch_module.trace(torch_module.read_program(path), inputs, **options)
    for suffixes, hint in _OTHER_FORMATS.items():
        if suffix in suffixes and path.exists():
            raise InputError(f"`{suffix}` files are not read", place=str(path), hint=hint)
    from burnish.frontends import onnx_file

    return onnx_file.read(path)
