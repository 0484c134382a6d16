"""The activation peak equals what a simulation of every moment finds."""

from __future__ import annotations

import random

import onnx_ir as oir
import pytest

from burnish.ir.liveness import activation_peak


def model(text: str) -> oir.Model:
    return oir.from_onnx_text(f'<ir_version: 10, opset_import: ["": 20]>\n{text}')


def random_model(seed: int) -> oir.Model:
    """A chain with random extra readers; every value is a vector of random length, since only sizes matter."""
    chance = random.Random(seed)

    def value(name: str) -> oir.Value:
        size = chance.randint(1, 100)
        return oir.Value(name=name, type=oir.TensorType(oir.DataType.FLOAT), shape=oir.Shape([size]))

    inputs = [value("in0"), value("in1")]
    values, nodes = list(inputs), []
    for index in range(chance.randint(3, 25)):
        read = chance.choices(values[-5:], k=chance.randint(1, 3))
        written = [value(f"v{index}_{which}") for which in range(chance.randint(1, 2))]
        nodes.append(oir.Node("", "Sum", read, outputs=written, name=f"n{index}"))
        values += written
    outputs = [*nodes[-1].outputs, chance.choice(values)]
    graph = oir.Graph(inputs, list(dict.fromkeys(outputs)), nodes=nodes, opset_imports={"": 20}, name="g")
    return oir.Model(graph, ir_version=10)


def simulated(graph: oir.Graph) -> int:
    """The peak by asking, at every node and for every value, whether it exists and is still needed."""
    nodes = list(graph)
    values = [*graph.inputs, *(value for node in nodes for value in node.outputs)]
    worst = 0
    for now in range(len(nodes)):
        alive = 0
        for value in values:
            exists = value.is_graph_input() or nodes.index(value.producer()) <= now
            needed = any(value in node.inputs for node in nodes[now:]) or value in nodes[now].outputs
            kept = value.is_graph_input() or value.is_graph_output()
            alive += 4 * value.shape[0] if exists and (needed or kept) else 0
        worst = max(worst, alive)
    return worst


@pytest.mark.parametrize("seed", range(30))
def test_peak_equals_the_simulation_and_is_never_below_the_largest_node(seed: int) -> None:
    found = random_model(seed)
    result = activation_peak(found)
    assert result.peak == simulated(found.graph) == sum(one.bytes for one in result.live)
    nodes = [{*node.inputs, *node.outputs} for node in found.graph]
    assert result.lower_bound == max(sum(4 * value.shape[0] for value in node) for node in nodes) <= result.peak


BRANCHED = """
  g (float[10] x, bool c) => (float[10] z) <float[10] w = {0, 0, 0, 0, 0, 0, 0, 0, 0, 0}> {
    a = Relu (x)
    b = Neg (x)
    d = If (c) <
      then_branch = t () => (float[10] p) { h = Concat <axis = 0> (a, a, a)  k = Add (h, h)  p = ReduceMax (k) },
      else_branch = f () => (float[10] q) { q = Add (a, w) }
    >
    z = Add (d, b)
  }"""


def sized(found: oir.Model, sizes: dict[str, int]) -> oir.Model:
    for graph in found.graphs():
        for node in graph:
            for value in node.outputs:
                value.type, value.shape = (
                    oir.TensorType(oir.DataType.FLOAT),
                    oir.Shape([sizes.get(value.name or "", 10)]),
                )
    return found


def test_what_a_branch_captures_lives_while_it_runs_and_its_values_add_to_those_outside() -> None:
    found = activation_peak(sized(model(BRANCHED), {"h": 30, "k": 30}))
    outside = 4 * (10 + 10 + 10) + 1  # x, a, b and the condition
    assert found.peak == outside + 4 * (30 + 30)
    assert found.at is not None
    assert found.at.op_type == "Add"
    assert {one.value.name for one in found.live} == {"x", "c", "a", "b", "h", "k"}


def test_a_loop_body_runs_beside_the_outputs_of_the_loop() -> None:
    text = """
      g (int64 n, float[10] x) => (float[10] y) {
        y = Loop (n, , x) <body = b (int64 i, bool c, float[10] s) => (bool d, float[10] r) {
          d = Identity (c)
          m = Concat <axis = 0> (s, s)
          r = ReduceMax (m)
        }>
      }"""
    found = model(text)
    for graph in found.graphs():
        for value in (value for node in graph for value in node.outputs):
            kind = oir.DataType.BOOL if value.name == "d" else oir.DataType.FLOAT
            shape = [] if value.name == "d" else [20] if value.name == "m" else [10]
            value.type, value.shape = oir.TensorType(kind), oir.Shape(shape)
    outside = 8 + 40 + 40  # n, x, y
    inside = 8 + 1 + 40 + 1 + 80 + 40  # i, c, s, d, m, r
    assert activation_peak(found).peak == outside + inside


def test_weights_are_no_activations_and_unknown_sizes_are_said() -> None:
    text = "g (float[N] x) => (float[N] y) <float[3] w = {1, 2, 3}> { y = Add (x, w) }"
    unknown = activation_peak(model(text))
    assert (unknown.peak, unknown.at_least) == (None, 0)
    assert "`N`" in unknown.unknown[0]
    assert activation_peak(model(text), {"N": 3}).peak == 24
