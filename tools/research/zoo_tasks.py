"""Real labelled data for the trained models of the zoo, and the metric that judges a model's outputs on it.

Each task is made once from what Python and the packages of `requirements-models.txt` ship, and cached as
`<name>.task.npz` beside the models.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from burnish.passes import metrics

Array = NDArray[Any]
Samples = list[dict[str, Array]]
Outputs = Sequence[Mapping[str, Array]]


class Task(NamedTuple):
    """Inputs by name, a label array for each sample, and the metric over the outputs (by name) of all samples in
    their order: higher is better, save for the perplexity of the language models."""

    samples: Samples
    labels: list[Array]
    metric: Callable[[Outputs], float]


def load(name: str, folder: Path) -> Task:
    """The task of a trained model of the zoo, from the cache in `folder` where it is there.

    KeyError when the model has none.
    """
    from burnish.tools.research import zoo_data

    if name not in _METRICS:
        raise KeyError(f"no labelled data for {name!r}; there is some for {', '.join(_METRICS)}")
    cache = folder / f"{name}.task.npz"
    if not cache.exists():
        folder.mkdir(parents=True, exist_ok=True)
        _save(cache, *zoo_data.make(name, folder))
    samples, labels = _restore(cache)
    metric = _METRICS[name]
    return Task(samples, labels, lambda outputs: metric(outputs, labels))


def metric_of(name: str, labels: list[Array]) -> Callable[[Outputs], float]:
    """The metric of a model over some of its samples, whose labels these are."""
    return lambda outputs: _METRICS[name](outputs, labels)


def _save(cache: Path, samples: Samples, labels: list[Array]) -> None:
    arrays = {f"sample/{index}/{key}": value for index, sample in enumerate(samples) for key, value in sample.items()}
    arrays |= {f"label/{index}": label for index, label in enumerate(labels)}
    partial = cache.with_name(f"{cache.stem}.partial.npz")
    np.savez_compressed(partial, allow_pickle=False, **arrays)
    os.replace(partial, cache)


def _restore(cache: Path) -> tuple[Samples, list[Array]]:
    with np.load(cache, allow_pickle=False) as arrays:
        count = sum(key.startswith("label/") for key in arrays.files)
        samples: Samples = [{} for _ in range(count)]
        for key in arrays.files:
            kind, index, *rest = key.split("/", 2)
            if kind == "sample":
                samples[int(index)][rest[0]] = arrays[key]
        return samples, [arrays[f"label/{index}"] for index in range(count)]


def _first(outputs: Mapping[str, Array]) -> Array:
    return next(iter(outputs.values()))


def _accuracy(outputs: Outputs, labels: list[Array]) -> float:
    """Share of rows whose largest score is at the label."""
    guesses = np.concatenate([_first(output).argmax(-1) for output in outputs])
    return float((guesses == np.concatenate(labels)).mean())


def _binary_accuracy(outputs: Outputs, labels: list[Array]) -> float:
    """Share of rows whose probability lies on the label's side of one half."""
    guesses = np.concatenate([np.ravel(_first(output)) > 0.5 for output in outputs])
    return float((guesses == np.concatenate(labels)).mean())


def _recall_at_one(outputs: Outputs, labels: list[Array]) -> float:
    """Share of queries (label >= 0) whose nearest document (label -1 - key) carries the same key."""
    vectors = np.concatenate([_first(output) for output in outputs])
    return metrics.recall_at_one(vectors, np.concatenate(labels).astype(np.int64))


def perplexity_of(labels: list[Array]) -> Callable[[Outputs], float]:
    """The perplexity of a language model as a function of its outputs."""
    return lambda outputs: _perplexity(outputs, labels)


def _perplexity(outputs: Outputs, labels: list[Array]) -> float:
    """Exponential of the mean negative log likelihood of each next token; lower is better."""
    losses = [
        metrics.negative_log_likelihoods(_first(output)[0, :-1], label[1:].astype(np.int64))
        for output, label in zip(outputs, labels, strict=True)
    ]
    return float(np.exp(np.concatenate(losses).mean()))


def _exact_lines(outputs: Outputs, labels: list[Array]) -> float:
    """Share of text lines read without a mistake, after merging repeats and dropping blanks (class 0) and the spaces
    (the last class) at both ends."""
    right = 0
    for output, label in zip(outputs, labels, strict=True):
        scores = _first(output)[0]
        classes = scores.argmax(-1)
        read = classes[(np.diff(classes, prepend=-1) != 0) & (classes != 0)]
        inked = np.flatnonzero(read != scores.shape[-1] - 1)
        right += len(inked) > 0 and np.array_equal(read[inked[0] : inked[-1] + 1], label)
    return right / len(labels)


_METRICS: dict[str, Callable[[Outputs, list[Array]], float]] = {
    "a1-efficientnet": _accuracy,
    "a2-minilm": _recall_at_one,
    "a3-smollm2-nocache": _perplexity,
    "a3-smollm2-kv": _perplexity,
    "a4-silero": _binary_accuracy,
    "a4-silero-op18-ifless": _binary_accuracy,
    "a4-silero-16k-sequence": _binary_accuracy,
    "a5-magika": _accuracy,
    "a6-ppocr-rec": _exact_lines,
    "a6-ppocr-cls": _accuracy,
}
