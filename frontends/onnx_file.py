"""Read .onnx files that may be large, odd or hostile."""

from __future__ import annotations

import hashlib
import mmap
import os
import stat
import warnings
from pathlib import Path, PureWindowsPath

import onnx
import onnx_ir as oir
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]

from burnish.frontends import onnx_checks
from burnish.frontends.onnx_checks import quoted
from burnish.ir import origin, wire
from burnish.ir.errors import BurnishError, InputError
from burnish.ir.walk import graphs, walk

_NOT_A_MODEL = (
    (b"PK\x03\x04", "a zip archive", "a PyTorch checkpoint holds no graph: load the module, pass it with its inputs"),
    (b"\x80", "a Python pickle", "a pickle is never opened: load the module yourself and pass it with its inputs"),
    (b"\x89HDF", "an HDF5 file", "export the Keras model with tf2onnx or keras.Model.export(format='onnx')"),
    (b"version https://git-lfs", "a Git LFS pointer", "fetch the file itself with `git lfs pull`"),
    (b"\x1f\x8b", "a gzip archive", "unpack it first"),
    (b"<", "an HTML or XML page", "download the file itself, not the page about it"),
    (b"{", "a JSON file", "give the .onnx file"),
)
_DAMAGED = "the file is damaged or was not downloaded whole; fetch or export it again"


def read(path: str | os.PathLike[str]) -> oir.Model:
    """Read an .onnx file; its weights stay on disk, memory-mapped, until somebody asks for one.

    The model remembers the files it depends on and what was mended (`burnish.ir.origin`). Nodes are
    sorted when the file has them out of order; declared shapes that contradict the operators are dropped.

    Args:
        path: the file; external data are looked for beside it, and must lie in its folder.

    Raises:
        InputError: for anything that is not a valid model, whatever its bytes.
    """
    file = Path(path)
    return _guarded(opened(file), str(file), file)


def read_bytes(data: bytes) -> oir.Model:
    """The model in a serialized ModelProto without external data; see `read`."""
    return _guarded(data, "model in memory", None)


def _guarded(buffer: wire.Buffer, place: str, file: Path | None) -> oir.Model:
    try:
        return _read(buffer, place, file)
    except BurnishError:
        raise
    except Exception as error:  # the libraries raise whatever they like on damaged bytes
        last: BaseException = error
        while last.__cause__ is not None:
            last = last.__cause__
        lines = str(last).strip().splitlines() or [type(last).__name__]
        cause = f"the model cannot be understood: {quoted(lines[0])[1:-1]}"
        raise InputError(cause, place=place, hint=_DAMAGED) from error


def fingerprint(path: str | os.PathLike[str]) -> str:
    """SHA-256 of a model: what `sha256sum FILE` prints, or with external data of what it prints for all the files.

    With external data it is the digest of the lines of `sha256sum model.onnx data...`, run in the model's folder, the
    data files in alphabetical order.

    Raises:
        InputError: the file is no model, or its data files cannot be read.
    """
    file = Path(path)
    buffer = opened(file)
    proto, _ = parsed(buffer, str(file))
    places = {_entries(tensor).get("location", "") for tensor, _ in onnx_checks.check_tensors(proto, str(file))} - {
        wire.INLINE
    }
    files = [file, *(data_file(file, location, str(file)) for location in sorted(places))]
    digests = []
    for name in files:
        with open(name, "rb") as stream:
            digests.append(hashlib.file_digest(stream, "sha256").hexdigest())
    if not places:
        return digests[0]
    names = [file.name, *sorted(places)]
    lines = "".join(f"{digest}  {name}\n" for digest, name in zip(digests, names, strict=True))
    return hashlib.sha256(lines.encode()).hexdigest()


def opened(file: Path) -> mmap.mmap:
    """A model file, mapped. Raises InputError for what is no regular file, cannot be read, or is of another kind."""
    place = str(file)
    try:
        with open(file, "rb", opener=lambda name, flags: os.open(name, flags | getattr(os, "O_NONBLOCK", 0))) as stream:
            kind = os.fstat(stream.fileno())
            if not stat.S_ISREG(kind.st_mode):
                raise InputError("this is not a regular file", place=place, hint="give the path of an .onnx file")
            if kind.st_size == 0:
                raise InputError("the file is empty", place=place, hint=_DAMAGED)
            buffer = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)
    except IsADirectoryError:
        inside = sorted(name.name for name in file.glob("*.onnx"))[:3]
        hint = f"give a file in it, such as {', '.join(inside)}" if inside else "give the path of an .onnx file"
        raise InputError("this is a folder", place=place, hint=hint) from None
    except FileNotFoundError:
        raise InputError("there is no such file", place=place, hint="check the path") from None
    except (OSError, ValueError) as error:
        cause = f"the file cannot be read: {getattr(error, 'strerror', None) or error}"
        raise InputError(cause, place=place, hint="check its permissions") from None
    for start, name, hint in _NOT_A_MODEL:
        if buffer[: len(start)] == start:
            raise InputError(f"this is {name}, not an ONNX model", place=place, hint=hint)
    return buffer


def parsed(buffer: wire.Buffer, place: str) -> tuple[onnx.ModelProto, set[tuple[int, int]]]:
    """A model without its large weights, and where these lie (`wire.weightless`). Raises InputError for no model."""
    try:
        data, spans = wire.weightless(buffer)
        proto = onnx.ModelProto.FromString(data)
    except (wire.WireError, DecodeError) as error:
        cause = "this is not an ONNX model, or only a part of one"
        detail = f": {error}" if isinstance(error, wire.WireError) else ""
        raise InputError(cause + detail, place=place, hint=_DAMAGED) from None
    return proto, spans


def _read(buffer: wire.Buffer, place: str, file: Path | None) -> oir.Model:
    proto, spans = parsed(buffer, place)
    onnx_checks.check_text(proto, place)
    onnx_checks.check_versions(proto, place)
    sorted_nodes = onnx_checks.check_structure(proto, place)
    data_files: dict[str, Path] = {}
    for tensor, where in onnx_checks.check_tensors(proto, place):
        _check_external(file, tensor, where, spans, data_files)
    notes = ["the training information was dropped"] if proto.training_info else []
    raised = onnx_checks.raised(proto, lambda: onnx.ModelProto.FromString(bytes(buffer)), place)
    if raised is not None:
        notes.append("the model was of an opset before 7, and was raised to opset 9")
        buffer = raised.SerializeToString()
        proto, spans = parsed(buffer, place)
        sorted_nodes = onnx_checks.check_structure(proto, place)
    if onnx_checks.add_opset(proto):
        notes.append("the model did not say which version of com.microsoft it uses, and was given 1")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about external-data entries that onnx does not know
        model = oir.from_proto(proto)
    _bind_weights(model, file, buffer, data_files)
    _correct_shapes(model, onnx_checks.check_types(proto, place), notes)
    if not sorted_nodes:
        model.graph.sort()
        for function in model.functions.values():
            function.sort()
        notes.append("the nodes were not in an order in which they can run, and were sorted")
    origin.record(model, () if file is None else (file.absolute(), *data_files.values()), notes)
    return model


def _entries(tensor: onnx.TensorProto) -> dict[str, str]:
    return {entry.key: entry.value for entry in tensor.external_data}


def _check_external(
    file: Path | None, tensor: onnx.TensorProto, place: str, spans: set[tuple[int, int]], data_files: dict[str, Path]
) -> None:
    entries = _entries(tensor)
    try:
        offset, length = int(entries.get("offset", "0")), int(entries.get("length", "0"))
    except ValueError:
        raise InputError("the offset or length of the external data is no number", place=place, hint=_DAMAGED) from None
    needed = onnx_checks.tensor_bytes(tensor, place)
    if tensor.data_type == onnx.TensorProto.STRING or offset < 0 or length not in (0, needed):
        cause = f"the external data have {length} bytes at {offset}, the dims need {needed}"
        if (offset, length) in spans:
            cause = f"a tensor holds {length} bytes, its dims need {needed}"
        raise InputError(cause, place=place, hint=_DAMAGED)
    location = entries.get("location", "")
    if location == wire.INLINE and (offset, length) in spans:
        return
    if file is None:
        raise InputError(
            "a model in memory has no folder to read external data from", place=place, hint="give its path"
        )
    if location not in data_files:
        data_files[location] = data_file(file, location, place)
    size = data_files[location].stat().st_size
    if offset + needed > size:
        cause = f"the external data end at byte {offset + needed}, but {quoted(location)} has only {size} bytes"
        raise InputError(cause, place=place, hint="the data file is not whole; fetch or export it again")


def data_file(file: Path, location: str, place: str) -> Path:
    """The real path of an external data file that lies in the model's folder and can be read."""
    folder = file.absolute().parent
    outside = "for safety, external data must lie in the folder of the model"
    if not location or "\0" in location:
        raise InputError("external data without a file name", place=place, hint=_DAMAGED)
    if os.path.isabs(location) or PureWindowsPath(location).is_absolute():
        raise InputError(f"the path of the external data, {quoted(location)}, is absolute", place=place, hint=outside)
    if ".." in Path(os.path.normpath(location)).parts:
        cause = f"the path of the external data, {quoted(location)}, climbs out of the model's folder"
        raise InputError(cause, place=place, hint=outside)
    real = Path(os.path.realpath(folder / location))
    # A model that is itself a link, as in a download cache, may have its data beside the file it points to.
    allowed = (Path(os.path.realpath(folder)), Path(os.path.realpath(file)).parent)
    if not any(real.is_relative_to(one) for one in allowed):
        cause = f"the external data {quoted(location)} are a link out of the model's folder"
        raise InputError(cause, place=place, hint=outside)
    try:
        with open(real, "rb", opener=lambda name, flags: os.open(name, flags | getattr(os, "O_NONBLOCK", 0))) as stream:
            regular = stat.S_ISREG(os.fstat(stream.fileno()).st_mode)
    except FileNotFoundError:
        cause = f"the external data file {quoted(location)} is missing"
        raise InputError(cause, place=place, hint=f"put it into the folder {folder}") from None
    except OSError as error:
        cause = f"the external data file {quoted(location)} cannot be read: {error.strerror}"
        raise InputError(cause, place=place, hint="check its permissions") from None
    if not regular:
        raise InputError(f"the external data {quoted(location)} are not a regular file", place=place, hint=_DAMAGED)
    return real


def _bind_weights(model: oir.Model, file: Path | None, buffer: wire.Buffer, data_files: dict[str, Path]) -> None:
    """Let every tensor that lies on disk know where, and take the type of initializers from their tensors."""

    folder = Path() if file is None else file.absolute().parent

    def bound(tensor: oir.TensorProtocol) -> oir.TensorProtocol:
        if not isinstance(tensor, oir.ExternalTensor):
            return tensor
        if tensor.location == wire.INLINE:
            return wire.mapped(buffer, tensor)
        real = data_files[os.fspath(tensor.location)]
        if folder / tensor.location == real and real.stat().st_nlink == 1:
            tensor.base_dir = folder
            return tensor
        # onnx_ir refuses links of every kind; where this one leads has been checked.
        linked = oir.ExternalTensor(
            real, tensor.offset, tensor.length, tensor.dtype, shape=tensor.shape, name=tensor.name
        )
        linked.metadata_props.update(tensor.metadata_props)
        return linked

    for graph in graphs(model):
        for value in graph.initializers.values():
            tensor = value.const_value
            if tensor is None:
                continue
            value.const_value = bound(tensor)
            if not value.is_graph_input():
                value.type, value.shape = oir.TensorType(tensor.dtype), oir.Shape(tensor.shape.numpy())
    for node in walk(model):
        for name, attribute in list(node.attributes.items()):
            if attribute.type == oir.AttributeType.TENSOR and isinstance(attribute.value, oir.ExternalTensor):
                array = bound(attribute.value).numpy().copy()
                node.attributes[name] = oir.AttrTensor(name, oir.tensor(array, dtype=attribute.value.dtype))


def _correct_shapes(model: oir.Model, inferred: list[tuple[str, onnx.TypeProto]], notes: list[str]) -> None:
    """Replace declared shapes that contradict the inferred ones."""
    values = {output.name: output for node in model.graph for output in node.outputs}
    for name, kind in inferred:
        value = values.get(name)
        if value is None or value.shape is None or not kind.tensor_type.HasField("shape"):
            continue
        dims = [dim.dim_value if dim.HasField("dim_value") else None for dim in kind.tensor_type.shape.dim]
        said = [dim if isinstance(dim, int) else None for dim in value.shape]
        if len(dims) != len(said) or any(a != b for a, b in zip(dims, said, strict=True) if None not in (a, b)):
            notes.append(f"the declared shape {value.shape} of {quoted(name)} is not what the operators give: dropped")
            value.shape = oir.Shape([_dim(dim) for dim in kind.tensor_type.shape.dim])


def _dim(dim: onnx.TensorShapeProto.Dimension) -> int | str | None:
    return dim.dim_value if dim.HasField("dim_value") else dim.dim_param or None
