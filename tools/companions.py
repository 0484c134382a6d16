"""What is written beside a model for runtimes that need more than the model itself."""

from __future__ import annotations

from pathlib import Path

import onnx_ir as oir

from burnish.backends import onnx_writer
from burnish.ir.errors import InputError
from burnish.passes import kv_budget, kv_compress

COMPRESS = "compress"
"""The folder beside a model for the graph that makes its caches smaller; it is called as the model is."""


def write(model: oir.Model, path: Path) -> list[Path]:
    """Write the graph that is run behind a prompt of a decoder with budgets; nothing for other models.

    `burnish generate` makes it anew of what the model says, and needs no such file.

    Args:
        model: what was written.
        path: where.

    Returns:
        The files.

    Raises:
        InputError: the folder cannot be made, or its file not be written.
    """
    budget = kv_budget.read(model)
    if budget is None:
        return []
    folder = path.parent / COMPRESS
    try:
        folder.mkdir(exist_ok=True)
    except OSError as error:
        raise InputError(f"it cannot be made: {error.strerror}", place=str(folder)) from error
    return onnx_writer.write(kv_compress.compressor(model, budget), folder / path.name)
