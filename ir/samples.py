"""The inputs a model is judged on."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np

IGNORED = -100
"""The label of a row without one, as torch has it."""


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


def are_pairs(labels: Iterable[np.ndarray]) -> bool:
    """Whether labels tell queries from documents, of which there is one for each query at least.

    A query is labelled with its key, 0 or more, a document with -1 - key.
    """
    found = [np.asarray(one).reshape(-1) for one in labels]
    if not found or any(one.dtype.kind not in "iu" for one in found):
        return False
    keys = np.concatenate([one.astype(np.int64) for one in found])
    queries = keys[keys >= 0]
    return len(queries) > 0 and bool(np.isin(queries, -1 - keys[keys < 0]).all())
