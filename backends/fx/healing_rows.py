"""Samples cut into rows, split and put together anew for the steps of training."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import onnx_ir as oir

from burnish.ir.errors import InputError
from burnish.ir.samples import Sample, families


def rows(samples: Sequence[Sample], model: oir.Model) -> tuple[list[Sample], bool]:
    """The samples, cut into samples of one row each where the model takes any number of rows.

    Args:
        samples: what to train on.
        model: it takes any number of rows when all its inputs have the same symbol for their first axis.

    Returns:
        The samples, and whether they may be joined along the first axis.
    """
    symbols = {value.shape[0] if value.shape is not None and len(value.shape) else None for value in model.graph.inputs}
    (symbol,) = symbols if len(symbols) == 1 else (None,)
    if not isinstance(symbol, oir.SymbolicDim) or symbol.value is None:
        return list(samples), False
    names = [str(value.name) for value in model.graph.inputs]
    found: list[Sample] = []
    for sample in samples:
        count = {len(sample.feeds[name]) for name in names if name in sample.feeds}
        if len(count) != 1 or (sample.labels is not None and np.shape(sample.labels)[:1] != (*count,)):
            return list(samples), False
        found += _cut(sample, count.pop())
    return found, True


def _cut(sample: Sample, count: int) -> Iterable[Sample]:
    if count == 1:
        return [sample]
    groups = sample.groups if sample.groups is None or len(sample.groups) == count else np.repeat(sample.groups, count)
    return [
        Sample(
            f"{sample.name}, row {i}",
            {name: array[i : i + 1] for name, array in sample.feeds.items()},
            None if sample.labels is None else sample.labels[i : i + 1],
            None if groups is None else groups[i : i + 1],
        )
        for i in range(count)
    ]


def joined(parts: Sequence[Sample]) -> list[Sample]:
    """Samples whose arrays agree in all axes but the first as one, the others apart."""
    alike: dict[object, list[Sample]] = {}
    for part in parts:
        arrays = {**part.feeds, "": part.labels if part.labels is not None else np.zeros(0)}
        key = tuple((name, array.shape[1:], str(array.dtype)) for name, array in sorted(arrays.items()))
        alike.setdefault(key, []).append(part)
    return [one[0] if len(one) == 1 else _together(one) for one in alike.values()]


def _together(parts: Sequence[Sample]) -> Sample:
    feeds = {name: np.concatenate([part.feeds[name] for part in parts]) for name in parts[0].feeds}
    labels = [part.labels for part in parts if part.labels is not None]
    return Sample(f"{parts[0].name} and others", feeds, np.concatenate(labels) if labels else None)


class Batches:
    """The batches of training and those that are held out.

    Args:
        samples: at least two rows or, where they cannot be cut, two samples.
        model: whose inputs they are.
        batch: rows of a batch.
        share: of the rows to be held out, at least one; of their groups, where there are several.
        seed: of the split and of the batches.
        rank, world: this process takes each `world`-th row of each batch, from `rank` on.

    Attributes:
        training: the samples of each batch; none where other processes have all its rows.
        held_out: likewise.

    Raises:
        InputError: there are too few.
    """

    def __init__(
        self, samples: Sequence[Sample], model: oir.Model, batch: int, share: float, seed: int, rank: int, world: int
    ) -> None:
        found, self.joins = rows(samples, model)
        if len(found) < 2:
            raise InputError(
                "healing needs two samples at least, one of which is held out",
                hint="give more samples; those of a model with a symbolic batch are cut into rows",
            )
        apart = families(found)
        members = apart if len(apart) > 1 else [[one] for one in found]
        order = np.random.default_rng([seed, 0]).permutation(len(members))
        out = min(max(1, round(share * len(members))), len(members) - 1)
        chosen = [[one for group in part for one in members[group]] for part in (order[out:], order[:out])]
        self.training, self.held_out = (
            [self._batch(part[i : i + batch][rank::world]) for i in range(0, len(part), batch)] for part in chosen
        )
        self._seed = seed

    def _batch(self, parts: list[Sample]) -> list[Sample]:
        return joined(parts) if self.joins else parts

    def at(self, step: int) -> int:
        """The number of the batch of a step: all of them in each round, in an order of its own."""
        count = len(self.training)
        return int(np.random.default_rng([self._seed, 1, step // count]).permutation(count)[step % count])
