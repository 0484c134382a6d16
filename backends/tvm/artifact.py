"""The folder that compiled models are written to: what it holds, writing it whole or not at all, and checking it."""

from __future__ import annotations

import contextlib
import os
import stat
from collections.abc import Iterable, Iterator
from hashlib import sha256
from pathlib import Path
from typing import Literal

import msgspec

from burnish.backends import folders
from burnish.ir.errors import InputError

FORMAT = "burnish-artefact"
VERSION = 1
MANIFEST, CODE, WEIGHTS, RECORDS = "manifest.json", "code.so", "weights.safetensors", "records"
_AGAIN = "write the artefact again with `optimize`"
_LARGEST_MANIFEST = 1 << 28


class _Part(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """What the manifest is made of: unknown fields are refused."""


class Port(_Part, frozen=True):
    """An input or output: `shape` has numbers, names of dynamic sizes, and None for sizes that depend on data.

    `dtype` is NumPy's name. `lowest` and `highest` bound what an input of indices may hold (`index_bounds`); None where
    nothing does.
    """

    name: str
    dtype: str
    shape: tuple[int | str | None, ...]
    lowest: int | None = None
    highest: int | None = None


class Evidence(_Part, frozen=True):
    """What a part of the model was measured to be, beside the same part in ONNX Runtime.

    Attributes:
        error: the largest relative error of an output; None where the code was not run.
        allowed: what the error was held to.
        output, sample: where the error was found.
        samples: how many were compared.
        ratio: time of a run over ONNX Runtime's; None where it was not measured.
        low, high: the 95 % interval of the ratio.
        rounds: paired rounds of the timing.
        timed: the sample that was timed.
        note: what is not known, and why; why the part stays where it is.
        date: the day it was measured on, `2026-11-26`, where that was in an earlier run for the same; else empty.
    """

    error: float | None = None
    allowed: float | None = None
    output: str = ""
    sample: str = ""
    samples: int = 0
    ratio: float | None = None
    low: float | None = None
    high: float | None = None
    rounds: int = 0
    timed: str = ""
    note: str = ""
    date: str = ""


class Step(_Part, frozen=True):
    """One part of the model, run after those before it.

    Attributes:
        kind: `tvm`: a function of the library; `ort`: a model for ONNX Runtime; `kernels`: a library that needs no TVM.
        inputs, outputs: names of values: of the model's inputs, or of outputs of earlier steps.
        function: the name of the function.
        weights: the names of its weights, which it takes behind its inputs.
        file: the model, or the library.
        nodes: how many nodes of the optimized model it stands for.
    """

    kind: Literal["tvm", "ort", "kernels"]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    function: str = ""
    weights: tuple[str, ...] = ()
    file: str = ""
    nodes: int = 0
    evidence: Evidence = Evidence()


class File(_Part, frozen=True):
    """A file of the folder: its path in it with `/`, its SHA-256 in hexadecimal and its size in bytes."""

    path: str
    sha256: str
    bytes: int


class Manifest(_Part, frozen=True):
    """What the folder holds.

    Attributes:
        target: what the code is for, `llvm:znver4`.
        versions: of `burnish`, `apache-tvm` and `apache-tvm-ffi`.
        fingerprint: SHA-256 of the model that was read; empty for one in memory.
        verified: whether the whole artefact was loaded and gave what the original gives; None when it was not run.
        whole: what the whole of it was measured to be.
        tuned: how many kernels have a tuned schedule; all others have a plain one.
        kernels: how many kernels there are.
        extensions: of the processor that the code may use (`processor.extensions`).
        recipe: the passes that the model went through.
    """

    target: str
    versions: dict[str, str]
    fingerprint: str
    inputs: tuple[Port, ...]
    outputs: tuple[Port, ...]
    steps: tuple[Step, ...]
    files: tuple[File, ...] = ()
    verified: bool | None = None
    whole: Evidence = Evidence()
    tuned: int = 0
    kernels: int = 0
    extensions: tuple[str, ...] = ()
    recipe: tuple[str, ...] = ()
    format: str = FORMAT
    version: int = VERSION


class Staged(folders.Staged):
    """An artefact that is being written."""

    def seal(self, manifest: Manifest) -> Manifest:
        """Write the manifest of all files that are there, and see to it that they are on the disk.

        Raises:
            InputError: the disk is full or closed.
        """
        try:
            files = []
            for one in sorted(one for one in self.path.rglob("*") if one.is_file() and one.name != MANIFEST):
                files.append(File(one.relative_to(self.path).as_posix(), _digest(one), one.stat().st_size))
                folders.sync(one)
            manifest = msgspec.structs.replace(manifest, files=tuple(files))
            content = msgspec.json.format(_encode(manifest), indent=1) + b"\n"
            (self.path / MANIFEST).write_bytes(content)
            folders.sync(self.path / MANIFEST)
            folders.sync(self.path)
        except OSError as error:
            raise write_error(error, self.target) from error
        return manifest

    def commit(self) -> list[Path]:
        """As `folders.Staged.commit`; the manifest comes first, then the other files."""
        files = super().commit()
        return [self.target / MANIFEST, *(one for one in files if one.name != MANIFEST)]


@contextlib.contextmanager
def staged(path: str | os.PathLike[str]) -> Iterator[Staged]:
    """A folder to write an artefact into: fill `.path`, `seal` it, check it, then `commit` gives it its name.

    Raises:
        InputError: the target cannot be written, or is something else than an artefact.
    """
    with folders.staged(path, _KIND) as one:
        yield Staged(one.path, one.target, one.kind)


def check_target(target: Path, *sources: Path) -> None:
    """Check, before any work is done, that an artefact can be written there; see `folders.check_target`."""
    folders.check_target(target, _KIND, *sources)


def write_error(error: OSError, target: Path) -> InputError:
    """A failure of the disk as an error of ours."""
    return folders.write_error(error, target, _KIND)


def _holds(folder: Path) -> set[str]:
    return {MANIFEST, *(one.path for one in _decode(folder).files)}


_KIND = folders.Kind("an artefact", "a compiled model is a folder", _holds)


def read(path: str | os.PathLike[str], versions: dict[str, str]) -> Manifest:
    """The manifest of a folder that can be run here, with every file but the weights compared with its hash.

    The weights are compared when they are read, in one go. Nothing is run.

    Args:
        path: the folder.
        versions: the installed versions of TVM's wheels, which have to be those that it was written with.

    Raises:
        InputError: it is no artefact, it is damaged, or it was written by other versions.
    """
    folder = Path(path)
    if not folder.is_dir():
        raise InputError("there is no such folder", place=str(folder), hint="give the folder that `optimize` wrote")
    manifest = _decode(folder)
    for name, version in versions.items():
        written = manifest.versions.get(name)
        if written != version:
            raise InputError(
                f"it was compiled with {name} {written or 'of an unknown version'}, and {version} is installed",
                place=str(folder),
                hint=_AGAIN,
            )
    listed = {one.path: one for one in manifest.files}
    needed = [CODE] * any(one.kind == "tvm" for one in manifest.steps)
    needed += [one.file for one in manifest.steps if one.kind != "tvm"]
    needed += [WEIGHTS] * any(one.weights for one in manifest.steps)
    for name in needed:
        if name not in listed:
            raise InputError(f"the manifest does not list `{name}`", place=str(folder), hint=_AGAIN)
    _check_chain(folder, manifest)
    for one in manifest.files:
        file = _inside(folder, one)
        if file.stat().st_size != one.bytes:
            raise damaged(file, f"it has {file.stat().st_size} bytes in place of {one.bytes}")
        if one.path != WEIGHTS and _digest(file) != one.sha256:
            raise damaged(file, "its SHA-256 is not that of the manifest")
    return manifest


def _check_chain(folder: Path, manifest: Manifest) -> None:
    """Refuse a manifest whose steps, in order, do not lead from the inputs to the outputs."""
    known = {one.name for one in manifest.inputs}
    for step in manifest.steps:
        _check_known(folder, step.inputs, known)
        known.update(step.outputs)
    _check_known(folder, [one.name for one in manifest.outputs], known)


def _check_known(folder: Path, names: Iterable[str], known: set[str]) -> None:
    for name in names:
        if name not in known:
            raise InputError(f"nothing makes the value `{name}` before it is used", place=str(folder), hint=_AGAIN)


def damaged(file: Path, reason: str) -> InputError:
    """The error for a file that is not what was written."""
    return InputError(f"the file was changed after it was written: {reason}", place=str(file), hint=_AGAIN)


def _decode(folder: Path) -> Manifest:
    file = folder / MANIFEST
    try:
        if file.is_symlink() or file.stat().st_size > _LARGEST_MANIFEST:
            raise InputError("the manifest is no file of its own", place=str(file), hint=_AGAIN)
        head = msgspec.json.decode(file.read_bytes(), type=_Head)
        if head.format != FORMAT:
            raise InputError("this is no manifest of burnish", place=str(file), hint=_AGAIN)
        if head.version != VERSION:
            cause = f"the artefact has format {head.version}, and this burnish reads format {VERSION}"
            raise InputError(cause, place=str(file), hint=_AGAIN)
        return msgspec.json.decode(file.read_bytes(), type=Manifest)
    except FileNotFoundError:
        raise InputError(f"it is no artefact: there is no {MANIFEST} in it", place=str(folder)) from None
    except OSError as error:
        raise InputError(f"it cannot be read: {error.strerror}", place=str(file)) from None
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise InputError(f"the manifest cannot be read: {error}", place=str(file), hint=_AGAIN) from None


class _Head(msgspec.Struct):
    format: str = ""
    version: int = 0


def _encode(manifest: Manifest) -> bytes:
    fields = msgspec.to_builtins(manifest)
    head = {"format": FORMAT, "version": VERSION}
    return msgspec.json.encode(head | {"verified": manifest.verified} | fields)


def _inside(folder: Path, listed: File) -> Path:
    """The file, which has to be one of its own in the folder: no link, no way out."""
    parts = listed.path.split("/")
    if not all(parts) or any(part in (".", "..") or "\\" in part or "\0" in part for part in parts):
        raise InputError(f"the manifest lists `{listed.path}`, which leads out of the folder", place=str(folder))
    file = folder.joinpath(*parts)
    try:
        for part in (file, *file.parents[: len(parts) - 1]):
            if stat.S_ISLNK(part.lstat().st_mode):
                raise InputError("it is a link, and an artefact has none", place=str(part), hint=_AGAIN)
        if not stat.S_ISREG(file.lstat().st_mode):
            raise InputError("it is not a regular file", place=str(file), hint=_AGAIN)
    except OSError as error:
        raise InputError(f"a file of the artefact is missing: {error.strerror}", place=str(file), hint=_AGAIN) from None
    return file


def _digest(file: Path) -> str:
    found = sha256()
    with open(file, "rb") as stream:
        while block := stream.read(1 << 20):
            found.update(block)
    return found.hexdigest()
