"""Which weights of a model can be put back to what training started from, and what that is."""

from __future__ import annotations

import zlib
from dataclasses import dataclass, field
from math import prod

import numpy as np
import onnx_ir as oir

from burnish.ir import edit, match, weights
from burnish.ir.views.convolution import Convolution
from burnish.ir.views.parameter import Parameter, find_parameter
from burnish.ir.walk import is_op
from burnish.passes.layers import Layer, layers
from burnish.passes.pipeline import Pipeline


@dataclass(frozen=True)
class Tensor:
    """One tensor of a layer: drawn uniformly between -bound and bound, or all `constant`."""

    value: oir.Value
    bound: float = 0.0
    constant: float | None = None

    def drawn(self, rng: np.random.Generator) -> np.ndarray:
        """The tensor as training would start with it, in the model's dtype and shape."""
        held = self.value.const_value
        assert held is not None
        shape = tuple(held.shape.numpy())
        if self.constant is not None:
            return np.full(shape, self.constant).astype(held.dtype.numpy())
        return rng.uniform(-self.bound, self.bound, shape).astype(held.dtype.numpy())

    def trained(self) -> np.ndarray:
        """The tensor as it is."""
        held = self.value.const_value
        assert held is not None
        return held.numpy()


@dataclass
class Part:
    """A layer whose weights can be reset, all layers that share its matrix together.

    Attributes:
        name: of the first of the layers.
        operator: its operator.
        tensors: its matrix, bias or statistics.
        users: how many nodes read its matrix.
    """

    name: str
    operator: str
    tensors: list[Tensor]
    users: int = 1

    @property
    def parameters(self) -> int:
        """Elements of all its tensors."""
        return sum(tensor.trained().size for tensor in self.tensors)

    def drawn(self, seed: int, trial: int) -> dict[str, np.ndarray]:
        """The tensors as training would start with them, by name; the same for the same seed, trial and layer."""
        rng = np.random.default_rng((seed, trial, zlib.crc32(self.name.encode())))
        return {str(tensor.value.name): tensor.drawn(rng) for tensor in self.tensors}

    def trained(self) -> dict[str, np.ndarray]:
        """The tensors as they are, by name."""
        return {str(tensor.value.name): tensor.trained() for tensor in self.tensors}


@dataclass
class Resettable:
    """A model whose layers' weights are also inputs, with themselves as the default.

    Attributes:
        model: a copy of the model; whatever runs it takes other weights as further inputs, and needs no new session.
        parts: what can be reset, in the order of the nodes.
        skipped: the layers that cannot, by name, with the reason.
    """

    model: oir.Model
    parts: list[Part] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)


def resettable(model: oir.Model) -> Resettable:
    """A copy of a model in which the weights of linear layers, convolutions and batch norms can be exchanged.

    Training starts, as in torch, with matrices and biases that are uniform within 1 / √fan_in, and with batch norms
    that change nothing. Functions are inlined and constants lifted first. A matrix that several layers share is one
    part. A vector (a bias, a gain) that several share is not, since exporters share equal vectors that training would
    not: each layer gets its own.

    Args:
        model: left untouched; its weights are shared with the copy.
    """
    copy = Pipeline(["inline-functions", "lift-constants"]).rewrite(model).model
    copy.ir_version = max(copy.ir_version, 4)  # before it, every initializer was an input already
    found = Resettable(copy)
    parts: dict[int, Part] = {}
    matrices = {id(layer.node): (name, layer) for name, layer in layers(copy).items()}
    for node in [node for graph in (copy.graph, *copy.graph.subgraphs()) for node in graph]:
        if id(node) in matrices:
            _add_layer(found, parts, *matrices[id(node)])
        elif is_op(node, "BatchNormalization"):
            _add_norm(found, node)
    for value in list({id(t.value): t.value for part in found.parts for t in part.tensors}.values()):
        copy.graph.inputs.append(value)
    return found


def _add_layer(found: Resettable, parts: dict[int, Part], name: str, layer: Layer) -> None:
    parameter = layer.parameter
    reason = "its weight is held by a MatMulNBits" if parameter is None else _unfit(found.model, parameter)
    if parameter is None or reason is not None:
        found.skipped[name] = str(reason)
        return
    fan_in = prod(layer.weight().shape[1:])
    if isinstance(layer, Convolution) and layer.transposed:
        fan_in = prod(parameter.shape[1:])  # torch takes it from the stored [in, out / groups, *kernel]
    bound = 1 / max(fan_in, 1) ** 0.5
    alpha = abs(float(match.attribute(layer.node, "alpha", 1.0))) if is_op(layer.node, "Gemm") else 1.0
    matrix = Tensor(parameter.source, bound / (alpha or 1.0))
    part = parts.get(id(parameter.source))
    if part is None:
        part = parts[id(parameter.source)] = Part(name, layer.node.op_type, [matrix], 1 + len(layer.shared))
        found.parts.append(part)
    if layer.bias_parameter is not None:
        node = layer.nodes[-1]
        index = list(node.inputs).index(layer.bias_parameter.value)
        own = _own_vector(found, name, node, index, layer.bias_parameter)
        if own is not None:
            beta = abs(float(match.attribute(node, "beta", 1.0))) if is_op(node, "Gemm") else 1.0
            part.tensors.append(Tensor(own, bound / (beta or 1.0)))


def _add_norm(found: Resettable, node: oir.Node) -> None:
    name = str(node.name or node.outputs[0].name)
    if match.attribute(node, "training_mode", 0):
        found.skipped[name] = "it takes its statistics from its input"
        return
    tensors = []
    for index, constant in ((1, 1.0), (2, 0.0), (3, 0.0), (4, 1.0)):
        parameter = find_parameter(match.input_of(node, index))
        if parameter is None or (reason := _unfit(found.model, parameter)) is not None:
            found.skipped[name] = "its statistics are computed" if parameter is None else str(reason)
            return
        own = _own_vector(found, name, node, index, parameter)
        if own is None:
            return
        tensors.append(Tensor(own, constant=constant))
    found.parts.append(Part(name, "BatchNormalization", tensors))


def _unfit(model: oir.Model, parameter: Parameter) -> str | None:
    """Why a parameter cannot be exchanged; None when it can."""
    tensor = weights.tensor_of(parameter.source)
    if parameter.quantized or tensor is None or not tensor.dtype.is_floating_point():
        return "its weight is quantized"
    return None if parameter.source.graph is model.graph else "its weight is inside a sub-graph"


def _own_vector(found: Resettable, name: str, node: oir.Node, index: int, parameter: Parameter) -> oir.Value | None:
    """The initializer of a vector, a copy of it where something else reads it too; None (and said) when impossible."""
    if not parameter.others(node) and list(node.inputs).count(parameter.value) == 1:
        return parameter.source
    tensor = weights.tensor_of(parameter.source)
    if parameter.steps or tensor is None:
        found.skipped[f"{name}, {parameter.source.name}"] = "other nodes read it too"
        return None
    value = edit.add_constant(found.model, str(parameter.source.name), oir.Tensor(tensor.numpy(), dtype=tensor.dtype))
    edit.set_input(node, index, value)
    return value
