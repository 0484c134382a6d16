"""Sizes for the dynamic dimensions of a model's inputs: equal where the model says they are equal.

A dimension is a number, a named symbol, an expression of symbols (`past + seq`) or unnamed. Symbols are sorted by what
they measure (batch, past, length, height...) through the roles of the inputs they stand in, so that one setting of a
few numbers gives every input its shape.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import onnx_ir as oir

from burnish.frontends.roles import Role

_UNNAMED = frozenset(("", "?", "-1", "None", "unknown"))


@dataclass(frozen=True)
class Setting:
    """The sizes of one sample.

    Attributes:
        batch, length, past: what symbols of these kinds become.
        height, width: of images, in pixels.
        signal: length of a signal, in samples.
        spread: how much longer each further, independently named length is than the one before it.
    """

    batch: int = 1
    length: int = 4
    past: int = 0
    height: int = 32
    width: int = 32
    signal: int = 256
    spread: int = 0


@dataclass
class Axes:
    """What the axes of the inputs measure.

    Attributes:
        inputs: a number, a symbol or an expression for every axis, by input.
        kinds: what each symbol measures: "batch", "past", "total", "height", "width", "signal", "channels" or "length".
        channels: what a symbol of the kind "channels" becomes.
    """

    inputs: dict[str, list[int | str | oir.SymbolicDim]] = field(default_factory=dict)
    kinds: dict[str, str] = field(default_factory=dict)
    channels: int = 3

    def has(self, *kinds: str) -> bool:
        """Whether any symbol measures one of `kinds`."""
        return any(kind in kinds for kind in self.kinds.values())

    def shapes(self, setting: Setting) -> dict[str, tuple[int, ...]]:
        """The shape of every input at `setting`, by name."""
        lengths = [symbol for symbol, kind in self.kinds.items() if kind == "length"]
        sizes = {symbol: self._size(kind, setting) for symbol, kind in self.kinds.items()}
        sizes |= {symbol: setting.length + place * setting.spread for place, symbol in enumerate(lengths)}
        return {name: tuple(_evaluate(dim, sizes) for dim in dims) for name, dims in self.inputs.items()}

    def _size(self, kind: str, setting: Setting) -> int:
        if kind == "channels":
            return self.channels
        return setting.past + setting.length if kind == "total" else int(getattr(setting, kind))


def is_unnamed(dim: int | oir.SymbolicDim) -> bool:
    """Whether nothing is known of a dimension; some exporters write -1 or 0 for that."""
    if isinstance(dim, int):
        return dim <= 0
    return dim.value is None or str(dim.value).strip() in _UNNAMED


def symbol_of(dim: int | oir.SymbolicDim) -> str | None:
    """The name of a dimension, None when it is a number, unnamed or an expression."""
    if isinstance(dim, int) or is_unnamed(dim):
        return None
    return str(dim.value) if free_symbols(dim) == {str(dim.value)} else None


def free_symbols(dim: int | oir.SymbolicDim) -> set[str]:
    """The symbols in a dimension; a name that cannot be read as an expression is one symbol."""
    if isinstance(dim, int) or dim.value is None:
        return set()
    try:
        return set(dim.free_symbols())
    except ValueError:
        return {str(dim.value)}


def axes_of(values: list[oir.Value], roles: Mapping[str, Role]) -> Axes:
    """Sort the dynamic dimensions of `values`, a model's required inputs of known rank, by what they measure."""
    axes = Axes()
    for value in values:
        axes.inputs[str(value.name)] = _named(value, roles[str(value.name)])
    _join(axes, roles)
    channels = [role.channels for role in roles.values() if role.kind == "image" and role.channels]
    axes.channels = channels[0] if channels else 3
    for name, dims in axes.inputs.items():
        for axis, dim in enumerate(dims):
            for symbol in {dim} if isinstance(dim, str) else free_symbols(dim):
                kind = _kind(axis, dims, roles[name]) if isinstance(dim, str) else "length"
                _claim(axes.kinds, symbol, kind)
    _derive_totals(axes, roles)
    return axes


def _named(value: oir.Value, role: Role) -> list[int | str | oir.SymbolicDim]:
    """The dimensions of `value`, unnamed ones named after what they most likely measure."""
    assert value.shape is not None
    dims: list[int | str | oir.SymbolicDim] = []
    recurrent = len(value.shape) == 3 and not is_unnamed(value.shape[0]) and role.kind == "state"
    for axis, dim in enumerate(value.shape):
        if not is_unnamed(dim):
            dims.append(symbol_of(dim) or dim)
        elif axis == (1 if recurrent else 0):
            dims.append("<batch>")
        elif axis == 1 and len(value.shape) == 2 and role.kind in ("ids", "positions", "mask"):
            dims.append("<length>")
        else:
            dims.append(f"<{value.name}.{axis}>")
    return dims


def _join(axes: Axes, roles: Mapping[str, Role]) -> None:
    """Give one symbol to what must be equal: every past's axes, unnamed and named batches, positions and ids."""
    same: dict[str, str] = {}
    pasts = [axes.inputs[name] for name, role in roles.items() if role.kind == "past"]
    for dims in pasts[1:]:
        if len(dims) == len(pasts[0]):
            same |= {
                b: a
                for a, b in zip(pasts[0], dims, strict=True)
                if isinstance(a, str) and isinstance(b, str) and a != b
            }
    first = {role.kind: dims for name, role in reversed(list(roles.items())) if (dims := axes.inputs[name])}
    batches = [d[0] for n, d in axes.inputs.items() if d and isinstance(d[0], str) and roles[n].kind != "past"]
    named = next((b for b in batches if b != "<batch>"), None)
    if named is not None:
        same["<batch>"] = named
    ids, positions = first.get("ids"), first.get("positions")
    if ids and positions and isinstance(ids[-1], str) and isinstance(positions[-1], str) and ids[-1] != positions[-1]:
        same[positions[-1]] = ids[-1]
    for dims in axes.inputs.values():
        dims[:] = [same.get(dim, dim) if isinstance(dim, str) else dim for dim in dims]


def _kind(axis: int, dims: list[int | str | oir.SymbolicDim], role: Role) -> str:
    if role.kind == "past" and axis == role.axis % len(dims):
        return "past"
    if axis == 0 and (len(dims) > 1 or role.kind in ("lengths", "ends")):
        return "batch"
    if role.kind == "image" and axis > 0:
        channel = 1 if isinstance(dims[1], str) or not isinstance(dims[-1], int) else len(dims) - 1
        if axis == channel:
            return "channels"
        return "height" if axis == max(a for a in range(1, len(dims)) if a != channel) - 1 else "width"
    if role.kind == "signal" and axis == len(dims) - 1:
        return "signal"
    return "length"


def _claim(kinds: dict[str, str], symbol: str, kind: str) -> None:
    """Set the kind of a symbol unless a more telling one is known."""
    order = ("past", "height", "width", "signal", "channels", "batch", "length")
    known = kinds.get(symbol)
    if known is None or order.index(kind) < order.index(known):
        kinds[symbol] = kind


def _derive_totals(axes: Axes, roles: Mapping[str, Role]) -> None:
    """A mask's own length, when there is a past, covers the past and the new positions."""
    masks = [axes.inputs[name] for name, role in roles.items() if role.kind == "mask"]
    others = {dim for name, dims in axes.inputs.items() if roles[name].kind != "mask" for dim in dims}
    if not axes.has("past"):
        own = [dims[-1] for dims in masks if isinstance(dims[-1:][0] if dims else 0, str) and dims[-1] not in others]
        ids = [axes.inputs[name][-1] for name, role in roles.items() if role.kind == "ids" and axes.inputs[name]]
        for symbol in own:
            if ids and isinstance(ids[0], str) and axes.kinds.get(str(symbol)) == "length":
                for dims in axes.inputs.values():
                    dims[:] = [ids[0] if dim == symbol else dim for dim in dims]
                axes.kinds.pop(str(symbol), None)
        return
    for dims in masks:
        last = dims[-1] if dims else 0
        if isinstance(last, str) and last not in others and axes.kinds[last] == "length":
            axes.kinds[last] = "total"
        elif last == "<length>" and len(masks) == 1:
            dims[-1] = "<total>"
            axes.kinds["<total>"] = "total"


def _evaluate(dim: int | str | oir.SymbolicDim, sizes: Mapping[str, int]) -> int:
    if isinstance(dim, int):
        return dim
    if isinstance(dim, str):
        return sizes[dim]
    size = dim.evaluate(dict(sizes))
    return size if isinstance(size, int) else 1
