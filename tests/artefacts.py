"""Small artefacts for tests, and a change of their manifest."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as oir

import burnish

TEXT = """<ir_version: 10, opset_import: ["": 18]>
g (float[batch, seq, 8] x, int64[batch, seq] i) => (float[batch, seq, 32] y, int64[batch, seq] j) {
  a = MatMul (x, w)
  y = Relu (a)
  j = Neg (i)
}"""


def model() -> oir.Model:
    """Two inputs and outputs of two dtypes, dynamic batch and sequence, a weight of 256 elements."""
    made = oir.from_onnx_text(TEXT.replace("int64[batch, seq] i)", "int64[batch, seq] i, float[8, 32] w)"))
    weight = next(value for value in made.graph.inputs if value.name == "w")
    made.graph.inputs.remove(weight)
    weight.const_value = oir.Tensor(np.random.default_rng(0).standard_normal((8, 32)).astype(np.float32), name="w")
    made.graph.register_initializer(weight)
    return made


def write(folder: Path) -> Path:
    """The model above, compiled for this machine."""
    burnish.optimize(model(), folder, target="llvm", guard=["size"], regions="all")
    return folder


def feeds(batch: int = 2, length: int = 3) -> dict[str, np.ndarray]:
    """Inputs for it."""
    draw = np.random.default_rng(batch + length)
    x = draw.standard_normal((batch, length, 8)).astype(np.float32)
    return {"x": x, "i": draw.integers(0, 9, (batch, length))}


def expected(given: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """What it computes."""
    weight = np.random.default_rng(0).standard_normal((8, 32)).astype(np.float32)
    return {"y": np.maximum(given["x"] @ weight, 0), "j": -given["i"]}


def change(folder: Path, edit: Callable[[dict[str, Any]], object]) -> None:
    """Edit the manifest."""
    file = folder / "manifest.json"
    fields = json.loads(file.read_text())
    edit(fields)
    file.write_text(json.dumps(fields))
