"""LSTMs as com.microsoft's DynamicQuantizeLSTM, which quantizes what it reads, and its own state, in each step."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import onnx_ir as oir

from burnish.ir import edit, match
from burnish.ir.views.parameter import Parameter, find_parameter
from burnish.passes.grids import Scales

_DOMAIN = "com.microsoft"
_INPUTS = 8
"""Of an LSTM: x, W, R, bias, lengths, the first hidden state and cell, and peepholes."""


@dataclass(frozen=True)
class Lstm:
    """An LSTM with constant weights.

    Attributes:
        node: the node.
        parameters: the weights of the input [directions, 4 hidden, in] and of the state [directions, 4 hidden, hidden].
    """

    node: oir.Node
    parameters: tuple[Parameter, Parameter]

    @property
    def shared(self) -> list[oir.Node]:
        """Other nodes that read the same weights."""
        return [node for one in self.parameters for node in one.others(self.node)]

    def weights(self) -> list[np.ndarray]:
        """Both weights as rows that get a scale each, float64 [directions * 4 hidden, features]."""
        return [one.read().reshape(-1, one.shape[2]) for one in self.parameters]


def find_lstm(node: oir.Node) -> Lstm | str:
    """The LSTM of a node, or in plain words why it cannot be quantized."""
    if node.op_type != "LSTM":
        return f"ONNX Runtime has no {node.op_type} of integers"
    found = [find_parameter(match.input_of(node, index)) for index in (1, 2)]
    if found[0] is None or found[1] is None:
        return "its weights are computed"
    if any(one is not None and one.quantized for one in found):
        return "its weights are quantized"
    if any(one is not None and one.dtype != oir.DataType.FLOAT for one in found):
        return "its weights are not float32"
    if match.attribute(node, "layout", 0):
        return "its batch is its first axis, which DynamicQuantizeLSTM has no word for"
    return Lstm(node, (found[0], found[1]))


def stored(lstm: Lstm, levels: list[np.ndarray], scales: list[Scales]) -> dict[str, np.ndarray]:
    """What DynamicQuantizeLSTM holds.

    Args:
        lstm: the layer.
        levels: int8, the rows of each weight.
        scales: of the rows of each weight; symmetric.

    Returns:
        `w` and `r`, int8 [directions, features, 4 hidden], `w_scale` and `r_scale`, float32, and `zero`, int8, of
        [directions, 4 hidden].
    """
    found: dict[str, np.ndarray] = {}
    for name, parameter, rows, one in zip("wr", lstm.parameters, levels, scales, strict=True):
        directions, gates, _ = parameter.shape
        found[name] = np.ascontiguousarray(rows.reshape(parameter.shape).transpose(0, 2, 1))
        found[f"{name}_scale"] = one.scale.reshape(directions, gates)
        found["zero"] = np.zeros((directions, gates), np.int8)
    return found


def write(model: oir.Model, lstm: Lstm, payload: Mapping[str, np.ndarray]) -> float:
    """Let an LSTM multiply integers: `payload` is what `stored` gives.

    Returns:
        The relative error of its weights.
    """
    lost = _error(lstm, payload)
    model.graph.opset_imports.setdefault(_DOMAIN, 1)
    stems = [one.source.name or "weight" for one in lstm.parameters]
    node = lstm.node
    given = [match.input_of(node, index) for index in range(_INPUTS)]
    for index, name, stem in zip((1, 2), "wr", stems, strict=True):
        given[index] = edit.add_constant(model, f"{stem}_levels", payload[name])
    zero = edit.add_constant(model, f"{stems[0]}_zero", payload["zero"])
    for name, stem in zip("wr", stems, strict=True):
        given += [edit.add_constant(model, f"{stem}_scale", payload[f"{name}_scale"]), zero]
    new = edit.make("DynamicQuantizeLSTM", given, like=node, domain=_DOMAIN, outputs=len(node.outputs))
    new.attributes.update({name: one for name, one in node.attributes.items() if name != "layout"})
    for old, out in zip(node.outputs, new.outputs, strict=True):
        out.type, out.shape = old.type, old.shape
        if old.name == "":
            out.name = ""
    edit.replace_node(node, new)
    return lost


def _error(lstm: Lstm, payload: Mapping[str, np.ndarray]) -> float:
    apart = whole = 0.0
    for name, exact in zip("wr", lstm.weights(), strict=True):
        levels, scale = payload[name].astype(np.float64), payload[f"{name}_scale"].astype(np.float64)
        rounded = (levels * scale[:, None]).transpose(0, 2, 1).reshape(exact.shape)
        apart += float(((rounded - exact) ** 2).sum())
        whole += float((exact**2).sum())
    return (apart / whole) ** 0.5 if whole else 0.0
