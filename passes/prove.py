"""Rewrite a model and prove it: equal on every sample, no pass slower or larger than what it found."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import onnx_ir as oir

from burnish.ir import weights
from burnish.ir.errors import InputError, MissingPackageError, VerificationError
from burnish.ir.samples import Sample
from burnish.ir.walk import STANDARD_DOMAINS, walk
from burnish.passes import catalog, reduce, verify
from burnish.passes.pipeline import Pipeline, Run, Step, constant_bytes
from burnish.passes.protocols import Executor, Judge, Runner, Verdict

Verify = Literal["off", "ends", "each"]
Guard = Literal["latency", "size"]

REPLAY_LIMIT = 0.02
"""Seconds the runtime takes for the cheapest sample up to which `ends` replays it in float64; `each` always does."""

REPLAY_BUDGET = 0.15
"""Seconds of CPU after which no further sample is replayed, but for those that float64 has to judge."""

TIMED_SECONDS = 0.01
"""The largest sample that runs within so many seconds is the one whose latency is guarded."""

LARGEST_TIMED = 256e6

GROWTH_LIMIT = 1.01, 4096
"""A pass may enlarge the constants by this factor and this many bytes before it counts as having made them larger."""

DRAWS = 8
"""How often inputs are moved in the last place before a difference that is larger than rounding counts as wrong."""

CULPRIT_ROUNDS = 4

RANDOM = (
    "Bernoulli",
    "Multinomial",
    "RandomNormal",
    "RandomNormalLike",
    "RandomUniform",
    "RandomUniformLike",
)
"""Operators that draw random numbers; Dropout does in training mode."""


class Miscompiled(VerificationError):
    """A rewrite changed what the model computes. Carries the smallest model on which it does so.

    Attributes:
        spec: the pass at fault.
        node: the node whose rewrite is at fault.
        model: the model before that one rewrite, cut down as far as the failure stays.
        sample: inputs of `model` that show the difference.
    """

    def __init__(self, spec: str, node: str, found: str, model: oir.Model, sample: Sample) -> None:
        super().__init__(f"`{spec}` changed what the model computes when it rewrote `{node}`: {found}")
        self.spec, self.node, self.model, self.sample = spec, node, model, sample


@dataclass
class Proof:
    """A rewritten model and what was shown about it.

    Attributes:
        run: the model and the steps.
        verification: how its outputs compare with the original's; None when switched off.
        latency: the paired timing against the original; None when not measured.
        latency_sample: the sample that was timed.
        unverified: why nothing was compared; empty when something was.
    """

    run: Run
    verification: verify.Verification | None = None
    latency: Verdict | None = None
    latency_sample: str = ""
    unverified: str = ""


@dataclass
class Prover:
    """Runs a pipeline on a model under proof.

    Attributes:
        pipeline: the passes.
        model: the original, left untouched.
        samples: the inputs it is judged on; unused when `verify` is `off`.
        judge: what executes models; None when `verify` is `off` and no latency is guarded.
        mode: compare at the `ends`, after `each` pass, or not at all.
        guard: what no pass may make worse.
        candidate: opens the final model as the user will get it, leanly when asked; by default `judge.execute`.
        largest_timed: bytes of constants above which latency is not guarded: two sessions would have to be held.
        on_step: progress.
    """

    pipeline: Pipeline
    model: oir.Model
    samples: Sequence[Sample]
    judge: Judge | None
    mode: Verify = "ends"
    guard: frozenset[str] = frozenset({"latency", "size"})
    candidate: Callable[[Run, bool], Runner] | None = None
    largest_timed: float = LARGEST_TIMED
    on_step: Callable[[str, int, int], None] | None = None
    undone: dict[str, str] = field(default_factory=dict)

    def run(self) -> Proof:
        """Rewrite, compare, time; take back what made the model worse and start over, until nothing has to be.

        Raises:
            Miscompiled: when the rewritten model computes something else.
            InputError: when the original cannot be run on any sample.
        """
        if self.mode == "off" or self.judge is None:
            return Proof(self._rewrite_within_size(), unverified="verification is off")
        timed = "latency" in self.guard and constant_bytes(self.model) <= self.largest_timed
        try:
            original = (self.judge.execute if timed else self.judge.lean)(self.model)
        except MissingPackageError:
            raise
        except InputError as error:
            foreign = sorted(
                {f"{node.domain}.{node.op_type}" for node in walk(self.model) if _is_foreign(node, self.model)}
            )
            if not foreign:
                raise
            reason = f"the runtime does not know {', '.join(foreign)}: {error.cause}"
            return Proof(self._rewrite_within_size(), unverified=reason)
        try:
            self._tell("running the original")
            expected = verify.Expected(original, self.samples)
            if walk(self.model, "Dropout", *RANDOM) and expected.wavers(original):
                reason = "the model gives something else each time it runs on the same inputs"
                return Proof(self._rewrite_within_size(), unverified=reason)
            if not timed:
                original.close()
                weights.release(self.model)
            other = self.judge.lean if timed else self.judge.execute
            return self._prove(_Checker(self.model, expected, self.judge, other), original if timed else None)
        finally:
            original.close()

    def _tell(self, what: str) -> None:
        if self.on_step is not None:
            self.on_step(what, 0, 1)

    def _prove(self, checker: _Checker, original: Runner | None) -> Proof:
        """Rewrite and compare; with a runner of the original, time and undo what is slow as well."""
        expected = checker.expected
        while True:
            run = self._rewrite_within_size(checker if self.mode == "each" else None)
            proof = Proof(run)
            self._tell("comparing with the original")
            try:
                opened = self.candidate(run, original is None) if self.candidate else checker.judge.execute(run.model)
            except InputError as error:
                if checker.load_and_check(run.model).holds:
                    raise
                raise self._culprit(checker, run) from error
            try:
                proof.verification = checker.check(run.model, opened, replay_always=self.mode == "each")
                if not proof.verification.holds:
                    raise self._culprit(checker, run)
                if original is None or run.rewritten == 0:
                    return proof
                self._tell("timing")
                sample = expected.largest(TIMED_SECONDS)
                proof.latency = self._timed(original, opened, sample)
                proof.latency_sample = sample.name
            finally:
                opened.close()
            if not proof.latency.slower:
                return proof
            self._undo_slow(run, original, sample, proof.latency)

    def _rewrite_within_size(self, checker: _Checker | None = None) -> Run:
        while True:
            run = self.pipeline.rewrite(
                self.model,
                undone=self.undone,
                check=self.mode == "each",
                on_step=self.on_step,
                after=None if checker is None else self._check_step(checker),
            )
            factor, slack = GROWTH_LIMIT
            larger = [s for s in run.steps if s.bytes[1] > factor * s.bytes[0] + slack] if "size" in self.guard else []
            if not larger:
                return run
            step = larger[0]
            self.undone[step.spec] = f"it made the constants larger: {step.bytes[0]} to {step.bytes[1]} bytes"

    def _check_step(self, checker: _Checker) -> Callable[[oir.Model, Step], None]:
        def after(model: oir.Model, step: Step) -> None:
            if not checker.load_and_check(model).holds:
                raise self._culprit(checker, None)

        return after

    def _culprit(self, checker: _Checker, run: Run | None) -> Miscompiled:
        """Find the first wrong rewrite by bisection over all rewrites, then the smallest model that shows it."""

        def fails(limit: int) -> verify.Verification | None:
            found = checker.load_and_check(self.pipeline.rewrite(self.model, limit=limit, undone=self.undone).model)
            return None if found.holds else found

        total = run.rewritten if run is not None else self.pipeline.rewrite(self.model, undone=self.undone).rewritten
        low, high = 0, total
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (low, middle) if fails(middle) else (middle, high)
        broken = self.pipeline.rewrite(self.model, limit=high, undone=self.undone)
        step = [s for s in broken.steps if s.outcome.rewritten][-1]
        node = step.outcome.changed_nodes[-1] if step.outcome.changed_nodes else "the whole model"
        found = fails(high)
        before = self.pipeline.rewrite(self.model, limit=high - 1, undone=self.undone).model
        one = next(one for one in self.pipeline.passes if catalog.spec(one) == step.spec)
        shown = found.shown_by if found is not None else ""
        sample = next((s for s, _ in checker.expected.kept if s.name == shown), checker.sample)
        small, feeds = reduce.smallest(before, Pipeline([one]), node, sample, checker.judge)
        return Miscompiled(step.spec, node, _difference(found), small, feeds)

    def _timed(self, original: Runner, runner: Runner, sample: Sample) -> Verdict:
        """A paired timing; `slower` only when a second one, taken afresh, says so too: other work comes in bursts."""
        assert self.judge is not None
        verdict = self.judge.clock(original, runner, sample.feeds)
        return self.judge.clock(original, runner, sample.feeds) if verdict.slower else verdict

    def _undo_slow(self, run: Run, original: Runner, sample: Sample, verdict: Verdict) -> None:
        """Find the pass that made the model slower by bisection over those that changed something; leave it out."""
        assert self.judge is not None
        changed = [step for step in run.steps if step.outcome.rewritten]
        low, high = 0, len(changed)
        while high - low > 1:
            middle = (low + high) // 2
            limit = sum(step.outcome.rewritten for step in changed[:middle])
            runner = self.judge.execute(self.pipeline.rewrite(self.model, limit=limit, undone=self.undone).model)
            try:
                found = self._timed(original, runner, sample)
            finally:
                runner.close()
            if found.slower:
                high, verdict = middle, found
            else:
                low = middle
        reason = f"it made the model slower: {verdict.ratio:.3f}x ({verdict.low:.3f} to {verdict.high:.3f})"
        self.undone[changed[high - 1].spec] = reason
        if len(self.undone) > CULPRIT_ROUNDS:
            self.undone.update({step.spec: "the model stayed slower whatever was left out" for step in changed})


def compare_code(
    model: oir.Model, samples: Sequence[Sample], judge: Judge, code: Runner, *, timed: bool
) -> tuple[verify.Verification, Verdict | None, str]:
    """Compare compiled code with a model in the runtime, and time the two in turns.

    What rounding makes of the model itself, beyond the dtype's, is allowed here as it is between two models; float64 is
    not asked, as code cannot be run in it.

    Returns:
        The comparison, the timing against the model, and the sample that was timed.

    Raises:
        InputError: the model cannot be run on any sample.
    """
    original = judge.execute(model)
    try:
        expected = verify.Expected(original, samples)
        checker = _Checker(model, expected, judge, judge.lean)
        found = checker.compare(code, verify.COMPILED)
        if not found.holds or not timed:
            return found, None, ""
        sample = expected.largest(TIMED_SECONDS)
        return found, judge.clock(original, code, sample.feeds), sample.name
    finally:
        original.close()


class _Checker:
    """Compares a rewritten model with the original: in the runtime on all samples, in float64 while time lasts."""

    def __init__(self, original: oir.Model, expected: verify.Expected, judge: Judge, other: Executor) -> None:
        self.original, self.expected, self.judge = original, expected, judge
        self.sample, self.seconds = expected.cheapest()
        self.other, self._rounding, self._draws = other, dict[str, float](), 0

    def check(self, model: oir.Model, runner: Runner, *, replay_always: bool) -> verify.Verification:
        result = self.compare(runner)
        loose = [sample for sample, _ in self.expected.kept if sample.name in result.loosened]
        quick = replay_always or self.seconds <= REPLAY_LIMIT
        others = [sample for sample in self.expected.by_cost() if sample.name not in result.loosened] if quick else []
        if walk(self.original, *RANDOM):
            result.replay_note = "not replayed in float64: the model draws random numbers"
            return result
        if not loose and not others:
            result.replay_note = "not replayed in float64: every sample takes long; `--verify each` does it"
            return result
        try:
            before, after = self.judge.replay(self.original), self.judge.replay(model)
            start = time.process_time()
            for number, sample in enumerate([*loose, *others]):
                if number >= max(len(loose), 1) and time.process_time() - start > REPLAY_BUDGET:
                    break
                result.add_replay(sample, verify.replay(before, after, sample))
        except InputError as error:
            result.replay_note = f"not replayed in float64: {error.cause}"
            if loose:
                result.refusal = f"float32 alone cannot judge {loose[0].name}, and {result.replay_note}"
        return result

    def compare(self, runner: Runner, rounding: Mapping[str, float] = verify.ROUNDING) -> verify.Verification:
        result = verify.compare(self.expected, runner, self._noise, rounding)
        if not result.holds and self._rounding and self._draws < DRAWS:
            # One draw may miss what rounding does to a model of steps, such as scores beside a mask of -10000.
            while self._draws < DRAWS:
                self._draws += 1
                self._move_inputs(self._draws)
            result = verify.compare(self.expected, runner, self._noise, rounding)
        return result

    def load_and_check(self, model: oir.Model) -> verify.Verification:
        try:
            runner = self.judge.lean(model)
        except InputError as error:
            return verify.Verification(refusal=error.cause)
        try:
            return self.check(model, runner, replay_always=True)
        finally:
            runner.close()

    def _noise(self) -> dict[str, float]:
        """What rounding alone makes of the outputs: other settings of the runtime, inputs moved in the last place, and
        numbers of 16 bits that they are computed from.
        """
        if not self._rounding:
            kept = [sample.feeds for sample, _ in self.expected.kept]
            self._shake(self.judge.unoptimized, kept)
            self._shake(self.other, kept)
            self._move_inputs(0)
            for name, error in verify.from_halves(self.original).items():
                self._rounding[name] = max(self._rounding[name], error / verify.NOISE_FACTOR)
        return self._rounding

    def _move_inputs(self, draw: int) -> None:
        """Note what becomes of the outputs when inputs, and rows that integers pick, move in the last place."""
        moved = [
            {name: verify.nudged(array, draw) for name, array in sample.feeds.items()}
            for sample, _ in self.expected.kept
        ]
        with verify.nudged_tables(self.original, draw):
            self._shake(self.other, moved)

    def _shake(self, load: Executor, runs: Sequence[Mapping[str, np.ndarray]]) -> None:
        """Note how far the outputs of the original are off under `load`, with other feeds for the kept samples.

        Where another number of elements comes out, that says nothing of how far they may be off, and allows nothing.
        """
        runner = load(self.original)
        for feeds, (_, outputs) in zip(runs, self.expected.kept, strict=True):
            found = runner.run(feeds)
            for name, array in outputs.items():
                error = verify.relative_error(found[name], array)
                self._rounding[name] = max(error if np.isfinite(error) else 0.0, self._rounding.get(name, 0.0))
        runner.close()
        weights.release(self.original)


def _is_foreign(node: oir.Node, model: oir.Model) -> bool:
    return node.domain not in STANDARD_DOMAINS and node.op_identifier() not in model.functions


def _difference(found: verify.Verification | None) -> str:
    if found is None:
        return "the difference did not show again"
    if found.refusal:
        return f"the runtime refuses the result: {found.refusal}"
    worst = found.worst
    if worst is not None and not worst.holds:
        return f"output `{worst.output}` differs by {worst.error:.2g} (allowed {worst.tolerance:.1g}) on {worst.sample}"
    allowed = f"{verify.REPLAY_TOLERANCE:.0g}"
    return f"in float64 the outputs differ by {found.replay:.2g} (allowed {allowed}) on {found.replay_sample}"
