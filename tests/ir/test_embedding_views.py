"""Embeddings and heads: what they read is what the model looks up and scores; what they write is what it does then."""

from __future__ import annotations

import numpy as np
import onnx_ir as oir
import pytest
from attention_laws import outputs
from golden import parse_graph

from burnish.ir.text import text
from burnish.ir.views.attention import Miss
from burnish.ir.views.embedding import Head, embeddings, heads, token_embedding

TABLES = "<float[7, 4] w, float[9, 4] p, float[2, 4] t, int64 zero = {0}, int64 one = {1}>"
COUNTED = "s = Shape <start = 1, end = 2> (ids)  n = Squeeze (s)  r = Range (zero, n, one)"


def model_of(body: str, result: str = "float[B, S, 4] y", tables: str = TABLES) -> oir.Model:
    return oir.from_proto(parse_graph(f"g (int64[B, S] ids) => ({result}) {tables} {{ {body} }}"))


def feeds() -> dict[str, np.ndarray]:
    return {"ids": np.random.default_rng(0).integers(0, 7, (2, 3))}


def test_tables_are_told_apart_by_where_the_integers_come_from() -> None:
    model = model_of(
        f"a = Gather (w, ids)  {COUNTED}  b = Gather (p, r)  c = Add (a, b)  k = Greater (ids, one)"
        "  l = Cast <to = 7> (k)  d = Gather (t, l)  y = Add (c, d)"
    )
    found = [(one.rows, one.source, one.input.name if one.input is not None else None) for one in embeddings(model)]
    assert found == [(7, "input", "ids"), (9, "positions", None), (2, "computed", None)]
    token = token_embedding(model)
    assert token is not None
    assert token.rows == 7


@pytest.mark.parametrize(
    "body",
    [
        "y = Gather (w, ids)",
        "i = Cast <to = 6> (ids)  y = Gather (w, i)",
        "u = Transpose <perm = [1, 0]> (w4)  y = Gather (u, ids)",
        "d = Constant <value_int = 7> ()  o = OneHot <axis = -1> (ids, d, onoff)  y = MatMul (o, w)",
        "e = Constant <value_ints = [-1]> ()  i = Unsqueeze (ids, e)  q = Equal (i, all)  f = Cast <to = 1> (q)"
        "  y = MatMul (f, w)",
    ],
)
def test_an_embedding_is_read_and_written(body: str) -> None:
    tables = "<float[7, 4] w, float[4, 7] w4, float[2] onoff = {0, 1}, int64[7] all = {0, 1, 2, 3, 4, 5, 6}>"
    model = model_of(body, tables=tables)
    (found,) = embeddings(model)
    assert (found.rows, found.width, found.source) == (7, 4, "input")
    np.testing.assert_allclose(outputs(model, feeds())[0], found.read()[feeds()["ids"]], rtol=1e-6)
    before = text(model)
    found.write(model, found.read())
    assert text(model) == before
    table = np.random.default_rng(1).standard_normal((7, 4))
    found.write(model, table)
    np.testing.assert_allclose(outputs(model, feeds())[0], table[feeds()["ids"]], rtol=1e-6)
    (found,) = embeddings(model)
    with pytest.raises(ValueError, match="rows, 4"):
        found.write(model, np.zeros((7, 5)))


TIED = {
    "tied": "x = Gather (w, ids)  u = Transpose <perm = [1, 0]> (w)  y = MatMul (x, u)",
    "equal": "x = Gather (w, ids)  y = MatMul (x, v)",
    "": "x = Gather (w, ids)  y = MatMul (x, z)",
}


def tied_model(tie: str) -> oir.Model:
    model = model_of(TIED[tie], "float[B, S, 7] y", "<float[7, 4] w, float[4, 7] v, float[4, 7] z>")
    equal = model.graph.initializers["w"].const_value.numpy().T  # type: ignore[union-attr]
    model.graph.initializers["v"].const_value = oir.tensor(np.ascontiguousarray(equal))
    return model


@pytest.mark.parametrize("tie", TIED)
def test_a_head_knows_whether_it_shares_the_table(tie: str) -> None:
    model = tied_model(tie)
    (head,) = heads(model)
    assert isinstance(head, Head)
    assert (head.classes, head.width, head.tie) == (7, 4, tie)
    assert (head.embedding is None) == (tie == "")
    before = text(model)
    head.write(model, head.linear.weight(), head.linear.bias())
    assert text(model) == before


def test_a_tied_head_is_written_alone_or_with_its_embedding() -> None:
    table = np.random.default_rng(1).standard_normal((7, 4))
    ids = feeds()["ids"]
    model = tied_model("tied")
    (embedding,) = embeddings(model)
    old = embedding.read()
    assert embedding.shared
    embedding.write(model, table, everywhere=True)
    np.testing.assert_allclose(outputs(model, feeds())[0], table[ids] @ table.T, rtol=1e-4, atol=1e-5)
    model = tied_model("tied")
    (head,) = heads(model)
    assert isinstance(head, Head)
    head.write(model, table, None)
    np.testing.assert_allclose(outputs(model, feeds())[0], old[ids] @ table.T, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("body", "steps"),
    [
        ("a = MatMul (x, z)  y = Softmax (a)", 1),
        ("m = MatMul (x, z)  a = Add (m, b)  y = Sigmoid (a)", 1),
        ("a = MatMul (x, z)  c = Div (a, five)  d = Tanh (c)  y = Mul (d, five)", 3),
        ("m = MatMul (x, z)  top = ReduceMax <axes = [-1]> (m)  a = Sub (m, top)  e = Exp (a)"
         "  s = ReduceSum (e, last)  y = Div (e, s)", 4),
    ],
)  # fmt: skip
def test_steps_between_a_head_and_its_output(body: str, steps: int) -> None:
    header = '<ir_version: 8, opset_import: ["": 13]>'
    graph = "g (float[N, 4] x) => (float[N, 7] y) <float[4, 7] z, float[7] b, float five = {5.0}, int64[1] last = {-1}>"
    model = oir.from_proto(parse_graph(f"{header} {graph} {{ {body} }}"))
    (head,) = heads(model)
    assert isinstance(head, Head)
    assert (head.classes, len(head.nodes)) == (7, steps)
    assert head.softcap == (5.0 if "Tanh" in body else 0.0)


def test_an_output_that_no_linear_layer_gives() -> None:
    model = oir.from_proto(
        parse_graph("g (float[N, 4] x) => (float[N, 7] y) <float[4, 7] z> { a = MatMul (x, z)  y = Tanh (a) }")
    )
    (found,) = heads(model)
    assert isinstance(found, Miss)
    assert found.reason == "the output comes from Tanh, not from a linear layer"
