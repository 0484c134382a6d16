"""Differences of weights as sentences: which layers moved, and by how much of their norm."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from statistics import median

from burnish.tools.check.alignment import Group, Part
from burnish.tools.check.difference import Difference, Field, Verdict
from burnish.tools.check.differences_structure import Structure
from burnish.tools.check.lock import LayerLock, Lock
from burnish.tools.check.matching import pairs
from burnish.tools.check.sketch import distance
from burnish.tools.check.tolerances import Tolerances

ONE_BY_ONE = 3
"""Layers that are told one by one; more of them are told in one sentence."""

_SHOWN = 3
_FOLDED = ("Conv", "ConvTranspose", "Gemm")


@dataclass(frozen=True)
class Moved:
    """A layer whose weights changed.

    Attributes:
        part: the segment as it was.
        now: the name of the segment as it is.
        old, new: the layer.
        operator: of the node.
        distance: by how much of their norm the weights moved; None where they are no numbers.
        number: of the layer in the old segment.
    """

    part: Part
    now: str
    old: LayerLock
    new: LayerLock
    operator: str
    distance: float | None
    number: int

    @property
    def label(self) -> str:
        """The operator, the name as far as known, and the segment."""
        name = self.new.name or self.old.name
        return f"{self.operator}{f' `{name}`' if name else ''} ({self.now})"

    @property
    def key(self) -> tuple[str | int, ...]:
        """Where it stands in the lock file."""
        return ("segments", self.part.index, "layers", self.number)


def weights(old: Lock, new: Lock, compared: Structure, tolerances: Tolerances) -> list[Difference]:
    """The differences of weights between nodes that are still there; those that a norm was folded into are notes."""
    groups = compared.groups
    if old.weights == new.weights:
        return []
    found: list[Moved] = []
    for group in groups:
        if group.pair is not None and group.pair[0].segment.weights != group.pair[1].segment.weights:
            found += moved(*group.pair)
    if not found:
        return [] if old.structure != new.structure else [_elsewhere(old, new, groups, tolerances)]
    folded = [one for one in found if one.now in compared.unfolded and one.operator in _FOLDED]
    kept = [one for one in found if one not in folded]
    notes = [replace(_single(one, tolerances), verdict=Verdict.NOTE) for one in folded]
    if len(kept) <= ONE_BY_ONE:
        return [*(_single(one, tolerances) for one in kept), *notes]
    layers = sum(len(group.pair[0].segment.layers) for group in groups if group.pair is not None)
    return [_many(kept, layers, tolerances), *notes]


def moved(old: Part, new: Part) -> Iterator[Moved]:
    """The layers of a segment whose weights changed, as far as their lines are still there."""
    partner = lines(old, new)
    after = {layer.line: layer for layer in new.segment.layers}
    for number, layer in enumerate(old.segment.layers):
        other = after.get(partner.get(layer.line, -1))
        if other is None or other.weights == layer.weights:
            continue
        apart = None
        if layer.sketch and other.sketch:
            apart = distance(layer.sketch, other.sketch, layer.norm)
            apart = max(apart, abs(other.norm - layer.norm) / layer.norm if layer.norm else 0.0)
        at = new if len(new.lines) > other.line else old
        yield Moved(old, new.name, layer, other, at.lines[other.line].operator if at.lines else "node", apart, number)


def lines(old: Part, new: Part) -> dict[int, int]:
    """The line of the new segment by that of the old one, for lines that are still there."""
    if old.segment.structure == new.segment.structure:
        return {index: index for index in range(len(old.lines))}
    return dict(pairs([one.key for one in old.lines], [one.key for one in new.lines]))


def _single(one: Moved, tolerances: Tolerances) -> Difference:
    verdict = tolerances.weights(math.inf if one.distance is None else one.distance)
    amount = "changed" if one.distance is None else f"moved by {about(one.distance)} of their norm"
    message = f"the weights of {one.label} {amount}"
    place = one.new.name or one.old.name or one.part.name
    return Difference(Field.WEIGHTS, verdict, message, place, one.old.weights, one.new.weights, one.key)


def _many(moved: Sequence[Moved], layers: int, tolerances: Tolerances) -> Difference:
    numbers = [one for one in moved if one.distance is not None]
    numbers.sort(key=lambda one: -(one.distance or 0.0))
    far = [one.distance or 0.0 for one in numbers]
    verdict = tolerances.weights(max(far) if len(far) == len(moved) else math.inf)
    whole = len(moved) == layers
    head = "all weights changed (retrained?)" if whole else "weights changed"
    message = f"{head}: {len(moved)} of {layers} layers"
    if numbers:
        most = ", ".join(f"{one.label} by {about(one.distance or 0.0)}" for one in numbers[:_SHOWN])
        message += f", by {about(median(far))} of their norm in the middle, most {most}"
    return Difference(Field.WEIGHTS, verdict, message, "", "", "", ("weights",))


def _elsewhere(old: Lock, new: Lock, groups: Sequence[Group], tolerances: Tolerances) -> Difference:
    """Constants changed that belong to no layer: not those of a node in a segment, or too few to be weights."""
    found = [pair for group in groups if (pair := group.pair) and pair[0].segment.weights != pair[1].segment.weights]
    verdict = tolerances.weights(math.inf)
    if not found:
        message = "constants changed that belong to no layer: defaults of inputs, or what no node reads"
        return Difference(Field.WEIGHTS, verdict, message, "", old.weights, new.weights, ("weights",))
    names = ", ".join(f"`{one.name}`" for _, one in found)
    key = ("segments", found[0][0].index, "weights")
    return Difference(Field.WEIGHTS, verdict, f"constants in {names} changed", found[0][1].name, key=key)


def about(number: float) -> str:
    """A number that is an estimate, with one digit: `about 1e-3`, `about 0.3`; what is below resolution as such."""
    if math.isinf(number):
        return "more than can be said"
    if number < 1e-6:
        return "less than 1e-6"
    if number >= 0.1:
        return f"about {number:.1f}" if number < 10 else f"about {number:.0f}"
    mantissa, exponent = f"{number:.0e}".split("e")
    return f"about {mantissa}e{int(exponent)}"
