"""Write normalizations that exporters spell out as arithmetic as one operator."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal, NamedTuple

import numpy as np
import onnx_ir as oir

from burnish.ir import edit, match
from burnish.ir.views.norm import Norm, find_norm
from burnish.ir.views.parameter import Parameter
from burnish.ir.views.spelled_norm import near_miss
from burnish.ir.walk import walk
from burnish.passes.base import ExactPass, Outcome


class Operator(NamedTuple):
    """What to write: the operator, the shapes of gain and bias (None: it has no bias), and the attributes."""

    name: str
    gain: tuple[int, ...]
    bias: tuple[int, ...] | None
    attributes: dict[str, Any]
    bias_is_optional: bool = False


@dataclass(frozen=True)
class FuseNorm(ExactPass):
    """Write spelled-out layer, RMS, instance and group norms as one operator where the target has it.

    Attributes:
        target: `onnx` writes what the model's opset has (LayerNormalization from 17, RMSNormalization from 23,
            GroupNormalization from 21); `ort-cpu` and `ort-cuda` also ONNX Runtime's SimplifiedLayerNormalization, and
            LayerNormalization in every opset.
    """

    target: Literal["onnx", "ort-cpu", "ort-cuda"] = "onnx"
    needs: ClassVar[tuple[str, ...]] = ("inlined",)

    def rewrite(self, model: oir.Model, outcome: Outcome) -> None:
        """Rewrite `model` in place."""
        opset = model.opset_imports.get("", 0)
        for node in walk(model, "Sqrt", "Pow", "InstanceNormalization"):
            norm = find_norm(node) if node.graph is not None else None
            if norm is None:
                if node.graph is not None and (reason := near_miss(node)):
                    outcome.skip(node, reason, matched=False)
                continue
            if norm.is_one_node:
                continue
            written = _kept_whole(norm) or self._operator(norm, opset)
            if isinstance(written, str):
                outcome.skip(node, written)
                continue
            if not outcome.take(node):
                return
            fused = edit.make(written.name, _inputs(model, norm, written), written.attributes, like=norm.nodes)
            edit.replace_node(norm.nodes[-1], fused)

    def _operator(self, norm: Norm, opset: int) -> Operator | str:
        """The operator to write, or why there is none."""
        if norm.kind == "group":
            return self._group(norm, opset)
        dtype = norm.input.dtype
        if norm.compute_dtype == oir.DataType.DOUBLE or (self.target == "ort-cpu" and dtype == oir.DataType.BFLOAT16):
            return f"no operator takes the statistics of {_shown(dtype)} in {_shown(norm.compute_dtype or dtype)}"
        attributes = {"epsilon": norm.epsilon}
        if dtype == oir.DataType.DOUBLE:
            attributes["stash_type"] = int(dtype)
        rank, channels = match.rank(norm.input), match.dim(norm.input, 1)
        plain = norm.scale is None and norm.bias is None
        if norm.kind == "layer" and plain and len(norm.axes) > 1 and rank == len(norm.axes) + 2 and channels:
            return Operator("InstanceNormalization", (channels,), (channels,), {"epsilon": norm.epsilon})
        sizes = [match.dim(norm.input, axis) for axis in norm.axes]
        shape = tuple(size for size in sizes if size is not None)
        if len(shape) < len(sizes):
            return "the size of what it normalizes is not known, and so not that of the gain"
        attributes["axis"] = norm.axes[0]
        name, first = ("LayerNormalization", 17) if norm.kind == "layer" else ("RMSNormalization", 23)
        if opset < first and self.target == "onnx":
            return f"opset {first} is the first with {name}; raise it with `--opset {first}`"
        if norm.kind == "layer":
            return Operator(name, shape, shape, attributes, bias_is_optional=True)
        return Operator(name if opset >= first else "SimplifiedLayerNormalization", shape, None, attributes)

    def _group(self, norm: Norm, opset: int) -> Operator | str:
        if self.target == "ort-cpu":
            return "ONNX Runtime has no CPU kernel for GroupNormalization and spells it out again"
        if opset < 21:
            return "opset 21 is the first with a gain per channel in GroupNormalization; raise it with `--opset 21`"
        shape = (match.dim(norm.input, 1) or 0,)
        return Operator("GroupNormalization", shape, shape, {"epsilon": norm.epsilon, "num_groups": norm.groups})


def _shown(dtype: oir.DataType | None) -> str:
    return dtype.name.lower() if dtype is not None else "an unknown type"


def _kept_whole(norm: Norm) -> str | None:
    """Why one operator would not replace all of it."""
    if norm.read_only:
        return norm.read_only
    if norm.inner_output is not None:
        return "an inner value is an output of the graph"
    reader = norm.outside_reader
    return None if reader is None else f"{match.describe(reader)} reads an inner value"


def _inputs(model: oir.Model, norm: Norm, written: Operator) -> list[oir.Value | None]:
    inputs: list[oir.Value | None] = [norm.input, _constant(model, norm, norm.scale, written.gain, 1.0)]
    if written.bias is not None and (norm.bias is not None or not written.bias_is_optional):
        inputs.append(_constant(model, norm, norm.bias, written.bias, 0.0))
    return inputs


def _constant(
    model: oir.Model, norm: Norm, found: Parameter | None, shape: tuple[int, ...], absent: float
) -> oir.Value:
    """The gain or bias in `shape`: the constant that is there when it has that shape, else a new one."""
    dtype = norm.input.dtype or oir.DataType.FLOAT
    if found is not None and found.shape == shape and found.dtype == dtype:
        return found.value
    name = (found.source.name if found is not None else None) or f"{norm.output.name}_{'gain' if absent else 'bias'}"
    array = np.full(shape, absent) if found is None else _fitted(found.read(), shape)
    return edit.add_rounded(model, name, array, dtype)


def _fitted(array: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    return np.broadcast_to(array.reshape(-1) if array.size == 1 else array.reshape(shape), shape).copy()
