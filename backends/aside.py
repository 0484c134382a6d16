"""Temporary folders beside what is written; what a killed process left of them is removed by the next one."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

_PREFIX = ".burnish-"
BEFORE = ".before"
"""In a temporary folder: the folder for what had the name of something beside it, until that has taken its place."""


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


def put_right(parent: Path) -> None:
    """Remove the temporary folders of processes that are no more, whose locks the system gave back.

    One that still holds what was to be given its name died before that was done: what it had moved into `BEFORE` is put
    back first.

    Raises:
        OSError: that cannot be done.
    """
    for folder in sorted(parent.glob(f"{_PREFIX}*")):
        lock = _locked(folder)
        if lock is None:
            continue
        try:
            names = {one.name for one in folder.iterdir()}
            if names - {BEFORE}:
                for older in (folder / BEFORE).glob("*"):
                    os.replace(older, parent / older.name)
            if names:  # one that was just made is empty, and its owner is about to lock it
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
