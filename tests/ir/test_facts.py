"""Facts are checked, and a breach is shown with its place."""

from __future__ import annotations

import onnx_ir as oir
import pytest
from golden import name_nodes, parse_graph

from burnish.ir.facts import FACTS, FactError, check

GRAPH = """
g (float[N,4] x, bool c) => (float[N,4] y) <float[N,4] a, float[4] w, float[N,4] t> {
  a = Mul (x, w)
  t = If (c) <
    then_branch = g1 () => (float[N,4] z) { z = Relu (a) },
    else_branch = g2 () => (float[N,4] v) { v = Neg (a) }
  >
  y = Tanh (t)
}
"""


def model_of(source: str) -> oir.Model:
    """A model from ONNX text with names for its nodes."""
    model = oir.from_proto(parse_graph(source))
    name_nodes(model)
    return model


def test_a_good_model_has_every_fact() -> None:
    check(model_of(GRAPH), FACTS, "some-pass", "before")


@pytest.mark.parametrize(
    ("fact", "old", "new"),
    [
        ("typed", "float[N,4] t>", "float[4] u>"),
        ("lifted", "a = Mul (x, w)", "k = Constant <value = float {2}> () a = Mul (x, k)"),
    ],
)
def test_a_breach_is_found(fact: str, old: str, new: str) -> None:
    assert old in GRAPH
    model = model_of(GRAPH.replace(old, new))
    with pytest.raises(FactError):
        check(model, [fact], "some-pass", "after")
    check(model, set(FACTS) - {fact, "typed"}, "some-pass", "after")


def test_order_counts_inside_nested_graphs_too() -> None:
    model = model_of(GRAPH)
    first, branch = list(model.graph)[:2]
    model.graph.remove(first)
    model.graph.insert_after(branch, first)
    breach = FACTS["sorted"](model)
    assert breach is not None and breach.node is not None and breach.node.op_type in ("Relu", "Neg")


def test_two_values_of_one_name_in_different_graphs() -> None:
    model = model_of(GRAPH)
    inner = next(node for node in model.graph.all_nodes() if node.op_type == "Relu")
    inner.outputs[0].name = "a"
    breach = FACTS["named"](model)
    assert breach is not None and breach.cause == "two values are called `a`"


def test_a_call_of_a_function() -> None:
    model = model_of("""
    <ir_version: 10, opset_import: ["": 20, "local": 1]>
    g (float[2] x) => (float[2] y) { y = local.twice (x) }
    <domain: "local", opset_import: ["": 20]> twice (a) => (b) { b = Add (a, a) }
    """)
    breach = FACTS["inlined"](model)
    assert breach is not None and breach.node is model.graph.node(0)


def test_the_message_shows_the_place() -> None:
    model = model_of("g (float[N] x) => (float[N] y) { a = Neg (x) b = Abs (a) d = Exp (b) e = Log (d) y = Sqrt (e) }")
    for node, name in zip(model.graph, ("neg", "abs", "exp", "log", "sqrt"), strict=True):
        node.name = name
        if name != "exp":
            node.outputs[0].type, node.outputs[0].shape = oir.TensorType(oir.DataType.FLOAT), oir.Shape(["N"])
    with pytest.raises(FactError) as caught:
        check(model, ["typed"], "fuse-something", "after")
    assert str(caught.value) == (
        "`fuse-something` left a model without `typed`: the type or rank of `d`, made by Exp `exp`, is unknown\n"
        "    %0: float[N] = Neg(%x)\n"
        "    %1: float[N] = Abs(%0)\n"
        "  > %2: ?[?] = Exp(%1)    from exp\n"
        "    %3: float[N] = Log(%2)\n"
        "    %y: float[N] = Sqrt(%3)\n"
        "\n"
        "hint: give the new value a type and a shape, or infer them"
    )
