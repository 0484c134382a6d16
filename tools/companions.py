"""What is written beside a model for runtimes that need more than the model itself."""

from __future__ import annotations

from pathlib import Path

import onnx_ir as oir

from burnish.backends import onnx_writer
from burnish.ir.errors import InputError
from burnish.passes import kv_budget, kv_compress

COMPRESS = "compress"
"""The folder beside a model for the graph that makes its caches smaller; it is called as the model is."""


def compressor(model: oir.Model) -> oir.Model | None:
    """The graph that is run behind a prompt of a decoder with budgets; None for other models.

    `burnish generate` makes it anew of what the model says, and needs no file of it.

    Raises:
        InputError: another pass has changed the caches since they got budgets.
    """
    budget = kv_budget.read(model)
    return None if budget is None else kv_compress.compressor(model, budget)


def write(graph: oir.Model, path: Path) -> list[Path]:
    """Write that graph into its folder beside a model.

    Args:
        graph: what `compressor` gave.
        path: of the model.

    Returns:
        The files.

    Raises:
        InputError: the folder cannot be made, or its file not be written.
    """
    folder = path.parent / COMPRESS
    try:
        folder.mkdir(exist_ok=True)
    except OSError as error:
        raise InputError(f"it cannot be made: {error.strerror}", place=str(folder)) from error
    return onnx_writer.write(graph, folder / path.name)
