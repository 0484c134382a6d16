"""Arrays to measure, and a measure over several samples of them."""

from __future__ import annotations

from typing import Any

import numpy as np

from burnish.ir.samples import Sample
from burnish.passes.criticality import Kind, Reading
from burnish.passes.measures import Agreement, Cosine, Divergence, Fidelity, RelativeError
from burnish.passes.protocols import Measure
from burnish.passes.sites import Keep

PADDED = Keep("mask", (0, 1))


def look(kind: Kind) -> Reading:
    return Reading("out", kind, "asked for")


def drawn(*shape: int, seed: int = 0, scale: float = 1.0) -> np.ndarray:
    return (np.random.default_rng(seed).normal(size=shape) * scale).astype(np.float32)


def softmax(rows: np.ndarray) -> np.ndarray:
    powers = np.exp(rows - rows.max(-1, keepdims=True))
    return powers / powers.sum(-1, keepdims=True)


def over(
    measure: Measure, found: list[np.ndarray], wanted: list[np.ndarray], labels: Any = None, **feeds: Any
) -> float:
    """The measure over several samples, one for each array."""
    partials = []
    for index, (one, other) in enumerate(zip(found, wanted, strict=True)):
        sample = Sample(f"s{index}", {k: v[index] for k, v in feeds.items()}, None if labels is None else labels[index])
        partials.append(measure.partial({"out": one}, {"out": other}, sample))
    return measure.value(partials)


def halves(array: np.ndarray) -> list[np.ndarray]:
    return [array[:7], array[7:]]


MEASURES: list[tuple[Measure, float]] = [
    (Divergence(look("logits")), 0.0),
    (Divergence(look("values")), 0.0),
    (RelativeError(), 0.0),
    (Fidelity(), 1.0),
    (Agreement(look("logits")), 1.0),
    (Cosine(look("values")), 1.0),
]


def measured(measure: Measure, rows: np.ndarray, labels: Any = None, **feeds: np.ndarray) -> float:
    return measure.value([measure.partial({"out": rows}, {"out": rows}, Sample("s", feeds, labels))])
