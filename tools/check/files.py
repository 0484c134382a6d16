"""The files that reports are written to: chosen before anything runs."""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping
from pathlib import Path

from burnish.ir.errors import InputError

STDOUT = "-"


def agree(targets: Mapping[str, str | None], read: Collection[str | Path | None]) -> None:
    """Refuse targets that cannot be what is meant.

    Args:
        targets: paths by option, `-` for stdout; None for those not asked for.
        read: the files that are read.

    Raises:
        InputError: two reports for one place, a folder, a file that is read, or one in a folder that does not exist.
    """
    taken = {os.path.realpath(one): "this file is read" for one in read if one is not None}
    for option, target in targets.items():
        if target is None:
            continue
        place, path = f"{option} {target}", target if target == STDOUT else os.path.realpath(target)
        if path in taken:
            raise InputError(f"nothing can be written there: {taken[path]}", place=place, hint="name another file")
        taken[path] = f"`{option}` goes there already"
        if target != STDOUT and (target.endswith("/") or os.path.isdir(path)):
            raise InputError("this is a folder", place=place, hint="give the name of a file to write")
        if target != STDOUT and not os.path.isdir(os.path.dirname(path)):
            raise InputError("there is no such folder", place=place, hint="make it first")
