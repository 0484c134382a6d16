"""Numbers that tell two sets of rows apart, or rows from labels: arrays in, float64 out.

Wide rows are looked at in blocks, so that memory stays modest for a vocabulary of any size.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

_BLOCK = 1 << 20
"""Elements that are looked at together in float64."""

_TINY = 1e-38
"""The smallest probability that is told from 0; float16 ends sooner."""


def blocks(rows: np.ndarray) -> Iterator[slice]:
    """Slices of the rows of a matrix, each of about a million elements."""
    step = max(1, _BLOCK // max(rows.shape[1], 1))
    for start in range(0, len(rows), step):
        yield slice(start, start + step)


def as_logits(probabilities: np.ndarray) -> np.ndarray:
    """float64 numbers whose softmax are these probabilities; one rounded to 0 counts as the smallest there is."""
    floor = float(np.finfo(np.float16).smallest_subnormal) if probabilities.dtype == np.float16 else _TINY
    wide = probabilities.astype(np.float64)
    with np.errstate(invalid="ignore"):
        return np.asarray(np.log(np.where(np.isnan(wide), wide, np.maximum(wide, floor))))


def kl_divergences(original: np.ndarray, other: np.ndarray) -> np.ndarray:
    """KL(softmax(original) || softmax(other)) of each pair of rows, in nats, never below 0.

    With weights w = exp(original - max) that sum to S, and T the sum of exp(other - max'), it is
    sum(w * (original - other)) / S + (log T - log S) + (max' - max): exactly 0 for equal rows.

    Args:
        original: [rows, classes], of numbers or minus infinity.
        other: likewise; a row that is no such thing, or rules out what `original` does not, is at an infinite distance.

    Returns:
        float64 [rows]; NaN where `original` is NaN.
    """
    found = np.empty(len(original))
    with np.errstate(all="ignore"):
        for part in blocks(original):
            found[part] = _narrow_kl(original[part], other[part])
            if not np.isfinite(found[part]).all():
                found[part] = _wide_kl(original[part], other[part])
    return found


def _narrow_kl(original: np.ndarray, other: np.ndarray) -> np.ndarray:
    """The same in float32 where the numbers are, to 1e-7 nats, in a quarter of the time; else NaN or infinity.

    With d = other - original and m the mean of d under softmax(original), it is log(1 + E(exp(d - m) - 1 - (d - m))).
    """
    if original.dtype != np.float32 or other.dtype != np.float32:
        return np.full(len(original), np.nan)
    weights = np.exp(original - original.max(1, keepdims=True))
    total = weights.sum(1, keepdims=True)
    gap = other - original
    gap -= (weights * gap).sum(1, keepdims=True) / total
    beyond = np.exp(gap)
    beyond -= 1
    beyond -= gap
    beyond *= weights
    return np.asarray(np.maximum(np.log1p(beyond.sum(1).astype(np.float64) / total[:, 0]), 0.0))


def _wide_kl(original: np.ndarray, other: np.ndarray) -> np.ndarray:
    p, q = original.astype(np.float64), other.astype(np.float64)
    high, above = p.max(1, keepdims=True), q.max(1, keepdims=True)
    powers = np.exp(p - high)
    total = powers.sum(1)
    gap = np.where(powers > 0, powers * (p - q), np.where(np.isnan(q), q, 0.0)).sum(1) / total
    size = (np.log(np.exp(q - above).sum(1)) - np.log(total)) + (above - high)[:, 0]
    distance = gap + size
    lost = np.isnan(distance) & np.isfinite(total)
    return np.asarray(np.where(lost, np.inf, np.maximum(distance, 0.0)))


def binary_divergences(original: np.ndarray, other: np.ndarray) -> np.ndarray:
    """KL divergence of each pair of chances, that of yes against no, in nats; arguments and result of any one shape."""
    resolution = {2: 2.0**-12, 4: 2.0**-25}.get(other.dtype.itemsize, 2.0**-54)
    p, q = original.astype(np.float64), other.astype(np.float64)
    with np.errstate(all="ignore"):
        q = np.where(p == q, q, np.clip(q, _TINY, 1 - resolution))
        yes, no = np.where(p > 0, p * np.log(p / q), 0.0), np.where(p < 1, (1 - p) * np.log((1 - p) / (1 - q)), 0.0)
        distance = yes + no
    return np.where(np.isnan(q) & ~np.isnan(p), np.inf, np.where(p == q, 0.0, np.maximum(distance, 0.0)))


def squared_error(original: np.ndarray, other: np.ndarray) -> tuple[float, float, int]:
    """The sums of squares of the differences and of `original`, over its finite elements, and its number of elements.

    The first is infinite where `other` has no number and `original` has one, or the reverse.
    """
    error = size = 0.0
    one, two = original.reshape(1, -1), other.reshape(1, -1)
    for start in range(0, one.shape[1], _BLOCK):
        a, b = (rows[0, start : start + _BLOCK].astype(np.float64) for rows in (one, two))
        finite = np.isfinite(a)
        with np.errstate(over="ignore"):
            if not np.array_equal(a[~finite], b[~finite], equal_nan=True) or not np.isfinite(b[finite]).all():
                error = float("inf")
            else:
                error += float(np.square(a[finite] - b[finite]).sum())
            size += float(np.square(a[finite]).sum())
    return error, size, original.size


def negative_log_likelihoods(logits: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """-log softmax(logits)[target] of each row, in nats; infinite where a row holds NaN.

    Args:
        logits: [rows, classes].
        targets: integers [rows], 0 to classes - 1.
    """
    found = np.empty(len(logits))
    with np.errstate(all="ignore"):
        for part in blocks(logits):
            wide = logits[part].astype(np.float64)
            wide -= wide.max(1, keepdims=True)
            losses = np.log(np.exp(wide).sum(1)) - wide[np.arange(len(wide)), targets[part]]
            found[part] = np.where(np.isnan(losses), np.inf, losses)
    return found


def guesses(rows: np.ndarray) -> np.ndarray:
    """The place of the largest entry of each row, -1 for a row with NaN."""
    found = rows.argmax(1)
    return np.where(np.isnan(rows[np.arange(len(rows)), found].astype(np.float64)), -1, found)


def cosine_distances(before: np.ndarray, after: np.ndarray) -> np.ndarray:
    """1 - cosine of each pair of float64 rows, exactly 0 for equal rows; between nothing and something it is 1."""
    lengths = [np.linalg.norm(rows, axis=1, keepdims=True) for rows in (before, after)]
    units = [rows / np.where(size > 0, size, 1.0) for rows, size in zip((before, after), lengths, strict=True)]
    one, other = (size[:, 0] > 0 for size in lengths)
    distance = np.square(units[0] - units[1]).sum(1) / 2
    return np.asarray(np.where(one & other, distance, (one != other).astype(np.float64)))


def recall_at_one(vectors: np.ndarray, keys: np.ndarray) -> float:
    """Share of the queries whose nearest document, by the dot product, carries the same key.

    Args:
        vectors: [rows, width], one a query or document; a query that holds NaN finds nothing, such a document is never
            found.
        keys: integers [rows]: a key >= 0 for a query, -1 - key for a document; at least one of each.
    """
    documents = vectors[keys < 0].astype(np.float64)
    lost = np.asarray(np.isnan(documents).any(1))
    right = 0
    queries, wanted = vectors[keys >= 0], keys[keys >= 0]
    step = max(1, _BLOCK // max(len(documents), 1))
    for start in range(0, len(queries), step):
        part = queries[start : start + step].astype(np.float64)
        likeness = np.where(lost, -np.inf, part @ np.where(lost[:, None], 0.0, documents).T)
        same = -1 - keys[keys < 0][likeness.argmax(1)] == wanted[start : start + step]
        right += int((same & ~np.isnan(part).any(1) & ~lost.all()).sum())
    return right / len(queries)


def area_under_curve(scores: np.ndarray, labels: np.ndarray) -> float:
    """The chance that a yes scores higher than a no, a tie counting one half: the area under the ROC curve.

    Args:
        scores: [rows]; one that is NaN counts as wrong as can be.
        labels: booleans [rows], with both values.
    """
    wide = scores.astype(np.float64)
    wide = np.where(np.isnan(wide), np.where(labels, -np.inf, np.inf), wide)
    no = np.sort(wide[~labels])
    below, upto = np.searchsorted(no, wide[labels], "left"), np.searchsorted(no, wide[labels], "right")
    return float((below + upto).sum() / 2 / len(no) / labels.sum())
