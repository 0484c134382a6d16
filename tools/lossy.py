"""What the lossy stage of `optimize` did."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_ir as oir

from burnish.backends.fx.healing_rows import rows
from burnish.ir import weights
from burnish.ir.edit import name_nodes, sources
from burnish.ir.errors import BudgetError
from burnish.ir.samples import Sample
from burnish.ir.walk import walk
from burnish.passes import catalog, lossy, pipeline, prove
from burnish.passes.base import Outcome, Skip
from burnish.passes.budget import Budget
from burnish.passes.judging import Judged
from burnish.passes.lossy import Edit, LossyPass
from burnish.passes.protocols import Clock, Measure, Runner, Verdict
from burnish.passes.search import Found, Judgement

if TYPE_CHECKING:
    from burnish.backends.fx.healing import Healed
    from burnish.passes.book import Book


ROUNDING = 1e-6
"""The part of the metric by which the exact passes behind the edits may change it by rounding."""


ROWS = 16
"""Rows that a model is timed on whose time depends on the row."""

QUANTIZED = 40
"""The order of passes that put numbers of fewer bits."""


@dataclass(frozen=True)
class _Each:
    """A runner that runs several samples in turn, whatever it is given."""

    runner: Runner
    samples: Sequence[Mapping[str, np.ndarray]]

    def run(self, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """The outputs of the last one."""
        return [self.runner.run(one) for one in self.samples][-1]

    def close(self) -> None:
        """Nothing: the runner is not its own."""


@dataclass(frozen=True)
class Scored:
    """What one edit does alone: its error, and the drop of the metric on the fitting samples.

    Both are infinite, with the reason, of what cannot be run, and of what was not `measured` since it is not worth it.
    """

    error: float
    drop: float
    refusal: str = ""
    measured: bool = True


@dataclass
class Lossy:
    """What the lossy stage did.

    Attributes:
        model: the model with the edits made, in normal form.
        proof: that the normal form computes what the original does.
        proved_on: samples for proving what comes behind.
        steps: what each lossy pass did.
        budget: what was allowed.
        edits: the edits that were made, in the order of the passes.
        scores: what every proposed edit does alone, by its key; empty when nothing was searched.
        found: the search; None when the options named the edits.
        frontier: what can be saved, at which sum of errors and at which drop, as the sums over the edits predict it.
        whole: what the original takes, in the unit of the savings.
        timed_in: where seconds were measured; empty where they were not.
        measure: what the loss is measured by; None without samples.
        reason: why by that, in plain words.
        fitted, held_out: how many samples edits were fitted to, and how many the result is measured on.
        how: how they were split, in plain words.
        warning: what is to be known of the kept scores; None when all is well.
        judged: measures models on the held-out samples; None without samples.
        result: what was measured of the edits together, before any healing.
        healed: what healing did; None without.
        final: what was measured of the written model.
        latency: the paired timing of the written model against the original; None where their inputs differ.
        timed: the sample that was timed.
        origins: by the key of each edit that was made, the original nodes that it replaced.
        kernels: by the key of an edit, the kernels that ONNX Runtime runs in the place of these nodes.
        errors: by the key of an edit, what rounding makes of its layers; see `Outcome`.
        notes: what was made otherwise than the options say, with how often.
        checkpoints: files of healing, from which a run that is killed before the model is written goes on.
        book: of what was observed, with how long that took, and files for the same; None where nothing was.
    """

    model: oir.Model
    proof: prove.Proof
    proved_on: list[Sample]
    steps: list[pipeline.Step] = field(default_factory=list)
    budget: Budget = field(default_factory=Budget)
    edits: Sequence[Edit] = ()
    scores: dict[str, Scored] = field(default_factory=dict)
    found: Found | None = None
    frontier: list[tuple[float, float, float]] = field(default_factory=list)
    whole: float = 0.0
    timed_in: str = ""
    measure: Measure | None = None
    reason: str = ""
    fitted: int = 0
    held_out: int = 0
    how: str = ""
    warning: str | None = None
    judged: Judged | None = None
    result: Judgement | None = None
    healed: Healed | None = None
    final: Judgement | None = None
    latency: Verdict | None = None
    timed: str = ""
    origins: dict[str, frozenset[str]] = field(default_factory=dict)
    kernels: dict[str, str] = field(default_factory=dict)
    errors: dict[str, float] = field(default_factory=dict)
    notes: Counter[str] = field(default_factory=Counter)
    checkpoints: list[Path] = field(default_factory=list)
    book: Book | None = None

    def unchosen(self, proposed: Sequence[Edit], chosen: Sequence[Edit]) -> list[Skip]:
        """The sites that a search left alone, each with the edit there that loses least, and why it was not chosen.

        Args:
            proposed: the edits of one pass.
            chosen: the edits of all passes that are made; `model` is still the one that they are made in.
        """
        keys, taken = {edit.key for edit in chosen}, {one for edit in chosen for one in edit.claims}
        made = {edit.site for edit in proposed if edit.key in keys}
        nodes = {str(node.name): node for node in walk(self.model)}
        sites: dict[str, list[Edit]] = {}
        for edit in proposed:
            sites.setdefault(edit.site, []).append(edit)
        unknown = Scored(math.inf, math.inf, "no edit here was measured to save time")
        found = []
        for site, edits in sites.items():
            if site in made:
                continue
            score, edit = min(((self.scores.get(one.key, unknown), one) for one in edits), key=lambda one: one[0].error)
            shown = f"{site}, {edit.option}"
            if math.isfinite(score.error):
                shown += f" (alone: error {score.error:.3g}, drop {score.drop:.3g})"
            there = all(taken & one.claims for one in edits)
            reason = score.refusal or ("a chosen edit changes the same nodes" if there else "the search chose others")
            own = sum(weights.parameter_bytes(nodes[name]) for name in edit.claims if name in nodes)
            found.append(Skip("edit", shown, reason, own, True))
        return found

    def free(self, wanted: Sequence[Edit], taken: Sequence[Edit], outcome: Outcome) -> list[Edit]:
        """Those edits of a pass whose sites no edit of a pass before it has; `outcome` takes the others' reasons."""
        owners = {claim: edit for edit in taken for claim in edit.claims}
        nodes = {node.name: node for node in walk(self.model)}
        found = []
        for edit in wanted:
            owner = next((owners[claim] for claim in sorted(edit.claims) if claim in owners), None)
            if owner is None:
                found.append(edit)
            else:
                node = next(nodes[name] for name in (*edit.anchors, *sorted(edit.claims)) if name in nodes)
                outcome.skip(node, f"`{owner.spec}` has it: {owner.option}")
        return found

    def fired(self) -> dict[str, Any]:
        """What was edited, for the metadata of the written model: by pass each site with what was made of it.

        Of healing, how many initializers were trained.
        """
        found: dict[str, Any] = {}
        for edit in self.edits:
            found.setdefault(edit.spec, []).append(f"{edit.site} | {edit.option}")
        if self.healed is not None and self.healed.written:
            found["heal"] = len(self.healed.written)
        return found

    def came_from(self, model: oir.Model, edits: Sequence[Edit]) -> None:
        """Note which original nodes edits take the place of; `model` is the one that they are made in."""
        nodes = {str(node.name): node for node in walk(model)}
        for edit in edits:
            claimed = [nodes[name] for name in edit.claims if name in nodes]
            self.origins[edit.key] = frozenset(name for node in claimed for name in sources(node))

    def look_up_kernels(self, written: oir.Model, target: str) -> None:
        """Look up which kernels ONNX Runtime runs where numbers of fewer bits were put.

        Args:
            written: what is written; its nodes know what they were made from.
            target: `ort-cuda`, or anything else for the CPU.
        """
        from burnish.backends.ort.assigned import assigned

        kinds = {edit.spec: catalog.load(edit.spec.partition("{")[0]) for edit in self.edits}
        specs = {spec for spec, kind in kinds.items() if issubclass(kind, LossyPass) and kind.order == QUANTIZED}
        quantized = [edit.key for edit in self.edits if edit.spec in specs]
        if not quantized:
            return
        copy = written.clone()
        name_nodes(copy)
        kernels = assigned(copy, target="ort-cuda" if target == "ort-cuda" else "ort-cpu")
        origins = {str(node.name): frozenset(sources(node)) for node in walk(copy)}
        for key in quantized:
            seen = Counter(
                kernel for name, kernel in kernels.items() if origins[name] & self.origins.get(key, frozenset())
            )
            self.kernels[key] = ", ".join(one if count == 1 else f"{count} {one}" for one, count in seen.items())

    def forget(self) -> None:
        """Delete what a run after a kill would go on from: the model is written, or cannot be."""
        if self.book is not None:
            self.book.forget()
        if self.checkpoints:
            from burnish.backends.fx.healing_options import forget

            for one in self.checkpoints:
                forget(one)

    def measure_written(
        self,
        runner: Runner,
        model: oir.Model,
        clock: Clock,
        original: Callable[[oir.Model], AbstractContextManager[Runner]] | None,
        guard: Collection[str] = (),
    ) -> None:
        """Measure what is written: its loss on the held-out samples, and its time beside the original's.

        Args:
            runner: of what is written.
            model: what is written.
            clock: times the two.
            original: gives a runner of the model without edits, to be timed beside it; None to time nothing.
            guard: what no pass may make worse.

        Raises:
            BudgetError: with its standard error it loses more than is allowed, although its plan did not before the
                exact passes behind it, or it is slower and must not be.
            UnchangedError: it was to be as fast as the drop allows, and is slower.
        """
        if self.judged is None:
            return
        self.final = self.judged.of_runner(runner, model)
        allowed = None if self.found is None or not self.edits else self.found.allowed
        if allowed is not None and not self.final.sure <= allowed + ROUNDING * max(abs(self.judged.original), allowed):
            raise BudgetError(
                f"on the held-out samples a drop of {allowed:.4g} is allowed, and what would be written loses"
                f" {self.final.drop:.4g} (standard error {self.final.spread:.2g}): the exact passes behind the edits"
                " have changed it",
                hint="allow a little less, or a little more, so that rounding does not decide",
            )
        sample = self.judged.samples[0]
        given = lossy.feeds(model, sample.feeds)
        same = all(given.get(name) is array for name, array in sample.feeds.items())
        if original is None or not same or len(given) > len(sample.feeds):
            return
        by_row = any(one.by_row for one in self.judged.passes)
        parts = rows(self.judged.samples, self.judged.model)[0][:ROWS] if by_row else []
        with original(self.judged.model) as rival:
            if len(parts) > 1:
                one, other = (_Each(each, [part.feeds for part in parts]) for each in (rival, runner))
                self.latency, self.timed = clock(one, other, {}), f"{len(parts)} rows, one after the other"
            else:
                self.latency, self.timed = clock(rival, runner, sample.feeds), sample.name
        if self.edits and by_row and "latency" in guard and self.latency.slower:
            raise BudgetError(
                f"what would be written takes {self.latency.ratio:.3g} times as long as the model without edits"
                f" ({self.latency.low:.3g} to {self.latency.high:.3g}) on {self.timed}: it costs more than it saves",
                hint="skip more, drop what is nearly always skipped with `form=static`, or write it with `--guard off`",
            )
        if self.edits and self.budget.objective == "latency" and self.latency.slower:
            raise self.budget.missed(
                f"what would be written takes {self.latency.ratio:.3g} times as long as the model without edits"
                f" ({self.latency.low:.3g} to {self.latency.high:.3g}), although its edits alone save time",
                hint="ask for a size, or take other lossy passes",
            )
