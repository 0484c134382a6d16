"""What must hold of layers with weights of 4 bits and activations of 8 whose wide channels are divided first."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import onnx_ir as oir
import pytest
from golden import parse_graph, prepare
from laws import OrtRunner, make_samples
from lossy_laws import made, proposals

import burnish
from burnish.backends.ort.assigned import assigned
from burnish.ir.edit import name_nodes
from burnish.ir.errors import InputError
from burnish.ir.samples import Sample
from burnish.ir.text import fingerprint
from burnish.ir.views.norm import norms
from burnish.passes import catalog, equalization, grids, packed_layers, qdq, ranges
from burnish.passes.base import Outcome
from burnish.passes.equalization import Sources, equalize, logarithmic
from burnish.passes.grids import Grid
from burnish.passes.kernels_of_integers import Blocks, EachRun
from burnish.passes.lossy import LossyPass, Undecided
from burnish.passes.weight_sites import Matrix
from burnish.tools.lossy_context import context_for

DEMO = Path(__file__).resolve().parents[2] / "tools" / "demo"

NORM = """
g (float[N, 9, 64] x) => (float[N, 9, 16] a, float[N, 9, 32] b)
    <float[64] g, float[64] c, float[64, 16] wa, float[16] ba, float[64, 32] wb> {
  n = LayerNormalization (x, g, c)
  p = MatMul (n, wa)
  a = Add (p, ba)
  b = MatMul (n, wb)
}"""
GATED = """
g (float[N, 9, 64] x) => (float[N, 9, 64] y)
    <float[64, 128] wg, float[64, 128] wu, float[128] bu, float[128, 64] wd> {
  g = MatMul (x, wg)
  s = Sigmoid (g)
  u = MatMul (x, wu)
  b = Add (u, bu)
  m = Mul (b, s)
  y = MatMul (m, wd)
}"""
RELU = """
g (float[N, 64] x) => (float[N, 64] y) <float[128, 64] wu, float[128] bu, float[128, 64] wd, float[64] bd> {
  u = Gemm <transB = 1> (x, wu, bu)
  m = Relu (u)
  y = Gemm <alpha = 0.5, beta = 2.0> (m, wd, bd)
}"""
GELU = RELU.replace("Relu (u)", "Gelu (u)")
POST = """
g (float[N, 9, 64] x) => (float[N, 9, 64] y) <float[64] g, float[64] c, float[64, 64] w> {
  n = LayerNormalization (x, g, c)
  p = MatMul (n, w)
  y = Add (p, n)
}"""
SHARED_BIAS = """
g (float[N, 64] x) => (float[N, 32] y, float[N, 64] z)
    <float[64, 64] wu, float[64] b, float[64, 32] wd, float[64, 64] v> {
  u = Gemm (x, wu, b)
  m = Relu (u)
  y = MatMul (m, wd)
  z = Gemm (x, v, b)
}"""


def pass_of(**options: object) -> LossyPass:
    one = catalog.make("quantize-fptq", options)
    assert isinstance(one, LossyPass)
    return one


def model_of(source: str) -> oir.Model:
    return prepare(parse_graph(source), pass_of())


def apart(model: oir.Model, other: oir.Model, samples: list[Sample] | None = None) -> float:
    """The relative error of all outputs."""
    runners = [OrtRunner(one, optimize=True) for one in (model, other)]
    size = error = 0.0
    for sample in samples or make_samples(model):
        wanted, found = (runner.run(sample.feeds) for runner in runners)
        size += sum(float((array.astype(np.float64) ** 2).sum()) for array in wanted.values())
        error += sum(float(((found[key] - array).astype(np.float64) ** 2).sum()) for key, array in wanted.items())
    for runner in runners:
        runner.close()
    return (error / size) ** 0.5


def all_equalized(model: oir.Model, samples: list[Sample] | None = None) -> tuple[oir.Model, list[bool]]:
    """A copy with every value divided, and whether what computes it takes the division in."""
    copy = model.clone()
    context = context_for(copy, samples or list(make_samples(copy)))
    sources, folded = Sources(copy), []
    for group, seen in list(equalization.observed(copy, equalization.groups(copy)[0], context)):
        assert not isinstance(seen, str)
        source = sources.of(group)
        folded.append(not isinstance(source, str))
        equalize(copy, group, logarithmic(seen.largest), None if isinstance(source, str) else source)
    return copy, folded


@pytest.mark.parametrize(
    ("source", "folded"),
    [
        (NORM, [True]),
        (GATED, [False, True]),
        (RELU, [False, True]),
        (GELU, [False, False]),
        (POST, [False]),
        (SHARED_BIAS, [False, False]),
    ],
)
def test_equalizing_alone_changes_nothing_and_folds_only_where_every_reader_is_rescaled(
    source: str, folded: list[bool]
) -> None:
    model = model_of(source)
    copy, found = all_equalized(model)
    assert found == folded
    assert apart(model, copy) <= 1e-5
    kept = sum(node.op_type == "Mul" for node in copy.graph) - sum(node.op_type == "Mul" for node in model.graph)
    assert kept == found.count(False)


def test_folding_where_another_node_reads_the_norm_would_be_wrong() -> None:
    model = model_of(POST)
    (group,), _ = equalization.groups(model)
    ((_, seen),) = equalization.observed(model, [group], context_for(model, list(make_samples(model))))
    assert not isinstance(seen, str)
    assert "Add reads the same value" in str(Sources(model).of(group))
    wrong = model.clone()
    (group,), _ = equalization.groups(wrong)
    equalize(wrong, group, logarithmic(seen.largest), next(norms(wrong)))
    assert apart(model, wrong) > 1e-2


def test_a_dead_channel_is_divided_by_no_less_than_a_share_of_the_widest() -> None:
    scale = logarithmic(np.array([0.0, 1e-30, 3.0, 100.0]))
    assert scale.min() >= scale.max() / 1024 > 0
    assert scale[0] == logarithmic(np.array([3.0]))[0], "what samples say nothing of is divided like the others"
    assert np.allclose((np.array([3.0, 100.0]) / scale[2:]), np.log2([5.0, 102.0]))
    assert (logarithmic(np.zeros(3)) == 1).all()


def wide(model: oir.Model) -> list[Sample]:
    """Let channels of a norm differ by a factor of up to 500, as those of language models do; samples."""
    for name in ("g", "c"):
        value = model.graph.initializers[name]
        array = value.const_value.numpy() * np.geomspace(0.1, 50, 64, dtype=np.float32)  # type: ignore[union-attr]
        value.const_value = oir.tensor(array, name=name)
    for name in ("wa", "wb"):
        value = model.graph.initializers[name]
        array = value.const_value.numpy() / np.geomspace(0.1, 50, 64, dtype=np.float32)[:, None]  # type: ignore[union-attr]
        value.const_value = oir.tensor(array, name=name)
    random = np.random.default_rng(3)
    return [Sample(str(i), {"x": random.standard_normal((4, 9, 64)).astype(np.float32)}) for i in range(4)]


def fixed(model: oir.Model, samples: list[Sample]) -> oir.Model:
    """A copy whose layers read 8 bits of one fixed scale."""
    copy = model.clone()
    for group, seen in list(equalization.observed(copy, equalization.groups(copy)[0], context_for(copy, samples))):
        assert not isinstance(seen, str)
        most = float(seen.largest.max())
        scales = ranges.scales(-most, most, Grid(8, signed=False, symmetric=False))
        qdq.put_pair(copy, group.value, scales, [layer.node for layer in group.layers.values()])
    return copy


def test_equalized_activations_of_a_fixed_scale_lose_a_third_at_most() -> None:
    model = model_of(NORM)
    samples = wide(model)
    equal, folded = all_equalized(model, samples)
    assert folded == [True]
    assert apart(model, fixed(equal, samples), samples) <= 0.3 * apart(model, fixed(model, samples), samples)


@pytest.mark.parametrize("lowering", ["int4", "int8"])
@pytest.mark.parametrize("source", [NORM, GATED, RELU, POST])
def test_every_quantized_layer_runs_on_integers(source: str, lowering: str) -> None:
    one, model = pass_of(route="thresholds", v0=0, lowering=lowering), model_of(source)
    after, _ = made(one, model, proposals(one, model)[0])
    name_nodes(after)
    kernels = Counter(assigned(after).values())
    assert "MatMul (float32)" not in kernels and "Gemm (float32)" not in kernels
    wanted = {"MatMulNBits"} if lowering == "int4" else {"DynamicQuantizeMatMul", "MatMulIntegerToFloat"}
    assert set(kernels) <= wanted
    assert apart(model, after) <= (0.3 if lowering == "int4" else 0.06)


@pytest.mark.parametrize(("fixed_scale", "kernel"), [(False, "MatMulNBits"), (True, "MatMul (float32)")])
def test_a_fixed_scale_of_activations_keeps_4_bits_from_their_kernel(fixed_scale: bool, kernel: str) -> None:
    model = model_of(
        "g (float[N, 7, 128] x) => (float[N, 7, 64] y) <float[128, 64] w> { n = Relu (x) y = MatMul (n, w) }"
    )
    model.graph.opset_imports[""] = 21
    (group,), _ = equalization.groups(model)
    (layer,) = group.layers.values()
    scales = grids.fit(layer.weight(), Grid(4), 1, 128, dtype=np.dtype(np.float32))
    packed_layers.write(model, Matrix((layer,)), "dequantize", grids.quantize(layer.weight(), scales), scales)
    if fixed_scale:
        qdq.put_pair(model, group.value, ranges.scales(0.0, 3.0, Grid(8, signed=False, symmetric=False)))
    name_nodes(model)
    assert set(assigned(model).values()) == {kernel}


@pytest.mark.parametrize("kernel", [Blocks(32), EachRun()])
def test_the_error_that_is_foretold_is_that_of_the_runtime(kernel: Blocks | EachRun) -> None:
    model = model_of("g (float[N, 96] x) => (float[N, 48] y) <float[96, 48] w> { y = MatMul (x, w) }")
    random = np.random.default_rng(0)
    rows = (random.standard_normal((64, 96)) * np.geomspace(0.1, 30, 96)).astype(np.float32)
    (group,), _ = equalization.groups(model)
    (layer,) = group.layers.values()
    foretold = kernel.error(rows, [layer.weight()])
    after = model.clone()
    (group,), _ = equalization.groups(after)
    kernel.write(after, next(iter(group.layers.values())))
    assert apart(model, after, [Sample("rows", {"x": rows})]) == pytest.approx(foretold, rel=0.05)


def test_by_error_is_never_worse_than_either_on_the_rows_that_it_looks_at() -> None:
    model = model_of(NORM)
    samples = wide(model)
    errors = {}
    for name, options in {
        "by error": {},
        "all": {"route": "thresholds", "v0": 0.0, "v1": 1e9},
        "none": {"route": "thresholds", "v0": 1e9, "v1": 1e9},
    }.items():
        one = pass_of(lowering="int8", **options)
        edits = one.propose(model, context_for(model, samples), Outcome(""))
        errors[name] = apart(model, made(one, model, edits)[0], samples)
    assert errors["by error"] <= 1.02 * min(errors["all"], errors["none"])
    assert errors["all"] < 0.5 * errors["none"]


def test_the_same_samples_give_the_same_bytes_whatever_the_order_of_the_edits() -> None:
    found = []
    for step in (1, -1):
        one, model = pass_of(route="thresholds", v0=0), model_of(GELU)
        edits, _ = proposals(one, model)
        assert len(edits) == 2
        found.append(made(one, model, edits[::step])[0])
    assert apart(found[0], found[1]) == 0
    assert [node.op_type for node in found[0].graph] == [node.op_type for node in found[1].graph]


@pytest.mark.parametrize("source", [NORM, GATED, RELU, POST])
@pytest.mark.parametrize("reach", [0.0, 1e30])
def test_gptq_rounds_for_what_layers_read_behind_the_division(source: str, reach: float) -> None:
    model = model_of(source)
    (given,) = model.graph.inputs
    assert given.shape is not None and given.name is not None
    rng = np.random.default_rng(0)
    mix = rng.standard_normal((12, 64)) * np.exp(rng.standard_normal(64))
    shape = [12 if size == 64 else size if isinstance(size, int) else 30 for size in given.shape]
    samples = [Sample(str(i), {given.name: (rng.standard_normal(shape) @ mix).astype(np.float32)}) for i in range(8)]
    errors, texts = {}, set()
    for rounding in ("mse", "gptq", "gptq"):
        one = pass_of(route="thresholds", v0=reach, v1=1e30, rounding=rounding)
        edits = one.propose(model, context_for(model, samples[:6]), Outcome("quantize-fptq"))
        after, _ = made(one, model, edits)
        errors[rounding] = apart(model, after, samples[6:])
        texts.add((rounding, fingerprint(after)))
    assert errors["gptq"] < errors["mse"] and len(texts) == 2


def test_without_samples_nothing_is_guessed_and_wrong_options_are_refused() -> None:
    with pytest.raises(Undecided, match="how wide"):
        pass_of().asked(model_of(NORM), Outcome(""))
    with pytest.raises(InputError, match="`block` is 48"):
        pass_of(block=48)
    with pytest.raises(InputError, match="`v0` is 9"):
        pass_of(v0=9, v1=3)


def test_the_recipe_puts_a_vision_transformer_on_integers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BURNISH_CACHE", str(tmp_path / "cache"))
    out = tmp_path / "out.onnx"
    result = burnish.optimize(DEMO / "digits_vit.onnx", out, recipe="fptq", data=DEMO / "digits.npz", guard=())
    assert result is not None
    after = oir.load(out)
    name_nodes(after)
    assert "MatMulNBits" in set(assigned(after).values())
