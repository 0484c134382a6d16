"""Measures whose labels are no class numbers: next tokens, queries and documents, yes and no, images."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from burnish.ir.errors import InputError
from burnish.ir.samples import IGNORED, Sample
from burnish.passes import metrics
from burnish.passes.criticality import Reading
from burnish.passes.measures import Mean, Outputs, RowMeasure, ratio
from burnish.passes.sites import Keep


class Perplexity(Mean):
    """The exponential of the mean negative log likelihood of each label; lower is better.

    The labels are the next tokens, one for each row, -100 where there is none. Where there are no labels, or they are
    the identifiers that the model reads, each position is to tell the identifier after it.

    Args:
        look: the output, and what it is read as.
        keep: the positions that are no padding.
        ids: the input of token identifiers, for samples without labels.
    """

    name = "perplexity"
    higher_is_better = False

    def __init__(self, look: Reading, keep: Keep | None = None, ids: str | None = None) -> None:
        super().__init__(look, keep)
        self.ids = ids

    @property
    def key(self) -> str:
        """As of others, with the identifiers."""
        return f"{super().key} after {self.ids}"

    def partial(self, outputs: Outputs, reference: Outputs, sample: Sample) -> tuple[float, float, int]:
        """The sum of negative log likelihoods in nats, and how many, twice."""
        array = self._pair(outputs, reference, sample)[1]
        if array.ndim < 2 or array.shape[-1] < 2:
            raise InputError(
                f"output `{self.look.output}` {list(array.shape)} has no classes along its last axis",
                place=f"sample `{sample.name}`",
            )
        targets, counts = self._targets(array, sample)
        rows = array.reshape(-1, array.shape[-1])[counts]
        if self.look.kind == "probabilities":
            rows = metrics.as_logits(rows)
        losses = metrics.negative_log_likelihoods(rows, targets[counts])
        return float(losses.sum()), float(len(losses)), len(losses)

    def _targets(self, array: np.ndarray, sample: Sample) -> tuple[np.ndarray, np.ndarray]:
        """What each row of the output is to tell, and whether it counts; both flat."""
        rows = array.shape[:-1]
        kept = self._kept(array, sample)
        counts = np.ones(rows, bool) if kept is None else np.broadcast_to(kept[..., 0], rows).copy()
        ids = sample.feeds.get(self.ids or "")
        labels = None if ids is not None and sample.labels is None else self._integers(sample, rows, counts)
        if ids is not None and (labels is None or (ids.shape == rows and _same(labels, ids))):
            if ids.shape != rows or len(rows) < 2:
                raise InputError(
                    f"the identifiers `{self.ids}` {list(ids.shape)} are not the rows {list(rows)} of output "
                    f"`{self.look.output}`",
                    place=f"sample `{sample.name}`",
                    hint="give the next tokens as `labels`",
                )
            labels = np.full(rows, IGNORED)
            labels[..., :-1] = ids[..., 1:]
            labels[..., :-1] = np.where(counts[..., :-1] & counts[..., 1:], labels[..., :-1], IGNORED)
        labels = self._classes(np.asarray(labels), array.shape[-1], sample)
        return labels.reshape(-1), (labels != IGNORED).reshape(-1)

    def value(self, partials: Sequence[Any]) -> float:
        """The perplexity over all positions; infinite where a token is ruled out or the output is NaN."""
        mean = super().value(partials)
        return math.exp(mean) if mean < 700 else math.inf


def _same(labels: np.ndarray, ids: np.ndarray) -> bool:
    """Whether labels are the very identifiers, as far as there are any: they were not shifted yet."""
    there = labels != IGNORED
    return bool(there.any() and np.array_equal(labels[there], ids[there]))


class Recall(RowMeasure):
    """The share of the queries whose nearest document, by the dot product, is theirs: R@1.

    A query has its key, 0 or more, as label; a document -1 - key. Documents of all samples are searched.
    """

    name = "recall"

    def partial(self, outputs: Outputs, reference: Outputs, sample: Sample) -> tuple[np.ndarray, np.ndarray]:
        """The vectors [rows, width] and the labels."""
        array = self._array(outputs, sample)
        rows = array.shape[:-1]
        keys = self._integers(sample, rows).reshape(-1)
        return array.reshape(len(keys), array.shape[-1] if array.ndim else 1).copy(), keys

    def choices(self, partials: Sequence[Any]) -> int:
        """The queries."""
        return sum(int((keys >= 0).sum()) for _, keys in partials)

    def value(self, partials: Sequence[Any]) -> float:
        """The share over all queries."""
        keys = np.concatenate([np.zeros(0, np.int64), *(one[1] for one in partials)])
        if not (keys >= 0).any() or not (keys < 0).any():
            raise InputError(
                "the labels name no query, or no document",
                hint="the metric `recall` takes a key of 0 or more for a query, and -1 - key for its document",
            )
        widths = sorted({one[0].shape[1] for one in partials})
        if len(widths) > 1:
            raise InputError(f"the vectors of output `{self.look.output}` have different widths: {widths}")
        return metrics.recall_at_one(np.concatenate([one[0] for one in partials]), keys)


class Auc(RowMeasure):
    """The area under the ROC curve, of labels that are 0 or 1: the chance that a 1 scores higher than a 0."""

    name = "auc"

    def partial(self, outputs: Outputs, reference: Outputs, sample: Sample) -> tuple[np.ndarray, np.ndarray]:
        """The score of each row that has a label, and its label."""
        array = self._array(outputs, sample)
        kept = self._kept(array, sample)
        if self.look.kind == "chances" or array.ndim == 0 or array.shape[-1] == 1:
            scores = array
        elif array.shape[-1] == 2:
            wide = array.astype(np.float64)
            with np.errstate(invalid="ignore"):
                scores = wide[..., 1] if self.look.kind == "probabilities" else wide[..., 1] - wide[..., 0]
            kept = None if kept is None else kept[..., 0]
        else:
            raise InputError(
                f"output `{self.look.output}` has {array.shape[-1]} classes, `auc` takes two",
                place=f"sample `{sample.name}`",
                hint="take `accuracy`",
            )
        labels = self._classes(self._integers(sample, scores.shape, kept), 2, sample)
        counts = labels != IGNORED
        return scores[counts], labels[counts] == 1

    def value(self, partials: Sequence[Any]) -> float:
        """The area over all rows."""
        labels = np.concatenate([np.zeros(0, bool), *(one[1] for one in partials)])
        if labels.all() or not labels.any():
            raise InputError("all labels are the same: there is no area under a curve", hint="give samples of both")
        return metrics.area_under_curve(np.concatenate([one[0] for one in partials]), labels)


class Psnr(RowMeasure):
    """The peak signal-to-noise ratio in decibels against the labels where there are any, else against the original.

        10 * log10(range^2 / mean squared error)

    with the range, over all samples, of what is compared with. Errors below what float32 resolves count as that, so
    that the original itself has a finite value of 138.5.
    """

    name = "psnr"

    def partial(self, outputs: Outputs, reference: Outputs, sample: Sample) -> tuple[float, float, float, float]:
        """The sum of squared errors, how many there are, and the lowest and highest number compared with."""
        array = self._array(outputs, sample)
        wanted = self._array(reference, sample) if sample.labels is None else np.asarray(sample.labels)
        if wanted.size != array.size or wanted.dtype.kind not in "fiubV":
            raise InputError(
                f"the labels have the shape {list(wanted.shape)}, output `{self.look.output}` {list(array.shape)}",
                place=f"sample `{sample.name}`",
                hint="the metric `psnr` takes a number for each number of the output, or no labels at all",
            )
        one = self._values(wanted.reshape(array.shape), sample).astype(np.float64)
        two = self._values(array, sample).astype(np.float64)
        if not np.isfinite(one).all():
            raise InputError("what is compared with holds NaN or infinity", place=f"sample `{sample.name}`")
        if not one.size:
            return 0.0, 0.0, math.inf, -math.inf
        with np.errstate(over="ignore", invalid="ignore"):
            error = float(np.square(one - two).sum())
        return error if math.isfinite(error) else math.inf, float(one.size), float(one.min()), float(one.max())

    def value(self, partials: Sequence[Any]) -> float:
        """Decibels over all samples; minus infinity where an output is not finite."""
        error = ratio([(one[0], one[1], int(one[1])) for one in partials], self.name)
        low, high = min(one[2] for one in partials), max(one[3] for one in partials)
        if not high > low:
            raise InputError("all numbers that are compared with are the same: `psnr` has no range")
        relative = max(error / (high - low) / (high - low), float(np.finfo(np.float32).eps) ** 2)
        return -10 * math.log10(relative) if math.isfinite(relative) else -math.inf
