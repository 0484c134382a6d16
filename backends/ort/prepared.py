"""Models as ONNX Runtime optimizes them, in files: weights packed for its kernels, each kept once for all variants.

ONNX Runtime can write the packed copies that kernels make of weights into the external data of a model, and maps them
when that is loaded. The entries of a tensor say where: `prepacked_0: KEY|OFFSET;LENGTH;HASH|...`. Here
tensors whose weights and packed copies are those of another model refer to its file, so that sessions of all variants
map the same pages.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import onnx
import onnx_ir as oir

from burnish.backends.aside import put_right, temporary_folder
from burnish.backends.delta import manifest
from burnish.backends.delta.reading import Pack
from burnish.backends.ort.session import Level, OrtRunner, executor, from_path, runtime
from burnish.ir.errors import InputError

_INDEX, _PACKED, _ALIGNMENT = "prepared.json", "prepacked_", 4096


class Prepared:
    """A folder of prepared models.

    Args:
        folder: it is made; what another pack, processor or ONNX Runtime left there goes.
        pack: whose models they are.
        names: of the models, that most others share weights with first.
        read: gives a model by its name.
        threads, level: of the sessions.

    Raises:
        InputError: the folder holds other files, or cannot be written.
    """

    def __init__(
        self,
        folder: Path,
        pack: Pack,
        names: tuple[str, ...],
        read: Callable[[str], oir.Model],
        *,
        threads: int,
        level: Level,
    ) -> None:
        self._folder, self._names, self._read, self._threads, self._level = folder, names, read, threads, level
        key = {
            "pack": hashlib.sha256((pack.folder / manifest.MANIFEST).read_bytes()).hexdigest(),
            "onnxruntime": runtime().__version__,
            "processor": _processor(),
            "level": level,
        }
        self._index: dict[str, Any] = {"made_for": key, "models": [], "kept": {}}
        try:
            folder.mkdir(exist_ok=True)
            file = folder / _INDEX
            found = json.loads(file.read_text()) if file.is_file() else None
            if found is None and any(folder.iterdir()):
                raise InputError("the folder holds something else", place=str(folder), hint="name an empty one")
            if found is not None and found["made_for"] == key:
                self._index = found
            else:
                for name in [] if found is None else found["models"]:
                    if manifest.check_name(name) is not None:
                        raise ValueError(name)
                    for suffix in (".onnx", ".data"):
                        (folder / f"{name}{suffix}").unlink(missing_ok=True)
                self._save()
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise _unusable(folder, error) from error

    def load(self, name: str) -> OrtRunner:
        """A session of a model, which is prepared first where it is not yet.

        Raises:
            InputError: the folder cannot be written, or ONNX Runtime cannot load the model.
        """
        for one in (self._names[0], name):
            if one not in self._index["models"]:
                self._prepare(one)
        return from_path(self._folder / f"{name}.onnx", threads=self._threads, level="off")

    def _prepare(self, name: str) -> None:
        try:
            put_right(self._folder)
            with temporary_folder(self._folder) as folder:
                executor(threads=self._threads, level=self._level, written=folder / "whole.onnx")(
                    self._read(name)
                ).close()
                proto = onnx.load(folder / "whole.onnx", load_external_data=False)
                with open(folder / "data", "xb") as out:
                    for tensor in proto.graph.initializer:
                        if tensor.data_location == onnx.TensorProto.EXTERNAL:
                            self._take(tensor, folder, out, f"{name}.data")
                (folder / "onnx").write_bytes(proto.SerializeToString(deterministic=True))
                os.replace(folder / "data", self._folder / f"{name}.data")
                os.replace(folder / "onnx", self._folder / f"{name}.onnx")
            self._index["models"].append(name)
            self._save()
        except OSError as error:
            raise _unusable(self._folder, error) from error

    def _take(self, tensor: onnx.TensorProto, folder: Path, out: BinaryIO, name: str) -> None:
        """Refer to where a weight and its packed copies are; put them into `out` where no file has them yet."""
        entries = {entry.key: entry.value for entry in tensor.external_data}
        packed = {key: value.split("|") for key, value in entries.items() if key.startswith(_PACKED)}
        spans = [(int(entries.get("offset", "0")), int(entries["length"]))]
        for _, *copies in packed.values():
            spans += [(int(offset), int(length)) for offset, length, *_ in (one.split(";") for one in copies)]
        digest = hashlib.sha256(repr([[length for _, length in spans], [one[0] for one in packed.values()]]).encode())
        with open(folder / entries["location"], "rb") as stream:
            blocks = [_read(stream, *span) for span in spans]
        for block in blocks:
            digest.update(block)
        places = self._index["kept"].get(digest.hexdigest())
        if places is None:
            starts = []
            for block in blocks:
                out.write(b"\0" * (-out.tell() % _ALIGNMENT))
                starts.append(out.tell())
                out.write(block)
            places = self._index["kept"][digest.hexdigest()] = [name, *starts]
        location, *starts = places
        entries |= {"location": location, "offset": str(starts.pop(0))}
        for key, (what, *copies) in packed.items():
            moved = [";".join([str(starts.pop(0)), *one.split(";")[1:]]) for one in copies]
            entries[key] = "|".join([what, *moved])
        del tensor.external_data[:]
        for key, value in entries.items():
            tensor.external_data.add(key=key, value=value)

    def _save(self) -> None:
        partial = self._folder / f"{_INDEX}.partial"
        partial.write_text(json.dumps(self._index))
        os.replace(partial, self._folder / _INDEX)


def _read(stream: BinaryIO, offset: int, length: int) -> bytes:
    stream.seek(offset)
    return stream.read(length)


def _processor() -> str:
    """What packed weights depend on: the instructions that the processor has."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return f"{platform.machine()} {platform.processor()}"
    kinds = ("model name", "flags", "Features", "CPU part")
    said = sorted({line for line in lines if line.startswith(kinds)})
    return hashlib.sha256("\n".join([platform.machine(), *said]).encode()).hexdigest()


def _unusable(folder: Path, error: Exception) -> InputError:
    reason = getattr(error, "strerror", None) or "its index is not understood"
    hint = "name another folder, or remove this one"
    return InputError(f"prepared models cannot be kept there: {reason}", place=str(folder), hint=hint)
