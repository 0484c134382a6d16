"""What must hold of layers in numbers of 16 bits."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx_ir as oir
import pytest
from golden import parse_graph, prepare
from laws import OrtRunner, make_samples
from lossy_laws import made, proposals

from burnish.backends.ort.session import executor
from burnish.frontends import onnx_file
from burnish.ir import edit
from burnish.ir.errors import BudgetError, BurnishError, InputError, UnchangedError
from burnish.ir.samples import Sample
from burnish.ir.walk import walk
from burnish.passes import catalog, half_floats, lossy, pipeline, recipes
from burnish.passes.base import Outcome
from burnish.passes.lossy import LossyPass
from burnish.passes.pipeline import Pipeline
from burnish.tools.lossy_context import context_for

DEMO = Path(__file__).resolve().parents[2] / "tools" / "demo"


def cast_half(**options: object) -> LossyPass:
    one = catalog.make("cast-half", options)
    assert isinstance(one, LossyPass)
    return one


def digits(name: str) -> tuple[oir.Model, list[Sample]]:
    """A trained model in normal form, with opset 20 for one Gelu, and some digits."""
    model = Pipeline(recipes.named("normal-form", "ort-cpu", None)).rewrite(onnx_file.read(DEMO / f"{name}.onnx")).model
    edit.name_nodes(model)
    with np.load(DEMO / "digits.npz") as data:
        return model, [Sample("some", {"image": data["image"][:40]})]


@pytest.mark.parametrize("name", ["digits_vit", "digits_resnet"])
def test_a_trained_model_in_halves_answers_as_before_at_half_the_size(name: str) -> None:
    model, samples = digits(name)
    one = cast_half()
    edits = one.propose(model, context_for(model, samples), Outcome(""))
    after, _ = lossy.apply(model, edits, [one])
    before, now = (executor()(each).run(samples[0].feeds)["logits"] for each in (model, after))
    assert 0 < np.linalg.norm(now - before) <= 3e-3 * np.linalg.norm(before)
    assert pipeline.constant_bytes(after) < 0.56 * pipeline.constant_bytes(model)
    assert [(v.name, v.dtype) for v in after.graph.outputs] == [(v.name, v.dtype) for v in model.graph.outputs]


def test_no_cast_follows_another_and_no_value_is_cast_twice() -> None:
    model, samples = digits("digits_vit")
    one = cast_half()
    edits = one.propose(model, context_for(model, samples), Outcome(""))
    for chosen in (edits, edits[::2], edits[:1]):
        after, _ = lossy.apply(model, chosen, [one])
        casts = [node for node in walk(after, "Cast") if node.name not in {n.name for n in walk(model, "Cast")}]
        sources = [node.inputs[0] for node in casts]
        assert len(set(sources)) == len(sources)
        for source in sources:
            made_by = None if source is None else source.producer()
            assert made_by is None or made_by not in casts


@pytest.mark.parametrize("op", half_floats.FOLLOWERS)
def test_onnx_runtime_takes_every_operator_that_may_follow_into_halves(op: str) -> None:
    arguments = {
        **dict.fromkeys(("Add", "Sub", "Mul", "Div", "Min", "Max", "PRelu"), "x, x"),
        **{
            "Reshape": "x, s",
            "Expand": "x, s",
            "Tile": "x, s",
            "Squeeze": "x",
            "Unsqueeze": "x, a",
            "Where": "c, x, x",
        },
        **{"Gather": "x, a", "Pad": "x, p", "Slice": "x, a, s", "Concat": "x, x", "Clip": "x"},
    }.get(op, "x")
    attributes = {"Concat": "<axis = 0>", "Split": "<num_outputs = 2>"}
    attributes |= dict.fromkeys(("MaxPool", "AveragePool"), "<kernel_shape = [1, 1]>")
    source = f"""
g (float16[2, 2, 2, 2] x, bool[2] c) => (float16 y)
    <int64[1] a = {{0}}, int64[4] s = {{2, 2, 2, 2}}, int64[8] p = {{0, 0, 0, 0, 1, 1, 1, 1}}> {{
  y{", z" * (op == "Split")} = {op} {attributes.get(op, "")} ({arguments})
}}"""
    source = source.replace("x, a, s", "x, a, a") if op == "Slice" else source
    proto = parse_graph(source)
    proto.graph.output[0].CopyFrom(onnx.helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT16, None))
    runner = executor()(oir.from_proto(proto))
    feeds = {"x": np.ones((2, 2, 2, 2), np.float16), "c": np.array([True, False])}
    assert runner.run(feeds)["y"].dtype == np.float16


def test_nothing_that_was_seen_near_the_limit_is_cast() -> None:
    one = cast_half()
    source = """
g (float[N, 4] x) => (float[N, 4] y) <float[4, 4] w, float[4, 4] v> {
  a = MatMul (x, w)
  big = Constant <value = float {30000.0}> ()
  b = Mul (a, big)
  small = Constant <value = float {0.00001}> ()
  c = Mul (b, small)
  y = MatMul (c, v)
}"""
    model = prepare(parse_graph(source), one)
    edits, _ = proposals(one, model)
    after, _ = made(one, model, edits)
    before, now = OrtRunner(model, optimize=True), OrtRunner(after, optimize=True)
    for sample in make_samples(model):
        found, wanted = now.run(sample.feeds)["y"], before.run(sample.feeds)["y"]
        assert np.linalg.norm(found - wanted) <= 5e-3 * np.linalg.norm(wanted)
    assert {node.op_type for node in walk(after) if node.outputs[0].dtype == oir.DataType.FLOAT16} == {"MatMul", "Cast"}
    before.close()
    now.close()


def test_no_weight_is_held_in_halves_beside_itself() -> None:
    source = """g (bool c, float[N, 64] x) => (float[N, 64] y) <float[64, 64] w> {
      h = MatMul (x, w)
      y = If (c) <
        then_branch = a () => (float[N, 64] p) { p = MatMul (h, w) },
        else_branch = b () => (float[N, 64] q) { q = Relu (h) }
      >
    }"""
    model = prepare(parse_graph(source), cast_half())
    outcome = Outcome("cast-half")
    samples = list(make_samples(model))
    assert not cast_half().propose(model, context_for(model, samples), outcome)
    assert "beside its weight, which MatMul reads" in " ".join(skip.reason for skip in outcome.skipped)


def test_weights_stored_in_fewer_bits_stay_so_behind_the_recipe() -> None:
    model, samples = digits("digits_resnet")
    one = cast_half(stored=True)
    after, _ = lossy.apply(model, one.asked(model, Outcome("")), [one])
    written = Pipeline(recipes.named("default", "ort-cpu", None)).rewrite(after).model
    assert pipeline.constant_bytes(written) < 0.56 * pipeline.constant_bytes(model)
    before, now = (executor()(each).run(samples[0].feeds)["logits"] for each in (model, written))
    assert np.linalg.norm(now - before) <= 2e-3 * np.linalg.norm(before)


@pytest.mark.parametrize(
    ("asked", "error"),
    [({"max_drop": "5%", "objective": "latency"}, UnchangedError), ({"max_latency": "90%"}, BudgetError)],
)
def test_a_search_for_time_on_a_cpu_never_takes_halves(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, asked: dict[str, str], error: type[BurnishError]
) -> None:
    import burnish

    monkeypatch.setenv("BURNISH_CACHE", str(tmp_path / "cache"))
    with np.load(DEMO / "digits.npz") as data:
        np.savez(tmp_path / "digits.npz", image=data["image"][:60], labels=data["label"][:60])
    # Noise may make one layer alone seem quicker; then all of them together are timed, and refused.
    with pytest.raises(error, match="saves? (no )?time|no edits bring the model down"):
        burnish.optimize(
            DEMO / "digits_resnet.onnx",
            tmp_path / "out.onnx",
            data=tmp_path / "digits.npz",
            passes=["cast-half"],
            **asked,
        )
    assert not (tmp_path / "out.onnx").exists()


@pytest.mark.parametrize("spec", ["cast-half{stored=true}", "quantize-weights{convolutions=true}"])
def test_a_search_for_time_takes_nothing_that_is_stored_in_few_bits_and_computed_as_before(
    tmp_path: Path, spec: str
) -> None:
    import burnish

    with np.load(DEMO / "digits.npz") as data:
        np.savez(tmp_path / "digits.npz", image=data["image"][:60], labels=data["label"][:60])
    asked = {"data": tmp_path / "digits.npz", "passes": [spec], "max_drop": "5%"}
    with pytest.raises(UnchangedError, match="saves (no )?time"):
        burnish.optimize(DEMO / "digits_resnet.onnx", tmp_path / "out.onnx", objective="latency", **asked)
    assert burnish.optimize(DEMO / "digits_resnet.onnx", tmp_path / "out.onnx", **asked).sizes[1] < 200_000


@pytest.mark.parametrize("options", [{"margin": 0.5}, {"dtype": "bfloat16"}])
def test_options_that_cannot_be_are_refused(options: dict[str, object]) -> None:
    with pytest.raises(InputError):
        cast_half(**options)


def test_an_opset_without_a_cast_of_bfloat16_is_told() -> None:
    source = '<opset_import: ["": 11]> g (float[N, 64] x) => (float[N, 64] y) <float[64, 64] w> { y = MatMul (x, w) }'
    model = prepare(parse_graph(source), cast_half(stored=True))
    outcome = Outcome("")
    assert not cast_half(stored=True, dtype="bfloat16").asked(model, outcome)
    assert [skip.reason for skip in outcome.skipped] == ["opset 11 has no Cast of bfloat16; `--opset 13` raises it"]
    assert cast_half(stored=True).asked(model, Outcome(""))


def test_what_has_no_known_dtype_is_cast_where_a_layer_reads_it() -> None:
    source = """<ir_version: 10, opset_import: ["": 20, "com.microsoft": 1]>
    g (float[N, 5, 32] x, float[N, 5, 32] s) => (float[N, 5, 40] y)
    <float[32] g, float[32, 32] w, float[32, 32] v, float[40, 32] u> {
      n = com.microsoft.SkipSimplifiedLayerNormalization (x, s, g)
      a = MatMul (n, w)
      b = MatMul (n, v)
      c = Mul (a, b)
      m = com.microsoft.SkipSimplifiedLayerNormalization (c, x, g)
      t = Transpose <perm = [1, 0]> (u)
      y = MatMul (m, t)
    }"""
    model = oir.from_proto(onnx.shape_inference.infer_shapes(parse_graph(source)))
    edit.name_nodes(model)
    for node in walk(model, "MatMul", "Mul"):
        node.outputs[0].type = oir.TensorType(oir.DataType.FLOAT)
    assert next(iter(model.graph)).outputs[0].dtype is None
    samples, one = list(make_samples(model)), cast_half()
    edits = one.propose(model, context_for(model, samples), Outcome(""))
    assert len(edits) == 3
    for chosen in (edits, edits[:1], edits[2:]):
        after, _ = lossy.apply(model, chosen, [one])
        first, now = (OrtRunner(each, optimize=True) for each in (model, after))
        for sample in samples:
            wanted, found = (each.run(sample.feeds)["y"] for each in (first, now))
            np.testing.assert_allclose(found, wanted, atol=2e-2 * max(float(np.abs(wanted).max()), 1e-3))
        first.close()
        now.close()
