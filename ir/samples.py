"""The inputs a model is judged on."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np


@dataclass(frozen=True)
class Sample:
    """One set of inputs.

    Attributes:
        name: says what is special about it ("left-padded mask, batch 2, sequence 7"); shown in reports.
        feeds: an array for every input of the model, by name.
        labels: what the outputs should be, for a metric of the user's; any shape.
    """

    name: str
    feeds: dict[str, np.ndarray] = field(repr=False)
    labels: np.ndarray | None = field(default=None, repr=False)
