"""Read a pack: tensors by index, models as the bytes of their files, all with the digests of what was packed."""

from __future__ import annotations

import lzma
import mmap
import os
from collections.abc import Iterator, Sequence
from hashlib import sha256
from io import BytesIO
from pathlib import Path

import numpy as np

from burnish.backends.delta import low_rank, manifest, planes, rounded
from burnish.backends.delta.manifest import File, Model, Tensor
from burnish.ir.errors import InputError
from burnish.ir.payloads import Payload, StoredFile

Bytes = bytes | memoryview
_PIECE = 1 << 22
_FED = 1 << 16


class Pack:
    """An opened pack.

    Args:
        path: the folder.
        base: the files of the base, for a pack without them. Its tensors are found by what they hold.

    Raises:
        InputError: it is no pack, or the base is another one: the error names a tensor that is missing.
    """

    def __init__(self, path: str | os.PathLike[str], base: Sequence[StoredFile] | None = None) -> None:
        self.folder = Path(path)
        self.manifest = manifest.read(self.folder)
        self._changes = _mapped(self.folder / manifest.CHANGES)
        self._packed = _mapped(self.folder / manifest.GRAPHS)
        self._base = _mapped(self.folder / manifest.BASE) if self.manifest.has_base else memoryview(b"")
        self._given: dict[str, memoryview] = {}
        if base is not None and not self.manifest.has_base:
            self._given = {key: values for _, values, key in tensors(base)}

    def tensor(self, index: int) -> memoryview:
        """The bytes of a tensor: mapped for one of the base, else made.

        Raises:
            InputError: they are not what was packed.
        """
        one = self.manifest.tensors[index]
        found = self._of_base(one) if one.coding == "base" else memoryview(b"".join(self.blocks(index)))
        if sha256(found).hexdigest() != one.sha256:
            raise self._damaged(one)
        return found

    def blocks(self, index: int) -> Iterator[Bytes]:
        """The bytes of a tensor, some at a time, not compared with its digest."""
        one = self.manifest.tensors[index]
        if one.coding == "base":
            whole = self._of_base(one)
            yield from (whole[start : start + _PIECE] for start in range(0, len(whole), _PIECE))
            return
        source = BytesIO(self._changes[one.at : one.at + one.stored])
        try:
            yield from self._decoded(one, source)
            if source.read(1):
                raise planes.Damaged("there is more behind it")
        except planes.Damaged as error:
            raise self._damaged(one, str(error)) from None

    def files(self, model: Model) -> Iterator[tuple[File, Iterator[Bytes]]]:
        """The files of a model in order, and the bytes of each, which have to be taken before the next file.

        Raises:
            InputError: the bytes are not those that were packed.
        """
        graphs = self._unpacked(model)
        for file in model.files:
            yield file, self._content(file, graphs)

    def graphs(self, model: Model) -> Iterator[tuple[File, bytes]]:
        """The files of a model, and of each the bytes that are no tensors.

        Raises:
            InputError: they are not those that were packed.
        """
        unpacked = self._unpacked(model)
        for file in model.files:
            try:
                found = b"".join(unpacked.take(sum(file.pieces[::2])))
            except planes.Damaged as error:
                raise self._wrong(manifest.GRAPHS, str(error)) from None
            if sha256(found).hexdigest() != file.graph:
                raise self._wrong(manifest.GRAPHS, f"the graph of `{file.path}` is not what was packed")
            yield file, found

    def _unpacked(self, model: Model) -> _Graphs:
        graphs = _Graphs(self._packed, self.manifest.dictionary)
        try:
            for _ in graphs.take(model.skip):
                pass
        except planes.Damaged as error:
            raise self._wrong(manifest.GRAPHS, str(error)) from None
        return graphs

    def check(self, name: str) -> None:
        """Read a model, to compare its bytes with their digests. Raises InputError when they are not those."""
        for _, content in self.files(self.manifest.model(name, str(self.folder))):
            for _ in content:
                pass

    def check_base(self, model: Model) -> None:
        """Raise InputError when a tensor that `model` needs of a base given apart is not in it."""
        if self.manifest.has_base:
            return
        known = self.manifest.tensors
        used = self.manifest.used(model)
        used += [known[index].by for index in used if known[index].coding == "rounded"]
        needed = {index if known[index].coding == "base" else known[index].of for index in used}
        if not self._given and needed - {-1}:
            hint = f"give it with `--base {self.manifest.base.files[0].path}`"
            raise InputError("the pack does not hold the base", place=str(self.folder), hint=hint)
        lost = [one for i in sorted(needed - {-1}) if (one := known[i]).sha256 not in self._given]
        if lost:
            more = f" and {len(lost) - 1} more" if len(lost) > 1 else ""
            cause = f"this is another base: it has no tensor with the values of `{lost[0].name}`{more}"
            digest = self.manifest.base.files[0].sha256
            hint = f"give the `{self.manifest.base.files[0].path}` with SHA-256 {digest}"
            raise InputError(cause, place=str(self.folder), hint=hint)

    def _content(self, file: File, graphs: _Graphs) -> Iterator[Bytes]:
        digest = sha256()
        try:
            for place, number in enumerate(file.pieces):
                for block in graphs.take(number) if place % 2 == 0 else self.blocks(number):
                    digest.update(block)
                    yield block
        except planes.Damaged as error:
            raise self._wrong(manifest.GRAPHS, str(error)) from None
        if digest.hexdigest() != file.sha256:
            self._find_damage(file)
            raise self._wrong(manifest.GRAPHS, f"the bytes of `{file.path}` are not those that were packed")

    def _find_damage(self, file: File) -> None:
        """Raise InputError that names the first tensor of a file that is not what was packed."""
        for index in dict.fromkeys(file.pieces[1::2]):
            self.tensor(index)

    def _of_base(self, one: Tensor) -> memoryview:
        if self.manifest.has_base:
            return self._base[one.at : one.at + one.bytes]
        found = self._given.get(one.sha256)
        if found is None or len(found) != one.bytes:
            raise InputError(f"the tensor `{one.name}` of the base is needed", place=str(self.folder))
        return found

    def _decoded(self, one: Tensor, source: BytesIO) -> Iterator[Bytes]:
        width = manifest.width_of(one.dtype) or 1
        count, mantissa = one.bytes // width, planes.MANTISSA.get(one.dtype, 0)
        if one.coding == "whole":
            for start, end in planes.spans(count):
                yield planes.decode(source.read, end - start, width).tobytes()
            return
        if one.coding == "rounded":
            yield from self._rounded(one, source)
            return
        base = np.frombuffer(self._of_base(self.manifest.tensors[one.of]), f"<u{width}")
        if one.coding == "change":
            for start, end in planes.spans(count):
                yield planes.decode_change(source.read, base[start:end], mantissa).tobytes()
            return
        shape = manifest.matrix(one)
        assert shape is not None  # the manifest is checked
        rows, columns = shape
        left = _integers(source, rows, one.rank).reshape(rows, one.rank)
        factors = low_rank.Factors(left, _integers(source, columns, one.rank).reshape(one.rank, columns), one.scale)
        for start, end in planes.spans(count, columns):
            old = base[start:end].view(dtype(one.dtype)).reshape(-1, columns)
            guess = factors.guess(old, start // columns).reshape(-1).view(f"<u{width}")
            yield planes.decode_change(source.read, guess, mantissa).tobytes()

    def _rounded(self, one: Tensor, source: BytesIO) -> Iterator[Bytes]:
        other, by = self.manifest.tensors[one.of], self.manifest.tensors[one.by]
        base = rounded.as_matrix(np.frombuffer(self._of_base(other), dtype(other.dtype)), other.dims)
        scales, how = np.frombuffer(self.tensor(one.by), dtype(by.dtype)), one.rounding
        for start, end in rounded.spans(base.size, len(base), one.turned):
            guess = how.guess(base, scales, start, end, one.dtype == "int8")
            numbers = guess + planes.unzigzag(planes.decode(source.read, end - start, 1))
            yield rounded.packed(numbers, one.bits).tobytes()

    def _damaged(self, one: Tensor, reason: str = "its values are not those that were packed") -> InputError:
        held = manifest.BASE if one.coding == "base" else manifest.CHANGES
        return self._wrong(held, f"the tensor `{one.name}`: {reason}")

    def _wrong(self, name: str, reason: str) -> InputError:
        cause = f"it was damaged after it was written: {reason}"
        return InputError(cause, place=str(self.folder / name), hint=manifest.AGAIN)


class _Graphs:
    """What is unpacked of the bytes that are no tensors, forwards only."""

    def __init__(self, packed: memoryview, dictionary: int) -> None:
        self._packed, self._position = packed, 0
        self._coder = lzma.LZMADecompressor(lzma.FORMAT_RAW, filters=filters(dictionary))

    def take(self, length: int) -> Iterator[bytes]:
        """The next so many bytes, some at a time. Raises Damaged when there are fewer."""
        while length:
            piece = b""
            try:
                if self._coder.needs_input:
                    piece = bytes(self._packed[self._position : self._position + _FED])
                    self._position += len(piece)
                found = self._coder.decompress(piece, min(length, _PIECE))
            except (lzma.LZMAError, EOFError):
                raise planes.Damaged("it cannot be unpacked") from None
            if not found and not piece:
                raise planes.Damaged("it ends too early")
            length -= len(found)
            yield found


def filters(dictionary: int) -> list[dict[str, int]]:
    """How `graphs.data` is packed: 2^`dictionary` bytes are looked through for repetitions."""
    return [{"id": lzma.FILTER_LZMA2, "preset": 6, "dict_size": 1 << dictionary}]


def dtype(name: str) -> np.dtype:
    """The dtype of a name that the manifest may have."""
    import ml_dtypes

    return np.dtype(ml_dtypes.bfloat16 if name == "bfloat16" else name)


def tensors(files: Sequence[StoredFile]) -> Iterator[tuple[Payload, memoryview, str]]:
    """Every tensor of a model with its bytes and their SHA-256, file by file in the order of their places."""
    for file in files:
        content = memoryview(file.content)
        for one in file.payloads:
            values = content[one.offset : one.offset + one.length]
            yield one, values, sha256(values).hexdigest()


def _integers(source: BytesIO, length: int, rank: int) -> np.ndarray:
    """The integers of a factor, which are small enough that products are exact."""
    found = [planes.decode(source.read, end - start, 4) for start, end in planes.spans(length * rank)]
    whole = planes.unzigzag(np.concatenate(found)).view("<i4")
    if (np.abs(whole.astype(np.int64)) > 1 << low_rank.bits(rank) - 1).any():
        raise planes.Damaged("a factor is too large")
    return whole


def _mapped(file: Path) -> memoryview:
    try:
        with open(file, "rb") as stream:
            if not os.fstat(stream.fileno()).st_size:
                return memoryview(b"")
            return memoryview(mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ))
    except (OSError, ValueError) as error:
        raise InputError(f"it cannot be read: {error}", place=str(file), hint="check its permissions") from None
