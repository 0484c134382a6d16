"""Where a model came from: the files its weights are read from while it lives, and what was odd about them."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import onnx_ir as oir

from burnish.ir.walk import graphs

# Kept with the main graph, since a clone of a model keeps the `meta` of its graphs and loses its own.
_FILES = "burnish.files"
_NOTES = "burnish.notes"


def record(model: oir.Model, files: Iterable[Path], notes: Iterable[str]) -> None:
    """Remember, in the model and all its clones, the absolute paths it was read from and what was mended or dropped."""
    model.graph.meta[_FILES] = tuple(files)
    model.graph.meta[_NOTES] = tuple(notes)


def files(model: oir.Model) -> tuple[Path, ...]:
    """The files that must stay as they are while `model` is in use: what it was read from and what its tensors map."""
    found = dict.fromkeys(model.graph.meta.get(_FILES, ()))
    for graph in graphs(model):
        for value in graph.initializers.values():
            if isinstance(value.const_value, oir.ExternalTensor):
                found[Path(value.const_value.path)] = None
    return tuple(found)


def notes(model: oir.Model) -> tuple[str, ...]:
    """What the reader mended or dropped, one sentence each."""
    kept: tuple[str, ...] = model.graph.meta.get(_NOTES, ())
    return kept
