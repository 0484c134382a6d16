"""Ready-made measures: how far a model is from the original, and how well it does what its labels ask for.

`burnish.passes.measure_choice` picks one for a model. All of them keep little of a sample. An edited model that gives
NaN is as bad as can be; an original that does is refused where it is compared with.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from burnish.ir.errors import InputError
from burnish.ir.samples import IGNORED, Sample
from burnish.passes import metrics
from burnish.passes.criticality import Reading
from burnish.passes.protocols import Measure
from burnish.passes.reducers import rows_of
from burnish.passes.sites import Keep

Outputs = Mapping[str, np.ndarray]

_OTHERS = "`agreement` needs no labels, and a function of your own (`--metric package.module:function`) may take any"

_FOLDS = 10
"""Parts of the samples that the jackknife leaves out in turn."""


class RowMeasure(ABC):
    """What the measures of one output share.

    Args:
        look: the output, and what it is read as.
        keep: the rows of the output that are no padding; all count when absent.
    """

    name: str
    higher_is_better: bool = True

    def __init__(self, look: Reading, keep: Keep | None = None) -> None:
        self.look, self.keep = look, keep

    @property
    def key(self) -> str:
        """The name, with the output, what it is read as and which rows count."""
        return f"{self.name} of {self.look.output} as {self.look.kind} where {self.keep}"

    @abstractmethod
    def partial(self, outputs: Outputs, reference: Outputs, sample: Sample) -> Any:
        """What is kept of one sample; see `Measure`."""

    @abstractmethod
    def value(self, partials: Sequence[Any]) -> float:
        """The number over all samples; see `Measure`."""

    def places(self, outputs: Outputs, sample: Sample) -> int:
        """How many rows of a sample choose among classes, each by itself, padding included; 1 of what does not."""
        array = self._array(outputs, sample)
        many = self.look.kind in ("logits", "probabilities") and array.ndim > 1 and array.shape[-1] > 1
        return array.size // array.shape[-1] if many else 1

    def check(self, reference: Outputs, sample: Sample) -> None:
        """Raise InputError where what the original computes is no number: nothing can be measured against it."""
        self._sound(self._values(self._array(reference, sample), sample), sample)

    def choices(self, partials: Sequence[Any]) -> int:
        """How many rows these are of that are right or wrong, each as a whole; 0 of a measure that counts no such."""
        return 0

    def _array(self, outputs: Outputs, sample: Sample) -> np.ndarray:
        array = outputs.get(self.look.output)
        if not isinstance(array, np.ndarray):
            raise InputError(f"the model gives no array `{self.look.output}`", place=f"sample `{sample.name}`")
        return array

    def _matrix(self, array: np.ndarray, sample: Sample, axis: int | None = -1) -> np.ndarray:
        """The rows that count, [rows, classes], in the output's dtype."""
        return rows_of(array, axis if array.ndim else None, self._kept(array, sample))

    def _kept(self, array: np.ndarray, sample: Sample) -> np.ndarray | None:
        return None if self.keep is None else kept_rows(array, self.keep, sample)

    def _pair(self, outputs: Outputs, reference: Outputs, sample: Sample) -> tuple[np.ndarray, np.ndarray]:
        """The output of the original, which holds no NaN, and that of the other model, of one shape."""
        original, other = self._array(reference, sample), self._array(outputs, sample)
        if original.shape != other.shape:
            raise InputError(
                f"output `{self.look.output}` has the shape {list(other.shape)}, the original's {list(original.shape)}",
                place=f"sample `{sample.name}`",
            )
        self.check(reference, sample)
        return original, other

    def _values(self, array: np.ndarray, sample: Sample) -> np.ndarray:
        """The elements that count, flat."""
        return kept_values(array, self.keep, sample)

    def _sound(self, values: np.ndarray, sample: Sample, holds: str = "NaN") -> None:
        if bool((values != values).any()):
            raise InputError(
                f"output `{self.look.output}` of the original holds {holds}", place=f"sample `{sample.name}`"
            )

    def _labels(self, sample: Sample) -> np.ndarray:
        if sample.labels is None:
            raise InputError(
                f"there are no labels, which the metric `{self.name}` needs",
                place=f"sample `{sample.name}`",
                hint="add an array `labels` to the samples, or take `divergence`, `agreement` or `relative-error`",
            )
        return np.asarray(sample.labels)

    def _integers(self, sample: Sample, shape: tuple[int, ...], kept: np.ndarray | None = None) -> np.ndarray:
        """The labels as int64 of a shape, one for each row; -100 where the row is not kept.

        Raises:
            InputError: there are none, another number of them, or they are no integers.
        """
        labels = self._labels(sample)
        if labels.size != math.prod(shape):
            raise InputError(
                f"the labels have the shape {list(labels.shape)}, the rows of output `{self.look.output}` "
                f"{list(shape)}",
                place=f"sample `{sample.name}`",
                hint=f"the metric `{self.name}` takes one whole number for each row; {_OTHERS}",
            )
        wide = labels.astype(np.float64) if labels.dtype.kind in "fiub" else None
        if wide is None or not np.isfinite(wide).all() or not np.array_equal(wide, np.trunc(wide)):
            raise InputError(
                f"the labels are no whole numbers: {_some(labels)}",
                place=f"sample `{sample.name}`",
                hint=f"the metric `{self.name}` takes one whole number for each row; {_OTHERS}",
            )
        found = labels.astype(np.int64).reshape(shape)
        return found if kept is None else np.where(kept, found, IGNORED)

    def _classes(self, labels: np.ndarray, count: int, sample: Sample) -> np.ndarray:
        """The labels, once they are known to be below `count`."""
        outside = (labels >= count) | ((labels < 0) & (labels != IGNORED))
        if outside.any():
            raise InputError(
                f"the label {labels[outside].flat[0]} is none of the {count} classes of output `{self.look.output}`",
                place=f"sample `{sample.name}`",
                hint=f"classes count from 0; {IGNORED} marks a row without a label",
            )
        return labels


def kept_values(array: np.ndarray, keep: Keep | None, sample: Sample) -> np.ndarray:
    """The elements of an output that are no padding, flat."""
    return array.reshape(-1) if keep is None else array[np.broadcast_to(kept_rows(array, keep, sample), array.shape)]


def kept_rows(array: np.ndarray, keep: Keep, sample: Sample) -> np.ndarray:
    """Booleans that broadcast to an output, False for padding."""
    try:
        return keep.of(sample.feeds, array)
    except InputError as error:
        raise InputError(error.cause, place=f"sample `{sample.name}`", hint=error.hint) from error


def _some(labels: np.ndarray) -> str:
    return ", ".join(repr(one) for one in labels.reshape(-1)[:3].tolist())


def ratio(parts: Sequence[tuple[float, float, int]], name: str) -> float:
    """The sum of the first numbers over that of the second ones; 0 where both are 0, and an infinite one stays so.

    Args:
        parts: for each sample two numbers, and of how many rows or elements they are.
        name: of the measure.

    Raises:
        InputError: there are no samples, or none has a row that counts.
    """
    if not parts:
        raise InputError(f"there are no samples to measure `{name}` on")
    firsts, seconds, counts = zip(*parts, strict=True)
    if not any(counts):
        raise InputError(
            f"there is nothing to measure `{name}` on: no row of the output counts",
            hint="is it empty, or are all rows padding or without a label?",
        )
    above, below = (sum(column) if math.inf in column else math.fsum(column) for column in (firsts, seconds))
    if above == math.inf or (below == 0 and above > 0):
        return math.inf
    return above / below if below else 0.0


class Mean(RowMeasure):
    """A sum over rows by another: what is kept of a sample are the two, and how many rows there are."""

    def value(self, partials: Sequence[Any]) -> float:
        """The ratio of the sums over all samples."""
        return ratio(partials, self.name)


class Divergence(Mean):
    """How far the output is from the original's, in what adds up over independent edits; lower is better.

    Of probabilities and what becomes such: the mean over rows of KL(original || other), in nats. Of values, and of rows
    of one number: the sum of the squared differences over that of the original's squares.
    """

    name = "divergence"
    higher_is_better = False

    def partial(self, outputs: Outputs, reference: Outputs, sample: Sample) -> tuple[float, float, int]:
        """A sum of divergences or squares, what it is to be divided by, and how many rows or elements these are of."""
        original, other = self._pair(outputs, reference, sample)
        if self.look.kind == "chances":
            found = metrics.binary_divergences(self._values(original, sample), self._values(other, sample))
        elif self.look.kind == "values" or original.ndim == 0 or original.shape[-1] < 2:
            return metrics.squared_error(self._values(original, sample), self._values(other, sample))
        else:
            one, two = self._matrix(original, sample), self._matrix(other, sample)
            if self.look.kind == "probabilities":
                one, two = metrics.as_logits(one), metrics.as_logits(two)
            found = metrics.kl_divergences(one, two)
            self._sound(found, sample, "rows of no probabilities")
        return float(found.sum()), float(len(found)), len(found)


class RelativeError:
    """The root of sum|difference|^2 / sum|original|^2, of the output where it is largest; lower is better.

    Args:
        keeps: the rows that are no padding, by output; all rows of the others count.
    """

    name: str = "relative-error"
    higher_is_better: bool = False

    def __init__(self, keeps: Mapping[str, Keep] | None = None) -> None:
        self.keeps = dict(keeps or {})

    @property
    def key(self) -> str:
        """The name, with the rows that count."""
        return f"{self.name} where {sorted(self.keeps.items())}"

    def partial(self, outputs: Outputs, reference: Outputs, sample: Sample) -> dict[str, tuple[float, float, int]]:
        """For each output of floating point the two sums, and of how many elements."""
        found = {}
        for name, original in reference.items():
            if not isinstance(original, np.ndarray) or not _floating(original):
                continue
            other = outputs.get(name)
            if not isinstance(other, np.ndarray) or other.shape != original.shape:
                raise InputError(f"output `{name}` is missing or has another shape", place=f"sample `{sample.name}`")
            one, two = (kept_values(array, self.keeps.get(name), sample) for array in (original, other))
            found[name] = metrics.squared_error(one, two)
        if not found:
            raise InputError("the model has no output of floating point", place=f"sample `{sample.name}`")
        return found

    def value(self, partials: Sequence[Any]) -> float:
        """The largest over the outputs."""
        names = partials[0] if partials else {}
        each = {name: [partial[name] for partial in partials] for name in names}
        told = [parts for parts in each.values() if any(count for _, _, count in parts)]
        return math.sqrt(max(ratio(parts, self.name) for parts in told or [sum(each.values(), [])]))


class Fidelity(RelativeError):
    """1 - `relative-error`: 1 for the original."""

    name = "fidelity"
    higher_is_better = True

    def value(self, partials: Sequence[Any]) -> float:
        """1 less the relative error."""
        return 1.0 - super().value(partials)


def _floating(array: np.ndarray) -> bool:
    return array.dtype.kind in "fV" or array.dtype.name == "bfloat16"


class Share(Mean):
    """A share of rows: what is kept of a sample is how many have it, and how many there are, twice."""

    def choices(self, partials: Sequence[Any]) -> int:
        """All rows that count."""
        return sum(count for _, _, count in partials)


class Agreement(Share):
    """The share of the rows whose largest entry is that of the original; of chances, those on the same side of 1/2."""

    name = "agreement"

    def partial(self, outputs: Outputs, reference: Outputs, sample: Sample) -> tuple[float, float, int]:
        """How many rows agree, and how many there are, twice."""
        original, other = self._pair(outputs, reference, sample)
        if self.look.kind == "chances":
            one, two = self._values(original, sample), self._values(other, sample)
            same = ((one > 0.5) == (two > 0.5)) & (two == two)
        else:
            one, two = self._matrix(original, sample), self._matrix(other, sample)
            if one.shape[1] < 2:
                raise InputError(
                    f"a row of output `{self.look.output}` is one number: there are no classes to agree on",
                    hint="take `relative-error` or `fidelity`",
                )
            same = metrics.guesses(one) == metrics.guesses(two)
        return float(same.sum()), float(same.size), same.size


class Accuracy(Share):
    """The share of the rows whose largest entry is at the label. A row labelled -100 does not count.

    Of chances with a label of 0 or 1 for each, and of rows of one number: those on the label's side of 1/2, or of 0.
    """

    name = "accuracy"

    def partial(self, outputs: Outputs, reference: Outputs, sample: Sample) -> tuple[float, float, int]:
        """How many rows are right, and how many have a label, twice."""
        array = self._array(outputs, sample)
        rows = array.shape[:-1]
        kept = self._kept(array, sample)
        single = array.ndim == 0 or array.shape[-1] < 2
        if single or (self.look.kind == "chances" and self._labels(sample).size == array.size):
            labels = self._classes(self._integers(sample, array.shape, kept), 2, sample)
            found = array > (0.5 if self.look.kind in ("chances", "probabilities") else 0.0)
            right = (found == labels) & (array == array)
        else:
            kept = None if kept is None else kept[..., 0]
            labels = self._classes(self._integers(sample, rows, kept), array.shape[-1], sample)
            right = metrics.guesses(array.reshape(-1, array.shape[-1])).reshape(rows) == labels
        counts = labels != IGNORED
        return float((right & counts).sum()), float(counts.sum()), int(counts.sum())


class Cosine(Mean):
    """The mean cosine of each row of the batch with the original's."""

    name = "cosine"

    def partial(self, outputs: Outputs, reference: Outputs, sample: Sample) -> tuple[float, float, int]:
        """The sum of cosines, and the rows, twice."""
        original, other = self._pair(outputs, reference, sample)
        if not original.size:
            return 0.0, 0.0, 0
        kept = self._kept(original, sample)
        rows = []
        for array in (original, other):
            wide = array.astype(np.float64) if kept is None else np.where(kept, array.astype(np.float64), 0.0)
            apart = wide.ndim > 1 and wide.size > len(wide)
            rows.append(wide.reshape(len(wide) if apart else 1, -1))
        with np.errstate(over="ignore", invalid="ignore"):
            sound, finite = (np.isfinite(np.linalg.norm(one, axis=1)) for one in rows)
        self._sound(np.where(sound, 0.0, np.nan), sample, "numbers that are infinite or too large")
        distances = metrics.cosine_distances(rows[0], np.where(finite[:, None], rows[1], 0.0))
        return float(np.where(finite, 1 - distances, 0.0).sum()), float(len(distances)), len(distances)


def folds_of(groups: Sequence[int]) -> int:
    """How many folds the jackknife of `spread` has, of samples of these groups."""
    return min(_FOLDS, len(set(groups)))


def spread(measure: Measure, original: Sequence[Any], edited: Sequence[Any], groups: Sequence[int]) -> float:
    """The standard error of value(edited) - value(original), by leaving out one fold of the samples at a time.

    The jackknife of ten folds, or as many as there are groups; every tenth group is in one fold (Efron and Tibshirani,
    An Introduction to the Bootstrap, chapter 11). 0 says that nothing differs on these samples, not that nothing will
    on others.

    Args:
        measure: what made the partials.
        original, edited: its partials of the same samples, of both models.
        groups: the number of the group of each sample, from 0, as `burnish.ir.samples.kin` gives them.

    Returns:
        The standard error; infinite where it cannot be told: there is one group, or the number cannot be had, or is
        not finite, without some of them.
    """
    folds = folds_of(groups)
    if folds < 2:
        return math.inf
    differences = []
    for left_out in range(folds):
        rest = [index for index, group in enumerate(groups) if group % folds != left_out]
        try:
            differences.append(
                measure.value([edited[index] for index in rest]) - measure.value([original[index] for index in rest])
            )
        except InputError:
            return math.inf
    if not all(math.isfinite(one) for one in differences):
        return math.inf
    mean = math.fsum(differences) / folds
    return math.sqrt((folds - 1) / folds * math.fsum((one - mean) ** 2 for one in differences))
