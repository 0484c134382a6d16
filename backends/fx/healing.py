"""Training that lets a changed model do again what its original does; weights go back into their initializers."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Sequence, Set
from functools import partial
from pathlib import Path
from typing import Any

import onnx_ir as oir
import torch
from torch import fx, nn

from burnish.backends.fx import bridge
from burnish.backends.fx import healing_factors as factors
from burnish.backends.fx import healing_weights as weights
from burnish.backends.fx.bridge import bridge_of
from burnish.backends.fx.healing_codes import Codebooks
from burnish.backends.fx.healing_fading import FadingParts
from burnish.backends.fx.healing_features import counterparts, ports
from burnish.backends.fx.healing_integers import Integers
from burnish.backends.fx.healing_loop import Loop, mean
from burnish.backends.fx.healing_lora import add_changes, merge_changes
from burnish.backends.fx.healing_loss import Goal, Term
from burnish.backends.fx.healing_options import Healed, HealOptions, Progress, forget
from burnish.backends.fx.healing_ranks import Ranks
from burnish.backends.fx.healing_rows import Batches
from burnish.backends.fx.healing_runs import Frozen, Trained, outputs_of
from burnish.backends.fx.healing_streams import Streams
from burnish.backends.fx.objective import Task, module_of
from burnish.backends.fx.write_back import write_back
from burnish.ir import match
from burnish.ir.errors import InputError
from burnish.ir.samples import Sample
from burnish.ir.text import fingerprint
from burnish.ir.views.block import Block
from burnish.ir.views.blocks import stacks
from burnish.passes.lossy import Keeps, mixed
from burnish.passes.score_store import samples_fingerprint

__all__ = ["HealOptions", "Healed", "Progress", "forget", "heal"]

_SETTLED = 0.7
"""Of the budget of a model with integers: before, steps are so large that rounding hides what they gain."""
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
        folder: where a checkpoint is kept, from which the same call goes on after it was killed, and has the result at
            once when training has ended; `forget` deletes it. None for none.

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
        file = None if folder is None else folder / f"heal-{_key(student, teacher, samples, options)}.pt"
        loop = run.loop(file, started)
        loop.run(on_step)
        state, ended = loop.state, loop.ended
        model, written, after = student, list[str](), state.best
        before = state.first if run.first is None else run.first
        if after < before:
            model = patient.clone()
            written = run.write(model)
            if run.integers.any:
                before, after = run.measured(patient), run.measured(model)
                if not after < before:
                    ended += f"; ONNX Runtime itself finds no less loss in the new integers ({before:.4g}, {after:.4g})"
                    model, written, after = student, [], before
    return Healed(
        model, tuple(written), before, after, run.trained, state.step, state.seconds, ended, tuple(state.history),
        file, run.frozen,
    )  # fmt: skip


def _check(student: oir.Model, teacher: oir.Model) -> None:
    """Both models take and give the same; the student may lack some of it."""
    given = {str(value.name) for value in teacher.graph.inputs}
    strange = [str(value.name) for value in student.graph.inputs if str(value.name) not in given]
    if strange:
        raise InputError(f"the original has no input `{strange[0]}`", hint="heal before inputs are renamed")
    made = {str(value.name) for value in student.graph.outputs}
    if not made & {str(value.name) for value in teacher.graph.outputs}:
        raise InputError("the two models have no output in common", hint="heal before outputs are renamed")


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
        self._fading = FadingParts(student, self.module, options.momentum, keeps)
        self._values = self._fading.without_statistics(weights.trainable(student, self.module))
        self.codebooks = Codebooks(student, self.module, options.codebooks, options.commitment)
        self.integers = Integers(student, self.module, teacher)
        held = self.integers.scales | self.codebooks.held
        self._values = {path: value for path, value in self._values.items() if value not in held}
        self._values |= self.integers.values
        self._pairs = factors.pairs(student, self._values)
        self._changed: list[str] = []
        blocks, theirs = stacks(student).blocks, stacks(teacher).blocks
        self._ends = [_node(self.module, block.exit) for block in blocks]
        self._wanted = [outputs_of(module, self._goal.outputs) for module in (self.module, self._teacher)]
        states = any(block.inputs for block in blocks)
        pairs = counterparts(student, blocks, teacher, theirs) if options.features or states else []
        self._ports = ports(blocks, theirs, pairs) if states else {}
        self._mixed = {str(one.name): mix for one in student.graph.inputs if (mix := mixed(one)) is not None}
        self._streams = Streams(options, self.module, self._teacher, blocks, theirs, pairs, teacher, keeps)
        limit, count = options.cache // 2, len(self._batches.training) + len(self._batches.held_out)
        end = _node(self._teacher, theirs[-1].exit) if theirs else None
        self._theirs = Frozen(self._teacher, self._wanted[1] | self._streams.teacher, end, limit, count)
        if self._goal.distances is not None:
            found = ((self._theirs(sample, key), sample) for key, sample in self._first())
            self._goal.distances.measure(found, self._ranks.total)
        self.parameters = self._chosen(student, blocks)
        self.trained = sum(parameter.numel() for parameter in self.parameters.values())
        self.parameters |= self._fading.statistics()
        self._own = self._trained(limit)
        self.first: float | None = None
        if self.codebooks:
            if options.revive:
                with torch.no_grad():
                    self.first = mean(map(partial(self.losses, False), range(len(self._batches.held_out))), self._ranks)
            seed = options.seed if options.revive else None
            self.codebooks.measure((self._own(sample, key) for key, sample in self._first()), self._ranks, seed)
            self._own = self._trained(limit)
        self.integers.check([*self._wanted[0].values(), *self._streams.student.values()], set(self.parameters))
        self._measure_streams(end)
        if options.memory is not None:
            marks = {node.name for node in self._ends if node is not None}
            largest = max(self._first(None), key=lambda one: sum(array.size for array in one[1].feeds.values()))
            self._own.limit(marks, options.memory, largest[1], largest[0])

    def _trained(self, limit: int) -> Trained:
        """The student as a function, which keeps nothing yet."""
        wanted = self._wanted[0] | self._streams.student
        return Trained(self.module, wanted, set(self.parameters), limit, self._ports, self._mixed)

    def _first(self, count: int | None = _MEASURED) -> list[tuple[Any, Sample]]:
        """Some samples of training with their keys, all of them for None."""
        found = self._batches.training[:count]
        return [((True, i, k), sample) for i, batch in enumerate(found) for k, sample in enumerate(batch)]

    def _measure_streams(self, end: fx.Node | None) -> None:
        """Learn filters, and take the sizes of the streams from what the original computes."""
        if not self._options.features:
            return
        first = self._first()
        if first:
            key, sample = first[0]
            self._streams.check(self._own(sample, key), self._theirs(sample, key))
        if self._options.filters:
            self._streams.learn_filters(
                self._wanted, (self._ends[-1], end), self._first(None), self._theirs, self._goal.terms,
                self._ranks.add_gradients,
            )  # fmt: skip
            self.parameters |= self._streams.parameters()
        self._streams.measure(((self._theirs(sample, key), sample) for key, sample in first), self._ranks.total)

    def loop(self, file: Path | None, started: float) -> Loop:
        """The training."""
        decay = self._options.frobenius
        penalty = (lambda: decay * factors.frobenius(self.module, self._pairs)) if decay else None
        return Loop(
            self.parameters, self.losses, len(self._batches.held_out), self._batches.at, penalty,
            [self.module, self._own.behind], self._options, self._ranks, file, started,
            partial(self._fading.at, self._options.fade),
            max(self._options.fade if self._fading else 0.0, _SETTLED if self.integers.any else 0.0),
        )  # fmt: skip

    @property
    def frozen(self) -> tuple[str, ...]:
        """Why integers and codebooks were not trained, each with the node that reads them."""
        refused = self.integers.refused | self.codebooks.refused
        return tuple(f"{match.describe(node)}: {reason}" for node, reason in refused.items())

    def write(self, model: oir.Model) -> list[str]:
        """Put what was trained into a copy of the student; the module is not to be run afterwards."""
        if self._changed:
            merge_changes(self.module, self._changed)
        self.integers.finish()
        return [*write_back(self.module.cpu(), model), *self.integers.write(model), *self.codebooks.write(model)]

    def measured(self, model: oir.Model) -> float:
        """The loss of a student on the held-out rows, as ONNX Runtime computes it."""
        from burnish.backends.ort.session import executor

        runner = executor()(model)

        def computed(sample: Sample, key: Any) -> dict[str, torch.Tensor]:
            arrays = runner.run(self._own.feeds(sample))
            found = {name: bridge.to_torch(one, oir.DataType.from_numpy(one.dtype)) for name, one in arrays.items()}
            return {name: one.to(self._ranks.device) for name, one in found.items() if one is not None}

        count = len(self._batches.held_out)
        found = mean((self.losses(False, number, computed) for number in range(count)), self._ranks)
        runner.close()
        return found

    def losses(
        self, training: bool, number: int, run: Callable[[Sample, Any], dict[str, torch.Tensor]] | None = None
    ) -> list[Term]:
        """The terms of one batch, of what `run` or else the module gives; features count in training only."""
        batch = (self._batches.training if training else self._batches.held_out)[number]
        features = self._options.features if training else 0.0
        total = [Term(torch.zeros(()), 0.0) for _ in range(self._goal.parts)]
        if features:
            total.append(Term(torch.zeros(()), 0.0, features))
        searches = training and bool(self.codebooks)
        if searches:
            total.append(Term(torch.zeros(()), 0.0))
        for k, sample in enumerate(batch):
            key = (training, number, k)
            theirs = self._theirs(sample, key) if self._goal.distils or features else {}
            own = (run or self._own)(sample, key)
            terms = self._goal.terms(own, theirs, sample)
            if features:
                terms.append(self._streams.term(own, theirs, sample))
            if searches:
                terms.append(self.codebooks.term())
            total = [mine + term for mine, term in zip(total, terms, strict=True)]
        if training:
            self._fading.average(self._ranks.total)
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
            self._changed = weights.matrices(student, self.module, self._values, blocks)
            paths = add_changes(self.module, self._changed, options.rank, options.alpha, options.seed)
        if not paths:
            missing = {"factors": "low-rank pairs", "lora": "matrices", "blocks": "blocks"}
            raise InputError(
                f"there is nothing to train: it has no {missing.get(options.train, 'weights of its own there')}",
                place=f"heal, `train={options.train}`",
            )
        paths = list(dict.fromkeys([*paths, *self._fading.paths, *self.codebooks.paths]))
        left = self.integers.close({*paths, *self._changed})
        paths = [path for path in paths if path not in left]
        self._prepare_factors(set(paths))
        for name, parameter in self.module.named_parameters():
            parameter.requires_grad_(name in set(paths))
        return {path: self.module.get_parameter(path) for path in paths}

    def _prepare_factors(self, paths: Set[str]) -> None:
        """Do what the options want of the low-rank pairs that are trained."""
        options = self._options
        self._pairs = [pair for pair in self._pairs if paths >= set(factors.paths_of([pair]))]
        wanted = [name for name in ("spectral", "noise", "frobenius") if getattr(options, name)]
        if wanted and not self._pairs:
            raise InputError("no low-rank pairs are trained", place="heal", hint=f"leave out `{wanted[0]}`")
        if options.spectral:
            factors.split_anew(self.module, self._pairs)
        if options.noise:
            factors.disturb(self.module, self._pairs, options.noise)

    def _by_gradient(self, blocks: Sequence[Block]) -> list[str]:
        """The weights of the blocks with the largest gradients, summed over some batches before they are squared."""
        for name, parameter in self.module.named_parameters():
            parameter.requires_grad_(name in self._values)
        own = Trained(self.module, self._wanted[0], set(self._values), 0, self._ports, self._mixed)
        for key, sample in self._first():
            theirs = self._theirs(sample, key) if self._goal.distils else {}
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


def _node(module: fx.GraphModule, value: oir.Value) -> fx.Node | None:
    """The node that computes a value of the model; None where it is computed together with another."""
    name = bridge_of(module).values.get(str(value.name))
    return next((node for node in module.graph.nodes if node.name == name), None)
