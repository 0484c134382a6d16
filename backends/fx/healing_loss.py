"""What healing makes small: distances from what the original computes, and the loss of the task."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import numpy as np
import onnx_ir as oir
import torch
import torch.nn.functional as F

from burnish.backends.fx.healing_options import HealOptions
from burnish.backends.fx.objective import Task, scores
from burnish.ir.errors import InputError
from burnish.ir.samples import Sample
from burnish.passes.lossy import Keeps
from burnish.passes.sites import Keep

Add = Callable[[Iterable[float]], list[float]]
"""Adds numbers up over all processes."""


@dataclass
class Term:
    """A part of the loss: `weight` times the total over the count, both of which add up over samples and processes."""

    total: torch.Tensor
    count: float
    weight: float = 1.0

    def __add__(self, other: Term) -> Term:
        """The sum, with the weight of the first."""
        return Term(self.total + other.total, self.count + other.count, self.weight)


class Distances:
    """Squared errors of values, each divided by the size that the value has in the original.

    Args:
        teacher: the original.
        values: its values, by name, with the axis of their features.
        keeps: says which positions are padding; all count without it.
    """

    def __init__(self, teacher: oir.Model, values: Mapping[str, tuple[oir.Value, int]], keeps: Keeps | None) -> None:
        found = keeps(teacher, values) if keeps is not None and values else {}
        self._keep = {name: keep for name, keep in found.items() if isinstance(keep, Keep)}
        self._names = list(values)
        self._sizes: dict[str, float] = {}

    def _squares(self, name: str, value: torch.Tensor, sample: Sample) -> torch.Tensor:
        """The sum of squares of what counts."""
        square = value.float().square() if value.dtype != torch.float64 else value.square()
        keep = self._keep.get(name)
        if keep is not None:
            mask = keep.of(sample.feeds, np.broadcast_to(np.float32(0), tuple(value.shape)))
            square = square * torch.from_numpy(mask.copy()).to(square.device)
        return square.sum()

    def measure(self, batches: Iterable[tuple[Mapping[str, torch.Tensor], Sample]], add: Add) -> None:
        """Take the sizes of the values from what the original computes on some batches; `add` adds over processes."""
        totals = {name: 0.0 for name in self._names}
        rows = 0.0
        for values, sample in batches:
            rows += _rows(next(iter(values.values())))
            for name in self._names:
                totals[name] += float(self._squares(name, values[name], sample))
        rows, *found = add([float(rows), *totals.values()])
        self._sizes = {name: max(one / max(rows, 1.0), 1e-30) for name, one in zip(totals, found, strict=True)}

    def term(self, student: Mapping[str, torch.Tensor], teacher: Mapping[str, torch.Tensor], sample: Sample) -> Term:
        """The mean over the values of their errors."""
        parts = [self._squares(name, student[name] - teacher[name], sample) / self._sizes[name] for name in self._names]
        return Term(torch.stack(parts).mean(), _rows(next(iter(student.values()))))


def _rows(value: torch.Tensor) -> int:
    return value.shape[0] if value.ndim else 1


class Goal:
    """The loss on the outputs.

    Args:
        options: which loss.
        task: of the original.
        teacher, student: the models, whose outputs are compared where they are no scores of classes.
        keeps: as for `Distances`.

    Attributes:
        outputs: the names of the outputs that are looked at.
        distances: of the outputs; None where they are scores or the original is not asked.
        parts: how many terms there are.

    Raises:
        InputError: the student lacks the output that is looked at.
    """

    def __init__(
        self, options: HealOptions, task: Task, teacher: oir.Model, student: oir.Model, keeps: Keeps | None
    ) -> None:
        self._options, self._task = options, task
        self.distils = options.loss != "task"
        self.parts = 2 if options.loss == "both" else 1
        self.outputs = [task.look.output]
        theirs = {str(value.name) for value in student.graph.outputs}
        if task.look.output not in theirs:
            raise InputError(f"the student has no output `{task.look.output}`", hint="heal before outputs are renamed")
        self.distances: Distances | None = None
        if self.distils and task.look.kind == "values":
            given = {str(v.name): (v, -1) for v in teacher.graph.outputs if _is_float(v) and v.name in theirs}
            self.outputs = list(given)
            self.distances = Distances(teacher, given, keeps)

    def terms(
        self, student: Mapping[str, torch.Tensor], teacher: Mapping[str, torch.Tensor], sample: Sample
    ) -> list[Term]:
        """The parts of the loss on one batch; of `teacher`, nothing is read where the task alone counts.

        Raises:
            InputError: the labels that the task needs are missing or do not fit, or outputs differ in shape.
        """
        for name in self.outputs if self.distils else ():
            if student[name].shape != teacher[name].shape:
                shapes = f"{list(student[name].shape)}, the original's {list(teacher[name].shape)}"
                raise InputError(
                    f"output `{name}` has the shape {shapes}", place="heal", hint="train on labels with `loss=task`"
                )
        found = []
        if self.distances is not None:
            found.append(self.distances.term(student, teacher, sample))
        elif self.distils:
            found.append(self._divergence(student[self.outputs[0]], teacher[self.outputs[0]], sample))
        if self._options.loss != "distil":
            found.append(Term(*self._task.loss(student[self._task.look.output], sample)))
        return found

    def _divergence(self, student: torch.Tensor, teacher: torch.Tensor, sample: Sample) -> Term:
        """T² KL(original || student) of the scores at temperature T, summed over the rows that count."""
        temperature, kind = self._options.temperature, self._task.look.kind
        one, other = (
            F.log_softmax(scores(output, kind) / temperature, -1) for output in (student, teacher.to(student.dtype))
        )
        found = F.kl_div(one, other, reduction="none", log_target=True).sum(-1) * temperature**2
        kept = self._task.kept(sample, one.shape)
        if kept is not None:
            mask = torch.from_numpy(kept.copy()).to(found.device)
            return Term((found * mask).sum(), float(mask.sum()))
        return Term(found.sum(), float(found.numel()))


def _is_float(value: oir.Value) -> bool:
    return value.dtype is not None and value.dtype.is_floating_point()
