"""Write a pack: the base as it is, of each variant what differs from it."""

from __future__ import annotations

import contextlib
import lzma
import os
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any, BinaryIO

import msgspec
import numpy as np

from burnish.backends import folders
from burnish.backends.delta import low_rank, manifest, planes, reading, rounded
from burnish.backends.delta.manifest import File, Manifest, Model, Tensor
from burnish.ir.errors import InputError
from burnish.ir.payloads import Payload, StoredFile

Said = Callable[[str, int, int], None]
_ALIGNMENT = 64
_BLOCK = 1 << 22
_GUESSED = 1 << 12
_TRIED = 1 << 15
_COMPARED = 64
"""So many tensors of the base are looked at for the one that is nearest."""


def write(
    target: Path,
    base: tuple[str, Sequence[StoredFile]],
    variants: Mapping[str, Sequence[StoredFile]],
    *,
    keep_base: bool = True,
    said: Said = lambda what, number, total: None,
) -> Manifest:
    """Write a pack into a folder, whole or not at all, after every model was rebuilt from it and compared.

    The same models give the same bytes (of the same zlib, liblzma and NumPy).

    Args:
        target: the folder; an older pack there is replaced.
        base: its name and its files.
        variants: their files, by name.
        keep_base: put the base into the pack; else it is needed to rebuild a variant.
        said: progress: (what, number, total).

    Raises:
        InputError: a name is not possible, or the folder cannot be written or holds something else.
    """
    models = {base[0]: base[1], **variants}
    for name, files in models.items():
        reasons = {name: manifest.check_name(name), **{one.path: manifest.check_path(one.path) for one in files}}
        if len({one.path.lower() for one in files}) < len(files):
            reasons[name] = "two of its files have one name"
        for what, reason in reasons.items():
            if reason is not None:
                raise InputError(f"{what!r} cannot be packed: {reason}", hint="rename it, or give a name, `a=PATH`")
    with folders.staged(target, KIND) as folder, _guarded(target):
        packer = _Packer(folder.path, models, keep_base)
        for number, (name, files) in enumerate(models.items()):
            said(name, number, 2 * len(models))
            packer.add(name, files)
        made = packer.finish()
        pack = reading.Pack(folder.path, None if keep_base else base[1])
        for number, name in enumerate(models):
            said(f"comparing {name}", len(models) + number, 2 * len(models))
            if keep_base or name != base[0]:
                pack.check(name)
        folder.commit()
    return made


def _holds(folder: Path) -> set[str]:
    return {manifest.MANIFEST, *manifest.read(folder).sizes}


KIND = folders.Kind("a pack", "a pack is a folder", _holds)


@contextlib.contextmanager
def _guarded(target: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise folders.write_error(error, target, KIND) from error


@dataclass
class _Packer:
    """A pack that is being written into `folder`."""

    folder: Path
    models: Mapping[str, Sequence[StoredFile]]
    keep_base: bool
    tensors: list[Tensor] = field(default_factory=list)
    made: list[Model] = field(default_factory=list)
    size: int = 0

    def __post_init__(self) -> None:
        self.known: dict[str, int] = {}
        self.values: list[memoryview] = []
        self.alike: dict[tuple[str, tuple[int, ...]], list[int]] = {}
        with contextlib.ExitStack() as stack:
            names = [manifest.CHANGES, manifest.GRAPHS, *([manifest.BASE] if self.keep_base else [])]
            self.streams = {one: stack.enter_context(open(self.folder / one, "xb")) for one in names}
            self.stack = stack.pop_all()
        largest = max(sum(_between(one) for one in files) for files in self.models.values())
        self.dictionary = min(max(12, (2 * largest).bit_length()), manifest.LARGEST_DICTIONARY)
        self.coder = lzma.LZMACompressor(lzma.FORMAT_RAW, filters=reading.filters(self.dictionary))

    def add(self, name: str, files: Sequence[StoredFile]) -> None:
        """Add a model; the first is the base."""
        of_base, skip = not self.made, self.size
        self.passed = Counter[tuple[str, tuple[int, ...]]]()
        self.current = list(reading.tensors(files))
        digests = iter(self.current)
        made = []
        for file in files:
            content, whole, graph, pieces, position = memoryview(file.content), sha256(), sha256(), [], 0
            for one in file.payloads:
                _, values, digest = next(digests)
                pieces.append(self._graph(content[position : one.offset], graph, of_base))
                pieces.append(self._tensor(one, values, digest, of_base))
                position = one.offset + one.length
            pieces.append(self._graph(content[position:], graph, of_base))
            for start in range(0, len(content), _BLOCK):
                whole.update(content[start : start + _BLOCK])
            made.append(File(file.path, whole.hexdigest(), graph.hexdigest(), len(content), tuple(pieces)))
        self.made.append(Model(name, tuple(made), skip))

    def finish(self) -> Manifest:
        """Write what is left, and the manifest."""
        self.streams[manifest.GRAPHS].write(self.coder.flush())
        sizes = {name: stream.tell() for name, stream in self.streams.items()}
        for stream in self.streams.values():
            stream.flush()
            os.fsync(stream.fileno())
        self.stack.close()
        variants = tuple(self.made[1:])
        found = Manifest(tuple(self.tensors), self.made[0], variants, self.keep_base, self.dictionary, sizes)
        with open(self.folder / manifest.MANIFEST, "xb") as stream:
            stream.write(manifest.encode(found))
            stream.flush()
            os.fsync(stream.fileno())
        return found

    def _graph(self, content: memoryview, graph: Any, of_base: bool) -> int:
        graph.update(content)
        if self.keep_base or not of_base:
            self.size += len(content)
            for start in range(0, len(content), _BLOCK):
                self.streams[manifest.GRAPHS].write(self.coder.compress(content[start : start + _BLOCK]))
        return len(content)

    def _tensor(self, one: Payload, values: memoryview, digest: str, of_base: bool) -> int:
        index, (name, dims) = self.known.get(digest), _numbers(one)
        self.passed[name, dims] += 1
        if index is None:
            kept = _Kept(one.name, name, dims, digest, values)
            made = self._of_base(kept) if of_base else self._of_variant(kept)
            index = self.known[digest] = len(self.tensors)
            self.tensors.append(made)
            if of_base:
                self.values.append(values)
                self.alike.setdefault((name, dims), []).append(index)
        return index

    def _of_base(self, kept: _Kept) -> Tensor:
        at = 0
        if self.keep_base:
            stream = self.streams[manifest.BASE]
            stream.write(b"\0" * (-stream.tell() % _ALIGNMENT))
            at = stream.tell()
            for start in range(0, len(kept.values), _BLOCK):
                stream.write(kept.values[start : start + _BLOCK])
        return kept.tensor("base", at, len(kept.values))

    def _of_variant(self, kept: _Kept) -> Tensor:
        stream = self.streams[manifest.CHANGES]
        made = self._rounded(kept, stream) if kept.dtype in ("uint8", "int8") else None
        if made is not None:
            return made
        key = kept.dtype, kept.dims
        first = max(0, self.passed[key] - _COMPARED // 2)
        at, alike = stream.tell(), self.alike.get(key, [])
        alike = alike[first : first + _COMPARED] or alike[-_COMPARED:]
        of = min(alike, key=lambda i: _distance(kept.numbers, self._base(i, kept)), default=-1)
        if of >= 0:
            base = self._base(of, kept)
            factors = self._factors(kept, base)
            if factors is not None:
                _write_factors(stream, factors, kept, base)
                rank, scale = factors.left.shape[1], factors.scale
                return kept.tensor("low-rank", at, stream.tell() - at, of=of, rank=rank, scale=scale)
            if _tried(kept, base) < _tried(kept, None):
                for start, end in planes.spans(kept.numbers.size):
                    stream.write(planes.encode_change(kept.numbers[start:end], base[start:end], kept.mantissa))
                return kept.tensor("change", at, stream.tell() - at, of=of)
        for start, end in planes.spans(kept.numbers.size):
            stream.write(planes.encode(kept.numbers[start:end]))
        return kept.tensor("whole", at, stream.tell() - at)

    def _rounded(self, kept: _Kept, stream: BinaryIO) -> Tensor | None:
        """The tensor as a rounded one of the base; None where it is none. Its scales are added before it."""
        sizes = {len(kept.values), 2 * len(kept.values)}
        bases = {
            index: rounded.as_matrix(np.frombuffer(self.values[index], reading.dtype(one.dtype)), one.dims)
            for index, one in enumerate(self.tensors[: len(self.values)])
            if one.dtype in planes.MANTISSA and one.bytes // (manifest.width_of(one.dtype) or 1) in sizes
        }
        scales = {}
        for number, (one, values, _) in enumerate(self.current if bases else ()):
            dtype = _numbers(one)[0]
            if dtype in planes.MANTISSA and len(values) <= 8 * len(kept.values):
                scales[number] = np.frombuffer(values, reading.dtype(dtype))
        found = rounded.find(np.frombuffer(kept.values, np.uint8), kept.dtype == "int8", bases, scales)
        if found is None:
            return None
        of, place, how = found
        by, at = self._tensor(*self.current[place], of_base=False), stream.tell()
        numbers = rounded.unpacked(kept.numbers.view(np.uint8), how.bits)
        for start, end in rounded.spans(numbers.size, len(bases[of]), how.turned):
            guess = how.guess(bases[of], scales[place], start, end, kept.dtype == "int8")
            stream.write(planes.encode(planes.zigzag(numbers[start:end] - guess)))
        made = kept.tensor("rounded", at, stream.tell() - at, of=of, by=by)
        return msgspec.structs.replace(made, bits=how.bits, zero=how.zero, turned=how.turned, columns=how.columns)

    def _base(self, index: int, kept: _Kept) -> np.ndarray:
        return np.frombuffer(self.values[index], kept.numbers.dtype)

    def _factors(self, kept: _Kept, base: np.ndarray) -> low_rank.Factors | None:
        shape = manifest.matrix(kept.tensor("whole", 0, 0))
        if shape is None:
            return None
        kind = reading.dtype(kept.dtype)
        return low_rank.find(base.view(kind).reshape(shape), kept.numbers.view(kind).reshape(shape))


@dataclass(frozen=True)
class _Kept:
    """A tensor that is not known yet."""

    name: str
    dtype: str
    dims: tuple[int, ...]
    digest: str
    values: memoryview

    @property
    def numbers(self) -> np.ndarray:
        """Its values as unsigned integers."""
        return np.frombuffer(self.values, f"<u{manifest.width_of(self.dtype)}")

    @property
    def mantissa(self) -> int:
        """Bits behind the exponent; 0 for what are no floating-point numbers."""
        return planes.MANTISSA.get(self.dtype, 0)

    def tensor(self, coding: str, at: int, stored: int, **more: int) -> Tensor:
        """What the manifest says of it."""
        return Tensor(
            self.digest, len(self.values), self.name, self.dtype, self.dims, coding, at, stored, **more,  # type: ignore[arg-type]
        )  # fmt: skip


def _write_factors(stream: BinaryIO, factors: low_rank.Factors, kept: _Kept, base: np.ndarray) -> None:
    for one in (factors.left, factors.right):
        whole = one.reshape(-1).view("<u4")
        for start, end in planes.spans(whole.size):
            stream.write(planes.encode(planes.zigzag(whole[start:end])))
    columns, kind = factors.right.shape[1], reading.dtype(kept.dtype)
    for start, end in planes.spans(base.size, columns):
        guess = factors.guess(base[start:end].view(kind).reshape(-1, columns), start // columns).reshape(-1)
        stream.write(planes.encode_change(kept.numbers[start:end], guess.view(base.dtype), kept.mantissa))


def _between(file: StoredFile) -> int:
    """Bytes of a file that are no tensors'."""
    return len(file.content) - sum(one.length for one in file.payloads)


def _numbers(one: Payload) -> tuple[str, tuple[int, ...]]:
    """The dtype and dims that the bytes of a tensor are taken for."""
    import onnx_ir as oir

    try:
        kind = oir.DataType(one.dtype)
        name = kind.numpy().name if kind.bitwidth >= 8 else "uint8"
    except (ValueError, TypeError):
        name = "uint8"
    width = manifest.width_of(name)
    if width is None or int(np.prod(one.dims, dtype=object)) * width != one.length:
        return "uint8", one.dims
    return name, one.dims


def _distance(numbers: np.ndarray, base: np.ndarray) -> float:
    """Bits a number that it takes, about, to say how numbers differ from those of the base; of some of them."""
    step = max(1, numbers.size // _GUESSED)
    change = planes.zigzag(numbers[::step] - base[::step])
    return float(np.log2(change.astype(np.float64) + 1).mean())


def _tried(kept: _Kept, base: np.ndarray | None) -> int:
    """Bytes that a piece from the middle takes."""
    start = max(0, kept.numbers.size // 2 - _TRIED)
    piece = slice(start, start + 2 * _TRIED)
    if base is None:
        return len(planes.encode(kept.numbers[piece]))
    return len(planes.encode_change(kept.numbers[piece], base[piece], kept.mantissa))
