"""Options of `optimize` that need one another, or the model."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from importlib.util import find_spec
from typing import Any

import onnx_ir as oir

from burnish.ir.concrete import concrete
from burnish.ir.errors import InputError, MissingPackageError, UnchangedError
from burnish.passes import plan
from burnish.passes.pipeline import Step


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


def check_required(names: Sequence[str], steps: Sequence[Step]) -> None:
    """Refuse a run in which a pass that has to change something changed nothing.

    Raises:
        UnchangedError: there is such a pass; with the reasons that it gave.
    """
    for name in names:
        own = [step for step in steps if step.outcome.name == name]
        if any(step.outcome.rewritten for step in own):
            continue
        undone = next((step.undone for step in own if step.undone), "")
        reasons = Counter(skip.reason for step in own for skip in step.outcome.skipped)
        why = (
            undone or "; ".join(f"{reason} ({count})" for reason, count in reasons.most_common(3)) or "it found no site"
        )
        raise UnchangedError(
            f"`{name}` was required to change the model and changed nothing: {why}",
            hint=f"`--why {name}` lists every site; nothing was written",
        )
