"""Which edits of a model do the same to equal surroundings, so that it is enough to look at one of them."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import onnx_ir as oir

from burnish.ir import match, weights
from burnish.ir.part import part
from burnish.ir.text import structure, type_text
from burnish.passes.lossy import Edit

REACH = 8
"""Nodes before and behind an edit that count as its surroundings: more than a change of it ever takes in."""


_FEW = 8
"""Elements up to which a constant says what is to be done, as axes and the ends of a Clip do, and counts as that."""


class Likeness:
    """Tells what edits of one model do and where, as text.

    Args:
        model: what the edits were proposed for; not changed.
    """

    def __init__(self, model: oir.Model) -> None:
        self._model = model
        self._nodes = {str(node.name): node for node in model.graph}
        self._known: dict[frozenset[str], tuple[str, dict[str, int]]] = {}

    def of(self, edit: Edit) -> str:
        """A text that is the same for edits that differ in nothing but their place and the numbers in weights,
        small ones aside.

        It is the edit's own where that cannot be told: of one that claims what is no node of the main graph.
        """
        if not edit.claims or not self._nodes.keys() >= edit.claims:
            return edit.key
        if edit.claims not in self._known:
            self._known[edit.claims] = self._surroundings(edit.claims)
        around, places = self._known[edit.claims]
        if not places.keys() >= {*edit.anchors, *edit.unconverted}:
            return edit.key
        ends = sorted((places[name], bool(beside)) for name, beside in edit.unconverted.items())
        carried = sorted(f"{array.dtype}{array.shape}" for array in edit.payload.values())
        anchors = [places[name] for name in edit.anchors]
        return "\n".join(map(str, (edit.spec, edit.option, anchors, ends, carried, around)))

    def values(self, edit: Edit) -> list[str]:
        """The names of `Edit.unconverted`, in an order that is the same for edits of which `of` says the same."""
        _, places = self._known.get(edit.claims, ("", {}))
        return sorted(edit.unconverted, key=lambda name: (places.get(name, -1), name))

    def _surroundings(self, claims: frozenset[str]) -> tuple[str, dict[str, int]]:
        """The nodes around those of these names as text, and the places of nodes and values in it."""
        claimed = {self._nodes[name] for name in claims}
        read = {value for node in claimed for value in node.inputs if value is not None}
        beside = {one for value in read for one in match.consumers(value)}
        region = {node for node in claimed | beside if node.graph is self._model.graph}
        region |= _within(claimed, _above) | _within(claimed, _below)
        ordered = [node for node in self._model.graph if node in region]
        values = [value for node in ordered for value in (*node.inputs, *node.outputs) if value is not None]
        places: dict[str, int] = {}
        for name in (*(str(node.name) for node in ordered), *(str(value.name) for value in values)):
            places.setdefault(name, len(places))
        cut = part(self._model, region)
        for kind, some in (("in", cut.graph.inputs), ("out", cut.graph.outputs)):
            for index, value in enumerate(some):
                value.name = f"{kind}{index}"
        types = [(type_text(value), value.is_graph_output(), _number(value)) for value in values]
        return f"{sorted(places[name] for name in claims)} {types} {structure(cut)}", places


def _number(value: oir.Value) -> object:
    """The numbers of a small constant; None of any other value."""
    array = weights.constant(value, largest=_FEW)
    return None if array is None else array.tolist()


def _within(nodes: set[oir.Node], step: Callable[[oir.Node], Iterable[oir.Node]]) -> set[oir.Node]:
    """What is reached from nodes in so many steps."""
    found, last = set(nodes), set(nodes)
    for _ in range(REACH):
        last = {one for node in last for one in step(node) if one.graph is node.graph} - found
        found |= last
    return found


def _above(node: oir.Node) -> Iterable[oir.Node]:
    return (above for value in node.inputs if value is not None and (above := value.producer()) is not None)


def _below(node: oir.Node) -> Iterable[oir.Node]:
    return (one for value in node.outputs for one in match.consumers(value))
