"""Samples in two parts: one that edits are fitted to and scored on, one that the result is verified on."""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import onnx_ir as oir

from burnish.frontends.batch import batch_axes
from burnish.frontends.synthesis import Runs
from burnish.ir.errors import InputError
from burnish.ir.samples import Sample, are_pairs, linked

_ENOUGH = 20
"""Samples from which on batches are not cut: ten for the error of a measurement in each part."""

_PIECES = 10
"""Samples that a part is cut into at least, where it has as many rows."""

_TRIED = 8
"""Rows that a model is given to see whether they meet."""

_ROUNDING = 0.05
"""What other rows of a batch may change in one, relative to the largest number: int8 scales are taken over a batch."""

_ALL = None
"""Stands for the rows of every class."""


@dataclass(frozen=True)
class Split:
    """Samples in two parts that share nothing.

    Attributes:
        fit: what edits are fitted to and scored on.
        held_out: what the result is verified on.
        how: what was done, in plain words.
    """

    fit: list[Sample]
    held_out: list[Sample]
    how: str


@dataclass(frozen=True)
class _Unit:
    """A sample, or one row of its batch: what goes into a part as a whole.

    Attributes:
        source: the place of the sample.
        row: the row of its batch; None for the whole sample.
        rows: how many rows it has.
        labels: what is known of them.
        digest: the same for the same inputs.
        groups: what its rows come from, where that is known.
    """

    source: int
    row: int | None
    rows: int
    labels: np.ndarray | None = field(repr=False)
    digest: bytes = field(repr=False)
    groups: np.ndarray | None = field(default=None, repr=False)


def split(
    samples: Sequence[Sample], model: oir.Model, runner: Runs | None = None, *, share: float = 0.5, seed: int = 0
) -> Split:
    """Two parts of the samples, the same for the same seed.

    Fewer than 20 samples are cut into the rows of their batches, where the model's batch is dynamic and the labels, if
    there are any, have a first axis of as many entries. The rows of a sample that come into one part are batches again,
    of a size that makes at least ten samples of a part, in their old order. Rows that meet in the model, such as the
    steps of a sequence that a recurrent layer goes through, stay together.

    Samples with the same inputs stay together, and so do rows of the same group, and queries and documents (labels as
    in `burnish.ir.samples.are_pairs`) with the same key. Of labels that are one whole number for each row, each part
    gets its share of every class, as near as that can be.

    Args:
        samples: as from `read_samples`; not changed.
        model: says where the batch is.
        runner: of the model, which tells whether rows meet; without one they are taken not to.
        share: the part of all rows that is held out, between 0 and 1.
        seed: of the draw.

    Raises:
        InputError: there are no samples, or nothing can be parted.
    """
    if not 0 < share < 1:
        raise ValueError(f"the share is {share}, not between 0 and 1")
    if not samples:
        raise InputError("there are no samples to split")
    axes, fixed = _axes(model)
    pairs = all(one.labels is not None for one in samples) and are_pairs(np.asarray(one.labels) for one in samples)
    units = [_whole(one, place, axes) for place, one in enumerate(samples)]
    groups = _together(units, pairs)
    if len(samples) < _ENOUGH or len(groups) < 2:
        if runner is not None and axes and _meet(samples, axes, runner):
            axes, fixed = {}, "its rows change each other's outputs"
        units = [unit for place, one in enumerate(samples) for unit in _cut(one, place, axes)]
        groups = _together(units, pairs)
    if len(groups) < 2:
        raise InputError(
            f"the samples cannot be split into a part to fit and a part to verify: {_why(samples, units, fixed)}",
            place=f"sample `{samples[0].name}`" if len(samples) == 1 else None,
            hint="give more samples, 20 or more where that is possible",
        )
    classes = not pairs and all(_has_classes(unit) for unit in units)
    held = _draw(groups, share, seed, classes)
    parts = [
        _gathered(
            [unit for group, out in zip(groups, held, strict=True) if out == part for unit in group], samples, axes
        )
        for part in (False, True)
    ]
    rows = [
        sum(unit.rows for group, out in zip(groups, held, strict=True) if out == part for unit in group)
        for part in (False, True)
    ]
    kind = "rows" if any(unit.row is not None for unit in units) else "samples"
    count = rows if kind == "rows" else [len(part) for part in parts]
    how = f"{count[0]} {kind} to fit, {count[1]} held out"
    how += ", each class in both" if classes else ", queries beside their documents" if pairs else ""
    if any(one.groups is not None for one in samples):
        how += f"; no group is in both ({held.count(False)} to fit, {held.count(True)} held out)"
    return Split(parts[0], parts[1], how)


def few(
    samples: Sequence[Sample], model: oir.Model, *, rows: int, least: int, places: int = 1, enough: int = 0
) -> list[Sample]:
    """Samples of as many rows, spread evenly over all of them: what a rough measurement is made on.

    Args:
        samples: all there are.
        model: says where the batch is; a sample without one is one row.
        rows: how many rows there are to be, about, if there are as many.
        least: how many samples there are to be, if there are as many.
        places: what a sample has that is measured by itself, such as the words of a text.
        enough: two samples or more do as well, if they have so many places.
    """
    mean = row_count(samples, model) / max(len(samples), 1)
    if enough:
        least = min(least, max(2, math.ceil(enough / max(places, 1))))
        mean = max(mean, min(places, rows / 2))
    count = min(len(samples), max(least, math.ceil(rows / max(mean, 1))))
    return [samples[index * len(samples) // count] for index in range(count)]


def row_count(samples: Sequence[Sample], model: oir.Model) -> int:
    """Rows of the batches of all samples; one without a batch is one row."""
    axes, _ = _axes(model)
    return sum(_rows(one, axes) or 1 for one in samples)


def independent(samples: Sequence[Sample], model: oir.Model) -> int:
    """Rows of the batches of all samples, those of one group counted once."""
    groups = {group for one in samples if one.groups is not None for group in one.groups.tolist()}
    return len(groups) + row_count([one for one in samples if one.groups is None], model)


def _axes(model: oir.Model) -> tuple[dict[str, int], str]:
    """The batch axes, or none and why."""
    try:
        return batch_axes(model), ""
    except InputError as error:
        return {}, error.cause


def _rows(sample: Sample, axes: Mapping[str, int]) -> int | None:
    """The rows of the batch; None where the inputs do not agree or there is no batch."""
    counts = {array.shape[axes[name]] for name, array in sample.feeds.items() if name in axes}
    return counts.pop() if len(counts) == 1 else None


def _meet(samples: Sequence[Sample], axes: Mapping[str, int], runner: Runs) -> bool:
    """Whether every other row of a batch, in reversed order, has other outputs than among all, or cannot be run."""
    sample = max(samples, key=lambda one: min(_rows(one, axes) or 0, _TRIED))
    count = min(_rows(sample, axes) or 0, _TRIED)
    if count < 2:
        return False
    some = np.arange(count)[::-2]
    try:
        whole = runner.run(_taken(sample.feeds, axes, np.arange(count)))
        part = runner.run(_taken(sample.feeds, axes, some))
    except InputError:
        return True
    return not all(_has_rows(part[name], array, some, count) for name, array in whole.items())


def _has_rows(part: np.ndarray, whole: np.ndarray, rows: np.ndarray, count: int) -> bool:
    """Whether one output holds these rows of another of `count` rows, along any axis, or both are the same."""
    if not isinstance(whole, np.ndarray):
        return True
    fit = [axis for axis, size in enumerate(whole.shape) if size == count]
    return any(_near(part, one) for one in (whole, *(whole.take(rows, axis=axis) for axis in fit)))


def _near(one: np.ndarray, other: np.ndarray) -> bool:
    if one.shape != other.shape or other.dtype.kind not in "fV":
        return np.array_equal(one, other)
    a, b = one.astype(np.float64), other.astype(np.float64)
    most = np.abs(b[np.isfinite(b)]).max(initial=0.0)
    return np.allclose(a, b, rtol=0, atol=_ROUNDING * most, equal_nan=True)


def _labels(sample: Sample) -> np.ndarray | None:
    return None if sample.labels is None else np.asarray(sample.labels)


def _digest(feeds: Mapping[str, np.ndarray]) -> bytes:
    found = hashlib.blake2b(digest_size=16)
    for name, array in sorted(feeds.items()):
        found.update(f"{name} {array.dtype} {array.shape};".encode())
        found.update(repr(array.tolist()).encode() if array.dtype == object else array.tobytes())
    return found.digest()


def _whole(sample: Sample, place: int, axes: Mapping[str, int]) -> _Unit:
    return _Unit(place, None, _rows(sample, axes) or 1, _labels(sample), _digest(sample.feeds), sample.groups)


def _cut(sample: Sample, place: int, axes: Mapping[str, int]) -> list[_Unit]:
    """The rows of a sample, or the sample where it cannot be cut."""
    rows, labels = _rows(sample, axes), _labels(sample)
    named = sample.groups is None or len(sample.groups) in (1, rows)
    if rows is None or rows < 2 or not named or (labels is not None and (labels.ndim == 0 or len(labels) != rows)):
        return [_whole(sample, place, axes)]
    return [
        _Unit(
            place,
            row,
            1,
            None if labels is None else labels[row : row + 1],
            _digest(_taken(sample.feeds, axes, np.array([row]))),
            _groups(sample, np.array([row])),
        )
        for row in range(rows)
    ]


def _groups(sample: Sample, rows: np.ndarray) -> np.ndarray | None:
    return sample.groups if sample.groups is None or len(sample.groups) == 1 else sample.groups[rows]


def _taken(feeds: Mapping[str, np.ndarray], axes: Mapping[str, int], rows: np.ndarray) -> dict[str, np.ndarray]:
    return {name: array.take(rows, axis=axes[name]) if name in axes else array for name, array in feeds.items()}


def _together(units: Sequence[_Unit], pairs: bool) -> list[list[_Unit]]:
    """Units that may not be parted: those of the same inputs or groups, and with `pairs` those of the same keys."""
    marks: list[list[Hashable]] = []
    for unit in units:
        marks.append([unit.digest])
        if unit.groups is not None:
            marks[-1] += [("group", group) for group in unit.groups.tolist()]
        if pairs and unit.labels is not None:
            marks[-1] += [int(key) if key >= 0 else -1 - int(key) for key in unit.labels.reshape(-1)]
    found: dict[int, list[_Unit]] = {}
    for number, unit in zip(linked(marks), units, strict=True):
        found.setdefault(number, []).append(unit)
    return list(found.values())


def _has_classes(unit: _Unit) -> bool:
    return unit.labels is not None and unit.labels.dtype.kind in "iub" and unit.labels.size == unit.rows


def _draw(groups: Sequence[Sequence[_Unit]], share: float, seed: int, classes: bool) -> list[bool]:
    """Which groups are held out.

    One after the other, the largest first, goes where the numbers of rows, of all and of each class, stay nearest to
    the share, by the sum of squares.
    """
    amounts = [_amounts(group, classes) for group in groups]
    order = np.random.default_rng(seed).permutation(len(groups)).tolist()
    order.sort(key=lambda index: -amounts[index][_ALL])
    seen, out = Counter[int | None](), Counter[int | None]()
    held = [False] * len(groups)
    for index in order:
        seen.update(amounts[index])
        lack = sum(n * (2 * (share * seen[kind] - out[kind]) - n) for kind, n in amounts[index].items())
        if lack > 1e-9:
            held[index] = True
            out.update(amounts[index])
    if len(set(held)) == 1:
        held[order[-1]] = not held[order[-1]]
    return held


def _amounts(group: Sequence[_Unit], classes: bool) -> Counter[int | None]:
    """The rows of a group: of each class, and under `_ALL` of all."""
    found = Counter[int | None]({_ALL: sum(unit.rows for unit in group)})
    for unit in group:
        if classes and unit.labels is not None:
            found.update(unit.labels.reshape(-1).tolist())
    return found


def _gathered(units: Sequence[_Unit], samples: Sequence[Sample], axes: Mapping[str, int]) -> list[Sample]:
    """The units as samples, those of one sample's batch in a few batches."""
    size = max(1, sum(unit.rows for unit in units) // _PIECES)
    rows: dict[int, list[int]] = {}
    for unit in units:
        rows.setdefault(unit.source, []).extend([] if unit.row is None else [unit.row])
    found = []
    for place, own in sorted(rows.items()):
        sample = samples[place]
        if not own:
            found.append(sample)
            continue
        for piece in np.array_split(np.array(sorted(own)), math.ceil(len(own) / size)):
            labels = None if sample.labels is None else np.asarray(sample.labels).take(piece, axis=0)
            name = f"{sample.name}, row{f's {piece[0]} to' if len(piece) > 1 else ''} {piece[-1]}"
            found.append(Sample(name, _taken(sample.feeds, axes, piece), labels, _groups(sample, piece)))
    return found


def _why(samples: Sequence[Sample], units: Sequence[_Unit], fixed: str) -> str:
    if len(units) > 1:
        if len({unit.digest for unit in units}) == 1:
            return "all of them are the same"
        grouped = any(unit.groups is not None for unit in units)
        return f"all of them belong together, by their {'groups' if grouped else 'queries and documents'}"
    labels = samples[0].labels
    if fixed:
        return f"there is one, and {fixed}"
    if labels is not None and units[0].rows > 1:
        return f"there is one, and its labels {list(np.shape(labels))} are not one for each of {units[0].rows} rows"
    return "there is one, of one row"
