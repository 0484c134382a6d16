"""NumPy files from strangers: headers are checked before anything is allocated, pickles are never opened."""

from __future__ import annotations

import math
import zipfile
import zlib
from pathlib import Path
from typing import IO

import numpy as np

from burnish.ir.errors import InputError

LARGEST_BYTES = 2 << 30
"""What samples may take in memory, unpacked: 2 GiB."""


def read_npy(path: Path) -> np.ndarray:
    """The array of an `.npy` file.

    Raises:
        InputError: unreadable, truncated, a pickle, or larger than `LARGEST_BYTES`.
    """
    try:
        with path.open("rb") as stream:
            return _read(stream, path.stat().st_size, str(path))
    except OSError as error:
        raise InputError(f"the file cannot be read: {error.strerror or error}", place=str(path)) from error


def read_npz(path: Path) -> dict[str, np.ndarray]:
    """The arrays of an `.npz` file by name.

    Raises:
        InputError: unreadable, no `.npz`, truncated, holding a pickle, or unpacking to more than `LARGEST_BYTES`.
    """
    arrays: dict[str, np.ndarray] = {}
    try:
        with zipfile.ZipFile(path) as archive:
            members = [member for member in archive.infolist() if member.filename.endswith(".npy")]
            total = sum(member.file_size for member in members)
            if total > LARGEST_BYTES:
                raise InputError(
                    f"the file unpacks to {total / 2**30:.1f} GiB, more than {LARGEST_BYTES >> 30} GiB",
                    place=str(path),
                    hint="a few hundred samples are enough; split it or give fewer",
                )
            for member in members:
                name = member.filename.removesuffix(".npy")
                with archive.open(member) as stream:
                    arrays[name] = _read(stream, member.file_size, f"{path}, array `{name}`")
    except zipfile.BadZipFile as error:
        raise InputError(
            f"this is no whole `.npz` file: {error}", place=str(path), hint="write it with numpy.savez"
        ) from error
    except (OSError, EOFError, zlib.error, NotImplementedError, RuntimeError) as error:
        raise InputError(f"the file cannot be read: {error}", place=str(path)) from error
    if not arrays:
        raise InputError("the file holds no arrays", place=str(path), hint="write it with numpy.savez")
    return arrays


def _read(stream: IO[bytes], available: int, place: str) -> np.ndarray:
    """The array at the start of `stream`, which holds `available` bytes."""
    try:
        version = np.lib.format.read_magic(stream)
        header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, _, dtype = header(stream)
        if dtype.hasobject:
            raise InputError(
                "the array holds Python objects (a pickle), which could run code when read",
                place=place,
                hint="save numbers: array.astype(numpy.float32)",
            )
        needed = math.prod(shape) * dtype.itemsize
        if needed > LARGEST_BYTES:
            raise InputError(
                f"the array takes more than {LARGEST_BYTES >> 30} GiB", place=place, hint="give fewer samples"
            )
        if needed > available:
            raise InputError(f"the file is cut short: {needed} bytes announced, {available} there", place=place)
        stream.seek(0)
        return np.lib.format.read_array(stream, allow_pickle=False)
    except (ValueError, TypeError, SyntaxError) as error:
        raise InputError(
            f"this is no NumPy array: {error}", place=place, hint="write it with numpy.save or numpy.savez"
        ) from error
