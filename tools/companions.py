"""What is written beside a model for runtimes that need more than the model itself."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
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


@contextmanager
def staged(graph: oir.Model, path: Path) -> Iterator[onnx_writer.Staged]:
    """Write that graph aside, to be moved into its folder beside a model by `commit`.

    Args:
        graph: what `compressor` gave.
        path: of the model.

    Raises:
        InputError: the folder cannot be made, or its file not be written; nothing is left behind then.
    """
    folder = path.parent / COMPRESS
    try:
        folder.mkdir(exist_ok=True)
    except OSError as error:
        raise InputError(
            f"the folder of the graph that makes caches smaller cannot be made: {error.strerror}",
            place=str(folder),
            hint="write the model into another folder",
        ) from error
    try:
        with onnx_writer.staged(graph, folder / path.name) as one:
            yield one
    finally:
        with suppress(OSError):  # it holds something
            folder.rmdir()
