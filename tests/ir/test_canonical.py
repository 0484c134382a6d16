"""Fingerprints are blind to names and order, and to nothing else."""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as oir
import pytest
from golden import parse_graph
from onnx import TensorProto, helper
from spellings import CHANGES, GRAPHS, WEIGHTS_ONLY, model_of

from burnish.ir.canonical import Canonical, Order, canonical, opsets
from burnish.tools.research.respelling import respelled

DEMO = Path(__file__).parents[2] / "tools" / "demo"


def fingerprints(source: str | onnx.ModelProto) -> tuple[str, str]:
    found = canonical(model_of(source))
    return found.structure_fingerprint, found.full_fingerprint


@pytest.mark.parametrize("swap", [False, True])
@pytest.mark.parametrize("name", GRAPHS)
def test_names_and_order_do_not_count(name: str, swap: bool) -> None:
    source = parse_graph(GRAPHS[name])
    for seed in range(20):
        assert fingerprints(respelled(source, seed, swap=swap)) == fingerprints(source)


@pytest.mark.parametrize("name", ["digits_resnet", "digits_vit"])
def test_names_and_order_of_exported_models_do_not_count(name: str) -> None:
    source = onnx.load(DEMO / f"{name}.onnx")
    assert fingerprints(respelled(source, 1)) == fingerprints(respelled(source, 2, swap=True)) == fingerprints(source)


@pytest.mark.parametrize(("name", "old", "new"), CHANGES)
def test_what_is_computed_counts(name: str, old: str, new: str) -> None:
    assert GRAPHS[name].count(old) == 1
    before, after = parse_graph(GRAPHS[name]), parse_graph(GRAPHS[name].replace(old, new))
    assert fingerprints(before)[1] != fingerprints(respelled(after, 3, swap=True))[1]


@pytest.mark.parametrize(("name", "old", "new"), WEIGHTS_ONLY)
def test_the_structure_is_blind_to_the_numbers_in_weights(name: str, old: str, new: str) -> None:
    assert GRAPHS[name].count(old) >= 1
    structure, full = fingerprints(GRAPHS[name])
    other_structure, other_full = fingerprints(GRAPHS[name].replace(old, new))
    assert structure == other_structure
    assert full != other_full


def test_weights_are_not_read_when_they_are_not_asked_for() -> None:
    def read() -> oir.Tensor:
        raise AssertionError("the weight was read")

    model = model_of(GRAPHS["attention"])
    expected = canonical(model).structure_fingerprint
    for value in model.graph.initializers.values():
        if value.const_value is not None and value.const_value.size > 1:
            value.const_value = oir.LazyTensor(read, dtype=oir.DataType.FLOAT, shape=oir.Shape(value.const_value.shape))
    found = canonical(model, read_weights=False)
    assert (found.structure_fingerprint, found.full_fingerprint, found.full) == (expected, "", {})


@pytest.mark.parametrize(
    ("name", "written"),
    [
        ("Softmax (m)", "Softmax <axis = -1> (m)"),
        ("LayerNormalization <epsilon = 1e-6>", "LayerNormalization <epsilon = 1e-6, axis = -1, stash_type = 1>"),
        ("y = Add (x, o)", "y = Add (o, x)"),
    ],
)
def test_a_default_that_is_written_out_does_not_count(name: str, written: str) -> None:
    assert fingerprints(GRAPHS["attention"]) == fingerprints(GRAPHS["attention"].replace(name, written))


def test_a_default_given_in_python_is_the_default() -> None:
    model = model_of("g (float[4,4] x) => (float[4,4] y) <float[4] s, float[4] b> { y = LayerNormalization (x, s, b) }")
    expected = canonical(model).full_fingerprint
    (node,) = model.graph
    node.attributes["epsilon"] = oir.AttrFloat32("epsilon", 1e-5)
    assert canonical(model).full_fingerprint == expected
    node.attributes["epsilon"] = oir.AttrFloat32("epsilon", 1e-6)
    assert canonical(model).full_fingerprint != expected


def test_the_fingerprint_does_not_depend_on_the_order_of_a_model_that_is_not_sorted() -> None:
    model = model_of(GRAPHS["loops"])
    expected = canonical(model)
    for graph in [model.graph, *model.graph.subgraphs()]:
        nodes = list(graph)
        graph.remove(nodes)
        graph.extend(reversed(nodes))
    found = canonical(model)
    assert (found.structure_fingerprint, found.full_fingerprint) == (
        expected.structure_fingerprint,
        expected.full_fingerprint,
    )


def positions(model: oir.Model, reading: Canonical) -> list[str]:
    order = Order(reading.structure, opsets(model))
    return [reading.full[node.outputs[0]] for node in order.of(model.graph)]


@pytest.mark.parametrize("name", GRAPHS)
def test_the_order_of_nodes_is_theirs_and_not_the_files(name: str) -> None:
    source = parse_graph(GRAPHS[name])
    model = model_of(source)
    expected = positions(model, canonical(model))
    assert len(expected) == len(model.graph)
    for seed in range(5):
        other = model_of(respelled(source, seed))
        assert positions(other, canonical(other)) == expected


def test_operands_stand_before_their_readers() -> None:
    for source in GRAPHS.values():
        model = model_of(source)
        seen: set[oir.Node | None] = {None}
        for node in Order(canonical(model).structure, opsets(model)).of(model.graph):
            assert {value.producer() for value in node.inputs if value is not None} <= seen
            seen.add(node)


def chain(length: int, operator: str = "Add") -> onnx.ModelProto:
    """Every node reads the one before twice: 2 ** length paths lead to the output."""
    nodes = [helper.make_node(operator, [f"v{i}", f"v{i}"], [f"v{i + 1}"]) for i in range(length)]
    info = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [4]) for name in ("v0", f"v{length}")]
    graph = helper.make_graph(nodes, "g", info[:1], info[1:])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


def test_sharing_costs_nothing() -> None:
    begin = time.process_time()
    model = model_of(chain(10_000))
    reading = canonical(model)
    assert len(list(Order(reading.structure, opsets(model)).of(model.graph))) == 10_000
    assert time.process_time() - begin < 8
    assert fingerprints(chain(2_000)) != fingerprints(chain(2_001))


def nested(depth: int, wide: int) -> onnx.ModelProto:
    """Conditions within conditions, each with some nodes that read values of all graphs around."""
    boolean = helper.make_tensor_value_info("c", TensorProto.BOOL, [])

    def body(level: int) -> onnx.GraphProto:
        nodes = [helper.make_node("Add", [f"x{max(level - 1, 0)}", f"x{level // 2}"], [f"a{level}.0"])]
        nodes += [helper.make_node("Neg", [f"a{level}.{i}"], [f"a{level}.{i + 1}"]) for i in range(wide)]
        nodes.append(helper.make_node("Relu", [f"a{level}.{wide}"], [f"x{level + 1}"]))
        last = f"x{level + 1}"
        if level + 1 < depth:
            inner = body(level + 1)
            nodes.append(helper.make_node("If", ["c"], [f"y{level}"], then_branch=inner, else_branch=empty(level)))
            last = f"y{level}"
        return helper.make_graph(nodes, "b", [], [helper.make_tensor_value_info(last, TensorProto.FLOAT, [4])])

    def empty(level: int) -> onnx.GraphProto:
        out = helper.make_tensor_value_info(f"e{level}", TensorProto.FLOAT, [4])
        return helper.make_graph([helper.make_node("Exp", [f"x{level}"], [f"e{level}"])], "e", [], [out])

    inside = body(0)
    inputs = [boolean, helper.make_tensor_value_info("x0", TensorProto.FLOAT, [4])]
    graph = helper.make_graph(inside.node, "g", inputs, inside.output)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


def test_deep_nesting_is_read() -> None:
    begin = time.process_time()
    source = nested(24, 20)
    assert fingerprints(source) == fingerprints(respelled(source, 5)) != fingerprints(nested(24, 19))
    assert time.process_time() - begin < 8


def test_functions_that_call_functions_are_read_without_recursion() -> None:
    def calls(length: int) -> onnx.ModelProto:
        bodies = [helper.make_node(f"f{i + 1}", ["a"], ["b"], domain="local") for i in range(length - 1)]
        imports = [helper.make_opsetid("", 20), helper.make_opsetid("local", 1)]
        functions = [
            helper.make_function("local", f"f{i}", ["a"], ["b"], [node], imports)
            for i, node in enumerate([*bodies, helper.make_node("Relu", ["a"], ["b"])])
        ]
        info = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [4]) for name in "xy"]
        graph = helper.make_graph([helper.make_node("f0", ["x"], ["y"], domain="local")], "g", info[:1], info[1:])
        return helper.make_model(graph, functions=functions, opset_imports=imports, ir_version=10)

    def found(source: onnx.ModelProto) -> str:
        return canonical(oir.from_proto(source)).full_fingerprint

    assert found(calls(1_000)) == found(respelled(calls(1_000), 7)) != found(calls(999))


def test_a_shared_weight_is_not_two_equal_ones() -> None:
    source = "g (float[4] x) => (float[4] y) <float[4] k = {1,2,3,4}OTHER> { a = Mul (x, k)  y = Sub (a, W) }"
    shared = source.replace("OTHER", "").replace("W", "k")
    repeated = source.replace("OTHER", ", float[4] l = {1,2,3,4}").replace("W", "l")
    assert fingerprints(shared)[0] != fingerprints(repeated)[0]


def test_numbers_that_are_no_numbers_are_numbers() -> None:
    def of(number: float) -> tuple[str, str]:
        source = parse_graph("g (float[4] x) => (float[4] y) <float[1] k = {1}> { y = Mul (x, k) }")
        source.graph.initializer[0].CopyFrom(onnx.numpy_helper.from_array(np.array([number], np.float32), "k"))
        return fingerprints(source)

    assert of(float("nan")) == of(float("nan")) != of(float("inf")) != of(float("-inf"))


@pytest.mark.parametrize(
    ("one", "other"),
    [("value_float = 2.0", "value = float {2.0}"), ("value_floats = [2.0]", "value = float[1] {2.0}")],
)
def test_how_a_constant_gives_its_value_does_not_count(one: str, other: str) -> None:
    graph = "g (float[2] x) => (float[2] y) { k = Constant <%s> () y = Mul (x, k) }"
    graph = f'<ir_version: 10, opset_import: ["": 20]> {graph}'
    assert fingerprints(onnx.parser.parse_model(graph % one)) == fingerprints(onnx.parser.parse_model(graph % other))
    three = graph % other.replace("2.0", "3.0")
    assert fingerprints(onnx.parser.parse_model(graph % one)) != fingerprints(onnx.parser.parse_model(three))
