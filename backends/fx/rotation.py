"""Learning the rotations and scales behind which a model bears few bits best.

OSTQuant (Hu et al. 2025, arXiv:2501.13987): a rotation of the residual stream and one of the values of each head, on
the manifold of orthogonal matrices, and scales between norms and their readers, values and outputs, queries and keys,
and both sides of gated MLPs. Weights, activations and cache are rounded as `burnish.passes.simulated` does; gradients
pass straight through. The loss compares the largest scores with the original's, re-normalized among themselves.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import onnx_ir as oir
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from burnish.backends.fx.builder import to_graph_module
from burnish.backends.fx.objective import tensors
from burnish.backends.fx.rotation_student import Space, make_student
from burnish.ir.errors import InputError
from burnish.ir.samples import Sample
from burnish.ir.text import fingerprint
from burnish.passes import learned, scaling
from burnish.passes.learned import Learned
from burnish.passes.rotation import keeping_ones
from burnish.passes.score_store import samples_fingerprint
from burnish.passes.simulated import Bits


@dataclass(frozen=True)
class LearnOptions:
    """How rotations are learned.

    Attributes:
        bits: of what is simulated.
        flat: begin as `rotate-residual{init=klt}` does, else with random Hadamard matrices alone.
        hadamard: Hadamard matrices are multiplied with when the model runs, before the last layers of MLPs and behind
            rotary embeddings.
        steps: how many samples are looked at, one a step.
        rate, scale_rate: of Adam, for rotations and for scales; both fall to zero along a cosine.
        top: how many scores of each row are compared.
        seed: of the order of the samples, and of the random matrices to begin with.
        every: steps between two checkpoints.
    """

    bits: Bits = field(default_factory=Bits)
    flat: bool = False
    hadamard: bool = True
    steps: int = 100
    rate: float = 0.002
    scale_rate: float = 0.002
    top: int = 1000
    seed: int = 0
    every: int = 10

    def check(self) -> None:
        """Raise InputError for what no learning can be."""
        for name in ("steps", "top", "every"):
            if getattr(self, name) < 1:
                raise InputError(f"`{name}` is {getattr(self, name)}", hint="give 1 or more")
        if self.seed < 0:
            raise InputError(f"`seed` is {self.seed}", hint="give 0 or more")
        if not (self.rate > 0 and self.scale_rate > 0):
            raise InputError("a rate is not positive", hint="0.002 is a good beginning")


def learn(
    model: oir.Model,
    samples: Sequence[Sample],
    options: LearnOptions = LearnOptions(),  # noqa: B008  it is frozen
    on_step: Callable[[int, float], None] | None = None,
    *,
    folder: Path | None = None,
) -> Learned:
    """Rotations and scales for a model with one residual stream; `burnish.passes.learned.merge` writes them.

    Args:
        model: in normal form; not changed.
        samples: what it is run on; its first output is compared.
        options: how.
        on_step: is told the number of each step, from 1 on, and its loss.
        folder: where a checkpoint is kept, from which the same call goes on after it was killed; None for none. On one
            machine the result is the same as without the interruption.

    Raises:
        InputError: the options or the model do not fit, or there are no samples.
    """
    options.check()
    if not samples:
        raise InputError("there are no samples", hint="give samples with `--data`")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(options.seed)
        order = np.random.default_rng(options.seed).permutation(len(samples))
        known = _wanted(model, {int(i): samples[i] for i in order[: options.steps]}, options.top)
        student = make_student(model, options.bits, hadamard=options.hadamard)
        space = _Space(model, learned.initial(model, options.seed, flat=options.flat))
        rotations = [one for name, one in space.named_parameters() if "parametrizations" in name]
        scales = [one for name, one in space.named_parameters() if "parametrizations" not in name]
        groups = [{"params": rotations, "lr": options.rate}, {"params": scales, "lr": options.scale_rate}]
        optimizer = torch.optim.Adam([one for one in groups if one["params"]])
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, options.steps)
        file = None if folder is None else folder / f"rotations-{_key(model, samples, options)}.pt"
        parts = {"space": space, "optimizer": optimizer, "schedule": schedule}
        done = _restore(file, parts)
        for step in range(done, options.steps):
            index = int(order[step % len(samples)])
            inputs = tensors(student.module, samples[index].feeds)
            weights = student.weights(space())
            scores = torch.func.functional_call(student.module, weights, tuple(inputs))[0]
            loss = compared(scores, *known[index])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            if on_step is not None:
                on_step(step + 1, float(loss.detach()))
            if file is not None and ((step + 1) % options.every == 0 or step + 1 == options.steps):
                _save(file, step + 1, parts)
        return space.learned()


def compared(scores: Tensor, largest: Tensor, where: Tensor) -> Tensor:
    """The divergence from the original's largest scores, re-normalized: sum p log(p / q), averaged over rows.

    Args:
        scores: of the student, [..., classes].
        largest: the original's largest scores, [..., top].
        where: which classes they are of.
    """
    target = torch.log_softmax(largest, -1)
    return (target.exp() * (target - torch.log_softmax(scores.gather(-1, where), -1))).sum(-1).mean()


def _wanted(model: oir.Model, samples: Mapping[int, Sample], count: int) -> dict[int, tuple[Tensor, Tensor]]:
    """The largest scores of the original for each sample, and which classes they are of."""
    teacher, found = to_graph_module(model), {}
    with torch.no_grad():
        for index, sample in samples.items():
            scores = teacher(*tensors(teacher, sample.feeds))[0]
            top = scores.topk(min(count, scores.shape[-1]), -1)
            found[index] = (top.values, top.indices)
    return found


class _Space(nn.Module):
    """What is learned, as parameters."""

    def __init__(self, model: oir.Model, start: Learned) -> None:
        super().__init__()
        self.keeps_ones = learned.stream_of(model).keeps_ones
        size = len(start.turn)
        basis = np.eye(size)
        if self.keeps_ones:  # a rotation of what is perpendicular to the row of ones, in a basis that begins with it
            basis = np.linalg.qr(np.column_stack([np.ones(size), basis[:, 1:]]))[0]
        self.register_buffer("basis", torch.from_numpy(basis).float())
        inner = basis.T @ start.turn @ basis
        self.turn = _Orthogonal(inner[1:, 1:] if self.keeps_ones else inner)
        self.values = nn.ModuleList(_Orthogonal(one) for one in start.values)
        self.norm_logs = _zeros(start.norm_logs)
        self.value_logs = _zeros(start.value_logs)
        self.gated_logs = _zeros(start.gated_logs)
        self.groups: list[np.ndarray | None] = []
        scores = []
        for layer in learned.attention_of(model):
            pairs = scaling.score_pairs(layer)
            _, places = np.unique(pairs, return_inverse=True) if not isinstance(pairs, str) else (None, None)
            self.groups.append(places)
            scores.append(np.zeros((layer.kv_heads, 0 if places is None else places.max() + 1)))
        self.score_logs = _zeros(scores)

    def forward(self) -> Space:
        turn = self.turn()
        if self.keeps_ones:
            turn = torch.block_diag(torch.ones(1, 1), turn)
        basis = self.get_buffer("basis")
        return Space(
            basis @ turn @ basis.T if self.keeps_ones else turn,
            [one() for one in self.values],
            list(self.norm_logs),
            list(self.value_logs),
            [
                None if places is None else logs[:, torch.from_numpy(places)]
                for logs, places in zip(self.score_logs, self.groups, strict=True)
            ],
            list(self.gated_logs),
        )

    def learned(self) -> Learned:
        """In float64, rotations made orthogonal to its precision."""
        with torch.no_grad():
            space = self()
        turn = _nearest_orthogonal(space.turn)
        return Learned(
            keeping_ones(turn) if self.keeps_ones else turn,
            [_nearest_orthogonal(one) for one in space.values],
            [_array(one) for one in space.norm_logs],
            [_array(one) for one in space.value_logs],
            [None if one is None else _array(one) for one in space.score_logs],
            [_array(one) for one in space.gated_logs],
        )


class _Orthogonal(nn.Module):
    """An orthogonal matrix, or several, that begins as a given one."""

    def __init__(self, start: np.ndarray) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.from_numpy(start.copy()).float())
        parametrizations.orthogonal(self, "weight", orthogonal_map="cayley", use_trivialization=True)
        self.weight = torch.from_numpy(start.copy()).float()

    def forward(self) -> Tensor:
        return self.weight


def _zeros(like: Sequence[np.ndarray]) -> nn.ParameterList:
    return nn.ParameterList(nn.Parameter(torch.zeros(one.shape)) for one in like)


def _array(tensor: Tensor) -> np.ndarray:
    return np.asarray(tensor.detach().double().numpy())


def _nearest_orthogonal(matrix: Tensor) -> np.ndarray:
    left, _, right = np.linalg.svd(_array(matrix))
    return np.asarray(left @ right)


def _key(model: oir.Model, samples: Sequence[Sample], options: LearnOptions) -> str:
    text = f"{fingerprint(model)} {samples_fingerprint(samples)} {options}"
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _save(file: Path, step: int, parts: dict[str, nn.Module | torch.optim.Optimizer]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_suffix(".partial")
    torch.save({"step": step} | {name: one.state_dict() for name, one in parts.items()}, partial)
    os.replace(partial, file)


def _restore(file: Path | None, parts: dict[str, nn.Module | torch.optim.Optimizer]) -> int:
    """The steps that are done already; 0 without a checkpoint."""
    if file is None or not file.exists():
        return 0
    kept = torch.load(file, weights_only=True)
    for name, one in parts.items():
        one.load_state_dict(kept[name])
    return int(kept["step"])
