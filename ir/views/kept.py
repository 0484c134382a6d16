"""Queries, keys and values of an attention at the place where another layer could read them as its own.

Of keys and values it is what a cache holds, or would hold: normed, scaled and turned, not yet repeated for several
queries. Of queries it is the place nearest to the linear layer at which they are not packed with keys and values.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import onnx_ir as oir

from burnish.ir.views.heads import Axes, scaled_by
from burnish.ir.views.trail import Climber, Trail
from burnish.ir.views.turned import Turned


@dataclass(frozen=True)
class Kept:
    """Queries, keys or values at that place.

    Attributes:
        value: the tensor; None when an operator has it inside and gives it to nobody.
        axes: its axes in the letters of `burnish.ir.views.heads`; the heads of keys and values are `h`.
        scale: what they are multiplied with before that place.
        turned: their rotary embedding, when it comes before that place.
        inside: an operator that is the whole attention joins new and older ones.
    """

    value: oir.Value | None
    axes: Axes
    scale: float = 1.0
    turned: Turned | None = None
    inside: bool = False


def kept(trail: Trail, climber: Climber) -> Kept:
    """The place of keys or values on their trail; scales on the attention's side of it stay with the attention."""
    store, places = trail.store, [value for value, _ in trail.places]
    if store is None:
        value, axes = _reached(trail, climber, _changed(trail))
        passed = set(places[: places.index(value)]) if value is not None else set()
        scales = [node for node in trail.scales if not passed & set(node.outputs)]
        return Kept(value, _named(axes), _product(scales, climber), trail.turned)
    order = {node: index for index, node in enumerate(trail.nodes)}
    start = order.get(store.node, -1)
    scale = _product([node for node in trail.scales if order[node] > start], climber)
    turned = trail.turned
    if turned is not None and order.get(turned.nodes[0], len(order)) < start:
        turned = None
    return Kept(store.present, _named(store.axes), scale, turned, store.node not in order)


def _product(scales: list[oir.Node], climber: Climber) -> float:
    """What nodes that multiply by a number multiply by together."""
    factors = [scaled_by(node, climber.facts) for node in scales]
    return math.prod(factor[1] for factor in factors if factor is not None)


def kept_queries(trail: Trail, climber: Climber) -> Kept:
    """The place of queries on their trail; without a value where a bias, norm or turn is on the wrong side of it."""
    value, axes = _reached(trail, climber, set())
    places = [one for one, _ in trail.places]
    near = set(places[: places.index(value)]) if value is not None else set()
    biased = {out for bias in trail.biases for out in bias.node.outputs}
    scaled = {out for node in trail.scales for out in node.outputs} & set(places)
    if near & biased or ((_changed(trail) | scaled) - biased) - near:
        return Kept(None, axes)
    return Kept(value, axes)


def _changed(trail: Trail) -> set[oir.Value]:
    """The values on the way whose numbers are not those of what they are made of, nor a multiple of them."""
    found = {out for bias in trail.biases for out in bias.node.outputs}
    found |= {trail.turned.y} if trail.turned is not None else set()
    found |= {trail.norm.norm.output} if trail.norm is not None else set()
    return found & {value for value, _ in trail.places}


def _reached(trail: Trail, climber: Climber, stops: set[oir.Value]) -> tuple[oir.Value | None, Axes]:
    """The place farthest from the attention, not beyond one of `stops`, that is in no packed tensor."""
    found: oir.Value | None = None
    reached: Axes = ()
    for value, axes in trail.places:
        if any(letter in climber.cuts for letters in axes for letter in letters):
            break
        found, reached = value, axes
        if value in stops or (trail.linear is not None and value is trail.linear.output):
            break
    return found, reached


def _named(axes: Axes) -> Axes:
    """Heads as `h`, also where there is one and an axis of size 1 may be that of the heads."""
    named = tuple(letters.replace("g", "h") for letters in axes)
    if named.count("") == 1 and not any("h" in letters for letters in named):
        return tuple(letters or "h" for letters in named)
    return named
