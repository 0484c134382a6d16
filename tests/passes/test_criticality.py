"""Layer criticality: nothing for the same weights, the same in any order, and what a reset is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as oir
import pytest

from burnish.backends.ort.session import executor
from burnish.frontends import load, onnx_file, samples
from burnish.ir import text
from burnish.ir.errors import InputError
from burnish.ir.samples import Sample
from burnish.passes import criticality
from burnish.passes.criticality import Change, Criticality, Reading
from burnish.passes.resets import resettable
from burnish.passes.sites import Keep

DEMO = Path(__file__).parents[2] / "tools" / "demo"


def parsed(source: str, **arrays: np.ndarray) -> oir.Model:
    proto = onnx.parser.parse_model(f'<ir_version: 10, opset_import: ["": 20]> {source}')
    for name, array in arrays.items():
        proto.graph.initializer.append(onnx.numpy_helper.from_array(array.astype(np.float32), name))
    return load(proto)


def measured(model: oir.Model, data: list[Sample], look: Reading | None = None) -> Criticality:
    subject = resettable(model)
    return Criticality(subject, executor()(subject.model), data, look or criticality.reading(model))


@pytest.fixture(scope="module")
def resnet() -> tuple[oir.Model, list[Sample]]:
    model = onnx_file.read(DEMO / "digits_resnet.onnx")
    images = np.concatenate([one.feeds["image"] for one in samples.read_samples(DEMO / "digits.npz", model)])
    return model, [Sample(str(start), {"image": images[start : start + 50]}) for start in range(0, 200, 50)]


def test_the_same_weights_change_exactly_nothing(resnet: tuple[oir.Model, list[Sample]]) -> None:
    measure = measured(*resnet)
    for part in measure.subject.parts:
        same = measure.change(part.trained())
        assert same == Change(0.0, 0.0, 0.0, 0.0, 0)


def test_the_order_of_layers_and_samples_does_not_matter(resnet: tuple[oir.Model, list[Sample]]) -> None:
    model, data = resnet
    before = text.fingerprint(model)
    one, other = measured(model, data), measured(model, data[::-1])
    forward = {part.name: one.change(part.drawn(0, 1)) for part in one.subject.parts}
    for part in reversed(other.subject.parts):
        change, same = other.change(part.drawn(0, 1)), forward[part.name]
        assert change.criticality == pytest.approx(same.criticality, rel=1e-12, abs=1e-12)
        assert (change.top1, change.lost) == (same.top1, 0)
    assert text.fingerprint(model) == before
    assert len(forward) == 10 + 9
    assert all(0 < change.criticality <= 100 for change in forward.values())


def test_overrides_are_what_editing_the_weights_would_give(resnet: tuple[oir.Model, list[Sample]]) -> None:
    model, data = resnet
    measure = measured(model, data[:1])
    part = measure.subject.parts[3]
    change = measure.change(part.drawn(0, 0))
    edited = onnx_file.read(DEMO / "digits_resnet.onnx")
    for name, array in part.drawn(0, 0).items():
        edited.graph.initializers[name].const_value = oir.tensor(array, name=name)
    before, after = (executor()(one).run(data[0].feeds)["logits"].astype(np.float64) for one in (model, edited))
    p, q = (np.exp(z) / np.exp(z).sum(1, keepdims=True) for z in (before, after))
    cosine = (p * q).sum(1) / np.linalg.norm(p, axis=1) / np.linalg.norm(q, axis=1)
    assert change.criticality == pytest.approx(100 * (1 - cosine.mean()), abs=1e-3)
    assert change.l1 == pytest.approx(np.abs(p - q).sum(1).mean(), abs=1e-4)
    assert change.l2 == pytest.approx(np.linalg.norm(p - q, axis=1).mean(), abs=1e-4)
    assert change.top1 == pytest.approx((p.argmax(1) != q.argmax(1)).mean())


def test_two_seeds_agree_on_what_is_critical(resnet: tuple[oir.Model, list[Sample]]) -> None:
    measure = measured(*resnet)
    found = [
        [np.mean([measure.change(part.drawn(seed, n)).criticality for n in range(3)]) for part in measure.subject.parts]
        for seed in (1, 2)
    ]
    assert np.corrcoef(found)[0, 1] > 0.9


@pytest.mark.slow
def test_two_seeds_agree_on_a_trained_classifier_with_weights_in_constants() -> None:
    from burnish.tools.research import zoo

    model = onnx_file.read(zoo.path("a6-ppocr-cls"))
    assert not [value for value in model.graph.initializers.values() if value.const_value is not None]
    images = np.concatenate([feeds["x"] for feeds in zoo.task("a6-ppocr-cls").samples[:20]])
    data = [Sample("lines", {"x": images})]
    measure = measured(model, data)
    assert measure.look.kind == "probabilities" and measure.classes == 2
    found = [
        [np.mean([measure.change(part.drawn(seed, n)).criticality for n in range(3)]) for part in measure.subject.parts]
        for seed in (1, 2)
    ]
    assert np.corrcoef(found)[0, 1] > 0.8


def torch_bounds(kind: str) -> tuple[float, float]:
    """The largest weight and bias of a new torch layer of the sizes that the test below has."""
    import torch

    torch.manual_seed(0)
    layer: Any = {
        "linear": lambda: torch.nn.Linear(400, 900),
        "conv": lambda: torch.nn.Conv2d(16, 90, 5, groups=2),
        "transposed": lambda: torch.nn.ConvTranspose2d(90, 16, 5, groups=2),
    }[kind]()
    return float(layer.weight.detach().abs().max()), float(layer.bias.detach().abs().max())


@pytest.mark.parametrize(
    ("kind", "graph", "weight", "bias"),
    [
        ("linear", "g (float[N, 400] x) => (float[N, 900] y) { y = Gemm <transB = 1> (x, w, b) }", (900, 400), 900),
        ("linear", "g (float[N, 400] x) => (float[N, 900] y) { m = MatMul (x, w) y = Add (m, b) }", (400, 900), 900),
        (
            "conv",
            "g (float[N, 16, 9, 9] x) => (float[N, 90, h, i] y) { y = Conv <group = 2> (x, w, b) }",
            (90, 8, 5, 5),
            90,
        ),
        (
            "transposed",
            "g (float[N, 90, 9, 9] x) => (float[N, 16, h, i] y) { y = ConvTranspose <group = 2> (x, w, b) }",
            (90, 8, 5, 5),
            16,
        ),
    ],
)
def test_a_reset_layer_is_like_a_new_one_of_torch(kind: str, graph: str, weight: tuple[int, ...], bias: int) -> None:
    pytest.importorskip("torch")
    (part,) = resettable(parsed(graph, w=np.ones(weight), b=np.ones(bias))).parts
    found = part.drawn(0, 0)
    largest, largest_bias = torch_bounds(kind)
    assert found["w"].shape == weight and found["w"].dtype == np.float32
    assert np.abs(found["w"]).max() == pytest.approx(largest, rel=1e-2)
    assert np.abs(found["b"]).max() == pytest.approx(largest_bias, rel=0.15)
    assert abs(found["w"].mean()) < 1e-2 * largest and len(np.unique(found["b"])) == bias
    again, other = part.drawn(0, 0), part.drawn(0, 1)
    assert np.array_equal(again["w"], found["w"]) and not np.array_equal(other["w"], found["w"])


def test_a_reset_batch_norm_changes_nothing_by_itself() -> None:
    graph = """g (float[N, 2] x) => (float[N, 2] y) { y = BatchNormalization (x, one, zero, zero, one) }"""
    found = resettable(parsed(graph, one=np.full(2, 3), zero=np.ones(2)))
    (part,) = found.parts
    # The exporter shared equal vectors: each is reset on its own.
    assert len(part.tensors) == 4 and part.parameters == 8
    x = np.random.default_rng(0).standard_normal((5, 2)).astype(np.float32)
    runner = executor()(found.model)
    np.testing.assert_allclose(runner.run({"x": x, **part.drawn(0, 0)})["y"], x, atol=1e-4)
    np.testing.assert_allclose(runner.run({"x": x})["y"], (x - 1) / np.sqrt(3) * 3 + 1, rtol=1e-4)


SHARED = """g (float[N, 3] x) => (float[N, 3] y) {
  a = Gemm (x, w, b)  r = Relu (a)  c = Gemm <transB = 1> (r, w, b)  d = MatMul (c, v)  y = Add (d, b) }"""


def test_a_shared_matrix_is_one_part_and_a_shared_vector_is_not() -> None:
    rng = np.random.default_rng(0)
    model = parsed(SHARED, w=rng.standard_normal((3, 3)), v=rng.standard_normal((3, 3)), b=np.zeros(3))
    found = resettable(model)
    assert [(part.users, len(part.tensors)) for part in found.parts] == [(2, 3), (1, 2)]
    names = [str(tensor.value.name) for part in found.parts for tensor in part.tensors]
    assert len(set(names)) == 5 and names[0] == "w" and "v" in names
    sample = {"x": rng.standard_normal((4, 3)).astype(np.float32)}
    expected = executor()(model).run(sample)["y"]
    np.testing.assert_array_equal(executor()(found.model).run(sample)["y"], expected)


def test_weights_in_constants_and_in_branches_are_reset_too() -> None:
    source = """g (bool c, float[N, 2] x) => (float[N, 2] y) {
      w = Constant <value = float[2, 2] {1, 2, 3, 4}> ()
      h = MatMul (x, w)
      y = If (c) <then_branch = t () => (float[N, 2] p) { v = Constant <value = float[2, 2] {1, 0, 0, 1}> ()
                                                           p = MatMul (h, v) },
                  else_branch = e () => (float[N, 2] q) { q = Relu (h) }> }"""
    found = resettable(parsed(source))
    assert len(found.parts) == 2 and not found.skipped
    sample = {"c": np.array(True), "x": np.ones((1, 2), np.float32)}
    runner = executor()(found.model)
    assert runner.run(sample)["y"].tolist() == [[4, 6]]
    (name,) = found.parts[1].trained()
    assert runner.run({**sample, name: np.zeros((2, 2), np.float32)})["y"].tolist() == [[0, 0]]


def test_what_cannot_be_reset_is_said() -> None:
    source = """g (float[N, 4] x) => (float[N, 2] y) <int8[4, 2] q = {1,2,3,4,5,6,7,8}, float s = {0.1}> {
      w = DequantizeLinear (q, s)  y = MatMul (x, w) }"""
    found = resettable(parsed(source))
    assert not found.parts and list(found.skipped.values()) == ["its weight is quantized"]


@pytest.mark.parametrize(
    ("graph", "kind", "output"),
    [
        ("{ a = MatMul (x, w)  p = Softmax (a)  y = Relu (x) }", "probabilities", "p"),
        ("{ a = MatMul (x, w)  s = Softmax <axis = 1> (a)  p = Identity (s)  y = Relu (x) }", "probabilities", "p"),
        ("{ a = MatMul (x, w)  s = Softmax (a)  p = Mul (s, one)  y = Relu (x) }", "probabilities", "p"),
        ("{ y = Relu (x)  p = MatMul (x, w) }", "logits", "p"),
        ("{ a = MatMul (x, w)  p = Softmax <axis = 0> (a)  y = Tanh (x) }", "values", "y"),
        ("{ y = Relu (x)  a = MatMul (x, w)  p = Sigmoid (a) }", "chances", "p"),
        (
            "{ y = Relu (x)  a = MatMul (x, w)  m = ReduceMax (a, last)  d = Sub (a, m)  e = Exp (d)"
            "  s = ReduceSum (e, last)  p = Div (e, s) }",
            "probabilities",
            "p",
        ),
        (
            "{ y = Relu (x)  a = MatMul (x, w)  e = Exp (a)  s = ReduceSum (e, first)  p = Div (e, s) }",
            "values",
            "y",
        ),
        (
            "{ y = Relu (x)  a = MatMul (x, w)  s = ReduceSum (a)  c = Greater (s, one)"
            "  p = If (c) <then_branch = t () => (float[N, 3] u) { u = Softmax (a) },"
            " else_branch = e () => (float[N, 3] v) { v = Softmax (x) }> }",
            "probabilities",
            "p",
        ),
    ],
)
def test_an_output_is_read_by_what_computes_it(graph: str, kind: str, output: str) -> None:
    axes = "<int64[1] last = {1}, int64[1] first = {0}>"
    model = parsed(f"g (float[N, 3] x) => (float[N, 3] y, float[N, 3] p) {axes} {graph}", w=np.eye(3), one=np.ones(()))
    found = criticality.reading(model)
    assert (found.kind, found.output) == (kind, output)
    assert criticality.reading(model, "y", "logits") == Reading("y", "logits", "asked for")


def test_values_are_compared_row_by_row_as_they_are() -> None:
    model = parsed("g (float[N, 2] x) => (float[N, 2] y) { a = MatMul (x, w)  y = Relu (a) }", w=np.eye(2))
    measure = measured(model, [Sample("one", {"x": np.array([[1, 0], [1, 1], [0, 0]], np.float32)})])
    assert measure.look.kind == "values"
    swapped = np.array([[0, 1], [1, 0]], np.float32)
    change = measure.change({"w": swapped})
    assert change == Change(pytest.approx(100 / 3), pytest.approx(2 / 3), pytest.approx(2**0.5 / 3), None, 0)


def test_a_chance_is_that_of_yes_against_no() -> None:
    model = parsed("g (float[N, 1] x) => (float[N, 1] y) { a = MatMul (x, w)  y = Sigmoid (a) }", w=np.eye(1))
    measure = measured(model, [Sample("one", {"x": np.array([[50], [-50]], np.float32)})])
    assert measure.classes == 2 and measure.rows == 2
    change = measure.change({"w": -np.eye(1, dtype=np.float32)})
    assert change == Change(pytest.approx(100), pytest.approx(2), pytest.approx(2**0.5), 1, 0)


@pytest.mark.parametrize(
    ("ending", "kind"), [("Softmax (m)", "probabilities"), ("Sigmoid (m)", "chances"), ("Tanh (m)", "values")]
)
def test_padding_does_not_count(ending: str, kind: str) -> None:
    graph = f"g (float[b, s, 3] x, int64[b, s] k) => (float[b, s, 3] y) {{ m = MatMul (x, w)  y = {ending} }}"
    model = parsed(graph, w=np.eye(3))
    rng = np.random.default_rng(0)
    x = rng.standard_normal((2, 4, 3)).astype(np.float32)
    mask = np.array([[1, 1, 0, 0], [0, 1, 1, 1]])
    other = {"w": rng.standard_normal((3, 3)).astype(np.float32)}
    found = []
    for filled in (x, np.where(mask[..., None] == 1, x, 9)):
        subject = resettable(model)
        look = criticality.reading(model)
        assert look.kind == kind
        data = [Sample("one", {"x": filled.astype(np.float32), "k": mask})]
        measure = Criticality(subject, executor()(subject.model), data, look, Keep("k", (0, 1)))
        found.append(measure.change(other))
        assert measure.rows == {"probabilities": 5, "chances": 15, "values": 2}[kind]
    assert found[0] == found[1] and found[0].criticality > 0


def test_outputs_that_are_no_longer_finite_count_as_wholly_changed() -> None:
    model = parsed("g (float[N, 2] x) => (float[N, 2] p) { a = MatMul (x, w)  p = Softmax (a) }", w=np.eye(2))
    measure = measured(model, [Sample("one", {"x": np.array([[1, 0], [0, 2]], np.float32)})])
    broken = np.array([[np.nan, 0], [0, 1]], np.float32)
    change = measure.change({"w": broken})
    assert (change.criticality, change.top1, change.lost, change.l1) == (100, 1, 2, 0)


def test_what_cannot_be_measured_is_refused() -> None:
    model = parsed("g (float[N, 2] x) => (float[N, 2] y) { y = MatMul (x, w) }", w=np.eye(2))
    with pytest.raises(InputError, match="no output `z`"):
        criticality.reading(model, "z")
    with pytest.raises(InputError, match="no output of floating point"):
        criticality.reading(parsed("g (float[2] x) => (int64[1] y) { y = Shape (x) }"))
    with pytest.raises(InputError, match="no rows"):
        measured(model, [Sample("empty", {"x": np.ones((0, 2), np.float32)})])
    one = parsed("g (float[N, 2] x) => (float[N, 1] y) { m = MatMul (x, w)  y = Tanh (m) }", w=np.ones((2, 1)))
    with pytest.raises(InputError, match="one number for each sample"):
        measured(one, [Sample("one", {"x": np.ones((1, 2), np.float32)})])
    with pytest.raises(InputError, match="sample `wide`"):
        measured(model, [Sample("wide", {"x": np.ones((1, 3), np.float32)})])
