"""The same small network written in every opset from 9 to 25 is read, optimized, raised and still right."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from laws import OrtRunner
from onnx import helper

from burnish.backends import onnx_writer
from burnish.frontends import onnx_file
from burnish.ir import opsets
from burnish.passes import recipes, verify
from burnish.passes.exact.raise_opset import IR_VERSIONS
from burnish.passes.pipeline import Pipeline


class Network:
    """Nodes and weights; arguments that older opsets take as attributes are written in the form of the opset."""

    def __init__(self, opset: int) -> None:
        self.opset = opset
        self.random = np.random.default_rng(0)
        self.nodes: list[onnx.NodeProto] = []
        self.weights: list[onnx.TensorProto] = []

    def weight(self, *shape: int) -> str:
        """Random weights in (0.5, 1.5)."""
        return self.constant(self.random.uniform(0.5, 1.5, shape).astype(np.float32))

    def constant(self, array: np.ndarray) -> str:
        """An initializer."""
        self.weights.append(onnx.numpy_helper.from_array(array, f"w{len(self.weights)}"))
        return self.weights[-1].name

    def add(self, op: str, inputs: Sequence[str], since: int = 0, **given: Any) -> str:
        """A node; from opset `since` on, `given` are inputs in this order, before they are attributes."""
        out, attributes = f"v{len(self.nodes)}", dict(given)
        inputs = list(inputs)
        if since and self.opset >= since:
            arrays = [np.asarray(v, np.float32 if isinstance(v, float) else np.int64) for v in given.values()]
            inputs, attributes = [*inputs, *map(self.constant, arrays)], {}
        self.nodes.append(helper.make_node(op, inputs, [out], **attributes))
        return out


def network(opset: int) -> onnx.ModelProto:
    """Conv, BatchNormalization, Relu, Pad, Slice, Clip, Reduce, Flatten, Gemm, Softmax, Unsqueeze and Squeeze."""
    net = Network(opset)
    x = net.add("Conv", ["x", net.weight(4, 3, 3, 3)])
    x = net.add("BatchNormalization", [x, *(net.weight(4) for _ in range(4))])
    x = net.add("Relu", [x])
    x = net.add("Pad", [x], 11, pads=[0, 0, 1, 0, 0, 0, 0, 2], value=0.5)
    x = net.add("Slice", [x], 10, starts=[1, 0], ends=[2**31 - 1, -1], axes=[2, 3])
    x = net.add("Clip", [x], 11, min=0.25, max=6.0)
    y = net.add("ReduceMean", [x], 18, axes=[2])
    z = net.add("ReduceSum", [x], 13, axes=[2])
    z = net.add("Dropout", [z])
    x = net.add("Flatten", [net.add("Mul", [y, z])])
    x = net.add("Gemm", [x, net.weight(5, 28), net.weight(5)], transB=1)
    x = net.add("Softmax", [x], axis=1)
    x = net.add("Squeeze", [net.add("Unsqueeze", [x], 13, axes=[1])], 13, axes=[1])
    x = net.add("Cast", [net.add("Identity", [x])], to=onnx.TensorProto.FLOAT)
    inputs = [helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, ["N", 3, 8, 8])]
    outputs = [helper.make_tensor_value_info(x, onnx.TensorProto.FLOAT, ["N", 5])]
    graph = helper.make_graph(net.nodes, "network", inputs, outputs, initializer=net.weights)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=IR_VERSIONS[opset])


@pytest.mark.parametrize("opset", sorted(IR_VERSIONS))
def test_every_opset_is_optimized_and_raised(opset: int, tmp_path: Path) -> None:
    onnx.save(network(opset), tmp_path / "model.onnx")
    feeds = {"x": np.random.default_rng(1).standard_normal((2, 3, 8, 8)).astype(np.float32)}
    (expected,) = OrtRunner(onnx_file.read(tmp_path / "model.onnx"), False).run(feeds).values()
    for to in (None, opsets.NEWEST):
        passes = recipes.named("default", "onnx", to)
        after = Pipeline(passes).rewrite(onnx_file.read(tmp_path / "model.onnx"), check=True).model
        onnx_writer.write(after, tmp_path / "result.onnx")
        written = onnx.load(tmp_path / "result.onnx")
        onnx.checker.check_model(written, full_check=True)
        assert written.opset_import[0].version == (to or opset)
        ops = [node.op_type for node in written.graph.node]
        assert not {"BatchNormalization", "Identity", "Dropout", "Cast", "Squeeze", "Unsqueeze"} & set(ops)
        (found,) = OrtRunner(onnx_file.read(tmp_path / "result.onnx"), True).run(feeds).values()
        assert verify.relative_error(found, expected) < verify.ROUNDING["float32"]


def test_every_opset_is_covered() -> None:
    assert sorted(IR_VERSIONS) == list(range(9, opsets.NEWEST + 1))
