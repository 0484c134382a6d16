"""Where two models differ: the nodes that an edit takes away, and those that it puts there."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import onnx_ir as oir

from burnish.ir import match
from burnish.ir.errors import InputError
from burnish.ir.part import part
from burnish.ir.text import type_text
from burnish.ir.views.affine import LAYOUT, PICKS
from burnish.ir.walk import bodies, is_op
from burnish.ir.weights import tensor_of

_CONVOLUTIONS = ("Conv", "ConvTranspose")
_FAR = 4
"""Nodes between two convolutions that are next to each other, at most."""

_PRODUCTS = ("MatMul", "Gemm", "Einsum", "Attention", *_CONVOLUTIONS)
_REACH = 6
"""Nodes that a compiler writes into one loop with a product, behind it, at most."""

_SIZES = 64
"""Elements of the largest constant of integers whose numbers are compared."""


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


def change(before: oir.Model, after: oir.Model, *, fused: bool = False) -> Change:
    """The nodes in which two models differ, in operator, attributes, or the kind and shape of a weight.

    A node that only reads from elsewhere, or has other numbers in weights of the same shapes, takes the same time.
    Where convolutions are gone or new, the kept ones next to them are on both sides: runtimes keep tensors between
    convolutions in a layout of their own, and what is cut out alone would pay for the change of layout. A kept node is
    on both sides, too, where it stands between new ones only: runtimes may take it together with them. So are the
    layers right behind a new BatchNormalization, which exact passes put into them.

    Args:
        before: a model.
        after: an edited copy of it, in which what was kept has its name.
        fused: kept nodes between the changed ones and the next products are on both sides, too, and before these the
            product itself: for compilers that write a product and what follows it as one loop.

    Raises:
        InputError: what was added reads something that the model before had not.
    """
    known = {_name(node): node for node in before.graph}
    pairs = {node: known.get(_name(node)) for node in after.graph}
    kept = {node: old for node, old in pairs.items() if old is not None and _alike(old, node)}
    same = set(kept.values())
    removed = {node for node in before.graph if node not in same}
    added = {node for node in after.graph if node not in kept}
    for node, old in kept.items():
        above, below = _before(node), _behind(node)
        if above and below and added.issuperset(above) and added.issuperset(below):
            added.add(node)
            removed.add(old)
    near: set[oir.Node] = set()
    if _convolves(removed) != _convolves(added):
        near |= _next_to(removed, same) | {kept[node] for node in _next_to(added, set(kept))}
    if any(is_op(node, "BatchNormalization") for node in added):
        near |= {kept[node] for node in _taking_in(added, set(kept))}
    if fused:
        near |= _up_to_products(removed, same) | {kept[node] for node in _up_to_products(added, set(kept))}
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


def _taking_in(nodes: set[oir.Node], others: set[oir.Node]) -> set[oir.Node]:
    """The products that read what `nodes` compute, among `others`, with what moves it there and the Adds of biases."""
    found: set[oir.Node] = set()
    pending = list(nodes)
    while pending:
        node = pending.pop()
        product = is_op(node, *_PRODUCTS)
        for one in _behind(node):
            bias = product and is_op(one, "Add") and any(tensor_of(value) is not None for value in one.inputs)
            moves = not product and is_op(one, *_PRODUCTS, *LAYOUT, *PICKS)
            if one in others - found and (bias or moves):
                found.add(one)
                if not bias:
                    pending.append(one)
    return found


def _up_to_products(nodes: set[oir.Node], others: set[oir.Node]) -> set[oir.Node]:
    """The nodes before and behind `nodes`, among `others`, up to the products before them and not those behind."""
    found: set[oir.Node] = set()
    for step in (_before, _behind):
        reached = set(nodes)
        for _ in range(_REACH):
            passed = (node for node in reached if node in nodes or not is_op(node, *_PRODUCTS))
            reached = {one for node in passed for one in step(node) if one in others and not bodies(one)} - found
            if step is _behind:
                reached = {one for one in reached if not is_op(one, *_PRODUCTS)}
            found |= reached
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
