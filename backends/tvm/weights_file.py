"""Weights in the safetensors format: a header in JSON, then the bytes of one tensor after another.

The format is Hugging Face's (https://github.com/huggingface/safetensors#format). It holds data only: reading it runs
nothing.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from math import prod
from pathlib import Path
from typing import BinaryIO

import numpy as np

from burnish.ir.errors import InputError

_NAMES = {
    "float64": "F64",
    "float32": "F32",
    "float16": "F16",
    "bfloat16": "BF16",
    "int64": "I64",
    "int32": "I32",
    "int16": "I16",
    "int8": "I8",
    "uint64": "U64",
    "uint32": "U32",
    "uint16": "U16",
    "uint8": "U8",
    "bool": "BOOL",
}
_LARGEST_HEADER = 100_000_000
_ALIGNMENT = 64


def write(path: Path, arrays: Mapping[str, np.ndarray]) -> None:
    """Write arrays, in the order given.

    Raises:
        OSError: the file cannot be written.
    """
    header, position = {}, 0
    for name, array in arrays.items():
        end = position + array.nbytes
        kind = _NAMES[array.dtype.name]
        header[name] = {"dtype": kind, "shape": list(array.shape), "data_offsets": [position, end]}
        position = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(len(text) + 8) % _ALIGNMENT)
    with open(path, "xb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        for array in arrays.values():
            stream.write(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
        stream.flush()
        os.fsync(stream.fileno())


def read(path: Path, stream: BinaryIO, seen: Callable[[bytes | memoryview], object]) -> dict[str, np.ndarray]:
    """The arrays by name, in the order of their bytes, each at a multiple of 64 bytes, as TVM's code wants it.

    Args:
        path: of the file, for errors.
        stream: the file, opened at its beginning.
        seen: given all bytes of the file, in order.

    Raises:
        InputError: it is no such file, or is cut off.
    """
    size = os.fstat(stream.fileno()).st_size
    head = stream.read(8)
    length = int.from_bytes(head, "little")
    if len(head) < 8 or length > min(size - 8, _LARGEST_HEADER):
        raise _broken(path, "its header is cut off")
    text = stream.read(length)
    seen(head)
    seen(text)
    found, position = {}, 0
    for name, dtype, shape, start, end in _entries(path, text):
        if start != position or end - start != prod(shape) * dtype.itemsize or 8 + length + end > size:
            raise _broken(path, f"the bytes of `{name}` are not where its header says")
        array = _aligned(end - start)
        if stream.readinto(array.data) != array.size:  # type: ignore[attr-defined]
            raise _broken(path, "it is cut off")
        seen(array.data)
        found[name] = array.view(dtype).reshape(shape)
        position = end
    if 8 + length + position != size:
        raise _broken(path, "there is more behind its last tensor")
    return found


def _aligned(size: int) -> np.ndarray:
    memory = np.empty(size + _ALIGNMENT, np.uint8)
    start = -memory.ctypes.data % _ALIGNMENT
    return memory[start : start + size]


def _entries(path: Path, text: bytes) -> list[tuple[str, np.dtype, list[int], int, int]]:
    import ml_dtypes

    kinds = {kind: np.dtype(ml_dtypes.bfloat16 if name == "bfloat16" else name) for name, kind in _NAMES.items()}
    rows = []
    try:
        for name, one in json.loads(text).items():
            if name != "__metadata__":
                start, end = one["data_offsets"]
                shape = [int(size) for size in one["shape"]]
                if any(size < 0 for size in shape):
                    raise ValueError(name)
                rows.append((name, kinds[one["dtype"]], shape, int(start), int(end)))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise _broken(path, "its header is not understood") from None
    return sorted(rows, key=lambda row: row[3:])


def _broken(path: Path, reason: str) -> InputError:
    return InputError(f"this is no safetensors file: {reason}", place=str(path), hint="write the artefact again")
