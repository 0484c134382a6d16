"""Healing of quantized models: integers and scales learn, the graph and its kernels stay, frozen layers keep bytes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx_ir as oir
import pytest
import torch
from factor_models import samples_of
from fx_checks import bytes_of, floats, model_of, structure

from burnish.backends.fx import healing
from burnish.backends.fx import straight_through as ste
from burnish.backends.fx.builder import to_graph_module
from burnish.backends.fx.healing import Healed, HealOptions, Progress, heal
from burnish.backends.fx.healing_integers import Integers
from burnish.backends.fx.healing_sites import find
from burnish.backends.fx.operators.quantize import spread
from burnish.backends.ort.assigned import assigned
from burnish.backends.ort.session import executor
from burnish.frontends import onnx_file
from burnish.ir import edit, weights
from burnish.ir.errors import InputError
from burnish.ir.samples import Sample
from burnish.ir.views import block_drop, blocks
from burnish.ir.walk import walk
from burnish.passes import catalog, lossy
from burnish.passes.base import Outcome
from burnish.passes.lossy import LossyPass
from burnish.passes.pipeline import Pipeline
from burnish.passes.recipes import NORMAL_FORM
from burnish.tools.lossy_context import context_for

torch.set_num_threads(1)
DEMO = Path(__file__).resolve().parents[3] / "tools" / "demo"

DENSE = """<ir_version: 10, opset_import: ["": 21]>
g (float[N, 32] x) => (float[N, 8] y)
<float[48, 32] a, float[48] b, float[48, 40] c, float[40, 24] d, float[24] e, float[24, 8] f> {
    h = Gemm <transB = 1> (x, a, b)  r = Relu (h)  p = MatMul (r, c)  t = Tanh (p)
    q = Gemm (t, d, e)  s = Sigmoid (q)  y = MatMul (s, f)
}"""
PICTURES = """<ir_version: 10, opset_import: ["": 21]>
g (float[N, 8, 6, 6] x) => (float[N, 5] y)
<float[12, 8, 3, 3] a, float[12] b, float[12, 12, 1, 1] c, float[12, 5] d, float[5] e> {
    h = Conv <pads = [1, 1, 1, 1]> (x, a, b)  r = Relu (h)  k = Conv (r, c)  l = Relu (k)
    p = GlobalAveragePool (l)  f = Flatten (p)  y = Gemm (f, d, e)
}"""
FORMS = [
    ("quantize-static", DENSE),
    ("quantize-static", PICTURES),
    ("quantize-static{per_channel=false,symmetric=true}", PICTURES),
    ("quantize-dynamic", DENSE),
    ("quantize-dynamic{signed=false}", DENSE),
    ("quantize-dynamic{convolutions=true}", PICTURES),
    ("quantize-weights{bits=4,block=16}", DENSE),
    ("quantize-weights{bits=2,symmetric=false}", DENSE),
    ("quantize-weights{bits=8,form=dequantize}", DENSE),
    ("quantize-weights{bits=4,form=dequantize,symmetric=false,block=16}", DENSE),
    ("quantize-weights{bits=4,convolutions=true}", PICTURES),
]
QUICK = HealOptions(steps=30, batch=16, rate=2e-3, patience=10)


def network(text: str) -> oir.Model:
    model = model_of(text)
    edit.name_nodes(model)
    return model


def quantized(model: oir.Model, spec: str, samples: list[Sample]) -> oir.Model:
    (one,) = catalog.parse(spec)
    assert isinstance(one, LossyPass)
    return lossy.apply(model, one.propose(model, context_for(model, samples), Outcome("x")), [one])[0]


def check(student: oir.Model, healed: Healed) -> set[str]:
    """It is better, and nothing but constants changed, exactly those that it says; the kernels are the same."""
    assert healed.improved and healed.after < healed.before
    assert structure(healed.model) == structure(student)
    old, new = bytes_of(student), bytes_of(healed.model)
    changed = {name for name in new if old[name] != new[name]}
    assert changed == set(healed.written)
    kernels = [assigned(named(model)) for model in (student, healed.model)]
    assert kernels[0] == kernels[1]
    return changed


def named(model: oir.Model) -> oir.Model:
    copy = model.clone()
    edit.name_nodes(copy)
    return copy


def outputs(model: oir.Model, samples: list[Sample]) -> np.ndarray:
    runner = executor()(model)
    return np.concatenate([next(iter(runner.run(one.feeds).values())) for one in samples])


GRIDS = [((), 1, 0), ((5,), 1, 0), ((4,), 0, 0), ((4, 2), 1, 3), ((2, 5), 0, 2)]
"""Shapes of the scales of a matrix [4, 5], their axis and their block."""


@pytest.mark.parametrize(("shape", "axis", "block"), GRIDS)
@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_gradients_of_rounding(shape: tuple[int, ...], axis: int, block: int, sign: float) -> None:
    """They are those of learned step size quantization (arXiv:1902.08153, (3) and (5)), also for negative scales."""
    random = np.random.default_rng(len(shape) + axis + block)
    weight = torch.tensor(random.standard_normal((4, 5)), requires_grad=True)
    scale = torch.tensor(sign * random.uniform(0.2, 0.4, shape), requires_grad=True)
    zero, slope = torch.tensor(random.integers(1, 5, shape)), torch.tensor(random.standard_normal((4, 5)))
    made = ste.rounded(weight, scale, zero.double(), 0, 7, axis, block)
    (made * slope).sum().backward()
    steps, offset = (spread(one.detach(), weight, axis, block).expand(4, 5) for one in (scale, zero))
    exact = weight.detach() / steps
    free = exact.round() + offset
    inside = (free >= 0) & (free <= 7)
    assert 0 < int(inside.sum()) < 20
    torch.testing.assert_close(made.detach(), (free.clamp(0, 7) - offset) * steps)
    torch.testing.assert_close(weight.grad, slope * inside)
    by_scale = slope * torch.where(inside, exact.round() - exact, free.clamp(0, 7) - offset)
    everywhere = torch.ones(shape, dtype=torch.float64, requires_grad=True)
    (spread(everywhere, weight, axis, block) * by_scale).sum().backward()
    torch.testing.assert_close(scale.grad, everywhere.grad)


def test_a_range_found_in_each_run_passes_gradients() -> None:
    x = torch.tensor(floats(3, 7), requires_grad=True)
    levels, scale, zero = ste.dynamic_quantize(x)
    slope = torch.tensor(floats(3, 7, seed=1))
    (((levels - zero) * scale) * slope).sum().backward()
    torch.testing.assert_close(x.grad, slope)


@pytest.mark.parametrize(("spec", "text"), FORMS)
def test_training_begins_with_what_onnx_runtime_computes(spec: str, text: str) -> None:
    """And nothing is written where nothing was learned."""
    teacher = network(text)
    samples = samples_of(teacher)
    student = quantized(teacher, spec, samples)
    module = to_graph_module(student)
    integers = Integers(student, module, teacher)
    assert not integers.refused and len(integers.values) >= 6
    (wanted,) = (executor(level="off")(student).run(samples[0].feeds)).values()
    (found,) = module(torch.from_numpy(next(iter(samples[0].feeds.values()))))
    kernel = any(node.op_type == "MatMulNBits" for node in walk(student))  # it rounds its inputs as well
    np.testing.assert_allclose(found.detach(), wanted, atol=(2e-2 if kernel else 1e-5) * np.abs(wanted).max())
    found.sum().backward()
    trained = dict(module.named_parameters())
    assert all(trained[path].grad is not None for path in integers.values)
    integers.finish()
    assert integers.write(student.clone()) == []


@pytest.mark.parametrize(("spec", "text"), FORMS)
def test_integers_and_scales_learn(spec: str, text: str) -> None:
    """From a teacher that is not the model which was quantized, so that there is something to learn."""
    model = network(text)
    samples = samples_of(model, count=8)
    student = quantized(model, spec, samples)
    teacher = model.clone()
    for value in teacher.graph.initializers.values():
        array = value.const_value.numpy()
        value.const_value = oir.tensor(array + 0.2 * floats(*array.shape, seed=array.size), name=value.name)
    before = bytes_of(student)
    healed = heal(student, teacher, samples, QUICK)
    written = check(student, healed)
    assert bytes_of(student) == before
    assert healed.after < 0.6 * healed.before
    sites = find(student)
    assert {str(one.value.name) for one in sites.stored} <= written
    assert {str(one.scale.name) for one in sites.stored} <= written
    assert not {str(one.zero.name) for one in sites.stored if one.zero is not None} & written


@pytest.fixture(scope="module")
def digits() -> list[Sample]:
    return [Sample("digits", {"image": np.load(DEMO / "digits.npz")["image"][:160]})]


def test_a_frozen_layer_keeps_its_bytes(vit: oir.Model, digits: list[Sample]) -> None:
    student = quantized(vit, "quantize-weights{bits=2}", digits)
    written = check(student, heal(student, vit, digits, replace(QUICK, steps=8, train="blocks", blocks=1)))
    first, *_, last = (
        {str(v.name) for node in block.nodes for v in node.inputs if v is not None}
        for block in blocks.stacks(student).blocks
    )
    assert bool(written & first) != bool(written & last)
    assert any("2bit" in name for name in written) and any("scale" in name for name in written)


def test_a_model_without_a_block_learns_in_integers(vit: oir.Model, digits: list[Sample]) -> None:
    short = vit.clone()
    found = blocks.stacks(short)
    block_drop.drop(short, found, [found.blocks[1]])
    student = quantized(short, "quantize-dynamic", digits)
    healed = heal(student, vit, digits, QUICK)
    assert any("levels" in name for name in check(student, healed))
    assert np.linalg.norm(outputs(healed.model, digits) - outputs(vit, digits)) < 0.7 * np.linalg.norm(
        outputs(student, digits) - outputs(vit, digits)
    )


def test_factors_learn_in_integers() -> None:
    teacher = network("""<ir_version: 10, opset_import: ["": 21]>
        g (float[N, 32] x) => (float[N, 8] y) <float[32, 40] a, float[40, 8] b> {
            h = MatMul (x, a)  r = Tanh (h)  y = MatMul (r, b)
        }""")
    factored = network("""<ir_version: 10, opset_import: ["": 21]>
        g (float[N, 32] x) => (float[N, 8] y) <float[32, 16] u, float[16, 40] v, float[40, 8] b> {
            k = MatMul (x, u)  h = MatMul (k, v)  r = Tanh (h)  y = MatMul (r, b)
        }""")
    left, values, right = np.linalg.svd(weights.constant(teacher.graph.initializers["a"]))
    for name, array in (("u", left[:, :16] * values[:16]), ("v", right[:16])):
        factored.graph.initializers[name].const_value = oir.tensor(array.astype(np.float32), name=name)
    factored.graph.initializers["b"].const_value = teacher.graph.initializers["b"].const_value
    samples = samples_of(teacher, count=8)
    student = quantized(factored, "quantize-weights{bits=4,block=16}", samples)
    written = check(student, heal(student, teacher, samples, replace(QUICK, rate=5e-3)))
    assert {"u_scale", "v_4bit", "v_scale", "b_4bit"} <= written


def test_a_low_rank_change_reaches_the_integers(vit: oir.Model, digits: list[Sample]) -> None:
    student = quantized(vit, "quantize-weights{bits=2}", digits)
    healed = heal(student, vit, digits, replace(QUICK, train="lora", rank=2, rate=2e-3))
    written = check(student, healed)
    assert written and all("2bit" in name for name in written) and healed.trained < 10_000


def test_convolutions_with_fixed_ranges_learn(digits: list[Sample]) -> None:
    model = (
        Pipeline((*NORMAL_FORM, "raise-opset{to=14}", "fold-batchnorm"))
        .rewrite(onnx_file.read(DEMO / "digits_resnet.onnx"))
        .model
    )
    edit.name_nodes(model)
    student = quantized(model, "quantize-static{calibration=minmax,per_channel=false,rounding=nearest}", digits)
    healed = heal(student, model, digits, replace(QUICK, steps=20, rate=2e-5))
    written = check(student, healed)
    for layer in find(healed.model).sums:
        product = weights.constant(layer.of_input) * weights.constant(layer.of_weight)
        assert np.array_equal(weights.constant(layer.scale).ravel(), product.ravel())
    assert {str(one.scale.name) for one in find(student).sums} <= written


def test_one_table_stays_one(digits: list[Sample]) -> None:
    teacher = network("""<ir_version: 10, opset_import: ["": 21]>
        g (int64[N, S] ids) => (float[N, S, 50] y) <float[50, 32] table, float[32, 32] w> {
            x = Gather (table, ids)  h = MatMul (x, w)  a = Tanh (h)  s = Add (x, a)
            t = Transpose <perm = [1, 0]> (table)  y = MatMul (s, t)
        }""")
    given = [Sample("s", {"ids": np.random.default_rng(0).integers(0, 50, (32, 6))})]
    student = quantized(teacher, "quantize-weights{bits=2,block=16}", given)
    assert {node.op_type for node in walk(student)} >= {"GatherBlockQuantized", "MatMulNBits"}
    table = next(one for one in find(student).stored if len(one.readers) > 1)
    assert {str(table.value.name), str(table.scale.name)} <= check(student, heal(student, teacher, given, QUICK))


def test_numbers_of_sixteen_bits_scale_integers() -> None:
    teacher = network(DENSE.replace("float[", "float16["))
    given = [replace(one, feeds={"x": one.feeds["x"].astype(np.float16)}) for one in samples_of(network(DENSE))]
    student = quantized(teacher, "quantize-weights{bits=2}", given)
    healed = heal(student, teacher, given, QUICK)
    assert any("scale" in name for name in check(student, healed))


def test_the_same_seed_gives_the_same_bytes_also_after_a_stop(tmp_path: Path) -> None:
    teacher = network(DENSE)
    samples = samples_of(teacher, count=8)
    student = quantized(teacher, "quantize-weights{bits=2}", samples)

    def stop(progress: Progress) -> None:
        if progress.step == 13:
            raise KeyboardInterrupt

    options = replace(QUICK, steps=20)
    whole = bytes_of(heal(student, teacher, samples, options).model)
    with pytest.raises(KeyboardInterrupt):
        heal(student, teacher, samples, options, stop, folder=tmp_path)
    told: list[Progress] = []
    assert bytes_of(heal(student, teacher, samples, options, told.append, folder=tmp_path).model) == whole
    assert told[0].step == 13
    assert bytes_of(heal(student, teacher, samples, replace(options, seed=1)).model) != whole


def test_rounding_is_given_time_until_steps_are_small() -> None:
    teacher = network(DENSE)
    samples = samples_of(teacher)
    student = quantized(teacher, "quantize-weights{bits=8,form=dequantize}", samples)
    healed = heal(student, teacher, samples, replace(QUICK, steps=10, rate=0.1, patience=1))
    assert not healed.improved and healed.ended == "1 evaluations without improvement" and healed.steps == 8


def test_what_onnx_runtime_finds_no_better_is_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    teacher = network(DENSE)
    samples = samples_of(teacher, count=8)
    student = quantized(teacher, "quantize-weights{bits=2}", samples)
    monkeypatch.setattr(healing._Run, "measured", lambda run, model: 1.0)
    healed = heal(student, teacher, samples, QUICK)
    assert not healed.improved and healed.model is student and healed.before == healed.after == 1.0
    assert "ONNX Runtime itself finds no less loss in the new integers" in healed.ended


QLINEAR = """<ir_version: 10, opset_import: ["": 21]>
g (float[N, 4] x) => (float[N, 3] y)
<float[4, 4] w, float s = {0.1}, uint8 z = {128}, float[3] t, int8[3] o = {0, 0, 0},
 int8[4, 3] q = {1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12}> {
    h = MatMul (x, w)  r = QuantizeLinear (h, s, z)  p = QLinearMatMul (r, s, z, q, t, o, s, z)
    y = DequantizeLinear (p, s, z)
}"""


def test_an_operator_that_no_gradient_passes_is_named() -> None:
    model = network(QLINEAR)
    given = [Sample("s", {"x": floats(16, 4)})]
    with pytest.raises(InputError, match="`p` is computed by QLinearMatMul on integers") as error:
        heal(model, model, given, QUICK)
    assert "DequantizeLinear" in str(error.value.hint)


BRANCHES = """<ir_version: 10, opset_import: ["": 21]>
g (float[N, 4] x, bool c) => (float[N, 4] y) <float[4, 4] w, int8[4] q = {1, 2, 3, 4}, float s = {0.1}> {
    h = MatMul (x, w)
    y = If (c) <then_branch = t () => (float[N, 4] a) { d = DequantizeLinear (q, s)  a = Add (h, d) },
                else_branch = e () => (float[N, 4] b) { b = Identity (h) }>
}"""


def test_integers_that_stay_are_named_with_the_reason() -> None:
    teacher = network(BRANCHES)
    student = teacher.clone()
    value = student.graph.initializers["w"]
    value.const_value = oir.tensor(value.const_value.numpy() * 0.5, name="w")
    given = [Sample(str(i), {"x": floats(16, 4, seed=i), "c": np.array(True)}) for i in range(3)]
    healed = heal(student, teacher, given, QUICK)
    assert healed.written == ("w",) and healed.improved
    assert len(healed.frozen) == 1 and healed.frozen[0].endswith("it is in a branch or a loop")


def test_integers_with_two_scales_and_biases_of_two_layers_stay() -> None:
    model = network("""<ir_version: 10, opset_import: ["": 21]>
        g (float[N, 4] x) => (float[N, 2] y, float[N, 2] z)
        <int8[4, 2] q = {1, 2, 3, 4, 5, 6, 7, 8}, float s = {0.1}, float t = {0.3}, int32[2] b = {10, 20},
         float u = {0.02}, float i = {0.2}, uint8 o = {128}, int8[4, 2] p = {8, 7, 6, 5, 4, 3, 2, 1},
         float v = {0.06}> {
            r = QuantizeLinear (x, i, o)  e = DequantizeLinear (r, i, o)
            f = DequantizeLinear (q, s)  g = DequantizeLinear (q, t)  k = DequantizeLinear (p, s)
            c = DequantizeLinear (b, u)  d = DequantizeLinear (b, v)
            l = Gemm (e, f, c)  m = Gemm (e, g, d)  n = MatMul (e, k)  y = Add (l, n)  z = Identity (m)
        }""")
    found = find(model)
    assert [str(one.value.name) for one in found.stored] == ["p"]
    assert set(found.refused.values()) == {"others read its integers with other scales"}
    assert {str(one.name) for one in found.fixed} == {"s", "t", "u", "v"}
