"""The files of a model as they lie on disk, and where in them the values of its tensors are."""

from __future__ import annotations

import dataclasses
import mmap
import os
from pathlib import Path

from burnish.frontends import onnx_checks, onnx_file
from burnish.ir import payloads, wire
from burnish.ir.errors import InputError
from burnish.ir.payloads import Payload, StoredFile


def read(path: str | os.PathLike[str]) -> list[StoredFile]:
    """The model file first, then its external data files by name. All are mapped, none is read.

    Args:
        path: an `.onnx` file; external data are looked for as `onnx_file.read` does.

    Raises:
        InputError: it is no model, or its data files are missing, too short or outside its folder.
    """
    file = Path(path)
    place = str(file)
    buffer = onnx_file.opened(file)
    proto, _ = onnx_file.parsed(buffer, place)
    onnx_checks.check_versions(proto, place)
    needed: dict[tuple[str, str], int] = {}
    places: dict[str, Path] = {}
    for tensor, where in onnx_checks.check_tensors(proto, place):
        entries = {entry.key: entry.value for entry in tensor.external_data}
        location = entries.get("location", "")
        if location == wire.INLINE:
            continue
        if location not in places:
            places[location] = onnx_file.data_file(file, location, where)
        needed[location, tensor.name] = onnx_checks.tensor_bytes(tensor, where)
        _check_span(entries, needed[location, tensor.name], places[location], where)
    found = payloads.find(buffer)
    files = [StoredFile(file.name, buffer, payloads.apart(found.inside, len(buffer)))]
    contents = {location: _mapped(real) for location, real in places.items()}
    spans: dict[str, list[Payload]] = {}
    for location, some in found.outside.items():
        written = _spelled(location, place)
        spans.setdefault(written, []).extend(
            dataclasses.replace(one, length=needed.get((location, one.name), one.length)) for one in some
        )
    for location, written in sorted((one, _spelled(one, place)) for one in contents):
        if written not in (one.path for one in files):
            content = contents[location]
            files.append(StoredFile(written, content, payloads.apart(spans.get(written, []), len(content))))
    return files


def _spelled(location: str, place: str) -> str:
    """A location as a path with `/`, without `.` in it."""
    written = os.path.normpath(location).replace(os.sep, "/")
    if "\\" in written:
        hint = "export the model again, with another name for its data"
        raise InputError("a name of external data holds `\\`, which is a separator elsewhere", place=place, hint=hint)
    return written


def _check_span(entries: dict[str, str], needed: int, file: Path, place: str) -> None:
    hint = "the data file is not whole; fetch or export it again"
    try:
        offset, length = int(entries.get("offset", "0")), int(entries.get("length", "0"))
    except ValueError:
        raise InputError("the offset or length of the external data is no number", place=place, hint=hint) from None
    size = file.stat().st_size
    if offset < 0 or length not in (0, needed) or offset + needed > size:
        cause = f"the external data have {length} bytes at {offset}, the dims need {needed}, the file has {size}"
        raise InputError(cause, place=place, hint=hint)


def _mapped(file: Path) -> mmap.mmap | bytes:
    with open(file, "rb") as stream:
        if not os.fstat(stream.fileno()).st_size:
            return b""
        return mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)
