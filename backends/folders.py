"""Folders that are written whole or not at all, and only ever take the place of an older one of their kind."""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from burnish.backends.aside import BEFORE, put_right, temporary_folder
from burnish.ir.errors import InputError


@dataclass(frozen=True)
class Kind:
    """A kind of folder.

    Attributes:
        what: its name with the article: `an artefact`.
        meaning: what is said where a file was named: `a compiled model is a folder`.
        holds: the paths of the files of one, with `/`. Raises InputError for a folder that is none.
    """

    what: str
    meaning: str
    holds: Callable[[Path], set[str]]


@dataclass(frozen=True)
class Staged:
    """A folder beside its target, not yet visible under its name.

    Attributes:
        path: the folder to write to.
        target: where `commit` moves it.
        kind: what it is.
    """

    path: Path
    target: Path
    kind: Kind

    def commit(self) -> list[Path]:
        """Give the folder its name; an older one of its kind goes, and comes back when this fails.

        Returns:
            Its files, sorted.

        Raises:
            InputError: the folder cannot be moved.
        """
        older = self.path.parent / BEFORE / self.target.name
        try:
            check_target(self.target, self.kind)
            if self.target.exists():
                older.parent.mkdir()
                os.rename(self.target, older)
            os.rename(self.path, self.target)
        except BaseException as error:
            if older.exists() and not self.target.exists():
                os.rename(older, self.target)
            if isinstance(error, OSError):
                raise write_error(error, self.target, self.kind) from error
            raise
        sync(self.target.parent)
        return sorted(one for one in self.target.rglob("*") if one.is_file())


@contextlib.contextmanager
def staged(path: str | os.PathLike[str], kind: Kind) -> Iterator[Staged]:
    """A folder to write into: fill `.path`, check it, then `commit` gives it its name.

    Without a commit, or on any error or interrupt, nothing is left behind and an older one stays. What a killed process
    left is put right by the next one that writes into that folder.

    Raises:
        InputError: the target cannot be written, or is something else than one of its kind.
    """
    target = Path(path)
    check_target(target, kind)
    with contextlib.ExitStack() as stack:
        try:
            put_right(target.parent)
            folder = stack.enter_context(temporary_folder(target.parent)) / target.name
            folder.mkdir()
        except OSError as error:
            raise write_error(error, target, kind) from error
        yield Staged(folder, target, kind)


def check_target(target: Path, kind: Kind, *sources: Path) -> None:
    """Check, before any work is done, that a folder of this kind can be written there.

    Raises:
        InputError: the folder around it is missing or closed, or there is something else than an older one, whole and
            without other files, or one of the `sources` is in it.
    """
    place, parent = str(target), target.parent
    if target.name in ("", "..") or target.suffix in (".onnx", ".pt2"):
        raise InputError(kind.meaning, place=place, hint="give the name of a folder, `-o out/`")
    if not parent.is_dir():
        raise InputError(f"the folder {parent} does not exist", place=place, hint=f"create it: mkdir -p {parent}")
    if not os.access(parent, os.W_OK | os.X_OK):
        raise write_error(PermissionError(errno.EACCES, os.strerror(errno.EACCES)), target, kind)
    if target.is_symlink() or (target.exists() and not target.is_dir()):
        raise InputError("there is something that is no folder", place=place, hint="give another name")
    if not target.is_dir() or not any(target.iterdir()):
        return
    noun = kind.what.partition(" ")[2]
    hint = f"give another name, or remove it yourself: only {noun}s are replaced"
    try:
        known = kind.holds(target)
    except InputError:
        raise InputError(f"there is a folder that is no {noun}", place=place, hint=hint) from None
    strange = [one for one in sorted(target.rglob("*")) if not _belongs(one, target, known)]
    if strange:
        found = strange[0].relative_to(target)
        raise InputError(f"the {noun} that is there holds `{found}`, which is not its own", place=place, hint=hint)
    if any(source.exists() and source.resolve().is_relative_to(target.resolve()) for source in sources):
        raise InputError("what is read lies in the folder that would be replaced", place=place, hint=hint)


def write_error(error: OSError, target: Path, kind: Kind) -> InputError:
    """A failure of the disk as an error of ours."""
    reason = error.strerror or "the disk is full or a limit on file sizes was reached"
    full = error.errno in (None, errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    hint = "free some space, or write to another disk" if full else "write to a folder you own"
    noun = kind.what.partition(" ")[2]
    return InputError(f"the {noun} cannot be written: {reason}", place=str(target), hint=hint)


def sync(path: Path) -> None:
    """See to it that a file or the names in a folder are on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _belongs(one: Path, target: Path, known: set[str]) -> bool:
    name = one.relative_to(target).as_posix()
    if one.is_dir() and not one.is_symlink():
        return any(path.startswith(f"{name}/") for path in known)
    return name in known
