"""Linear layers as tensor trains."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import numpy as np
import onnx_ir as oir

from burnish.ir import match
from burnish.ir.errors import InputError
from burnish.ir.views.linear import Linear
from burnish.passes import catalog, factors, lossy, tensor_trains
from burnish.passes.base import Outcome
from burnish.passes.layers import Layer, layers
from burnish.passes.lossy import Context, Edit, LossyPass, Savings
from burnish.passes.tensor_trains import Cores


@dataclass(frozen=True)
class TensorTrain(LossyPass):
    """Write linear layers as chains of small products (tensor trains) where that is nearer to the weight than factors.

    Attributes:
        cores: how many cores a layer gets.
        share: of the layer's numbers that the cores may hold.
        force: also where the plain SVD of the same size is nearer, to begin training with.
    """

    cores: int = 2
    share: float = 0.5
    force: bool = False
    order: ClassVar[int] = 30
    needs: ClassVar[tuple[str, ...]] = ("named", "inlined", "lifted")

    def __post_init__(self) -> None:
        if self.cores < 2:
            raise InputError(f"`cores` is {self.cores}", place="tensor-train", hint="give 2 or more")
        if not 0 < self.share <= 1:
            raise InputError(f"`share` is {self.share}", place="tensor-train", hint="give a number between 0 and 1")

    def propose(self, model: oir.Model, context: Context, outcome: Outcome) -> list[Edit]:
        """See the class of passes. A payload holds the cores, float32 [rank, in, out, rank], as `0`, `1`, ..."""
        found = []
        for name, layer in layers(model).items():
            made = self._made(model, layer) if isinstance(layer, Linear) else "it is a convolution"
            if isinstance(made, str):
                outcome.skip(layer.node, made)
                continue
            claims = frozenset(str(node.name) for node in layer.nodes)
            payload = {str(index): core.astype(np.float32) for index, core in enumerate(made)}
            option = "ranks " + ", ".join(str(core.shape[3]) for core in made[:-1])
            anchors = (str(layer.node.name),)
            edit = Edit(catalog.spec(self), name, option, claims, Savings(), payload, anchors)
            savings = lossy.saved(model, lossy.apply(model, [edit], [self])[0], context.dims)
            if savings.parameters > 0:
                found.append(Edit(edit.spec, name, option, claims, savings, payload, anchors))
            else:
                outcome.skip(layer.node, "the cores and what places them hold no fewer numbers")
        return found

    def _made(self, model: oir.Model, layer: Linear) -> Cores | str:
        """The cores of a layer, or why it gets none."""
        reason = factors.refusal(model, layer)
        if reason is not None:
            return reason
        if layer.input_axis != -1 or not match.rank(layer.input):
            return "its features are not the last of several axes"
        weight = layer.weight().T
        inputs, outputs = (tensor_trains.modes(size, self.cores) for size in weight.shape)
        if inputs is None or outputs is None:
            return f"{weight.shape[0]} x {weight.shape[1]} is no product of {self.cores} sizes each"
        cores = tensor_trains.within(weight, inputs, outputs, self.share * weight.size)
        if cores is None:
            return "even cores of rank 1 hold more numbers"
        size = max(float(np.linalg.norm(weight)), np.finfo(float).tiny)
        apart = float(np.linalg.norm(tensor_trains.compose(cores) - weight)) / size
        plain = tensor_trains.nearest_svd(weight, sum(core.size for core in cores))
        if apart >= plain and not self.force:
            return f"two factors of the same size are nearer to the weight: an error of {plain:.2f}, not {apart:.2f}"
        return cores

    def apply(self, model: oir.Model, edits: Sequence[Edit], outcome: Outcome) -> None:
        """See the class of passes."""
        nodes = {node.name: node for node in model.graph}
        for edit in edits:
            layer = factors.found(nodes[edit.anchors[0]])
            assert isinstance(layer, Linear)
            if not outcome.take(layer.node):
                return
            cores = [edit.payload[str(index)].astype(np.float64) for index in range(len(edit.payload))]
            factors.write_alike(model, [layer], partial(_write, model, cores))


def _write(model: oir.Model, cores: Cores, layers: Sequence[Layer]) -> None:
    for layer in layers:
        assert isinstance(layer, Linear)
        tensor_trains.write(model, layer, cores)
