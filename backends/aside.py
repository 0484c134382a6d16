"""Temporary folders beside what is written; what a killed process left of them is removed by the next one."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

_PREFIX = ".burnish-"
BEFORE = "before"
"""In a temporary folder: what had the name of something beside it, until that takes its place."""


@contextlib.contextmanager
def temporary_folder(parent: Path) -> Iterator[Path]:
    """A folder inside `parent` that goes with the body; its owner holds a lock on it.

    Raises:
        OSError: it cannot be made.
    """
    folder = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=parent))
    lock = _locked(folder)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        if lock is not None:
            os.close(lock)


def left_behind(parent: Path) -> Iterator[Path]:
    """The temporary folders of processes that are no more, whose locks the system gave back; each is then removed.

    What a process had moved into `BEFORE`, and died before it put something in its place, is put back first.
    """
    for folder in sorted(parent.glob(f"{_PREFIX}*")):
        lock = _locked(folder)
        if lock is None:
            continue
        try:
            if any(folder.iterdir()):  # one that was just made is empty, and its owner is about to lock it
                for older in (folder / BEFORE).glob("*"):
                    if not (parent / older.name).exists():
                        os.rename(older, parent / older.name)
                yield folder
                shutil.rmtree(folder, ignore_errors=True)
        finally:
            os.close(lock)


def _locked(folder: Path) -> int | None:
    """A handle that locks a folder while it is open; None where another has it, there are no locks, or no folder."""
    try:
        import fcntl
    except ImportError:
        return None
    try:
        handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    except OSError:
        return None
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(handle)
        return None
    return handle
