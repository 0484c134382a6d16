"""The errors a user sees: each has a place, a cause and a hint, and an exit code of the command line."""

from __future__ import annotations


class BurnishError(Exception):
    """An error with a place, a cause and a hint.

    Args:
        cause: one sentence on what is wrong, no full stop.
        place: where: a file, a node, a line of a recipe.
        hint: what the user can do about it.
    """

    exit_code = 2

    def __init__(self, cause: str, *, place: str | None = None, hint: str | None = None) -> None:
        super().__init__(cause)
        self.cause = cause
        self.place = place
        self.hint = hint

    def __str__(self) -> str:
        text = f"{self.place}: {self.cause}" if self.place else self.cause
        return f"{text}\n\nhint: {self.hint}" if self.hint else text


class InputError(BurnishError):
    """The model, the samples, an option or the output path cannot be used. Exit code 2."""


class MissingPackageError(InputError):
    """A package that an optional part needs is not installed; the hint is the pip line that mends it. Exit code 2."""


class BudgetError(BurnishError):
    """A budget or a check was missed. Exit code 1."""

    exit_code = 1


class VerificationError(BurnishError):
    """A rewrite changed what the model computes. Exit code 3."""

    exit_code = 3


class UnchangedError(BurnishError):
    """What was asked to change the model changed nothing, or nothing that it could do helps. Exit code 4."""

    exit_code = 4
