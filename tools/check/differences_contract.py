"""Differences of the contract as sentences: inputs and outputs, their names, order, dtypes and dimensions; opsets."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from burnish.tools.check.difference import Difference, Field, Verdict
from burnish.tools.check.lock import Lock
from burnish.tools.check.tolerances import Tolerances

_TYPE = re.compile(r"([^\[\]]+)\[([^\[\]]*)\]")
_UNKNOWN = "..."


@dataclass(frozen=True)
class Ports:
    """The inputs or the outputs of two models.

    Attributes:
        pairs: the new name by the old one, of all that are still there.
        gone, come: names without a partner.
        moved: whether the common ones stand in another order.
    """

    pairs: Mapping[str, str]
    gone: tuple[str, ...]
    come: tuple[str, ...]
    moved: bool

    @property
    def renamed(self) -> dict[str, str]:
        """The old name of each that has another one now."""
        return {new: old for old, new in self.pairs.items() if old != new}


def ports(old: Mapping[str, str], new: Mapping[str, str]) -> Ports:
    """Pair inputs or outputs by name; one that is not there has become what stands at its place with its type."""
    pairs = {name: name for name in old if name in new}
    gone, come = [name for name in old if name not in new], [name for name in new if name not in old]
    places = list(old), list(new)
    for name in list(gone):
        twin = next((one for one in come if _takes_place(name, one, old, new, places)), None)
        if twin is not None:
            pairs[name] = twin
            gone.remove(name)
            come.remove(twin)
    order = [places[1].index(pairs[name]) for name in places[0] if name in pairs]
    return Ports(pairs, tuple(gone), tuple(come), order != sorted(order))


def _takes_place(
    one: str, other: str, old: Mapping[str, str], new: Mapping[str, str], places: tuple[list[str], list[str]]
) -> bool:
    if len(old) != len(new) or places[0].index(one) != places[1].index(other):
        return False
    (kind, dims), (same, others) = _parts(old[one]), _parts(new[other])
    return kind == same and len(dims) == len(others)


def contract(old: Lock, new: Lock, tolerances: Tolerances) -> list[Difference]:
    """The differences of inputs, outputs and opsets; dimensions of outputs that follow those of inputs are notes."""
    found = list(_ports(old, new, Field.INPUTS, tolerances))
    ends = {one.message.partition(": ")[2] for one in found if ": dimension " in one.message}
    found += [
        replace(one, verdict=Verdict.NOTE) if one.message.partition(": ")[2] in ends else one
        for one in _ports(old, new, Field.OUTPUTS, tolerances)
    ]
    return [*_once(found), *_opsets(old, new, tolerances)]


def _once(found: Sequence[Difference]) -> Iterator[Difference]:
    """The same change of a dimension in several inputs is one difference."""
    alike: dict[object, list[Difference]] = {}
    for one in found:
        end = one.message.partition(": dimension ")[2]
        alike.setdefault((one.field, one.verdict, end) if end else one, []).append(one)
    for same in alike.values():
        names = [f"`{one.place}`" for one in same]
        end = same[0].message.partition(": ")[2]
        message = f"{same[0].field.value} {', '.join(names[:-1])} and {names[-1]}: {end}"
        yield same[0] if len(same) == 1 else replace(same[0], message=message)


def _ports(old: Lock, new: Lock, what: Field, tolerances: Tolerances) -> Iterator[Difference]:
    before, after = (old.inputs, new.inputs) if what is Field.INPUTS else (old.outputs, new.outputs)
    verdict, one = tolerances.verdict(what), what.value.removesuffix("s")
    found = ports(before, after)

    def difference(message: str, name: str, was: str = "", now: str = "", *key: str) -> Difference:
        return Difference(what, verdict, message, name, was, now, (what.value, *key))

    for name in found.gone:
        yield difference(f"{one} `{name}` is gone", name, before[name], "", name)
    for name in found.come:
        yield difference(f"{one} `{name}` is new: {after[name]}", name, "", after[name])
    for name, now in found.pairs.items():
        if name != now:
            yield difference(f"{one} `{name}` is now called `{now}`", now, name, now, name)
        for message in _types(before[name], after[now]):
            yield difference(f"{one} `{now}`{message}", now, before[name], after[now], name)
    if found.moved:
        names = ", ".join(f"`{name}`" for name in after)
        yield difference(f"the {what} stand in another order: {names}", "", ", ".join(before), ", ".join(after))


def _types(old: str, new: str) -> Iterator[str]:
    """How a type differs, each as the end of a sentence about what has it."""
    if old == new:
        return
    (kind, dims), (other, others) = _parts(old), _parts(new)
    if kind != other:
        yield f" is now {other}, was {kind}"
    if dims == others:
        return
    if _UNKNOWN in (*dims, *others) or len(dims) != len(others):
        unknown = dims == (_UNKNOWN,) or others == (_UNKNOWN,)
        ranks = ["an unknown number of dimensions" if side == (_UNKNOWN,) else f"[{','.join(side)}]"
                 for side in (dims, others)]  # fmt: skip
        yield (
            f" is now {ranks[1]}, was {ranks[0]}"
            if unknown
            else (f" has {len(others)} dimensions now, had {len(dims)}: {ranks[1]}, was {ranks[0]}")
        )
        return
    for axis, (was, now) in enumerate(zip(dims, others, strict=True)):
        if was != now:
            yield _dimension(axis, was, now)


def _dimension(axis: int, was: str, now: str) -> str:
    place = f"dimension `{was}`" if not was.isdecimal() and was != "?" else f"dimension {axis}"
    if was.isdecimal() and now.isdecimal():
        return f": {place} is now {now}, was {was}"
    if now.isdecimal():
        return f": {place} is now fixed at {now}"
    if was.isdecimal():
        return f": {place} is now dynamic{'' if now == '?' else f' (`{now}`)'}, was fixed at {was}"
    if "?" in (was, now):
        return f": {place} has no name now" if now == "?" else f": {place} is now called `{now}`"
    return f": {place} is now called `{now}`"


def _parts(kind: str) -> tuple[str, tuple[str, ...]]:
    """Dtype, wrappers included, and dimensions of a type's text."""
    found = _TYPE.search(kind)
    if found is None:
        return kind, ()
    rest = kind[: found.start()] + found[1] + kind[found.end() :]
    return rest, tuple(filter(None, found[2].split(",")))


def changed_dimensions(old: Lock, new: Lock) -> bool:
    """Whether dimensions of inputs became fixed, dynamic or others; a new name alone does not count."""
    found = ports(old.inputs, new.inputs)
    sides = ((_parts(old.inputs[name])[1], _parts(new.inputs[now])[1]) for name, now in found.pairs.items())
    return any([one.isdecimal() and one for one in was] != [one.isdecimal() and one for one in now]
               for was, now in sides)  # fmt: skip


def retyped(old: Lock, new: Lock) -> frozenset[str]:
    """The inputs, by their old names, that have another dtype now."""
    found = ports(old.inputs, new.inputs)
    return frozenset(
        name for name, now in found.pairs.items() if _parts(old.inputs[name])[0] != _parts(new.inputs[now])[0]
    )


def _opsets(old: Lock, new: Lock, tolerances: Tolerances) -> Iterator[Difference]:
    for domain in sorted(old.opsets.keys() | new.opsets.keys()):
        was, now = old.opsets.get(domain), new.opsets.get(domain)
        if was == now:
            continue
        name = "opset" if domain == "ai.onnx" else f"opset of `{domain}`"
        message = (
            f"{name} {was} is gone"
            if now is None
            else f"{name} {now} is new"
            if was is None
            else f"{name} {was} -> {now}"
        )
        verdict: Verdict = tolerances.opsets(was or 0, now or 0)
        yield Difference(Field.OPSETS, verdict, message, "", str(was or ""), str(now or ""), ("opsets", domain))
