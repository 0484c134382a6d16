"""Paired timing: equal things are neither slower nor faster, unequal ones are found soon."""

from __future__ import annotations

import time

import pytest

from burnish.backends.ort import timing


class Work:
    """An action of a known length on a clock of its own, with noise that hits both actions alike."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 0.0
        self.drift = 1.0
        monkeypatch.setattr(time, "perf_counter", lambda: self.now)

    def lasting(self, seconds: float) -> timing.Action:
        """An action that takes `seconds` times the drift, which wanders."""

        def act() -> None:
            self.drift = 1.0 + (self.drift * 7919.0) % 0.04
            self.now += seconds * self.drift

        return act


def test_equal_work_is_neither_slower_nor_faster(monkeypatch: pytest.MonkeyPatch) -> None:
    work = Work(monkeypatch)
    found = timing.slower(work.lasting(0.01), work.lasting(0.01), budget=5.0)
    assert not found.slower
    assert not found.faster
    assert found.low <= found.ratio <= found.high


@pytest.mark.parametrize(("factor", "slower"), [(1.2, True), (0.8, False)])
def test_a_difference_is_found_before_the_budget_is_spent(
    monkeypatch: pytest.MonkeyPatch, factor: float, slower: bool
) -> None:
    work = Work(monkeypatch)
    found = timing.slower(work.lasting(0.01), work.lasting(0.01 * factor), budget=60.0)
    assert found.slower is slower
    assert found.faster is not slower
    assert found.ratio == pytest.approx(factor, rel=0.03)
    assert work.now < 2.0


def test_actions_that_take_long_are_timed_in_enough_rounds_to_decide(monkeypatch: pytest.MonkeyPatch) -> None:
    work = Work(monkeypatch)
    few = timing.slower(work.lasting(1.0), work.lasting(0.8), budget=1.0)
    assert few.rounds == 3 and not few.faster
    enough = timing.slower(work.lasting(1.0), work.lasting(0.8), budget=1.0, least=6)
    assert enough.rounds == 6 and enough.faster


def test_what_other_work_takes_is_no_time_of_actions_of_one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    """On the clock of the machine the second takes ten times as long, since other work comes between."""
    work = Work(monkeypatch)
    own = 0.0
    monkeypatch.setattr(time, "thread_time", lambda: own)

    def lasting(seconds: float, waits: float) -> timing.Action:
        def act() -> None:
            nonlocal own
            own += seconds
            work.now += seconds + waits

        return act

    assert timing.slower(lasting(0.01, 0.0), lasting(0.01, 0.09)).slower
    found = timing.slower(lasting(0.01, 0.0), lasting(0.01, 0.09), alone=True)
    assert not found.slower and found.ratio == pytest.approx(1.0)
    assert timing.paired(lasting(0.01, 0.0), lasting(0.02, 0.5), alone=True).ratio == pytest.approx(2.0)


def test_paired_keeps_to_its_rounds_and_its_time(monkeypatch: pytest.MonkeyPatch) -> None:
    work = Work(monkeypatch)
    few = timing.paired(work.lasting(0.01), work.lasting(0.02), rounds=10, seconds=100.0)
    assert few.rounds == 10
    assert few.ratio == pytest.approx(2.0, rel=0.05)
    assert few.median_a == pytest.approx(0.01, rel=0.05)
    assert timing.paired(work.lasting(0.01), work.lasting(0.01), rounds=1000, seconds=0.5).rounds < 20
    assert timing.single(work.lasting(0.01), rounds=5).rounds == 5


def test_fast_actions_are_repeated_within_a_measurement(monkeypatch: pytest.MonkeyPatch) -> None:
    work = Work(monkeypatch)
    calls = 0
    act = work.lasting(1e-5)

    def counted() -> None:
        nonlocal calls
        calls += 1
        act()

    timing.single(counted, rounds=3)
    assert calls > 3 * 150


def test_several_in_turns_are_each_held_against_the_first(monkeypatch: pytest.MonkeyPatch) -> None:
    work = Work(monkeypatch)
    actions = [work.lasting(0.01 * factor) for factor in (1, 2, 0.5)]
    found = timing.in_turns(actions, rounds=10, seconds=100.0)
    for (spread, against), factor in zip(found, (1, 2, 0.5), strict=True):
        assert against.ratio == pytest.approx(factor, rel=0.05)
        assert against.low <= against.ratio <= against.high
        assert spread.median == pytest.approx(0.01 * factor, rel=0.05)
        assert spread.rounds == 10
