"""The lines of a model are those of its blocks, whatever the names and the order."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import onnx
import pytest
from golden import parse_graph
from spellings import CHANGES, GRAPHS, model_of

from burnish.ir.segments import segments
from burnish.ir.views.blocks import stacks
from burnish.tools.research.respelling import respelled

DEMO = Path(__file__).parents[2] / "tools" / "demo"
MODELS = ["digits_resnet", "digits_vit"]

Shown = list[tuple[str, list[str], str, str]]


def shown(source: str | onnx.ModelProto) -> Shown:
    found = segments(model_of(source))
    return [(one.name, [line.text for line in one.lines], one.structure, one.weights) for one in found]


def test_the_lines_of_a_model_with_nested_graphs() -> None:
    ((name, lines, *_),) = shown(GRAPHS["loops"])
    assert name == "graph"
    assert lines == [
        "Mul(float[4], x)",
        "Loop(n, c, x) body=(Identity, Mul, Sub)",
        "  Identity(argument 1)",
        "  Cast(argument 0) to=1",
        "  Add(Cast, argument 2)",
        "  Loop(argument 0, argument 1, Add) body=(Identity, Sub)",
        "    Identity(argument 1)",
        "    Cast(argument 0) to=1",
        "    Sub(argument 2, Cast)",
        "    Add(Mul, Sub)",
        "    Sub(Add, Cast)",
        "  Mul(Add, Loop)",
        "  Sub(Loop, Add)",
    ]


def test_the_lines_of_functions() -> None:
    names = [(name, lines) for name, lines, *_ in shown(GRAPHS["functions"])]
    assert names == [
        (
            "graph",
            [
                "local.leaky(x, u) slope=0.25",
                "local.twice(local.leaky)",
                "local.leaky(local.twice, x)",
                "Sub(local.twice, local.leaky)",
            ],
        ),
        (
            "function leaky",
            [
                "Sub(argument 0, argument 1)",
                "LeakyRelu(Sub) alpha=@slope",
                "Exp(argument 1)",
                "Add(Exp, LeakyRelu)",
            ],
        ),
        ("function twice", ["Neg(argument 0)", "local.leaky(Neg, argument 0)", "Mul(float[2], local.leaky)"]),
    ]


@pytest.mark.parametrize("swap", [False, True])
@pytest.mark.parametrize("name", GRAPHS)
def test_names_and_order_do_not_count(name: str, swap: bool) -> None:
    source = parse_graph(GRAPHS[name])
    for seed in range(10):
        assert shown(respelled(source, seed, swap=swap)) == shown(source)


@pytest.mark.parametrize("name", MODELS)
def test_names_and_order_of_exported_models_do_not_count(name: str) -> None:
    source = onnx.load(DEMO / f"{name}.onnx")
    expected, blocks = shown(source), [one.hash for one in stacks(model_of(source)).blocks]
    assert blocks
    for seed in range(3):
        other = respelled(source, seed, swap=bool(seed % 2))
        assert shown(other) == expected
        assert [one.hash for one in stacks(model_of(other)).blocks] == blocks


UNSEEN = (
    "slope: float = 0.5",
    ", float[3] spare",
    'opset_import: ["": 20]>',
    "b = Mul (x, k2)",
    "=> (float[N,4] y, float[K,N,4] trace)",
)
"""Defaults and opsets of functions, which initializers there are, and which value is which output have no line; the
fingerprint has them."""


@pytest.mark.parametrize(("name", "old", "new"), [one for one in CHANGES if not any(key in one[1] for key in UNSEEN)])
def test_what_is_computed_counts(name: str, old: str, new: str) -> None:
    assert shown(GRAPHS[name]) != shown(GRAPHS[name].replace(old, new))


def test_equal_blocks_have_equal_lines_and_a_change_stays_in_its_block() -> None:
    source = onnx.load(DEMO / "digits_vit.onnx")
    before = segments(model_of(source))
    blocks = [one for one in before if one.block is not None]
    assert len(blocks) > 2
    assert len({one.structure for one in blocks}) == 1
    assert len({one.weights for one in blocks}) == len(blocks)
    after = segments(model_of(edited(source, blocks[1].lines[0].node.name or "", epsilon)))
    changed = [one.name for one, other in zip(before, after, strict=True) if one.structure != other.structure]
    assert changed == ["block 1"]


def edited(source: onnx.ModelProto, name: str, edit: Callable[[onnx.NodeProto], None]) -> onnx.ModelProto:
    result = onnx.ModelProto()
    result.CopyFrom(source)
    (node,) = (one for one in result.graph.node if one.name == name)
    edit(node)
    return result


def epsilon(node: onnx.NodeProto) -> None:
    (attribute,) = (one for one in node.attribute if one.name == "epsilon")
    attribute.f *= 10


def test_operands_do_not_turn_around_when_something_before_them_changes() -> None:
    """Noise in a difference: a change at the beginning must leave the lines behind it as they are."""
    source = """
g (float[N,8] x) => (float[N,8] y) <float[8,8] w, float[8,8] v, float[8] b> {
  START
  p = MatMul (a, w)  q = Relu (p)  r = MatMul (q, v)  s = Sigmoid (r)  t = Tanh (r)  u = Mul (t, s)
  c = Exp (u)  d = Neg (u)  e = Add (d, c)  f = Abs (e)  h = Sqrt (e)  i = Mul (f, h)  j = Add (i, e)  y = Add (j, b)
}"""
    starts = ["a = Relu (x)", "a = Gelu (x)", "k = Relu (x)  a = Exp (k)", "a = Sin (x)", "k = Neg (x)  a = Neg (k)"]
    found = [shown(source.replace("START", one))[0][1] for one in starts]
    tails = [lines[[line.startswith("MatMul") for line in lines].index(True) + 1 :] for lines in found]
    assert all(tail == tails[0] for tail in tails)


def test_the_longer_of_two_branches_comes_first() -> None:
    """Exporters fold normalizations into convolutions: the shortcut must stay behind the branch that it goes around."""
    source = """
g (float[N,4,8] x) => (float[N,4,8] y) <float[4] s, float[4] b, float[4,4,3] w, float[4,4,3] v, float[4,4,1] u> {
  c = Conv (x, u)  SHORT  d = Conv <pads = [1, 1]> (x, w)  r = Relu (d)  e = Conv <pads = [1, 1]> (r, v)  LONG
  y = Add (short, long)
}"""
    plain = source.replace("SHORT", "short = Identity (c)").replace("LONG", "long = Identity (e)")
    normed = source.replace("SHORT", "short = InstanceNormalization (c, s, b)")
    normed = normed.replace("LONG", "long = InstanceNormalization (e, s, b)")
    for one in (plain, normed, source.replace("SHORT", "short = Relu (c)").replace("LONG", "long = Sqrt (e)")):
        lines = shown(one)[0][1]
        assert "float[4,4,3]" in lines[0]
        assert "float[4,4,1]" in lines[4]


def test_the_numbers_of_blocks_in_two_streams_do_not_follow_the_file() -> None:
    def tower(name: str, width: int) -> tuple[list[str], list[str]]:
        weights, nodes, stream = [], [], name
        for number in range(2):
            own = f"{name}{number}"
            weights += [f"float[4] {own}g = {{1,2,3,4}}", f"float[4,{width}] {own}u = {{{','.join('1' * 4 * width)}}}"]
            weights += [f"float[{width},4] {own}d = {{{','.join('2' * 4 * width)}}}"]
            nodes += [
                f"{own}n = LayerNormalization ({stream}, {own}g)",
                f"{own}h = MatMul ({own}n, {own}u)",
                f"{own}r = Relu ({own}h)",
                f"{own}o = MatMul ({own}r, {own}d)",
                f"{own}s = Add ({stream}, {own}o)",
            ]
            stream = f"{own}s"
        return weights, nodes

    (one, first), (other, second) = tower("a", 8), tower("b", 6)
    mixed = [node for pair in zip(second, first, strict=True) for node in pair]
    found = []
    for nodes in ([*first, *second], [*second, *first], mixed):
        body = "\n".join([*nodes, "y = Sub (a1s, b1s)"])
        found.append(
            shown(
                '<ir_version: 10, opset_import: ["": 21]> g (float[N,4] a, float[N,4] b) => (float[N,4] y) '
                f"<{', '.join([*one, *other])}> {{ {body} }}"
            )
        )
    assert found[0] == found[1] == found[2]
    blocks = {name: lines[1] for name, lines, *_ in found[0] if name.startswith("block")}
    assert list(blocks) == ["block 0", "block 1", "block 2", "block 3"]
    assert [line.split("float")[1] for line in blocks.values()] == ["[4,8])", "[4,8])", "[4,6])", "[4,6])"]
