"""Weights that `Gemm` transposes are stored transposed: the model computes the same, and no run transposes them."""

from __future__ import annotations

import numpy as np
import onnx_ir as oir
import pytest

pytest.importorskip("tvm")

from burnish.backends.ort.session import executor  # noqa: E402
from burnish.backends.tvm import turned_weights  # noqa: E402
from burnish.backends.tvm.target import parse  # noqa: E402
from burnish.ir import edit  # noqa: E402
from burnish.tools import tuned  # noqa: E402


def model() -> oir.Model:
    """Two products with one weight, transposed in the first alone, and one of two inputs."""
    made = oir.from_onnx_text(
        '<ir_version: 10, opset_import: ["": 20]> g (float[3, 8] x) => (float[3, 8] y, float[3, 3] z) {'
        " a = Gemm<transB=1>(x, x) b = Identity(x) y = Gemm(b, x2) z = Identity(a) }".replace("x2", "x")
    )
    weight = edit.add_constant(made, "w", np.random.default_rng(0).normal(size=(8, 8)).astype(np.float32))
    plain = next(node for node in made.graph if node.outputs[0].name == "y")
    edit.set_input(plain, 1, weight)
    other = oir.Node("", "Gemm", [plain.outputs[0], weight], [oir.AttrInt64("transB", 1)], num_outputs=1)
    other.outputs[0].name, other.outputs[0].type, other.outputs[0].shape = "u", plain.outputs[0].type, oir.Shape([3, 8])
    made.graph.append(other)
    made.graph.outputs.append(other.outputs[0])
    return made


def test_only_weights_are_turned_and_the_model_computes_the_same() -> None:
    given = model()
    turned = turned_weights.with_turned_weights(given)
    assert [int("transB" in node.attributes) for node in turned.graph if node.op_type == "Gemm"] == [1, 0, 0]
    assert sorted(turned.graph.initializers) == ["w", "w.turned"] and sorted(given.graph.initializers) == ["w"]
    feeds = {"x": np.random.default_rng(1).normal(size=(3, 8)).astype(np.float32)}
    expected = executor()(given).run(feeds)
    for name, array in executor()(turned).run(feeds).items():
        np.testing.assert_allclose(array, expected[name], rtol=1e-5)
    assert turned_weights.with_turned_weights(turned) is turned


def test_no_kernel_transposes_a_weight() -> None:
    text = (
        '<ir_version: 10, opset_import: ["": 20]> g (float[3, 64] x) => (float[3, 32] y) { y = Gemm<transB=1>(x, x) }'
    )
    given = oir.from_onnx_text(text)
    edit.set_input(given.graph[0], 1, edit.add_constant(given, "w", np.ones((32, 64), np.float32)))
    names = [str(one.name_hint) for one, _ in tuned.fused(given, parse("llvm:x86-64")).functions_items()]
    assert not [name for name in names if "transpose" in name]
