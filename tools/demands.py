"""Options of `optimize` that need one another, or the model."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

import onnx_ir as oir

from burnish.ir.concrete import concrete
from burnish.ir.errors import InputError, MissingPackageError
from burnish.passes import plan


def check_use(todo: plan.Plan, **given: Any) -> None:
    """Refuse options of a lossy stage or a search where there is none, and healing where torch is missing."""
    if todo.heal and todo.lossy and find_spec("torch") is None:
        raise MissingPackageError("healing needs PyTorch, which is not installed", hint="pip install 'burnish[torch]'")
    for name in (name for name, value in given.items() if value):
        lossy = name in ("metric", "heal")
        if not (todo.lossy if lossy else todo.budget):
            raise InputError(
                f"`{name}` is for {'lossy passes' if lossy else 'a search within a budget'}, and there is none",
                hint="give a budget, such as `--max-drop 1%`" + (", or lossy passes with `-p`" if lossy else ""),
            )


def specialised(model: oir.Model, dims: str) -> oir.Model:
    """The model with numbers for dynamic dimensions of its inputs, as they are written in `dims`.

    Raises:
        InputError: they cannot be read, or name no dimension.
    """
    from burnish.tools.subject import parse_dims

    numbers = parse_dims(dims, model)
    return concrete(model, numbers) if numbers else model
