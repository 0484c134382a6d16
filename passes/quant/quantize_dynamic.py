"""Layers that multiply integers, with inputs that are quantized in each run."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np
import onnx_ir as oir

from burnish.ir.errors import InputError
from burnish.ir.views.convolution import Convolution
from burnish.ir.views.linear import Linear
from burnish.ir.walk import walk
from burnish.passes import balance, catalog, dynamic_integers, dynamic_lstm, grids, sites, windows
from burnish.passes.base import Outcome
from burnish.passes.factors import found
from burnish.passes.grids import Grid
from burnish.passes.layers import Layer, layers, others
from burnish.passes.lossy import Context, Edit, LossyPass, Undecided
from burnish.passes.reservoirs import Several
from burnish.passes.sites import Site

_CELLS = ("LSTM", "GRU", "RNN")


@dataclass(frozen=True)
class QuantizeDynamic(LossyPass):
    """Let linear layers and LSTMs multiply 8-bit integers; what they read is quantized in each run, without samples.

    Weights have one scale for each output. What a layer reads has one scale, from its smallest and largest number.

    Attributes:
        bits: of the weights; 7 for processors whose 16-bit sums saturate (x86 before VNNI).
        signed: weights are symmetric, which VNNI multiplies twice as fast; else products have zero points.
        clip: `mse` lets the largest weights be cut off where that makes the error smaller; `minmax` does not.
        balanced: what a layer reads is divided channel by channel, so that none is much wider than the others, and its
            weight multiplied; how far is fitted to samples. Where it gains nothing, it is left out.
        convolutions: all convolutions, which ONNX Runtime then computes several times slower; those along one axis,
            as of text and sound, are written as products, which are quick, and always taken.
        recurrent: LSTMs too, as DynamicQuantizeLSTM, which only ONNX Runtime has.
    """

    bits: int = 8
    signed: bool = True
    clip: Literal["mse", "minmax"] = "mse"
    balanced: bool = False
    convolutions: bool = False
    recurrent: bool = True
    order: ClassVar[int] = 40
    needs: ClassVar[tuple[str, ...]] = ("named", "inlined", "lifted")
    prepare: ClassVar[tuple[str, ...]] = ("fold-codebook", "fold-batchnorm")

    def __post_init__(self) -> None:
        if self.bits not in (7, 8):
            raise InputError(f"`bits` is {self.bits}", place="quantize-dynamic", hint="give 7 or 8")

    @property
    def decided(self) -> bool:
        return self.balanced

    @property
    def everywhere(self) -> bool:
        return not self.balanced

    def propose(self, model: oir.Model, context: Context, outcome: Outcome) -> list[Edit]:
        """See the class of passes. A payload holds what `apply` stores: the integers and their scales."""
        if not self.balanced:
            return list(self._edits(model, outcome, {}))
        return self._smaller(model, outcome, self._factors(model, context))

    def asked(self, model: oir.Model, outcome: Outcome) -> list[Edit]:
        """Every layer that becomes smaller by it."""
        if self.balanced:
            raise Undecided("how far channels are balanced is measured", hint="give samples with `--data`")
        return self._smaller(model, outcome, {})

    def _smaller(self, model: oir.Model, outcome: Outcome, factors: Mapping[oir.Value, np.ndarray]) -> list[Edit]:
        found = []
        nodes = {node.name: node for node in walk(model)}
        for one in self._edits(model, outcome, factors):
            if one.savings.bytes > 0:
                found.append(one)
            else:
                outcome.skip(nodes[one.anchors[0]], "the integers would be held beside its weight, which others read")
        return found

    def _factors(self, model: oir.Model, context: Context) -> dict[oir.Value, np.ndarray]:
        """By what the layers read, what its channels are multiplied with, float32; nothing for most values."""
        readers: dict[oir.Value, list[Linear]] = {}
        for layer in layers(model).values():
            usual = isinstance(layer, Linear) and dynamic_integers.refusal(layer) is None and not layer.shared
            if usual and isinstance(layer, Linear) and sites.refusal(model, layer.input) is None:
                readers.setdefault(layer.input, []).append(layer)
        places = {str(value.name): Site(value) for value in readers}
        observer = context.observe(model)
        seen = observer.observe(places, balance.reducer(), context.samples) if places else {}
        observer.close()
        found = {}
        for value, group in readers.items():
            one = seen[str(value.name)]
            assert isinstance(one, Several)
            divisors = balance.divisors(one, [layer.weight() for layer in group], self.bits)
            if divisors is not None:
                found[value] = (1 / divisors).astype(np.float32)
        return found

    def _edits(self, model: oir.Model, outcome: Outcome, factors: Mapping[oir.Value, np.ndarray]) -> Iterator[Edit]:
        """An edit for each layer, in the order of the nodes; layers that multiply one weight are one."""
        found, done = {id(layer.node): (name, layer) for name, layer in layers(model).items()}, set[str]()
        for node, why in others(model):
            outcome.skip(node, why)
        for node in walk(model):
            name, layer = found.get(id(node), (str(node.name), None))
            if node.name in done or (layer is None and node.op_type not in _CELLS):
                continue
            try:
                one = self._cell(model, node) if layer is None else self._layer(model, name, layer, factors)
            except InputError as error:
                one = error.cause
            if isinstance(one, Edit):
                done |= one.claims
                yield one
            else:
                outcome.skip(node, one)

    def _layer(self, model: oir.Model, name: str, layer: Layer, factors: Mapping[oir.Value, np.ndarray]) -> Edit | str:
        if isinstance(layer, Convolution) and not self.convolutions and windows.sliding(model, layer) is None:
            return "ONNX Runtime computes dynamic convolutions several times slower; static ones are quick"
        if (opset := model.opset_imports.get("", 1)) < dynamic_integers.OPSET:
            return f"opset {opset} has no {dynamic_integers.QUANTIZE}; `--opset` raises it"
        reason = dynamic_integers.refusal(layer)
        if reason is not None or layer.parameter is None:
            return str(reason)
        factor = None if layer.shared else factors.get(layer.input)
        weight = layer.weight() if factor is None else layer.weight() / factor.astype(np.float64)
        signed = self.signed or isinstance(layer, Convolution)
        scales = grids.fit(weight, Grid(self.bits, signed, signed), 0, clip=self.clip)
        payload = {"levels": grids.quantize(weight, scales), "scale": scales.scale, "zero": scales.zero_point}
        payload |= {} if factor is None else {"factor": factor}
        group = (layer, *dynamic_integers.twins(layer))
        alone = len(group) == len(layer.shared) + 1
        added = [array for array in payload.values() if array.any()]
        gone = [layer.parameter] if alone else []
        if (along := windows.sliding(model, layer)) is not None:
            added.append(windows.added(along))
        for one in group:
            bias = dynamic_integers.bias_of(one, dynamic_integers.spread(model, one))
            if isinstance(bias, np.ndarray) and one.bias_parameter is not None:
                added.append(bias)
                gone += [] if one.bias_parameter.others(one.nodes[-1]) else [one.bias_parameter]
        claims = frozenset(str(node.name) for one in group for node in one.nodes)
        savings = dynamic_integers.saved(gone, added)
        if alone and savings.bytes <= 0:
            return "its integers and their scales take no fewer bytes"
        option = self._option + (", balanced" if factor is not None else "")
        return Edit(catalog.spec(self), name, option, claims, savings, payload, (str(layer.node.name),))

    def _cell(self, model: oir.Model, node: oir.Node) -> Edit | str:
        if not self.recurrent:
            return "the options leave recurrent layers out"
        cell = dynamic_lstm.find_lstm(node)
        if isinstance(cell, str):
            return cell
        fitted = [grids.fit(rows, Grid(self.bits), 0, clip=self.clip) for rows in cell.weights()]
        levels = [grids.quantize(rows, one) for rows, one in zip(cell.weights(), fitted, strict=True)]
        payload = dynamic_lstm.stored(cell, levels, fitted)
        gone = [one for one in cell.parameters if not one.others(node)]
        name = str(node.name)
        return Edit(
            catalog.spec(self),
            name,
            self._option,
            frozenset({name}),
            dynamic_integers.saved(gone, payload.values()),
            payload,
            (name,),
        )

    @property
    def _option(self) -> str:
        return f"{'int' if self.signed else 'uint'}{self.bits}, inputs in each run"

    def apply(self, model: oir.Model, edits: Sequence[Edit], outcome: Outcome) -> None:
        """See the class of passes."""
        nodes = {node.name: node for node in walk(model)}
        for edit in edits:
            node = nodes[edit.anchors[0]]
            if not outcome.take(node):
                return
            cell = dynamic_lstm.find_lstm(node)
            if not isinstance(cell, str):
                outcome.errors[edit.key] = dynamic_lstm.write(model, cell, edit.payload)
                continue
            layer = found(node)
            outcome.errors[edit.key] = dynamic_integers.error(layer, edit.payload)
            dynamic_integers.write(model, (layer, *dynamic_integers.twins(layer)), edit.payload)
        if any("factor" in edit.payload for edit in edits):
            dynamic_integers.absorb(model)
