"""What the manifest of a pack says, and all that is checked of it before anything is believed."""

from __future__ import annotations

import re
import stat
from math import prod
from pathlib import Path
from typing import Literal

import msgspec

from burnish.backends.delta import low_rank, planes
from burnish.backends.delta.rounded import Rounding
from burnish.ir.errors import InputError

FORMAT = "burnish-delta"
VERSION = 1
MANIFEST, BASE, CHANGES, GRAPHS = "manifest.json", "base.data", "changes.data", "graphs.data"
LARGEST_DICTIONARY = 26
"""Base-2 logarithm of the most bytes that unpacking graphs may keep at hand."""
AGAIN = "fetch the pack again, or write it again with `burnish delta`"
_LARGEST_MANIFEST = 1 << 28
_LARGEST_SIZE = 1 << 48
_NAME = re.compile(r"[\w.+@-]{1,128}")
_RESERVED = re.compile(r"(?i)(con|prn|aux|nul|com\d|lpt\d)(\..*)?")


class _Part(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """What the manifest is made of: unknown fields are refused."""


class Tensor(_Part, frozen=True):
    """The values of a tensor, stored once however many models have it.

    Attributes:
        sha256: of its bytes, in hexadecimal.
        bytes: how many it has.
        name: of the first tensor that has these values.
        dtype: NumPy's name, `uint8` for packed numbers and what NumPy does not know.
        dims: its shape.
        coding: `base`: as it is, in the base; `whole`: its own numbers; `change`: their difference, as integers, to the
            tensor `of`; `low-rank`: factors of that difference, and what they do not explain; `rounded`: the numbers of
            few bits that `of` was rounded to, as what rounding with the scales `by` does not explain.
        of: the index of a tensor of the base.
        at, stored: where in `base.data` or `changes.data` it lies, and how many bytes it has there.
        rank, scale: of `low_rank.Factors`.
        by: the index of a tensor of scales.
        bits, zero, turned, columns: of `rounded.Rounding`.
    """

    sha256: str
    bytes: int
    name: str
    dtype: str
    dims: tuple[int, ...]
    coding: Literal["base", "whole", "change", "low-rank", "rounded"]
    at: int
    stored: int
    of: int = -1
    rank: int = 0
    scale: int = 0
    by: int = -1
    bits: int = 0
    zero: int = 0
    turned: bool = False
    columns: bool = False

    @property
    def rounding(self) -> Rounding:
        """How it was made, of a rounded one."""
        return Rounding(self.bits, self.zero, self.turned, self.columns)


class File(_Part, frozen=True):
    """A file of a model.

    Attributes:
        path: where it lies beside the model, with `/`; of the model itself its name.
        sha256: of its bytes, in hexadecimal.
        bytes: how many it has.
        graph: SHA-256 of its bytes that are no tensors.
        pieces: what it is made of: so many bytes of `graphs.data`, the index of a tensor, bytes, a tensor, ..., bytes.
    """

    path: str
    sha256: str
    graph: str
    bytes: int
    pieces: tuple[int, ...]


class Model(_Part, frozen=True):
    """A model: the `.onnx` file first, then its external data.

    `skip` is the number of bytes that come before its own in the unpacked `graphs.data`.
    """

    name: str
    files: tuple[File, ...]
    skip: int


class Manifest(_Part, frozen=True):
    """What the pack holds.

    Attributes:
        tensors: all that differ.
        base: the model that the variants are variants of.
        variants: in the order in which they were given.
        has_base: whether `base.data` is there; without it the base has to be given to rebuild a variant.
        dictionary: base-2 logarithm of the bytes that unpacking `graphs.data` keeps at hand.
        sizes: bytes of the other files, by name.
    """

    tensors: tuple[Tensor, ...]
    base: Model
    variants: tuple[Model, ...]
    has_base: bool
    dictionary: int
    sizes: dict[str, int]
    format: str = FORMAT
    version: int = VERSION

    def model(self, name: str, place: str) -> Model:
        """The model of this name. Raises InputError when there is none."""
        for one in (*([self.base] if self.has_base else []), *self.variants):
            if one.name == name:
                return one
        known = ", ".join(f"`{one.name}`" for one in self.variants)
        if name == self.base.name:
            raise InputError(f"the base `{name}` is not in the pack", place=place, hint=f"its variants are {known}")
        raise InputError(f"there is no `{name}` in the pack", place=place, hint=f"its variants are {known}")

    def used(self, model: Model) -> list[int]:
        """The indices of the tensors of a model, in the order of its files, each once."""
        return list(dict.fromkeys(index for file in model.files for index in file.pieces[1::2]))


class _Head(msgspec.Struct):
    format: str = ""
    version: int = 0


def encode(manifest: Manifest) -> bytes:
    """The bytes of `manifest.json`."""
    head = {"format": FORMAT, "version": VERSION}
    return msgspec.json.encode(head | msgspec.to_builtins(manifest)) + b"\n"


def read(folder: Path) -> Manifest:
    """The manifest of a pack, all numbers and names in it checked, and the sizes of its files.

    Raises:
        InputError: it is no pack, or one that cannot be as it says.
    """
    if not folder.is_dir():
        raise InputError("there is no such folder", place=str(folder), hint="give a folder that `burnish delta` wrote")
    file = folder / MANIFEST
    try:
        if file.is_symlink() or not file.is_file():
            raise InputError(f"it is no pack: there is no {MANIFEST} in it", place=str(folder))
        if file.stat().st_size > _LARGEST_MANIFEST:
            raise InputError("the manifest is too large", place=str(file), hint=AGAIN)
        content = file.read_bytes()
        head = msgspec.json.decode(content, type=_Head)
        if head.format != FORMAT:
            raise InputError("this is no manifest of a pack", place=str(file), hint=AGAIN)
        if head.version != VERSION:
            cause = f"the pack has format {head.version}, and this burnish reads format {VERSION}"
            raise InputError(cause, place=str(file), hint="write it again, or use the burnish that wrote it")
        manifest = msgspec.json.decode(content, type=Manifest)
    except OSError as error:
        raise InputError(f"it cannot be read: {error.strerror}", place=str(file)) from None
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise InputError(f"the manifest cannot be read: {error}", place=str(file), hint=AGAIN) from None
    reason = _wrong(manifest)
    if reason is not None:
        raise InputError(f"the manifest is damaged: {reason}", place=str(file), hint=AGAIN)
    for name in (CHANGES, GRAPHS, *([BASE] if manifest.has_base else [])):
        _check_file(folder / name, manifest.sizes[name])
    return manifest


def check_name(name: str) -> str | None:
    """Why a variant cannot have this name; None when it can."""
    if not _NAME.fullmatch(name) or name in (".", "..") or name.startswith("-"):
        return "a name has letters, digits, `.`, `_`, `+`, `@` and `-` only"
    return None


def check_path(path: str) -> str | None:
    """Why a file of a model cannot have this path, from the model's folder on; None when it can."""
    parts = path.split("/")
    if not all(parts) or any(part in (".", "..") or "\\" in part or ":" in part for part in parts):
        return "it leads out of the folder"
    if not path.isprintable() or len(path.encode(errors="replace")) > 1024:
        return "it has characters that cannot be shown"
    if any(_RESERVED.fullmatch(part) for part in parts) or any(part.startswith(".burnish-") for part in parts):
        return "it has a reserved name"
    return None


def _wrong(manifest: Manifest) -> str | None:
    """What cannot be in a manifest; None when all is well."""
    expected = {CHANGES, GRAPHS, *([BASE] if manifest.has_base else [])}
    if set(manifest.sizes) != expected or not all(0 <= size < _LARGEST_SIZE for size in manifest.sizes.values()):
        return "the sizes of its files are not those of a pack"
    if not 12 <= manifest.dictionary <= LARGEST_DICTIONARY:
        return "the dictionary of its graphs is too large"
    for index, tensor in enumerate(manifest.tensors):
        reason = _wrong_tensor(manifest, tensor)
        if reason is not None:
            return f"tensor {index}: {reason}"
    names = set()
    for model in (manifest.base, *manifest.variants):
        reason = check_name(model.name) or _wrong_model(manifest, model)
        if reason is None and model.name in names:
            reason = "another has that name"
        if reason is not None:
            return f"{model.name[:80]!r}: {reason}"
        names.add(model.name)
    return None


def _wrong_tensor(manifest: Manifest, tensor: Tensor) -> str | None:
    if not _is_digest(tensor.sha256) or not 0 <= tensor.bytes < _LARGEST_SIZE:
        return "it has no digest or no size"
    width = width_of(tensor.dtype)
    if width is None or tensor.bytes % width:
        return "it has an unknown dtype, or a part of a number"
    held = BASE if tensor.coding == "base" else CHANGES
    if held == BASE and not manifest.has_base:
        return None
    if tensor.at < 0 or tensor.stored < 0 or tensor.at + tensor.stored > manifest.sizes[held]:
        return f"it lies outside of {held}"
    if tensor.coding == "base" and tensor.stored != tensor.bytes:
        return "it has another size in the base"
    if tensor.coding in ("change", "low-rank"):
        if not 0 <= tensor.of < len(manifest.tensors):
            return "what it is a change of is not there"
        other = manifest.tensors[tensor.of]
        if other.coding != "base" or (other.bytes, other.dtype) != (tensor.bytes, tensor.dtype):
            return "what it is a change of is another kind of tensor"
    if tensor.coding == "rounded" and not _may_be_rounded(manifest, tensor):
        return "it cannot have been rounded like that"
    if tensor.coding == "low-rank":
        shape = matrix(tensor)
        if shape is None or not 0 < tensor.rank <= min(low_rank.LARGEST_RANK, *shape) or abs(tensor.scale) > 1000:
            return "it cannot have factors of that rank"
    return None


def _may_be_rounded(manifest: Manifest, tensor: Tensor) -> bool:
    count = len(manifest.tensors)
    if not (0 <= tensor.of < count and 0 <= tensor.by < count and abs(tensor.zero) <= 256):
        return False
    if (tensor.bits, tensor.dtype) not in ((8, "uint8"), (8, "int8"), (4, "uint8")):
        return False
    base, scales = manifest.tensors[tensor.of], manifest.tensors[tensor.by]
    if base.coding != "base" or scales.coding == "rounded" or not {base.dtype, scales.dtype} <= planes.MANTISSA.keys():
        return False
    size, few = (one.bytes // (width_of(one.dtype) or 1) for one in (base, scales))
    if size != tensor.bytes * 8 // tensor.bits or not few or size % few:
        return False
    return not tensor.turned or (
        min(base.dims, default=0) > 0 and prod(base.dims) == size and 2 * base.dims[0] <= planes.BLOCK
    )


def _wrong_model(manifest: Manifest, model: Model) -> str | None:
    if not model.files or "/" in model.files[0].path or not 0 <= model.skip < _LARGEST_SIZE:
        return "it has no files"
    paths = set()
    for file in model.files:
        reason = check_path(file.path)
        if reason is None and file.path.lower() in paths:
            reason = "another file has that path"
        if reason is None and (not _is_digest(file.sha256) or not _is_digest(file.graph) or len(file.pieces) % 2 == 0):
            reason = "it has no digest or no pieces"
        if reason is None:
            lengths, indices = file.pieces[::2], file.pieces[1::2]
            if any(length < 0 for length in lengths) or any(not 0 <= i < len(manifest.tensors) for i in indices):
                reason = "its pieces are not there"
            elif sum(lengths) + sum(manifest.tensors[i].bytes for i in indices) != file.bytes:
                reason = "its pieces are not what it is made of"
        if reason is not None:
            return f"the file {file.path[:80]!r}: {reason}"
        paths.add(file.path.lower())
    return None


def matrix(tensor: Tensor) -> tuple[int, int] | None:
    """Rows and columns of a tensor that may be a base and a product of factors; None for others."""
    if tensor.dtype not in low_rank.DTYPES or len(tensor.dims) < 2 or min(tensor.dims) < 1:
        return None
    rows, columns = tensor.dims[0], prod(tensor.dims[1:])
    fits = rows * columns * (width_of(tensor.dtype) or 0) == tensor.bytes and columns <= planes.BLOCK
    return (rows, columns) if fits else None


def width_of(dtype: str) -> int | None:
    """Bytes of a number; None for a dtype that there is not."""
    found = re.fullmatch(r"(?:bfloat|float|uint|int)(8|16|32|64)", dtype)
    return int(found[1]) // 8 if found else None


def _is_digest(text: str) -> bool:
    return re.fullmatch(r"[0-9a-f]{64}", text) is not None


def _check_file(file: Path, size: int) -> None:
    try:
        kind = file.lstat()
    except OSError as error:
        raise InputError(f"a file of the pack is missing: {error.strerror}", place=str(file), hint=AGAIN) from None
    if not stat.S_ISREG(kind.st_mode):
        raise InputError("it is not a file of its own", place=str(file), hint=AGAIN)
    if kind.st_size != size:
        raise InputError(f"it has {kind.st_size} bytes in place of {size}", place=str(file), hint=AGAIN)
