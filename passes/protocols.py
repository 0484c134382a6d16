"""What the engine needs executed, as protocols: the caller hands in the parts that know a framework."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import onnx_ir as oir

from burnish.ir.samples import Sample
from burnish.passes.reducers import Reducer
from burnish.passes.sites import LIMIT, Site


class Runner(Protocol):
    """Something that executes one model."""

    def run(self, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """The outputs by name, in the order of the model's outputs.

        Raises:
            InputError: when the model refuses these inputs.
        """
        ...

    def close(self) -> None:
        """Free what the runner holds; it cannot run afterwards."""
        ...


class Observer(Runner, Protocol):
    """A runner that can look inside its model."""

    def observe(
        self,
        sites: Mapping[str, Site],
        reducers: Reducer | Mapping[str, Reducer],
        samples: Iterable[Sample],
        *,
        limit: int = LIMIT,
    ) -> dict[str, Reducer]:
        """Run the model on all samples and reduce what passes through its values.

        A value that is the same for every sample (a weight) is reduced once. Sites of one value that are reduced in the
        same way share the computation and the memory.

        Args:
            sites: values of the model, under names of the caller's.
            reducers: what is wanted of each site, by the same names, or of all of them; these are not changed.
            samples: what can be iterated over several times.
            limit: bytes of values that may be held at once; the reducers' own bytes come on top.

        Returns:
            A reducer that has seen all samples for each site.

        Raises:
            InputError: a value cannot be observed, exceeds the limit alone, or does not suit its reducer; the model
                refuses a sample; there are no samples or they can be read only once.
        """
        ...


Executor = Callable[[oir.Model], Runner]
"""Makes a runner for a model; raises InputError when the model cannot be loaded or its runtime is missing."""


class Measure(Protocol):
    """A number for what a model computes on many samples, made of what is kept of each sample.

    Attributes:
        name: `accuracy`, `divergence`, ...
        higher_is_better: whether a larger number is better.
    """

    name: str
    higher_is_better: bool

    @property
    def key(self) -> str:
        """The measure and all that its numbers depend on besides model and samples, as text: they are kept under it."""
        ...

    def partial(self, outputs: Mapping[str, np.ndarray], reference: Mapping[str, np.ndarray], sample: Sample) -> Any:
        """What is kept of one sample, small where that is possible.

        Args:
            outputs: what a model computes.
            reference: what the original computes on the same sample.
            sample: its inputs and labels.

        Raises:
            InputError: labels are missing or do not fit, or the outputs are not what is measured.
        """
        ...

    def value(self, partials: Sequence[Any]) -> float:
        """The number over all samples.

        Raises:
            InputError: it is NaN, or there are no samples.
        """
        ...


@dataclass(frozen=True)
class Verdict:
    """A paired timing of two runners: `ratio` is the second's time over the first's, between `low` and `high`.

    `slower` and `faster` hold when the second differs from the first by more than the noise of the measurement.
    """

    ratio: float
    low: float
    high: float
    slower: bool
    faster: bool
    rounds: int

    @property
    def words(self) -> str:
        """What it says."""
        if self.slower or self.faster:
            return "slower" if self.slower else "faster"
        if self.low <= 1 <= self.high:
            return "no measurable difference"
        return "not clearly slower" if self.ratio > 1 else "not clearly faster"


class Clock(Protocol):
    """Times two runners in turns."""

    def __call__(self, first: Runner, second: Runner, feeds: Mapping[str, np.ndarray]) -> Verdict:
        """Whether `second` is slower or faster than `first` on `feeds`, in milliseconds on the target."""
        ...


@dataclass(frozen=True)
class Judge:
    """Everything that runs models for the engine.

    Attributes:
        execute: the target's runtime, as its users run it.
        lean: the same runtime with less memory, too slow to be timed.
        unoptimized: the same runtime without its own graph optimizations: how much the two differ on the original is
            the rounding that the user accepts already.
        replay: the float64 interpreter.
        clock: paired timing on the target.
    """

    execute: Executor
    lean: Executor
    unoptimized: Executor
    replay: Executor
    clock: Clock
