"""An operator that the table lacks, run by ONNX Runtime: it computes, but no gradient passes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx_ir as oir
import torch
from torch import nn

from burnish.backends.fx.bridge import to_numpy, to_torch
from burnish.backends.fx.values import Value, is_host, tensor
from burnish.ir.errors import BurnishError, InputError

HOW_TO_ADD = (
    "add it as a function under `@operator(...)` in burnish/backends/fx/operators; "
    "the docstring of burnish.backends.fx.registry says how"
)


class FallbackWarning(UserWarning):
    """A node is run by ONNX Runtime instead of torch."""


class OrtCall(nn.Module):
    """One node in ONNX Runtime.

    Args:
        node: the serialized `NodeProto`, its inputs called `i0`, `i1`, ... where they are given, its outputs `o0`, ...
        constants: serialized `TensorProto`s of those inputs that are constants of the model.
        opsets: the opset of every domain.
        outputs: which outputs are wanted.
        place: how messages name the node.
    """

    def __init__(
        self, node: bytes, constants: Sequence[bytes], opsets: dict[str, int], outputs: Sequence[str], place: str
    ) -> None:
        super().__init__()
        self.node, self.constants, self.opsets = node, list(constants), dict(opsets)
        self.outputs, self.place = list(outputs), place
        self._sessions: dict[tuple[str, ...], Any] = {}

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_sessions": {}}

    def __deepcopy__(self, memo: dict[int, Any]) -> OrtCall:
        return OrtCall(self.node, self.constants, self.opsets, self.outputs, self.place)

    def forward(self, names: list[str], values: tuple[Value, ...]) -> tuple[Value, ...]:
        """The outputs for the computed inputs `values`, called `names`."""
        found: tuple[Value, ...] = _call(self, names, [tensor(v) if is_host(v) else v for v in values])
        return found

    def session(self, arrays: dict[str, np.ndarray]) -> Any:
        """A session for inputs of these dtypes."""
        import onnx

        from burnish.backends.ort.session import refusal, runtime

        dtypes = {n: oir.DataType.STRING if a.dtype.kind in "OSU" else oir.DataType.from_numpy(a.dtype)
                  for n, a in arrays.items()}  # fmt: skip
        key = tuple(f"{n}:{d}" for n, d in dtypes.items())
        if key not in self._sessions:
            node = onnx.NodeProto.FromString(self.node)
            inputs = [onnx.helper.make_tensor_value_info(n, d.value, None) for n, d in dtypes.items()]
            outputs = [onnx.ValueInfoProto(name=name) for name in self.outputs]
            held = [onnx.TensorProto.FromString(c) for c in self.constants]
            graph = onnx.helper.make_graph([node], "node", inputs, outputs, held)
            opsets = [onnx.helper.make_opsetid(d, v) for d, v in self.opsets.items()]
            model = onnx.helper.make_model(graph, opset_imports=opsets, ir_version=10)
            ort = runtime()
            options = ort.SessionOptions()
            options.intra_op_num_threads = 1
            options.log_severity_level = 4
            try:
                self._sessions[key] = ort.InferenceSession(
                    model.SerializeToString(), options, providers=["CPUExecutionProvider"]
                )
            except Exception as error:
                found = refusal(error, "neither torch nor ONNX Runtime knows it")
                raise InputError(found.cause, place=self.place, hint=HOW_TO_ADD) from error
        return self._sessions[key]


class _Opaque(torch.autograd.Function):
    """A step through which no gradient passes, and that says so when one should."""

    @staticmethod
    def forward(context: Any, call: OrtCall, names: list[str], *values: torch.Tensor) -> tuple[torch.Tensor, ...]:
        context.place = call.place
        return tuple(_execute(call, names, list(values)))

    @staticmethod
    def backward(context: Any, *gradients: torch.Tensor) -> Any:
        raise BurnishError(
            "a gradient should pass through a node that ONNX Runtime runs", place=context.place, hint=HOW_TO_ADD
        )


def _run(call: OrtCall, names: list[str], values: list[Any]) -> tuple[Value, ...]:
    tensors = [v for v in values if isinstance(v, torch.Tensor)]
    if len(tensors) == len(values) and torch.is_grad_enabled() and any(v.requires_grad for v in tensors):
        found: tuple[Value, ...] = _Opaque.apply(call, names, *values)
        return found
    return tuple(_execute(call, names, values))


_call = torch.compiler.disable(_run)
"""Compilation leaves the node out: it is no torch code."""


def _execute(call: OrtCall, names: list[str], values: list[Any]) -> list[Value]:
    from burnish.backends.ort.session import refusal

    arrays = {n: to_numpy(v) if isinstance(v, torch.Tensor) else v for n, v in zip(names, values, strict=True)}
    device = next((v.device for v in values if isinstance(v, torch.Tensor) and v.device.type != "cpu"), None)
    session = call.session(arrays)
    try:
        found = session.run(call.outputs, arrays)
    except Exception as error:
        raise InputError(refusal(error, "ONNX Runtime refuses the inputs").cause, place=call.place) from error
    made: list[Value] = []
    for array in found:
        if array.dtype.kind in "OSU":
            made.append(array)
            continue
        result = to_torch(array, oir.DataType.from_numpy(array.dtype))
        made.append(result if result is None or device is None else result.to(device))
    return made
