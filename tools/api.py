"""The Python interface: `load`, `optimize`, `observe`, `emit`, `Pipeline`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import onnx_ir as oir

import burnish
from burnish.backends import genai_config, onnx_metadata, onnx_writer
from burnish.frontends import load, onnx_file
from burnish.frontends.measures import Metric
from burnish.ir import cost, origin
from burnish.ir.errors import InputError
from burnish.ir.samples import Sample
from burnish.ir.walk import STANDARD_DOMAINS
from burnish.passes import catalog, pipeline, plan, prove
from burnish.passes.base import Pass
from burnish.passes.protocols import Judge, Measure, Runner, Verdict
from burnish.tools import choosing, companions, compiled, compiled_times, crash, demands, emitted, rotations, tuned
from burnish.tools.observe import observe

if TYPE_CHECKING:
    from burnish.backends.fx.healing import HealOptions
    from burnish.tools.compiled import Compiled
    from burnish.tools.lossy import Lossy

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
        lossy: what the lossy passes did; None when there were none. `proof` then compares with what they left.
        original: the model as it was read; None where a result was put together without it.
        source: the path it was read from; empty for a model in memory.
        dims: numbers for its dynamic dimensions, those of the sample that was timed, else of the first; empty without.
        compiled: the artefact, for a target that kernels are compiled for; None for the others.
    """

    proof: prove.Proof
    recipe: list[str]
    target: str
    undone: dict[str, str]
    files: list[Path] = field(default_factory=list)
    sizes: tuple[int | None, int | None] = (None, None)
    lossy: Lossy | None = None
    original: oir.Model | None = None
    source: str = ""
    dims: dict[str, int] = field(default_factory=dict)
    compiled: Compiled | None = None

    @property
    def steps(self) -> list[pipeline.Step]:
        """What every pass did, in order."""
        before = [] if self.lossy is None else [*self.lossy.proof.run.steps, *self.lossy.steps]
        return [*before, *self.proof.run.steps]

    @property
    def timing(self) -> tuple[Verdict | None, str]:
        """The paired timing against the original, None when there is none, and the sample that was timed."""
        if self.lossy is not None:
            return self.lossy.latency, self.lossy.timed
        return self.proof.latency, self.proof.latency_sample

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
        clock=Clock(budget=0.4, alone=threads == 1 and target in ("onnx", "ort-cpu")),
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
    max_drop: str | float | None = None,
    max_size: str | float | None = None,
    max_latency: str | float | None = None,
    objective: str | None = None,
    metric: str | Measure | Metric | None = None,
    heal: bool | str | HealOptions | None = None,
    workers: str | int | None = None,
    pairs: bool = False,
    regions: Literal["measured", "all"] = "measured",
    emit: Literal["kernels"] | None = None,
    tune: str | None = None,
    tuning_db: str | Path | None = None,
    rpc: str | None = None,
    dims: str = "",
    crash_folder: str | Path = "burnish-crash",
    on_step: Callable[[str, int, int], None] | None = None,
) -> Result:
    """Rewrite a model, prove the result, and write it.

    Args:
        source: an `.onnx` or `.pt2` file, an `onnx_ir.Model`, an `onnx.ModelProto`, or a torch module (with `inputs`).
        path: where to write: an `.onnx` file, or a folder for `llvm` and `cuda`; None to only rewrite and prove.
        inputs: example inputs for tracing a torch module.
        recipe: a named recipe (`default`, `normal-form`, `none`) or a YAML file.
        passes: passes to run after the recipe; without a `recipe` of their own they follow the normal form.
        without: passes of the recipe to leave out.
        data: samples (`burnish.frontends.samples`); made from the model's own meaning when absent.
        target: `onnx` (standard operators), `ort-cpu` or `ort-cuda` (ONNX Runtime's fused operators too), or what
            kernels are compiled for: `llvm`, `llvm:znver4`, `cuda:sm_90`.
        opset: raise the model to this opset.
        verify: `ends`, `each` or `off`.
        guard: what no pass may make worse; `latency` and `size` by default, latency only where the target runs here.
        require: passes that must change something.
        max_drop: search lossy edits: the metric may get so much worse, `"1%"` of what the original has or `0.01` in its
            own unit.
        max_size: bytes of weights to come down to, `"50%"` or a number.
        max_latency: time of a run to come down to, `"80%"` of the original's.
        objective: what the search makes small, `size` (default) or `latency`.
        metric: what a drop is measured by: a name of `burnish.passes.measure_choice.NAMES`, `package.module:function`,
            or a function of the outputs and labels of all samples; by default what suits the model and the labels.
        heal: train what the lossy passes left, with these options when they are given: `steps=600,rate=1e-3`.
        workers: processes that score edits, or the `ray://` address of a cluster.
        pairs: score edits beside each other together, too, and choose with what they do to each other.
        regions: for `llvm` and `cuda`: compile the parts of the model that are `measured` to be faster than in ONNX
            Runtime, or `all` that can be; where nothing can be run, `all`.
        emit: `kernels` for the whole model as one library, with its source, that needs no TVM.
        tune: look for fast schedules of kernels: `200` trials or `5m`, what the folder holds included.
        tuning_db: the folder of tuning records; without `tune` they are used as they are.
        rpc: `HOST:PORT` of a TVM tracker whose servers time kernels.
        dims: numbers that dynamic dimensions get for good, `batch=1,seq=128`.
        crash_folder: where the reproducer goes when a rewrite proves wrong.
        on_step: progress: (pass, number, total).

    Raises:
        InputError: bad input or options (exit code 2).
        BudgetError: the budget cannot be met (exit code 1).
        UnchangedError: a required pass changed nothing, or no lossy edit can be made or helps (exit code 4).
        VerificationError: a rewrite or the compiled code proved wrong; nothing was written (exit code 3).
    """
    todo = plan.resolve(
        recipe,
        passes,
        without,
        target=target,
        opset=opset,
        verify=verify,
        guard=guard,
        require=require,
        max_drop=max_drop,
        max_size=max_size,
        max_latency=max_latency,
        objective=objective,
        metric=metric,
        heal=None if heal is None else bool(heal),
    )
    demands.check_use(todo, metric=metric, heal=heal, objective=objective, workers=workers, pairs=pairs)
    everything = choosing.everything(regions, compiles=todo.compiled)
    file = Path(source) if isinstance(source, (str, Path)) else None
    machine = compiled.target_of(todo.target) if todo.compiled else None
    emitted.check(emit, machine)
    tuning = tuned.asked(machine, tune, tuning_db, rpc)
    kernels = compiled_times.asked(todo, machine, tuning, everything=everything, emit=emit)
    if path is not None:
        read = [Path(one) for one in (source, data, recipe) if isinstance(one, (str, Path)) and one]
        compiled.check_output(path, read, folder=todo.compiled)
    tell = on_step or (lambda what, number, total: None)
    tell("reading the model", 0, 1)
    model = demands.specialised(load(source, inputs), dims)
    if todo.opset is not None and (_opset(model) or 0) > todo.opset:
        raise InputError(
            f"the model has opset {_opset(model)} and cannot be written for the older opset {todo.opset}",
            place=str(source) if file is not None else None,
            hint="opsets are only ever raised",
        )
    files = origin.files(model)
    fingerprint = onnx_file.fingerprint(file) if file is not None and files else ""
    checkpoints: list[Path] = []
    recipe_text = [catalog.spec(one) for one in (*todo.prepare, *todo.lossy, *todo.passes)]
    judged = todo.verify != "off"
    samples = samples_for(model, data) if judged or data is not None else []
    learned_from = samples if data is not None and not todo.lossy else None
    steps = pipeline.Pipeline(rotations.with_samples(todo.passes, learned_from, tell, checkpoints))
    reduced: Lossy | None = None
    if todo.lossy:
        from burnish.tools import lossy_options, lossy_stage

        options = lossy_options.options(todo.metric, heal, workers, pairs, on_step, kernels)
        reduced = lossy_stage.run(model, todo, samples if data is not None else None, ort_judge(todo.target), options)
        samples = reduced.proved_on
    start = model if reduced is None else reduced.model
    prover = prove.Prover(
        steps,
        start,
        samples if judged else [],
        ort_judge(todo.target) if judged else None,
        todo.verify,
        todo.guard - {"latency"} if todo.compiled else todo.guard,
        on_step=on_step,
        largest_timed=prove.LARGEST_TIMED if guard is None else float("inf"),
    )
    declared = {value.name: value.shape for value in model.graph.outputs}
    with ExitStack() as stack:
        stage: list[onnx_writer.Staged] = []

        def write_aside(run: pipeline.Run) -> onnx_writer.Staged:
            stack.pop_all().close()
            for output in run.model.graph.outputs:
                if declared.get(output.name, output.shape) is None:
                    output.shape = None
            onnx_metadata.strip_private(run.model)
            fired = {step.spec: step.outcome.rewritten for step in run.steps if step.outcome.rewritten}
            onnx_metadata.provenance(
                run.model,
                version=burnish.__version__,
                recipe=recipe_text,
                input_fingerprint=fingerprint,
                fired=fired if reduced is None else {**reduced.fired(), **fired},
            )
            stage[:] = [stack.enter_context(onnx_writer.staged(run.model, Path(path or "")))]
            return stage[0]

        if path is not None and judged and machine is None:
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
        before = sum(one.stat().st_size for one in files) if files else None
        result = Result(proof, recipe_text, todo.target, prover.undone, sizes=(before, None), lossy=reduced)
        demands.check_required(todo.require, result.steps)
        _require_opset(todo.opset, proof)
        if machine is not None:
            timed = "latency" in todo.guard and pipeline.constant_bytes(start) <= prover.largest_timed
            judge = ort_judge(todo.target) if judged else None
            strict = timed and guard is not None
            rest = (fingerprint, recipe_text, on_step, everything, emit, tuning)
            asked = compiled.Request(machine, samples, judge, timed, strict, *rest)
            if reduced is not None:
                asked = compiled_times.accepting(asked, reduced, proof.run.model, todo, ort_judge(todo.target))
            result.compiled = compiled.make(proof.run.model, start, path, asked)
            result.files, path = result.compiled.files, None
        if path is not None and not stage:
            write_aside(proof.run)
        if reduced is not None and machine is None:
            tell("measuring what is written", 0, 1)
            judge = ort_judge(todo.target)
            written = _open(stage[0].path, todo.target, False) if stage else judge.execute(proof.run.model)
            run = judge.execute
            reduced.measure_written(written, proof.run.model, judge.clock, lambda one: closing(run(one)), todo.guard)
            written.close()
            tell("looking up its kernels", 0, 1)
            reduced.look_up_kernels(proof.run.model, todo.target)
        config = file.parent / genai_config.NAME if file is not None else None
        layers = None
        if path is not None and reduced is not None and config is not None and config.is_file():
            layers = genai_config.updated(config, model, proof.run.model)
        compressor = companions.compressor(proof.run.model)
        if path is not None:
            beside: list[onnx_writer.Staged | genai_config.Staged] = []
            if compressor is not None:
                beside.append(stack.enter_context(companions.staged(compressor, Path(path))))
            if layers is not None and config is not None:
                beside.append(stack.enter_context(genai_config.staged(layers, config, Path(path))))
            made = [file for one in beside for file in one.commit()]
            result.files = stage[0].commit() + made
        if reduced is not None:
            reduced.forget()
        for one in checkpoints:
            one.unlink(missing_ok=True)
        if result.files:
            result.sizes = (before, sum(one.stat().st_size for one in result.files))
    result.original, result.source = model, str(file or "")
    sizes = {one.name: one.feeds for one in reversed(samples)}
    result.dims = cost.dims_of(model, sizes.get(result.timing[1]) or next(reversed(sizes.values()), {}))
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
