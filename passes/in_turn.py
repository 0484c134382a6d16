"""Rounding convolutions in turn: each for what the ones before it give once they are rounded, in place of the original.

With x what a convolution reads in the original and z what it reads behind rounded layers, the integers Q are to make
(W x - Q z)² small, so that they make up for what was lost before. That is the error of rounding, by the moment of z,
W' = W + W E[(x - z) zᵀ] E[z zᵀ]⁻¹, and a part that no Q changes (asymmetric reconstruction: Nagel et al. 2020,
arXiv:2004.10568, section 3.5; in closed form, as here, for GPTQ: Li et al. 2025, arXiv:2504.02692).

One layer after the other means a run over the samples for each of them, of the model up to there, twice.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import onnx_ir as oir

from burnish.ir import edit, weights
from burnish.ir.views.convolution import Convolution
from burnish.ir.walk import bodies
from burnish.passes.factors import steadied
from burnish.passes.gram import Gram
from burnish.passes.layers import gram_of, unobservable
from burnish.passes.lossy import Context
from burnish.passes.moments import moments
from burnish.passes.rank import by_group, features_of
from burnish.passes.sites import Site
from burnish.passes.weight_rounding import DAMPING

_DAMPING = DAMPING / 10
"""The share of the mean moment that is added where W' is solved for: less than for rounding loses less in 4 bits."""


@dataclass(frozen=True)
class Both:
    """What the patches of a convolution are, in the original (x) and behind rounded layers (z).

    Attributes:
        moment: of z, float64 [groups, in, in].
        apart: E[(x - z) zᵀ], float64 [groups, in, in].
    """

    moment: np.ndarray
    apart: np.ndarray

    def target(self, weight: np.ndarray) -> np.ndarray:
        """What is to be rounded by the moment in place of a weight, float64 [out, in / groups, *kernel]."""
        groups, size, _ = self.moment.shape
        steady = np.trace(self.moment, axis1=1, axis2=2)[:, None, None] / size
        damped = self.moment + (_DAMPING * steady + np.finfo(np.float64).tiny) * np.eye(size)
        rows = weight.reshape(groups, -1, size)
        moved = np.linalg.solve(damped, (rows @ self.apart).transpose(0, 2, 1)).transpose(0, 2, 1)
        return np.asarray((rows + moved).reshape(weight.shape))


def in_turn(
    model: oir.Model, found: Mapping[str, Convolution], context: Context, limit: int, make: Callable[[], oir.Model]
) -> Iterator[tuple[str, Both | np.ndarray | str]]:
    """What each convolution reads, one after the other, or why that cannot be told.

    Args:
        model: the original; not changed.
        found: its convolutions by name, in the order of the graph; none is transposed.
        context: samples, and what observes.
        limit: bytes of statistics, and of activations, that are held at once.
        make: a copy of the model whose layers are rounded as far as they are known, with the nodes' names; called for
            each convolution, after the caller has taken what came before.

    Returns:
        Names with both patches; with the moment in the original alone, as `moments` gives it, where `limit` is too
        small for both; or with the reason in plain words.
    """
    for name, layer in found.items():
        gram, reason = gram_of(layer), unobservable(model, layer)
        if reason is not None:
            yield name, f"what it reads cannot be observed: {reason}"
            continue
        masked = context.keeps(model, {name: (layer.input, 1)})[name] is not None
        needed = _needed(layer.input)
        if masked or needed is None or gram.nbytes((1, 2 * layer.in_channels, 1)) > limit:
            yield from moments(model, {name: [layer]}, context, limit)
            continue
        joint, value = _beside(make(), model, layer, needed)
        observer = context.observe(joint)
        seen = observer.observe({name: Site(value)}, {name: gram}, context.samples, limit=limit)[name]
        observer.close()
        assert isinstance(seen, Gram)
        yield name, _both(seen, features_of(layer))


def _both(gram: Gram, size: int) -> Both | str:
    if not gram.rows:
        return "no row was seen: the samples have none"
    whole = by_group(gram.matrix / gram.rows, 2 * size)
    if not np.isfinite(whole).all():
        return "its input holds NaN, infinity, or numbers too large to be squared"
    own, mixed = whole[:, size:, size:], whole[:, :size, size:]
    moment = steadied(own, gram.rows)
    known = 1.0 if moment is own else 10 * gram.rows / (size + 10 * gram.rows)
    return Both(moment, known * (mixed - own))


def _beside(
    rounded: oir.Model, model: oir.Model, layer: Convolution, needed: Collection[oir.Node]
) -> tuple[oir.Model, oir.Value]:
    """A model with what a convolution reads in the original and in `rounded`, group by group along the channels.

    Args:
        rounded: is changed.
        model: the original.
        layer: the convolution.
        needed: the nodes that compute what it reads.
    """
    (node,) = (node for node in rounded.graph if node.name == layer.node.name)
    values = dict(zip(model.graph.inputs, rounded.graph.inputs, strict=True))
    copies = []
    for one in (one for one in model.graph if one in needed):
        for value in one.inputs:
            if value is not None and value not in values and weights.is_constant(value) and value.producer() is None:
                values[value] = edit.add_constant(rounded, f"{value.name}_exact", np.asarray(weights.constant(value)))
        copies.append(edit.copied(one, values))
        for old, new in zip(one.outputs, copies[-1].outputs, strict=True):
            values[old] = new
            if old.name:
                new.name = edit.unique_name(rounded, f"{old.name}_exact")
    place = node.inputs[0]
    assert place is not None
    inputs = [values[layer.input], place]
    added = [*copies, edit.make("Concat", inputs, {"axis": 1}, like=node)]
    if layer.groups > 1:
        order = np.arange(2 * layer.in_channels).reshape(2, layer.groups, -1).transpose(1, 0, 2).reshape(-1)
        index = edit.add_constant(rounded, "channels_by_group", order)
        added.append(edit.make("Gather", [added[-1].outputs[0], index], {"axis": 1}, like=node))
    value = added[-1].outputs[0]
    value.name, value.type = edit.unique_name(rounded, "both"), layer.input.type
    edit.insert_before(node, added)
    rounded.graph.outputs[:] = [value]
    edit.remove_unused(reversed(list(rounded.graph)))
    return rounded, value


def _needed(value: oir.Value) -> set[oir.Node] | None:
    """The nodes that a value is computed by; None where one of them has branches."""
    found: set[oir.Node] = set()
    waiting = [value]
    while waiting:
        node = waiting.pop().producer()
        if node is None or node in found:
            continue
        if bodies(node):
            return None
        found.add(node)
        waiting += [one for one in node.inputs if one is not None]
    return found
