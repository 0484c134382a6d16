"""Write a small file whole or not at all."""

from __future__ import annotations

import os
import stat
import tempfile
from contextlib import suppress
from pathlib import Path

from burnish.ir.errors import InputError


def write(path: str | Path, content: str | bytes) -> None:
    """Put `content` into a file, which is replaced when it exists; on any error what was there before stays.

    Args:
        path: a file, or a link to one, in a folder that exists.
        content: text is written in UTF-8.

    The rights of a file that is replaced stay as they are, and one that may not be written to is not replaced.

    Raises:
        InputError: there is no such folder, it cannot be written to, or something else than a file is there.
    """
    data = content.encode("utf-8", errors="backslashreplace") if isinstance(content, str) else content
    target = Path(os.path.realpath(path))
    if target.exists() and not target.is_file():
        raise InputError("there is something that is not a file", place=str(path), hint="give another name")
    if target.exists() and not os.access(target, os.W_OK):
        raise InputError("it is read-only", place=str(path), hint="allow that it is written to, or give another name")
    partial = ""
    try:
        number, partial = tempfile.mkstemp(prefix=".burnish-", suffix=target.suffix, dir=target.parent)
        with os.fdopen(number, "wb") as stream:
            stream.write(data)
        os.chmod(partial, stat.S_IMODE(target.stat().st_mode) if target.exists() else 0o644)
        os.replace(partial, target)
    except BaseException as error:
        with suppress(OSError):
            os.unlink(partial)
        if isinstance(error, OSError):
            cause = f"it cannot be written: {error.strerror}"
            hint = "check that the folder exists, may be written to, and has room"
            raise InputError(cause, place=str(path), hint=hint) from None
        raise
