"""The last stage of `optimize` for `llvm` and `cuda`: compile what was proven, and compare the code that is written."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np
import onnx_ir as oir

import burnish
from burnish.backends import onnx_metadata, onnx_writer
from burnish.ir.errors import BudgetError, InputError, VerificationError
from burnish.ir.samples import Sample
from burnish.passes import prove
from burnish.passes.protocols import Judge, Runner, Verdict
from burnish.passes.verify import Verification
from burnish.tools import choosing, emitted, ports, terminal, tuned

if TYPE_CHECKING:
    from burnish.backends.tvm.artifact import Evidence, Manifest, Staged
    from burnish.backends.tvm.choose import Chosen
    from burnish.backends.tvm.target import Target

_SLOWER = 0.03
"""How much slower than ONNX Runtime alone the whole may be."""

_LEAST = 8
"""Rounds in which a whole with compiled regions is timed at least."""


@dataclass
class Compiled:
    """An artefact and what it was measured to be.

    Attributes:
        manifest: what it holds.
        seconds: how long lowering and compiling took.
        verification: how its outputs compare with the model's in ONNX Runtime; None when it was not run.
        latency: its time over the model's in ONNX Runtime, one thread each; None when it was not measured.
        timed: the sample that was timed.
        chosen: the day its regions were measured on, where that was in an earlier run; else empty.
        warning: what the user should know of the cache of what was measured; empty when all is well.
        files: what was written; empty for a dry run.
    """

    manifest: Manifest
    seconds: float
    verification: Verification | None = None
    latency: Verdict | None = None
    timed: str = ""
    chosen: str = ""
    warning: str = ""
    files: list[Path] = field(default_factory=list)

    @property
    def note(self) -> str:
        """Why nothing was compared; empty when something was."""
        return self.manifest.whole.note


@dataclass(frozen=True)
class Request:
    """What is compiled.

    Attributes:
        target: the machine.
        samples: what the code is compared on; nothing is when there are none.
        judge: what runs the model for the comparison; None when nothing is compared.
        timed: whether the two are timed in turns.
        strict: refuse to write code that is slower than ONNX Runtime.
        fingerprint: of the file that the model was read from.
        recipe: the passes that it went through.
        on_step: progress.
        everything: compile every region that can be, not only those that are measured to be faster.
        emit: `kernels` for one library that needs no TVM.
        tuning: where schedules of kernels come from, and whether they are looked for; None for plain ones.
        accept: given the artefact as it was loaded, before it gets its name, or None where its code cannot run here;
            raises what speaks against it.
    """

    target: Target
    samples: Sequence[Sample]
    judge: Judge | None
    timed: bool
    strict: bool
    fingerprint: str = ""
    recipe: Sequence[str] = ()
    on_step: Callable[[str, int, int], None] | None = None
    everything: bool = False
    emit: str | None = None
    tuning: tuned.Tuning | None = None
    accept: Callable[[Runner | None], None] | None = None


def target_of(text: str) -> Target:
    """The target, with TVM loaded and checked, before any work is done.

    Raises:
        InputError: there is no such target.
        MissingPackageError: TVM is not installed, or its wheels do not work together.
    """
    from burnish.backends.tvm import versions

    versions.compiler()
    from burnish.backends.tvm import target

    return target.parse(text)


def check_output(path: str | Path, read: Sequence[Path], *, folder: bool) -> None:
    """Check, before any work is done, that a model or, with `folder`, an artefact can be written there.

    Raises:
        InputError: it cannot, something else is there, or it is what is `read`.
    """
    if folder:
        from burnish.backends.tvm import artifact

        artifact.check_target(Path(path), *read)
        return
    if str(path).endswith("/"):
        raise InputError("the output is a folder", place=str(path), hint="give the name of an .onnx file to write")
    onnx_writer.check_target(Path(path), *read)


def make(optimized: oir.Model, original: oir.Model, path: str | Path | None, request: Request) -> Compiled:
    """Compile a model, write the artefact aside, load it from there, compare it, then give it its name.

    Args:
        optimized: what is compiled.
        original: what the code is compared with.
        path: the folder; None to write nothing in the end.
        request: the rest.

    Raises:
        InputError: there is nothing that can be compiled; the folder cannot be written.
        VerificationError: the code does not compute what the model computes; nothing was written.
        BudgetError: the code is slower than ONNX Runtime, and that is not allowed.
    """
    from burnish.backends.tvm import artifact

    with ExitStack() as stack:
        target = path or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="burnish-"))) / "out"
        staged = stack.enter_context(artifact.staged(target))
        started = time.perf_counter()
        if request.emit is not None:
            made = _emitted(optimized, original, staged, request)
            return _finished(made, staged, path, request)
        if request.tuning is not None and request.tuning.budget:
            request.tuning.run(tuned.fused(optimized, request.target), request.target, request.on_step)
        _tell(request, "choosing regions", 0)
        chooser = choosing.chooser(optimized, request, measurable=not _not_run(request))
        chosen: list[Chosen] | None = chooser.choose()
        while chosen is not None:
            if not chooser.measures:
                choosing.refuse_nothing(chosen, len(optimized.graph))
            for one in staged.path.iterdir():
                one.unlink()
            try:
                manifest = _write(chosen, optimized, staged.path, request)
            except OSError as error:
                raise artifact.write_error(error, staged.target) from error
            made = Compiled(staged.seal(manifest), time.perf_counter() - started)
            made.chosen, made.warning = chooser.date, chooser.warning
            wrong = _judge(made, original, staged.path, request, clear=chooser.measures)
            chosen = chooser.fewer(wrong) if wrong and chooser.measures else None
            if wrong and chosen is None:
                _give_up(made, request)
        chooser.keep()
        if request.tuning is not None:
            request.tuning.write(staged.path / artifact.RECORDS, request.target)
        return _finished(made, staged, path, request)


def _finished(made: Compiled, staged: Staged, path: str | Path | None, request: Request) -> Compiled:
    """The artefact as it stays, when nothing speaks against it."""
    from burnish.backends.tvm import loading, processor

    staged.seal(made.manifest)
    if request.accept is not None:
        runs = not processor.elsewhere(request.target)
        request.accept(loading.load(staged.path, threads=1) if runs else None)
    if path is not None:
        made.files = staged.commit()
    return made


def _emitted(optimized: oir.Model, original: oir.Model, staged: Staged, request: Request) -> Compiled:
    """The whole model as one library, compared; it is not held to a speed."""
    from burnish.backends.tvm import artifact

    started = time.perf_counter()
    _tell(request, "compiling", 1)
    try:
        manifest = emitted.write(optimized, staged.path, request)
        manifest = msgspec.structs.replace(manifest, inputs=ports.inputs(optimized), outputs=ports.outputs(optimized))
    except OSError as error:
        raise artifact.write_error(error, staged.target) from error
    made = Compiled(staged.seal(manifest), time.perf_counter() - started)
    if _judge(made, original, staged.path, request):
        _give_up(made, request)
    return made


def _write(chosen: Sequence[Chosen], model: oir.Model, folder: Path, request: Request) -> Manifest:
    """Write the library, the weights and what stays on ONNX Runtime, and say what there is."""
    from burnish.backends.tvm import artifact, compiling, processor, versions, weights_file
    from burnish.backends.tvm.lowering import lower
    from burnish.backends.tvm.merging import merged
    from burnish.backends.tvm.quiet import quiet

    _tell(request, "compiling", 1)
    arrays: dict[str, np.ndarray] = {}
    modules, steps = [], []
    for index, one in enumerate(one for one in chosen if one.region.outputs):
        name, region = f"region_{index}", one.region
        inputs, outputs = (tuple(str(value.name) for value in ends) for ends in (region.inputs, region.outputs))
        step = artifact.Step(
            region.kind, inputs, outputs, nodes=len(region.nodes) - len(region.copies), evidence=one.evidence
        )
        if region.kind == "ort":
            onnx_metadata.strip_private(region.model)
            onnx_writer.write(region.model, folder / f"{name}.onnx")
            steps.append(msgspec.structs.replace(step, file=f"{name}.onnx"))
            continue
        with quiet():
            lowered = lower(region.model, name)
        modules.append(lowered.module)
        own = {str(v.name): array for v, array in zip(lowered.weights, lowered.arrays(), strict=True)}
        arrays |= own
        steps.append(msgspec.structs.replace(step, function=name, weights=tuple(own)))
    kernels = tuned = 0
    if modules:
        with quiet():
            fused = compiling.fused(merged(modules), request.target)
            if request.tuning is not None:
                request.tuning.used.clear()
            scheduled, tuned = choosing.scheduled(fused, request.target, request.tuning)
            code = choosing.built(scheduled, request.target)
        compiling.export(code, folder / artifact.CODE)
        kernels = compiling.kernels(fused)
    if arrays:
        weights_file.write(folder / artifact.WEIGHTS, arrays)
    return artifact.Manifest(
        target=str(request.target),
        versions={"burnish": burnish.__version__, **versions.found()},
        fingerprint=request.fingerprint,
        inputs=ports.inputs(model),
        outputs=ports.outputs(model),
        steps=tuple(steps),
        tuned=tuned,
        kernels=kernels,
        extensions=processor.extensions(request.target),
        recipe=tuple(request.recipe),
    )


def _judge(made: Compiled, original: oir.Model, folder: Path, request: Request, *, clear: bool = False) -> str:
    """Load the artefact as its users will, compare and time it, and note both in its manifest.

    Args:
        made, original, folder, request: as in `make`.
        clear: whether it is to be clear that compiled regions do not make it slower; else, that they do.

    Returns:
        What is wrong with it: it computes something else, or is slower than ONNX Runtime; empty when nothing is.
    """
    from burnish.backends.ort import timing
    from burnish.backends.tvm import artifact, loading

    _tell(request, "comparing", 2)
    reason = _not_run(request)
    if reason:
        made.manifest = msgspec.structs.replace(made.manifest, verified=None, whole=artifact.Evidence(note=reason))
        return ""
    assert request.judge is not None
    code = loading.load(folder, threads=1)
    hybrid = any(step.kind == "tvm" for step in made.manifest.steps)
    judge = request.judge
    if hybrid and clear:
        judge = replace(judge, clock=timing.Clock(least=_LEAST))
    try:
        made.verification, made.latency, made.timed = prove.compare_code(
            original, request.samples, judge, code, timed=request.timed
        )
    finally:
        code.close()
    evidence = _evidence(made)
    steps = made.manifest.steps
    if len(steps) == 1 and steps[0].kind != "ort":
        steps = (msgspec.structs.replace(steps[0], evidence=evidence),)
    made.manifest = msgspec.structs.replace(
        made.manifest, verified=made.verification.holds, whole=evidence, steps=steps
    )
    if not made.verification.holds:
        return "the whole model computes something else with it"
    if made.latency is None or not hybrid:
        return ""
    if made.latency.slower and made.latency.ratio > 1 + _SLOWER:
        return "the whole model is slower with it"
    return (
        "it is not clear that the whole model is no slower with it" if clear and made.latency.high > 1 + _SLOWER else ""
    )


def _give_up(made: Compiled, request: Request) -> None:
    """Raise for code that is wrong, or slower than is allowed."""
    assert made.verification is not None
    worst = made.verification.worst
    if not made.verification.holds:
        assert worst is not None
        raise VerificationError(
            f"the compiled code computes something else: output `{worst.output}` differs by {worst.error:.2g}"
            f" (allowed {worst.tolerance:.1g}) on {worst.sample}",
            hint="nothing was written; report it with the model",
        )
    if request.strict and made.latency is not None:
        raise BudgetError(
            f"the compiled code takes {made.latency.ratio:.3g} times as long as ONNX Runtime",
            hint="tune its kernels, or leave `--guard latency` out; nothing was written",
        )


def _not_run(request: Request) -> str:
    from burnish.backends.tvm import processor

    why = processor.elsewhere(request.target)
    if not why and not (request.samples and request.judge is not None):
        why = "verification is off"
    return f"compiled, not run: {why}" if why else ""


def _evidence(made: Compiled) -> Evidence:
    from burnish.backends.tvm.artifact import Evidence

    assert made.verification is not None
    worst, latency = made.verification.worst, made.latency
    timing: dict[str, Any] = {}
    if latency is not None:
        timing = {"ratio": latency.ratio, "low": latency.low, "high": latency.high, "rounds": latency.rounds}
    return Evidence(
        error=None if worst is None else worst.error,
        allowed=None if worst is None else worst.tolerance,
        output="" if worst is None else worst.output,
        sample="" if worst is None else worst.sample,
        samples=len(made.verification.samples),
        timed=made.timed,
        **timing,
    )


def _tell(request: Request, what: str, number: int) -> None:
    if request.on_step is not None:
        request.on_step(what, number, 3)


def as_dict(made: Compiled) -> dict[str, Any]:
    """What is known about an artefact, in plain types."""
    found: dict[str, Any] = msgspec.to_builtins(made.manifest)
    return {"seconds": round(made.seconds, 2), "chosen": made.chosen, **found, "verified": made.manifest.verified}


def lines(made: Compiled) -> list[str]:
    """The same for people, a line each."""
    manifest, count = made.manifest, terminal.count
    said = [f"compiled  {count(manifest.kernels, 'kernel')} for {manifest.target} in {made.seconds:.1f} s"]
    nodes = {kind: sum(step.nodes for step in manifest.steps if step.kind == kind) for kind in ("tvm", "ort")}
    if nodes["ort"]:
        said.append(
            f"regions   {len(manifest.steps)}: {count(nodes['tvm'], 'node')} compiled, {nodes['ort']} on ONNX Runtime"
            " (`--why regions`)"
        )
    if made.chosen:
        said.append(f"chosen    as on {made.chosen}, by times that were measured then; numbers were compared again")
    if made.warning:
        said.append(f"note      {made.warning}")
    if made.note:
        return [*said, f"code      {made.note}"]
    worst, latency = manifest.whole, made.latency
    said.append(
        f"code      largest relative error {worst.error:.1e} (allowed {worst.allowed:.0e}) in `{worst.output}`"
        f" on {worst.sample}, of {count(worst.samples, 'sample')}"
    )
    if latency is not None:
        said.append(
            f"speed     {latency.ratio:.3g}x the time of ONNX Runtime ({latency.low:.3g} to {latency.high:.3g}),"
            f" {latency.words}, {latency.rounds} paired rounds on {made.timed}"
        )
    plain = manifest.kernels - manifest.tuned
    if plain:
        said.append(f"untuned   {count(plain, 'kernel')} of {manifest.kernels}: plain code is not fast")
    return said
