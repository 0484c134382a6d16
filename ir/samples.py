"""The inputs a model is judged on."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass, field
from itertools import zip_longest

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
        groups: what the rows come from, such as a photograph or a speaker: one number or text for all rows, [1], or one
            for each, [rows]. What comes from one thing is never parted, and counts once where errors are estimated.
    """

    name: str
    feeds: dict[str, np.ndarray] = field(repr=False)
    labels: np.ndarray | None = field(default=None, repr=False)
    groups: np.ndarray | None = field(default=None, repr=False)


def linked(marks: Sequence[Iterable[Hashable]]) -> list[int]:
    """Which items share a mark, themselves or through others: a number for each item, from 0 in order of appearance."""
    parent = list(range(len(marks)))

    def root(index: int) -> int:
        while parent[index] != index:
            parent[index] = parent[parent[index]]
            index = parent[index]
        return index

    first: dict[Hashable, int] = {}
    for index, own in enumerate(marks):
        for mark in own:
            parent[root(index)] = root(first.setdefault(mark, index))
    numbers: dict[int, int] = {}
    return [numbers.setdefault(root(index), len(numbers)) for index in range(len(marks))]


def kin(samples: Sequence[Sample]) -> list[int]:
    """Which samples have rows of the same groups, as `linked`; one without groups is by itself."""
    return linked([[] if one.groups is None else one.groups.tolist() for one in samples])


def families(samples: Sequence[Sample]) -> list[list[Sample]]:
    """The samples, those with rows of the same groups together."""
    found: dict[int, list[Sample]] = {}
    for number, sample in zip(kin(samples), samples, strict=True):
        found.setdefault(number, []).append(sample)
    return list(found.values())


def interleaved(samples: Sequence[Sample]) -> list[Sample]:
    """The first of each group, then the second of each, and so on: the first few are of many groups."""
    rounds = zip_longest(*families(samples))
    return [one for each in rounds for one in each if one is not None]


def halves(samples: Sequence[Sample]) -> tuple[list[Sample], list[Sample]]:
    """Every other sample, and the others; those with rows of the same groups count as one."""
    found = families(samples)
    return sum(found[::2], []), sum(found[1::2], [])


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
