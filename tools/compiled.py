"""The last stage of `optimize` for `llvm` and `cuda`: compile what was proven, and compare the code that is written."""

from __future__ import annotations

import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
import onnx_ir as oir

import burnish
from burnish.backends import onnx_writer
from burnish.ir import match
from burnish.ir.errors import BudgetError, InputError, VerificationError
from burnish.ir.inference import Inference
from burnish.ir.samples import Sample
from burnish.passes import prove
from burnish.passes.protocols import Judge, Verdict
from burnish.passes.verify import Verification
from burnish.tools import terminal

if TYPE_CHECKING:
    from burnish.backends.tvm.artifact import Evidence, Manifest, Port
    from burnish.backends.tvm.target import Target

_SHOWN = 5
_NO_GPU = "compiled, not run: there is no GPU here"


@dataclass
class Compiled:
    """An artefact and what it was measured to be.

    Attributes:
        manifest: what it holds.
        seconds: how long lowering and compiling took.
        verification: how its outputs compare with the model's in ONNX Runtime; None when it was not run.
        latency: its time over the model's in ONNX Runtime, one thread each; None when it was not measured.
        timed: the sample that was timed.
        files: what was written; empty for a dry run.
    """

    manifest: Manifest
    seconds: float
    verification: Verification | None = None
    latency: Verdict | None = None
    timed: str = ""
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
    """

    target: Target
    samples: Sequence[Sample]
    judge: Judge | None
    timed: bool
    strict: bool
    fingerprint: str = ""
    recipe: Sequence[str] = ()
    on_step: Callable[[str, int, int], None] | None = None


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
        InputError: nodes that cannot be compiled; the folder cannot be written.
        VerificationError: the code does not compute what the model computes; nothing was written.
        BudgetError: the code is slower than ONNX Runtime, and that is not allowed.
    """
    from burnish.backends.tvm import artifact

    _refuse(optimized)
    with ExitStack() as stack:
        target = path or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="burnish-"))) / "out"
        staged = stack.enter_context(artifact.staged(target))
        started = time.perf_counter()
        try:
            manifest = _write(optimized, staged.path, request)
        except OSError as error:
            raise artifact.write_error(error, staged.target) from error
        made = Compiled(staged.seal(manifest), time.perf_counter() - started)
        _judge(made, original, staged.path, request)
        staged.seal(made.manifest)
        if path is not None:
            made.files = staged.commit()
    return made


def _refuse(model: oir.Model) -> None:
    from burnish.backends.tvm.lowering import refusal

    facts = Inference(model)
    reasons: Counter[str] = Counter()
    for node in model.graph:
        if all(facts.integers(out) is not None for out in node.outputs):
            continue
        reason = refusal(node, facts, dict(model.opset_imports))
        if reason is not None:
            reasons[f"{match.describe(node)}: {reason}"] += 1
    if reasons:
        shown = "".join(f"\n    {one}" for one in list(reasons)[:_SHOWN])
        more = f"\n    and {len(reasons) - _SHOWN} more" if len(reasons) > _SHOWN else ""
        nodes = "1 node" if len(reasons) == 1 else f"{len(reasons)} nodes"
        raise InputError(
            f"{nodes} of {len(model.graph)} cannot be compiled:{shown}{more}",
            hint="`--target onnx` optimizes the model for ONNX Runtime",
        )


def _write(model: oir.Model, folder: Path, request: Request) -> Manifest:
    """Write the library and the weights, and say what there is."""
    from burnish.backends.tvm import artifact, compiling, processor, versions, weights_file
    from burnish.backends.tvm.lowering import lower
    from burnish.backends.tvm.quiet import quiet

    function, target = "region_0", request.target
    _tell(request, "compiling", 0)
    with quiet():
        lowered = lower(model, function)
        fused = compiling.fused(lowered.module, target)
        code = compiling.build(compiling.scheduled(fused, target), target)
    compiling.export(code, folder / artifact.CODE)
    arrays = {str(value.name): array for value, array in zip(lowered.weights, lowered.arrays(), strict=True)}
    if arrays:
        weights_file.write(folder / artifact.WEIGHTS, arrays)
    step = artifact.Step(
        "tvm", lowered.inputs, lowered.outputs, function=function, weights=tuple(arrays), nodes=len(model.graph)
    )
    return artifact.Manifest(
        target=str(target),
        versions={"burnish": burnish.__version__, **versions.found()},
        fingerprint=request.fingerprint,
        inputs=tuple(_port(value) for value in model.graph.inputs if value.const_value is None),
        outputs=tuple(_port(value) for value in model.graph.outputs),
        steps=(step,),
        kernels=compiling.kernels(fused),
        extensions=processor.extensions(target),
        recipe=tuple(request.recipe),
    )


def _judge(made: Compiled, original: oir.Model, folder: Path, request: Request) -> None:
    """Load the artefact as its users will, compare and time it, and note both in its manifest."""
    from burnish.backends.tvm import artifact, loading

    _tell(request, "comparing", 1)
    reason = _not_run(request)
    if reason:
        made.manifest = msgspec.structs.replace(made.manifest, verified=None, whole=artifact.Evidence(note=reason))
        return
    assert request.judge is not None
    code = loading.load(folder, threads=1)
    try:
        made.verification, made.latency, made.timed = prove.compare_code(
            original, request.samples, request.judge, code, timed=request.timed
        )
    finally:
        code.close()
    worst = made.verification.worst
    if not made.verification.holds:
        assert worst is not None
        raise VerificationError(
            f"the compiled code computes something else: output `{worst.output}` differs by {worst.error:.2g}"
            f" (allowed {worst.tolerance:.1g}) on {worst.sample}",
            hint="nothing was written; report it with the model",
        )
    if request.strict and made.latency is not None and made.latency.slower:
        raise BudgetError(
            f"the compiled code takes {made.latency.ratio:.3g} times as long as ONNX Runtime",
            hint="tune its kernels, or leave `--guard latency` out; nothing was written",
        )
    evidence = _evidence(made)
    steps = tuple(msgspec.structs.replace(step, evidence=evidence) for step in made.manifest.steps)
    made.manifest = msgspec.structs.replace(made.manifest, verified=True, whole=evidence, steps=steps)


def _not_run(request: Request) -> str:
    import tvm

    from burnish.backends.tvm import processor

    if request.target.kind == "cuda" and not tvm.cuda(0).exist:
        return _NO_GPU
    lacking = processor.lacking(processor.extensions(request.target))
    if lacking:
        return f"compiled, not run: this processor lacks {', '.join(lacking)}"
    return "" if request.samples and request.judge is not None else "compiled, not run: verification is off"


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
        request.on_step(what, number, 2)


def _port(value: oir.Value) -> Port:
    from burnish.backends.tvm.artifact import Port

    if value.dtype is None or value.shape is None:
        raise InputError("its rank and dtype are not known", place=f"`{value.name}`")
    sizes = tuple(size if isinstance(size, int) else size.value for size in value.shape)
    return Port(str(value.name), value.dtype.numpy().name, sizes)


def as_dict(made: Compiled) -> dict[str, Any]:
    """What is known about an artefact, in plain types."""
    found: dict[str, Any] = msgspec.to_builtins(made.manifest)
    return {"seconds": round(made.seconds, 2), **found, "verified": made.manifest.verified}


def lines(made: Compiled) -> list[str]:
    """The same for people, a line each."""
    manifest, count = made.manifest, terminal.count
    said = [f"compiled  {count(manifest.kernels, 'kernel')} for {manifest.target} in {made.seconds:.1f} s"]
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
