"""Which regions are compiled: those that compute what they do in ONNX Runtime and are measured to be faster."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import msgspec
import numpy as np
import onnx_ir as oir
import tvm

from burnish.backends.ort.observe import outputs_exchanged
from burnish.backends.tvm import beside, compiling, regions
from burnish.backends.tvm.artifact import Evidence
from burnish.backends.tvm.choices import Choice, Choices, Tried
from burnish.backends.tvm.lowering import lower, refusal
from burnish.backends.tvm.pieces import Pieces
from burnish.backends.tvm.quiet import quiet
from burnish.backends.tvm.reasons import last_line
from burnish.backends.tvm.regions import Region
from burnish.backends.tvm.runner import TvmRunner, use_threads
from burnish.backends.tvm.target import Target
from burnish.backends.tvm.turned_weights import with_turned_weights
from burnish.ir import edit, match, text, weights
from burnish.ir.errors import InputError
from burnish.ir.inference import Inference
from burnish.ir.samples import Sample
from burnish.passes import prove
from burnish.passes.protocols import Judge
from burnish.passes.verify import Expected, Verification

Schedule = Callable[[Any], tuple[Any, int]]
"""Of a fused module, the same with a schedule for each kernel, and how many kernels have a tuned one."""

_SLOW = 3.0
"""Times as long as ONNX Runtime, in single runs, at which no pairs are timed."""

_SAMPLES = 8
_LONG = 0.25
"""Seconds of a run of the whole model in ONNX Runtime above which a smaller sample is timed."""


@dataclass(frozen=True)
class Chosen:
    """A region, where it runs (its `kind`), and what was measured of it."""

    region: Region
    evidence: Evidence


@dataclass
class _Kept:
    """Values that pass between regions, for each sample that the model accepts."""

    samples: list[Sample]
    seconds: list[float]
    values: dict[oir.Value, list[np.ndarray]] = field(default_factory=dict)


class Chooser:
    """Chooses regions of one model for one target.

    Attributes:
        tried: everything that was compiled to be measured, in order; nothing where that was done before.
        before: the choice that was made before and is made again; None when all is measured now.
        measures: whether regions are compiled only when they are measured to be faster.
    """

    def __init__(
        self,
        model: oir.Model,
        target: Target,
        samples: Sequence[Sample],
        judge: Judge | None,
        schedule: Schedule,
        *,
        everything: bool = False,
        seconds: float = 60.0,
        choices: Choices | None = None,
    ) -> None:
        """
        Args:
            model: in the normal form; left untouched.
            target: what is compiled for.
            samples: what regions are compared on.
            judge: what runs regions in ONNX Runtime; None when nothing can be run, and all regions are compiled.
            schedule: of kernels.
            everything: compile all regions that compute the same, whatever they measure.
            seconds: after so much time no more pieces are tried.
            choices: those that were made before; None to measure anew and to keep nothing.
        """
        self.model = with_turned_weights(_with_computed_outputs(model))
        self.facts = Inference(self.model)
        self.tried: list[Tried] = []
        self._target, self._judge, self._schedule = target, judge, schedule
        self.measures = judge is not None and not everything
        self._end = time.perf_counter() + seconds
        self._stay: dict[oir.Node, str] = {}
        self._known: dict[frozenset[oir.Node], Tried] = {}
        self._alike: dict[str, Tried] = {}
        self._lowered: set[frozenset[oir.Node]] = set()
        self._split: set[frozenset[oir.Node]] = set()
        self._changed = False
        self._pieces = Pieces(self.model, self.facts)
        self._samples = list(samples[:_SAMPLES])
        self._choices = None if judge is None else choices
        self.before = None if self._choices is None else self._choices.recall(self.model, self._samples)
        if self.before is not None:
            self._take(self.before)

    def choose(self) -> list[Chosen]:
        """All regions in order, with what was measured of them."""
        while True:
            found = self._regions()
            asked = [one for one in found if one.kind == "tvm" and self._judge is not None]
            whole = len(found) == 1 and not self.measures  # the caller compares it
            lost = [] if whole else [one for one in asked if not self._try(one).wins]
            if not lost:
                return [Chosen(one, self._evidence(one)) for one in found]
            for region in lost:
                self._leave(region)

    def fewer(self, reason: str) -> list[Chosen] | None:
        """Choose again without the compiled region that gains least; None when none is left.

        Args:
            reason: what the whole of the model was found to be.
        """
        compiled = [one for one in self._regions() if one.kind == "tvm"]
        if not compiled:
            return None
        least = max(compiled, key=lambda one: self._evidence(one).ratio or 0.0)
        self._stay |= dict.fromkeys(least.nodes, reason)
        self._changed = True
        return self.choose()

    @property
    def date(self) -> str:
        """The day of the measurements that the choice is made by, where that was in an earlier run; else empty."""
        if self.before is None or not self.before.tried or self._changed:
            return ""
        return self.before.date

    @property
    def warning(self) -> str:
        """Why the choice is not kept, or what became of those that were; empty when all is well."""
        return "" if self._choices is None else self._choices.warning

    def keep(self) -> None:
        """Keep the choice as it is now, for the next time."""
        if self._choices is not None and (self.before is None or self._changed):
            self._choices.keep(self.model, self._samples, self._stay, self._known, self.before)

    def _take(self, choice: Choice) -> None:
        nodes = list(self.model.graph)
        self._stay = {nodes[place]: reason for place, reason in choice.stay.items()}
        self._known = {frozenset(nodes[place] for place in places): one for places, one in choice.tried}

    @cached_property
    def _kept(self) -> _Kept:
        assert self._judge is not None
        runner = self._judge.execute(self.model)
        expected = Expected(runner, self._samples)
        runner.close()
        return _Kept([sample for sample, _ in expected.kept], expected.seconds)

    def _refuses(self, allowed: frozenset[oir.Node] | None) -> regions.Refuses:
        opsets = dict(self.model.opset_imports)

        def refuses(node: oir.Node, facts: Inference) -> str | None:
            if facts is self.facts and node in self._stay:
                return self._stay[node]
            if facts is self.facts and allowed is not None and node not in allowed:
                return "not part of the piece"
            return refusal(node, facts, opsets)

        return refuses

    def _regions(self, allowed: frozenset[oir.Node] | None = None) -> list[Region]:
        """The regions as far as is known; lowering may find more nodes that cannot be compiled."""
        while True:
            found = regions.partition(self.model, self.facts, self._refuses(allowed))
            failed = [one for one in found if one.kind == "tvm" and self._fails(one)]
            if not failed:
                return found

    def _fails(self, region: Region) -> bool:
        key = frozenset(region.nodes)
        if key in self._lowered:
            return False
        try:
            with quiet():
                lower(region.model)
        except InputError as error:
            own = [node for node in region.nodes if node not in region.copies]
            guilty = [node for node in own if match.describe(node) == error.place]
            self._stay |= dict.fromkeys(guilty or own, error.cause)
            return True
        self._lowered.add(key)
        return False

    def _evidence(self, region: Region) -> Evidence:
        found = self._known.get(frozenset(region.nodes))
        if region.kind == "tvm":
            return Evidence() if found is None else found.evidence
        known = Evidence(date=self.date) if found is None else found.evidence
        return msgspec.structs.replace(known, note=regions.summary(region))

    def _leave(self, region: Region) -> None:
        """See to it that a region that lost is not tried again: its pieces that lose stay on ONNX Runtime."""
        key = frozenset(region.nodes)
        tried = self._known[key]
        reasons = dict.fromkeys(region.nodes, tried.evidence.note)
        if key not in self._split:
            self._split.add(key)
            tuned = tried.tuned or self._target.kind != "llvm"
            pieces = self._pieces.of(key) if tuned else self._pieces.light(key)
            losing: dict[oir.Node, str] = {}
            winning: set[oir.Node] = set()
            for piece in pieces:
                note = self._piece(frozenset(piece))
                if note is None:
                    winning.update(piece)
                else:
                    losing |= dict.fromkeys(piece, note)
            if winning != key:
                reasons = {node: losing.get(node, reason) for node, reason in reasons.items() if node not in winning}
        self._stay |= reasons

    def _piece(self, nodes: frozenset[oir.Node]) -> str | None:
        """Why a piece is not compiled; None when it is faster. Pieces of one structure are measured once."""
        if time.perf_counter() > self._end:
            return "there was no time left to measure it alone"
        for region in self._regions(nodes):
            if region.kind != "tvm":
                continue
            key = _key(region)
            if key not in self._alike:
                self._alike[key] = self._try(region)
            if not self._alike[key].wins:
                return self._alike[key].evidence.note
        return None

    def _try(self, region: Region) -> Tried:
        key = frozenset(region.nodes)
        if key not in self._known:
            self._known[key] = self._measured(region)
            self.tried.append(self._known[key])
        return self._known[key]

    def _measured(self, region: Region) -> Tried:
        assert self._judge is not None
        count = len(region.nodes)
        try:
            code, kernels, tuned = self._compiled(region.model)
        except Exception as error:
            return Tried(count, Evidence(note=f"TVM cannot compile it: {last_line(error)}"), False)
        samples = self._inputs(region)
        original = self._judge.execute(region.model)
        use_threads(1)  # as ONNX Runtime does here
        try:
            quickest = int(np.argmin(self._kept.seconds))
            found = prove.compare_code(region.model, [samples[quickest]], self._judge, code, timed=False)[0]
            own, other = beside.calls(region, samples[quickest], code, original)
            ratio = beside.once(own) / beside.once(other)
            slow = ratio > _SLOW
            if found.holds and not slow:
                found = prove.compare_code(region.model, samples, self._judge, code, timed=False)[0]
            evidence = _compared(found)
            if not found.holds:
                return Tried(count, evidence, False, tuned)
            if slow:
                many = f"{ratio:.3g} times as long as in ONNX Runtime, in one run; {beside.words(tuned, kernels)}"
                evidence = msgspec.structs.replace(evidence, ratio=ratio, timed=samples[quickest].name, note=many)
                return Tried(count, evidence, not self.measures, tuned)
            timed = samples[self._largest()]
            verdict = beside.compare(*beside.calls(region, timed, code, original))
            evidence = beside.timed(evidence, verdict, timed.name, beside.words(tuned, kernels))
            return Tried(count, evidence, verdict.faster or not self.measures, tuned)
        except InputError as error:
            return Tried(count, Evidence(note=f"it does not run: {error.cause}"), False, tuned)
        finally:
            original.close()
            code.close()

    def _compiled(self, model: oir.Model) -> tuple[TvmRunner, int, int]:
        with quiet():
            lowered = lower(model)
            fused = compiling.fused(lowered.module, self._target)
            scheduled, tuned = self._schedule(fused)
            code = compiling.build(scheduled, self._target)
        device = tvm.cuda() if self._target.kind == "cuda" else tvm.cpu()
        runner = TvmRunner(code, device, lowered.inputs, lowered.outputs, list(lowered.arrays()))
        return runner, compiling.kernels(fused), tuned

    def _largest(self) -> int:
        sizes = [sum(array.nbytes for array in sample.feeds.values()) for sample in self._kept.samples]
        near = [index for index, seconds in enumerate(self._kept.seconds) if seconds <= _LONG]
        return max(near, key=sizes.__getitem__, default=int(np.argmin(self._kept.seconds)))

    def _inputs(self, region: Region) -> list[Sample]:
        """The inputs of a region, as the model computes them from its samples."""
        assert self._judge is not None
        kept = self._kept
        given = {value: str(value.name) for value in region.inputs}
        missing = [value for value in given if not value.is_graph_input() and value not in kept.values]
        if missing:
            with outputs_exchanged(self.model, missing):
                runner = self._judge.execute(self.model)
            for value in missing:
                kept.values[value] = []
            for sample in kept.samples:
                found = runner.run(sample.feeds)
                for value in missing:
                    kept.values[value].append(found[given[value]])
            runner.close()
        return [
            Sample(
                sample.name, {n: kept.values[v][i] if v in kept.values else sample.feeds[n] for v, n in given.items()}
            )
            for i, sample in enumerate(kept.samples)
        ]


def _with_computed_outputs(model: oir.Model) -> oir.Model:
    """The model, or where weights are outputs of it, a copy in which Identities compute these."""
    if not any(map(weights.is_constant, model.graph.outputs)):
        return model
    made = model.clone()
    for index, value in enumerate(made.graph.outputs):
        if weights.is_constant(value):
            node = oir.Node("", "Identity", [value], num_outputs=1)
            out = node.outputs[0]
            out.type, out.shape = value.type, value.shape
            name = str(value.name)
            value.name = edit.unique_name(made, f"{name}.weight")
            out.name = name
            made.graph.append(node)
            made.graph.outputs[index] = out
    return made


def _key(region: Region) -> str:
    """Equal for regions that compute the same with other weights."""
    alone = region.model.clone()
    for index, value in enumerate((*alone.graph.inputs, *alone.graph.outputs)):
        value.name = f"burnish.end{index}"
    return text.structure_fingerprint(alone)


def _compared(found: Verification) -> Evidence:
    worst = found.worst
    if worst is None:
        return Evidence(note="" if found.holds else found.refusal, samples=len(found.samples))
    wrong = f"it computes something else: `{worst.output}` differs by {worst.error:.2g} on {worst.sample}"
    return Evidence(
        error=worst.error,
        allowed=worst.tolerance,
        output=worst.output,
        sample=worst.sample,
        samples=len(found.samples),
        note="" if found.holds else wrong,
    )
