"""Keep what TVM prints from the user: warnings and C++ stacks that it writes to the file descriptors themselves."""

from __future__ import annotations

import os
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import IO

_lock = threading.Lock()
_users = 0
_kept: dict[int, int] = {}
_file: IO[bytes] | None = None


@contextmanager
def quiet() -> Iterator[Callable[[], str]]:
    """While the context lasts, what this process and its children write to stdout and stderr goes to a file instead.

    It may be nested, and entered by several threads: the streams come back when the last one leaves.

    Yields:
        A function that gives what was written so far.
    """
    global _users
    with _lock:
        _users += 1
        if _users == 1:
            _divert()
        kept = _file
    try:
        yield lambda: _read(kept)
    finally:
        with _lock:
            _users -= 1
            if _users == 0:
                _restore()


def _divert() -> None:
    global _file
    _flush()
    _file = tempfile.TemporaryFile()
    for number in (1, 2):
        with suppress(OSError):  # a stream may be closed
            _kept[number] = os.dup(number)
            os.dup2(_file.fileno(), number)


def _restore() -> None:
    global _file
    _flush()
    for number, copy in _kept.items():
        os.dup2(copy, number)
        os.close(copy)
    _kept.clear()
    assert _file is not None
    _file.close()
    _file = None


def _flush() -> None:
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError, AttributeError):
            stream.flush()


def _read(file: IO[bytes] | None) -> str:
    _flush()
    if file is None or file.closed:
        return ""
    return os.pread(file.fileno(), os.fstat(file.fileno()).st_size, 0).decode(errors="replace")
