"""What is proven of sizes that a model's inputs declare."""

from __future__ import annotations

import onnx_ir as oir

from burnish.ir.inference import Inference


def test_sizes_that_are_left_open_as_paddle_does_are_not_equal() -> None:
    model = oir.from_onnx_text(
        '<ir_version: 8, opset_import: ["": 17]> g (float[n, 3] x) => (float[n, 3] y) { y = Relu (x) }'
    )
    x, y = model.graph.inputs[0], model.graph.outputs[0]
    x.shape = oir.Shape([-1, 3, "?", "?"])
    found = Inference(model).shape(y)
    assert found is not None and len(set(found)) == 4 and found[1] == 3 and -1 not in found
