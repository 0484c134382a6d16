"""Training that lets a changed model do again what its original does; weights go back into their initializers."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import onnx_ir as oir
import torch
from torch import fx, nn

from burnish.backends.fx import healing_factors as factors
from burnish.backends.fx import healing_weights as weights
from burnish.backends.fx.bridge import bridge_of
from burnish.backends.fx.healing_loop import Loop
from burnish.backends.fx.healing_lora import add_changes, merge_changes
from burnish.backends.fx.healing_loss import Goal, Term
from burnish.backends.fx.healing_options import Healed, HealOptions, Progress
from burnish.backends.fx.healing_ranks import Ranks
from burnish.backends.fx.healing_rows import Batches
from burnish.backends.fx.healing_runs import Frozen, Trained, outputs_of
from burnish.backends.fx.objective import Task, module_of
from burnish.backends.fx.write_back import write_back
from burnish.ir.errors import InputError
from burnish.ir.samples import Sample
from burnish.ir.text import fingerprint
from burnish.ir.views.block import Block
from burnish.ir.views.blocks import stacks
from burnish.passes.lossy import Keeps
from burnish.passes.score_store import samples_fingerprint

__all__ = ["HealOptions", "Healed", "Progress", "heal"]

_MEASURED = 8
"""Batches from which sizes and gradients are measured before training."""


def heal(
    student: oir.Model,
    teacher: oir.Model,
    samples: Sequence[Sample],
    options: HealOptions = HealOptions(),  # noqa: B008  it is frozen
    on_step: Callable[[Progress], None] | None = None,
    *,
    keeps: Keeps | None = None,
    folder: Path | None = None,
) -> Healed:
    """Train the student until it does what the teacher does, or its task, as well as it can within a budget.

    A share of the rows is held out. The weights that do best on these are kept, and where none do better than the
    student's own, it stays as it was. What is not trained keeps its bytes. On one device, a budget of steps and the
    same seed give the same weights.

    Args:
        student: the changed model; not changed here.
        teacher: its original.
        samples: inputs of the teacher, with labels where the task needs them; the student takes those that it has.
        options: how.
        on_step: is told about every step.
        keeps: says which rows are padding and do not count; all rows count without it.
        folder: where a checkpoint is kept, from which the same call goes on after it was killed; it is deleted in the
            end. None for none.

    Returns:
        The healed model and what became of it.

    Raises:
        InputError: options or samples do not fit, a model cannot be expressed in torch, there is nothing to train, or
            labels are missing.
        MissingPackageError: a launcher has started several processes, and accelerate is missing.
    """
    started = time.monotonic()
    options.check()
    _check(student, teacher)
    with torch.random.fork_rng(devices=[]):
        patient = weights.untied(student) if options.untie else student
        run = _Run(patient, teacher, samples, options, keeps)
        loop = run.loop(
            None if folder is None else folder / f"heal-{_key(student, teacher, samples, options)}.pt", started
        )
        loop.run(on_step)
        state = loop.state
        model, written = student, list[str]()
        if state.best < state.first:
            run.finish()
            model = patient.clone()
            written = write_back(run.module.cpu(), model)
    trained = sum(parameter.numel() for parameter in loop.parameters.values())
    return Healed(
        model, tuple(written), state.first, state.best, trained, state.step, state.seconds, loop.ended,
        tuple(state.history),
    )  # fmt: skip


def _check(student: oir.Model, teacher: oir.Model) -> None:
    """Both models take and give the same; the student may lack some of it."""
    given = {str(value.name) for value in teacher.graph.inputs}
    strange = [str(value.name) for value in student.graph.inputs if str(value.name) not in given]
    if strange:
        raise InputError(f"the original has no input `{strange[0]}`", hint="heal before ports are renamed")


def _key(student: oir.Model, teacher: oir.Model, samples: Sequence[Sample], options: HealOptions) -> str:
    """What a checkpoint belongs to, as a file name."""
    parts = (fingerprint(student), fingerprint(teacher), samples_fingerprint(samples), repr(options))
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:24]


class _Run:
    """Everything that is set up for one training."""

    def __init__(
        self,
        student: oir.Model,
        teacher: oir.Model,
        samples: Sequence[Sample],
        options: HealOptions,
        keeps: Keeps | None,
    ) -> None:
        self._options = options
        self._ranks = Ranks(options.device)
        self._batches = Batches(
            samples, teacher, options.batch, options.held_out, options.seed, self._ranks.rank, self._ranks.world
        )
        self.module = _loaded(student, self._ranks.device)
        self._teacher = _loaded(teacher, self._ranks.device).requires_grad_(False)
        self._goal = Goal(options, Task(teacher, self._teacher, keeps), teacher, student, keeps)
        self._values = weights.trainable(student, self.module)
        self._pairs = factors.pairs(student, self._values)
        self._changed: list[str] = []
        blocks = stacks(student).blocks
        self._wanted = outputs_of(self.module, self._goal.outputs)
        self._theirs = Frozen(
            self._teacher, outputs_of(self._teacher, self._goal.outputs), _end(self._teacher, stacks(teacher).blocks),
            options.cache // 2, len(self._batches.training) + len(self._batches.held_out),
        )  # fmt: skip
        self.parameters = self._chosen(student, blocks)
        self._own = Trained(self.module, self._wanted, set(self.parameters), options.cache // 2)
        if self._goal.distances is not None:
            first = [(self._theirs(sample, (True, i)), sample) for i, sample in self._first()]
            self._goal.distances.measure(first)

    def _first(self) -> list[tuple[tuple[int, int], Sample]]:
        """Some samples of training, with their keys."""
        found = self._batches.training[:_MEASURED]
        return [((i, k), sample) for i, batch in enumerate(found) for k, sample in enumerate(batch)]

    def loop(self, file: Path | None, started: float) -> Loop:
        """The training."""
        decay = self._options.frobenius
        penalty = (lambda: decay * factors.frobenius(self.module, self._pairs)) if decay and self._pairs else None
        return Loop(
            self.parameters, self.losses, len(self._batches.held_out), self._batches.at, penalty,
            [self.module, self._own.behind], self._options, self._ranks, file, started,
        )  # fmt: skip

    def finish(self) -> None:
        """Put what was trained beside the weights into them."""
        if self._changed:
            merge_changes(self.module, self._changed)

    def losses(self, training: bool, number: int) -> list[Term]:
        """The terms of one batch."""
        batch = (self._batches.training if training else self._batches.held_out)[number]
        total = [Term(torch.zeros(()), 0.0) for _ in range(self._goal.parts)]
        for k, sample in enumerate(batch):
            key = (training, (number, k))
            theirs = self._theirs(sample, key) if self._goal.distils else {}
            terms = self._goal.terms(self._own(sample, key), theirs, sample)
            total = [mine + term for mine, term in zip(total, terms, strict=True)]
        return total

    def _chosen(self, student: oir.Model, blocks: Sequence[Block]) -> dict[str, nn.Parameter]:
        """What is trained, by name; everything else is frozen."""
        options = self._options
        paths: list[str] = list(self._values)
        if options.train == "factors":
            paths = factors.paths_of(self._pairs)
        elif options.train == "last":
            paths = sorted(weights.read_only_by(self._values, weights.tail(student, blocks)))
        elif options.train == "blocks":
            paths = self._by_gradient(blocks)
        elif options.train == "lora":
            self._changed = weights.matrices(student, self._values, blocks)
            paths = (
                add_changes(self.module, self._changed, options.rank, options.alpha, options.seed)
                if self._changed
                else []
            )
        if not paths:
            reasons = {
                "factors": "it has no low-rank pairs",
                "lora": "it has no matrices",
                "blocks": "it has no blocks",
            }
            raise InputError(
                f"there is nothing to train: {reasons.get(options.train, 'it has no weights')}",
                place=f"heal, `train={options.train}`",
            )
        if options.spectral or options.noise:
            if not self._pairs:
                raise InputError(
                    "the model has no low-rank pairs", place="heal", hint="leave out `spectral` and `noise`"
                )
            if options.spectral:
                factors.split_anew(self.module, self._pairs)
            if options.noise:
                factors.disturb(self.module, self._pairs, options.noise)
        for name, parameter in self.module.named_parameters():
            parameter.requires_grad_(name in set(paths))
        return {path: self.module.get_parameter(path) for path in paths}

    def _by_gradient(self, blocks: Sequence[Block]) -> list[str]:
        """The weights of the blocks with the largest gradients, summed over some batches before they are squared."""
        for name, parameter in self.module.named_parameters():
            parameter.requires_grad_(name in self._values)
        own = Trained(self.module, self._wanted, set(self._values), 0)
        for key, sample in self._first():
            theirs = self._theirs(sample, (True, key)) if self._goal.distils else {}
            terms = self._goal.terms(own(sample, key), theirs, sample)
            torch.stack([term.total for term in terms]).sum().backward()
        self._ranks.add_gradients(self.module.get_parameter(path) for path in self._values)
        sizes = {}
        for block in blocks:
            paths = weights.read_only_by(self._values, set(block.nodes))
            grads = [grad for path in paths if (grad := self.module.get_parameter(path).grad) is not None]
            sizes[block.index] = (sum(float(grad.double().square().sum()) for grad in grads), sorted(paths))
        self.module.zero_grad(set_to_none=True)
        largest = sorted(sizes, key=lambda index: (-sizes[index][0], index))[: self._options.blocks]
        return [path for index in sorted(largest) for path in sizes[index][1]]


def _loaded(model: oir.Model, device: torch.device) -> fx.GraphModule:
    try:
        return module_of(model).eval().to(device)
    except (RuntimeError, AssertionError) as error:
        raise InputError(f"torch cannot use the device `{device}`: {str(error).splitlines()[0]}") from error


def _end(module: fx.GraphModule, blocks: Sequence[Block]) -> fx.Node | None:
    """The node that computes what is behind the last block; None where there is none."""
    name = bridge_of(module).values.get(str(blocks[-1].exit.name)) if blocks else None
    return next((node for node in module.graph.nodes if node.name == name), None)
