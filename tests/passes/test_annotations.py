"""Inferred types stay inside: a model that came without inner shapes is written without them, and only such a one."""

import onnx
import onnx.parser
import onnx_ir as oir
import pytest

from burnish.passes import recipes
from burnish.passes.pipeline import Pipeline

MODEL = """
<ir_version: 8, opset_import: ["": 17]>
g (float[N, 4] x) => (float[N, 4] y) { a = Relu (x)  b = Tanh (a)  y = Neg (b) }
"""


@pytest.mark.parametrize("annotated", [False, True])
def test_inner_shapes_are_written_as_they_came(annotated):
    proto = onnx.parser.parse_model(MODEL)
    if annotated:
        proto = onnx.shape_inference.infer_shapes(proto)
    run = Pipeline(recipes.named("default", "onnx", None)).rewrite(oir.from_proto(proto))
    shapes = [out.shape is not None for node in run.model.graph for out in node.outputs]
    assert shapes == [annotated, annotated, True]
