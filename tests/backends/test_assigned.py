"""The kernels that ONNX Runtime gives to products, found again in the graph that it writes."""

from __future__ import annotations

import random
from pathlib import Path

import onnx
import onnx_ir as oir
import pytest
from golden import name_nodes, parse_graph

from burnish.backends.ort.assigned import UNKNOWN, assigned
from burnish.frontends import onnx_file
from burnish.ir import edit
from burnish.ir.walk import walk
from burnish.passes import catalog, lossy, recipes
from burnish.passes.base import Outcome
from burnish.passes.lossy import LossyPass
from burnish.passes.pipeline import Pipeline

DEMO = Path(__file__).resolve().parents[2] / "tools" / "demo"


def parsed(source: str) -> oir.Model:
    model = oir.from_proto(onnx.shape_inference.infer_shapes(parse_graph(source)))
    name_nodes(model)
    return model


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_quantized_layers_are_told_from_those_beside_them(seed: int) -> None:
    read = onnx_file.read(DEMO / "digits_vit.onnx")
    model = Pipeline(recipes.named("normal-form", "ort-cpu", None)).rewrite(read).model
    edit.name_nodes(model)
    one = catalog.make("quantize-dynamic")
    assert isinstance(one, LossyPass)
    edits = one.asked(model, Outcome(""))
    chosen = random.Random(seed).sample(edits, len(edits) // 2)
    after, _ = lossy.apply(model, chosen, [one])
    edit.name_nodes(after)
    found = assigned(after)
    assert UNKNOWN not in found.values()
    integers = {"DynamicQuantizeMatMul", "MatMulIntegerToFloat"}
    for node in walk(after):
        if node.name in found:
            assert (found[node.name] in integers) == (node.op_type == "MatMulInteger")
    assert sum(kernel in integers for kernel in found.values()) == len(chosen)


def test_convolutions_are_found_behind_another_layout_and_with_what_is_joined_to_them() -> None:
    model = onnx_file.read(DEMO / "digits_resnet.onnx")
    edit.name_nodes(model)
    found = assigned(model)
    products = [str(node.name) for node in walk(model, "Conv", "Gemm")]
    assert list(found) == products
    assert set(found.values()) == {"Conv (float32)", "Gemm (float32)"}


def test_what_is_computed_beforehand_has_no_kernel_and_halves_are_computed_in_float32_on_a_cpu() -> None:
    model = parsed("""
g (float16[N, 8] x) => (float16[N, 8] y, float[4, 8] c) <float16[8, 8] w, float[4, 8] a, float[8, 8] b> {
  y = MatMul (x, w)
  c = MatMul (a, b)
}""")
    assert assigned(model) == {"MatMul_0": "MatMul (float32)", "MatMul_1": UNKNOWN}


def test_branches_are_looked_into_and_the_model_stays_as_it_is() -> None:
    model = parsed("""
g (bool[1] up, float[N, 16] x) => (float[N, 16] y) <float[16, 16] w, float[16] b> {
  y = If (up) <
    then_branch = t () => (float[N, 16] a) { p = MatMul (x, w) q = Add (p, b) a = Relu (q) },
    else_branch = e () => (float[N, 16] n) { n = Neg (x) }
  >
}""")
    before = oir.to_proto(model).SerializeToString()
    assert list(assigned(model).values()) == ["FusedGemm (float32)"]
    assert oir.to_proto(model).SerializeToString() == before


def test_the_dtype_of_a_choice_is_that_of_what_is_chosen() -> None:
    model = parsed("""
g (float[N, 16] x, bool[N, 16] c, float[N, 16] z) => (float[N, 16] y) <float[16, 16] w> {
  t = Where (c, x, z)
  y = MatMul (t, w)
}""")
    assert assigned(model) == {"MatMul_1": "MatMul (float32)"}


def test_lookups_in_tables_are_found_and_those_of_sizes_are_not() -> None:
    model = parsed("""
g (int64[N] ids, float[M, 16] x) => (float[N, 16] y, int64[K] n) <float16[9, 16] table, int64[1] first = {0}> {
  r = Gather (table, ids)
  y = Cast <to = 1> (r)
  s = Shape (x)
  n = Gather (s, first)
}""")
    assert assigned(model) == {"Gather_0": "Gather (float16)"}
