"""Time things in turns, so that whatever else the machine does hits all alike."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from burnish.passes.protocols import Runner, Verdict

_PLAIN = 2.0
"""A ratio that three rounds are enough for, when all of them exceed it."""

Action = Callable[[], object]

_RESAMPLES = 1000
_SHORTEST = 0.002
"""Seconds that one measured stretch lasts at least; a faster action is repeated within it."""

_REST = 0.003
"""Seconds before each measured stretch in which threads that wait for work, busily, go to sleep; a fast action is then
called once to wake its own.

Measured with two ONNX Runtime sessions of one small model, two threads each, on two cores: without the rest a run took
0.7 to 1.6 ms, with it 0.12 to 0.13, as alone.
"""


@dataclass(frozen=True)
class Timing:
    """Two actions timed in rounds of A B B A.

    Attributes:
        median_a: seconds per call.
        median_b: seconds per call.
        ratio: median of the rounds' B over A.
        low: lower end of the 95 % bootstrap interval of that median.
        high: upper end.
        rounds: how many rounds were made.
    """

    median_a: float
    median_b: float
    ratio: float
    low: float
    high: float
    rounds: int


@dataclass(frozen=True)
class Spread:
    """One action timed: the median and the 10th and 90th percentile, in seconds per call."""

    median: float
    low: float
    high: float
    rounds: int


def _seconds(action: Action, calls: int, alone: bool = False) -> float:
    clock = time.thread_time if alone else time.perf_counter
    start = clock()
    for _ in range(calls):
        action()
    return (clock() - start) / calls


def _calls(action: Action) -> int:
    """Warm up, and say how many calls make a stretch long enough to measure."""
    action()
    return max(1, int(np.ceil(_SHORTEST / max(_seconds(action, 2), 1e-7))))


def _interval(ratios: np.ndarray) -> tuple[float, float]:
    """The 95 % bootstrap interval of the median, from a fixed seed."""
    picks = np.random.default_rng(0).integers(0, ratios.size, (_RESAMPLES, ratios.size))
    low, high = np.percentile(np.median(ratios[picks], axis=1), (2.5, 97.5))
    return float(low), float(high)


def _round(actions: Sequence[Action], calls: Sequence[int], rest: float = 0.0, alone: bool = False) -> list[float]:
    """Seconds per call of each in one round: all in order, then all in the opposite order, each after a rest."""

    def rested(action: Action, count: int) -> float:
        if rest:
            time.sleep(rest)
            if count > 1:
                action()
        return _seconds(action, count, alone)

    there = [rested(action, count) for action, count in zip(actions, calls, strict=True)]
    back = [rested(action, count) for action, count in zip(actions[::-1], calls[::-1], strict=True)]
    return [(one + other) / 2 for one, other in zip(there, back[::-1], strict=True)]


def _rounds(actions: Sequence[Action], most: int, seconds: float, alone: bool = False) -> list[list[float]]:
    calls = [_calls(action) for action in actions]
    end = time.perf_counter() + seconds
    made: list[list[float]] = []
    while len(made) < most and (len(made) < 3 or time.perf_counter() < end):
        made.append(_round(actions, calls, _REST, alone))
    return made


def _summary(rounds: list[list[float]], index: int = 1) -> Timing:
    """The action of that index against the first."""
    times = np.asarray(rounds)
    ratios = times[:, index] / times[:, 0]
    low, high = _interval(ratios)
    median_a, median_b = np.median(times, axis=0)[[0, index]]
    return Timing(float(median_a), float(median_b), float(np.median(ratios)), low, high, len(rounds))


def _spread(made: Sequence[float]) -> Spread:
    low, median, high = np.percentile(made, (10, 50, 90))
    return Spread(float(median), float(low), float(high), len(made))


def paired(a: Action, b: Action, *, rounds: int = 50, seconds: float = 20.0, alone: bool = False) -> Timing:
    """Time `a` and `b` in rounds of A B B A after a warm-up, whatever threads they use.

    Args:
        a: called without arguments.
        b: likewise.
        rounds: how many rounds at most.
        seconds: stop when this much time has passed, after three rounds at least.
        alone: the actions use the calling thread alone, whose clock is taken: it stands still while other work has the
            processor.
    """
    return _summary(_rounds((a, b), rounds, seconds, alone))


def in_turns(actions: Sequence[Action], *, rounds: int = 50, seconds: float = 20.0) -> list[tuple[Spread, Timing]]:
    """Time several actions in rounds of A B C C B A after a warm-up; arguments otherwise as for `paired`.

    Returns:
        The times of each, and each as `b` against the first as `a`; so the ratio of the first is 1.
    """
    made = _rounds(actions, rounds, seconds)
    return [(_spread([times[i] for times in made]), _summary(made, i)) for i in range(len(actions))]


def single(a: Action, *, rounds: int = 50, seconds: float = 20.0) -> Spread:
    """Time one action; arguments as for `paired`."""
    calls = _calls(a)
    end = time.perf_counter() + seconds
    made: list[float] = []
    while len(made) < rounds and (len(made) < 3 or time.perf_counter() < end):
        made.append(_seconds(a, calls))
    return _spread(made)


def slower(
    a: Action, b: Action, *, budget: float = 2.0, margin: float = 0.02, least: int = 3, alone: bool = False
) -> Verdict:
    """Whether `b` is slower or faster than `a` by more than `margin` and the noise; stops as soon as that is clear.

    For actions of one thread: those of several get in each other's way without a rest.

    Args:
        a: called without arguments.
        b: likewise.
        budget: seconds after which the answer is neither.
        margin: a relative difference that does not matter.
        least: rounds that are made whatever they take.
        alone: see `paired`.

    Returns:
        `slower` when the interval of the ratio lies above 1 + margin, `faster` when it lies below 1 - margin; of fewer
        than six rounds only when each is so by a factor of two.
    """
    calls = (_calls(a), _calls(b))
    end = time.perf_counter() + budget
    made: list[list[float]] = []
    look = 6
    while True:
        made.append(_round((a, b), calls, alone=alone))
        over = len(made) >= least and time.perf_counter() >= end
        if len(made) < look and not over:
            continue
        found = _summary(made)
        decided = found.low > 1 + margin or found.high < 1 - margin
        idle = 1 - margin < found.low and found.high < 1 + margin
        if over or decided or idle:
            enough = len(made) >= 6 or found.low > _PLAIN or found.high < 1 / _PLAIN
            return Verdict(
                ratio=found.ratio,
                low=found.low,
                high=found.high,
                slower=enough and found.low > 1 + margin,
                faster=enough and found.high < 1 - margin,
                rounds=len(made),
            )
        look *= 2


def creation_time(path: str | Path, *, rounds: int = 5, threads: int = 1) -> Spread:
    """Time to make a session from a file with default optimizations, in seconds of wall clock."""
    from burnish.backends.ort.session import from_path

    def make() -> None:
        from_path(path, threads=threads).close()

    make()
    made = [_seconds(make, 1) for _ in range(rounds)]
    return _spread(made)


@dataclass(frozen=True)
class Clock:
    """The engine's clock: `slower` on two runners.

    Attributes:
        budget: seconds per question.
        margin: a relative difference that does not matter.
        least: rounds that are made whatever they take.
        alone: runners use the calling thread alone, whose clock is taken.
    """

    budget: float = 2.0
    margin: float = 0.02
    least: int = 3
    alone: bool = False

    def __call__(self, first: Runner, second: Runner, feeds: Mapping[str, np.ndarray]) -> Verdict:
        """Whether `second` is slower or faster than `first` on `feeds`."""
        return slower(
            lambda: first.run(feeds),
            lambda: second.run(feeds),
            budget=self.budget,
            margin=self.margin,
            least=self.least,
            alone=self.alone,
        )
