"""The search for fast schedules: MetaSchedule's evolution of candidates, one kernel a round, within a budget.

Candidates come from the rules of TVM's MetaSchedule (Shao et al., Tensor Program Optimization with Probabilistic
Programs, NeurIPS 2022), ranked by a model that is trained on what was measured (XGBoost).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

from burnish.backends.tvm import intrinsics, quiet
from burnish.backends.tvm.reasons import last_line
from burnish.backends.tvm.target import Target
from burnish.backends.tvm.tuning import budget as budgets
from burnish.backends.tvm.tuning import shared_memory
from burnish.backends.tvm.tuning.applying import DYNAMIC, replayed
from burnish.backends.tvm.tuning.budget import Budget
from burnish.backends.tvm.tuning.database import Database, Found
from burnish.backends.tvm.tuning.kernels import Kernel, kernels
from burnish.backends.tvm.tuning.laboratory import Laboratory
from burnish.backends.tvm.tuning.records import Record
from burnish.ir.errors import MissingPackageError

_MANY = 1_000_000
_WARM = 32
"""Measured candidates before the model is asked; until then ranks are random."""
_SLOW = 4.0
"""Times the best: slower candidates are run twice and no more."""


@dataclass(frozen=True)
class Progress:
    """Where tuning is.

    Attributes:
        kernel: that was worked on last.
        done, total: candidates, or seconds, of the budget.
        seconds: of one run of the module by the best candidates; None while a kernel has none.
    """

    kernel: str
    done: float
    total: float
    seconds: float | None


@dataclass(frozen=True)
class Task:
    """A kernel and what became of it.

    Attributes:
        kernel: what was tuned.
        share: of the budget: candidates or seconds.
        before: candidates that the database held already.
        trials: candidates that were tried now.
        seconds: of the best, old or new; None when none could be measured.
        reason: why it was not tuned (further); empty when its share was spent.
    """

    kernel: Kernel
    share: float
    before: int
    trials: int
    seconds: float | None
    reason: str


@dataclass(frozen=True)
class Tuned:
    """What tuning did.

    Attributes:
        tasks: one for each kernel.
        wall: seconds it took.
        notes: records that were skipped, and why.
    """

    tasks: tuple[Task, ...]
    wall: float
    notes: tuple[str, ...]

    @property
    def trials(self) -> int:
        """Candidates that were tried now."""
        return sum(task.trials for task in self.tasks)

    @property
    def seconds(self) -> float | None:
        """Of one run of the module by the best candidates; None when a kernel has none."""
        return _total(self.tasks)


def tune(
    module: Any,
    target: Target,
    budget: Budget,
    database: Database,
    on_progress: Callable[[Progress], None] = lambda progress: None,
    *,
    rpc: tuple[str, int, str] | None = None,
    threads: int = 1,
    workers: int = 2,
    model: str = "xgb",
    space: str = "from-target",
    seed: int = 1,
) -> Tuned:
    """Look for fast schedules of a module's kernels and write what is found into a database.

    What the database holds already counts towards the budget: tuning that was stopped goes on where it was, and a
    second time there is nothing to do. Kernels with symbolic sizes are left alone.

    Args:
        module: from `compiling.fused`.
        target: what it is compiled for; kernels are timed on this machine unless `rpc` is given.
        budget: candidates, or seconds, of all kernels together.
        database: where records go.
        on_progress: called after each round.
        rpc: host, port and key of a tracker whose servers time candidates.
        threads: that kernels run on.
        workers: candidates that are built at a time.
        model: that ranks candidates: `xgb`, or `random`.
        space: rules that candidates are made by; for GPUs `cuda` or `cuda-tensorcore` instead of what TVM chooses.
        seed: of the search.

    Raises:
        MissingPackageError: a package that tuning needs is absent.
        InputError: the database cannot be written, or there is no tracker.
    """
    start = time.monotonic()
    if model == "xgb" and find_spec("xgboost") is None:
        raise MissingPackageError("tuning needs the package `xgboost`", hint="pip install 'burnish[tune]'")
    every = kernels(module)
    static = [one for one in every if one.arguments is not None and one.calls]
    parts = budgets.shares(budget, [one.cost(target.kind) for one in static])
    found = [database.read(one, target, threads) for one in static]
    jobs = [_Job(*given, budget.timed) for given in zip(static, parts, found, strict=True)]
    _share(jobs, budget)
    if _open(jobs, budget):
        with Laboratory(
            target.tvm(threads=threads),
            {"llvm": "cpu"}.get(target.kind, target.kind),
            threads=threads,
            workers=workers,
            remote=rpc,
        ) as laboratory:
            search = _Search(target, threads, workers, model, space, seed, laboratory)
            while open_jobs := _open(jobs, budget):
                job = min(open_jobs, key=lambda one: (one.done() / one.share, -one.share))
                database.append(job.kernel, target, threads, search.round(job))
                _share(jobs, budget)
                total = sum(one.share for one in jobs)
                done = sum(min(one.done(), one.share) if one.wants() else one.share for one in jobs)
                on_progress(Progress(job.kernel.name, done, total, _total([one.task() for one in jobs])))
    rest = [Task(one, 0.0, 0, 0, None, DYNAMIC) for one in every if one.arguments is None]
    notes = [note for one in found for note in one.notes]
    return Tuned((*(job.task() for job in jobs), *rest), time.monotonic() - start, tuple(notes))


def _share(jobs: Sequence[_Job], budget: Budget) -> None:
    """Share the budget by the time that the kernels take, once each that can be tuned was timed.

    What a kernel spent of its first share stays its own, so that the budget holds, and a second time nothing is left.
    """
    tunable = [job for job in jobs if not job.end and job.first]
    if not tunable or any(not job.trials for job in tunable):
        return
    left = budget.amount - sum(min(job.done(), job.first) for job in jobs if job.end)
    floors = [max(min(job.done(), job.first), budgets.LEAST) for job in tunable]
    costs = [(job.best or 0.0) * job.kernel.calls for job in tunable]
    for job, share in zip(tunable, budgets.filled(left, floors, costs), strict=True):
        job.share = share


def _open(jobs: Sequence[_Job], budget: Budget) -> list[_Job]:
    """The kernels whose share is not spent; none when all the time is spent, as rounds may take longer than shares."""
    rounds = [job.round() for job in jobs if job.trials]
    if budget.timed and rounds:
        spent = sum(min(job.spent, max(job.share, job.round())) for job in jobs)
        if spent + sum(rounds) / len(rounds) / 2 >= budget.amount:
            return []
    return [job for job in jobs if job.wants()]


def _total(tasks: Sequence[Task]) -> float | None:
    total = 0.0
    for task in tasks:
        if task.seconds is None:
            return None
        total += task.seconds * task.kernel.calls
    return total


class _Job:
    """A kernel being tuned."""

    def __init__(self, kernel: Kernel, share: float, found: Found, timed: bool) -> None:
        self.kernel, self.share, self.found, self.timed = kernel, share, found, timed
        self.first = share
        self.trials, self.spent, self.end = found.trials, found.spent, found.end
        best = found.best()
        self.best = best[0].seconds if best else None
        self.failed = 0
        whole = share if not timed else 16 * budgets.LEAST
        self.batch = int(max(1, min(4, whole // (16 * budgets.LEAST)))) * budgets.LEAST
        self.context: Any = None

    def done(self) -> float:
        return self.spent if self.timed else self.trials

    def wants(self) -> bool:
        """Whether another round fits its share; what half fits does."""
        if self.end or not self.share:
            return False
        if not self.timed:
            return self.trials < self.share
        return self.spent + self.round() / 2 < self.share

    def round(self) -> float:
        """Seconds that a round takes, as far as earlier ones tell."""
        return self.spent / max(self.trials, 1) * self.batch

    def add(self, record: Record) -> None:
        self.spent += record.spent
        self.end = record.end or self.end
        if record.end:
            return
        self.trials += 1
        self.failed = 0 if record.seconds is not None else self.failed + 1
        if record.seconds is not None:
            self.best = record.seconds if self.best is None else min(self.best, record.seconds)

    def task(self) -> Task:
        reason = self.end or ("" if self.share and self.trials else "the budget is too small for all kernels")
        before = self.found.trials
        return Task(self.kernel, self.share, before, self.trials - before, self.best, reason)


class _Search:
    def __init__(
        self, target: Target, threads: int, workers: int, model: str, space: str, seed: int, laboratory: Laboratory
    ) -> None:
        intrinsics.load()
        from tvm.s_tir import meta_schedule

        self.schedule, self.laboratory = meta_schedule, laboratory
        self.target, self.made = target, target.tvm(threads=threads)
        self.asking = target.tvm(threads=threads, asking=True)
        self.workers, self.space, self.seed = workers, space, seed
        self.known = meta_schedule.database.MemoryDatabase()
        if model == "random":
            self.model = meta_schedule.cost_model.RandomModel(seed=seed)
        else:
            self.model = meta_schedule.cost_model.XGBModel(num_warmup_samples=_WARM, num_tuning_cores=workers)

    def round(self, job: _Job) -> list[Record]:
        """Try some candidates of a kernel; the records are added to the job, too."""
        began = time.monotonic()
        first = job.context is None
        if first:
            self._begin(job)
        try:
            with quiet.quiet():
                if first:
                    job.context.pre_tuning(_MANY, job.batch, database=self.known, cost_model=self.model)
                candidates = list(job.context.generate_measure_candidates() or ())
        except Exception as error:  # TVM's errors have many types; a kernel without a design space keeps plain loops
            return self._kept(job, [Record(end=f"it cannot be tuned: {last_line(error, 200)}")])
        if not candidates:
            return self._kept(job, [Record(end="every schedule was tried")])
        results = self._measured(candidates, _SLOW * (job.best or 0.25))
        with quiet.quiet():
            self._learn(job, candidates, results)
        spent = (time.monotonic() - began) / len(candidates)
        records = [
            Record(
                spent=spent, seconds=seconds, trace=_plain(one.sch.trace.as_json()) if seconds else None, error=error
            )
            for one, (seconds, error) in zip(candidates, results, strict=True)
        ]
        if job.failed + len(records) >= 3 * budgets.LEAST and all(one.seconds is None for one in records):
            records.append(Record(end=f"none of its schedules could be measured: {records[-1].error}"))
        return self._kept(job, records)

    def _measured(self, candidates: Sequence[Any], limit: float) -> list[tuple[float | None, str]]:
        """As `Laboratory.measure`; candidates that no compiler would take for their shared memory are not built."""
        fit = [self._fits(one) for one in candidates]
        timed = iter(self.laboratory.measure([one for one, good in zip(candidates, fit, strict=True) if good], limit))
        return [next(timed) if good else (None, "it takes too much static shared memory") for good in fit]

    def _fits(self, candidate: Any) -> bool:
        if self.target.kind != "cuda":
            return True
        try:
            return shared_memory.bytes_of(candidate.sch.mod)["shared"] <= shared_memory.GIVEN
        except Exception:  # TVM's errors have many types; the compiler will say what is wrong with it
            return True

    def _kept(self, job: _Job, records: list[Record]) -> list[Record]:
        for record in records:
            job.add(record)
        return records

    def _begin(self, job: _Job) -> None:
        """Make a kernel's design space, and tell what is known of it already."""
        strategy = self.schedule.search_strategy.EvolutionarySearch(population_size=min(512, 64 * self.workers))
        # Tiles of tensor cores lie in memory that the launch asks for; those of other kernels do not.
        job.context = self.schedule.TuneContext(
            job.kernel.module,
            target=self.asking if job.kernel.is_short else self.made,
            space_generator=self.schedule.space_generator.PostOrderApply(
                sch_rules=self.space, postprocs=self.space, mutator_probs=self.space
            ),
            search_strategy=strategy,
            task_name=job.kernel.name,
            rand_state=self.seed + job.trials,
            num_threads=self.workers,
        )
        workload = self.known.commit_workload(job.kernel.module)
        for record in job.found.best()[:32]:
            try:
                trace = replayed(job.kernel, record).trace
            except ValueError:
                continue
            self._know(workload, job.kernel, trace, record.seconds or 0.0)

    def _know(self, workload: Any, kernel: Kernel, trace: Any, seconds: float) -> None:
        info = self.schedule.arg_info.ArgInfo.from_prim_func(kernel.module["main"])
        record = self.schedule.database.TuningRecord(trace, workload, [seconds], self.made, info)
        self.known.commit_tuning_record(record)

    def _learn(self, job: _Job, candidates: Sequence[Any], results: Sequence[tuple[float | None, str]]) -> None:
        result = self.schedule.runner.RunnerResult
        told = [result([seconds], None) if seconds else result(None, error or "?") for seconds, error in results]
        self.model.update(job.context, candidates, told)
        workload = self.known.commit_workload(job.kernel.module)
        for one, (seconds, _) in zip(candidates, results, strict=True):
            if seconds:
                self._know(workload, job.kernel, one.sch.trace, seconds)
        job.context.notify_runner_results(candidates, told)


def _plain(value: Any) -> Any:
    """TVM's JSON in Python's types."""
    if isinstance(value, (str, int, float)) or value is None:
        return str(value) if isinstance(value, str) else value
    if hasattr(value, "value"):
        return value.value
    return [_plain(one) for one in value]
