"""Compare what two runners compute on the same samples."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx_ir as oir

from burnish.ir.errors import InputError
from burnish.ir.inference import Inference
from burnish.ir.samples import Sample
from burnish.ir.views.embedding import embeddings
from burnish.ir.walk import bodies
from burnish.passes.protocols import Runner

ROUNDING = {"float64": 1e-9, "float32": 1e-5, "float16": 4e-3, "bfloat16": 3e-2}
"""Relative error that re-association alone may cause, by dtype; 0 for every other dtype."""

COMPILED = ROUNDING | {"float32": 1e-4}
"""The same for compiled code, which adds up in another order than the runtime that it is compared with."""

_HALVES = {oir.DataType[name.upper()]: ROUNDING[name] for name in ("float16", "bfloat16")}

REPLAY_TOLERANCE = 1e-9
NOISE_FACTOR = 4.0


def relative_error(found: np.ndarray, expected: np.ndarray) -> float:
    """Largest absolute difference over the largest finite magnitude of `expected` (over 1 when that is zero).

    Infinite when shapes or dtypes kinds differ, or NaN and infinities are not at the same places with the same signs.
    For anything but floating point: 0 when equal, else infinite.
    """
    if isinstance(expected, list) or expected is None:
        return _sequence_error(found, expected)
    if not isinstance(found, np.ndarray | np.generic) or found.shape != expected.shape:
        return float("inf")
    if found.dtype.kind != expected.dtype.kind and "O" not in found.dtype.kind + expected.dtype.kind:
        return float("inf")
    if expected.dtype.kind not in "fV" and expected.dtype.name != "bfloat16":
        return 0.0 if np.array_equal(found, expected) else float("inf")
    if expected.size == 0:
        return 0.0
    a, b = found.astype(np.float64), expected.astype(np.float64)
    finite = np.isfinite(b)
    if not finite.all():
        if not np.array_equal(np.isfinite(a), finite) or not np.array_equal(a[~finite], b[~finite], equal_nan=True):
            return float("inf")
        a, b = a[finite], b[finite]
        if b.size == 0:
            return 0.0
    elif not np.isfinite(a).all():
        return float("inf")
    scale = float(np.abs(b).max())
    return float(np.abs(a - b).max()) / (scale if scale > 0 else 1.0)


def _sequence_error(found: Any, expected: Any) -> float:
    """The largest error over the elements of a sequence; an absent optional output equals nothing but another one."""
    if expected is None or not isinstance(found, list) or len(found) != len(expected):
        return 0.0 if found is None and expected is None else float("inf")
    return max((relative_error(one, other) for one, other in zip(found, expected, strict=True)), default=0.0)


def _rounding(array: Any, rounding: Mapping[str, float] = ROUNDING) -> float:
    """What re-association alone may cause in an output, a sequence of arrays or none among them."""
    if isinstance(array, list):
        return max((_rounding(one, rounding) for one in array), default=0.0)
    return 0.0 if array is None else rounding.get(array.dtype.name, 0.0)


@dataclass(frozen=True)
class OutputCheck:
    """The worst relative error of one output over all samples, the sample that gave it, and what was allowed."""

    output: str
    error: float
    sample: str
    tolerance: float

    @property
    def holds(self) -> bool:
        """Whether the error is within the tolerance."""
        return self.error <= self.tolerance


@dataclass
class Verification:
    """The result of comparing two models.

    Attributes:
        outputs: one check per output.
        samples: names of the samples that were compared.
        refused: samples that the original itself refused, with its reason.
        replay: worst relative error in float64, None when not replayed.
        replay_note: why it was not replayed, or on which samples it was.
        replay_sample: the sample that gave `replay`.
        unseen: outputs that are empty or NaN throughout on every sample: nothing is known about them.
        refusal: why there is no comparison to speak of: the runtime does not load the rewritten model; empty otherwise.
        loosened: samples on which more than the dtype's rounding was allowed; float64 has to judge those.
    """

    outputs: list[OutputCheck] = field(default_factory=list)
    samples: list[str] = field(default_factory=list)
    refused: list[tuple[str, str]] = field(default_factory=list)
    replay: float | None = None
    replay_note: str = ""
    refusal: str = ""
    loosened: list[str] = field(default_factory=list)
    replay_sample: str = ""
    unseen: list[str] = field(default_factory=list)

    def add_replay(self, sample: Sample, error: float) -> None:
        """Note the relative error in float64 on one more sample."""
        self.replay_note += f"; {sample.name}" if self.replay_note else sample.name
        if self.replay is None or error > self.replay:
            self.replay, self.replay_sample = error, sample.name

    @property
    def shown_by(self) -> str:
        """The sample that shows best that the two differ."""
        worst = self.worst
        return self.replay_sample if worst is None or (worst.holds and self.replay_sample) else worst.sample

    @property
    def worst(self) -> OutputCheck | None:
        """The check that is worst for its tolerance."""
        return max(self.outputs, key=lambda c: c.error / max(c.tolerance, 1e-300), default=None)

    @property
    def holds(self) -> bool:
        """Whether every output agrees, in the runtime and, where replayed, in float64."""
        replayed = self.replay is None or self.replay <= REPLAY_TOLERANCE
        return not self.refusal and replayed and all(c.holds for c in self.outputs)


class Expected:
    """What the original computes on the samples, run once and kept.

    Attributes:
        kept: the samples that it accepts, with its outputs.
        refused: the names of the others, with its reason.
        seconds: how long each kept sample took, in the order of `kept`.
    """

    def __init__(self, runner: Runner, samples: Sequence[Sample]) -> None:
        self.kept: list[tuple[Sample, dict[str, np.ndarray]]] = []
        self.refused: list[tuple[str, str]] = []
        self.seconds: list[float] = []
        for sample in samples:
            start = time.perf_counter()
            try:
                self.kept.append((sample, runner.run(sample.feeds)))
                self.seconds.append(time.perf_counter() - start)
            except InputError as error:
                self.refused.append((sample.name, error.cause.splitlines()[0]))
        if samples and not self.kept:
            raise InputError(
                f"the model refuses all {len(samples)} samples before any rewrite: {self.refused[0][1]}",
                hint="give inputs that the model accepts with `--data`, or skip the check with `--verify off`",
            )

    def unseen(self) -> list[str]:
        """Outputs that are empty or NaN throughout on every sample."""
        names = [name for _, outputs in self.kept[:1] for name in outputs]
        return [name for name in names if not any(_says_something(outputs[name]) for _, outputs in self.kept)]

    def by_cost(self) -> list[Sample]:
        """The kept samples, those that ran fastest first."""
        order = sorted(range(len(self.kept)), key=lambda index: self.seconds[index])
        return [self.kept[index][0] for index in order]

    def cheapest(self) -> tuple[Sample, float]:
        """The sample that ran fastest, and its seconds."""
        seconds, index = min((seconds, index) for index, seconds in enumerate(self.seconds))
        return self.kept[index][0], seconds

    def wavers(self, runner: Runner) -> bool:
        """Whether the original gives something else when it runs on the same samples again: it draws random numbers."""
        for sample, outputs in self.kept:
            again = runner.run(sample.feeds)
            if any(relative_error(again[name], array) > _rounding(array) for name, array in outputs.items()):
                return True
        return False

    def differences(self, runner: Runner) -> dict[str, float]:
        """The largest relative error of each output when another runner runs the kept samples."""
        found: dict[str, float] = {}
        for sample, outputs in self.kept:
            again = runner.run(sample.feeds)
            for name, array in outputs.items():
                found[name] = max(relative_error(again[name], array), found.get(name, 0.0))
        return found

    def largest(self, within: float) -> Sample:
        """The sample of most bytes among those that ran within so many seconds; the fastest when none did."""
        near = [sample for (sample, _), seconds in zip(self.kept, self.seconds, strict=True) if seconds <= within]
        return max(near, key=lambda one: sum(a.nbytes for a in one.feeds.values()), default=self.cheapest()[0])


def _says_something(array: Any) -> bool:
    if array is None:
        return False
    if isinstance(array, list):
        return any(_says_something(one) for one in array)
    floating = array.dtype.kind in "fV" or array.dtype.name == "bfloat16"
    return bool((array == array).any()) if floating else bool(np.size(array))


def compare(
    expected: Expected,
    candidate: Runner,
    noise: Callable[[], Mapping[str, float]] | None = None,
    rounding: Mapping[str, float] = ROUNDING,
) -> Verification:
    """Run `candidate` on the kept samples and compare each output.

    Args:
        expected: the original's outputs.
        candidate: the rewritten model.
        noise: the largest relative error, by output, that rounding alone makes in the original on these samples; asked
            only when an error exceeds the dtype's rounding. `NOISE_FACTOR` times that is then allowed.
        rounding: the relative error that is always allowed, by dtype.
    """
    result = Verification(refused=expected.refused, samples=[sample.name for sample, _ in expected.kept])
    result.unseen = expected.unseen()
    worst: dict[str, OutputCheck] = {}
    for sample, outputs in expected.kept:
        try:
            found: Mapping[str, np.ndarray] = candidate.run(sample.feeds)
        except InputError:
            found = {}
        for name, array in outputs.items():
            error = relative_error(found[name], array) if name in found else float("inf")
            tolerance = _rounding(array, rounding)
            if error > tolerance > 0 and np.isfinite(error) and noise is not None:
                allowed = NOISE_FACTOR * noise()[name]
                if allowed > tolerance:
                    tolerance = allowed
                    result.loosened += [sample.name] if sample.name not in result.loosened else []
            check = OutputCheck(name, error, sample.name, tolerance)
            before = worst.get(name)
            if before is None or (check.holds, -check.error) < (before.holds, -before.error):
                worst[name] = check
    result.outputs = list(worst.values())
    return result


def from_halves(model: oir.Model) -> dict[str, float]:
    """What rounding may cause in outputs computed from numbers of 16 bits, by name, whatever their own dtype."""
    facts = Inference(model)
    found: dict[oir.Value | None, float] = {}
    for node in model.graph:
        inside = [one for body in bodies(node) for one in body.all_nodes()]
        kinds = [facts.dtype(value) for one in (node, *inside) for value in one.outputs]
        made = [_HALVES.get(kind, 0.0) for kind in kinds if kind is not None]
        read = list(found.values()) if inside else [found.get(value, 0.0) for value in node.inputs]
        if most := max([*made, *read], default=0.0):
            found |= dict.fromkeys(node.outputs, most)
    return {str(value.name): found[value] for value in model.graph.outputs if value in found}


def nudged(array: np.ndarray, draw: int = 0) -> np.ndarray:
    """A floating-point input with each element moved by one unit of its last place, up or down; others as they are.

    Inputs are known to that precision only, so what a model makes of this difference is rounding and nothing else.
    Another `draw` moves other elements up.
    """
    if array.dtype not in (np.float64, np.float32, np.float16):
        return array
    up = np.random.default_rng((array.size, draw)).random(array.shape) < 0.5
    moved = np.nextafter(array, np.where(up, np.inf, -np.inf).astype(array.dtype))
    return np.where(np.isfinite(array) & np.isfinite(moved), moved, array)


@contextmanager
def nudged_tables(model: oir.Model, draw: int) -> Iterator[None]:
    """While the context lasts the embeddings of `model` are nudged: integers cannot be, the rows they pick can."""
    tables = {value: value.const_value for one in embeddings(model) if (value := one.table.source).is_initializer()}
    try:
        for value, tensor in tables.items():
            if tensor is not None:
                moved = nudged(tensor.numpy(), draw)
                value.const_value = oir.Tensor(moved, dtype=tensor.dtype, name=tensor.name)
        yield
    finally:
        for value, tensor in tables.items():
            value.const_value = tensor


def replay(before: Runner, after: Runner, sample: Sample) -> float:
    """Worst relative error over all outputs of two float64 runners on one sample."""
    expected, found = before.run(sample.feeds), after.run(sample.feeds)
    return max((relative_error(found[name], array) for name, array in expected.items()), default=0.0)
