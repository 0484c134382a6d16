"""The weights of layers on 8-bit integers, rounded so that what the layers compute on samples changes least."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace

import numpy as np
import onnx_ir as oir

from burnish.ir.errors import InputError
from burnish.ir.samples import halves, interleaved
from burnish.ir.views.convolution import Convolution
from burnish.passes import integer_layers, qdq, ranges
from burnish.passes.base import Outcome
from burnish.passes.calibration import Known
from burnish.passes.grids import Grid, Scales, dequantize
from burnish.passes.in_turn import Both, in_turn
from burnish.passes.layers import Layer
from burnish.passes.lossy import Context
from burnish.passes.moments import moments
from burnish.passes.trying import Tried
from burnish.passes.weight_rounding import error, rounded_layer

_TURNED = 64
"""Samples that convolutions are rounded in turn by: each of them is a run of most of the model."""

_LEAST = 4
"""Samples from which on it is asked whether rounding in turn pays: two to fit to, and two to judge by."""

_LEVELS, _SCALE, _LOST, _SHIFT = "levels ", "scale ", "lost ", "shift "


@dataclass(frozen=True)
class Rounding:
    """How weights are rounded.

    Attributes:
        inputs: the integers of what layers read.
        weights: those of the weights.
        centred: the names of layers whose bias takes up a mean: their moment is that about it.
        limit: bytes of statistics, and of activations, that are held at once.
        make: the model with all layers on integers, with what is known of them.
    """

    inputs: Grid
    weights: Grid
    centred: Collection[str]
    limit: int
    make: Callable[[Known], oir.Model]


def rounded(
    model: oir.Model, layers: Mapping[str, Layer], known: Known, how: Rounding, context: Context, outcome: Outcome
) -> dict[str, Known]:
    """What `gptq` makes of the weights of layers, by their names; only of those whose inputs it can see.

    Convolutions are rounded in turn, each for what it reads behind those before it and their rounded activations, and
    their biases take up what the outputs are off in the mean, where that pays: fitted to one half of the samples, it
    changes the model's outputs less on the other, by more than the standard error. Else, where edits are chosen one by
    one, and with fewer than four samples, each is rounded for what it reads in the original, as all other layers are.

    Args:
        model: the model.
        layers: layers by their names, in the order of the graph.
        known: the least and the largest number of each value, by its name.
        how: what is rounded to.
        context: samples and what runs models.
        outcome: takes a note for each layer that is rounded otherwise, with the reason.
    """
    once = _once(model, layers, known, how, context, outcome)
    images = {name: layer for name, layer in layers.items() if isinstance(layer, Convolution) and name in once}
    if context.searched or len(context.samples) < _LEAST or len(images) < 2:
        return once
    few = replace(context, samples=interleaved(context.samples)[:_TURNED])
    turns, tried = _Turns(model, images, known, how), Outcome("")
    if not turns.pay(once, few, tried):
        outcome.notes += tried.notes
        return once
    return turns.made(once, few, outcome)


@dataclass(frozen=True)
class _Turns:
    """Convolutions that may be rounded one after the other.

    Attributes:
        model: the model.
        images: its convolutions by name, in the order of the graph.
        known, how: as for `rounded`.
    """

    model: oir.Model
    images: Mapping[str, Convolution]
    known: Known
    how: Rounding

    def pay(self, once: Mapping[str, Known], context: Context, outcome: Outcome) -> bool:
        """Whether those that are rounded in turn for half of the samples are better on the other half."""
        fitted, others = halves(context.samples)
        if not others:
            return False
        half = replace(context, samples=fitted)
        first = {**once, **_once(self.model, self.images, self.known, self.how, half, Outcome(""))}
        other = self.made(first, half, outcome)
        tried = Tried(self.model, replace(context, samples=others), limit=self.how.limit)
        try:
            tried.run({"once": lambda: self._whole(first), "turned": lambda: self._whole(other)})
        except InputError:
            return False
        return tried.gain("once", "turned") > 0

    def made(self, once: Mapping[str, Known], context: Context, outcome: Outcome) -> dict[str, Known]:
        """The weights of layers as `once` has them, but those of convolutions in turn."""
        turned = {name: one for name, one in once.items() if name not in self.images}
        how = self.how
        turns = in_turn(self.model, self.images, context, how.limit, lambda: self._whole(turned), outcome, how.centred)
        for number, (name, seen) in enumerate(turns):
            context.on_step("rounding", number, len(self.images))
            image = self.images[name]
            turned[name] = once[name] if isinstance(seen, str) else _made(image, seen, self.known, how)
        return turned

    def _whole(self, parts: Mapping[str, Known]) -> oir.Model:
        """The model with all layers on integers, and weights as far as `parts` has them."""
        return self.how.make({key: one for part in (self.known, *parts.values()) for key, one in part.items()})


def _once(
    model: oir.Model, layers: Mapping[str, Layer], known: Known, how: Rounding, context: Context, outcome: Outcome
) -> dict[str, Known]:
    """The weights of layers, each for what it reads in the original."""
    made, groups = dict[str, Known](), {name: [layer] for name, layer in layers.items()}
    for name, moment in moments(model, groups, context, how.limit, how.centred):
        if isinstance(moment, str):
            outcome.notes[f"rounded by `mse` in place of `gptq`: {moment}"] += 1
        else:
            made[name] = _made(layers[name], moment, known, how)
    return made


def given(layer: Layer, known: Mapping[str, np.ndarray], grid: Grid) -> tuple[np.ndarray, Scales] | None:
    """The integers [out, ...] of a layer and their scales, where `rounded` made some."""
    scale = known.get(f"{_SCALE}{layer.node.name}")
    if scale is None:
        return None
    return known[f"{_LEVELS}{layer.node.name}"], Scales(grid, scale, np.zeros(scale.shape, grid.dtype), 0)


def lost(layer: Layer, known: Mapping[str, np.ndarray]) -> float | None:
    """The relative error of what a layer computes, where `rounded` told it."""
    found = known.get(f"{_LOST}{layer.node.name}")
    return None if found is None else float(found)


def shift_of(layer: Layer, known: Mapping[str, np.ndarray]) -> np.ndarray | None:
    """What the bias [out] of a layer takes up, where `rounded` told it."""
    return known.get(f"{_SHIFT}{layer.node.name}")


def _made(layer: Layer, seen: Both | np.ndarray, known: Known, how: Rounding) -> Known:
    weight, bias = layer.weight(), integer_layers.added(layer, how.weights)
    ends = known[str(layer.input.name)]
    scale = ranges.scales(float(ends[0]), float(ends[1]), how.inputs).scale
    least = None if bias is None else qdq.least_scales(bias, scale)
    wanted, moment = (seen.target(weight), seen.moment) if isinstance(seen, Both) else (weight, seen)
    levels, scales = rounded_layer(wanted, how.weights, moment, np.dtype(np.float32), least)
    told = np.array(error(wanted, levels, scales, moment))
    made = {
        f"{kind}{layer.node.name}": one
        for kind, one in zip((_LEVELS, _SCALE, _LOST), (levels, scales.scale, told), strict=True)
    }
    shift = seen.shift(weight, dequantize(levels, scales)) if isinstance(seen, Both) else None
    return made if shift is None else made | {f"{_SHIFT}{layer.node.name}": shift}
