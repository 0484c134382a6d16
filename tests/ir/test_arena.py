"""No two tensors that are alive at one moment share memory, and the arena is as small as the order of nodes allows."""

from __future__ import annotations

import random
import time
from pathlib import Path

import numpy as np
import onnx_ir as oir
import pytest

from burnish.ir import arena, concrete, cost, liveness, sizes


def random_model(seed: int) -> oir.Model:
    """Nodes that read any earlier values; every value has a random size, equal ones now and then."""
    chance = random.Random(seed)

    def value(name: str) -> oir.Value:
        shape = oir.Shape([chance.choice((1, 8, 8, 8, chance.randint(1, 100)))])
        return oir.Value(name=name, type=oir.TensorType(oir.DataType.FLOAT), shape=shape)

    inputs = [value("in0"), value("in1")]
    values, nodes = list(inputs), []
    for index in range(chance.randint(3, 40)):
        read = chance.choices(values[-6:], k=chance.randint(1, 3))
        operator = chance.choice(("Sum", "Concat", "Reshape", "Max"))
        written = [value(f"v{index}_{which}") for which in range(chance.randint(1, 2))]
        nodes.append(oir.Node("", operator, read, outputs=written, name=f"n{index}"))
        values += written
    outputs = list(dict.fromkeys([*nodes[-1].outputs, chance.choice(values[2:])]))
    return oir.Model(oir.Graph(inputs, outputs, nodes=nodes, opset_imports={"": 20}, name="g"), ir_version=10)


@pytest.mark.parametrize("seed", range(60))
def test_what_is_alive_together_does_not_overlap(seed: int) -> None:
    model = random_model(seed)
    timeline = liveness.timeline(model)
    plan = arena.plan(timeline)
    placed = {id(value): buffer for buffer in plan.buffers for value in buffer.values}
    assert set(placed) == {id(one.value) for one in timeline.lifetimes}
    order = list(model.graph)
    for one in timeline.lifetimes:
        assert placed[id(one.value)].bytes >= one.bytes
        for other in timeline.lifetimes:
            if one is other or one.first > other.last or other.first > one.last:
                continue
            mine, theirs = placed[id(one.value)], placed[id(other.value)]
            if mine is theirs:  # in place: at the one node that reads the first for the last time and writes the second
                early, late = sorted((one, other), key=lambda each: each.first)
                assert early.last == late.first and early.value in order[late.first].inputs
                assert not early.value.is_graph_input() and not early.value.is_graph_output()
            else:
                assert mine.offset + mine.bytes <= theirs.offset or theirs.offset + theirs.bytes <= mine.offset
    assert plan.bound <= plan.bytes <= plan.in_place <= plan.unplanned
    assert plan.bound <= liveness.peak_of(timeline).at_least


def chain(operator: str, length: int, size: int = 100) -> oir.Model:
    values = [
        oir.Value(name=f"v{index}", type=oir.TensorType(oir.DataType.FLOAT), shape=oir.Shape([size]))
        for index in range(length + 1)
    ]
    nodes = [oir.Node("", operator, [values[index]], outputs=[values[index + 1]]) for index in range(length)]
    return oir.Model(oir.Graph(values[:1], values[-1:], nodes=nodes, opset_imports={"": 20}), ir_version=10)


def test_a_chain_needs_its_input_and_one_buffer_in_place_and_two_otherwise() -> None:
    in_place = arena.plan(liveness.timeline(chain("Relu", 50)))
    assert (in_place.unplanned, in_place.in_place, in_place.bytes) == (400 * 51, 800, 800)
    apart = arena.plan(liveness.timeline(chain("Softmax", 50)))
    assert (apart.in_place, apart.bytes, apart.bound) == (400 * 51, 1200, 1200)


def test_what_a_branch_still_reads_is_not_written_over() -> None:
    text = """<ir_version: 10, opset_import: ["": 20]>
      g (float[10] x, bool c) => (float[10] z) {
        a = Relu (x)
        b = Neg (a)
        d = If (c) <
          then_branch = t () => (float[10] p) { p = Exp (a) },
          else_branch = f () => (float[10] q) { q = Log (a) }
        >
        z = Add (d, b)
      }"""
    model = oir.from_onnx_text(text)
    for graph in model.graphs():
        for value in (value for node in graph for value in node.outputs):
            value.type, value.shape = oir.TensorType(oir.DataType.FLOAT), oir.Shape([10])
    plan = arena.plan(liveness.timeline(model))
    chains = [{value.name for value in buffer.values} for buffer in plan.buffers]
    assert {"a"} in chains and {"p"} in chains and {"q"} in chains
    assert {"b", "z"} in chains or {"d", "z"} in chains


@pytest.mark.parametrize("name", ["digits_resnet", "digits_vit"])
def test_a_model_that_runs_from_its_arena_gives_its_outputs(name: str) -> None:
    from onnx.reference import ReferenceEvaluator

    file = Path(__file__).parents[2] / "tools" / "demo" / f"{name}.onnx"
    feeds = {"image": np.random.default_rng(0).random((2, 1, 8, 8), np.float32)}
    model = oir.load(file)
    numbers = cost.dims_of(model, feeds)
    sized = concrete.concrete(model, numbers)
    plan = arena.plan(liveness.timeline(sized, numbers))
    memory = np.full(plan.bytes, 255, np.uint8)
    offsets = {id(value): buffer.offset for buffer in plan.buffers for value in buffer.values}

    def place(value: oir.Value) -> np.ndarray:
        assert value.shape is not None and value.dtype is not None
        shape = [int(size) for size in value.shape]
        kind = value.dtype.numpy()
        size = int(np.prod(shape)) * kind.itemsize
        start = offsets.get(id(value), 0)
        return memory[start : start + size].view(kind).reshape(shape)

    def read(value: oir.Value) -> np.ndarray:
        tensor = sizes.stored(value)
        return place(value).copy() if tensor is None else tensor.numpy()

    for value in sized.graph.inputs:
        place(value)[...] = feeds[value.name or ""]
    for node in sized.graph:
        if node.op_type == "Constant":
            continue
        given = {value.name or "": read(value) for value in node.inputs if value is not None}
        inputs = [oir.Value(name=key, type=oir.TensorType(oir.DataType.FLOAT)) for key in given]
        copies = {one.name: one for one in inputs}
        attributes = list(node.attributes.values())
        alone = oir.Node(
            node.domain, node.op_type, [copies[v.name] if v else None for v in node.inputs], attributes,
            outputs=[oir.Value(name=value.name, type=value.type) for value in node.outputs],
        )  # fmt: skip
        graph = oir.Graph(inputs, list(alone.outputs), nodes=[alone], opset_imports=model.opset_imports, name="alone")
        found = ReferenceEvaluator(oir.to_proto(oir.Model(graph, ir_version=8))).run(None, given)
        for value, array in zip(node.outputs, found, strict=True):
            place(value)[...] = array
    expected = ReferenceEvaluator(str(file)).run(None, feeds)
    for value, array in zip(sized.graph.outputs, expected, strict=True):
        np.testing.assert_allclose(place(value), array, rtol=1e-5, atol=1e-5)  # alignment decides on rounding


def simple_net() -> oir.Model:
    """SimpleNet (Hasanpour et al., 2016) for images of 32 x 32: convolutions with activations, and pools between."""

    def value(name: str, *shape: int) -> oir.Value:
        return oir.Value(name=name, type=oir.TensorType(oir.DataType.FLOAT), shape=oir.Shape(shape))

    image = value("image", 1, 3, 32, 32)
    last, side, nodes = image, 32, []

    def add(operator: str, *shape: int) -> None:
        nonlocal last
        made = value(f"v{len(nodes)}", *shape)
        nodes.append(oir.Node("", operator, [last], outputs=[made]))
        last = made

    for width in (64, 128, 128, 128, 0, 128, 128, 256, 0, 256, 256, 0, 512, 2048, 256, 0, 256):
        if not width:
            side //= 2
            add("MaxPool", 1, int(last.shape[1]), side, side)  # type: ignore[index,arg-type]
            continue
        add("Conv", 1, width, side, side)
        add("Relu", 1, width, side, side)
    add("GlobalMaxPool", 1, 256, 1, 1)
    add("Flatten", 1, 256)
    add("Gemm", 1, 10)
    return oir.Model(oir.Graph([image], [last], nodes=nodes, opset_imports={"": 17}), ir_version=8)


def test_simple_net_needs_two_of_its_largest_activations_and_the_image() -> None:
    plan = arena.plan(liveness.timeline(simple_net()))
    image = 3 * 32 * 32 * 4
    assert [(size - image) // 1024 for size in (plan.unplanned, plan.in_place)] == [5438, 2825]
    assert plan.bytes == plan.bound == 2 * 128 * 32 * 32 * 4 + image


def test_thousands_of_tensors_alive_together_are_placed_in_seconds() -> None:
    read = oir.Value(name="x", type=oir.TensorType(oir.DataType.FLOAT), shape=oir.Shape([4]))
    made = [oir.Value(name=f"v{n}", type=read.type, shape=read.shape) for n in range(3000)]
    nodes = [oir.Node("", "Relu", [read], outputs=[one], name=f"n{index}") for index, one in enumerate(made)]
    graph = oir.Graph([read], made, nodes=nodes, opset_imports={"": 20}, name="g")
    timeline = liveness.timeline(oir.Model(graph, ir_version=10))
    started = time.process_time()
    assert arena.plan(timeline).bytes == 16 * 3001
    assert time.process_time() - started < 3
