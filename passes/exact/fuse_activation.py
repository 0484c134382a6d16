"""Recognise activations that exporters spell out, and write them as one operator."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import onnx_ir as oir

from burnish.ir import edit, match
from burnish.ir.views.activation import ROOTS, Activation, find_activation
from burnish.ir.walk import walk
from burnish.passes.base import ExactPass, Outcome

MICROSOFT = "com.microsoft"


@dataclass(frozen=True)
class FuseActivation(ExactPass):
    """Write spelled-out Gelu (erf and tanh), SiLU, HardSwish and Mish as one operator where the target has it.

    Attributes:
        target: `onnx` writes what the model's opset has (Gelu from 20, HardSwish from 14, Mish from 18, Swish from 24);
            `ort-cpu` and `ort-cuda` also ONNX Runtime's Gelu, FastGelu and QuickGelu.
    """

    target: Literal["onnx", "ort-cpu", "ort-cuda"] = "onnx"
    needs: ClassVar[tuple[str, ...]] = ("inlined",)

    def rewrite(self, model: oir.Model, outcome: Outcome) -> None:
        """Rewrite `model` in place."""
        opset = model.opset_imports.get("", 0)
        for node in walk(model, *ROOTS):
            found = find_activation(node)
            if found is None:
                continue
            written = _kept_whole(found) or self._operator(found, opset)
            if isinstance(written, str):
                outcome.skip(node, written)
                continue
            if not outcome.take(node):
                return
            op, domain, attributes = written
            if domain:
                model.graph.opset_imports.setdefault(domain, 1)
            fused = edit.make(op, [found.source], attributes, like=found.nodes, domain=domain)
            edit.replace_node(found.end, fused)

    def _operator(self, found: Activation, opset: int) -> tuple[str, str, dict[str, object]] | str:
        """The operator, its domain and attributes; or why there is none."""
        if found.source.dtype == oir.DataType.DOUBLE:
            return f"ONNX Runtime cannot run {found.kind} in float64"
        tanh = {"approximate": "tanh"} if found.kind == "Gelu (tanh)" else {}
        if found.kind.startswith("Gelu"):
            if opset >= 20:
                return "Gelu", "", dict(tanh)
            if self.target != "onnx":
                return ("FastGelu" if tanh else "Gelu"), MICROSOFT, {}
            return "opset 20 is the first with Gelu; raise it with `--opset 20`"
        if found.kind == "SiLU":
            if self.target != "onnx":
                return "QuickGelu", MICROSOFT, {"alpha": found.alpha}
            if opset == 24:
                return "Swish", "", {} if found.alpha == 1.0 else {"alpha": found.alpha}
            if opset < 24:
                return "opset 24 is the first with Swish; raise it with `--opset 24`"
            return "ONNX Runtime cannot run Swish in opsets after 24"
        first = {"HardSwish": 14, "Mish": 18}[found.kind]
        return (found.kind, "", {}) if opset >= first else f"opset {first} is the first with {found.kind}"


def _kept_whole(found: Activation) -> str | None:
    """Why one operator would not replace all of it."""
    if found.inner_output is not None:
        return f"an inner value of this {found.kind} is an output of the graph"
    reader = found.outside_reader
    return None if reader is None else f"{match.describe(reader)} reads an inner value of this {found.kind}"
