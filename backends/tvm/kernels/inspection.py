"""What a library holds for a GPU: its kernels, and which of their instructions run on tensor cores.

The library is an ELF file; its section `.nv_fatbin` holds one ELF file for each architecture, which is found where it
is not compressed. Such a file alone (`nvcc -cubin`) is read as well. Since Volta an instruction takes 16 bytes, and its
lowest 12 bits are the opcode (Jia et al., Dissecting the NVIDIA Volta GPU Architecture via Microbenchmarking, 2018,
section 2.1); what the opcodes of the matrix instructions are was read off cuobjdump.
"""

from __future__ import annotations

import struct
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from burnish.ir.errors import InputError

_MAGIC = b"\x7fELF"
_CUDA = 190
_MATRIX = {0x23C: "HMMA", 0x237: "IMMA", 0x27A: "QMMA"}
_SHARED = ".nv.shared."
_WIDTH = 16


@dataclass(frozen=True)
class Kernel:
    """A kernel in a library.

    Attributes:
        name: as in the source.
        instructions: how many there are.
        matrix: how many of them run on tensor cores, by name.
        shared: bytes of shared memory of a block, but for what is asked for at each launch.
    """

    name: str
    instructions: int
    matrix: Counter[str]
    shared: int


def kernels(path: Path) -> list[Kernel]:
    """The kernels in a library or a code object, by name.

    Raises:
        InputError: it is no ELF file, or holds no code for a GPU that can be read.
    """
    data = path.read_bytes()
    if data[:4] != _MAGIC:
        raise InputError("this is no library", place=str(path))
    (machine,) = struct.unpack_from("<H", data, 18)
    fat = data if machine == _CUDA else {name: code for name, code, _ in _sections(data)}.get(".nv_fatbin", b"")
    found = []
    start = fat.find(_MAGIC)
    while start >= 0:
        if struct.unpack_from("<H", fat, start + 18)[0] == _CUDA:
            found += list(_kernels(fat[start:]))
        start = fat.find(_MAGIC, start + 4)
    if not found:
        raise InputError("there is no code for a GPU in it, or only compressed code", place=str(path))
    return sorted(found, key=lambda one: one.name)


def _kernels(image: bytes) -> Iterator[Kernel]:
    sections = list(_sections(image))
    shared = {name.removeprefix(_SHARED): size for name, _, size in sections if name.startswith(_SHARED)}
    for section, code, _ in sections:
        if section.startswith(".text."):
            name = section.removeprefix(".text.")
            opcodes = [struct.unpack_from("<H", code, at)[0] & 0xFFF for at in range(0, len(code), _WIDTH)]
            matrix = Counter(_MATRIX[one] for one in opcodes if one in _MATRIX)
            yield Kernel(name, len(opcodes), matrix, shared.get(name, 0))


def _sections(image: bytes) -> Iterator[tuple[str, bytes, int]]:
    """Names, contents and sizes of the sections of a 64-bit ELF file at the beginning of `image`."""
    (table,) = struct.unpack_from("<Q", image, 40)
    size, count, names = struct.unpack_from("<HHH", image, 58)
    rows = [struct.unpack_from("<IIQQQQ", image, table + index * size) for index in range(count)]
    texts = rows[names][4] if count else 0
    for name, kind, _, _, offset, length in rows:
        end = image.index(b"\0", texts + name)
        yield (
            image[texts + name : end].decode("ascii", "replace"),
            b"" if kind == 8 else image[offset : offset + length],
            length,
        )
