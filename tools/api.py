"""The Python interface: `load`, `optimize`, `observe`, `emit`, `Pipeline`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import onnx_ir as oir

import burnish
from burnish.backends import onnx_metadata, onnx_writer
from burnish.frontends import load, onnx_file
from burnish.ir import origin
from burnish.ir.errors import InputError, UnchangedError
from burnish.ir.samples import Sample
from burnish.ir.walk import STANDARD_DOMAINS
from burnish.passes import pipeline, plan, prove
from burnish.passes.base import Pass
from burnish.passes.protocols import Judge, Runner
from burnish.tools import crash
from burnish.tools.observe import observe

__all__ = ["Pipeline", "Result", "emit", "load", "observe", "optimize"]


@dataclass
class Result:
    """What `optimize` did.

    Attributes:
        proof: the rewritten model, the steps, the comparison and the timing.
        recipe: the passes as text.
        target: what the model was written for.
        undone: passes that were taken back, with the reason.
        refused_samples: samples that the original model itself refused.
        files: the files that were written; empty for a dry run.
        sizes: bytes on disk before and after; None where there is no file.
    """

    proof: prove.Proof
    recipe: list[str]
    target: str
    undone: dict[str, str]
    files: list[Path] = field(default_factory=list)
    sizes: tuple[int | None, int | None] = (None, None)

    @property
    def model(self) -> oir.Model:
        """The rewritten model."""
        return self.proof.run.model


def emit(model: oir.Model, path: str | Path, *, external: bool | None = None) -> list[Path]:
    """Write a model whole or not at all.

    Args:
        model: the model.
        path: the `.onnx` file.
        external: keep the weights in a file beside it; by default only when the input had one or it exceeds 2 GB.

    Returns:
        The files written.

    Raises:
        InputError: when the path cannot be written.
    """
    return onnx_writer.write(model, path, external=external)


def ort_judge(target: str, *, threads: int = 1) -> Judge:
    """What executes models for a target: ONNX Runtime, and the float64 interpreter beside it."""
    from burnish.backends.ort.session import executor
    from burnish.backends.ort.timing import Clock
    from burnish.backends.reference.runner import ReferenceRunner

    device = "ort-cuda" if target == "ort-cuda" else "ort-cpu"
    return Judge(
        execute=executor(threads=threads, target=device),
        lean=executor(threads=threads, target=device, lean=True),
        unoptimized=executor(threads=threads, level="off", target=device, lean=True),
        replay=ReferenceRunner,
        clock=Clock(budget=0.4),
    )


def samples_for(model: oir.Model, data: Any = None) -> list[Sample]:
    """The caller's samples, or made ones that can falsify a rewrite.

    Raises:
        InputError: when the data cannot be read or does not fit the model.
    """
    from burnish.frontends import samples, synthesis

    return synthesis.synthesise(model) if data is None else samples.read_samples(data, model)


class Pipeline(pipeline.Pipeline):
    """A pipeline of passes that proves its result with ONNX Runtime."""

    def run(
        self,
        model: oir.Model,
        samples: Iterable[Sample] | None = None,
        *,
        verify: prove.Verify = "ends",
        guard: Iterable[prove.Guard] = ("size",),
        target: str = "onnx",
    ) -> prove.Proof:
        """Rewrite a copy of `model` and compare it with the original.

        Args:
            model: left untouched.
            samples: what the two are compared on; made from the model's own meaning when absent.
            verify: at the `ends`, after `each` pass, or `off`.
            guard: what no pass may make worse: `latency`, `size`.
            target: `onnx`, `ort-cpu` or `ort-cuda`.

        Raises:
            Miscompiled: when a rewrite changed what the model computes.
            InputError: when the model cannot be run on any sample.
        """
        if verify == "off":
            return prove.Prover(self, model, [], None, "off", frozenset(guard)).run()
        chosen = list(samples) if samples is not None else samples_for(model)
        return prove.Prover(self, model, chosen, ort_judge(target), verify, frozenset(guard)).run()


def optimize(
    source: Any,
    path: str | Path | None = None,
    *,
    inputs: Any = None,
    recipe: str | Path | None = None,
    passes: Sequence[Pass | str] | None = None,
    without: Sequence[str] = (),
    data: Any = None,
    target: str | None = None,
    opset: int | None = None,
    verify: prove.Verify | None = None,
    guard: Iterable[prove.Guard] | None = None,
    require: Sequence[str] = (),
    crash_folder: str | Path = "burnish-crash",
    on_step: Callable[[str, int, int], None] | None = None,
) -> Result:
    """Rewrite a model, prove the result, and write it.

    Args:
        source: an `.onnx` or `.pt2` file, an `onnx_ir.Model`, an `onnx.ModelProto`, or a torch module (with `inputs`).
        path: where to write; None to only rewrite and prove.
        inputs: example inputs for tracing a torch module.
        recipe: a named recipe (`default`, `normal-form`, `none`) or a YAML file.
        passes: passes to run after the recipe; without a `recipe` of their own they follow the normal form.
        without: passes of the recipe to leave out.
        data: samples (`burnish.frontends.samples`); made from the model's own meaning when absent.
        target: `onnx` (standard operators), `ort-cpu` or `ort-cuda` (ONNX Runtime's fused operators too).
        opset: raise the model to this opset.
        verify: `ends`, `each` or `off`.
        guard: what no pass may make worse; `latency` and `size` by default, latency only where the target runs here.
        require: passes that must change something.
        crash_folder: where the reproducer goes when a rewrite proves wrong.
        on_step: progress: (pass, number, total).

    Raises:
        InputError: bad input or options (exit code 2).
        UnchangedError: a required pass changed nothing (exit code 4).
        Miscompiled: a rewrite proved wrong; nothing was written (exit code 3).
    """
    todo = plan.resolve(
        recipe, passes, without, target=target, opset=opset, verify=verify, guard=guard, require=require
    )
    file = Path(source) if isinstance(source, (str, Path)) else None
    if path is not None:
        if str(path).endswith("/"):
            raise InputError("the output is a folder", place=str(path), hint="give the name of an .onnx file to write")
        read = [Path(one) for one in (source, data, recipe) if isinstance(one, (str, Path)) and one]
        onnx_writer.check_target(Path(path), *read)
    model = load(source, inputs)
    if todo.opset is not None and (_opset(model) or 0) > todo.opset:
        raise InputError(
            f"the model has opset {_opset(model)} and cannot be written for the older opset {todo.opset}",
            place=str(source) if file is not None else None,
            hint="opsets are only ever raised",
        )
    files = origin.files(model)
    fingerprint = onnx_file.fingerprint(file) if file is not None and files else ""
    steps = pipeline.Pipeline(todo.passes)
    judged = todo.verify != "off"
    prover = prove.Prover(
        steps,
        model,
        samples_for(model, data) if judged else [],
        ort_judge(todo.target) if judged else None,
        todo.verify,
        todo.guard,
        on_step=on_step,
        largest_timed=prove.LARGEST_TIMED if guard is None else float("inf"),
    )
    with ExitStack() as stack:
        stage: list[onnx_writer.Staged] = []

        def write_aside(run: pipeline.Run) -> onnx_writer.Staged:
            stack.pop_all().close()
            for output, declared in zip(run.model.graph.outputs, model.graph.outputs, strict=True):
                if declared.shape is None:
                    output.shape = None
            onnx_metadata.strip_private(run.model)
            fired = {step.spec: step.outcome.rewritten for step in run.steps if step.outcome.rewritten}
            onnx_metadata.provenance(
                run.model, version=burnish.__version__, recipe=steps.specs(), input_fingerprint=fingerprint, fired=fired
            )
            stage[:] = [stack.enter_context(onnx_writer.staged(run.model, Path(path or "")))]
            return stage[0]

        if path is not None and judged:
            prover.candidate = lambda run, lean: _open(write_aside(run).path, todo.target, lean)
        try:
            proof = prover.run()
        except prove.Miscompiled as failure:
            failure.place = str(file) if file is not None else None
            try:
                failure.hint = f"nothing was written; to see it again: {crash.write(failure, crash_folder)}"
            except (InputError, OSError) as error:
                failure.hint = f"nothing was written, and no reproducer either: {error}"
            raise
        _require(todo.require, proof)
        _require_opset(todo.opset, proof)
        before = sum(one.stat().st_size for one in files) if files else None
        result = Result(proof, steps.specs(), todo.target, prover.undone, sizes=(before, None))
        if path is not None:
            if not stage:
                write_aside(proof.run)
            result.files = stage[0].commit()
            result.sizes = (before, sum(one.stat().st_size for one in result.files))
    return result


def _open(path: Path, target: str, lean: bool) -> Runner:
    from burnish.backends.ort import session

    return session.from_path(path, threads=1, target="ort-cuda" if target == "ort-cuda" else "ort-cpu", lean=lean)


def _require_opset(asked: int | None, proof: prove.Proof) -> None:
    written = _opset(proof.run.model)
    if asked is None or written is None or written >= asked:
        return
    steps = [step for step in proof.run.steps if step.outcome.name == "raise-opset"]
    skips = [f"{skip.node}: {skip.reason}" for step in steps for skip in step.outcome.skipped]
    why = "; ".join(skips[:3]) or "the pass was left out"
    raise InputError(
        f"the model cannot be raised from opset {written} to {asked}: {why}",
        hint="leave `--opset` out to keep the model's opset; nothing was written",
    )


def _opset(model: oir.Model) -> int | None:
    return next((model.opset_imports[name] for name in STANDARD_DOMAINS if name in model.opset_imports), None)


def _require(names: Sequence[str], proof: prove.Proof) -> None:
    for name in names:
        steps = [step for step in proof.run.steps if step.outcome.name == name]
        if any(step.outcome.rewritten for step in steps):
            continue
        undone = next((step.undone for step in steps if step.undone), "")
        reasons = Counter(skip.reason for step in steps for skip in step.outcome.skipped)
        why = (
            undone or "; ".join(f"{reason} ({count})" for reason, count in reasons.most_common(3)) or "it found no site"
        )
        raise UnchangedError(
            f"`{name}` was required to change the model and changed nothing: {why}",
            hint=f"`--why {name}` lists every site; nothing was written",
        )
