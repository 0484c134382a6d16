"""What the values around layers that are to compute on integers hold: ranges by several rules, and means."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import onnx_ir as oir

from burnish.ir.errors import InputError
from burnish.passes import integer_clips, integer_layers, ranges
from burnish.passes.grids import Grid
from burnish.passes.layers import Layer
from burnish.passes.lossy import Context
from burnish.passes.ranges import Method
from burnish.passes.reducers import Moments, Reducer
from burnish.passes.reservoirs import Several
from burnish.passes.sites import Site
from burnish.passes.trying import Tried

Known = dict[str, np.ndarray]
"""The least and the largest number of values by their names, and mean inputs of layers under `mean NAME`."""


@dataclass(frozen=True)
class Observed:
    """What was seen.

    Attributes:
        known: by method what was found.
        wrong: values without a range, each with the reason.
    """

    known: dict[Method, Known]
    wrong: dict[oir.Value, str]


def observed(
    model: oir.Model,
    values: Iterable[oir.Value],
    corrected: Iterable[Layer],
    context: Context,
    grid: Grid,
    methods: Sequence[Method],
    percentile: float,
    limit: int,
) -> Observed:
    """Run the model on all samples, and find ranges and means.

    Args:
        model: the model; not changed.
        values: those that need a range.
        corrected: layers whose mean input is wanted; the inputs are among `values`.
        context: samples and what runs models.
        grid: the integers.
        methods: how ranges are found, each by itself.
        percentile: see `ranges.limits`.
        limit: bytes of values that are held at once.
    """
    named = {str(value.name): value for value in values}
    if not named:
        return Observed({method: {} for method in methods}, {})
    both = tuple({ranges.reducer(method).options: ranges.reducer(method) for method in methods}.values())
    wanted: dict[str, Reducer] = dict.fromkeys(named, Several(both))
    keeps = context.keeps(model, {name: (value, None) for name, value in named.items()})
    model, places = integer_clips.telling(model, named.values())
    kept = {name: None if isinstance(keep, str) else keep for name, keep in keeps.items()}
    sites = {name: Site(places[value], kept[name]) for name, value in named.items()}
    means = {mean_of(layer): Moments(axis=integer_layers.feature_axis(layer)) for layer in corrected}
    sites |= {mean_of(layer): sites[str(layer.input.name)] for layer in corrected}
    observer = context.observe(model)
    seen = observer.observe(sites, wanted | means, context.samples, limit=limit)
    observer.close()
    centres = {name: one.mean for name in means if isinstance(one := seen[name], Moments) and one.mean is not None}
    found = Observed({method: dict(centres) for method in methods}, {})
    for name, value in named.items():
        one, within = seen[name], integer_clips.told_apart(value)
        assert isinstance(one, Several)
        parts = {part.options: part for part in one.parts}
        for method in methods:
            try:
                part = parts[ranges.reducer(method).options]
                found.known[method][name] = np.array(ranges.limits(part, method, grid, percentile, within))
            except InputError as error:
                found.wrong[value] = f"`{name}` cannot be rounded: {error.cause}"
    return found


def mean_of(layer: Layer) -> str:
    """What the mean input of a layer is known as."""
    return f"mean {layer.node.name}"


def best(
    model: oir.Model,
    known: Mapping[Method, Known],
    make: Callable[[Known], oir.Model],
    context: Context,
    limit: int,
) -> Method:
    """The method by which all layers together change the outputs least, by the divergence that edits are scored by.

    Few samples tell methods apart badly where most outputs are certain. So `mse`, whose errors are the least at each
    value, is left for another only where that one is better by more than the standard error of the difference.

    Args:
        model: the original.
        known: by method.
        make: the model with ranges.
        context: samples and what runs models; the first samples are taken.
        limit: bytes of outputs that are held at once.
    """
    if len(known) == 1:
        return next(iter(known))
    tried = Tried(model, context, limit=limit)
    try:
        tried.run({method: partial(make, one) for method, one in known.items()})
    except InputError:
        return "mse"
    return max(known, key=lambda method: tried.gain("mse", method) if method != "mse" else 0.0)
