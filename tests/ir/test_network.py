"""The networkx view has an edge for every value that one node needs from another, through sub-graphs too."""

from __future__ import annotations

import networkx as nx
import onnx_ir as oir

from burnish.ir.network import captured, network

TEXT = """
<ir_version: 10, opset_import: ["": 20]>
g (float[2] x, bool c) => (float[2] z) {
  a = Relu (x)
  b = Neg (a)
  d = Add (a, a)
  i = If (c) <
    then_branch = t () => (float[2] p) {
      u = If (c) <
        then_branch = t2 () => (float[2] q) { q = Abs (b) },
        else_branch = e2 () => (float[2] o) { o = Abs (a) }
      >
      p = Add (u, b)
    },
    else_branch = e () => (float[2] r) { r = Abs (d) }
  >
  z = Mul (i, b)
}"""


def test_edges_are_the_values_that_nodes_need_from_each_other() -> None:
    graph = oir.from_onnx_text(TEXT).graph
    found = network(graph)
    names = {
        (source.op_type, target.op_type): sorted(value.name for value in data["values"])
        for source, target, data in found.edges(data=True)
    }
    assert names == {
        ("Relu", "Neg"): ["a"],
        ("Relu", "Add"): ["a"],
        ("Relu", "If"): ["a"],
        ("Neg", "If"): ["b"],
        ("Add", "If"): ["d"],
        ("If", "Mul"): ["i"],
        ("Neg", "Mul"): ["b"],
    }
    branch = graph[3]
    assert {value.name for value in captured(branch)} == {"a", "b", "c", "d"}
    assert found.edges[graph[1], branch]["captured"] == [graph[1].outputs[0]]
    assert found.edges[graph[0], graph[2]]["captured"] == []


def test_the_order_of_the_nodes_is_a_topological_order_of_the_network() -> None:
    graph = oir.from_onnx_text(TEXT).graph
    found = network(graph)
    place = {node: index for index, node in enumerate(graph)}
    assert nx.is_directed_acyclic_graph(found)
    assert all(place[source] < place[target] for source, target in found.edges)
    assert list(found) == list(graph)
