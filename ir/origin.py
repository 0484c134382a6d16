"""Where a model came from: the files its weights are read from while it lives, and what was odd about them."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import onnx_ir as oir

from burnish.ir.walk import graphs

# Kept with the main graph, since a clone of a model keeps the `meta` of its graphs and loses its own.
_FILES = "burnish.files"
_NOTES = "burnish.notes"
_ANNOTATED = "burnish.annotated"


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


def note_annotations(model: oir.Model) -> None:
    """Remember, before types are inferred, whether most inner values of the model came with a shape."""
    if _ANNOTATED not in model.graph.meta:
        inner = [out for node in model.graph for out in node.outputs if not out.is_graph_output()]
        model.graph.meta[_ANNOTATED] = 2 * sum(out.shape is not None for out in inner) >= len(inner)


def came_annotated(model: oir.Model) -> bool:
    """Whether most inner values came with a shape; True when `note_annotations` was never called."""
    return bool(model.graph.meta.get(_ANNOTATED, True))
