"""Small models of one layer of every kind, and how far two models are apart."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as oir
from golden import parse_graph, prepare
from laws import OrtRunner

from burnish.ir.samples import Sample
from burnish.passes import catalog

KINDS = {
    "MatMul": "g (float[N, 7, 24] x) => (float[N, 7, 40] y) <float[24, 40] w> { y = MatMul (x, w) }",
    "MatMul and Add": "g (float[N, 7, 40] x) => (float[N, 7, 24] y) <float[40, 24] w, float[24] b> "
    "{ p = MatMul (x, w)  y = Add (b, p) }",
    "MatMul of a vector": "g (float[40] x) => (float[24] y) <float[40, 24] w> { y = MatMul (x, w) }",
    "MatMul of a thick weight": "g (float[N, 7, 40] x) => (float[N, 7, 24] y) <float[1, 40, 24] w> "
    "{ y = MatMul (x, w) }",
    "Gemm": "g (float[N, 40] x) => (float[N, 24] y) <float[40, 24] w, float[24] b> "
    "{ y = Gemm <alpha = 0.5, beta = 2.0> (x, w, b) }",
    "Gemm transposed": "g (float[40, N] x) => (float[N, 24] y) <float[24, 40] w> "
    "{ y = Gemm <transA = 1, transB = 1> (x, w) }",
    "Conv": "g (float[N, 6, 9, 9] x) => (float[N, 20, 5, 5] y) <float[20, 6, 3, 3] w, float[20] b> "
    "{ y = Conv <strides = [2, 2], pads = [1, 1, 1, 1]> (x, w, b) }",
    "Conv of one point": "g (float[N, 40, 6, 6] x) => (float[N, 20, 3, 3] y) <float[20, 40, 1, 1] w> "
    "{ y = Conv <strides = [2, 2]> (x, w) }",
    "Conv with dilation": "g (float[N, 6, 20] x) => (float[N, 24, 20] y) <float[24, 6, 3] w> "
    "{ y = Conv <dilations = [2], pads = [2, 2]> (x, w) }",
    "Conv with groups": "g (float[N, 12, 9, 9] x) => (float[N, 20, 9, 9] y) <float[20, 6, 3, 3] w, float[20] b> "
    "{ y = Conv <group = 2, pads = [1, 1, 1, 1]> (x, w, b) }",
    "three that share": "g (float[N, 7, 24] x) => (float[N, 7, 24] a, float[N, 7, 8] b, float[N, 7, 40] c) "
    "<float[24, 24] wa, float[24] ba, float[24, 8] wb, float[24, 40] wc> "
    "{ p = MatMul (x, wa)  a = Add (p, ba)  b = MatMul (x, wb)  c = MatMul (x, wc) }",
    "two Gemms that share": "g (float[24, N] x) => (float[N, 24] a, float[N, 40] b) "
    "<float[24, 24] wa, float[24] ba, float[24, 40] wb> "
    "{ a = Gemm <transA = 1> (x, wa, ba)  b = Gemm <transA = 1> (x, wb) }",
}


def model_of(source: str) -> oir.Model:
    return prepare(parse_graph(source), catalog.make("project-rank"))


def samples_of(model: oir.Model, seed: int = 0, count: int = 4, rows: int = 11) -> list[Sample]:
    """Normal numbers with a mean, correlated along every axis."""
    rng = np.random.default_rng(seed)
    found = []
    for number in range(count):
        feeds = {}
        for value in model.graph.inputs:
            assert value.shape is not None
            shape = [size if isinstance(size, int) else rows for size in value.shape]
            array = rng.standard_normal(shape)
            feeds[str(value.name)] = (array + np.roll(array, 1, -1) + 0.5).astype(np.float32)
        found.append(Sample(f"sample {number}", feeds))
    return found


def outputs(model: oir.Model, samples: Sequence[Sample]) -> list[dict[str, np.ndarray]]:
    runner = OrtRunner(model, optimize=True)
    return [runner.run(sample.feeds) for sample in samples]


def error(model: oir.Model, changed: oir.Model, samples: Sequence[Sample]) -> float:
    """Frobenius error of all outputs, relative."""
    pairs = zip(outputs(model, samples), outputs(changed, samples), strict=True)
    both = [(one[name], two[name]) for one, two in pairs for name in one]
    return float(
        np.sqrt(sum(np.square(a - b).sum() for a, b in both) / sum(np.square(a.astype(float)).sum() for a, _ in both))
    )
