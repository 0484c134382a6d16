"""ONNX Runtime observed from inside: the numbers are those of the model, whatever is fused, and memory is bounded."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import numpy as np
import onnx_ir as oir
import pytest
from observed import DEMO, Rows, digits, masked, named, parsed, seen

from burnish.backends.ort.observe import OrtObserver, outputs_exchanged
from burnish.backends.ort.session import OrtRunner, executor
from burnish.frontends import onnx_file
from burnish.ir import text
from burnish.ir.errors import InputError
from burnish.ir.samples import Sample
from burnish.ir.views.convolution import convolutions
from burnish.ir.views.linear import linears
from burnish.passes import sites
from burnish.passes.gram import ConvolutionGram, Gram
from burnish.passes.layers import gram_of, layers
from burnish.passes.reducers import Moments, Range
from burnish.passes.reservoirs import Several
from burnish.passes.sites import Keep, Site


@pytest.mark.parametrize("name", ["digits_vit", "digits_resnet"])
def test_every_value_is_what_the_model_defines_even_where_operators_would_be_fused(name: str) -> None:
    model, data = digits(name, count=8)
    values = [out for node in model.graph for out in node.outputs if sites.stored(out) is None]
    before = text.fingerprint(model)
    found = OrtObserver(model).observe({str(v.name): Site(v) for v in values}, Rows(), data, limit=1 << 20)
    with outputs_exchanged(model, values):
        plain = executor(level="off")(model).run(data[0].feeds)
    for value in values:
        (array,) = seen(found, str(value.name))
        expected = plain[str(value.name)].astype(np.float64)
        scale = np.abs(expected).max(initial=1e-30)
        np.testing.assert_allclose(array, expected, rtol=0, atol=2e-5 * scale, err_msg=value.name)
    assert text.fingerprint(model) == before


def test_the_gram_matrices_of_all_layers_are_those_of_their_inputs() -> None:
    model, data = digits("digits_vit")
    wanted = {str(layer.node.name): Site(layer.input) for layer in linears(model)}
    observer = OrtObserver(model)
    found = observer.observe(wanted, Gram(), data)
    rows = observer.observe(wanted, Rows(), data)
    for name, reducer in found.items():
        assert isinstance(reducer, Gram)
        x = np.concatenate([a.reshape(-1, a.shape[-1]) for a in seen(rows, name)]).astype(np.float64)
        direct = x.T @ x
        assert reducer.rows == len(x)
        assert np.abs(reducer.matrix - direct).max() < 1e-6 * np.abs(direct).max()


def test_a_convolution_is_observed_through_its_view() -> None:
    model, data = digits("digits_resnet")
    layers = {str(layer.node.name): layer for layer in convolutions(model)}
    reducers = {
        name: ConvolutionGram(
            kernel=one.kernel, strides=one.strides, dilations=one.dilations, pads=one.pads, groups=one.groups
        )
        for name, one in layers.items()
    }
    observer = OrtObserver(model)
    found = observer.observe({name: Site(one.input) for name, one in layers.items()}, reducers, data)
    outputs = observer.observe({name: Site(one.output) for name, one in layers.items()}, Gram(axis=1), data)
    for name, layer in layers.items():
        patches, output = found[name], outputs[name]
        assert isinstance(patches, Gram) and isinstance(output, Gram) and layer.bias() is None
        flat = layer.weight().reshape(layer.out_channels, -1)
        assert patches.rows == output.rows
        expected = np.abs(output.matrix).max()
        np.testing.assert_allclose(flat @ patches.matrix @ flat.T, output.matrix, rtol=0, atol=1e-5 * expected)


def test_a_limit_in_bytes_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    model, data = digits("digits_vit")
    wanted = {str(layer.node.name): Site(layer.input) for layer in linears(model)}
    held: list[int] = []
    run = OrtRunner.run

    def measured(self: OrtRunner, feeds: Any) -> dict[str, np.ndarray]:
        found = run(self, feeds)
        held.append(sum(array.nbytes for array in found.values()))
        return found

    monkeypatch.setattr(OrtRunner, "run", measured)
    largest = 0
    runs = []
    for limit in (1 << 30, 1 << 18, 3 << 16):
        held.clear()
        found = OrtObserver(model).observe(wanted, Moments(), data, limit=limit)
        assert max(held) <= limit and len(found) == len(wanted)
        runs.append(len(held))
        largest = max(largest, *held)
    assert runs[0] == len(data) < runs[1] < runs[2] and largest > 1 << 18
    with pytest.raises(InputError, match="more than 1,000"):
        OrtObserver(model).observe(wanted, Moments(), data, limit=1000)


def test_sites_of_one_value_share_computation_and_memory_and_can_be_merged_apart() -> None:
    model, data = masked()
    x = Site(named(model, "x"))
    wanted = {"q": x, "k": x, "wide": x, "other": Site(named(model, "y"))}
    reducers = {"q": Gram(), "k": Gram(), "wide": Gram(exact=True), "other": Gram()}
    observer = OrtObserver(model)
    found, more = (observer.observe(wanted, reducers, part) for part in (data[:1], data[1:]))
    assert isinstance(found["q"], Gram) and isinstance(found["k"], Gram)
    assert found["q"].matrix is found["k"].matrix and found["q"] is not found["k"]
    for name, reducer in found.items():
        reducer.merge(more[name])
    whole = observer.observe(wanted, reducers, data)
    for name, reducer in whole.items():
        merged = found[name]
        assert isinstance(reducer, Gram) and isinstance(merged, Gram) and merged.rows == reducer.rows
        np.testing.assert_allclose(merged.matrix, reducer.matrix, rtol=1e-5)


def test_inputs_outputs_and_weights_are_values_too() -> None:
    model, data = masked()
    names = ["ids", "w", "y"]
    found = OrtObserver(model).observe({name: Site(named(model, name)) for name in names}, Rows(), data)
    assert [len(seen(found, name)) for name in names] == [3, 1, 3]
    np.testing.assert_array_equal(seen(found, "ids")[1], data[1].feeds["ids"])


@pytest.mark.parametrize(
    ("source", "name", "reason"),
    [
        (
            "g (bool c, float[2] x) => (float[2] y) { y = If (c) <then_branch = a () => (float[2] p) { p = Neg (x) }, "
            "else_branch = b () => (float[2] q) { q = Relu (x) }> }",
            "p",
            "sub-graph",
        ),
        ("g (float[2] x) => (float[2] y) { y = Relu (x) }", "yy", "did you mean `y`?"),
    ],
)
def test_values_that_cannot_be_observed_are_refused_by_name(source: str, name: str, reason: str) -> None:
    with pytest.raises(InputError) as raised:
        named(parsed(source), name)
    assert reason in str(raised.value)


def test_values_that_cannot_be_observed_are_refused_with_the_reason() -> None:
    model = parsed(
        "g (bool c, float[2] x) => (float[2] y) { y = If (c) <then_branch = a () => (float[2] p) { p = Neg (x) }, "
        "else_branch = b () => (float[2] q) { q = Relu (x) }> s = SequenceConstruct (x, x) }"
    )
    inner = next(out for node in model.graph.all_nodes() for out in node.outputs if out.name == "p")
    sequence = named(model, "s")
    sequence.type = oir.SequenceType(oir.TensorType(oir.DataType.FLOAT))
    data = [Sample("one", {"c": np.array(True), "x": np.ones(2, np.float32)})]
    for value, reason in ((inner, "inside a sub-graph"), (sequence, "it is no tensor")):
        with pytest.raises(InputError, match=reason):
            OrtObserver(model).observe({"site": Site(value)}, Rows(), data)


def once(data: list[Sample]) -> Iterator[Sample]:
    yield from data


def test_what_cannot_work_is_an_error_with_its_place() -> None:
    model, data = masked()
    observer = OrtObserver(model)
    site = {"x": Site(named(model, "x"))}
    with pytest.raises(InputError, match="read only once"):
        observer.observe(site, Moments(), once(data))
    with pytest.raises(InputError, match="no samples"):
        observer.observe(site, Moments(), [])
    with pytest.raises(InputError, match="no reducer"):
        observer.observe(site, {"z": Moments()}, data)
    with pytest.raises(InputError, match="value `x`, sample `0`: an array of shape .* has no axis 7"):
        observer.observe(site, Moments(axis=7), data)
    with pytest.raises(InputError, match="sample `bad`"):
        observer.observe(site, Moments(), [Sample("bad", {"ids": np.full((1, 2), 99), "mask": np.ones((1, 2), int)})])
    with pytest.raises(InputError, match="has the shape"):
        observer.observe({"x": Site(named(model, "x"), Keep("mask", (1, 2)))}, Moments(), data)
    with pytest.raises(InputError, match="no mask `other`"):
        observer.observe({"x": Site(named(model, "x"), Keep("other", (0, 1)))}, Moments(), data)


def test_an_observer_is_a_runner() -> None:
    model, data = masked()
    observer = OrtObserver(model)
    expected = executor()(model).run(data[0].feeds)
    for _ in range(2):
        found = observer.run(data[0].feeds)
        assert found.keys() == expected.keys()
        np.testing.assert_array_equal(found["y"], expected["y"])
        observer.close()


@pytest.mark.parametrize("name", ["digits_vit", "digits_resnet"])
def test_torch_gives_the_same_numbers(name: str) -> None:
    pytest.importorskip("torch")
    from burnish.backends.fx.observe import FxObserver

    model, data = digits(name)
    found = layers(model)
    wanted = {key: Site(layer.input) for key, layer in found.items()} | {"logits": Site(named(model, "logits"))}
    reducers = {key: Several((gram_of(layer), Range())) for key, layer in found.items()} | {"logits": Gram()}
    ort, torch = OrtObserver(model), FxObserver(model)
    ours, theirs = ort.observe(wanted, reducers, data), torch.observe(wanted, reducers, data)
    for key, one in ours.items():
        other = theirs[key]
        pairs = zip(getattr(one, "parts", (one,)), getattr(other, "parts", (other,)), strict=True)
        for first, second in pairs:
            a, b = (r.matrix if isinstance(r, Gram) else r.absmax for r in (first, second))
            assert np.abs(a - b).max() <= 1e-5 * np.abs(a).max()
    expected, other_outputs = ort.run(data[0].feeds), torch.run(data[0].feeds)
    np.testing.assert_allclose(other_outputs["logits"], expected["logits"], rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_gram_matrices_of_every_layer_cost_no_more_than_running_the_model() -> None:
    from burnish.tools.research import observing as research
    from burnish.tools.research import zoo

    model = onnx_file.read(zoo.path("a2-minilm"))
    _, wanted = research.inputs_of(model)
    assert research.ratio(model, research.Text(model, 128, 8), wanted, Gram(), rounds=3)["ratio"] <= 2.0


@pytest.mark.slow
def test_memory_does_not_grow_with_the_number_of_samples() -> None:
    env = {**os.environ, "PYTHONPATH": str(DEMO.parents[1] / ".src")}

    def peak(count: int) -> float:
        command = [sys.executable, "-m", "burnish.tools.research.observing", "--peak", str(count), str(1 << 30)]
        found: dict[str, float] = json.loads(subprocess.run(command, capture_output=True, check=True, env=env).stdout)
        return found["peak"]

    assert peak(128) < 1.05 * peak(32)
