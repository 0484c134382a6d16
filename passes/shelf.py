"""Arrays that are kept within a bounded memory, the others in a file that has no name."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Hashable
from typing import IO, Any

import numpy as np

from burnish.ir.errors import InputError


class Shelf:
    """Keeps arrays. Those that do not fit go to a temporary file, which the system removes with the process."""

    def __init__(self, limit: int) -> None:
        """An empty shelf.

        Args:
            limit: bytes of arrays in memory.
        """
        self.limit = limit
        self.held = 0
        self.spilled = 0
        self._near: dict[Hashable, Any] = {}
        self._far: dict[Hashable, tuple[int, np.dtype, tuple[int, ...]]] = {}
        self._file: IO[bytes] | None = None

    def __contains__(self, key: Hashable) -> bool:
        return key in self._near or key in self._far

    def put(self, key: Hashable, array: Any) -> None:
        """Keep an array, which must not change any more; what is no array of numbers stays in memory.

        Raises:
            InputError: the disk is full.
        """
        numbers = isinstance(array, np.ndarray) and array.dtype.kind not in "OSU"
        if not numbers or self.held + array.nbytes <= self.limit:
            self._near[key] = array
            self.held += array.nbytes if numbers else 0
            return
        try:
            if self._file is None:
                self._file = tempfile.TemporaryFile()
            data = np.ascontiguousarray(array).reshape(-1).view(np.uint8).data
            self._file.seek(self.spilled)
            self._file.write(data)
            self._file.flush()
        except OSError as error:
            hint = "free some space there, name another folder in TMPDIR, or give fewer samples"
            raise InputError(f"cannot write: {error.strerror}", place=tempfile.gettempdir(), hint=hint) from error
        self._far[key] = self.spilled, array.dtype, array.shape
        self.spilled += array.nbytes

    def get(self, key: Hashable) -> Any:
        """The array, which must not be changed."""
        if key in self._near:
            return self._near[key]
        assert self._file is not None
        start, dtype, shape = self._far[key]
        found = np.empty(shape, dtype)
        if found.nbytes:
            os.preadv(self._file.fileno(), [found.reshape(-1).view(np.uint8).data], start)
        return found

    def close(self) -> None:
        """Free everything."""
        self._near.clear()
        self._far.clear()
        if self._file is not None:
            self._file.close()
            self._file = None
