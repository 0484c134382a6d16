"""Observing many samples: how long each takes, and what a run that was killed goes on from.

After each `EVERY` samples the states of the reducers are kept in a file, and once more at the end, since what follows
may take longer than observing. Runs over fewer samples keep nothing. Files are named by the model, the samples and what
is observed, so that only the same work finds them; a caller deletes them when its own work is done (`Book.forget`).
"""

from __future__ import annotations

import hashlib
import os
import shutil
import time
import zipfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import onnx_ir as oir

from burnish.ir.errors import InputError
from burnish.ir.samples import Sample
from burnish.ir.text import fingerprint
from burnish.passes.reducers import Reducer
from burnish.passes.score_store import samples_fingerprint

EVERY = 64
"""Samples between two files."""

_ROOM = 4
"""How many times its size has to be free on the disk for a file to be kept."""

OnSample = Callable[[int, int], None]
"""Is told how many samples a run has seen, and how many there are."""


class Book:
    """What is kept of the runs of one caller over its samples.

    Args:
        folder: where files are kept; None to keep none.
        on_sample: progress.

    Attributes:
        files: what was written and found.
        samples: how many samples were run, over all runs.
        seconds: how long they took.
    """

    def __init__(self, folder: Path | None = None, on_sample: OnSample = lambda done, total: None) -> None:
        self.folder, self.on_sample = folder, on_sample
        self.files: list[Path] = []
        self.samples, self.seconds = 0, 0.0

    def page(self, model: oir.Model, samples: Sequence[Sample], reducers: Mapping[str, Reducer]) -> Page:
        """A page for one run over samples.

        Args:
            model: what is run.
            samples: what it is run on.
            reducers: of the values that are observed, under keys that name value, rows and options.
        """
        file = None
        if self.folder is not None and len(samples) > EVERY:
            text = "\n".join([fingerprint(model), samples_fingerprint(samples), *reducers])
            file = self.folder / f"{hashlib.sha256(text.encode()).hexdigest()[:24]}.npz"
            self.files.append(file)
        return Page(self, file, len(samples), list(reducers.values()))

    def forget(self) -> None:
        """Delete the files, with what killed processes have left of writing them."""
        for file in self.files:
            for one in (file, *file.parent.glob(f"{file.stem}.*.partial")):
                one.unlink(missing_ok=True)


class Page:
    """One run: where it begins, and what is told of it.

    Attributes:
        start: samples that the reducers have seen already.
    """

    def __init__(self, book: Book, file: Path | None, total: int, reducers: Sequence[Reducer]) -> None:
        self.book, self.file, self.total, self.reducers = book, file, total, reducers
        self.start = self._found()
        self._since = time.monotonic()

    def seen(self, count: int) -> None:
        """A sample was observed, the one of this number, from 1 on."""
        now = time.monotonic()
        self.book.samples, self.book.seconds = self.book.samples + 1, self.book.seconds + now - self._since
        self.book.on_sample(count, self.total)
        if self.total > EVERY and (count % EVERY == 0 or count == self.total):
            self._keep(count)
        self._since = time.monotonic()

    def _keep(self, count: int) -> None:
        states = [one.state() for one in self.reducers]  # also where nothing is kept: it adds up what waits
        if self.file is None:
            return
        held = {f"{index}.{name}": array for index, one in enumerate(states) for name, array in one.items()}
        if shutil.disk_usage(self.file.parent).free < _ROOM * sum(array.nbytes for array in held.values()):
            return
        partial = self.file.with_suffix(f".{os.getpid()}.partial")
        try:
            with partial.open("wb") as stream:
                np.savez(stream, allow_pickle=False, count=np.asarray(count), **held)
            os.replace(partial, self.file)
        except OSError:
            partial.unlink(missing_ok=True)

    def _found(self) -> int:
        """Let the reducers go on from a file; how many samples they have seen then."""
        if self.file is None or not self.file.exists():
            return 0
        try:
            with np.load(self.file, allow_pickle=False) as kept:
                count = int(kept["count"])
                names: list[dict[str, str]] = [{} for _ in self.reducers]
                for key in kept.files:
                    index, _, name = key.partition(".")
                    if name:
                        names[int(index)][name] = key
                for own, held in zip(self.reducers, names, strict=True):
                    own.take_over(own.restored({name: kept[key] for name, key in held.items()}))
        except (OSError, ValueError, KeyError, IndexError, InputError, zipfile.BadZipFile, EOFError):
            for own in self.reducers:
                own.take_over(own.fresh())
            return 0
        return count
