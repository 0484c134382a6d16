"""What must hold of weights in few bits."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import onnx_ir as oir
import pytest
from factor_models import KINDS, model_of, samples_of

import burnish
from burnish.backends.ort.session import executor
from burnish.backends.reference.runner import ReferenceRunner
from burnish.ir import cost
from burnish.ir.errors import InputError, UnchangedError
from burnish.ir.inference import Inference
from burnish.ir.samples import Sample
from burnish.ir.text import fingerprint
from burnish.ir.views.convolution import convolutions
from burnish.ir.views.linear import linears
from burnish.ir.walk import walk
from burnish.passes import catalog, lossy
from burnish.passes.base import Outcome
from burnish.passes.lossy import LossyPass
from burnish.passes.pipeline import constant_bytes
from burnish.tools import cli
from burnish.tools.lossy_context import context_for

LINEAR = [name for name in KINDS if "Conv" not in name and "vector" not in name and "Gemm transposed" != name]
TIED = """g (int64[N, S] ids) => (float[N, S, 90] y) <float[90, 64] w, float[64, 64] u> {
  e = Gather (w, ids)
  h = MatMul (e, u)
  t = Transpose <perm = [1, 0]> (w)
  y = MatMul (h, t)
}"""


def quantized(model: oir.Model, **options: object) -> oir.Model:
    """A copy with every layer quantized."""
    one = catalog.make("quantize-weights", options)
    assert isinstance(one, LossyPass)
    return lossy.apply(model, one.asked(model, Outcome("quantize-weights")), [one])[0]


def opset(source: str, number: int) -> str:
    return f'<ir_version: 10, opset_import: ["": {number}]>\n{source}'


@pytest.mark.parametrize("kind", LINEAR)
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(
    ("form", "bits"),
    [("matmul-nbits", 2), ("matmul-nbits", 4), ("matmul-nbits", 8), ("dequantize", 4), ("dequantize", 8)],
)
def test_the_model_computes_what_the_views_read(kind: str, bits: int, symmetric: bool, form: str) -> None:
    model = model_of(opset(KINDS[kind], 25))
    before = {one.node.name: one for one in linears(model)}
    after = quantized(model, bits=bits, symmetric=symmetric, form=form, block=16)
    if kind == "two Gemms that share":
        assert constant_bytes(after) == constant_bytes(model)
        return
    ideal, apart = model.clone(), 0.0
    for one, plain in zip(linears(after), list(linears(ideal)), strict=True):
        assert one.read_only is not None
        old = before[plain.node.name]
        apart = max(apart, float(np.abs(one.weight() - old.weight()).max() / np.abs(old.weight()).max()))
        plain.write(ideal, one.weight(), plain.bias())
    assert apart <= {2: 0.55, 4: 0.12, 8: 0.006}[bits]
    assert constant_bytes(after) < constant_bytes(model)
    for sample in samples_of(model):
        wanted = ReferenceRunner(ideal).run(sample.feeds)
        found, fast = ReferenceRunner(after).run(sample.feeds), executor()(after).run(sample.feeds)
        for name, array in wanted.items():
            size = float(np.abs(array).max())
            assert np.abs(found[name] - array).max() <= 1e-6 * size, "scales are float32"
            assert np.abs(fast[name] - array).max() <= 0.02 * size, "ONNX Runtime rounds activations to eight bits"


def test_a_tied_table_is_stored_once_and_both_read_the_same() -> None:
    model = model_of(TIED)
    after = quantized(model, bits=4)
    (table,) = (one for one in cost.stored_tensors(after) if one.parameters == 90 * 64)
    assert (table.dtype, table.bytes) == ("UINT4", 90 * 32)
    (rows,) = walk(after, "GatherBlockQuantized", domain="com.microsoft")
    assert [str(size) for size in Inference(after).shape(rows.outputs[0]) or ()] == ["N", "S", "64"]
    feeds = {"ids": np.array([[0, 5, -1]])}
    found, wanted = executor()(after).run(feeds)["y"], executor()(model).run(feeds)["y"]
    assert np.abs(found - wanted).max() < 0.3 * np.abs(wanted).max()
    assert constant_bytes(after) < 0.2 * constant_bytes(model)
    kept = quantized(model, bits=4, embeddings=False)
    assert [one.node.op_type for one in linears(kept)] == ["MatMulNBits", "MatMul"]


def test_layers_in_branches_are_quantized_too() -> None:
    source = """g (bool c, float[N, 64] x) => (float[N, 32] y) <float[64, 32] w> {
      y = If (c) <
        then_branch = a () => (float[N, 32] p) <float[64, 32] v> { p = MatMul (x, v) },
        else_branch = b () => (float[N, 32] q) { q = MatMul (x, w) }
      >
    }"""
    model = model_of(source)
    after = quantized(model, bits=8)
    assert [one.node.op_type for one in linears(after)] == ["MatMulNBits"] * 2
    x = np.random.default_rng(0).standard_normal((5, 64)).astype(np.float32)
    for case in (True, False):
        feeds = {"c": np.array(case), "x": x}
        wanted = executor()(model).run(feeds)["y"]
        assert np.abs(executor()(after).run(feeds)["y"] - wanted).max() < 0.03 * np.abs(wanted).max()


def test_what_cannot_be_observed_is_rounded_without_samples_and_said() -> None:
    source = """g (bool c, float[N, 64] x) => (float[N, 32] y) <float[64, 64] u> {
      h = MatMul (x, u)
      y = If (c) <
        then_branch = a () => (float[N, 32] p) <float[64, 32] v> { p = MatMul (h, v) },
        else_branch = b () => (float[N, 32] q) <float[64, 32] w> { q = MatMul (x, w) }
      >
    }"""
    model = model_of(source)
    one, outcome = catalog.make("quantize-weights", {"bits": 4, "rounding": "gptq"}), Outcome("quantize-weights")
    assert isinstance(one, LossyPass)
    rows = np.random.default_rng(0).standard_normal((50, 64)).astype(np.float32)
    sample = Sample("", {"c": np.array(True), "x": rows})
    edits = one.propose(model, context_for(model, [sample]), outcome)
    assert [bool(edit.payload) for edit in edits] == [True, False, False] and not outcome.skipped
    assert list(outcome.notes.values()) == [2] and "inside a sub-graph" in next(iter(outcome.notes))
    after, made = lossy.apply(model, edits, [one])
    plain = quantized(model, bits=4)
    weights = [[layer.weight() for layer in linears(which)] for which in (after, plain)]
    assert [np.array_equal(*pair) for pair in zip(*weights, strict=True)] == [False, True, True]
    assert set(outcome.errors) | set(made[catalog.spec(one)].errors) == {edit.key for edit in edits}


@pytest.mark.parametrize("rounding", ["mse", "gptq"])
def test_the_error_of_a_layer_is_that_of_what_it_computes_or_of_its_weights(rounding: str) -> None:
    model = model_of("g (float[N, 64] x) => (float[N, 24] y) <float[64, 24] w> { y = MatMul (x, w) }")
    rows = np.random.default_rng(0).standard_normal((500, 64)).astype(np.float32) * np.linspace(0.1, 3, 64, dtype="f")
    one, outcome = catalog.make("quantize-weights", {"bits": 4, "rounding": rounding}), Outcome("quantize-weights")
    assert isinstance(one, LossyPass)
    edits = one.propose(model, context_for(model, [Sample("", {"x": rows})]), outcome)
    after, made = lossy.apply(model, edits, [one])
    ((key, told),) = (outcome.errors | made[catalog.spec(one)].errors).items()
    (old,), (new,) = (list(linears(which)) for which in (model, after))
    seen = np.eye(64) if rounding == "mse" else rows.astype(np.float64)
    lost, whole = (np.linalg.norm(seen @ matrix.T) for matrix in (new.weight() - old.weight(), old.weight()))
    assert key == edits[0].key and told == pytest.approx(lost / whole, rel=2e-2), "moments of few rows are steadied"


def test_shapes_that_only_our_inference_knows_are_enough() -> None:
    head = '<ir_version: 10, opset_import: ["": 20, "com.microsoft": 1]>\n'
    body = "g (float[N, 64] x) => (float[N, 24] y) <float[64, 24] w> { h = com.microsoft.{} (x)  y = MatMul (h, w) }"
    known, unknown = (model_of(head + body.replace("{}", op)) for op in ("QuickGelu", "Unknown"))
    assert known.graph[0].outputs[0].shape is None
    assert [one.node.op_type for one in linears(quantized(known, bits=4))] == ["MatMulNBits"]
    outcome = Outcome("quantize-weights")
    assert not catalog.make("quantize-weights", {"bits": 4}).asked(unknown, outcome)  # type: ignore[attr-defined]
    assert [one.reason for one in outcome.skipped] == ["it is not known how many axes its input has"]


def test_a_product_in_a_branch_stays_where_no_runtime_loads_it() -> None:
    source = """g (bool c, float[N, 64] x) => (float[N, 64] y) <float[64, 64] w, float[64, 64] u> {
      h = MatMul (x, u)
      y = If (c) <
        then_branch = a () => (float[N, 64] p) { p = MatMul (h, w) },
        else_branch = b () => (float[N, 64] q) { q = Relu (h) }
      >
    }"""
    model = model_of(opset(source, 21))
    after, outcome = quantized(model, bits=4, form="dequantize"), Outcome("quantize-weights")
    x = np.random.default_rng(0).standard_normal((5, 64)).astype(np.float32)
    executor()(after).run({"c": np.array(True), "x": x})
    assert [one.parameter.quantized for one in linears(after) if one.parameter is not None] == [True, False]
    catalog.make("quantize-weights", {"bits": 4, "form": "dequantize"}).asked(model, outcome)  # type: ignore[attr-defined]
    assert "in a branch or a loop" in outcome.skipped[0].reason


@pytest.mark.parametrize("bits", [4, 8])
def test_blocks_of_zeros_add_no_noise_to_small_weights(bits: int) -> None:
    model = model_of("g (float[N, 256] x) => (float[N, 128] y) <float[256, 128] w> { y = MatMul (x, w) }")
    rng = np.random.default_rng(0)
    numbers = 1e-4 * rng.standard_normal((256, 128)).astype(np.float32)
    numbers[32:] = 0
    model.graph.initializers["w"].const_value = oir.tensor(numbers.astype(np.float32))
    feeds = {"x": rng.standard_normal((8, 256)).astype(np.float32)}
    wanted = executor()(model).run(feeds)["y"]
    found = executor()(quantized(model, bits=bits)).run(feeds)["y"]
    assert np.linalg.norm(found - wanted) < {4: 0.15, 8: 0.02}[bits] * np.linalg.norm(wanted)


def test_matrices_that_are_looked_up_are_said_to_stay() -> None:
    source = """g (float[N, 3, 32] x, int64[N] i) => (float[N, 3, 24] y) <float[4, 32, 24] w> {
      e = Gather (w, i)
      y = MatMul (x, e)
    }"""
    outcome = Outcome("quantize-weights")
    one = catalog.make("quantize-weights", {"bits": 8})
    assert isinstance(one, LossyPass) and not one.asked(model_of(source), outcome)
    assert [skip.reason for skip in outcome.skipped] == [
        "it looks up matrices; only rows of a table are stored in blocks"
    ]


def test_convolutions_that_are_left_alone_are_said() -> None:
    outcome = Outcome("quantize-weights")
    one = catalog.make("quantize-weights", {"bits": 8})
    assert isinstance(one, LossyPass) and not one.asked(model_of(KINDS["Conv"]), outcome)
    assert [skip.reason for skip in outcome.skipped] == ["it is a convolution, and `convolutions` is off"]


@pytest.mark.parametrize("convolutions", [False, True])
def test_weights_that_are_not_finite_stay(convolutions: bool) -> None:
    model = model_of(KINDS["Conv" if convolutions else "MatMul and Add"])
    for value in model.graph.initializers.values():
        numbers = value.const_value.numpy().copy()  # type: ignore[union-attr]
        numbers.flat[0] = np.inf
        value.const_value = oir.tensor(numbers)
    outcome = Outcome("quantize-weights")
    one = catalog.make("quantize-weights", {"bits": 8, "convolutions": convolutions})
    assert isinstance(one, LossyPass) and not one.asked(model, outcome)
    assert [skip.reason for skip in outcome.skipped] == ["its weight holds NaN or infinity"]


@pytest.mark.parametrize("convolutions", [False, True])
def test_weights_that_no_scale_is_small_enough_for_stay(convolutions: bool) -> None:
    model = model_of(KINDS["Conv" if convolutions else "MatMul and Add"])
    for value in model.graph.initializers.values():
        value.const_value = oir.tensor((value.const_value.numpy() * 1e-39).astype(np.float32))  # type: ignore[union-attr]
    outcome = Outcome("quantize-weights")
    one = catalog.make("quantize-weights", {"bits": 8, "convolutions": convolutions})
    assert isinstance(one, LossyPass) and not one.asked(model, outcome)
    wanted = "the numbers of its weight are smaller than scales of float can be"
    assert [skip.reason for skip in outcome.skipped] == [wanted]


STACK = "g (float[3, 5, 32] x) => (float[3, 5, 64] y) <float[3, 32, 64] w> { y = MatMul (x, w) }"
LEFT = "g (float[N, 32, 5] x) => (float[N, 64, 5] y) <float[64, 32] w> { y = MatMul (w, x) }"


@pytest.mark.parametrize(("source", "why"), [(STACK, "a stack of 3 matrices"), (LEFT, "stands on the left")])
@pytest.mark.parametrize("name", ["quantize-weights", "quantize-dynamic", "quantize-static", "quantize-fptq"])
def test_products_that_no_kernel_takes_are_said(source: str, why: str, name: str) -> None:
    model, outcome = model_of(source), Outcome(name)
    one = catalog.make(name, {})
    assert isinstance(one, LossyPass)
    assert not one.propose(model, context_for(model, samples_of(model)), outcome)
    assert [why in skip.reason for skip in outcome.skipped] == [True]


def test_savings_are_what_the_file_shrinks_by(tmp_path: Path) -> None:
    model = model_of(TIED)
    for form, bits in (("matmul-nbits", 4), ("matmul-nbits", 2), ("dequantize", 4)):
        source = model if form == "matmul-nbits" else model_of(opset(KINDS["MatMul and Add"], 21))
        after = quantized(source, bits=bits, form=form)
        sizes = []
        for one in (source, after):
            (path,) = burnish.emit(one, tmp_path / "m.onnx")
            sizes.append(path.stat().st_size)
        saved = constant_bytes(source) - constant_bytes(after)
        assert abs(sizes[0] - sizes[1] - saved) < 1500


def test_the_same_model_gives_the_same_bytes() -> None:
    model = model_of(KINDS["three that share"])
    texts = {tuple(v.const_value.tobytes() for v in quantized(model, bits=4).graph.initializers.values()) for _ in "ab"}  # type: ignore[union-attr]
    assert len(texts) == 1


@pytest.mark.parametrize("kind", [name for name in KINDS if "Conv" in name])
@pytest.mark.parametrize("bits", [4, 8])
def test_convolutions_are_stored_smaller_and_read_nearly_the_same(kind: str, bits: int) -> None:
    model = model_of(opset(KINDS[kind], 21))
    after = quantized(model, bits=bits, convolutions=True)
    (old,), (new,) = convolutions(model), convolutions(after)
    assert new.parameter.quantized and constant_bytes(after) < (0.35 if bits == 8 else 0.25) * constant_bytes(model)
    apart = np.abs(new.weight() - old.weight()).max() / np.abs(old.weight()).max()
    assert apart < {4: 0.25, 8: 0.01}[bits]
    for sample in samples_of(model):
        wanted, found = ReferenceRunner(after).run(sample.feeds), executor()(after).run(sample.feeds)
        assert all(np.abs(found[name] - one).max() < 1e-5 * np.abs(one).max() for name, one in wanted.items())


IMAGES = """g (float[N, 6, 12, 12] x) => (float[N, 6, 10, 10] y)
    <float[16, 6, 3, 3] a, float[16, 4, 3, 3] b, float[8, 16, 1, 1] c, float[6, 8, 3, 3] d, float[6] e> {
  p = Conv <pads = [1, 1, 1, 1]> (x, a)
  q = Relu (p)
  r = Conv <pads = [1, 1, 1, 1], group = 4> (q, b)
  s = Relu (r)
  t = Conv (s, c)
  y = Conv (t, d, e)
}"""


def test_convolutions_make_up_for_what_those_before_them_lost() -> None:
    model = model_of(opset(IMAGES, 21))
    rng = np.random.default_rng(0)
    smooth = np.cumsum(np.cumsum(rng.standard_normal((12, 1, 6, 12, 12)), 3), 4).astype(np.float32) + 3
    context = context_for(model, [Sample(str(index), {"x": one}) for index, one in enumerate(smooth[:8])])
    errors, texts = {}, set()
    for bits in (0, 4, 4):  # without `bits` each layer is rounded as if it were the only one
        one = catalog.make("quantize-weights", {"bits": bits, "rounding": "gptq", "convolutions": True})
        assert isinstance(one, LossyPass)
        edits = [edit for edit in one.propose(model, context, Outcome("")) if edit.option.startswith("int4")]
        after = lossy.apply(model, edits, [one])[0]
        found = [executor()(made).run({"x": image})["y"] for made in (model, after) for image in smooth[8:]]
        errors[bits] = float(np.linalg.norm(np.subtract(found[4:], found[:4])) / np.linalg.norm(found[:4]))
        texts.add((bits, fingerprint(after)))
    assert len(edits) == 4 and len(texts) == 2 and errors[4] < 0.9 * errors[0]


@pytest.mark.parametrize("memory", [1, 1024])
def test_the_first_convolution_is_rounded_alike_whether_in_turn_or_at_once(memory: int) -> None:
    model = model_of(opset(IMAGES, 21))
    context = context_for(model, samples_of(model))
    first = []
    for bits in (0, 4):
        options = {"bits": bits, "rounding": "gptq", "convolutions": True, "memory": memory}
        one = catalog.make("quantize-weights", options)
        assert isinstance(one, LossyPass)
        first.append(next(e for e in one.propose(model, context, Outcome("")) if e.option.startswith("int4")).payload)
    assert np.array_equal(first[0]["levels"], first[1]["levels"])
    np.testing.assert_allclose(first[0]["scale"], first[1]["scale"], rtol=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bits": 3}, "nothing stores 3 bits"),
        ({"bits": 5}, "`bits` is 5"),
        ({"block": 24}, "`block` is 24"),
        ({"rounding": "adaround"}, "`rounding=adaround` is for convolutions"),
        ({"rounding": "adaround", "convolutions": True, "steps": 0}, "`steps` is 0"),
    ],
)
def test_bad_options(options: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        catalog.make("quantize-weights", options)


def test_on_the_command_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path, out = tmp_path / "m.onnx", tmp_path / "out.onnx"
    burnish.emit(model_of(TIED), path)

    def run(*words: str) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["optimize", str(path), "-o", str(out), *words])
        with pytest.raises(SystemExit) as stopped:
            cli.optimize_main()
        shown = capsys.readouterr()
        return int(stopped.value.code or 0), " ".join((shown.out + shown.err).split())

    code, output = run("-p", "quantize-weights{bits=4}")
    assert code == 0 and "edits 2: quantize-weights{bits=4} 2" in output
    assert len(list(linears(burnish.load(out)))) == 2
    code, output = run("-p", "quantize-weights{bits=8,form=dequantize}")
    assert code == 4 and "nothing can be edited" in output and "need opset 21" in output
    code, output = run("-p", "quantize-weights{bits=2,form=dequantize}", "--opset", "25")
    assert code == 4 and "computes other numbers from standard blocks of 2 bits" in output
    code, output = run("-p", "quantize-weights{bits=8,form=dequantize}", "--opset", "21")
    assert code == 0 and "no lookup in blocks" in output
    code, output = run("-p", "quantize-weights")
    assert code == 2 and "how many bits" in output


def test_a_search_chooses_bits(tmp_path: Path) -> None:
    path = tmp_path / "m.onnx"
    burnish.emit(model_of(KINDS["three that share"]), path)
    rng = np.random.default_rng(0)
    data = [{"x": rng.standard_normal((2, 7, 24)).astype(np.float32)} for _ in range(8)]
    found = burnish.optimize(path, passes=["quantize-weights"], data=data, max_size="40%")
    assert found.lossy is not None and found.lossy.edits
    assert all(one.read_only for one in linears(found.model)) or constant_bytes(found.model) <= 0.4 * found.lossy.whole


def test_nothing_to_quantize_is_an_error() -> None:
    model = model_of(KINDS["Conv"])
    with pytest.raises(UnchangedError, match="nothing can be edited"):
        burnish.optimize(model, passes=["quantize-weights{bits=4}"])
    data = [one.feeds for one in samples_of(model)]
    with pytest.raises(UnchangedError, match="nothing can be edited"):
        burnish.optimize(model, passes=["quantize-weights"], data=data, max_size="40%")


def test_the_gain_before_a_head_that_is_tied_to_a_rotated_table_keeps_its_bits() -> None:
    model = model_of("""g (int64[N, S] ids) => (float[N, S, 90] y)
        <float[90, 32] w, float[32] g, float[32] c, float[32, 64] u, float[64, 32] d> {
          e = Gather (w, ids)  n = LayerNormalization (e, g)  a = MatMul (n, u)  h = Relu (a)  b = MatMul (h, d)
          r = Add (e, b)  m = LayerNormalization (r, c)  t = Transpose <perm = [1, 0]> (w)  y = MatMul (m, t) }""")
    for one in catalog.parse("rotate-residual"):
        one.rewrite(model, Outcome(one.pass_name()))
    outcome, one = Outcome("quantize-weights"), catalog.make("quantize-weights", {"bits": 4, "block": 16})
    edits = one.asked(model, outcome)  # type: ignore[attr-defined]
    assert len(edits) == 3 and ["gain" in skip.reason for skip in outcome.skipped] == [True]
