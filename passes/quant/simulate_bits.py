"""What few bits for weights, activations and cache would leave of a model, in floating point."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import numpy as np
import onnx_ir as oir

from burnish.ir.errors import InputError
from burnish.ir.views.linear import Linear, find_linear
from burnish.ir.walk import walk
from burnish.passes import catalog, lossy, simulated
from burnish.passes.base import Outcome
from burnish.passes.grids import Grid, Scales, dequantize
from burnish.passes.layers import Layer, layers, unusable
from burnish.passes.lossy import Context, Edit, LossyPass, Undecided
from burnish.passes.moments import moments
from burnish.passes.simulated import LABEL, Bits
from burnish.passes.weight_rounding import rounded

_PLACE = "simulate-bits"


@dataclass(frozen=True)
class SimulateBits(LossyPass):
    """Round weights, activations and cache to few bits in floating point, to see what is lost; it runs slower.

    No kernel of ONNX Runtime's CPU takes activations of 4 bits. Weights are rounded on a symmetric grid of each output;
    what linear layers read on a grid with a zero point for each token, keys and values likewise for each head, when the
    model runs. Heads and tables keep their bits. The metadata of the model say so under `burnish.simulated`.

    Attributes:
        weights: bits of the weights of linear layers; 0 leaves them as they are, as for the other two.
        activations: bits of what linear layers read.
        cache: bits of keys, behind their rotary embedding, and of values.
        rounding: of weights: `mse` makes their own squared error small, `gptq` that of what the layers compute, and
            needs samples.
        clip: the share of the range of a token that its grid spans.
        cache_clip: likewise for a head of keys and values.
        hadamard: multiply by Hadamard matrices what the last layer of each MLP reads, and queries and keys behind their
            rotary embedding, as `rotate-residual{online=true}` does.
        memory: MiB of statistics that are held at once while samples are run, and of activations; less takes more runs.
    """

    weights: int = 4
    activations: int = 4
    cache: int = 4
    rounding: Literal["mse", "gptq"] = "gptq"
    clip: float = 0.85
    cache_clip: float = 0.95
    hadamard: bool = True
    memory: int = 1024
    order: ClassVar[int] = 40
    saves: ClassVar[bool] = False
    needs: ClassVar[tuple[str, ...]] = ("named", "inlined", "lifted")

    def __post_init__(self) -> None:
        for name in ("weights", "activations", "cache"):
            if getattr(self, name) != 0 and not 2 <= getattr(self, name) <= 8:
                raise InputError(f"`{name}` is {getattr(self, name)}", place=_PLACE, hint="give 2 to 8, or 0 for all")
        for name in ("clip", "cache_clip"):
            if not 0 < getattr(self, name) <= 1:
                raise InputError(f"`{name}` is {getattr(self, name)}", place=_PLACE, hint="give more than 0, at most 1")
        if self.memory < 1:
            raise InputError(f"`memory` is {self.memory}", place=_PLACE, hint="give some MiB")
        if not (self.weights or self.activations or self.cache):
            raise InputError("nothing has few bits", place=_PLACE, hint="give weights, activations or a cache some")

    @property
    def decided(self) -> bool:
        return self._measured

    @property
    def everywhere(self) -> bool:
        return not self._measured

    @property
    def _measured(self) -> bool:
        return self.weights > 0 and self.rounding == "gptq"

    @property
    def words(self) -> str:
        """What is simulated: `W4A4KV4`, 16 for what keeps its bits."""
        return f"W{self.weights or 16}A{self.activations or 16}KV{self.cache or 16}"

    def asked(self, model: oir.Model, outcome: Outcome) -> list[Edit]:
        if self._measured:
            raise Undecided("`simulate-bits` rounds by GPTQ", hint="give samples with `--data`, or `rounding=mse`")
        return self._edit(model, {}, outcome)

    def propose(self, model: oir.Model, context: Context, outcome: Outcome) -> list[Edit]:
        """See the class of passes. The one edit holds the integers and the scales of each layer, where it observed."""
        if not self._measured:
            return self._edit(model, {}, outcome)
        copy = model.clone()
        if self.hadamard:
            simulated.put_hadamards(copy)
        found = {str(node.name): layer for node in simulated.quantized(copy) if (layer := find_linear(node))}
        payload: dict[str, np.ndarray] = {}
        groups = {name: [layer] for name, layer in found.items()}
        for name, moment in moments(copy, groups, context, self.memory << 20):
            if isinstance(moment, str):
                raise InputError(
                    moment, place=f"layer `{name}`", hint="leave out what it reads, or give `rounding=mse`"
                )
            weight, grid = found[name].weight(), Grid(self.weights)
            kind = np.dtype(np.float32)
            levels, scales = rounded(weight, grid, weight.shape[1], "gptq", mirrored=False, dtype=kind, moment=moment)
            payload |= {f"levels {name}": levels, f"scale {name}": scales.scale}
        return self._edit(model, payload, outcome)

    def _edit(self, model: oir.Model, payload: dict[str, np.ndarray], outcome: Outcome) -> list[Edit]:
        few = simulated.quantized(model)
        for layer in layers(model).values():
            if layer.node not in few:
                outcome.skip(layer.node, _kept(layer))
        if not few:
            return []
        copy = model.clone()
        self._simulate(copy, replace(self._bits, weights=0), {})  # rounded weights take the bytes that they took
        names = [str(node.name) for node in few]
        option = f"{self.words}, simulated in floating point"
        return [
            Edit(
                catalog.spec(self),
                f"{len(few)} layers from {names[0]} on",
                option,
                frozenset(str(node.name) for node in walk(model)),
                lossy.saved(model, copy, {}),
                payload,
                (names[0],),
            )
        ]

    def apply(self, model: oir.Model, edits: Sequence[Edit], outcome: Outcome) -> None:
        """See the class of passes."""
        nodes = {str(node.name): node for node in walk(model)}
        for edit in edits:
            if not outcome.take(nodes[edit.anchors[0]]):
                return
            self._simulate(model, self._bits, edit.payload)
            why = "no kernel computes in so few bits, and nothing is smaller or faster for it"
            model.metadata_props[LABEL] = f"{self.words}, in floating point: {why}"

    @property
    def _bits(self) -> Bits:
        return Bits(self.weights, self.activations, self.cache, self.clip, self.cache_clip)

    def _simulate(self, model: oir.Model, bits: Bits, payload: Mapping[str, np.ndarray]) -> None:
        def kept(layer: Linear) -> np.ndarray:
            levels, scale = (payload[f"{part} {layer.node.name}"] for part in ("levels", "scale"))
            zeros = np.zeros(scale.shape, levels.dtype)
            return dequantize(levels, Scales(Grid(self.weights), scale, zeros, 1, levels.shape[1]))

        simulated.simulate(model, bits, hadamard=self.hadamard, rounded=kept if payload else None)


def _kept(layer: Layer) -> str:
    """Why a layer keeps its bits."""
    if not isinstance(layer, Linear):
        return "it is a convolution"
    if layer.parameter is None:
        return "its weight is held otherwise already"
    return unusable(layer.parameter) or "heads and what stands before them alone keep their bits, as do rotations"
