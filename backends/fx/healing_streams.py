"""The distillation of what passes between the blocks: which streams, and through which filters."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import onnx_ir as oir
import torch
from torch import fx, nn

from burnish.backends.fx.bridge import bridge_of
from burnish.backends.fx.healing_features import Filters, Tail, end_of, learn, taps
from burnish.backends.fx.healing_loss import Add, Distances, Term
from burnish.backends.fx.healing_options import HealOptions
from burnish.backends.fx.healing_runs import Frozen
from burnish.ir.errors import InputError
from burnish.ir.samples import Sample
from burnish.ir.views.block import Block
from burnish.passes.lossy import Keeps

Values = Mapping[str, torch.Tensor]
Run = Callable[[Sample, Any], Values]

_WITHOUT = "heal without `features`"
_RATE = 1e-3
"""Of the optimizer that learns the filters."""


class Streams:
    """The streams of two models side by side; none of them where features have no weight.

    Args:
        options: whether and how.
        student, teacher: the modules.
        blocks, theirs: the blocks of the student and of the original.
        pairs: the number of the original's block for each of the student's; read only where features have a weight.
        model: the original.
        keeps: says which positions are padding.

    Attributes:
        student, teacher: the nodes of the streams in each module, by place.

    Raises:
        InputError: there are no blocks.
    """

    def __init__(
        self, options: HealOptions, student: fx.GraphModule, teacher: fx.GraphModule, blocks: Sequence[Block],
        theirs: Sequence[Block], pairs: Sequence[int], model: oir.Model, keeps: Keeps | None,
    ) -> None:  # fmt: skip
        found = taps(blocks, theirs, pairs) if options.features else []
        nodes = [_nodes(student, [tap.student for tap in found]), _nodes(teacher, [tap.teacher for tap in found])]
        both = [
            (tap, one, other)
            for tap, one, other in zip(found, *nodes, strict=True)
            if one is not None and other is not None
        ]
        self.student = {tap.name: one for tap, one, _ in both}
        self.teacher = {tap.name: other for tap, _, other in both}
        self._options, self._modules = options, (student, teacher)
        self._single = bool(theirs) and end_of(theirs, 0, len(theirs)) == len(theirs) - 1
        self._distances = Distances(model, {tap.name: (tap.teacher, -1) for tap, _, _ in both}, keeps)
        self._filters: list[Filters] = []

    def check(self, student: Values, teacher: Values) -> None:
        """Nothing, where the streams of both models have the same shapes.

        Raises:
            InputError: they have not, or there are none.
        """
        for name in self.student:
            if student[name].shape != teacher[name].shape:
                raise InputError(
                    f"{name} has the shape {list(student[name].shape)}, the original's {list(teacher[name].shape)}",
                    place="heal",
                    hint=_WITHOUT,
                )
        if not self.student:
            raise InputError("no stream between blocks is computed by itself", place="heal", hint=_WITHOUT)

    def learn_filters(
        self,
        outputs: Sequence[Mapping[str, fx.Node]],
        ends: Sequence[fx.Node | None],
        samples: Sequence[tuple[Any, Sample]],
        original: Run,
        terms: Callable[[Values, Values, Sample], list[Term]],
        add: Callable[[Iterable[nn.Parameter]], None],
    ) -> None:
        """Train a filter for each stream of both models, which are frozen.

        Args:
            outputs: the nodes of the outputs of student and original.
            ends: the streams behind their last blocks.
            samples: of training, with their keys.
            original: computes the outputs and streams of the original.
            terms: the loss on the outputs.
            add: adds gradients up over processes.

        Raises:
            InputError: there are several streams, or they are no [batch, positions, features] of one width.
        """
        if not self._single:
            raise InputError("the blocks are not all on one stream", place="heal", hint="heal without `filters`")
        if ends[0] is None or ends[1] is None:
            raise InputError("the last stream is not computed by itself", place="heal", hint="heal without `filters`")
        tails = [Tail(m, o, end) for m, o, end in zip(self._modules, outputs, ends, strict=True) if end is not None]
        runs = [
            Frozen(m, {**nodes, **tail.others}, None, 0, 1)
            for m, nodes, tail in zip(self._modules, (self.student, self.teacher), tails, strict=True)
        ]
        first = [runs[1](sample, key) for key, sample in samples[:1]]
        shapes = {(values[name].ndim, values[name].shape[-1]) for values in first for name in self.teacher}
        (shape,) = shapes if len(shapes) == 1 else [(0, 0)]
        if shape[0] != 3:
            what = "filters need streams [batch, positions, features] of one width"
            raise InputError(what, place="heal", hint="heal without `filters`")
        device = next(self._modules[0].parameters()).device
        self._filters = [Filters(list(self.student), shape[1]).to(device) for _ in tails]

        def loss(step: int, name: str) -> torch.Tensor:
            key, sample = samples[step % len(samples)]
            wanted, parts = original(sample, key), []
            for run, tail, one in zip(runs, tails, self._filters, strict=True):
                values = run(sample, key)
                for term in terms(tail(one(name, values[name]), values), wanted, sample):
                    parts.append(term.total / max(term.count, 1.0))
            return torch.stack(parts).sum()

        learn(self._filters, loss, self._options.filters, _RATE, self._options.seed, lambda some: add(some))
        self._filters[1].requires_grad_(False)

    def parameters(self) -> dict[str, nn.Parameter]:
        """The filters of the student, which go on learning with it."""
        return {f"filters.{name}": parameter for name, parameter in self._filters[0].named_parameters()}

    def measure(self, values: Iterable[tuple[Values, Sample]], add: Add) -> None:
        """Take the sizes of the streams from what the original computes; `add` adds over processes."""
        with torch.no_grad():
            self._distances.measure(((self._filtered(1, one), sample) for one, sample in values), add)

    def term(self, student: Values, teacher: Values, sample: Sample) -> Term:
        """The mean error of the streams, each divided by its size."""
        return self._distances.term(self._filtered(0, student), self._filtered(1, teacher), sample)

    def _filtered(self, which: int, values: Values) -> Values:
        streams = {name: values[name] for name in self.student}
        if not self._filters:
            return streams
        return {name: self._filters[which](name, stream) for name, stream in streams.items()}


def _nodes(module: fx.GraphModule, values: Sequence[oir.Value]) -> list[fx.Node | None]:
    made = {node.name: node for node in module.graph.nodes}
    return [made.get(bridge_of(module).values.get(str(value.name), "")) for value in values]
