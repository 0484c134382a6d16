"""Kernels of ONNX Runtime are traced back to the nodes whose work they do."""

from __future__ import annotations

import math
from collections import Counter
from pathlib import Path

import numpy as np
import onnx_ir as oir
import pytest
from networks import simple_net

from burnish.backends.ort.profiling import Profile, profile
from burnish.backends.ort.replaced import Share, add_shapes, labelled, restored, shares
from burnish.frontends import onnx_file
from burnish.ir import concrete, cost

DEMO = Path(__file__).parents[2] / "tools" / "demo"


def traced(model: oir.Model, feeds: dict[str, np.ndarray]) -> tuple[Profile, list[Share], list[oir.Node], oir.Graph]:
    copy, _ = labelled(model)
    found = profile(copy, feeds, seconds=0.05)
    return found, *shares(copy.graph, found.graph, found.kernels), copy.graph


def operators(nodes: tuple[oir.Node, ...]) -> str:
    return "+".join(node.op_type for node in nodes)


def test_every_node_is_the_work_of_one_row_or_of_none() -> None:
    for file, feeds in (
        ("digits_resnet.onnx", {"image": np.zeros((2, 1, 8, 8), np.float32)}),
        ("digits_vit.onnx", {"image": np.zeros((2, 1, 8, 8), np.float32)}),
    ):
        found, rows, left, graph = traced(onnx_file.read(DEMO / file), feeds)
        assert len(found.kernels) == len(found.graph) == sum(len(row.kernels) for row in rows)
        claimed = Counter(node for row in rows for node in row.nodes)
        assert max(claimed.values()) == 1
        assert {*claimed, *left} == {node for node in graph if node.op_type != "Constant"}


def test_a_convolution_takes_in_its_norm_the_addition_and_the_activation() -> None:
    _, rows, left, _ = traced(
        onnx_file.read(DEMO / "digits_resnet.onnx"), {"image": np.zeros((2, 1, 8, 8), np.float32)}
    )
    kinds = Counter(operators(row.nodes) for row in rows if row.nodes)
    assert not left
    assert kinds["Conv+BatchNormalization+Relu"] == 4
    assert kinds["Conv+BatchNormalization+Add+Relu"] == 3


def test_the_kernel_of_a_convolution_has_the_shape_of_the_convolution_it_stands_for(tmp_path: Path) -> None:
    simple_net(tmp_path / "net.onnx")
    _, rows, _, _ = traced(onnx_file.read(tmp_path / "net.onnx"), {"image": np.zeros((1, 3, 16, 16), np.float32)})
    checked = 0
    for row in rows:
        convs = [node for node in row.nodes if node.op_type == "Conv"]
        kernels = [one.node for one in row.kernels if one.node.op_type in ("Conv", "FusedConv")]
        assert len(convs) == len(kernels)
        for own, kernel in zip(convs, kernels, strict=True):
            mine, theirs = own.inputs[1].shape, kernel.inputs[1].shape  # the blocked layout pads channels
            assert theirs[0] >= mine[0] and list(theirs[2:]) == list(mine[2:])
            checked += 1
    assert checked == 7


def test_products_multiply_as_much_as_the_nodes_they_stand_for() -> None:
    model = onnx_file.read(DEMO / "digits_vit.onnx")
    feeds = {"image": np.zeros((2, 1, 8, 8), np.float32)}
    copy, _ = labelled(model)
    found = profile(copy, feeds, seconds=0.05)
    rows, _ = shares(copy.graph, found.graph, found.kernels)
    numbers = cost.dims_of(model, feeds)
    nodes = {node.name: node for node in concrete.concrete(copy, numbers).graph}
    written = {
        out.name: shape
        for kernel in found.kernels
        for out, (_, shape) in zip(kernel.node.outputs, kernel.written, strict=True)
    }
    checked = 0
    for row in rows:
        (kernel,) = row.kernels
        if kernel.node.op_type in ("MatMul", "FusedMatMul", "Gemm"):
            inner = written[kernel.node.inputs[0].name][-1]
            macs = sum(cost.node_cost(nodes[node.name], numbers).macs or 0 for node in row.nodes)
            assert macs == math.prod(kernel.written[0][1]) * inner
            checked += 1
    assert checked > 15


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ("a = MatMul (x, w)  y = Add (a, b)", {"MatMul+Add", "MatMul", "Add"}),
        ("h = Erf (x)  a = Identity (h)  y = Exp (a)", {"Erf", "Identity+Exp", "Exp"}),
        ("a = Shape (x)  s = Abs (x)  y = Reshape (s, a)", {"Abs", "Shape", "Shape+Reshape", "Reshape"}),
        ("y = If (c) <then_branch = t () => (p) { p = Exp (x) }, else_branch = e () => (q) { q = Abs (x) }>", {"If"}),
    ],
)
def test_small_graphs(body: str, expected: set[str]) -> None:
    model = oir.from_onnx_text(f"""<ir_version: 10, opset_import: ["": 20]>
      g (float[N, 4] x, bool c) => (float[N, 4] y) <float[4, 4] w = {{1,0,0,0,0,1,0,0,0,0,1,0,0,0,0,1}},
        float[4] b = {{1, 2, 3, 4}}> {{ {body} }}""")
    _, rows, left, graph = traced(model, {"x": np.ones((2, 4), np.float32), "c": np.array(True)})
    assert {operators(row.nodes) for row in rows if row.nodes} <= expected
    assert sum(len(row.nodes) for row in rows) + len(left) == len(graph)
    assert all(row.seconds > 0 for row in rows)


def test_labels_are_unique_and_keep_the_interface() -> None:
    model = onnx_file.read(DEMO / "digits_vit.onnx")
    copy, names = labelled(model)
    assert [value.name for value in copy.graph.outputs] == [value.name for value in model.graph.outputs]
    old = [name for label, name in names.items() if label.startswith("burnish.node.")]
    assert sorted(old) == sorted(node.name or "" for node in model.graph)
    first = copy.graph[0]
    said = restored(f"{first.name} and {first.outputs[0].name} of none", names)
    assert said == f"{model.graph[0].name} and {model.graph[0].outputs[0].name} of none"
    values = [value.name for node in copy.graph for value in node.outputs]
    assert len(values) == len(set(values))


def test_shapes_that_nobody_can_infer_are_taken_from_the_run() -> None:
    model = oir.from_onnx_text("""<ir_version: 10, opset_import: ["": 20, "com.microsoft": 1]>
      g (float[N, 4] x) => (float[N, M] y) <float[4, 3] w = {1,0,0,0,0,1,0,0,0,0,1,0}, float[3] b = {1, 2, 3}> {
        a = MatMul (x, w)  c = com.microsoft.BiasGelu (a, b)  y = Relu (c)
      }""")
    copy, _ = labelled(model)
    found = profile(copy, {"x": np.ones((2, 4), np.float32)}, seconds=0.01)
    assert add_shapes(copy.graph, found.kernels)
    assert [list(node.outputs[0].shape or ()) for node in copy.graph] == [[2, 3]] * 3
    assert not add_shapes(copy.graph, found.kernels)
