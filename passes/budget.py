"""What the user allows and wants: the largest drop of a metric, the smallest size, the shortest time."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Literal

from burnish.ir.errors import BudgetError, InputError, UnchangedError

Objective = Literal["size", "latency"]
OBJECTIVES: tuple[Objective, ...] = ("size", "latency")

_NUMBER = re.compile(r"\s*((?:\d+(?:\.\d*)?|\.\d+)(?:e[+-]?\d+)?)\s*(%?)\s*", re.IGNORECASE)

_EXAMPLES = {
    "--max-drop": "`--max-drop 1%`, or `--max-drop 0.01` in the metric's own unit",
    "--max-size": "`--max-size 50%`, or a number of bytes",
    "--max-latency": "`--max-latency 80%`",
}


@dataclass(frozen=True)
class Amount:
    """A number as the user gave it: a share of the original's (`1%`), or in the unit itself (`0.01`)."""

    number: float
    relative: bool

    def of(self, original: float) -> float:
        """The number in the unit of `original`."""
        return self.number * abs(original) if self.relative else self.number

    def __str__(self) -> str:
        return f"{100 * self.number:g} %" if self.relative else f"{self.number:g}"


@dataclass(frozen=True)
class Budget:
    """What is allowed and wanted.

    Attributes:
        drop: by how much the metric may get worse: `1%` of what the original has, or `0.01` in the metric's own unit;
            None for as much as the target takes.
        size: bytes of constants to come down to, `50%` of the original's or a number; None for no such target.
        latency: the time of a run to come down to, as a share of the original's; None for no such target.
        objective: what is made as small as the drop allows.
    """

    drop: Amount | None = None
    size: Amount | None = None
    latency: Amount | None = None
    objective: Objective = "size"

    @property
    def wanted(self) -> Amount | None:
        """The size or the time to come down to; None where there is no such target."""
        return self.size or self.latency

    @property
    def missed(self) -> type[BudgetError | UnchangedError]:
        """The error where nothing that was found makes it smaller or faster: a target is missed, or nothing changes."""
        return UnchangedError if self.wanted is None else BudgetError

    def __bool__(self) -> bool:
        return any(one is not None for one in (self.drop, self.size, self.latency))


def amount(text: str | float | None, option: str) -> Amount | None:
    """The amount that `1%`, `0.01` or a number says.

    Args:
        text: what the user gave.
        option: its name, for the error.

    Raises:
        InputError: it is no amount, or a size or a time of more than 100 %.
    """
    if text is None:
        return None
    found = _NUMBER.fullmatch(str(text))
    number = math.inf if found is None else float(found[1])
    if found is None or math.isinf(number):
        raise InputError(f"`{text}` is no amount", place=option, hint=f"write {_EXAMPLES[option]}")
    if found[2] and number > 100 and option != "--max-drop":
        raise InputError(f"`{text}` is more than the whole", place=option, hint="give at most 100%")
    return Amount(number / 100, True) if found[2] else Amount(number, False)


def budget(
    max_drop: str | float | None = None,
    max_size: str | float | None = None,
    max_latency: str | float | None = None,
    objective: str | None = None,
) -> Budget:
    """The budget of options as users write them.

    Raises:
        InputError: one cannot be read, or bounds what is not the objective.
    """
    latency = amount(max_latency, "--max-latency")
    if latency is not None and not latency.relative:
        raise InputError(
            f"`{max_latency}` is no share of the original's time", place="--max-latency", hint="write `80%`"
        )
    if objective is not None and objective not in OBJECTIVES:
        raise InputError(f"there is no objective `{objective}`", place="--objective", hint="it is `size` or `latency`")
    chosen: Objective = "latency" if objective == "latency" or (objective is None and latency is not None) else "size"
    size = amount(max_size, "--max-size")
    if size is not None and not size.relative and size.number < 1:
        raise InputError(
            f"`{max_size}` is less than a byte", place="--max-size", hint=f"write `{100 * size.number:g}%` for a share"
        )
    for option, bound, unit in (("--max-size", size, "size"), ("--max-latency", latency, "latency")):
        if bound is not None and chosen != unit:
            raise InputError(
                f"the objective is {chosen}, and a search brings down only what is its objective",
                place=option,
                hint="leave it out, or make two runs, one behind the other",
            )
    return Budget(amount(max_drop, "--max-drop"), size, latency, chosen)
