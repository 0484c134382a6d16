"""Small networks to be quantized, and what ONNX Runtime is left with of them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as oir
from golden import name_nodes, parse_graph

from burnish.backends.ort.session import executor
from burnish.ir.samples import Sample
from burnish.passes import catalog, lossy
from burnish.passes.base import Outcome
from burnish.passes.lossy import Edit, LossyPass
from burnish.tools.lossy_context import context_for

RESIDUAL = """g (float[2, 6, 16, 16] x) => (float[2, 10] y)
<float[8, 6, 3, 3] w0, float[8] b0, float[8, 1, 3, 3] w1, float[8] b1, float[8, 8, 1, 1] w2, float[8] b2,
 float[16, 16, 3, 3] w3, float[16] b3, float[16, 10] w4, float[10] b4, float low = {0.0}, float six = {6.0}> {
  c0 = Conv <pads = [1, 1, 1, 1]> (x, w0, b0)
  r0 = Clip (c0, low, six)
  c1 = Conv <pads = [1, 1, 1, 1], group = 8> (r0, w1, b1)
  r1 = Relu (c1)
  c2 = Conv (r1, w2, b2)
  s = Add (c2, r0)
  r2 = Relu (s)
  m = MaxPool <kernel_shape = [2, 2], strides = [2, 2]> (r2)
  n = MaxPool <kernel_shape = [2, 2], strides = [2, 2]> (r0)
  k = Concat <axis = 1> (m, n)
  c3 = Conv <pads = [1, 1, 1, 1]> (k, w3, b3)
  r3 = Relu (c3)
  p = GlobalAveragePool (r3)
  f = Flatten (p)
  y = Gemm (f, w4, b4)
}"""

GATED = """g (float[2, 8, 12, 12] x) => (float[2, 8, 12, 12] y)
<float[8, 8, 3, 3] w0, float[8, 8, 1, 1] w1, float[8, 8, 3, 3] w2> {
  c0 = Conv <pads = [1, 1, 1, 1]> (x, w0)
  s = Sigmoid (c0)
  a = Mul (c0, s)
  p = GlobalAveragePool (a)
  g = Conv (p, w1)
  h = Sigmoid (g)
  b = Mul (a, h)
  y = Conv <pads = [1, 1, 1, 1]> (b, w2)
}"""

HARD = """g (float[2, 8, 12, 12] x) => (float[2, 8, 12, 12] y)
<float[8, 8, 3, 3] w0, float[8, 8, 1, 1] w1, float[8, 8, 3, 3] w2, float k = {1.7}, float o = {-0.3}> {
  c0 = Conv <pads = [1, 1, 1, 1]> (x, w0)
  u = HardSwish (c0)
  v = Mul (u, k)
  a = Add (v, o)
  p = GlobalAveragePool (a)
  g = Conv (p, w1)
  h = HardSigmoid <alpha = 0.2, beta = 0.6> (g)
  b = Mul (a, h)
  y = Conv <pads = [1, 1, 1, 1]> (b, w2)
}"""

ATTENTIVE = """g (float[2, 9, 32] x) => (float[2, 9, 32] y)
<float[32, 64] w0, float[64] b0, float[64, 32] w1, float[32] b1> {
  p = MatMul (x, w0)
  a = Add (p, b0)
  h = Gelu (a)
  q = MatMul (h, w1)
  c = Add (q, b1)
  y = Add (c, x)
}"""


def model_of(source: str) -> oir.Model:
    model = oir.from_proto(onnx.shape_inference.infer_shapes(parse_graph(source), strict_mode=True, data_prop=True))
    name_nodes(model)
    return model


def samples_of(model: oir.Model, count: int = 8) -> list[Sample]:
    (given,) = model.graph.inputs
    shape = [int(size) for size in given.shape]  # type: ignore[union-attr, arg-type]
    rng = np.random.default_rng(0)
    arrays = [rng.standard_normal(shape).astype(np.float32) for _ in range(count)]
    return [Sample(str(index), {str(given.name): array}) for index, array in enumerate(arrays)]


def proposed(model: oir.Model, samples: Sequence[Sample], options: str = "") -> tuple[LossyPass, list[Edit], Outcome]:
    (one,) = catalog.parse(f"quantize-static{options}")
    assert isinstance(one, LossyPass)
    outcome = Outcome("quantize-static")
    return one, one.propose(model, replace(context_for(model, samples), timed=True), outcome), outcome


def quantized(model: oir.Model, options: str = "") -> oir.Model:
    one, edits, _ = proposed(model, samples_of(model), options)
    return lossy.apply(model, edits, [one])[0]


def kernels(model: oir.Model, folder: Path) -> Counter[str]:
    """The operators that ONNX Runtime is left with after its own optimizations."""
    runner = executor(trace=folder)(model)
    runner.close()
    return Counter(node.op_type for node in onnx.load(folder / "optimized.onnx", load_external_data=False).graph.node)
