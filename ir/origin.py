"""Where a model came from: the files its weights are read from while it lives, and what was odd about them."""

from __future__ import annotations

from pathlib import Path

import onnx_ir as oir

from burnish.ir.walk import graphs

FILES = "burnish.files"
"""Key in `model.meta` of the absolute paths, as a tuple of `Path`, of the model file and its external data files."""

NOTES = "burnish.notes"
"""Key in `model.meta` of a list of sentences on what the reader mended or dropped."""


def files(model: oir.Model) -> tuple[Path, ...]:
    """The files that must stay as they are while `model` is in use: what it was read from and what its tensors map."""
    found = dict.fromkeys(model.meta.get(FILES, ()))
    for graph in graphs(model):
        for value in graph.initializers.values():
            if isinstance(value.const_value, oir.ExternalTensor):
                found[Path(value.const_value.path)] = None
    return tuple(found)


def notes(model: oir.Model) -> tuple[str, ...]:
    """What the reader mended or dropped, one sentence each."""
    return tuple(model.meta.get(NOTES, ()))
