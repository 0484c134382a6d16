"""A model in torch with gates at branches, and how far it is from itself with all gates open."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as oir
import torch
import torch.nn.functional as F
from torch import nn

from burnish.backends.fx.bridge import bridge_of
from burnish.backends.fx.healing_rows import Batches
from burnish.backends.fx.objective import Task, call, module_of, scores
from burnish.ir.errors import InputError
from burnish.ir.samples import Sample
from burnish.passes.gates import Padding
from burnish.passes.lossy import Keeps
from burnish.passes.routers import Routing

TINY = 1e-9
_BATCH = 32
_HELD_OUT = 0.2
_KEPT = 1 << 30
"""Bytes of outputs with all gates open that are kept."""
_SEARCH = 9
"""Bisections by which a share is met."""


class Gate(nn.Module):
    """Lets a branch through, row by row.

    Args:
        features: of the stream.
        padding: which tokens count.

    Attributes:
        state: "open", "closed", or "routed".
        means: of the stream, [rows, features], since it was last emptied.
        closed: shares of closed gates of each call, with their gradients, likewise.
    """

    centre: torch.Tensor
    spread: torch.Tensor

    def __init__(self, features: int, padding: Padding | None) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(features))
        self.bias = nn.Parameter(torch.ones(()))
        self.register_buffer("centre", torch.zeros(features))
        self.register_buffer("spread", torch.ones(features))
        self.padding, self.state, self.shift = padding, "open", 0.0
        self.means: list[torch.Tensor] = []
        self.closed: list[torch.Tensor] = []

    def forward(self, result: torch.Tensor, stream: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        """`result` [rows, tokens, features] where the gate is open, zeros where it is not."""
        if self.state == "open":
            self.means.append(self._mean(stream.detach(), mask))
            return result
        if self.state == "closed":
            return result * 0
        score = ((self._mean(stream, mask) - self.centre) / self.spread) @ self.weight + self.bias + self.shift
        if self.training:
            lot = torch.rand_like(score).clamp(1e-6, 1 - 1e-6)
            score = score + lot.log() - (1 - lot).log()
        soft, hard = torch.sigmoid(score), (score >= 0).to(score.dtype)
        through = hard + soft - soft.detach() if self.training else hard
        self.closed.append(1 - through)
        return result * through[:, None, None].to(result.dtype)

    def _mean(self, stream: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        if mask is None or self.padding is None:
            return stream.mean(1).float()
        kept = mask > -1 if self.padding.additive else mask == self.padding.kept
        kept = kept[:, kept.shape[1] - stream.shape[1] :] if self.padding.tail else kept
        total = torch.where(kept[:, :, None], stream, torch.zeros((), dtype=stream.dtype)).sum(1)
        return (total / kept.sum(1, keepdim=True).clamp_min(1)).float()


@dataclass
class Fit:
    """What the rows of the samples show: means [gate][rows, features], and distances [rows, gates]."""

    means: list[torch.Tensor]
    distances: torch.Tensor


class Routers:
    """The gates of a model."""

    def __init__(self, model: oir.Model, wanted: Routing, samples: Sequence[Sample], keeps: Keeps | None) -> None:
        self.module = module_of(model).eval()
        for one in self.module.parameters():
            one.requires_grad_(False)
        self.task = Task(model, self.module, keeps)
        self.output = self.task.look.output
        self.batches = Batches(samples, model, _BATCH, _HELD_OUT, wanted.seed, 0, 1)
        nodes = {node.name: node for node in self.module.graph.nodes}
        bridge = bridge_of(self.module)
        self.gates: list[Gate] = []
        for number, one in enumerate(wanted.places):
            result, stream = (nodes[bridge.values[name]] for name in (one.result, one.stream))
            mask = nodes[bridge.inputs[one.padding.input]] if one.padding is not None else None
            gate = Gate(one.features, one.padding).eval()
            self.module.add_submodule(f"gate_{number}", gate)
            with self.module.graph.inserting_after(result):
                new = self.module.graph.call_module(f"gate_{number}", (result, stream, mask))
            result.replace_all_uses_with(new, lambda user, new=new: user is not new)
            self.gates.append(gate)
        self.module.graph.lint()
        self.module.recompile()
        self._open: dict[int, torch.Tensor] = {}

    def learn(self, on: bool) -> None:
        """Whether gates have gradients, and draw by lot how far from its score a gate decides."""
        for gate in self.gates:
            gate.train(on)
            gate.shift = 0.0 if on else gate.shift

    def set(self, state: str, only: int | None = None, others: str = "open") -> None:
        """Bring all gates into a state, or one of them, and the others into another."""
        for number, gate in enumerate(self.gates):
            gate.state = state if only in (None, number) else others
            gate.means, gate.closed = [], []

    def run(self, sample: Sample) -> torch.Tensor:
        """The output that is looked at."""
        return call(self.module, sample.feeds)[self.output]

    def open(self, sample: Sample) -> torch.Tensor:
        """The same with all gates open."""
        if id(sample) not in self._open:
            states = [gate.state for gate in self.gates]
            for gate in self.gates:
                gate.state = "open"
            with torch.no_grad():
                made = self.run(sample)
            for gate, state in zip(self.gates, states, strict=True):
                gate.state = state
            if sum(one.nbytes for one in self._open.values()) + made.nbytes > _KEPT:
                return made
            self._open[id(sample)] = made
        return self._open[id(sample)]

    def distance(self, found: torch.Tensor, sample: Sample) -> torch.Tensor:
        """How far an output is from that with all gates open, [rows]."""
        wanted, kind = self.open(sample), self.task.look.kind
        if kind == "values":
            apart = (found - wanted).float().square() / wanted.float().square().mean().clamp_min(TINY)
            return apart.reshape(len(found), -1).mean(1)
        one, other = (F.log_softmax(scores(value, kind), -1) for value in (found, wanted))
        apart = F.kl_div(one, other, reduction="none", log_target=True).sum(-1)
        kept = self.task.kept(sample, one.shape)
        if kept is not None:
            mask = torch.from_numpy(kept.copy())
            return (apart * mask).reshape(len(apart), -1).sum(1) / mask.reshape(len(mask), -1).sum(1).clamp_min(1)
        return apart.reshape(len(apart), -1).mean(1)

    def measured(self, batches: Sequence[Sequence[Sample]], tell: Callable[[], None], others: str = "open") -> Fit:
        """How much further each row is when one gate is closed than when it is open, the others being in a state."""
        means: list[list[torch.Tensor]] = [[] for _ in self.gates]
        distances = []
        with torch.no_grad():
            for sample in (one for batch in batches for one in batch):
                found, whole = [], None
                for number, gate in enumerate(self.gates):
                    if others != "open" or whole is None:
                        self.set("open", number, others)
                        whole = self.distance(self.run(sample), sample)
                        seen = [one.means[0] for one in self.gates if one.means]
                    means[number].append(seen[number] if others == "open" else gate.means[0])
                    self.set("closed", number, others)
                    found.append((self.distance(self.run(sample), sample) - whole).clamp_min(0))
                    tell()
                if len({len(one) for one in (*found, means[0][-1])}) != 1:
                    raise InputError("the rows of the model's output are not those of its stream", place=sample.name)
                distances.append(torch.stack(found, 1))
        return Fit([torch.cat(own) for own in means], torch.cat(distances))

    def judged(self, batches: Sequence[Sequence[Sample]]) -> tuple[float, np.ndarray]:
        """The mean distance of the rows with routed gates, and the share of rows that each gate is closed for."""
        far, closed = [], []
        with torch.no_grad():
            for sample in (one for batch in batches for one in batch):
                self.set("routed")
                far.append(self.distance(self.run(sample), sample))
                closed.append(torch.stack([gate.closed[0] for gate in self.gates], 1))
        return float(torch.cat(far).mean()), torch.cat(closed).mean(0).numpy()

    def meet(self, share: float, batches: Sequence[Sequence[Sample]]) -> float:
        """Shift all scores alike until that share of the gates is closed; the mean distance then."""
        low, high = -1e3, 1e3
        tried: dict[float, tuple[float, float]] = {}
        middle = 0.0
        step = 1.0
        for _ in range(_SEARCH):
            for gate in self.gates:
                gate.shift = middle
            far, closed = self.judged(batches)
            tried[middle] = abs(float(closed.mean()) - share), far
            if closed.mean() > share:
                low = middle
            else:
                high = middle
            if low < -1e2 or high > 1e2:
                middle, step = middle + (step if closed.mean() > share else -step), 2 * step
            else:
                middle = (low + high) / 2
        best = min(tried, key=lambda one: tried[one])
        for gate in self.gates:
            gate.shift = best
        return tried[best][1]

    def read(self) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """The weights and biases."""
        return [(one.weight.detach().clone(), one.bias.detach() + one.shift) for one in self.gates]

    def load(self, given: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> None:
        """Take weights and biases."""
        with torch.no_grad():
            for gate, (weight, bias) in zip(self.gates, given, strict=True):
                gate.weight.copy_(weight)
                gate.bias.copy_(bias)
                gate.shift = 0.0
