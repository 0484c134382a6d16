"""Convolutions and linear layers on integers of 8 bits, with scales that are fixed beforehand."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import ClassVar, Literal

import numpy as np
import onnx_ir as oir

from burnish.ir.errors import InputError
from burnish.ir.walk import walk
from burnish.passes import catalog, factors, integer_layers, ranges
from burnish.passes.base import Outcome
from burnish.passes.calibration import Known, best, mean_of, observed
from burnish.passes.grids import Grid, Scales
from burnish.passes.integer_flow import flow
from burnish.passes.layers import Layer, layers, others
from burnish.passes.lossy import Context, Edit, LossyPass
from burnish.passes.moments import moments
from burnish.passes.weight_rounding import clip_of, error

_PLACE = "quantize-static"
_LEVELS, _SCALE = "levels ", "scale "
_BEST: tuple[ranges.Method, ...] = ("minmax", "percentile", "mse")


@dataclass(frozen=True)
class QuantizeStatic(LossyPass):
    """Let convolutions and linear layers compute on 8-bit integers, and what lies between them too where it can.

    Activations get one scale for each value, from samples; weights one for each output. The form is QuantizeLinear and
    DequantizeLinear, which ONNX Runtime turns into kernels on integers.

    Attributes:
        calibration: how much of an activation's range is kept: `minmax` all of it, `percentile` a share, `mse` what
            makes the squared error least, `entropy` what keeps the distribution; `best` is `mse`, unless `minmax` or
            `percentile` changes the outputs less on the samples, and by more than the standard error.
        percentile: for `percentile`: the percent of the numbers that are not cut off at each end.
        symmetric: activations have their zero point in the middle, or at 0 where none is negative.
        per_channel: weights have a scale for each output, else one for all.
        rounding: of weights: `nearest` with steps that reach all of them; `mse` cuts off a few where that makes the
            squared error less; `gptq` makes the change of what the layer computes on the samples small.
        weight_bits: 8, or 7 for processors that add two products in 16 bits (x86 without VNNI).
        correct_bias: move each bias by what rounding the weight changes at the mean of the inputs.
        stem: also convolutions on at most four channels, as the first of images: kernels on integers are slower there
            than those on floating-point numbers, and rounding an image costs more than the few weights save.
        memory: MiB of activations that are held at once while samples are run; what is kept of them is 64 KiB a value.
    """

    calibration: Literal["best", "minmax", "percentile", "mse", "entropy"] = "best"
    percentile: float = 99.99
    symmetric: bool = False
    per_channel: bool = True
    rounding: Literal["nearest", "mse", "gptq"] = "mse"
    weight_bits: int = 8
    correct_bias: bool = True
    stem: bool = False
    memory: int = 1024
    order: ClassVar[int] = 40
    needs: ClassVar[tuple[str, ...]] = ("named", "inlined", "lifted")
    prepare: ClassVar[tuple[str, ...]] = (
        "raise-opset{to=14}",
        "fuse-activation",
        "fold-codebook",
        "fold-batchnorm",
        "fold-affine",
    )

    def __post_init__(self) -> None:
        if not 50 < self.percentile <= 100:
            raise InputError(f"`percentile` is {self.percentile}", place=_PLACE, hint="give more than 50, at most 100")
        if self.weight_bits not in (7, 8):
            raise InputError(f"`weight_bits` is {self.weight_bits}", place=_PLACE, hint="give 8 or 7")
        if self.rounding == "gptq" and not self.per_channel:
            raise InputError("`gptq` finds a scale for each output", place=_PLACE, hint="give `per_channel=true`")
        if self.memory < 1:
            raise InputError(f"`memory` is {self.memory}", place=_PLACE, hint="give some MiB")

    @property
    def decided(self) -> bool:
        return True

    def propose(self, model: oir.Model, context: Context, outcome: Outcome) -> list[Edit]:
        """See the class of passes. A payload holds the range of each value by its name, and mean inputs by layer; with
        `gptq` integers and scales of the layer, too.
        """
        opset, least = model.opset_imports.get("", 1), 13 if self.per_channel else 10
        if opset < least:
            raise InputError(
                f"opset {opset} has no such DequantizeLinear: a scale for each output needs 13, one for all 10",
                place=_PLACE,
                hint=f"raise it with `--opset {least}`",
            )
        found: dict[str, Layer] = {}
        for name, layer in layers(model).items():
            reason = integer_layers.refusal(model, layer)
            if reason is None and not self.stem and integer_layers.is_stem(layer):
                reason = f"on {layer.in_channels} channels integers are slower; `stem` would take it"
            if reason is None:
                found[name] = layer
            else:
                outcome.skip(layer.node, reason)
        for node, why in others(model):
            outcome.skip(node, why)
        for node in walk(model, "LSTM", "GRU", "RNN"):
            outcome.skip(node, "no runtime computes it on integers with fixed scales; `quantize-dynamic` has a kernel")
        methods: tuple[ranges.Method, ...] = _BEST if self.calibration == "best" else (self.calibration,)
        values = flow(model.graph, list(found.values())).scale_of
        corrected = [layer for layer in found.values() if self._corrected(layer)]
        seen = observed(model, values, corrected, context, self._grid, methods, self.percentile, self.memory << 20)
        for name, layer in list(found.items()):
            reason = next((seen.wrong[v] for v in flow(model.graph, [layer]).scale_of if v in seen.wrong), None)
            if reason is not None:
                outcome.skip(layer.node, reason)
                del found[name]
        if not found:
            return []
        whole = flow(model.graph, list(found.values()))
        made = partial(self._made, model, list(found.values()))
        known = seen.known[best(model, seen.known, made, context)]
        rounded = self._rounded(model, found, known, context)
        return [
            Edit(
                catalog.spec(self),
                name,
                "int8 per channel" if self.per_channel else "int8",
                frozenset(str(node.name) for node in layer.nodes),
                integer_layers.savings(model, layer, self.per_channel, self._corrected(layer)),
                known | rounded.get(name, {}),
                (str(layer.node.name),),
                whole.unconverted(layer),
            )
            for name, layer in found.items()
        ]

    def _rounded(
        self, model: oir.Model, found: Mapping[str, Layer], known: Known, context: Context
    ) -> dict[str, dict[str, np.ndarray]]:
        """What `gptq` makes of each weight whose inputs it can see; centred where the bias takes up the mean."""
        made: dict[str, dict[str, np.ndarray]] = {}
        if self.rounding != "gptq":
            return made
        centred = {name for name, layer in found.items() if self._corrected(layer)}
        groups = {name: [layer] for name, layer in found.items()}
        for name, moment in moments(model, groups, context, self.memory << 20, centred):
            if isinstance(moment, str):
                continue
            layer = found[name]
            ends = known[str(layer.input.name)]
            levels, scales = integer_layers.rounded(layer, ends, self._grid, Grid(self.weight_bits), moment)
            made[name] = {f"{_LEVELS}{layer.node.name}": levels, f"{_SCALE}{layer.node.name}": scales.scale}
        return made

    def _corrected(self, layer: Layer) -> bool:
        return self.correct_bias and integer_layers.takes_bias(layer)

    def _made(self, model: oir.Model, found: Sequence[Layer], known: Known) -> oir.Model:
        """A copy of the model with all layers on integers; their weights are rounded in the quickest way."""
        copy = model.clone()
        nodes = {node.name: node for node in copy.graph}
        quick = replace(self, rounding="nearest")
        quick._write(copy, [factors.found(nodes[layer.node.name]) for layer in found], known)
        return copy

    @property
    def _grid(self) -> Grid:
        return Grid(8, signed=False, symmetric=self.symmetric)

    def apply(self, model: oir.Model, edits: Sequence[Edit], outcome: Outcome) -> None:
        """See the class of passes."""
        nodes = {node.name: node for node in model.graph}
        known: dict[str, np.ndarray] = {}
        chosen: list[Layer] = []
        for edit in edits:
            layer = factors.found(nodes[edit.anchors[0]])
            if not outcome.take(layer.node):
                break
            known |= edit.payload
            chosen.append(layer)
        errors = self._write(model, chosen, known)
        outcome.errors |= {edit.key: errors[edit.anchors[0]] for edit in edits if edit.anchors[0] in errors}

    def _write(self, model: oir.Model, chosen: Sequence[Layer], known: Mapping[str, np.ndarray]) -> dict[str, float]:
        """Also the relative error of each weight that no samples rounded, by the name of its node."""
        inputs = integer_layers.round_values(model, chosen, known, self._grid)
        axis, clip, grid = 0 if self.per_channel else None, clip_of(self.rounding), Grid(self.weight_bits)
        errors = dict[str, float]()
        for layer, scale in zip(chosen, inputs, strict=True):
            mean = known.get(mean_of(layer)) if self._corrected(layer) else None
            given, own = None, known.get(f"{_SCALE}{layer.node.name}")
            if own is not None:
                given = known[f"{_LEVELS}{layer.node.name}"], Scales(grid, own, np.zeros(own.shape, grid.dtype), 0)
            fitted = integer_layers.fitted(layer, scale, grid, axis, clip, given)
            if given is None:
                errors[str(layer.node.name)] = error(layer.weight(), *fitted)
            integer_layers.write(model, layer, scale, fitted, mean)
        return errors
