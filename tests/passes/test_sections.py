"""Sections: a chain of them computes what the model computes, and an edit leaves those alone that it does not touch."""

from __future__ import annotations

import tempfile
from functools import cache
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as oir
import pytest
from block_networks import Cached, ConvNet, Encoder, Grid, Translator, UNet, built, exported, torch
from golden import parse_graph
from laws import make_samples
from networks import simple_net
from remove_one import RemoveOne
from scale_one import Scale

from burnish.backends.ort.session import executor
from burnish.frontends import load
from burnish.ir.network import reads
from burnish.ir.samples import Sample
from burnish.ir.views.blocks import stacks
from burnish.passes import lossy
from burnish.passes.lossy import LossyPass
from burnish.passes.pipeline import Pipeline
from burnish.passes.recipes import NORMAL_FORM
from burnish.passes.rerun import Rerun
from burnish.passes.sections import cut, places

DEMO = Path(__file__).resolve().parents[2] / "tools" / "demo"
WORDS = {"ids": {0: "batch", 1: "seq"}, "mask": {0: "batch", 1: "seq"}, "target": {0: "batch", 1: "tokens"}}
CHOICE = """<ir_version: 10, opset_import: ["": 20]>
g (float[N, 4] x, bool p) => (float[N, 4] y) <float[4, 4] a, float[4, 4] b, float[4, 4] c, float[4, 4] d> {
  h = MatMul (x, a)  r = Relu (h)  k = MatMul (r, b)  s = Add (x, k)
  m = If (p) <
    then_branch = t () => (float[N, 4] one) { one = Mul (s, h) },
    else_branch = e () => (float[N, 4] two) { two = Sub (s, r) }
  >
  n = MatMul (m, c)  q = Relu (n)  o = MatMul (q, d)  y = Add (m, o)
}"""
SEQUENCE = """<ir_version: 10, opset_import: ["": 20]>
g (float[N, 4] x) => (float[N, 4] y) <float[4, 4] a, float[4, 4] b, float[4, 4] c, float[4, 4] d> {
  h = MatMul (x, a)  r = Relu (h)  k = MatMul (r, b)  s = Add (x, k)
  l = SequenceConstruct (h, s)
  n = MatMul (s, c)  q = Relu (n)  o = MatMul (q, d)  t = Add (s, o)
  i = Constant <value_int: int = 0> ()  e = SequenceAt (l, i)  y = Add (t, e)
}"""


def random(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(3))


@cache
def model(name: str) -> oir.Model:
    ids = torch.tensor([[1, 2, 3], [4, 5, 6]])
    image = {"image": {0: "batch"}, "y": {0: "batch"}}
    if name.startswith("digits"):
        made = load(DEMO / f"{name}.onnx")
    elif name in ("ConvNet", "UNet", "Grid"):
        module = built({"ConvNet": ConvNet, "UNet": UNet, "Grid": Grid}[name]())
        made = exported(module, (random(2, 3, 16, 16),), ["image"], ["y"], image)
    elif name == "Translator":
        made = exported(built(Translator()), (ids, ids), ["ids", "target"], ["y"], WORDS)
    elif name == "Cached":
        past = [random(2, 2, 4, 8) for _ in range(6)]
        names = [f"past.{index}" for index in range(6)]
        axes = {"ids": WORDS["ids"]} | {one: {0: "batch", 2: "old"} for one in names}
        outputs = ["y", *(f"present.{index}" for index in range(6))]
        made = exported(built(Cached()), (ids, *past), ["ids", *names], outputs, axes)
    elif name == "plain":
        with tempfile.TemporaryDirectory() as folder:
            simple_net(Path(folder) / "plain.onnx")
            made = oir.from_proto(onnx.load(Path(folder) / "plain.onnx"))
    elif name in ("If", "sequence"):
        made = load(parse_graph(CHOICE if name == "If" else SEQUENCE))
    else:
        made = exported(built(Encoder(name)), (ids, torch.ones_like(ids)), ["ids", "mask"], ["y"], WORDS)
    return Pipeline(NORMAL_FORM).rewrite(made).model


MODELS = ["digits_resnet", "digits_vit", "ConvNet", "UNet", "Grid", "Translator", "Cached", "pre", "post"]
MODELS += ["parallel", "plain", "If", "sequence"]


def outputs(one: oir.Model, sample: Sample) -> dict[str, np.ndarray]:
    runner = executor(level="off")(one)
    names = {lossy.port(value): str(value.name) for value in one.graph.inputs}
    found = runner.run({name: sample.feeds[port] for port, name in names.items() if port in sample.feeds})
    runner.close()
    return {lossy.port(value): found[str(value.name)] for value in one.graph.outputs}


def check_same(found: dict[str, np.ndarray], wanted: dict[str, np.ndarray]) -> None:
    assert found.keys() == wanted.keys()
    for name, array in wanted.items():
        np.testing.assert_allclose(found[name], array, rtol=1e-5, atol=1e-5 * max(1, np.abs(array).max(initial=0)))


@pytest.mark.parametrize("name", MODELS)
def test_sections_are_a_chain_of_all_nodes(name: str) -> None:
    one = model(name)
    sections = cut(one, places(one, stacks(one)))
    placed = {node: section.number for section in sections for node in section.nodes}
    assert set(placed) == set(one.graph)
    for section in sections:
        for value in (value for node in section.nodes for value in reads(node)):
            if value.producer() is not None and value.producer().op_type != "Constant":
                assert placed[value.producer()] <= section.number
    assert [section.key for section in sections] == [section.key for section in cut(one, places(one, stacks(one)))]


@pytest.mark.parametrize("name", MODELS)
def test_the_chain_computes_what_the_model_computes(name: str) -> None:
    one = model(name)
    samples = list(make_samples(one))[:2]
    rerun = Rerun(one, samples, executor(level="off"), 1 << 30)
    rerun.prepare()
    for number, sample in enumerate(samples):
        check_same(rerun.original(number), outputs(one, sample))
    copy, _ = lossy.apply(one, [], [])
    route = rerun.route(copy)
    assert not route.steps
    with rerun.running(route) as run:
        assert all(run(0)[name] is array for name, array in rerun.original(0).items())
    rerun.close()


@pytest.mark.parametrize(("name", "memory"), [*((name, 1 << 30) for name in MODELS), ("Cached", 0)])
def test_an_edited_model_is_run_from_its_edit_on(name: str, memory: int) -> None:
    one = model(name)
    passes: list[LossyPass] = [RemoveOne(), Scale()]
    edits = [edit for each in passes for edit in each.propose(one, None, None)]
    samples = list(make_samples(one))[:2]
    rerun = Rerun(one, samples, executor(level="off"), memory)
    rerun.prepare()
    whole = cut(one, places(one, stacks(one)))
    for edit in edits[:: max(1, len(edits) // 5)]:
        edited, _ = lossy.apply(one, [edit], passes)
        route = rerun.route(edited)
        assert len(route.steps) <= len(whole)
        with rerun.running(route) as run:
            for number, sample in enumerate(samples):
                check_same(run(number), outputs(edited, sample))
    rerun.close()


@pytest.mark.parametrize(("name", "blocks"), [("digits_vit", 3), ("pre", 3)])
def test_an_edit_of_a_block_runs_that_block_and_what_follows(name: str, blocks: int) -> None:
    one = model(name)
    loads: list[oir.Model] = []

    def execute(part: oir.Model):
        loads.append(part)
        return executor()(part)

    samples = list(make_samples(one))[:1]
    rerun = Rerun(one, samples, execute, 1 << 30)
    rerun.prepare()
    found = stacks(one).blocks
    assert len(found) == blocks
    removed = RemoveOne()
    loads.clear()
    for edit, block in zip(removed.propose(one, None, None), found, strict=True):
        route = rerun.route(lossy.apply(one, [edit], [removed])[0])
        with rerun.running(route) as run:
            run(0)
        assert len(route.steps) <= blocks - block.index
    assert not loads, "a model without a block consists of sections of the original"
    scaled = Scale()
    weight = next(
        value.name
        for node in found[1].nodes
        for value in node.inputs
        if value.is_initializer() and value.const_value.size > 64
    )
    route = rerun.route(lossy.apply(one, [scaled.edit(weight, 2.0)], [scaled])[0])
    with rerun.running(route) as run:
        run(0)
    assert len(loads) == 1 and len(route.steps) <= blocks
    rerun.close()


def test_caches_that_an_edit_renames_are_fed_and_compared_as_what_they_were() -> None:
    one = model("Cached")
    samples = [sample for sample in make_samples(one) if sample.feeds["past.0"].shape[2]][:2]
    rerun = Rerun(one, samples, executor(level="off"), 1 << 30)
    rerun.prepare()
    plain, shifted = RemoveOne(), RemoveOne(shift=True)
    for old, new in zip(plain.propose(one, None, None), shifted.propose(one, None, None), strict=True):
        routes = [rerun.route(lossy.apply(one, [edit], [plain, shifted])[0]) for edit in (old, new)]
        with rerun.running(routes[0]) as first, rerun.running(routes[1]) as second:
            for number in range(len(samples)):
                check_same(second(number), first(number))
    rerun.close()


def test_functions_are_not_taken_for_one_another() -> None:
    text = """<ir_version: 10, opset_import: ["": 20, "own": 1]>
    g (float[N, 4] x) => (float[N, 4] y) { y = own.twice (x) }
    <domain: "own", opset_import: ["": 20]> twice (a) => (b) { b = Add (a, a) }"""
    one = load(parse_graph(text))
    keys = [section.key for section in cut(one, {})], [section.key for section in cut(one.clone(), {})]
    assert keys[0] != keys[1]


def test_weights_are_told_apart_by_their_values_or_their_tensors() -> None:
    def key(weight: np.ndarray, *, share: oir.TensorProtocol | None = None) -> object:
        one = load(parse_graph("g (float[N, 16] x) => (float[N, M] y) <float[16, 16] w> { y = MatMul (x, w) }"))
        one.graph.initializers["w"].const_value = share or oir.tensor(weight.astype(np.float32))
        alive.append(one)
        return cut(one, {})[0].key

    alive: list[oir.Model] = []
    small, large = np.ones((16, 2)), np.ones((16, 16))
    assert key(small) == key(small) != key(2 * small)
    assert key(large) != key(large)
    shared = oir.tensor(large.astype(np.float32))
    assert key(large, share=shared) == key(large, share=shared)


def test_a_model_without_blocks_is_cut_where_it_is_narrow() -> None:
    one = model("plain")
    assert not stacks(one).blocks
    sections = cut(one, places(one, stacks(one)))
    assert 6 <= len(sections) <= 9
    assert all(len(section.inputs) == len(section.outputs) == 1 for section in sections)


def test_outputs_that_no_node_computes_and_inputs_that_may_be_left_out() -> None:
    x = oir.val("x", oir.DataType.FLOAT, ["N", 4])
    b = oir.val("b", oir.DataType.FLOAT, [4])
    b.const_value = oir.tensor(np.ones(4, np.float32), name="b")
    w = oir.val("w", oir.DataType.FLOAT, [4], const_value=oir.tensor(np.full(4, 2, np.float32), name="w"))
    add = oir.node("Add", [x, b], name="add")
    mul = oir.node("Mul", [add.outputs[0], w], name="mul")
    add.outputs[0].name, mul.outputs[0].name = "s", "y"
    graph = oir.Graph(
        [x, b], [mul.outputs[0], x, w], nodes=[add, mul], initializers=[b, w], opset_imports={"": 20}, name="g"
    )
    one = oir.Model(graph, ir_version=10)
    given = np.ones((2, 4), np.float32)
    samples = [Sample("default", {"x": given}), Sample("given", {"x": given, "b": np.zeros(4, np.float32)})]
    rerun = Rerun(one, samples, executor(), 1 << 30)
    rerun.prepare()
    for number, expected in enumerate((4.0, 2.0)):
        found = rerun.original(number)
        assert found.keys() == {"y", "x", "w"}
        assert (found["y"] == expected).all() and (found["x"] == 1).all() and (found["w"] == 2).all()
    rerun.close()
