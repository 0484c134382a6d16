"""Learning the rotations and scales behind which a model bears few bits best.

OSTQuant (Hu et al. 2025, arXiv:2501.13987): a rotation of the residual stream and one of the values of each head, on
the manifold of orthogonal matrices, and scales between norms and their readers, values and outputs, queries and keys,
and both sides of gated MLPs. Weights, activations and cache are rounded as `burnish.passes.simulated` does; gradients
pass straight through. The loss compares the largest scores with the original's, re-normalized among themselves.
"""

from __future__ import annotations

import gc
import hashlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import onnx_ir as oir
import torch
from torch import Tensor

from burnish.backends import heap
from burnish.backends.fx.builder import to_graph_module
from burnish.backends.fx.objective import tensors
from burnish.backends.fx.rotation_steps import Turns, save
from burnish.backends.fx.rotation_student import Space, Student, held, make_student
from burnish.ir.errors import InputError
from burnish.ir.samples import Sample
from burnish.ir.text import fingerprint
from burnish.passes import learned, scaling
from burnish.passes.learned import Learned
from burnish.passes.score_store import samples_fingerprint
from burnish.passes.simulated import Bits

Told = Callable[[int, float, float], None]
"""Is told the number of a step, its loss, and the least loss so far on the samples that are kept apart."""


_MOST = 0.5
"""A channel with a larger share of the energy of a row of the stream is left where it is."""

_WORSE = 1.05
"""Beyond so many times the least loss, learning goes back; less is the noise of few samples."""


@dataclass(frozen=True)
class LearnOptions:
    """How rotations are learned.

    Attributes:
        bits: of what is simulated.
        flat: begin as `rotate-residual{init=klt}` does, else with random Hadamard matrices alone.
        hadamard: Hadamard matrices are multiplied with when the model runs, before the last layers of MLPs and behind
            rotary embeddings.
        starts: how many seeds are tried, from `seed` on; learning begins with the one of the least loss.
        steps: how many are made; with 0 the best start is all.
        texts: samples of a step.
        angle: by which the rows of a rotation move in a step, in radians; falls to zero along a cosine.
        scale_rate: of Adam, for the logarithms of scales; likewise.
        top: how many scores of each row are compared.
        seed: of the order of the samples, and of the random matrices to begin with.
        apart: samples that nothing is learned from: what has the least loss on them is the result. No more than half.
        every: steps between two looks at these, and between two checkpoints. Where a look is worse than the best by a
            twentieth, learning goes on from that one at half the rates.
        device: a torch device. On `cuda` products are of TF32 while gradients are made.
    """

    bits: Bits = field(default_factory=Bits)
    flat: bool = False
    hadamard: bool = True
    starts: int = 1
    steps: int = 100
    texts: int = 1
    angle: float = 0.002
    scale_rate: float = 0.005
    top: int = 1000
    seed: int = 0
    apart: int = 4
    every: int = 10
    device: str = "cpu"

    def check(self) -> None:
        """Raise InputError for what no learning can be."""
        for name, least in (("steps", 0), ("starts", 1), ("texts", 1), ("top", 1), ("apart", 1), ("every", 1)):
            if getattr(self, name) < least:
                raise InputError(f"`{name}` is {getattr(self, name)}", hint=f"give {least} or more")
        if self.seed < 0:
            raise InputError(f"`seed` is {self.seed}", hint="give 0 or more")
        for name in ("angle", "scale_rate"):
            if not getattr(self, name) > 0:
                raise InputError(f"`{name}` is {getattr(self, name)}", hint="0.005 is a good beginning")
        try:
            torch.empty(0, device=self.device)
        except (RuntimeError, AssertionError) as error:
            raise InputError(
                f"torch cannot use the device `{self.device}`: {str(error).splitlines()[0]}",
                hint="a GPU needs its driver, and a build of torch for it" if self.device.startswith("cuda") else None,
            ) from error


def learn(
    model: oir.Model,
    samples: Sequence[Sample],
    options: LearnOptions = LearnOptions(),  # noqa: B008  it is frozen
    on_step: Told | None = None,
    *,
    folder: Path | None = None,
) -> Learned:
    """Rotations and scales for a model with one residual stream; `burnish.passes.learned.merge` writes them.

    Memory is that of about seven times the model's weights in float32 while it begins (3.7 GB for the 0.54 GB of
    SmolLM2-135M), afterwards of four times, and of the activations of one sample; it does not grow with the steps.

    Args:
        model: in normal form; not changed.
        samples: what it is run on; its first output is compared.
        options: how.
        on_step: see `Told`.
        folder: where a checkpoint is kept, from which the same call goes on after it was killed; None for none. On one
            machine the result is the same as without the interruption.

    Raises:
        InputError: the options or the model do not fit, or there are no samples.
    """
    options.check()
    if not samples:
        raise InputError("there are no samples", hint="give samples with `--data`")
    with torch.device(options.device):
        return _learned(model, samples, options, on_step, folder)


def _learned(
    model: oir.Model, samples: Sequence[Sample], options: LearnOptions, on_step: Told | None, folder: Path | None
) -> Learned:
    order = [int(one) for one in np.random.default_rng(options.seed).permutation(len(samples))]
    count = min(options.apart, len(samples) // 2)
    apart, order = order[:count] or order, order[count:]
    used = {*apart, *order[: options.steps * options.texts]}
    known = _wanted(model, {index: samples[index] for index in sorted(used)}, options.top)
    kept = _kept(model, samples[apart[0]])
    student = make_student(model, options.bits, hadamard=options.hadamard)
    gc.collect()  # graphs refer to themselves
    heap.give_back()
    loop = _Loop(model, samples, options, known, student, kept)
    file = None if folder is None else checkpoint(folder, model, samples, options)
    if file is None or not loop.restored(file):
        loop.start(apart)
    while loop.step < options.steps:
        first = loop.step * options.texts
        loss = loop.forward([order[(first + one) % len(order)] for one in range(options.texts)])
        last = loop.step == options.steps
        if last or loop.step % options.every == 0:
            loop.judge(apart)
            if file is not None:
                save(file, loop.state())
        if on_step is not None:
            on_step(loop.step, loss, loop.least)
    return loop.result()


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
    teacher, found = to_graph_module(model).to(torch.get_default_device()), {}
    with torch.no_grad():
        for index, sample in samples.items():
            scores = teacher(*tensors(teacher, sample.feeds))[0]
            top = scores.topk(min(count, scores.shape[-1]), -1)
            found[index] = (top.values.clone(), top.indices.clone())
    return found


def _kept(model: oir.Model, sample: Sample) -> Tensor | None:
    """Orthonormal rows of the stream that its rotation has to leave where they begin, [rows, width]; None for none.

    That of ones where the stream keeps its mean; and each channel that has most of the energy of some row before a norm
    (massive activations, Sun et al. 2024, arXiv:2402.17762). A Hadamard matrix writes such a row as two numbers, which
    a grid of few bits holds exactly, and gradients that pass straight through rounding do not see what a turn spoils.
    """
    graph = model.clone()
    stream = learned.stream_of(graph)
    places = dict.fromkeys(norm.input for norm in stream.norms)
    given = len(graph.graph.outputs)
    graph.graph.outputs.extend(places)
    module = to_graph_module(graph).to(torch.get_default_device())
    largest = torch.zeros(stream.width)
    with torch.no_grad():
        for rows in module(*tensors(module, sample.feeds))[given:]:
            energy = rows.square().flatten(0, -2)
            shares = energy / energy.sum(-1, keepdim=True).clamp_min(torch.finfo(energy.dtype).tiny)
            largest = torch.maximum(largest, shares.amax(0))
    kept = torch.eye(stream.width)[largest > _MOST]
    if stream.keeps_ones:
        kept = torch.cat([torch.ones(1, stream.width), kept])
    return torch.linalg.qr(kept.T)[0].T if len(kept) else None


class _Loop:
    """What is learned, and how far it is."""

    def __init__(
        self,
        model: oir.Model,
        samples: Sequence[Sample],
        options: LearnOptions,
        known: Mapping[int, tuple[Tensor, Tensor]],
        student: Student,
        kept: Tensor | None,
    ) -> None:
        self.kept = kept
        self.model, self.samples, self.options, self.known, self.student = model, samples, options, known, student
        self.keeps_ones = learned.stream_of(model).keeps_ones
        pairs = [scaling.score_pairs(layer) for layer in learned.attention_of(model)]
        self.tied = [None if isinstance(one, str) else _places(one) for one in pairs]
        self.step, self.least, self.rate = 0, math.inf, 1.0
        self._begin(learned.initial(model, options.seed, flat=options.flat))

    def _begin(self, found: Learned) -> None:
        self.space = _space(found)
        self.turns = Turns([self.space.turn, *self.space.values], [self.kept, *([None] * len(found.values))])
        self.scales = torch.optim.Adam(self.space.scales() or [torch.zeros(1)])
        self.best = [one.detach().clone() for one in _parts(self.space)]

    def start(self, apart: Sequence[int]) -> None:
        """Begin with the seed of the least loss."""
        first = self.options.seed
        losses = {}
        for seed in range(first, first + self.options.starts):
            found = learned.initial(self.model, seed, flat=self.options.flat)
            losses[seed] = self.loss(_space(found), apart)
        seed = min(losses, key=lambda one: losses[one])
        self._begin(learned.initial(self.model, seed, flat=self.options.flat))
        self.least = losses[seed]

    def loss(self, space: Space, indices: Sequence[int]) -> float:
        """Of samples, with nothing learned from them."""
        weights = self.student.weights(space)
        with torch.no_grad():
            found = float(np.mean([float(self._one(weights, index)) for index in indices]))
        del weights
        heap.give_back()
        return found

    def _one(self, weights: dict[str, Tensor], index: int) -> Tensor:
        module = self.student.module
        inputs = tensors(module, self.samples[index].feeds)
        return compared(torch.func.functional_call(module, weights, tuple(inputs))[0], *self.known[index])

    def forward(self, indices: Sequence[int]) -> float:
        """Make one step; the loss before it."""
        total = 0.0
        weights = self.student.weights(self.space)
        with _quick():
            for index in indices:
                loss = self._one(weights, index) / len(indices)
                loss.backward()
                total += float(loss.detach())
                del loss
        self.student.pull_back(self.space, weights)
        del weights
        share = self.rate * (1 + math.cos(math.pi * self.step / self.options.steps)) / 2
        for logs, places in zip(self.space.score_logs, self.tied, strict=True):
            if logs is not None and logs.grad is not None and places is not None:
                sums = torch.zeros(len(logs), int(places.max()) + 1).index_add(1, places, logs.grad)
                logs.grad = sums[:, places]
        self.turns.step(self.options.angle * share)
        for group in self.scales.param_groups:
            group["lr"] = self.options.scale_rate * share
        self.scales.step()
        self.scales.zero_grad()
        self.step += 1
        heap.give_back()
        return total

    def judge(self, apart: Sequence[int]) -> None:
        """Keep what is learned if it is the best so far; if it is much worse, go back to that, with half the rates."""
        loss = self.loss(self.space, apart)
        better, worse = loss < self.least, not loss <= _WORSE * self.least
        with torch.no_grad():
            for kept, one in zip(self.best, _parts(self.space), strict=True):
                if better:
                    kept.copy_(one)
                elif worse:
                    one.copy_(kept)
        if better:
            self.least = loss
        elif worse:
            self.rate /= 2
            self.turns.forget()
            self.scales.state.clear()

    def state(self) -> dict[str, object]:
        """All that a later process needs to go on."""
        return {
            "step": self.step,
            "least": self.least,
            "rate": self.rate,
            "best": self.best,
            "now": [one.detach() for one in _parts(self.space)],
            "turns": (self.turns.first, self.turns.second, self.turns.count),
            "scales": self.scales.state_dict(),
        }

    def restored(self, file: Path) -> bool:
        """Go on where `file` says; whether there is one."""
        if not file.exists():
            return False
        kept = torch.load(file, weights_only=True, map_location=self.options.device)
        self.step, self.least, self.best = int(kept["step"]), float(kept["least"]), kept["best"]
        self.rate = float(kept["rate"])
        with torch.no_grad():
            for one, held in zip(_parts(self.space), kept["now"], strict=True):
                one.copy_(held)
        self.turns.first, self.turns.second, self.turns.count = kept["turns"]
        self.scales.load_state_dict(kept["scales"])
        return True

    def result(self) -> Learned:
        """The best so far in float64, rotations made orthogonal to its precision."""
        with torch.no_grad():
            for one, kept in zip(_parts(self.space), self.best, strict=True):
                one.copy_(kept)
        space = self.space
        turn = _array(space.turn)
        if self.keeps_ones:  # to the precision of float64, too; what is nearest to it then does as well
            turn = turn - turn.mean(0)
            turn = turn - turn.mean(1, keepdims=True) + 1 / len(turn)
        return Learned(
            _nearest_orthogonal(turn),
            [_nearest_orthogonal(_array(one)) for one in space.values],
            [_array(one) for one in space.norm_logs],
            [_array(one) for one in space.value_logs],
            [None if one is None else _array(one) for one in space.score_logs],
            [_array(one) for one in space.gated_logs],
        )


@contextmanager
def _quick() -> Iterator[None]:
    """Let GPUs multiply in TF32: what it rounds off is little beside what few bits do."""
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = True
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


def _space(found: Learned) -> Space:
    def leaf(array: np.ndarray) -> Tensor:
        return held(array).requires_grad_()

    return Space(
        leaf(found.turn),
        [leaf(one) for one in found.values],
        [leaf(one) for one in found.norm_logs],
        [leaf(one) for one in found.value_logs],
        [None if one is None else leaf(one) for one in found.score_logs],
        [leaf(one) for one in found.gated_logs],
    )


def _parts(space: Space) -> list[Tensor]:
    return [space.turn, *space.values, *space.scales()]


def _places(pairs: np.ndarray) -> Tensor:
    return torch.tensor(np.unique(pairs, return_inverse=True)[1].reshape(-1))


def _array(tensor: Tensor) -> np.ndarray:
    return np.asarray(tensor.detach().double().cpu().numpy())


def _nearest_orthogonal(matrix: np.ndarray) -> np.ndarray:
    left, _, right = np.linalg.svd(matrix)
    return np.asarray(left @ right)


def checkpoint(folder: Path, model: oir.Model, samples: Sequence[Sample], options: LearnOptions) -> Path:
    """The file in a folder that `learn` goes on from."""
    text = f"{fingerprint(model)} {samples_fingerprint(samples)} {options}"
    return folder / f"rotations-{hashlib.sha256(text.encode()).hexdigest()[:16]}.pt"
