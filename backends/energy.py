"""Joules per call of something: from a meter, less what the machine uses while idle, or from an assumed power."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from burnish.backends.meters import Meter
from burnish.backends.ort.timing import paired, single

_APART = 1.02
"""Ranges of energies that lie closer together than this ratio are not told apart."""

Action = Callable[[], object]

_ROUNDS = 6
"""Stretches of each action: those of two equal ones lie apart by chance in 2 of 924 cases."""


@dataclass(frozen=True)
class Use:
    """What one call takes.

    Attributes:
        joules: per call, above idle.
        low: the lowest of the stretches that were measured.
        high: the highest.
        seconds: per call.
        count: calls that were made, or rounds in which they were timed.
    """

    joules: float
    low: float
    high: float
    seconds: float
    count: int


@dataclass(frozen=True)
class Stretch:
    """A stretch of calls: its calls, its seconds, and the joules that the meter counted meanwhile."""

    calls: int
    seconds: float
    joules: float


def measured(actions: Sequence[Action], meter: Meter, *, seconds: float = 10.0) -> tuple[list[Use], float]:
    """Joules per call of each action, and the watts of the idle machine.

    The machine idles, the actions run in turns, every other time in the opposite order, so that a drift hits all alike,
    and the machine idles again.

    Args:
        actions: called without arguments.
        meter: of all that the actions use.
        seconds: for which each action runs; half of it for idling. Ten or more: meters count in steps.
    """
    part = seconds / _ROUNDS
    stretches: list[list[Stretch]] = [[] for _ in actions]
    idle = [_stretch(None, meter, seconds / 4)]
    for turn in range(_ROUNDS):
        order = list(enumerate(actions))
        for index, action in order if turn % 2 == 0 else reversed(order):
            stretches[index].append(_stretch(action, meter, part))
    idle.append(_stretch(None, meter, seconds / 4))
    watts = sum(one.joules for one in idle) / sum(one.seconds for one in idle)
    return [_use(some, watts) for some in stretches], watts


def _stretch(action: Action | None, meter: Meter, seconds: float) -> Stretch:
    """At least one call for at least so many seconds; without an action, idling."""
    if action is not None:
        action()  # warm, whatever ran before
    joules, start = meter.joules(), time.perf_counter()
    calls = 0
    if action is None:
        time.sleep(seconds)
    while action is not None and (not calls or time.perf_counter() - start < seconds):
        action()
        calls += 1
    return Stretch(calls, time.perf_counter() - start, meter.joules() - joules)


def _use(stretches: Sequence[Stretch], idle: float) -> Use:
    each = [(one.joules - idle * one.seconds) / one.calls for one in stretches]
    calls = sum(one.calls for one in stretches)
    whole = sum(one.joules - idle * one.seconds for one in stretches) / calls
    return Use(whole, min(each), max(each), sum(one.seconds for one in stretches) / calls, calls)


def estimated(actions: Sequence[Action], watts: float, *, seconds: float = 2.0) -> list[Use]:
    """Joules per call of one action or two if the machine drew `watts` more while they run than while it idles.

    Of one action the range is that between the 10th and the 90th percentile of its times; the first of two has none,
    and the second the range in which it lies beside the first, timed in turns.

    Args:
        actions: called without arguments.
        watts: an assumption.
        seconds: for all of them together, about.
    """
    if len(actions) == 1:
        alone = single(actions[0], seconds=seconds)
        return [Use(watts * alone.median, watts * alone.low, watts * alone.high, alone.median, alone.rounds)]
    both = paired(*actions, seconds=seconds)
    first = watts * both.median_a
    return [
        Use(first, first, first, both.median_a, both.rounds),
        Use(first * both.ratio, first * both.low, first * both.high, both.ratio * both.median_a, both.rounds),
    ]


def break_even(made: float, a: Use, b: Use) -> tuple[float | None, str]:
    """After how many uses `b`, which took `made` joules to make from `a`, has used no more than `a`.

    Returns:
        The number of uses and an empty text; or None and the reason: the two cannot be told apart, or `b` takes more.
    """
    if a.low <= _APART * b.high and b.low <= _APART * a.high:
        return None, "the two cannot be told apart"
    if b.joules >= a.joules:
        return None, "it takes more energy for each use"
    return made / (a.joules - b.joules), ""
