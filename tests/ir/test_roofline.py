"""Nodes are held against the roofline, and several nodes cost together what one kernel for them moves."""

from __future__ import annotations

import onnx_ir as oir
import pytest

from burnish.ir.cost import node_cost
from burnish.ir.group_cost import group_cost
from burnish.ir.roofline import Machine, judge

MACHINE = Machine({"float32": 100e9}, 10e9, 1e-6, 2e-6)


@pytest.mark.parametrize(
    ("flops", "moved", "seconds", "dtype", "ideal", "limit"),
    [
        (10**9, 10**7, 0.0125, "float32", 0.01, "compute"),
        (10**7, 10**8, 0.0125, "float32", 0.01, "memory"),
        (10**9, 10**7, 0.1, "float32", 0.01, "kernel"),
        (10, 100, 3e-6, "float32", 1e-8, "overhead"),
        (10**9, 10**8, 0.0125, "int64", 0.01, "memory"),
    ],
)
def test_what_limits(flops: int, moved: int, seconds: float, dtype: str, ideal: float, limit: str) -> None:
    found = judge(flops, moved, seconds, dtype, MACHINE)
    assert found.ideal == pytest.approx(ideal)
    assert found.share == pytest.approx(ideal / seconds)
    assert found.limit == limit


def test_what_passes_between_the_nodes_of_a_kernel_is_not_moved() -> None:
    model = oir.from_onnx_text("""<ir_version: 10, opset_import: ["": 20]>
      g (float[8, 4] x) => (float[8, 4] y, float[8, 4] a) <float[4, 4] w = {1,0,0,0,0,1,0,0,0,0,1,0,0,0,0,1}> {
        a = MatMul (x, w)  b = Relu (a)  c = Add (b, x)  y = Exp (c)
      }""")
    for node in model.graph:
        for value in node.outputs:
            value.type, value.shape = oir.TensorType(oir.DataType.FLOAT), oir.Shape([8, 4])
    nodes = list(model.graph)
    whole = group_cost(nodes)
    assert (whole.macs, whole.operations) == (8 * 4 * 4, 3 * 32)
    assert (whole.bytes_read, whole.bytes_written) == (4 * (32 + 16), 4 * (32 + 32))
    assert group_cost(nodes[:1]) == node_cost(nodes[0])
    part = group_cost(nodes[1:3])
    assert (part.bytes_read, part.bytes_written) == (4 * (32 + 32), 4 * 32)
