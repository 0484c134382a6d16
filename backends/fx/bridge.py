"""What ties a GraphModule to the model it was made from."""

from __future__ import annotations

import hashlib
import keyword
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx_ir as oir
import torch
from torch import fx, nn

from burnish.backends.fx.values import DTYPES, HELD
from burnish.ir.errors import InputError
from burnish.ir.walk import graphs

_KEY = "burnish"
_SAFE = re.compile(r"[A-Za-z0-9_:/\-]+")


@dataclass(frozen=True)
class Origin:
    """Where a parameter or buffer comes from: the index of the graph in `graphs(model)`, and the value's name there."""

    graph: int
    name: str


@dataclass(frozen=True)
class Bridge:
    """The ties between a module and its model.

    Attributes:
        fingerprint: of the model's structure; weights may differ.
        weights: the origin of every parameter and buffer, by its name in the module.
        inputs: the name of the placeholder of every input of the model, in order.
        outputs: the names of the model's outputs, in order.
        values: the name of the FX node that computes a value of the main graph, by the value's name.
        opaque: the operators that ONNX Runtime runs, through which no gradient passes.
    """

    fingerprint: str
    weights: Mapping[str, Origin]
    inputs: Mapping[str, str]
    outputs: tuple[str, ...]
    values: Mapping[str, str]
    opaque: tuple[str, ...] = field(default=())


def attach(module: fx.GraphModule, bridge: Bridge) -> None:
    """Keep the bridge with the module, through copies and pickles."""
    module.meta[_KEY] = bridge
    module.burnish_bridge = bridge


def bridge_of(module: nn.Module) -> Bridge:
    """The bridge of a module that `to_graph_module` made.

    Raises:
        InputError: it was not made from an ONNX model.
    """
    found = getattr(module, "meta", {}).get(_KEY) or getattr(module, "burnish_bridge", None)
    if not isinstance(found, Bridge):
        raise InputError(
            "this module was not made from an ONNX model",
            hint="make one with `burnish.backends.fx.builder.to_graph_module`; of a compiled one, give the original",
        )
    return found


def fingerprint(model: oir.Model) -> str:
    """A hash of the model's nodes, names, and the dtypes and shapes of its initializers, not of their values."""
    digest = hashlib.sha256()
    for graph in graphs(model):
        weights = [(v.name, str(t.dtype), t.shape.numpy()) for v in graph.initializers.values() if (t := v.const_value)]
        digest.update(repr(sorted(weights)).encode())
        for node in graph:
            ends = [[v.name if v is not None else None for v in side] for side in (node.inputs, node.outputs)]
            digest.update(repr((node.domain, node.op_type, ends, sorted(node.attributes))).encode())
    return digest.hexdigest()


def attribute_path(root: nn.Module, name: str) -> str:
    """The dotted path under which a weight called `name` is kept in `root`: the name itself wherever that is possible.

    The path goes into Python code that FX writes, so anything but letters, digits and `_:/-` is replaced; empty parts,
    taken names, keywords and names of module attributes are avoided by an underscore at the end.
    """
    parts = [part if _SAFE.fullmatch(part) else re.sub(r"[^A-Za-z0-9_:/\-]", "_", part) for part in name.split(".")]
    if not all(parts) or len(parts) > 64:
        parts = [re.sub(r"[^A-Za-z0-9_:/\-]", "_", name) or "weight"]
    where = root
    for i, part in enumerate(parts[:-1]):
        while not isinstance(getattr(where, part, nn.Module()), nn.Module) or part in _RESERVED:
            part += "_"
        parts[i] = part
        where = getattr(where, part, None) or nn.Module()
    last = parts[-1]
    while hasattr(where, last) or last in _RESERVED:
        last += "_"
    return ".".join([*parts[:-1], last])


_RESERVED = frozenset(
    {*dir(fx.GraphModule(nn.Module(), fx.Graph())), *keyword.kwlist, "_wrapped_call", "burnish_bridge"}
)


def register(root: nn.Module, path: str, tensor: torch.Tensor, trained: bool) -> None:
    """Put a tensor under a dotted path of `root`, as a parameter or a buffer."""
    *parents, last = path.split(".")
    where = root
    for parent in parents:
        if not hasattr(where, parent):
            where.add_module(parent, nn.Module())
        where = getattr(where, parent)
    if trained:
        where.register_parameter(last, nn.Parameter(tensor))
    else:
        where.register_buffer(last, tensor)


_BITS = {1: np.uint8, 2: np.uint16, 4: np.uint32}


def to_torch(array: np.ndarray, dtype: oir.DataType) -> torch.Tensor | None:
    """A copy of an array as a tensor; two and four bits widened to eight, None for what torch cannot hold."""
    if dtype in HELD:
        numbers = array.astype(np.float32 if dtype == oir.DataType.FLOAT4E2M1 else np.int8)
        return torch.from_numpy(numbers).to(HELD[dtype])
    kind = DTYPES.get(dtype)
    if kind is None:
        return None
    array = np.array(array, order="C")
    if array.dtype.kind in "biufc" and not (kind.is_floating_point and kind.itemsize == 1):
        return torch.from_numpy(array)
    return torch.from_numpy(array.view(_BITS[array.dtype.itemsize])).view(kind)


def to_numpy(tensor: torch.Tensor) -> np.ndarray:
    """A copy of a tensor as an array of the same dtype."""
    tensor = tensor.detach().cpu().contiguous()
    try:
        return np.array(tensor.numpy())
    except TypeError:
        dtype = next(oir.DataType(code) for code, kind in DTYPES.items() if kind == tensor.dtype)
        bits: Any = {1: torch.uint8, 2: torch.uint16}[tensor.element_size()]
        return np.array(tensor.view(bits).numpy()).view(dtype.numpy())
