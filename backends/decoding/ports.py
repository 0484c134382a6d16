"""What a decoder takes and gives: token ids, masks, positions, and caches; found by data flow, never by names."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np
import onnx_ir as oir

from burnish.ir import match
from burnish.ir.errors import InputError
from burnish.ir.inference import Inference
from burnish.ir.views.attention_layer import AttentionLayer, attention_layers
from burnish.ir.views.cache import Port
from burnish.ir.views.state import states
from burnish.ir.walk import is_op, walk
from burnish.ir.weights import tensor_of
from burnish.passes import gates, kv_budget

_GROUPED = "GroupQueryAttention"
_MICROSOFT = "com.microsoft"
NO_CACHE = "add caches with `burnish optimize --passes add-kv-cache`, or export the model with past keys and values"


class Meaning(Protocol):
    """What an input of the model means, as `burnish.frontends.roles` reads it."""

    @property
    def kind(self) -> str: ...
    @property
    def rows(self) -> int | None: ...
    @property
    def kept(self) -> int: ...
    @property
    def additive(self) -> bool: ...


@dataclass(frozen=True)
class CachePort:
    """One tensor that is kept between two calls.

    Attributes:
        past, present: names of the input and the output.
        shape: sizes of `past`; None for the batch and for what grows.
        dtype: of both.
        batch, time: the axes of the rows and of the tokens.
        in_place: the operator may write `present` over `past`, in a buffer longer than what is used of it.
    """

    past: str
    present: str
    shape: tuple[int | None, ...]
    dtype: np.dtype[np.generic]
    batch: int
    time: int
    in_place: bool

    def sizes(self, rows: int, length: int) -> tuple[int, ...]:
        """The shape for so many rows and tokens."""
        found = [0 if size is None else size for size in self.shape]
        found[self.batch], found[self.time] = rows, length
        return tuple(found)


@dataclass(frozen=True)
class InputPort:
    """One input that says which tokens these are.

    Attributes:
        name: of the input.
        kind: "ids", "mask", "positions", "slots" (positions that all rows share), "lengths" (of each row, new tokens
            included), "ends" (one less), or "total" (the longest row).
        dtype: of the array.
        shape: sizes; None where they change.
        kept: of a mask, the number that lets a token through.
        additive: whether a mask is added to the scores.
    """

    name: str
    kind: str
    dtype: np.dtype[np.generic]
    shape: tuple[int | None, ...]
    kept: int = 1
    additive: bool = False


@dataclass(frozen=True)
class Ports:
    """All that a decoder takes and gives.

    Attributes:
        inputs: what is made of the tokens at each call.
        caches: what is kept, in the order of the inputs.
        logits: the output with the scores of the next token, [batch, new, vocabulary].
        vocabulary: ids are smaller than this; None when nothing bounds them.
        limit: positions are smaller than this; None when nothing bounds them.
        rows: the only size of a batch that the model takes; None when it takes any.
        last_only: the model says that it scores the last token only.
        packing: where the tokens of a row lie in a cache that is longer than the row: at its "end", or at its "start"
            (com.microsoft GroupQueryAttention, which is silently wrong for rows with padding before them), or
            "" where rows of different lengths cannot be mixed.
        decides: the first tokens of a row decide what is computed of all, so that they have to be given at once.
    """

    inputs: tuple[InputPort, ...]
    caches: tuple[CachePort, ...]
    logits: str
    vocabulary: int | None
    limit: int | None
    rows: int | None
    last_only: bool
    packing: Literal["end", "start", ""]
    decides: bool = False


def read_ports(model: oir.Model, meanings: Mapping[str, Meaning]) -> Ports:
    """The ports of a decoder.

    Args:
        model: only read.
        meanings: what each required input means, by name.

    Raises:
        InputError: the model is no decoder with caches, with the reason.
    """
    facts = Inference(model)
    layers = [one for one in attention_layers(model, facts) if isinstance(one, AttentionLayer)]
    caches = tuple(_caches(model, meanings, layers, facts))
    if not caches:
        raise InputError("the model has no caches: it takes no past keys and values", hint=NO_CACHE)
    budget = kv_budget.read(model)
    taken = {one.past for one in caches} | ({budget.hidden} if budget is not None else set())
    given = [value for value in model.graph.inputs if value.const_value is None and value.name not in taken]
    inputs = tuple(_input(value, meanings[str(value.name)]) for value in given)
    ids = [one for one in inputs if one.kind == "ids"]
    if len(ids) != 1:
        named = ", ".join(f"`{one.name}`" for one in ids) or "none"
        raise InputError(f"a decoder has one input of token ids, this model has {len(ids)} ({named})")
    batches = {one.shape[0] for one in ids} | {_fixed(model, one.past, one.batch) for one in caches}
    rows = next((size for size in batches if size is not None), None)
    logits, scored = _logits(model, {one.present for one in caches}, facts)
    limits = [meanings[one.name].rows for one in inputs if one.kind == "positions"] + [_table(model)]
    known = [limit for limit in limits if limit is not None]
    limit = min(known, default=None)
    packing = _packing({layer.spelling for layer in layers}, bool(_grouped(model)), {one.kind for one in inputs})
    if budget is not None and not packing:
        raise InputError("its caches have budgets, which needs an input with a mask and attention that reads it")
    last_only = scored == 1 and ids[0].shape[1] != 1
    words = meanings[ids[0].name].rows
    return Ports(inputs, caches, logits, words, limit, rows, last_only, packing, gates.decides(model))


def _caches(
    model: oir.Model, meanings: Mapping[str, Meaning], layers: list[AttentionLayer], facts: Inference
) -> Iterator[CachePort]:
    found: dict[str, CachePort] = {}
    for layer in layers:
        cache = layer.cache
        if cache.form == "update":
            raise InputError(
                "its caches are buffers of full length, which the model writes into at an index",
                place=match.describe(layer.anchor),
                hint="export the model with caches that grow",
            )
        for port in (cache.key, cache.value):
            if cache.kind == "kv" and port is not None and port.past is not None and port.present is not None:
                made = _cache(port, facts)
                found[made.past] = made
    rest = {
        str(value.name): value
        for value in model.graph.inputs
        if value.const_value is None and value.name not in found and _is_state(value, meanings[str(value.name)])
    }
    ports = {name for one in found.values() for name in (one.past, one.present)}
    taken = frozenset(one for one in (*model.graph.inputs, *model.graph.outputs) if one.name in ports)
    for state in states(model, facts, taken) if rest else ():
        name, rank = str(state.past.name), match.rank(state.past) or 1
        axes = {match.attribute(node, "axis", 0) % rank for node in state.nodes if is_op(node, "Concat")}
        turned = any(is_op(node, "Transpose", "Reshape") for node in state.nodes)
        if name in rest and state.kind == "appended" and len(axes) == 1 and not turned:
            del rest[name]
            found[name] = _made(state.past, state.present, 0, axes.pop(), facts)
    if rest:
        name = next(iter(rest))
        raise InputError(
            f"the input `{name}` is a state that no output is found to continue token by token",
            hint="only decoders whose caches grow with each token can be run",
        )
    for layer in layers if found else ():
        if layer.cache.kind not in ("kv", "shared") and not layer.cross:
            cause = "this attention keeps no keys and values, others of the model do"
            raise InputError(cause, place=match.describe(layer.anchor), hint="export every layer with its cache")
    yield from (found[str(value.name)] for value in model.graph.inputs if value.name in found)


def _is_state(value: oir.Value, meaning: Meaning) -> bool:
    """Whether an input may be a cache or another state; caches of integers are read as numbers of no known meaning."""
    return meaning.kind in ("past", "state") or (meaning.kind == "integer" and (match.rank(value) or 0) >= 3)


def _cache(port: Port, facts: Inference) -> CachePort:
    assert port.past is not None and port.present is not None
    axes = port.past_axes
    batch = next((name for name in ("batch", "one") if name in axes), "")  # a batch of one may have no name
    if not batch or "past" not in axes:
        raise InputError(f"the axes of the cache `{port.past.name}` are not understood: {', '.join(axes)}")
    return _made(port.past, port.present, axes.index(batch), axes.index("past"), facts)


def _made(past: oir.Value, present: oir.Value, batch: int, time: int, facts: Inference) -> CachePort:
    shape, after, dtype = past.shape, facts.shape(present), past.dtype
    if shape is None or dtype is None:
        raise InputError(f"the shape and dtype of the cache `{past.name}` are not declared")
    sizes = [size if isinstance(size, int) else None for size in shape]
    sizes[batch] = sizes[time] = None
    for axis, size in enumerate(sizes):
        other = after[axis] if after is not None and len(after) == len(sizes) else size
        if axis not in (batch, time) and (size is None or (isinstance(other, int) and other != size)):
            cause = f"the cache `{past.name}` has {shape}, and what continues it, `{present.name}`, has {present.shape}"
            raise InputError(cause, hint="every size but the batch and the length has to be the same number in both")
    if present.dtype is not None and present.dtype != dtype:
        raise InputError(f"the cache `{past.name}` is {dtype.name}, and `{present.name}` is {present.dtype.name}")
    names = str(past.name), str(present.name)
    return CachePort(*names, tuple(sizes), dtype.numpy(), batch, time, _in_place(past, present))


def _in_place(past: oir.Value, present: oir.Value) -> bool:
    """Whether one grouped attention takes the one and gives the other, and nobody else reads the old one."""
    node = present.producer()
    if node is None or not is_op(node, _GROUPED, domain=_MICROSOFT):
        return False
    uses = list(past.uses())
    place = list(node.outputs).index(present) + 2
    return len(uses) == 1 and uses[0].node is node and uses[0].idx == place


def _input(value: oir.Value, meaning: Meaning) -> InputPort:
    shape = tuple(size if isinstance(size, int) else None for size in value.shape or ())
    kind = meaning.kind
    if kind == "positions" and len(shape) == 1:
        kind = "slots"
    ranks = {"ids": (2,), "positions": (2,), "slots": (1,), "mask": (2, 4), "lengths": (1, 2), "ends": (1, 2)}
    if kind != "total" and len(shape) not in ranks.get(kind, ()):
        raise InputError(
            f"the input `{value.name}` is not understood ({kind}, {len(shape)} axes)",
            hint="a decoder takes ids, a mask, positions, lengths and caches",
        )
    assert value.dtype is not None
    return InputPort(str(value.name), kind, value.dtype.numpy(), shape, meaning.kept, meaning.additive)


def _fixed(model: oir.Model, name: str, axis: int) -> int | None:
    (value,) = [one for one in model.graph.inputs if one.name == name]
    size = value.shape[axis] if value.shape is not None else None
    return size if isinstance(size, int) else None


def _logits(model: oir.Model, presents: set[str], facts: Inference) -> tuple[str, int | None]:
    """The output with the scores, and of how many tokens it has them where that is a number."""
    for value in model.graph.outputs:
        shape = facts.shape(value)
        floats = value.dtype is not None and value.dtype.is_floating_point()
        if value.name not in presents and floats and shape is not None and len(shape) == 3:
            return str(value.name), shape[1] if isinstance(shape[1], int) else None
    raise InputError("no output has scores of the next token, [batch, new, vocabulary]")


def _grouped(model: oir.Model) -> list[oir.Node]:
    return walk(model, _GROUPED, domain=_MICROSOFT)


def _table(model: oir.Model) -> int | None:
    """How many positions the rotary tables of grouped attentions have."""
    tables = [tensor_of(match.input_of(node, 7)) for node in _grouped(model)]
    return min((len(table.numpy()) for table in tables if table is not None), default=None)


def _packing(spellings: set[str], grouped: bool, kinds: set[str]) -> Literal["end", "start", ""]:
    if "slots" in kinds:
        return ""
    if grouped:
        return "" if any(not one.endswith(_GROUPED) for one in spellings) else "start"
    return "end" if "mask" in kinds else ""
