"""Rounding convolutions in turn: each for what the ones before it give once they are rounded, in place of the original.

With x what a convolution reads in the original and z what it reads behind rounded layers, the integers Q are to make
(W x - Q z)² small, so that they make up for what was lost before. That is the error of rounding, by the moment of z,
W' = W + W E[(x - z) zᵀ] E[z zᵀ]⁻¹, and a part that no Q changes (asymmetric reconstruction: Nagel et al. 2020,
arXiv:2004.10568, section 3.5; in closed form, as here, for GPTQ: Li et al. 2025, arXiv:2504.02692).

How much of the move W' - W holds on other samples is found out: it is fitted to each half of the samples, damped more
and more, and judged on the other half. A few pictures have far more positions than they have news of, so no count of
rows tells: fitted to eight digits, a convolution may lose three times as much on others as without any move.

One layer after the other means a run over the samples for each of them, of the model up to there, twice.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Container, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import onnx_ir as oir

from burnish.ir import edit, weights
from burnish.ir.errors import InputError
from burnish.ir.samples import halves
from burnish.ir.views.convolution import Convolution
from burnish.ir.walk import bodies
from burnish.passes.base import Outcome
from burnish.passes.factors import steadied
from burnish.passes.gram import Gram
from burnish.passes.layers import gram_of, unobservable
from burnish.passes.lossy import Context
from burnish.passes.moments import ROUNDING, moments
from burnish.passes.rank import by_group, features_of
from burnish.passes.sites import Site

_DAMPINGS = (1e-3, 1e-2, 1e-1, 1.0, 10.0)
"""Shares of the mean moment that may be added where W' is solved for; the first is taken where there is one sample."""


@dataclass(frozen=True)
class Both:
    """What the patches of a convolution are, in the original (x) and behind rounded layers (z).

    Attributes:
        moment: of z, float64 [groups, in, in].
        apart: E[(x - z) zᵀ], float64 [groups, in, in].
        means: of x and z, float64 [2, groups, in], where both moments are about these.
        damping: the share of the mean moment that is added where W' is solved for; infinity to move nothing.
    """

    moment: np.ndarray
    apart: np.ndarray
    means: np.ndarray | None
    damping: float = _DAMPINGS[0]

    def target(self, weight: np.ndarray) -> np.ndarray:
        """What is to be rounded by the moment in place of a weight, float64 [out, in / groups, *kernel]."""
        rows = weight.reshape(len(self.moment), -1, self.moment.shape[-1])
        return np.asarray((rows + _move(rows, self.moment, self.apart, self.damping)).reshape(weight.shape))

    def shift(self, weight: np.ndarray, rounded: np.ndarray) -> np.ndarray | None:
        """What outputs [out] lose in the mean by a rounded weight; None where the means are part of the moments."""
        if self.means is None:
            return None
        exact, own = (
            np.einsum("goi,gi->go", one.reshape(len(mean), -1, mean.shape[1]), mean)
            for one, mean in zip((weight, rounded), self.means, strict=True)
        )
        return np.asarray((exact - own).reshape(-1))


def in_turn(
    model: oir.Model,
    found: Mapping[str, Convolution],
    context: Context,
    limit: int,
    make: Callable[[], oir.Model],
    outcome: Outcome,
    centred: Container[str] = (),
) -> Iterator[tuple[str, Both | np.ndarray | str]]:
    """What each convolution reads, one after the other, or why that cannot be told.

    Args:
        model: the original; not changed.
        found: its convolutions by name, in the order of the graph; none is transposed.
        context: samples, and what observes.
        limit: bytes of statistics, and of activations, that are held at once.
        make: a copy of the model whose layers are rounded as far as they are known, with the nodes' names; called for
            each convolution, after the caller has taken what came before.
        outcome: takes a note where only the original is looked at, with the reason.
        centred: convolutions whose moments are those about the mean.

    Returns:
        Names with both patches; with the moment in the original alone, as `moments` gives it, where both cannot be seen
        together, or not within `limit`; or with the reason in plain words.
    """
    for name, layer in found.items():
        seen = _seen(model, name, layer, context, limit, make, name in centred)
        if isinstance(seen, Both):
            yield name, seen
            continue
        for _, moment in moments(model, {name: [layer]}, context, limit, centred):
            if not isinstance(moment, str):
                outcome.notes[f"rounded as if others were not, in place of in turn: {seen}"] += 1
            yield name, moment


def _seen(
    model: oir.Model,
    name: str,
    layer: Convolution,
    context: Context,
    limit: int,
    make: Callable[[], oir.Model],
    centred: bool,
) -> Both | str:
    """Both patches of a convolution, or why they cannot be had."""
    gram, reason = gram_of(layer, exact=centred), unobservable(model, layer)
    if reason is not None:
        return f"what it reads cannot be observed: {reason}"
    if context.keeps(model, {name: (layer.input, 1)})[name] is not None:
        return "its patches mix positions with padding"
    needed = _needed(layer.input)
    if needed is None:
        return "what it reads depends on a node with branches"
    parts = [part for part in halves(context.samples) if part]
    # the rows of a half are multiplied beside what there is of both: one more of the same size
    if (len(parts) + 1) * gram.nbytes((1, 2 * layer.in_channels, 1)) > limit:
        return "the moments of what is read in the original and behind rounded layers take more than `memory`"
    joint, value = _beside(make(), model, layer, needed)
    observer = context.observe(joint)
    try:
        seen = [observer.observe({name: Site(value)}, {name: gram}, part, limit=limit)[name] for part in parts]
    except InputError as error:
        return f"what is read in the original and behind rounded layers cannot be observed together: {error.cause}"
    finally:
        observer.close()
    return _both([one for one in seen if isinstance(one, Gram) and one.rows], layer, centred)


def _both(parts: Sequence[Gram], layer: Convolution, centred: bool) -> Both | str:
    """What is fitted to all samples; the parts are used up."""
    if not parts:
        return "no row was seen: the samples have none"
    size, damping = features_of(layer), _DAMPINGS[0]
    if len(parts) > 1:
        rows = layer.weight().reshape(layer.groups, -1, size)
        lost = sum(_lost(rows, _fitted(one, size, centred), other) for one, other in (parts, parts[::-1]))
        damping = (*_DAMPINGS, np.inf)[int(np.argmin(lost))]
    whole = parts[0]
    for part in parts[1:]:
        whole.merge(part)
    found = _fitted(whole, size, centred)
    if not np.isfinite(found.moment).all() or not np.isfinite(found.apart).all():
        return "its input holds NaN, infinity, or numbers too large to be squared"
    moment = steadied(found.moment, whole.rows)
    known = 1.0 if moment is found.moment else 10 * whole.rows / (size + 10 * whole.rows)
    return replace(found, moment=moment, apart=known * found.apart, damping=damping)


def _fitted(gram: Gram, size: int, centred: bool) -> Both:
    """What one reads from the moments of both."""
    both, means = by_group(gram.matrix, 2 * size), None
    with np.errstate(invalid="ignore", over="ignore"):
        own, apart = both[:, size:, size:] / gram.rows, both[:, :size, size:] / gram.rows
        if centred:
            means = gram.mean.reshape(-1, 2, size).transpose(1, 0, 2)
            own -= means[1][:, :, None] * means[1][:, None, :]
            apart -= means[0][:, :, None] * means[1][:, None, :]
        apart -= own
    if centred:
        most = np.diagonal(both, axis1=-2, axis2=-1).max(initial=0.0) / gram.rows
        _add_to_diagonals(own, np.full(len(own), ROUNDING * most))
    return Both(own, apart, means)


def _lost(rows: np.ndarray, fitted: Both, other: Gram) -> np.ndarray:
    """What outputs change by in the mean square on samples that a move was not fitted to, by each damping and none."""
    size = rows.shape[2]
    both, mean = by_group(other.matrix, 2 * size), other.mean.reshape(len(rows), 2 * size)
    found = []
    with np.errstate(invalid="ignore", over="ignore"):
        for damping in (*_DAMPINGS, np.inf):
            moved = np.concatenate([rows, -rows - _move(rows, fitted.moment, fitted.apart, damping)], 2)
            lost = np.vdot(moved @ both, moved) / other.rows
            if fitted.means is not None:  # the mean of the fitted samples is taken off in place of their own
                shift = fitted.means.transpose(1, 0, 2).reshape(mean.shape)
                own, off = (np.einsum("goi,gi->go", moved, one) for one in (mean, mean - shift))
                lost += np.vdot(off, off) - np.vdot(own, own)
            found.append(lost)
    return np.array(found)


def _move(rows: np.ndarray, moment: np.ndarray, apart: np.ndarray, damping: float) -> np.ndarray:
    """By how much the rows [groups, out, in] are to move."""
    if np.isinf(damping):
        return np.zeros_like(rows)
    damped = moment.copy()
    steady = np.trace(moment, axis1=1, axis2=2) / moment.shape[-1]
    _add_to_diagonals(damped, damping * steady + np.finfo(np.float64).tiny)
    return np.asarray(np.linalg.solve(damped, (rows @ apart).transpose(0, 2, 1)).transpose(0, 2, 1))


def _add_to_diagonals(matrices: np.ndarray, numbers: np.ndarray) -> None:
    """Add one number to the diagonal of each of the matrices."""
    np.einsum("gii->gi", matrices)[:] += numbers[:, None]


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
