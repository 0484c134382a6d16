"""A difference between a model and its lock, and the report of all of them."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum

from burnish.tools.check.lock import Lock


class Field(StrEnum):
    """What can differ; the names of the fields in tolerance files and reports."""

    INPUTS = "inputs"
    OUTPUTS = "outputs"
    OPSETS = "opsets"
    STRUCTURE = "structure"
    OPERATORS = "operators"
    VIEWS = "views"
    NODES = "nodes"
    PARAMETERS = "parameters"
    BYTES = "bytes"
    MULTIPLY_ADDS = "multiply-adds"
    PEAK_ACTIVATION = "peak-activation"
    WEIGHTS = "weights"
    VALUES = "values"
    METRIC = "metric"
    PASSES = "passes"
    LATENCY = "latency"


class Verdict(StrEnum):
    """What a difference means."""

    REGRESSION = "regression"
    TOLERATED = "tolerated"
    NOTE = "note"


@dataclass(frozen=True)
class Difference:
    """One thing that differs.

    Attributes:
        field: what.
        verdict: whether it may be so. A note says what a regression leads to or what could not be compared.
        message: one sentence as a person would say it, without a full stop: "input `mask` became float".
        place: where in the model: `block 7`, the name of a node, of an input or an output; empty for the whole model.
        old, new: the values as text, where there are two to show.
        key: path of the value in the lock file, for showing its line: ("inputs", "mask"); the longest existing prefix
            counts.
    """

    field: Field
    verdict: Verdict
    message: str
    place: str = ""
    old: str = ""
    new: str = ""
    key: tuple[str | int, ...] = ()


@dataclass(frozen=True)
class Report:
    """What `check run` found.

    Attributes:
        model: the model's path or name.
        lock: the path of the lock file.
        differences: all of them, regressions first, then in the order of the fields.
        old: the lock that was read.
        new: the lock of the model as it is; where it is within tolerance it keeps the old figures.
    """

    model: str
    lock: str
    old: Lock
    new: Lock
    differences: tuple[Difference, ...] = field(default=())

    @property
    def regressions(self) -> tuple[Difference, ...]:
        """What may not be so."""
        return tuple(one for one in self.differences if one.verdict is Verdict.REGRESSION)

    @property
    def passed(self) -> bool:
        """Whether nothing regressed."""
        return not self.regressions
