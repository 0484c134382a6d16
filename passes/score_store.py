"""What was measured, kept on disk: a second search, or one after a kill, measures nothing twice."""

from __future__ import annotations

import hashlib
import json
import os
import sqlite3
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from burnish.ir.errors import InputError
from burnish.ir.samples import Sample

_T = TypeVar("_T")

_TABLES = """
create table if not exists scores (
    model text, samples text, measure text, edit text, found text not null,
    primary key (model, samples, measure, edit)
) without rowid;
create table if not exists timings (key text primary key, seconds real not null) without rowid;
"""
_PATIENCE = 60.0
"""Seconds to wait for another process that is writing."""


def cache_folder() -> Path:
    """Where measured numbers are kept: `$BURNISH_CACHE`, else `$XDG_CACHE_HOME/burnish`, else `~/.cache/burnish`."""
    own = os.environ.get("BURNISH_CACHE")
    if own:
        return Path(own)
    shared = os.environ.get("XDG_CACHE_HOME")
    return (Path(shared) if shared else Path("~/.cache").expanduser()) / "burnish"


def folder_in_cache(name: str) -> Path | None:
    """A folder of that name in the cache, which is made where it is missing; None where nothing can be written."""
    folder = cache_folder() / name
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        return None
    return folder if os.access(folder, os.W_OK | os.X_OK) else None


def samples_fingerprint(samples: Iterable[Sample]) -> str:
    """SHA-256, in hex, of the inputs, labels and groups of all samples, in order; their names do not count."""
    state = hashlib.sha256()
    for sample in samples:
        state.update(b"sample")
        for name, array in sorted(sample.feeds.items()):
            state.update(f"{name} {_of(array)}".encode())
        if sample.labels is not None:
            state.update(f"labels {_of(sample.labels)}".encode())
        if sample.groups is not None:
            state.update(f"groups {_of(sample.groups)}".encode())
    return state.hexdigest()


def _of(array: np.ndarray) -> str:
    data = repr(array.tolist()).encode() if array.dtype.kind in "OSU" else np.ascontiguousarray(array).tobytes()
    return f"{array.dtype} {array.shape} {hashlib.sha256(data).hexdigest()}\n"


class Store:
    """Scores and timings in one SQLite database, each there as soon as it is written.

    Several processes may read and write it at once, and one that is killed loses nothing that it wrote. A file that is
    no sound database is set aside under another name and a new one begun; where no file can be written, what is
    measured lasts as long as the store.

    Attributes:
        path: the database.
        warning: what the user should know of it, one sentence; None when all is well.
    """

    def __init__(self, path: Path | None = None) -> None:
        """Open or make a database.

        Args:
            path: its file; `scores.sqlite` in `cache_folder()` when None. Missing folders are made.
        """
        self.path = cache_folder() / "scores.sqlite" if path is None else Path(path)
        self.warning: str | None = None
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._database = _sound(self.path)
        except (OSError, sqlite3.OperationalError) as error:
            self._forget(str(error))
        except sqlite3.DatabaseError as error:
            self._set_aside(error)

    def scores(self, model: str, samples: str, measure: str) -> dict[str, Any]:
        """What is known of a model on some samples by one measure, by the key of the edit.

        Args:
            model: fingerprint of the unchanged model (`burnish.ir.text.fingerprint`).
            samples: fingerprint of the samples.
            measure: key of the measure.

        Returns:
            What `add_scores` was given; what is there and is none of that is left out.
        """
        query = "select edit, found from scores where model = ? and samples = ? and measure = ?"
        rows = self._asked(lambda: self._database.execute(query, (model, samples, measure)).fetchall())
        known = {}
        for edit, found in rows:
            with suppress(ValueError, TypeError):
                known[edit] = json.loads(found)
        return known

    def add_scores(self, model: str, samples: str, edit: str, found: Mapping[str, Any]) -> None:
        """Write what is known of one edit, on disk when this returns; earlier scores of it are replaced.

        Args:
            model, samples: as for `scores`.
            edit: key of the edit.
            found: by the key of the measure: numbers, texts, and lists and dicts of them.
        """
        rows = [(model, samples, measure, edit, json.dumps(value)) for measure, value in found.items()]
        self._write("insert or replace into scores values (?, ?, ?, ?, ?)", rows)

    def timing(self, key: str) -> float | None:
        """The seconds that were measured for `key`; None when nothing was."""
        query = "select seconds from timings where key = ?"
        row = self._asked(lambda: self._database.execute(query, (key,)).fetchone())
        return float(row[0]) if row is not None and isinstance(row[0], float) and row[0] >= 0 else None

    def add_timing(self, key: str, seconds: float) -> None:
        """Write a timing, on disk when this returns.

        Args:
            key: what was timed, on what machine and by what, as text.
            seconds: of one run.
        """
        self._write("insert or replace into timings values (?, ?)", [(key, seconds)])

    def close(self) -> None:
        """Free the database; the store cannot be used afterwards."""
        self._database.close()

    def _write(self, statement: str, rows: list[tuple[Any, ...]]) -> None:
        def written() -> None:
            with self._database:
                self._database.executemany(statement, rows)

        self._asked(written)

    def _asked(self, action: Callable[[], _T]) -> _T:
        """What `action` gives; once more, on a new database, where the old one turns out to be damaged.

        Raises:
            InputError: the disk is full, or another process does not let go of the database.
        """
        try:
            return action()
        except sqlite3.OperationalError as error:
            hint = "free some space there, or name another folder in BURNISH_CACHE"
            raise InputError(f"the scores cannot be kept: {error}", place=str(self.path), hint=hint) from error
        except sqlite3.DatabaseError as error:
            self._database.close()
            self._set_aside(error)
            return action()

    def _set_aside(self, error: Exception) -> None:
        """Rename a damaged database and begin a new one."""
        number = 1
        while (kept := self.path.with_name(f"{self.path.name}.damaged-{number}")).exists():
            number += 1
        try:
            self.path.rename(kept)
            for ending in ("-wal", "-shm"):
                self.path.with_name(self.path.name + ending).unlink(missing_ok=True)
            self._database = _sound(self.path)
        except (OSError, sqlite3.Error) as second:
            self._forget(str(second))
            return
        self.warning = f"`{self.path}` was damaged ({error}); it is `{kept.name}` now, and everything is measured anew"

    def _forget(self, cause: str) -> None:
        self._database = _prepared(sqlite3.connect(":memory:"))
        hint = "name a folder that can be written in BURNISH_CACHE"
        self.warning = f"scores are not kept, `{self.path}` cannot be used ({cause}): {hint}"


def _sound(path: Path) -> sqlite3.Connection:
    """The database at `path`, checked.

    Raises:
        sqlite3.OperationalError: it cannot be opened.
        sqlite3.DatabaseError: it is damaged, or no database at all.
    """
    database = sqlite3.connect(path, timeout=_PATIENCE)
    try:
        database.execute("pragma journal_mode = wal")
        database.execute("pragma synchronous = normal")
        verdict = database.execute("pragma quick_check(1)").fetchone()[0]
        if verdict != "ok":
            raise sqlite3.DatabaseError(verdict)
        return _prepared(database)
    except BaseException:
        database.close()
        raise


def _prepared(database: sqlite3.Connection) -> sqlite3.Connection:
    """The database with its tables.

    Raises:
        sqlite3.DatabaseError: tables of these names have other columns.
    """
    database.executescript(_TABLES)
    for table, columns in (("scores", 5), ("timings", 2)):
        if len(database.execute(f"pragma table_info({table})").fetchall()) != columns:
            raise sqlite3.DatabaseError(f"its table `{table}` is not ours")
    return database
