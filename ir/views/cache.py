"""What a model remembers between two calls: the keys and values of an attention, or any other state.

Ports are found by data flow: which input of the model is joined with the keys of a layer, and which output of the model
is the result. Names are reported and never read.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

import onnx_ir as oir

from burnish.ir import match
from burnish.ir.errors import InputError
from burnish.ir.views.heads import Axes
from burnish.ir.views.trail import Climber, Store, Trail
from burnish.ir.walk import bodies, is_op, main_graphs, walk

_MEANING = {"b": "batch", "h": "heads", "g": "heads", "s": "new", "t": "total", "u": "new", "p": "past"} | {
    "d": "size", "e": "size", "w": "batch", "m": "length"
}  # fmt: skip


@dataclass(frozen=True)
class Port:
    """One tensor that a model takes as an input, gives as an output, or both.

    Attributes:
        past: the input of the model; None when nothing is taken.
        present: the output of the model; None when nothing is given.
        past_axes, present_axes: what their axes are, "batch", "heads", "past", "total", "length", "size", "new",
            "packed", or several joined with "*"; empty where there is no tensor.
        index: which of the packed tensors it is, one number for each "packed" axis of the input or else the output.
    """

    past: oir.Value | None
    present: oir.Value | None
    past_axes: tuple[str, ...]
    present_axes: tuple[str, ...]
    index: tuple[int, ...] = ()


@dataclass(frozen=True)
class Cache:
    """The memory of one attention layer.

    Attributes:
        kind: "none"; "kv" (new keys and values join those kept); "kv-output" (they are given, none are taken); "shared"
            (the keys and values are those of an earlier layer, or of an earlier call only); "cross" (those of an
            encoder, which do not grow); "unknown" (they join others, which are not both followed to an input).
        form: "append", "update" (written into a buffer of full length), or "" where neither happens.
        key, value: the ports; None when there are none.
    """

    kind: str = "none"
    form: str = ""
    key: Port | None = None
    value: Port | None = None

    def __bool__(self) -> bool:
        return self.kind != "none"

    @property
    def past(self) -> tuple[oir.Value, ...]:
        """The inputs of the model it is taken from, each once."""
        found = [port.past for port in (self.key, self.value) if port is not None and port.past is not None]
        return tuple(dict.fromkeys(found))

    @property
    def present(self) -> tuple[oir.Value, ...]:
        """The outputs of the model it is given through, each once."""
        found = [port.present for port in (self.key, self.value) if port is not None and port.present is not None]
        return tuple(dict.fromkeys(found))


def rename_ports(model: oir.Model, names: Mapping[oir.Value, str]) -> None:
    """Give inputs and outputs of the model other names, all at once, so that two layers can change places.

    Nothing else of the model changes. Whoever calls the model has to know of it.

    Args:
        model: changed in place.
        names: the new names of inputs and outputs, such as the `past` and `present` of caches.

    Raises:
        InputError: a value is no input or output of the model, or a name is empty, taken, or given twice; nothing is
            renamed then.
    """
    ports = {*model.graph.inputs, *model.graph.outputs}
    for value in names:
        if value not in ports or value.const_value is not None:
            raise InputError(f"`{value.name}` is no input or output of the model", hint="name the ports of a cache")
    made = [
        value
        for graph in main_graphs(model)
        for value in (*graph.inputs, *graph.initializers.values(), *(out for node in graph for out in node.outputs))
    ]
    wanted = Counter(names.values())
    taken = {value.name for value in made if value not in names}
    for name, count in wanted.items():
        if not name or count > 1 or name in taken:
            cause = f"the name `{name}` is {'given twice' if count > 1 else 'taken'}" if name else "a port needs a name"
            raise InputError(cause, hint="give every input and output a name of its own")
    for value, name in names.items():
        value.name = name


def read_cache(keys: tuple[Climber, Trail], values: tuple[Climber, Trail], cross: bool) -> Cache:
    """The cache of an attention from the trails of its keys and values and those who climbed them."""
    ports = [_port(climber, trail) for climber, trail in (keys, values)]
    key, value = keys[1], values[1]
    stores = [trail.store for trail in (key, value) if trail.store is not None]
    taken = [port is not None and port.past is not None for port in ports]
    if stores and not all(taken):
        return Cache("unknown", stores[0].form, ports[0], ports[1])
    if stores:
        return Cache("kv", stores[0].form, ports[0], ports[1])
    if all(port is None for port in ports):
        return Cache()
    if key.linear is None and value.linear is None:
        return Cache("cross" if cross else "shared", "", ports[0], ports[1])
    return Cache("cross" if cross else "kv-output", "", ports[0], ports[1])


def _port(climber: Climber, trail: Trail) -> Port | None:
    past: tuple[oir.Value, Axes] | None = None
    present: tuple[oir.Value, Axes] | None = None
    store = trail.store
    if store is not None:
        past = _source(climber, store)
        present = _result(climber, store.present, store.axes) if store.present is not None else None
    elif trail.linear is None and trail.is_stored(climber.facts.model):
        past = trail.value, trail.axes
    if present is None:
        for value, axes in trail.places:
            if trail.linear is not None and value is trail.linear.output:
                break
            present = present or _result(climber, value, axes)
    if past is None and present is None:
        return None
    letters = "".join(past[1] if past else present[1] if present else ())
    packed = [letter for letter in letters if letter in climber.cuts]
    return Port(
        past[0] if past is not None else None,
        present[0] if present is not None else None,
        _named(past[1]) if past is not None else (),
        _named(present[1]) if present is not None else (),
        tuple(climber.cuts[letter][1] for letter in packed),
    )


def _named(axes: Axes) -> tuple[str, ...]:
    names = ["*".join(_MEANING.get(letter, "packed") for letter in letters) or "one" for letters in axes]
    if names.count("one") == 1 and not any("heads" in name for name in names):
        names[names.index("one")] = "heads"
    return tuple(names)


def _source(climber: Climber, store: Store) -> tuple[oir.Value, Axes] | None:
    """The input of the model that the older keys or values come from, and its axes."""
    shape = climber.facts.shape(store.past)
    if store.past is None or shape is None:
        return None
    letter = "p" if store.form == "append" else "m"
    if len(shape) != len(store.axes):
        return None
    climber.sizes[letter] = shape[store.axes.index("t")]
    axes = tuple(letters.replace("t", letter) for letters in store.axes)
    trail = climber.climb(store.past, axes)
    if not trail.is_stored(climber.facts.model) or trail.scales or trail.turned is not None or trail.norm is not None:
        return None
    return trail.value, trail.axes


def _result(climber: Climber, value: oir.Value, axes: Axes) -> tuple[oir.Value, Axes] | None:
    """The output of the model that `value` or a rearrangement of it is, and its axes."""
    if value.is_graph_output():
        outer = _outside(climber, value)
        if outer is None:
            return None
        return (value, axes) if outer is value else _result(climber, outer, axes)
    for node in match.consumers(value):
        if node.inputs[0] is not value and not is_op(node, "Concat"):
            continue
        out = node.outputs[0]
        shape = climber.facts.shape(out)
        if shape is None:
            continue
        after: Axes | None
        if is_op(node, "Concat"):
            after = _packed(climber, node, value, axes)
        elif is_op(node, "Cast"):
            after = axes
        else:
            after = climber._moved_down(node, axes, shape)
        found = _result(climber, out, after) if after is not None else None
        if found is not None:
            return found
    return None


def _outside(climber: Climber, value: oir.Value) -> oir.Value | None:
    """`value` when it is an output of the model, or the output of the If whose branch gives it; None for a loop's."""
    model = climber.facts.model
    if value.graph is model.graph:
        return value
    for node in walk(model, "If"):
        for body in bodies(node):
            if body is value.graph:
                return node.outputs[list(body.outputs).index(value)]
    return None


def _packed(climber: Climber, node: oir.Node, value: oir.Value, axes: Axes) -> Axes | None:
    """The axes after several tensors were stacked."""
    axis = match.attribute(node, "axis", 0) % len(axes)
    if climber._plain(axes[axis]) or len(node.inputs) < 2:
        return None
    letter = climber.cut(axes[axis], list(node.inputs).index(value), len(node.inputs))
    return (*axes[:axis], letter, *axes[axis + 1 :])
