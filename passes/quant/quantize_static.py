"""Convolutions and linear layers on numbers of 8 bits, with scales that are fixed beforehand."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import ClassVar, Literal

import numpy as np
import onnx_ir as oir

from burnish.ir.errors import InputError
from burnish.ir.walk import walk
from burnish.passes import catalog, factors, integer_layers, integer_weights, ranges
from burnish.passes.base import Outcome
from burnish.passes.calibration import Known, best, mean_of, observed
from burnish.passes.grids import Float8, Grid
from burnish.passes.integer_weights import Rounding
from burnish.passes.layers import Layer, layers, others
from burnish.passes.lossy import Context, Edit, LossyPass
from burnish.passes.simulated import LABEL
from burnish.passes.weight_rounding import clip_of, error

_PLACE = "quantize-static"
_BEST: tuple[ranges.Method, ...] = ("minmax", "percentile", "mse")


@dataclass(frozen=True)
class QuantizeStatic(LossyPass):
    """Let convolutions and linear layers compute on 8-bit integers, and what lies between them too where it can.

    Activations get one scale for each value, from samples; weights one for each output. The form is QuantizeLinear and
    DequantizeLinear, which ONNX Runtime turns into kernels on integers.

    Attributes:
        dtype: `int8`, or 8-bit floating point, `float8e4m3fn` or `float8e5m2`: only what layers read, and their
            weights. The file is as small, but no kernel multiplies them: the metadata say `burnish.simulated`.
        calibration: how much of an activation's range is kept: `minmax` all of it, `percentile` a share, `mse` what
            makes the squared error least, `entropy` what keeps the distribution; `best` is `mse`, unless `minmax` or
            `percentile` changes the outputs less on the samples, and by more than the standard error.
        percentile: for `percentile`: the percent of the numbers that are not cut off at each end.
        symmetric: activations have their zero point in the middle, or at 0 where none is negative.
        per_channel: weights have a scale for each output, else one for all.
        rounding: of weights: `nearest` with steps that reach all of them; `mse` cuts off a few where that makes the
            squared error less; `gptq` makes the change of what the layer computes on the samples small, of convolutions
            in turn where no budget chooses among them; `best` is that for convolutions with a scale for each output,
            else `mse`.
        weight_bits: 8, or 7 for processors that add two products in 16 bits (x86 without VNNI).
        correct_bias: move each bias by what rounding the weight changes at the mean of the inputs.
        stem: also convolutions on at most four channels, as the first of images, and depthwise ones behind their Relu:
            kernels on integers are slower there, and rounding what they read costs more than the few weights save.
        memory: MiB of activations that are held at once while samples are run, and of statistics that weights are
            rounded by; what else is kept is 64 KiB a value.
    """

    dtype: Literal["int8", "float8e4m3fn", "float8e5m2"] = "int8"
    calibration: Literal["best", "minmax", "percentile", "mse", "entropy"] = "best"
    percentile: float = 99.99
    symmetric: bool = False
    per_channel: bool = True
    rounding: Literal["best", "nearest", "mse", "gptq"] = "best"
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
        odd = {"calibration": "entropy", "symmetric": True, "rounding": "gptq", "weight_bits": 7}
        if self.dtype != "int8" and (name := next((one for one in odd if getattr(self, one) == odd[one]), None)):
            raise InputError(f"`{name}` is {odd[name]}, which is for integers", place=f"{_PLACE}{{dtype={self.dtype}}}")
        if self.memory < 1:
            raise InputError(f"`memory` is {self.memory}", place=_PLACE, hint="give some MiB")

    @property
    def decided(self) -> bool:
        return True

    def propose(self, model: oir.Model, context: Context, outcome: Outcome) -> list[Edit]:
        """See the class of passes. A payload holds the range of each value by its name, and mean inputs by layer; with
        `gptq` integers and scales of the layer, too, and what they lose.
        """
        opset = model.opset_imports.get("", 1)
        least = 21 if self.dtype != "int8" else 13 if self.per_channel else 10
        if opset < least:
            why = f"opset {opset} has no such DequantizeLinear: 8-bit floats need 21, a scale for each output 13"
            raise InputError(why, place=_PLACE, hint=f"raise it with `--opset {least}`")
        found: dict[str, Layer] = {}
        for name, layer in layers(model).items():
            reason = integer_layers.refusal(model, layer, self._grid)
            if reason is None and not self.stem and integer_layers.is_stem(layer):
                reason = "at the image it is slower on integers and saves little; `stem` would take it"
            if reason is None:
                found[name] = layer
            else:
                outcome.skip(layer.node, reason)
        for node, why in others(model):
            outcome.skip(node, why)
        for node in walk(model, "LSTM", "GRU", "RNN"):
            outcome.skip(node, "no runtime computes it on integers with fixed scales; `quantize-dynamic` has a kernel")
        methods: tuple[ranges.Method, ...] = _BEST if self.calibration == "best" else (self.calibration,)
        values = integer_layers.whole(model, list(found.values()), self._grid).scale_of
        corrected = [layer for layer in found.values() if self._corrected(layer)]
        seen = observed(model, values, corrected, context, self._grid, methods, self.percentile, self.memory << 20)
        for name, layer in list(found.items()):
            own = integer_layers.whole(model, [layer], self._grid).scale_of
            reason = next((seen.wrong[value] for value in own if value in seen.wrong), None)
            if reason is not None:
                outcome.skip(layer.node, reason)
                del found[name]
        if not found:
            return []
        beside = integer_layers.beside(model, found, self._grid) if context.timed else {}
        make = partial(self._made, model, list(found.values()))
        known = seen.known[best(model, seen.known, make, context, self.memory << 20)]
        images = self.rounding == "best" and self.per_channel and self.dtype == "int8"
        measured = found if self.rounding == "gptq" else integer_layers.images(found) if images else {}
        centred = [name for name, layer in measured.items() if self._corrected(layer)]
        how = Rounding(self._grid, self._weights, centred, self.memory << 20, make)
        rounded = integer_weights.rounded(model, measured, known, how, context, outcome)
        return [
            Edit(
                catalog.spec(self),
                name,
                f"{self.dtype} per channel" if self.per_channel else self.dtype,
                frozenset(str(node.name) for node in layer.nodes),
                integer_layers.savings(model, layer, self._grid, self.per_channel, self._corrected(layer)),
                known | rounded.get(name, {}),
                (str(layer.node.name),),
                beside.get(name, {}),
            )
            for name, layer in found.items()
        ]

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
        return Grid(8, signed=False, symmetric=self.symmetric) if self.dtype == "int8" else Float8(kind=self.dtype)

    @property
    def _weights(self) -> Grid:
        return Grid(self.weight_bits) if self.dtype == "int8" else self._grid

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
        if chosen and self.dtype != "int8":
            model.metadata_props[LABEL] = f"{self.dtype} is multiplied in floating point: the file is small, not quick"

    def _write(self, model: oir.Model, chosen: Sequence[Layer], known: Mapping[str, np.ndarray]) -> dict[str, float]:
        """Also the relative error of each layer by the name of its node: of its weight, where no samples rounded it."""
        inputs = integer_layers.round_values(model, chosen, known, self._grid)
        axis, clip, grid = 0 if self.per_channel else None, clip_of(self.rounding), self._weights
        errors = dict[str, float]()
        for layer, scale in zip(chosen, inputs, strict=True):
            given = integer_weights.given(layer, known, grid)
            fitted = integer_layers.fitted(layer, scale, grid, axis, clip, given)
            lost = integer_weights.lost(layer, known)
            errors[str(layer.node.name)] = error(layer.weight(), *fitted) if lost is None else lost
            shift, mean = integer_weights.shift_of(layer, known), known.get(mean_of(layer))
            if shift is None and mean is not None and self._corrected(layer):
                shift = integer_layers.shift(layer, fitted, mean)
            integer_layers.write(model, layer, scale, fitted, shift)
        return errors
