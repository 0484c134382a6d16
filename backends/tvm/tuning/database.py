"""What tuning found, in a folder: one file per kernel, target and versions, one line per candidate."""

from __future__ import annotations

import fcntl
import hashlib
import os
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import msgspec

from burnish.backends.tvm import versions
from burnish.backends.tvm.target import Target
from burnish.backends.tvm.tuning.kernels import Kernel
from burnish.backends.tvm.tuning.records import LONGEST, Heading, Record, refusal
from burnish.ir.errors import InputError

_FORMAT = 1


@dataclass(frozen=True)
class Found:
    """What a database holds about a kernel.

    Attributes:
        records: in the order they were written, failed candidates among them.
        notes: what was skipped, and why.
        digest: SHA-256 of the file in hex; empty where there is none.
    """

    records: tuple[Record, ...] = ()
    notes: tuple[str, ...] = ()
    digest: str = ""

    @property
    def trials(self) -> int:
        """Candidates that were tried."""
        return sum(not one.end for one in self.records)

    @property
    def spent(self) -> float:
        """Seconds that went into them."""
        return sum(one.spent for one in self.records)

    @property
    def end(self) -> str:
        """Why no further candidate will be found; empty when one may be."""
        return next((one.end for one in reversed(self.records) if one.end), "")

    def best(self) -> list[Record]:
        """The candidates that were measured, fastest first."""
        measured = [one for one in self.records if one.seconds is not None]
        return sorted(measured, key=lambda one: one.seconds or 0.0)


@dataclass(frozen=True)
class Database:
    """A folder of tuning records, shared by models, runs and processes.

    A file is appended to by whole lines under a lock. A line that a killed process left unfinished is dropped when the
    file is read or appended to; the others stay.

    Attributes:
        folder: made when something is written.
    """

    folder: Path
    notes: list[str] = field(default_factory=list, compare=False)

    def __post_init__(self) -> None:
        if self.folder.exists() and not self.folder.is_dir():
            raise InputError("this is no folder", place=str(self.folder), hint="name a folder for tuning records")

    def file(self, kernel: Kernel, target: Target, threads: int) -> Path:
        """Where records of a kernel are."""
        heading = _heading(kernel, target, threads)
        text = "\n".join(
            [heading.signature, heading.target, *(f"{k} {v}" for k, v in sorted(heading.versions.items()))]
        )
        return self.folder / f"{kernel.hash}-{hashlib.sha256(text.encode()).hexdigest()[:12]}.jsonl"

    def read(self, kernel: Kernel, target: Target, threads: int) -> Found:
        """What is known about a kernel; lines that cannot be read or are not believed are skipped with a note.

        Raises:
            InputError: the file cannot be opened.
        """
        path = self.file(kernel, target, threads)
        try:
            data = path.read_bytes()
        except FileNotFoundError:
            return Found()
        except OSError as error:
            raise InputError(f"the records cannot be read: {error.strerror}", place=str(path)) from None
        lines, digest = data.split(b"\n")[:-1], hashlib.sha256(data).hexdigest()
        if not lines:
            return Found(digest=digest)
        expected = _heading(kernel, target, threads)
        try:
            heading = msgspec.json.decode(lines[0], type=Heading)
        except (msgspec.DecodeError, ValueError) as error:
            note = f"{path.name}: skipped, its first line is none of a database: {_short(error)}"
            return Found(notes=(note,), digest=digest)
        heading.name = expected.name
        if heading != expected:
            return Found(notes=(f"{path.name}: skipped, it is about another kernel, target or version",), digest=digest)
        records, notes = [], []
        for number, line in enumerate(lines[1:], 2):
            try:
                record = msgspec.json.decode(line, type=Record) if len(line) <= LONGEST else None
                reason = refusal(record) if record is not None else "it is too long"
            except (msgspec.DecodeError, ValueError, RecursionError) as error:
                record, reason = None, _short(error)
            if reason is None and record is not None:
                records.append(record)
            else:
                notes.append(f"{path.name}:{number}: skipped: {reason}")
        return Found(tuple(records), tuple(notes), digest)

    def digest(self, name: str) -> str:
        """SHA-256, in hex, of the file of that name; empty where there is none that can be read."""
        try:
            return hashlib.sha256((self.folder / name).read_bytes()).hexdigest()
        except OSError:
            return ""

    def append(self, kernel: Kernel, target: Target, threads: int, records: Sequence[Record]) -> None:
        """Add records, all or none of them.

        Raises:
            InputError: they cannot be written; the file is as it was.
        """
        path = self.file(kernel, target, threads)
        lines = b"".join(msgspec.json.encode(one) + b"\n" for one in records)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            number = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
            try:
                fcntl.flock(number, fcntl.LOCK_EX)
                size = _whole(number)
                if size == 0:
                    lines = msgspec.json.encode(_heading(kernel, target, threads)) + b"\n" + lines
                _append(number, lines, size)
            finally:
                os.close(number)
        except OSError as error:
            cause = f"tuning records cannot be written: {error.strerror}"
            raise InputError(cause, place=str(path), hint="check the disk and the folder's permissions") from None


def _heading(kernel: Kernel, target: Target, threads: int) -> Heading:
    spelled = f"{target} threads={threads}"
    return Heading(_FORMAT, kernel.hash, kernel.signature, spelled, versions.found(), kernel.name)


def _whole(number: int) -> int:
    """Cut off a last line that has no end; the size that is left."""
    size = os.fstat(number).st_size
    kept = size
    while kept:
        start = max(0, kept - 65536)
        block = os.pread(number, kept - start, start)
        at = block.rfind(b"\n")
        if at >= 0:
            kept = start + at + 1
            break
        kept = start
    if kept != size:
        os.ftruncate(number, kept)
    return kept


def _append(number: int, data: bytes, size: int) -> None:
    """Write all of `data`, or leave the file with its old size."""
    try:
        while data:
            data = data[os.write(number, data) :]
    except OSError:
        with suppress(OSError):
            os.ftruncate(number, size)
        raise


def _short(error: Exception) -> str:
    return str(error).splitlines()[0][:120]
