"""The lossy stage of `optimize`: bring the model into normal form, search or make edits, heal."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import onnx_ir as oir

from burnish import __version__
from burnish.frontends.split import Split, few, independent, split
from burnish.ir.edit import name_nodes
from burnish.ir.errors import BudgetError, BurnishError, InputError, UnchangedError
from burnish.ir.samples import Sample
from burnish.passes import catalog, decisions, lossy, pipeline, prove
from burnish.passes.base import Outcome
from burnish.passes.book import Book
from burnish.passes.judging import Judged
from burnish.passes.lossy import Edit, LossyPass, Undecided
from burnish.passes.measure_choice import measure
from burnish.passes.measures import Divergence
from burnish.passes.plan import Plan as Todo
from burnish.passes.protocols import Judge
from burnish.passes.recipes import QUANTIZED as QUANTIZED_RECIPES
from burnish.passes.score_store import folder_in_cache, samples_fingerprint
from burnish.passes.scoring import Scorer
from burnish.passes.search import Search
from burnish.passes.selection import frontier
from burnish.tools import demands, lossy_report, lossy_scores
from burnish.tools.api import samples_for
from burnish.tools.lossy import QUANTIZED, Lossy
from burnish.tools.lossy_context import context_for, largest
from burnish.tools.lossy_doubt import doubt
from burnish.tools.lossy_judges import AfterHealing, Fitting
from burnish.tools.lossy_options import Options
from burnish.tools.lossy_times import Times, provider, timed
from burnish.tools.rotations import with_samples
from burnish.tools.sparing import spared
from burnish.tools.worthwhile import worthwhile

if TYPE_CHECKING:
    from burnish.backends.fx.healing import Healed
    from burnish.backends.workers import Workers

PROVED = 4
"""Of the caller's samples, on how many the exact passes around a lossy stage are proved."""

FRONT = 12
"""Points of the predicted front of savings and errors."""

ROWS, SAMPLES, PLACES = 64, 8, 256
"""An edit alone is measured on about so many rows, and on so many samples at least, or so many places of texts and
lines; plans are on all."""

OTHERS = "take other lossy passes: `burnish passes` lists them"

HEALING = 10.0
"""How many times the allowed drop a plan may lose before it is healed."""


def run(
    model: oir.Model, todo: Todo, samples: Sequence[Sample] | None, judge: Judge, options: Options | None = None
) -> Lossy:
    """Make the lossy passes' edits: those that their options name, or those that a search within the budget finds.

    Args:
        model: the original; left untouched.
        todo: the passes and the budget.
        samples: the caller's samples; None when there are none, and edits have to be named.
        judge: what runs models.
        options: see there.

    Raises:
        InputError: there are no samples to choose by, nothing can be edited, or options and budget contradict.
        BudgetError: the budget cannot be met.
        UnchangedError: no edit can be made, or none helps.
        Miscompiled: the normal form proved wrong.
    """
    return _Stage(model, todo, samples, judge, options or Options()).run()


class _Stage:
    """One run of the lossy stage."""

    def __init__(
        self, model: oir.Model, todo: Todo, samples: Sequence[Sample] | None, judge: Judge, options: Options
    ) -> None:
        self.original, self.todo, self.samples, self.judge, self.options = model, todo, samples, judge, options
        self.on_step = options.on_step
        self.healed: dict[tuple[str, ...], Healed] = {}
        self.book = Book(folder_in_cache(f"observed/{__version__}"), lambda *at: self.on_step("observing", *at))
        self.checkpoints: list[Path] = []

    def run(self) -> Lossy:
        self.parts = None if self.samples is None else self._parted(self.samples)
        found = self._prepared()
        found.checkpoints, found.book = self.checkpoints, self.book
        self.normal = found.model
        try:
            later = {one.pass_name() for one in (*self.todo.lossy, *self.todo.passes)}
            demands.check_required([name for name in self.todo.require if name not in later], found.proof.run.steps)
            self._run(found)
        except BurnishError:
            found.forget()
            raise
        return found

    def _run(self, found: Lossy) -> None:
        outcomes = [Outcome(one.pass_name()) for one in self.todo.lossy]
        named = self._named(found.model, outcomes)
        if self.todo.budget and any(edits is not None for edits in named):
            index = next(index for index, edits in enumerate(named) if edits is not None)
            raise InputError(
                f"the options of `{catalog.spec(self.todo.lossy[index])}` name its edits, which leaves no search",
                hint="leave the budget out, or name nothing; two runs can follow each other",
            )
        if self.samples is None and any(edits is None for edits in named):
            undecided = next(one for one, edits in zip(self.todo.lossy, named, strict=True) if edits is None)
            raise InputError(
                f"`{undecided.pass_name()}` chooses by measuring, and there are no samples to measure on",
                hint="give inputs like those that the model will see with `--data`",
            )
        if self.parts is not None:
            self._judged_on(found, self.parts)
        elif self.todo.heal:
            raise InputError("there are no samples to heal on", hint="give some with `--data`")
        if self.todo.budget:
            self._search(found)
        else:
            self._make_named(found, named, outcomes)

    def _prepared(self) -> Lossy:
        """The normal form, proved; its nodes have names, by which edits find their sites again."""
        judged = self.todo.verify != "off"
        samples = self.samples[:PROVED] if self.samples is not None else samples_for(self.original) if judged else []
        seen = None if self.parts is None else self.parts.fit
        taught = with_samples(self.todo.prepare, seen, self.on_step, self.checkpoints)
        prover = prove.Prover(
            pipeline.Pipeline(taught),
            self.original,
            samples if judged else [],
            self.judge if judged else None,
            self.todo.verify,
            frozenset(),
            on_step=self.on_step,
        )
        proof = prover.run()
        name_nodes(proof.run.model)
        return Lossy(proof.run.model, proof, list(samples), budget=self.todo.budget)

    def _named(self, model: oir.Model, outcomes: Sequence[Outcome]) -> list[list[Edit] | None]:
        """The edits that the options of each pass name; None for a pass that has to measure, or is to be searched."""
        found: list[list[Edit] | None] = []
        for one, outcome in zip(self.todo.lossy, outcomes, strict=True):
            measured = one.decided or (one.everywhere and self.todo.budget)
            try:
                found.append(None if measured else one.asked(model, outcome))
            except Undecided:
                if not self.todo.budget:
                    raise
                found.append(None)
        return found

    def _parted(self, samples: Sequence[Sample]) -> Split:
        """The samples that edits are fitted to, and those that the result is measured on."""
        self.on_step("running the original", 0, 1)
        runner = self.judge.execute(self.original)
        parts = split(samples, self.original, runner)
        runner.close()
        return parts

    def _judged_on(self, found: Lossy, parts: Split) -> None:
        """Choose what is looked at, and what the result is measured by."""
        assert self.samples is not None
        self.fitting = parts.fit
        context = context_for(found.model, self.fitting, target=self.todo.target, book=self.book, on_step=self.on_step)
        self.context = replace(
            context, searched=bool(self.todo.budget), timed=self.todo.budget.objective == "latency"
        )
        chosen = measure(self.options.metric, found.model, self.samples, keeps=self.context.keeps)
        found.measure, found.reason = chosen.measure, chosen.reason
        found.fitted, found.held_out, found.how = len(self.fitting), len(parts.held_out), parts.how
        rows = independent(parts.held_out, self.original)
        found.judged = Judged(
            found.model, parts.held_out, chosen.measure, self.judge.execute, self.todo.lossy, independent=rows
        )

    def _make_named(self, found: Lossy, named: Sequence[list[Edit] | None], outcomes: Sequence[Outcome]) -> None:
        edits: list[Edit] = []
        for one, given, outcome in zip(self.todo.lossy, named, outcomes, strict=True):
            wanted = one.propose(found.model, self.context, outcome) if given is None else given
            edits += self._worthwhile(found, one, found.free(wanted, edits, outcome), outcome)
        if self.parts is not None and "size" in self.todo.guard:
            edits = spared(found.model, edits, self.todo, self.context, outcomes, self.on_step)
        if not edits:
            raise UnchangedError(_nothing(outcomes, {}), hint=_others(self.todo.lossy))
        self._make(found, edits, outcomes)

    def _worthwhile(self, found: Lossy, one: LossyPass, edits: Sequence[Edit], outcome: Outcome) -> Sequence[Edit]:
        """The edits of a pass of a recipe, where they pay; all that the caller asked for by name."""
        if not one.saves or catalog.spec(one) in self.todo.named or "size" not in self.todo.guard or self.todo.compiled:
            return edits
        self.on_step("seeing what they save", 0, 1)
        lowering = pipeline.Pipeline(self.todo.passes)
        sample = largest(self.samples) if self.samples else None
        return worthwhile(
            found.model, one, edits, outcome, lambda part: lowering.rewrite(part).model, self.judge, sample
        )

    def _search(self, found: Lossy) -> None:
        assert found.measure is not None and found.judged is not None
        outcomes = [Outcome(one.pass_name()) for one in self.todo.lossy]
        edits: list[Edit] = []
        refused: dict[str, str] = {}
        for number, (one, outcome) in enumerate(zip(self.todo.lossy, outcomes, strict=True)):
            self.on_step(f"{one.pass_name()}: looking for edits", number, len(outcomes))
            try:
                edits += one.propose(found.model, self.context, outcome)
            except InputError as error:
                if len(outcomes) == 1:
                    raise
                refused[outcome.name] = error.cause
        if not edits:
            raise UnchangedError(_nothing(outcomes, refused), hint=OTHERS)
        proposed = edits
        found.whole = float(pipeline.constant_bytes(found.model))
        times = Times()
        if self.todo.budget.objective == "latency":
            times = timed(found, edits, self.todo, self.fitting, self.options)
            edits = times.edits
        divergence = measure("divergence", found.model, keeps=self.context.keeps).measure
        if found.measure.name == divergence.name and found.measure.key != divergence.key:
            raise InputError(
                f"edits are scored by a `{divergence.name}` of ours", place="--metric", hint="name yours otherwise"
            )
        measures = list({one.name: one for one in (divergence, found.measure)}.values())
        saving = lossy_scores.saving(self.todo.budget)
        with ExitStack() as stack:
            spread = None
            if self.options.workers is not None:
                spread = stack.enter_context(closing(self._workers(self.options.workers)))
            make = partial(
                Scorer,
                found.model,
                execute=self.judge.execute,
                measures=measures,
                passes=self.todo.lossy,
                store=self.options.store,
                spread=spread,
                maker=self._maker(),
            )
            scorer = stack.enter_context(make(samples=self.fitting))
            assert isinstance(divergence, Divergence)
            places = divergence.places(found.judged.reference(0), found.judged.samples[0])
            some = few(self.fitting, found.model, rows=ROWS, least=SAMPLES, places=places, enough=PLACES)
            alone = scorer
            if len(some) < len(self.fitting):
                alone = stack.enter_context(make(samples=some, fitted=samples_fingerprint(self.fitting)))
            judge = Fitting(alone, found.measure)
            found.scores = lossy_scores.alone(edits, judge, divergence.name, self.todo, self._slack, self.on_step)
            edits = [edit for edit in edits if found.scores[edit.key].measured]
            beside = edits if self.options.pairs else []
            pairs = lossy_scores.pairs(beside, found.scores, alone, divergence.name, self.on_step)
            if alone is not scorer:
                alone.close()
            fitting = Fitting(scorer, found.measure)
            search = Search(
                edits,
                {key: one.error for key, one in found.scores.items()},
                saving,
                found.whole,
                self.todo.budget,
                fitting,
                AfterHealing(found.judged, self._healed) if self.todo.heal else found.judged,
                pairs=pairs,
                joint=times.together,
                beside=lossy_scores.saving(self.todo.budget, beside=True),
                timed=times.whole,
                slack=self._slack,
                on_step=self.on_step,
            )
            found.found = search.run()
            errors, drops = search.errors, {key: one.drop for key, one in found.scores.items()}
            front = frontier(edits, errors, saving, points=FRONT, pairs=pairs, joint=times.together)
            found.frontier = [(one.saved, one.error, math.fsum(drops[edit.key] for edit in one.edits)) for one in front]
        found.warning = None if self.options.store is None else self.options.store.warning
        for one, outcome in zip(self.todo.lossy, outcomes, strict=True):
            own = [edit for edit in proposed if edit.spec == catalog.spec(one)]
            outcome.skipped += found.unchosen(own, found.found.plan.edits)
        if not found.found.plan.edits and self.todo.budget.wanted is None:
            more = "" if (unsure := doubt(found)) is None else f"{unsure.why}; "
            cause = f"no edit is made: {lossy_report.why_nothing(found)}"
            raise UnchangedError(cause, hint=f"{more}allow more, or {OTHERS}")
        self._make(found, found.found.plan.edits, outcomes)
        self._check_size(found)

    def _check_size(self, found: Lossy) -> None:
        """Whether the edits together leave as few bytes as their own accounts add up to, where a size is wanted."""
        if self.todo.budget.size is None:
            return
        wanted, left = self.todo.budget.size.of(found.whole), pipeline.constant_bytes(found.model)
        if left > wanted * (1 + 1e-9):
            raise BudgetError(
                f"by their own accounts the edits come down to {wanted:,.0f} bytes of weights, together to {left:,}",
                hint="want less, so that it comes down far enough",
            )

    @property
    def _slack(self) -> float:
        return HEALING if self.todo.heal else 1.0

    def _maker(self) -> str:
        from burnish.backends.ort.session import runtime

        return f"burnish {__version__}, onnxruntime {runtime().__version__}, {self.todo.target == 'ort-cuda'}"

    def _workers(self, where: str) -> Workers:
        from burnish.backends.ort.session import executor
        from burnish.backends.workers import Workers

        return Workers(where, partial(executor, threads=1, target=provider(self.todo)))

    def _make(self, found: Lossy, edits: Sequence[Edit], outcomes: Sequence[Outcome]) -> None:
        """Apply edits, with the account of each pass."""
        before = found.model
        found.edits = edits
        self.on_step("making the edits", 0, 1)
        found.came_from(before, edits)
        found.model, made = lossy.apply(before, edits, self.todo.lossy)
        for one, outcome in zip(self.todo.lossy, outcomes, strict=True):
            done = made.get(catalog.spec(one), outcome)
            found.errors |= outcome.errors | done.errors
            found.notes += outcome.notes
            if done is not outcome:
                done.skipped = [*outcome.skipped, *done.skipped]
                found.notes += done.notes
            found.steps.append(pipeline.Step(catalog.spec(one), done))
        if found.found is None:
            found.notes += decisions.notes(before, edits)
        if found.judged is not None:
            self.on_step("measuring the edits together", 0, 1)
            found.result = found.judged.of(found.model)
        if self.todo.heal and edits:
            found.healed = self._healed(edits)
            found.model = found.healed.model
        if edits and any(one.ports for one in self.todo.lossy):
            found.proved_on = samples_for(found.model)
        else:
            found.proved_on = [replace(one, feeds=lossy.feeds(found.model, one.feeds)) for one in found.proved_on]

    def _healed(self, edits: Sequence[Edit]) -> Healed:
        """The model with these edits, trained against the original on the fitting samples; each once."""
        from burnish.backends.fx.healing import HealOptions, Progress, heal

        def tell(progress: Progress) -> None:
            self.on_step(f"healing, loss {progress.loss:.4g}", round(1000 * progress.share), 1000)

        key = tuple(edit.key for edit in edits)
        if key not in self.healed:
            student, _ = lossy.apply(self.normal, edits, self.todo.lossy)
            options = self.options.healing or HealOptions()
            folder = folder_in_cache(f"heal/{__version__}")
            made = heal(student, self.normal, self.fitting, options, tell, keeps=self.context.keeps, folder=folder)
            self.healed[key] = made
            self.checkpoints += [] if made.checkpoint is None else [made.checkpoint]
        return self.healed[key]


def _others(passes: Sequence[LossyPass]) -> str:
    """What may be tried where these passes found nothing."""
    names = {one.pass_name() for one in passes}
    more = [name for spec in QUANTIZED_RECIPES["int8"] if (name := spec.partition("{")[0]) not in names]
    if not more or any(one.order != QUANTIZED for one in passes):
        return OTHERS
    own = ", ".join(f"`{name}`" for name in more)
    return f"`--recipe int8` takes other layers, as convolutions and LSTMs, by {own}; `burnish passes` lists them all"


def _nothing(outcomes: Sequence[Outcome], refused: Mapping[str, str]) -> str:
    """Why no pass proposed anything."""
    passes: dict[str, list[str]] = {}
    for outcome in outcomes:
        reasons = Counter(skip.reason for skip in outcome.skipped).most_common(2)
        why = refused.get(outcome.name) or "; ".join(reason for reason, _ in reasons) or "it found no site"
        passes.setdefault(why, []).append(f"`{outcome.name}`")
    return "nothing can be edited: " + "; ".join(f"{', '.join(names)}: {why}" for why, names in passes.items())
