"""What an edit saves in time: the nodes that it takes away against those that it adds, both timed on the target.

Times come from kernels that ran, not from multiply-adds: a layer of half the numbers may well be slower. What an edit
changes is cut out of the model before and after it; the two parts are models of their own, which the target's runtime
fuses and lays out as it does the whole. Parts of equal text and equal shapes are timed once, so thirty equal blocks
cost one timing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

import numpy as np
import onnx_ir as oir

from burnish.ir import match
from burnish.ir.errors import BurnishError, InputError
from burnish.ir.part import part
from burnish.ir.text import structure, type_text
from burnish.ir.walk import bodies, is_op
from burnish.ir.weights import tensor_of
from burnish.passes import lossy, sites
from burnish.passes.lossy import Edit, LossyPass
from burnish.passes.protocols import Observer
from burnish.passes.reducers import Array, Reducer
from burnish.passes.sites import Site

NOISE = 0.03
"""A difference smaller than this share of the part's time is no difference."""

_CONVOLUTIONS = ("Conv", "ConvTranspose")
_FAR = 4
"""Nodes between two convolutions that are next to each other, at most."""

_SIZES = 64
"""Elements of the largest constant of integers whose numbers are compared."""

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
    """

    edits: list[Edit]
    parts: dict[str, tuple[float, float]]
    reasons: dict[str, str]


def timed(
    model: oir.Model,
    edits: Sequence[Edit],
    passes: Sequence[LossyPass],
    timer: Timer,
    observer: Observer,
    feeds: Mapping[str, np.ndarray],
    *,
    lower: Callable[[oir.Model], oir.Model] = lambda part: part,
    on_step: Callable[[int, int], None] = lambda done, all_of_them: None,
) -> Timed:
    """The edits, in their order, with `savings.seconds` filled in where that could be measured.

    A saving within `NOISE` of the time of what is taken away counts as 0.

    Args:
        model: what the edits were proposed for; not changed.
        edits: of `passes`; each is looked at alone.
        passes: the passes.
        timer: of the target.
        observer: of `model`; tells the shapes of inner values.
        feeds: the inputs to be timed on, by name: those of the largest sample.
        lower: what is done to a model of its kind before the target runs it; must leave inputs and outputs.
        on_step: called with the number of groups of parts that were timed, and with how many there are.
    """
    reasons: dict[str, str] = {}
    changes: dict[str, Change] = {}
    for edit in edits:
        try:
            changes[edit.key] = change(model, lossy.apply(model, [edit], passes)[0])
        except InputError as error:
            reasons[edit.key] = error.cause
    arrays = _Arrays(model, observer, feeds, [name for one in changes.values() for name in one.names()])
    works: dict[str, Work] = {}
    groups: dict[str, dict[str, list[str]]] = {}
    for key, one in changes.items():
        try:
            before, after = (_keyed(side, arrays, works) for side in (one.removed, one.added))
        except InputError as error:
            reasons[key] = error.cause
            continue
        groups.setdefault(before, {}).setdefault(after, []).append(key)
    parts: dict[str, tuple[float, float]] = {}
    for number, (before, others) in enumerate(groups.items()):
        on_step(number, len(groups))
        for after, found in _compare(before, list(others), works, timer, lower).items():
            for key in others[after]:
                if isinstance(found, str):
                    reasons[key] = found
                else:
                    parts[key] = found
    on_step(len(groups), len(groups))
    return Timed([_filled(edit, parts.get(edit.key)) for edit in edits], parts, reasons)


def faster(edits: Iterable[Edit]) -> list[Edit]:
    """Those edits that were measured to save time: the ones worth choosing from when latency is what counts."""
    return [edit for edit in edits if edit.savings.seconds is not None and edit.savings.seconds > 0]


def _filled(edit: Edit, parts: tuple[float, float] | None) -> Edit:
    """The edit with the difference of its parts' seconds; without a number where there are none."""
    saving = None
    if parts is not None:
        saving = parts[0] - parts[1]
        saving = 0.0 if abs(saving) < NOISE * max(parts) else saving
    return replace(edit, savings=replace(edit.savings, seconds=saving))


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


@dataclass(frozen=True)
class Side:
    """What is only in one of two models.

    Attributes:
        model: as a model whose inputs are called in0, in1... in the order of their first use.
        sources: for each of its inputs the name of the value in the model before the edit that comes in there.
    """

    model: oir.Model
    sources: tuple[str, ...]


@dataclass(frozen=True)
class Change:
    """What an edit takes away and what it puts there; None where that is nothing."""

    removed: Side | None
    added: Side | None

    def names(self) -> list[str]:
        """The values of the model before the edit that the two parts take in."""
        return [name for side in (self.removed, self.added) if side is not None for name in side.sources]


def change(before: oir.Model, after: oir.Model) -> Change:
    """The nodes in which two models differ, in operator, attributes, or the kind and shape of a weight.

    A node that only reads from elsewhere, or has other numbers in weights of the same shapes, takes the same time.
    Where convolutions are gone or new, the kept ones next to them are on both sides: runtimes keep tensors between
    convolutions in a layout of their own, and what is cut out alone would pay for the change of layout.

    Args:
        before: a model.
        after: an edited copy of it, in which what was kept has its name.

    Raises:
        InputError: what was added reads something that the model before had not.
    """
    known = {_name(node): node for node in before.graph}
    pairs = {node: known.get(_name(node)) for node in after.graph}
    kept = {node: old for node, old in pairs.items() if old is not None and _alike(old, node)}
    same = set(kept.values())
    removed = {node for node in before.graph if node not in same}
    added = {node for node in after.graph if node not in kept}
    if _convolves(removed) != _convolves(added):
        near = _next_to(removed, same) | {kept[node] for node in _next_to(added, set(kept))}
        removed |= near
        added |= {node for node, old in kept.items() if old in near}
    names = {str(value.name): str(value.name) for value in before.graph.inputs}
    for node, old in kept.items():
        names |= {str(new.name): str(was.name) for new, was in zip(node.outputs, old.outputs, strict=True)}
    own = {str(value.name): str(value.name) for value in (*before.graph.inputs, *_made(before))}
    return Change(_side(before, removed, own), _side(after, added, names))


def _side(model: oir.Model, nodes: set[oir.Node], names: Mapping[str, str]) -> Side | None:
    if not nodes:
        return None
    found = part(model, nodes)
    order = {value: None for node in found.graph.all_nodes() for value in node.inputs if value is not None}
    position = {value: index for index, value in enumerate(order)}
    inputs = sorted(found.graph.inputs, key=lambda value: position.get(value, len(position)))
    unknown = [value.name for value in inputs if value.name not in names]
    if unknown:
        raise InputError(f"it cannot be timed: `{unknown[0]}`, which it reads, is not in the model before")
    sources = tuple(names[str(value.name)] for value in inputs)
    found.graph.inputs[:] = inputs
    for kind, values in (("in", inputs), ("out", found.graph.outputs)):
        for index, value in enumerate(values):
            value.name = f"{kind}{index}"
    return Side(found, sources)


def _convolves(nodes: Iterable[oir.Node]) -> bool:
    return any(is_op(node, *_CONVOLUTIONS) for node in nodes)


def _next_to(nodes: set[oir.Node], others: set[oir.Node]) -> set[oir.Node]:
    """The nearest convolutions before and behind `nodes`, among `others`, with the nodes of one input on the way."""
    found: set[oir.Node] = set()
    for step in (_before, _behind):
        pending: list[tuple[oir.Node, tuple[oir.Node, ...]]] = [(node, ()) for node in nodes]
        while pending:
            node, way = pending.pop()
            for one in step(node):
                if one not in others or len(way) == _FAR:
                    continue
                if is_op(one, *_CONVOLUTIONS):
                    found |= {one, *way}
                elif len(_before(one)) == 1 and not bodies(one):
                    pending.append((one, (*way, one)))
    return found


def _before(node: oir.Node) -> list[oir.Node]:
    return [above for value in node.inputs if value is not None and (above := value.producer()) is not None]


def _behind(node: oir.Node) -> list[oir.Node]:
    return [one for value in node.outputs for one in match.consumers(value)]


def _made(model: oir.Model) -> Iterable[oir.Value]:
    return (value for node in model.graph for value in node.outputs)


def _name(node: oir.Node) -> str:
    """What a copy of a node is found by: its name, or that of its first result."""
    return node.name or next((str(out.name) for out in node.outputs), "")


def _alike(old: oir.Node, new: oir.Node) -> bool:
    """Whether two nodes take the same time, as far as can be told without running them."""
    same = (
        old.op_identifier() == new.op_identifier()
        and len(old.inputs) == len(new.inputs)
        and len(old.outputs) == len(new.outputs)
        and old.attributes.keys() == new.attributes.keys()
    )
    if not same:
        return False
    if not all(_same_read(was, now) for was, now in zip(old.inputs, new.inputs, strict=True)):
        return False
    if not all(_same_attribute(one, new.attributes[name]) for name, one in old.attributes.items()):
        return False
    inner = [list(bodies(node)) for node in (old, new)]
    if [len(body) for body in inner[0]] != [len(body) for body in inner[1]]:
        return False
    if not all(all(map(_alike, was, now)) for was, now in zip(*inner, strict=True)):
        return False
    types = [(type_text(was), type_text(now)) for was, now in zip(old.outputs, new.outputs, strict=True)]
    return all(was == now or "?" in was + now or "..." in was + now for was, now in types)


def _same_read(old: oir.Value | None, new: oir.Value | None) -> bool:
    """Whether two inputs are both absent, both computed, or constants of the same kind."""
    if old is None or new is None:
        return old is new
    was, now = tensor_of(old), tensor_of(new)
    return was is now or (was is not None and now is not None and _kind(was) == _kind(now))


def _same_attribute(old: oir.Attr, new: oir.Attr) -> bool:
    """Whether two attributes are the same; the nodes of graphs are compared elsewhere."""
    if old.type != new.type or old.ref_attr_name != new.ref_attr_name:
        return False
    if old.is_ref() or old.value is new.value or old.type in (oir.AttributeType.GRAPH, oir.AttributeType.GRAPHS):
        return True
    tensors = old.type == oir.AttributeType.TENSOR
    return bool(_kind(old.value) == _kind(new.value)) if tensors else str(old.value) == str(new.value)


def _kind(tensor: oir.TensorProtocol) -> tuple[object, ...]:
    """What of a constant can matter for time: its numbers only where they may be sizes."""
    sizes = tensor.numpy().tolist() if tensor.dtype.is_integer() and tensor.size <= _SIZES else None
    return tensor.dtype, tuple(tensor.shape), sizes


def _keyed(side: Side | None, arrays: _Arrays, works: dict[str, Work]) -> str:
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
    shapes = ", ".join(f"{array.dtype}{list(array.shape)}" for array in feeds.values())
    key = f"{structure(side.model)}{shapes}"
    works.setdefault(key, Work(side.model, feeds))
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
        values = {str(value.name): value for value in _made(model)}
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
