"""Measure what each edit alone does to a model's outputs.

Every edit is applied to a copy of the original, of which only what the edit changed is run (`burnish.passes.rerun`).
Scores are written to a store as soon as they are there, and what the store knows is not measured again.
"""

from __future__ import annotations

import hashlib
import inspect
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import onnx_ir as oir

from burnish.ir.errors import BurnishError, InputError
from burnish.ir.samples import Sample
from burnish.ir.text import fingerprint
from burnish.passes import catalog, lossy
from burnish.passes.base import Pass
from burnish.passes.lossy import Edit, LossyPass
from burnish.passes.protocols import Executor, Measure
from burnish.passes.rerun import Rerun, Route
from burnish.passes.score_store import Store, samples_fingerprint

MEMORY = 1 << 30
"""Bytes of the original's values that are kept in memory, unless the caller says otherwise."""

Edits = tuple[Edit, ...]
OnStep = Callable[[int, int], None]


@dataclass(frozen=True)
class Score:
    """What edits do to a model.

    Attributes:
        values: each measure of the edited model, by the measure's name; where there is a reason, the worst value there
            is, plus or minus infinity.
        reason: why the edited model cannot be measured, one sentence; None when it was.
    """

    values: Mapping[str, float]
    reason: str | None = None


@dataclass(frozen=True, eq=False)
class Job:
    """What has to be known to score edits.

    Attributes:
        model: the original, in normal form; not to be changed.
        samples: what it is run on.
        measures: what is measured, each under a name of its own.
        passes: those whose edits are scored.
        memory: bytes of the original's values that are kept in memory; the rest goes to a temporary file.
    """

    model: oir.Model
    samples: Sequence[Sample]
    measures: Sequence[Measure]
    passes: Sequence[LossyPass]
    memory: int = MEMORY


class Spread(Protocol):
    """Scores edits in several processes."""

    def __call__(self, job: Job, plans: Sequence[Edits]) -> Iterator[tuple[int, Score]]:
        """The scores as they come, each with the number of its plan.

        Raises:
            InputError: what `Bench` raises.
        """
        ...


class Bench:
    """Scores edits in this process.

    Attributes:
        original: each measure of the original itself, by name.
    """

    def __init__(self, job: Job, execute: Executor, on_step: OnStep = lambda number, total: None) -> None:
        """Run the original on all samples.

        Args:
            job: what is scored.
            execute: makes runners.
            on_step: is told how many samples were run, and of how many.

        Raises:
            InputError: there are no samples, the model refuses one, or a measure refuses what it computes.
        """
        if not job.samples:
            raise InputError("there are no samples to score edits on")
        self.job = job
        self._rerun = Rerun(job.model, job.samples, execute, job.memory)
        try:
            self._rerun.prepare(on_step)
            self.original = self._measured(self._rerun.original)
        except BaseException:
            self._rerun.close()
            raise

    def scores(self, plans: Sequence[Edits]) -> Iterator[Score]:
        """The score of each plan, in order; the next plan is applied while one runs."""
        with ThreadPoolExecutor(1, "burnish-edits") as aside:
            coming: Future[Route | str] | None = None
            for number in range(len(plans)):
                route = self.route(plans[number]) if coming is None else coming.result()
                coming = aside.submit(self.route, plans[number + 1]) if number + 1 < len(plans) else None
                yield self._score(route)

    def reference(self, number: int) -> dict[str, Any]:
        """What the original computes on the sample of a number, by output; not to be changed."""
        return self._rerun.original(number)

    def close(self) -> None:
        """Free the sessions and what was kept."""
        self._rerun.close()

    def route(self, edits: Edits) -> Route | str:
        """How to run the model with these edits, or why they cannot be made."""
        try:
            edited, _ = lossy.apply(self.job.model, edits, self.job.passes)
        except BurnishError as error:
            return f"it cannot be made: {error.cause}"
        return self._rerun.route(edited)

    def _score(self, route: Route | str) -> Score:
        if isinstance(route, str):
            return self._worst(route)
        try:
            with self._rerun.running(route) as run:
                return Score(self._measured(run))
        except InputError as error:
            return self._worst(error.cause if error.place is None else f"{error.place}: {error.cause}")

    def _worst(self, reason: str) -> Score:
        signs = {measure.name: -1 if measure.higher_is_better else 1 for measure in self.job.measures}
        return Score({name: sign * math.inf for name, sign in signs.items()}, reason)

    def _measured(self, run: Callable[[int], Mapping[str, Any]]) -> dict[str, float]:
        """Every measure of a model; one sample is measured while the next one runs."""
        partials: list[list[Any]] = []
        with ThreadPoolExecutor(1, "burnish-measures") as aside:
            coming: Future[list[Any]] | None = None
            for number in range(len(self.job.samples)):
                outputs = run(number)
                if coming is not None:
                    partials.append(coming.result())
                coming = aside.submit(self._partials, number, outputs)
                del outputs
            if coming is not None:
                partials.append(coming.result())
        by_measure = zip(self.job.measures, zip(*partials, strict=True), strict=True)
        return {measure.name: measure.value(list(found)) for measure, found in by_measure}

    def _partials(self, number: int, outputs: Mapping[str, Any]) -> list[Any]:
        sample, reference = self.job.samples[number], self.reference(number)
        _check(outputs, reference, sample)
        return [measure.partial(outputs, reference, sample) for measure in self.job.measures]


def _check(outputs: Mapping[str, Any], reference: Mapping[str, Any], sample: Sample) -> None:
    """Whether outputs are finite wherever the original's are.

    Raises:
        InputError: they are not.
    """
    for name, array in outputs.items():
        if array is reference.get(name) or not isinstance(array, np.ndarray) or array.dtype.kind not in "fcV":
            continue
        with np.errstate(over="ignore", invalid="ignore"):
            if array.dtype.kind == "f" and np.isfinite(array.sum()):
                continue
        finite, other = np.isfinite(array), reference.get(name)
        if finite.all():
            continue
        if other is None or other.shape != array.shape or (np.isfinite(other) & ~finite).any():
            raise InputError(f"the output `{name}` is not finite on the sample `{sample.name}`")


@dataclass(eq=False)
class Scorer:
    """Scores edits of one model on the same samples, each measured once.

    Attributes:
        model: the original, in normal form; not to be changed.
        samples: what it is run on.
        execute: makes runners.
        measures: what is measured, each under a name of its own.
        passes: those whose edits are scored.
        store: where scores are kept; None to keep none.
        memory: bytes of the original's values that are kept in memory; the rest goes to a temporary file.
        spread: scores in several processes; None to do it in this one.
        fitted: fingerprint of what edits were fitted to, where that is something else than `samples`.
        maker: what makes the edits and runs them, as text: scores of another version are not taken.
    """

    model: oir.Model
    samples: Sequence[Sample]
    execute: Executor
    measures: Sequence[Measure]
    passes: Sequence[LossyPass]
    store: Store | None = None
    memory: int = MEMORY
    spread: Spread | None = None
    fitted: str = ""
    maker: str = ""
    _bench: Bench | None = field(default=None, init=False, repr=False)
    _found: dict[str, Score] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        self._job = Job(self.model, self.samples, self.measures, self.passes, self.memory)
        self._sources = {catalog.spec(one): _source(one) for one in self.passes}
        if self.store is not None:
            self._prints = fingerprint(self.model), samples_fingerprint(self.samples) + self.fitted + self.maker
            known = {one.name: self.store.scores(*self._prints, one.key) for one in self.measures}
            keys = set.intersection(*(set(scores) for scores in known.values())) if known else set()
            for key in keys:
                score = _read({name: scores[key] for name, scores in known.items()})
                if score is not None:
                    self._found[key] = score

    def __enter__(self) -> Scorer:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def original(self) -> Score:
        """The measures of the original itself.

        Raises:
            InputError: it refuses a sample, or a measure refuses what it computes.
        """
        if "" not in self._found:
            self._keep("", Score(self._ready().original))
        return self._found[""]

    def scores(
        self, edits: Sequence[Edit | Sequence[Edit]], on_step: OnStep = lambda number, total: None
    ) -> list[Score]:
        """The score of each edit alone, or of several edits made together.

        Args:
            edits: edits that the passes proposed for the model, or sequences of them that do not exclude each other.
            on_step: is told how many are scored, and of how many.

        Raises:
            InputError: the original refuses a sample, or a measure refuses what the original computes. What goes wrong
                with an edit is in its score.
        """
        plans = [(one,) if isinstance(one, Edit) else tuple(one) for one in edits]
        keys = [self._key(plan) for plan in plans]
        missing = {key: plan for key, plan in zip(keys, plans, strict=True) if key not in self._found}
        done = len(plans) - len(missing)
        on_step(done, len(plans))
        if missing:
            pending, names = list(missing.values()), list(missing)
            if self.spread is not None:
                coming = self.spread(self._job, pending)
            else:
                coming = enumerate(self._ready().scores(pending))
            for number, score in coming:
                self._keep(names[number], score)
                done += 1
                on_step(done, len(plans))
        return [self._found[key] for key in keys]

    def close(self) -> None:
        """Free the sessions and what was kept in memory."""
        if self._bench is not None:
            self._bench.close()
            self._bench = None

    def _ready(self) -> Bench:
        if self._bench is None:
            self._bench = Bench(self._job, self.execute)
        return self._bench

    def _keep(self, key: str, score: Score) -> None:
        self._found[key] = score
        if self.store is not None:
            keys = {one.name: one.key for one in self.measures}
            rows = {keys[name]: {"value": value, "reason": score.reason} for name, value in score.values.items()}
            self.store.add_scores(*self._prints, key, rows)

    def _key(self, plan: Edits) -> str:
        """The edits as text, with a hash of the passes' source: a pass that was changed is scored anew."""
        return "\n".join(sorted(f"{edit.key} | {self._sources[edit.spec]}" for edit in plan))


def _read(rows: Mapping[str, Any]) -> Score | None:
    """The score of what a store holds, by measure; None where that is something else."""
    values, reasons = {}, []
    for name, row in rows.items():
        value = row.get("value") if isinstance(row, dict) else None
        if not isinstance(value, float | int) or math.isnan(value):
            return None
        values[name] = float(value)
        reasons.append(row.get("reason"))
    return Score(values, next((str(reason) for reason in reasons if reason), None))


def _source(one: LossyPass) -> str:
    try:
        source = "".join(inspect.getsource(kind) for kind in type(one).__mro__ if issubclass(kind, Pass))
    except (OSError, TypeError):
        source = ""
    return hashlib.sha256(source.encode()).hexdigest()[:8]
