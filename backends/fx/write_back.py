"""Trained weights back into the model they came from."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnx_ir as oir
import torch
from torch import nn

from burnish.backends.fx import bridge
from burnish.backends.fx.bridge import Origin
from burnish.ir import weights
from burnish.ir.errors import InputError
from burnish.ir.walk import graphs

_REAL = (oir.DataType.FLOAT, oir.DataType.FLOAT16, oir.DataType.BFLOAT16, oir.DataType.DOUBLE)


def write_back(module: nn.Module, model: oir.Model) -> list[str]:
    """Put the parameters and float buffers of a module into the initializers and Constant nodes they came from.

    Nodes, names, dtypes and shapes stay; a weight whose numbers did not change keeps its very tensor, and what is
    written is a copy, so that training can go on. A module that was cast to another dtype is cast back.

    Args:
        module: made by `to_graph_module` from `model`, or from another copy of the same model.
        model: changed in place.

    Returns:
        The names of the values that were written.

    Raises:
        InputError: the module belongs to another model, or a weight has another shape by now; nothing is written then.
    """
    ties = bridge.bridge_of(module)
    if ties.fingerprint != bridge.fingerprint(model):
        raise InputError(
            "the module was made from another model",
            hint="write into the model, or a copy of the model, that the module was made from, before it is rewritten",
        )
    values = values_of(model, ties.weights)
    state = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    changed: list[tuple[oir.Value, oir.TensorProtocol]] = []
    for path, value in values.items():
        tensor = weights.tensor_of(value) or value.const_value
        if tensor is None or tensor.dtype not in _REAL:
            continue
        if path not in state:
            raise InputError(f"the module has lost `{path}`", hint="give the module that `to_graph_module` made")
        new = state[path].detach()
        if tuple(new.shape) != tuple(tensor.shape.numpy()):
            raise InputError(f"`{path}` has shape {tuple(new.shape)} now, the model's is {tensor.shape}")
        array = _changed(new, tensor)
        if array is not None:
            changed.append((value, oir.Tensor(array, dtype=tensor.dtype, name=tensor.name)))
    for value, tensor in changed:
        store(value, tensor)
    return [str(value.name) for value, _ in changed]


def values_of(model: oir.Model, origins: Mapping[str, Origin]) -> dict[str, oir.Value]:
    """The values of the model, initializers and outputs of Constant nodes, that weights of a module come from."""
    found: dict[tuple[int, str], oir.Value] = {}
    for number, graph in enumerate(graphs(model)):
        for value in graph.initializers.values():
            found[number, str(value.name)] = value
        for node in graph:
            if node.op_type == "Constant":
                found[number, str(node.outputs[0].name)] = node.outputs[0]
    return {path: found[origin.graph, origin.name] for path, origin in origins.items()}


def _changed(new: torch.Tensor, tensor: oir.TensorProtocol) -> np.ndarray | None:
    """The new numbers in the model's dtype; None when they are the old ones, in the dtype of either side."""
    old = bridge.to_torch(tensor.numpy(), tensor.dtype)
    assert old is not None
    held = bridge.to_numpy(new)
    if bridge.to_numpy(old.to(new.dtype)).tobytes() == held.tobytes():
        return None
    return bridge.to_numpy(new.to("cpu", old.dtype))


def store(value: oir.Value, tensor: oir.TensorProtocol) -> None:
    """Let an initializer, or the output of a Constant node, hold another tensor of the same dtype and shape."""
    node = value.producer()
    if node is None:
        value.const_value = tensor
        return
    (name,) = node.attributes
    if name == "value_float":
        node.attributes[name] = oir.AttrFloat32(name, float(tensor.numpy()))
    elif name == "value_floats":
        node.attributes[name] = oir.AttrFloat32s(name, [float(x) for x in tensor.numpy()])
    else:
        node.attributes[name] = oir.AttrTensor(name, tensor)
    if value.const_value is not None:
        value.const_value = tensor
