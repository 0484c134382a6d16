"""Differences of outputs as sentences: how far they moved, on which samples, and where they parted."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from burnish.tools.check.difference import Difference, Field, Verdict
from burnish.tools.check.differences_contract import ports
from burnish.tools.check.differences_weights import about
from burnish.tools.check.lock import Lock, OutputLock, SampleLock
from burnish.tools.check.sketch import distance
from burnish.tools.check.tolerances import Tolerances

_COARSE = 1e-3
"""Movement of the largest and smallest element that counts although the sketch does not show it."""

_NAME = 40


@dataclass(frozen=True)
class Exact:
    """How two models differ on the samples themselves.

    Attributes:
        errors: the relative error by the old name of an output and by sample; infinite when it cannot be compared.
        parting: by output, the node at which the models part.
    """

    errors: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    parting: Mapping[str, str] = field(default_factory=dict)


def values(
    old: Lock, new: Lock, tolerances: Tolerances, *, explained: bool, exact: Exact | None = None
) -> Iterator[Difference]:
    """The outputs that differ.

    Args:
        old, new: the locks.
        tolerances: what may differ.
        explained: whether a difference of contract, structure or weights is the cause; then movement is a note unless a
            tolerance names values. NaN, other shapes and refused samples never are.
        exact: what is known from running both models.
    """
    if not old.values:
        return
    if new.samples is None:
        yield _note("the model was not run: what it computes is not compared")
        return
    before, after = {one.sample: one for one in old.values}, {one.sample: one for one in new.values}
    yield from _refused(old, new, before, after, tolerances)
    if old.samples is not None and old.samples.fingerprint != new.samples.fingerprint and not _exact(exact):
        inputs = [list(one.inputs.items()) for one in (old, new)]
        verdict = Verdict.NOTE if inputs[0] != inputs[1] else tolerances.verdict(Field.VALUES)
        message = "the samples are not those of the lock: what the model computes is not compared"
        yield Difference(Field.VALUES, verdict, message, key=("samples", "fingerprint"))
        return
    for name, now in ports(old.outputs, new.outputs).pairs.items():
        told = _Output(name, now, before, after, tolerances)
        yield from told.broken(old, new)
        yield from told.moved(explained, exact)


def _exact(exact: Exact | None) -> bool:
    return exact is not None and bool(exact.errors)


def _refused(
    old: Lock,
    new: Lock,
    before: Mapping[str, SampleLock],
    after: Mapping[str, SampleLock],
    tolerances: Tolerances,
) -> Iterator[Difference]:
    was, now = (0 if one.samples is None else one.samples.refused for one in (old, new))
    lost = [name for name in before if name not in after]
    if now > was:
        shown = f': "{_short(lost[0])}"' if len(lost) == 1 else f', "{_short(lost[0])}" among them' if lost else ""
        what = f"{now - was} sample{'s' * (now - was > 1)} that it took before"
        verdict = tolerances.verdict(Field.VALUES) if old.inputs == new.inputs else Verdict.NOTE
        message = f"the model now refuses {what}{shown}"
        yield Difference(Field.VALUES, verdict, message, "", str(was), str(now), ("samples", "refused"))
    elif lost and old.inputs == new.inputs:
        message = (
            f'nothing was computed on {len(lost)} of the {len(before)} samples of the lock, "{_short(lost[0])}" first'
        )
        yield Difference(Field.VALUES, tolerances.verdict(Field.VALUES), message, key=("values",))


@dataclass(frozen=True)
class _Output:
    """One output on all samples that both locks have."""

    name: str
    now: str
    before: Mapping[str, SampleLock]
    after: Mapping[str, SampleLock]
    tolerances: Tolerances

    def pairs(self) -> Iterator[tuple[str, OutputLock, OutputLock]]:
        """The output on each sample, old and new."""
        for sample, lock in self.before.items():
            other = self.after.get(sample)
            if other is not None and self.name in lock.outputs and self.now in other.outputs:
                yield sample, lock.outputs[self.name], other.outputs[self.now]

    def broken(self, old: Lock, new: Lock) -> Iterator[Difference]:
        """What is wrong whatever the cause: another dtype or shape, NaN and infinities."""
        pairs = list(self.pairs())
        contract = old.outputs[self.name] != new.outputs[self.now]
        kinds = [] if contract else [(s, a, b) for s, a, b in pairs if a.type != b.type]
        if kinds:
            sample, was, now = kinds[0]
            message = f"is {now.type} where it was {was.type}, {self._on(len(kinds), len(pairs), sample)}"
            yield self._difference(message, self.tolerances.verdict(Field.VALUES), sample, was.type, now.type)
        lost = [(s, a, b) for s, a, b in pairs if a.type == b.type and a.finite > b.finite]
        if lost:
            sample, was, now = max(lost, key=lambda one: one[1].finite - one[2].finite)
            count = was.finite - now.finite
            message = (
                f"has NaN or infinity in {count:,} element{'s' * (count > 1)} that {'were' if count > 1 else 'was'} "
            )
            message += f"finite, {self._on(len(lost), len(pairs), sample)}"
            yield self._difference(message, self.tolerances.verdict(Field.VALUES), sample, "finite", "not finite")

    def moved(self, explained: bool, exact: Exact | None) -> Iterator[Difference]:
        """By how much the output moved, where that is more than rounding."""
        pairs = [(s, a, b) for s, a, b in self.pairs() if a.type == b.type and a.finite <= b.finite]
        dtype = next((_dtype(a) for _, a, _ in pairs), "")
        known = exact.errors.get(self.name) if exact is not None else None
        distances = {sample: movement(a, b) for sample, a, b in pairs} if known is None else dict(known)
        judged = {sample: self.tolerances.values(self.name, dtype, by) for sample, by in distances.items()}
        far = {sample: by for sample, by in distances.items() if judged[sample] is not None}
        if not far:
            return
        worst = max(far, key=far.__getitem__)
        verdict = judged[worst] or Verdict.NOTE
        if explained and verdict is Verdict.REGRESSION and not self.tolerances.is_given(Field.VALUES):
            verdict = Verdict.NOTE
        on = self._on(len(far), len(distances), worst)
        if math.isinf(far[worst]):
            message = f"differs {on}"
        else:
            amount = about(far[worst]) if known is None else f"{far[worst]:.2g}"
            message = f"moved by {amount} of its size {on}"
        node = exact.parting.get(self.name, "") if exact is not None else ""
        message += f"; first at {node}" if node else ""
        size = "" if math.isinf(far[worst]) else f"{far[worst]:.3g}"
        yield self._difference(message, verdict, worst, "", size)

    def _on(self, count: int, of: int, worst: str) -> str:
        if of == 1:
            return f'on the sample "{_short(worst)}"'
        most = "" if count == 1 else ", most"
        return f'on {count} of {of} samples{most}{" on" if most else ":"} "{_short(worst)}"'

    def _difference(self, what: str, verdict: Verdict, sample: str, old: str, new: str) -> Difference:
        index = next((at for at, name in enumerate(self.before) if name == sample), 0)
        key = ("values", index, "outputs", self.name)
        return Difference(Field.VALUES, verdict, f"output `{self.now}` {what}", self.now, old, new, key)


def movement(old: OutputLock, new: OutputLock) -> float:
    """How far an output moved, relative to its size; an estimate. Infinite when it is not numbers and differs."""
    if old.type != new.type:
        return math.inf
    if old.hash or not old.sketch or not new.sketch:
        return 0.0 if old.hash == new.hash else math.inf
    size = math.sqrt(old.finite) * math.hypot(old.std, old.mean)
    apart = distance(old.sketch, new.sketch, size)
    largest = max(abs(old.low), abs(old.high))
    ends = max(abs(old.low - new.low), abs(old.high - new.high)) / (largest or 1.0)
    return max(apart, ends if ends > _COARSE else 0.0)


def _dtype(lock: OutputLock) -> str:
    return lock.type.partition("[")[0]


def _short(name: str) -> str:
    return name if len(name) <= _NAME else f"{name[: _NAME - 1]}…"


def _note(message: str) -> Difference:
    return Difference(Field.VALUES, Verdict.NOTE, message, key=("values",))
