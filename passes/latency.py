"""What an edit saves in time: the nodes that it takes away against those that it adds, both timed on the target.

Times come from kernels that ran, not from multiply-adds: a layer of half the numbers may well be slower. What an edit
changes is cut out of the model before and after it; the two parts are models of their own, which the target's runtime
fuses and lays out as it does the whole. Parts of equal text and equal shapes are timed once, so thirty equal blocks
cost one timing.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

import numpy as np
import onnx_ir as oir

from burnish.ir.errors import BurnishError, InputError
from burnish.ir.text import structure
from burnish.passes import lossy, sites
from burnish.passes.difference import Change, Side, change
from burnish.passes.integer_ends import without_conversions
from burnish.passes.likeness import Likeness
from burnish.passes.lossy import Edit, LossyPass
from burnish.passes.protocols import Observer
from burnish.passes.reducers import Array, Reducer
from burnish.passes.sites import Site

NOISE = 0.03
"""A difference smaller than this share of the part's time is no difference."""

_SMALL = 4096
"""Elements up to which an inner value of floating point is kept as it was observed; larger ones are drawn."""


@dataclass(frozen=True, eq=False)
class Work:
    """A model and what it is run on: something to be timed."""

    model: oir.Model
    feeds: Mapping[str, np.ndarray] = field(repr=False)


class Timer(Protocol):
    """Times models on the target, in turns."""

    def __call__(self, first: Work, others: Sequence[Work]) -> list[float | str]:
        """Seconds of one run of each, `first` included, without what a call costs by itself; or why it cannot be timed.

        Times that one call of the timer gives can be compared with each other.
        """
        ...


@dataclass(frozen=True)
class Timed:
    """Edits with what they save in seconds.

    Attributes:
        edits: in the order in which they were given.
        parts: by the key of an edit: the seconds of what it takes away, and of what it puts there.
        reasons: by the key of an edit: why it could not be timed.
        together: by the keys of edits: the seconds of conversions that vanish when all of them are made.
    """

    edits: list[Edit]
    parts: dict[str, tuple[float, float]]
    reasons: dict[str, str]
    together: dict[frozenset[str], float] = field(default_factory=dict)


def timed(
    model: oir.Model,
    edits: Sequence[Edit],
    passes: Sequence[LossyPass],
    timer: Timer,
    observer: Observer,
    feeds: Mapping[str, np.ndarray],
    *,
    lower: Callable[[oir.Model], oir.Model] = lambda part: part,
    fused: bool = False,
    on_step: Callable[[int, int], None] = lambda done, all_of_them: None,
) -> Timed:
    """The edits, in their order, with `savings.seconds` and `conversions` filled in where they could be measured.

    A saving within `NOISE` of the time of what is taken away counts as 0. What converts integers that edits beside it
    may read and write as such is timed apart: once without all of these conversions, then with each.

    Args:
        model: what the edits were proposed for; not changed.
        edits: of `passes`; each is looked at alone.
        passes: the passes.
        timer: of the target.
        observer: of `model`; tells the shapes of inner values.
        feeds: the inputs to be timed on, by name: those of the largest sample.
        lower: what is done to a model of its kind before the target runs it; must leave inputs and outputs.
        fused: the target's compiler writes products and what is around them as one: see `difference.change`.
        on_step: called with the number of groups of parts that were timed, and with how many there are.
    """
    reasons: dict[str, str] = {}
    changes: dict[str, Change] = {}
    likeness, like = Likeness(model), dict[str, list[Edit]]()
    for edit in edits:
        for case in _cases(edit):  # what a case does hangs on the numbers that it carries
            like.setdefault(case.key if edit.cases else likeness.of(case), []).append(case)
    for case, *_ in like.values():
        try:
            changes[case.key] = change(model, lossy.apply(model, [case], passes)[0], fused=fused)
        except InputError as error:
            reasons[case.key] = error.cause
    arrays = _Arrays(model, observer, feeds, [name for one in changes.values() for name in one.names()])
    works: dict[str, Work] = {}
    groups: dict[str, dict[str, list[tuple[str, str]]]] = {}
    ends = {case.key: case.unconverted for some in like.values() for case in some}
    for key, one in changes.items():
        names = frozenset(ends[key])
        versions = {"": names} | {name: names - {name} for name, some in ends[key].items() if some}
        try:
            before = _keyed(one.removed, arrays, works)
            keyed = {name: _keyed(one.added, arrays, works, own) for name, own in versions.items()}
        except InputError as error:
            reasons[key] = error.cause
            continue
        for name, after in keyed.items():
            groups.setdefault(before, {}).setdefault(after, []).append((key, name))
    parts: dict[str, tuple[float, float]] = {}
    converted: dict[tuple[str, str], float] = {}
    for number, (before, others) in enumerate(groups.items()):
        on_step(number, len(groups))
        for after, found in _compare(before, list(others), works, timer, lower).items():
            for key, name in others[after]:
                if isinstance(found, str):
                    reasons[key] = found
                elif name:
                    converted[key, name] = found[1]
                else:
                    parts[key] = found
    on_step(len(groups), len(groups))
    for looked_at, *unseen in like.values():
        for other in unseen:
            if looked_at.key in parts:
                parts[other.key] = parts[looked_at.key]
            if looked_at.key in reasons:
                reasons[other.key] = reasons[looked_at.key]
            for name, same in zip(likeness.values(looked_at), likeness.values(other), strict=True):
                if (looked_at.key, name) in converted:
                    converted[other.key, same] = converted[looked_at.key, name]
    parts = {key: one for key, one in parts.items() if key not in reasons}
    conversions = {at: max(seconds - parts[at[0]][1], 0.0) for at, seconds in converted.items() if at[0] in parts}
    for edit in (edit for edit in edits if edit.cases):
        keys = [case.key for case in _cases(edit)]
        for reason in [reasons.pop(key) for key in keys if key in reasons][:1]:
            reasons[edit.key] = reason
        found_parts = [parts.pop(key) for key in keys if key in parts]
        if len(found_parts) == len(keys):
            shares = [share for share, _ in edit.cases]
            first, second = (float(np.dot(shares, side)) for side in zip(*found_parts, strict=True))
            parts[edit.key] = first, second
    filled = [_filled(edit, parts.get(edit.key), conversions) for edit in edits]
    return Timed(filled, parts, reasons, _together(edits, conversions))


def _cases(edit: Edit) -> list[Edit]:
    """An edit as it is in each of its cases, or itself."""
    if not edit.cases:
        return [edit]
    return [
        replace(edit, payload=payload, option=f"{edit.option}, case {number}", cases=())
        for number, (_, payload) in enumerate(edit.cases)
    ]


def faster(found: Timed) -> list[Edit]:
    """Those edits that were measured to save time, alone or since edits beside them do: worth choosing from."""
    quick = {edit.key for edit in found.edits if edit.savings.seconds is not None and edit.savings.seconds > 0}
    quick |= {key for some in found.together if some & quick for key in some}
    return [edit for edit in found.edits if edit.key in quick and edit.savings.seconds is not None]


def _filled(edit: Edit, parts: tuple[float, float] | None, conversions: Mapping[tuple[str, str], float]) -> Edit:
    """The edit with the difference of its parts' seconds; without a number where there are none."""
    if parts is None:
        return replace(edit, savings=replace(edit.savings, seconds=None))
    saving = parts[0] - parts[1]
    saving = 0.0 if abs(saving) < NOISE * max(parts) else saving
    lost = sum(conversions.get((edit.key, name), 0.0) for name in edit.unconverted)
    return replace(edit, savings=replace(edit.savings, seconds=saving, conversions=lost))


def _together(edits: Sequence[Edit], conversions: Mapping[tuple[str, str], float]) -> dict[frozenset[str], float]:
    """The seconds of conversions that vanish, by the keys of an edit and of those beside it that this takes."""
    places = {(edit.spec, edit.site): edit.key for edit in edits}
    found: dict[frozenset[str], float] = {}
    for edit in edits:
        for name, beside in edit.unconverted.items():
            seconds = conversions.get((edit.key, name), 0.0)
            if seconds:
                some = frozenset({edit.key, *(places.get((edit.spec, site), site) for site in beside)})
                found[some] = found.get(some, 0.0) + seconds
    return found


def _compare(
    before: str, others: list[str], works: Mapping[str, Work], timer: Timer, lower: Callable[[oir.Model], oir.Model]
) -> dict[str, tuple[float, float] | str]:
    """The seconds of `before` and of each of `others`, or why they are not known; an empty key is no part."""
    wanted = [key for key in (before, *others) if key]
    found: dict[str, float | str] = {"": 0.0}
    ready: dict[str, Work] = {}
    for key in dict.fromkeys(wanted):
        try:
            ready[key] = replace(works[key], model=lower(works[key].model))
        except BurnishError as error:
            found[key] = error.cause
    if ready:
        first, *rest = ready
        found |= dict(zip(ready, timer(ready[first], [ready[key] for key in rest]), strict=True))
    old = found[before]
    pairs: dict[str, tuple[float, float] | str] = {}
    for key in others:
        new = found[key]
        pairs[key] = old if isinstance(old, str) else new if isinstance(new, str) else (old, new)
    return pairs


def _keyed(
    side: Side | None, arrays: _Arrays, works: dict[str, Work], unconverted: Collection[str] = frozenset()
) -> str:
    """The key of a part and its shapes, by which `works` has it now; empty for no part."""
    if side is None:
        return ""
    feeds = {f"in{index}": arrays.of(name) for index, name in enumerate(side.sources)}
    for value in side.model.graph.inputs:
        array = feeds[str(value.name)]
        if value.type is None and array.dtype.kind not in "OSU":
            value.type = oir.TensorType(oir.DataType.from_numpy(array.dtype))
        if value.shape is None:
            value.shape = oir.Shape([None] * array.ndim)
    model = side.model
    if unconverted:
        model = model.clone()
        sources = dict(zip((str(value.name) for value in model.graph.inputs), side.sources, strict=True))
        feeds = without_conversions(model, feeds, sources, unconverted)
    shapes = ", ".join(f"{array.dtype}{list(array.shape)}" for array in feeds.values())
    key = f"{structure(model)}{shapes}"
    works.setdefault(key, Work(model, feeds))
    return key


class _Arrays:
    """Arrays of the shapes that inner values have on given inputs.

    Integers and what is small are what was observed, since it may be sizes or places; larger arrays of floating point
    are drawn, one for each shape.
    """

    def __init__(
        self, model: oir.Model, observer: Observer, feeds: Mapping[str, np.ndarray], names: Iterable[str]
    ) -> None:
        self._given = dict(feeds)
        self._drawn: dict[tuple[np.dtype, tuple[int, ...]], np.ndarray] = {}
        self._refusals: dict[str, str] = {}
        values = {str(value.name): value for value in (value for node in model.graph for value in node.outputs)}
        wanted: dict[str, Site] = {}
        for name in dict.fromkeys(names):
            if name not in values:
                continue
            why = sites.refusal(model, values[name])
            if why is None:
                wanted[name] = Site(values[name])
            else:
                self._refusals[name] = why
        self._seen = self._observe(observer, wanted) if wanted else {}

    def _observe(self, observer: Observer, wanted: dict[str, Site]) -> dict[str, Reducer]:
        """What the observer sees, or a refusal of everything that it was asked for."""
        from burnish.ir.samples import Sample

        try:
            return observer.observe(wanted, Outline(), [Sample("largest", self._given)])
        except InputError as error:
            self._refusals |= dict.fromkeys(wanted, error.cause)
            return {}

    def of(self, name: str) -> np.ndarray:
        """The array for a value.

        Raises:
            InputError: it cannot be observed.
        """
        if name in self._given:
            return self._given[name]
        if name in self._refusals:
            raise InputError(
                f"it cannot be timed: `{name}`, which it reads, cannot be observed: {self._refusals[name]}"
            )
        found = self._seen.get(name)
        if not isinstance(found, Outline) or found.dtype is None:
            raise InputError(f"it cannot be timed: the model's input `{name}`, which it reads, is not given")
        if found.content is not None:
            return found.content
        key = (found.dtype, found.shape)
        if key not in self._drawn:
            drawn = np.random.default_rng(0).standard_normal(found.shape, np.float32)
            self._drawn[key] = drawn.astype(found.dtype)
        return self._drawn[key]


@dataclass
class Outline(Reducer):
    """The shape and dtype of the last array, and the array itself unless it is large and of floating point."""

    dtype: np.dtype | None = field(default=None, init=False)
    shape: tuple[int, ...] = field(default=(), init=False)
    content: Array | None = field(default=None, init=False)

    def add(self, array: Array, keep: Array | None = None) -> None:
        """Take one array more, whatever counts of it."""
        whole = array.dtype.kind in "iub" or array.size <= _SMALL
        self.dtype, self.shape, self.content = array.dtype, array.shape, array.copy() if whole else None

    def nbytes(self, shape: Sequence[int]) -> int:
        """The bytes that are held, if the array is kept."""
        return 8 * int(np.prod(shape))

    def _join(self, other: Outline) -> None:
        self.dtype, self.shape, self.content = other.dtype, other.shape, other.content
