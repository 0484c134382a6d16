"""Times of small models in ONNX Runtime: an operator, a layer, a block, with weights that are constants."""

from __future__ import annotations

import hashlib
import os
import platform
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import onnx_ir as oir

from burnish.backends.ort.machine import last_cache
from burnish.backends.ort.session import OrtRunner, executor, runtime
from burnish.ir.errors import InputError
from burnish.ir.text import structure
from burnish.passes.latency import Work
from burnish.passes.pipeline import constant_bytes
from burnish.passes.score_store import Store

_STRETCH = 0.002
"""Seconds that one measured stretch lasts at least."""

_ROUNDS = (5, 60)
LEAST_FLOOD = 1 << 26
_STEADY = 0.02
"""Half the width of the 95 % interval of a ratio at which measuring stops."""


@dataclass(frozen=True)
class Action:
    """A call to be timed, and the arrays it reads that are in the cache when it is made."""

    call: Callable[[], object]
    arrays: list[np.ndarray]


class KernelTimes:
    """A `burnish.passes.latency.Timer` for ONNX Runtime, which keeps what it measured on disk.

    Models that are compared are run in turns, so that whatever else the machine does meanwhile hits all alike. With one
    thread on the CPU the clock is that thread's own, which stands still while other work has the processor. The time of
    the first is the 20th percentile over all rounds; that of another is the first's times the median of the rounds'
    ratios. Rounds are made until all ratios are known to 2 %, or the time is up.

    A part that is run again and again has its weights in the processor's cache. Those of a model that is larger than
    the cache are read from memory in every run, which takes longer than the arithmetic where few rows are multiplied:
    such a part is timed `cold`, one call at a time, after the cache was filled with something else.

    Attributes:
        measured: how many models were run, not looked up.
    """

    def __init__(
        self,
        store: Store | None = None,
        *,
        target: str = "ort-cpu",
        threads: int = 1,
        seconds: float = 1.0,
        cold: bool = False,
        sessions: int = 1,
    ) -> None:
        """
        Args:
            store: where times are kept; None to keep them as long as this object lives.
            target: `ort-cpu` or `ort-cuda`.
            threads: threads inside an operator.
            seconds: time for each model, at most, about; five rounds are always made.
            cold: the weights are not in the cache when a model is run.
            sessions: that are made of each model; the middle one counts, since sessions of one model differ.
        """
        self.measured = 0
        self._store = store
        self._known: dict[str, float] = {}
        self._load = executor(threads=threads, target=target)
        self._seconds = seconds
        alone = threads == 1 and target == "ort-cpu" and time.get_clock_info("thread_time").resolution < 1e-6
        self._clock = time.thread_time if alone else time.perf_counter
        self._flood = np.zeros(max(2 * last_cache(), LEAST_FLOOD), np.uint8) if cold else None
        self._sessions = sessions
        many = f"{sessions} sessions, " if sessions > 1 else ""
        self._place = (
            f"{many}{'cold, ' * cold}{target}, {threads} threads, ONNX Runtime {runtime().__version__}, {processor()}"
        )
        self._call: float | None = None

    def __call__(self, first: Work, others: Sequence[Work]) -> list[float | str]:
        """See `burnish.passes.latency.Timer.__call__`."""
        keys = [self._key(work) for work in (first, *others)]
        names = [keys[0], *(f"{key} beside {keys[0]}" for key in keys[1:])]
        found: list[float | str | None] = [self._recall(name) for name in names]
        missing = [index for index, one in enumerate(found) if one is None]
        if missing:
            wanted = [0, *(index for index in missing if index)]
            works = (first, *others)
            for index, seconds in zip(wanted, self._measure([works[i] for i in wanted], found[0]), strict=True):
                found[index] = seconds
                if isinstance(seconds, float):
                    self._keep(names[index], seconds)
        return [one if one is not None else "it was not timed" for one in found]

    def _recall(self, name: str) -> float | None:
        if name not in self._known and self._store is not None:
            kept = self._store.timing(name)
            if kept is not None:
                self._known[name] = kept
        return self._known.get(name)

    def _keep(self, name: str, seconds: float) -> None:
        self._known[name] = seconds
        if self._store is not None:
            self._store.add_timing(name, seconds)

    def _key(self, work: Work) -> str:
        shapes = ", ".join(f"{name} {array.dtype}{list(array.shape)}" for name, array in work.feeds.items())
        text = "\n".join((structure(work.model), shapes, self._place))
        return hashlib.sha256(text.encode(errors="surrogatepass")).hexdigest()

    def _measure(self, works: Sequence[Work], known: float | str | None) -> list[float | str]:
        """Seconds of each in the middle session, scaled to the first's where that is known; or why there are none."""
        self.measured += len(works)
        sessions = [self._session(works, known)]
        while len(sessions) < self._sessions:
            sessions.append(self._session(works, sessions[0][0]))
        return [_middle(found) for found in zip(*sessions, strict=True)]

    def _session(self, works: Sequence[Work], known: float | str | None) -> list[float | str]:
        """What `_measure` gives, of one session of each."""
        runners: list[OrtRunner] = []
        actions: dict[int, Action] = {}
        refusals: dict[int, str] = {}
        try:
            for index, work in enumerate(works):
                try:
                    runners.append(self._load(work.model))
                    actions[index] = Action(runners[-1].bound(work.feeds), list(work.feeds.values()))
                except InputError as error:
                    refusals[index] = error.cause
            if 0 in refusals:
                return [refusals.get(index, refusals[0]) for index in range(len(works))]
            order = list(actions)
            times = self._rounds([actions[index] for index in order], self._seconds * len(order))
        finally:
            for runner in runners:
                runner.close()
        base = float(np.percentile(times[:, 0], 20))
        ratios = np.median(times / times[:, :1], axis=0)
        call = self._call_seconds()
        own = known if isinstance(known, float) else max(base - call, 0.0)
        found: dict[int, float | str] = {
            index: max(ratio * (own + call) - call, 0.0) for index, ratio in zip(order, ratios.tolist(), strict=True)
        }
        return [own if index == 0 else (refusals | found)[index] for index in range(len(works))]

    def _call_seconds(self) -> float:
        """What a call costs by itself, from a model that negates one number."""
        if self._call is None:
            runner = self._load(_nothing())
            feeds = {"x": np.ones(1, np.float32)}
            times = self._rounds([Action(runner.bound(feeds), list(feeds.values()))], 0.1)
            self._call = float(np.percentile(times, 20))
            runner.close()
        return self._call

    def _rounds(self, actions: Sequence[Action], seconds: float) -> np.ndarray:
        """Seconds per call, [rounds, actions]; every other round goes backwards."""
        calls = [max(1, int(np.ceil(_STRETCH / max(self._stretch(one, 1), 1e-7)))) for one in actions]
        if self._flood is not None:
            calls = [1] * len(actions)
        end = time.perf_counter() + seconds
        rounds: list[list[float]] = []
        while len(rounds) < _ROUNDS[0] or (len(rounds) < _ROUNDS[1] and time.perf_counter() < end):
            row = [0.0] * len(actions)
            indices = range(len(actions))
            for index in indices if len(rounds) % 2 == 0 else reversed(indices):
                row[index] = self._stretch(actions[index], calls[index])
            rounds.append(row)
            if len(rounds) % 5 == 0 and len(actions) > 1 and _steady(np.asarray(rounds)):
                break
        return np.asarray(rounds)

    def _stretch(self, action: Action, calls: int) -> float:
        """Seconds of a call, from so many."""
        if self._flood is not None:
            self._flood += 1
            for array in action.arrays:
                array.tobytes()
        start = self._clock()
        for _ in range(calls):
            action.call()
        return (self._clock() - start) / calls


def _middle(found: Sequence[float | str]) -> float | str:
    """The middle number; a reason where there is one."""
    numbers = sorted(one for one in found if isinstance(one, float))
    return next((one for one in found if isinstance(one, str)), None) or numbers[len(numbers) // 2]


def _steady(times: np.ndarray) -> bool:
    """Whether the median of every ratio to the first action is known well enough."""
    ratios = times / times[:, :1]
    spread = 1.2533 * 1.96 * ratios.std(axis=0, ddof=1) / np.sqrt(len(times))
    return bool((spread <= _STEADY * np.median(ratios, axis=0)).all())


def exceeds_cache(model: oir.Model) -> bool:
    """Whether a model's constants do not fit in the processor's cache, so that every run reads them from memory."""
    return 0 < last_cache() < constant_bytes(model)


@cache
def processor() -> str:
    """The processor and how many threads it runs at once, as text that tells machines of different speed apart."""
    name = platform.processor() or platform.machine()
    listed = Path("/proc/cpuinfo")
    if listed.is_file():
        models = [
            line.split(":", 1)[1].strip() for line in listed.read_text().splitlines() if line.startswith("model name")
        ]
        name = next(iter(models), name)
    return f"{name}, {os.cpu_count() or 1} processors"


def _nothing() -> oir.Model:
    kind, shape = oir.TensorType(oir.DataType.FLOAT), oir.Shape([1])
    x, y = oir.Value(name="x", type=kind, shape=shape), oir.Value(name="y", type=kind, shape=shape)
    graph = oir.Graph([x], [y], nodes=[oir.Node("", "Neg", [x], outputs=[y])], opset_imports={"": 17}, name="nothing")
    return oir.Model(graph, ir_version=8)
