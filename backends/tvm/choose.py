"""Which regions are compiled: those that compute what they do in ONNX Runtime and are measured to be faster."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import msgspec
import numpy as np
import onnx_ir as oir
import tvm

from burnish.backends.ort import timing
from burnish.backends.ort.observe import outputs_exchanged
from burnish.backends.ort.session import OrtRunner
from burnish.backends.tvm import compiling, regions
from burnish.backends.tvm.artifact import Evidence
from burnish.backends.tvm.lowering import lower, refusal
from burnish.backends.tvm.pieces import Pieces
from burnish.backends.tvm.quiet import quiet
from burnish.backends.tvm.reasons import last_line
from burnish.backends.tvm.regions import Region
from burnish.backends.tvm.runner import TvmRunner, use_threads
from burnish.backends.tvm.steps import OrtPart
from burnish.backends.tvm.target import Target
from burnish.backends.tvm.turned_weights import with_turned_weights
from burnish.ir import edit, match, text, weights
from burnish.ir.errors import InputError
from burnish.ir.inference import Inference
from burnish.ir.samples import Sample
from burnish.passes import prove
from burnish.passes.protocols import Judge, Verdict
from burnish.passes.verify import Expected, Verification

Schedule = Callable[[Any], tuple[Any, int]]
"""Of a fused module, the same with a schedule for each kernel, and how many kernels have a tuned one."""

_SLOW = 3.0
"""Times as long as ONNX Runtime, in single runs, at which no pairs are timed."""

_SAMPLES = 8
_SECONDS = 1.0
"""Time for one paired comparison, about."""

_LONG = 0.25
"""Seconds of a run of the whole model in ONNX Runtime above which a smaller sample is timed."""


@dataclass(frozen=True)
class Chosen:
    """A region, where it runs (its `kind`), and what was measured of it."""

    region: Region
    evidence: Evidence


@dataclass(frozen=True)
class Tried:
    """What a region is like as compiled code, beside the same region in ONNX Runtime.

    Attributes:
        nodes: how many nodes it has.
        evidence: what was measured.
        wins: whether it may be compiled.
        tuned: how many of its kernels have a tuned schedule.
    """

    nodes: int
    evidence: Evidence
    wins: bool
    tuned: int = 0


@dataclass
class _Kept:
    """Values that pass between regions, for each sample that the model accepts."""

    samples: list[Sample]
    seconds: list[float]
    values: dict[oir.Value, list[np.ndarray]] = field(default_factory=dict)


class Chooser:
    """Chooses regions of one model for one target.

    Attributes:
        tried: everything that was compiled to be measured, in order.
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
        self._pieces = Pieces(self.model, self.facts)
        self._kept = None if judge is None else self._accepted(judge, samples)

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
        return self.choose()

    def _accepted(self, judge: Judge, samples: Sequence[Sample]) -> _Kept:
        runner = judge.execute(self.model)
        expected = Expected(runner, samples[:_SAMPLES])
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
        known = Evidence() if found is None else found.evidence
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
        assert self._judge is not None and self._kept is not None
        count = len(region.nodes)
        try:
            code, kernels, tuned = self._compiled(region.model)
        except Exception as error:
            return Tried(count, Evidence(note=f"TVM cannot compile it: {last_line(error)}"), False)
        samples = self._samples(region)
        original = self._judge.execute(region.model)
        assert isinstance(original, OrtRunner)
        names = [[str(value.name) for value in ends] for ends in (region.inputs, region.outputs)]
        part = OrtPart(original, *names)
        use_threads(1)  # as ONNX Runtime does here
        try:
            quickest = int(np.argmin(self._kept.seconds))
            found = prove.compare_code(region.model, [samples[quickest]], self._judge, code, timed=False)[0]
            given = _given(region, samples[quickest])
            ratio = _once(code, given) / _once(part, given)
            slow = ratio > _SLOW
            if found.holds and not slow:
                found = prove.compare_code(region.model, samples, self._judge, code, timed=False)[0]
            evidence = _compared(found)
            if not found.holds:
                return Tried(count, evidence, False, tuned)
            if slow:
                many = f"{ratio:.3g} times as long as in ONNX Runtime, in one run; {_tuned(tuned, kernels)}"
                evidence = msgspec.structs.replace(evidence, ratio=ratio, timed=samples[quickest].name, note=many)
                return Tried(count, evidence, not self.measures, tuned)
            timed = samples[self._largest()]
            given = _given(region, timed)
            verdict = timing.slower(
                lambda: part.run_tensors(given), lambda: code.run_tensors(given), budget=_SECONDS, margin=0.0
            )
            evidence = _timed(evidence, verdict, timed.name, _tuned(tuned, kernels))
            return Tried(count, evidence, verdict.faster or not self.measures, tuned)
        except InputError as error:
            return Tried(count, Evidence(note=f"it does not run: {error.cause}"), False, tuned)
        finally:
            part.close()
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
        assert self._kept is not None
        sizes = [sum(array.nbytes for array in sample.feeds.values()) for sample in self._kept.samples]
        near = [index for index, seconds in enumerate(self._kept.seconds) if seconds <= _LONG]
        return max(near, key=sizes.__getitem__, default=int(np.argmin(self._kept.seconds)))

    def _samples(self, region: Region) -> list[Sample]:
        """The inputs of a region, as the model computes them from its samples."""
        assert self._judge is not None and self._kept is not None
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


def _given(region: Region, sample: Sample) -> list[Any]:
    """Inputs as a region gets them: those of the model as arrays, those of other regions as tensors."""
    arrays = [(value, sample.feeds[str(value.name)]) for value in region.inputs]
    return [array if value.is_graph_input() else tvm.runtime.tensor(array) for value, array in arrays]


def _once(part: TvmRunner | OrtPart, given: list[Any]) -> float:
    """Seconds of a run: the best of three where it is short."""
    best = float("inf")
    for _ in range(3):
        start = time.perf_counter()
        part.run_tensors(given)
        best = min(best, time.perf_counter() - start)
        if best > 0.05:
            break
    return best


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


def _timed(evidence: Evidence, verdict: Verdict, sample: str, tuned: str) -> Evidence:
    note = "" if verdict.faster else f"{verdict.ratio:.3g} times as long as in ONNX Runtime; {tuned}"
    return msgspec.structs.replace(
        evidence,
        ratio=verdict.ratio,
        low=verdict.low,
        high=verdict.high,
        rounds=verdict.rounds,
        timed=sample,
        note=note,
    )


def _tuned(tuned: int, kernels: int) -> str:
    return f"{tuned} of its {kernels} kernels are tuned" if tuned else "none of its kernels is tuned"
