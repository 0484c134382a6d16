"""Caches and states: which input continues as which output, however its axes are ordered and whatever it is called."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import onnx_ir as oir
import pytest
from attention_laws import layer_of
from golden import parse_graph

from burnish.backends.ort.session import executor
from burnish.ir import text
from burnish.ir.errors import InputError
from burnish.ir.views.attention_layer import AttentionLayer, Miss, attention_layers
from burnish.ir.views.cache import rename_ports
from burnish.ir.views.state import states

LAYER = """
  q = MatMul (x, wq)  k = MatMul (x, wk)  v = MatMul (x, wv)
  qs = Reshape (q, heads)  ks = Reshape (k, heads)  vs = Reshape (v, heads)
  qt = Transpose <perm = [0, 2, 1, 3]> (qs)
  {join}
  kt = Transpose <perm = [0, 1, 3, 2]> (keys)
  scores = MatMul (qt, kt)  p = Softmax <axis = -1> (scores)
  a = MatMul (p, values)  at = Transpose <perm = [0, 2, 1, 3]> (a)  flat = Reshape (at, whole)
  y = MatMul (flat, wo)
"""
WEIGHTS = (
    "<float[6, 6] wq, float[6, 6] wk, float[6, 6] wv, float[6, 6] wo, int64[4] heads = {0, 0, 2, 3},"
    " int64[3] whole = {0, 0, 6}, int64 zero = {0}, int64 one = {1}, int64[1] first = {0}>"
)
HEADS_FIRST = "kn = Transpose <perm = [0, 2, 1, 3]> (ks)  vn = Transpose <perm = [0, 2, 1, 3]> (vs)"
CACHES = {
    "heads before positions": (
        "float[B, 2, P, 3] foo, float[B, 2, P, 3] bar",
        "float[B, 2, T, 3] keys, float[B, 2, T, 3] values",
        HEADS_FIRST + "  keys = Concat <axis = 2> (foo, kn)  values = Concat <axis = 2> (bar, vn)",
        (("foo", "bar"), ("keys", "values"), ("batch", "heads", "past", "size"), ()),
    ),
    "positions before heads": (
        "float[B, P, 2, 3] foo, float[B, P, 2, 3] bar",
        "float[B, T, 2, 3] k1, float[B, T, 2, 3] v1",
        "k1 = Concat <axis = 1> (foo, ks)  v1 = Concat <axis = 1> (bar, vs)"
        "  keys = Transpose <perm = [0, 2, 1, 3]> (k1)  values = Transpose <perm = [0, 2, 1, 3]> (v1)",
        (("foo", "bar"), ("k1", "v1"), ("batch", "past", "heads", "size"), ()),
    ),
    "turned keys": (
        "float[B, 2, 3, P] foo, float[B, 2, P, 3] bar",
        "float[B, 2, 3, T] k1, float[B, 2, T, 3] values",
        HEADS_FIRST + "  old = Transpose <perm = [0, 1, 3, 2]> (foo)  keys = Concat <axis = 2> (old, kn)"
        "  k1 = Transpose <perm = [0, 1, 3, 2]> (keys)  values = Concat <axis = 2> (bar, vn)",
        (("foo", "bar"), ("k1", "values"), ("batch", "heads", "size", "past"), ()),
    ),
    "packed": (
        "float[2, B, 2, P, 3] foo",
        "float[2, B, 2, T, 3] both",
        HEADS_FIRST + "  ko = Gather <axis = 0> (foo, zero)  vo = Gather <axis = 0> (foo, one)"
        "  keys = Concat <axis = 2> (ko, kn)  values = Concat <axis = 2> (vo, vn)"
        "  ku = Unsqueeze (keys, first)  vu = Unsqueeze (values, first)  both = Concat <axis = 0> (ku, vu)",
        (("foo",), ("both",), ("packed", "batch", "heads", "past", "size"), (0,)),
    ),
}


def model_of(inputs: str, outputs: str, join: str, more: str = "") -> oir.Model:
    lines = LAYER.format(join=join)
    return oir.from_proto(
        parse_graph(f"g (float[B, S, 6] x, {inputs}) => (float[B, S, 6] y, {outputs}) {WEIGHTS} {{ {lines} {more} }}")
    )


@pytest.mark.parametrize("name", CACHES)
def test_a_cache_is_found_by_data_flow(name: str) -> None:
    inputs, outputs, join, (pasts, presents, axes, index) = CACHES[name]
    cache = layer_of(model_of(inputs, outputs, join)).cache
    assert (cache.kind, cache.form) == ("kv", "append")
    assert tuple(one.name for one in cache.past) == pasts
    assert tuple(one.name for one in cache.present) == presents
    assert cache.key is not None
    assert cache.value is not None
    assert (cache.key.past_axes, cache.key.index) == (axes, index)
    assert cache.value.index == tuple(1 for _ in index)
    assert tuple(axis.replace("past", "total") for axis in axes) == cache.key.present_axes


def test_a_buffer_of_full_length_is_updated() -> None:
    join = HEADS_FIRST + (
        "  keys = TensorScatter <axis = 2> (foo, kn, place)  values = TensorScatter <axis = 2> (bar, vn, place)"
    )
    text = (
        '<ir_version: 11, opset_import: ["": 24]> '
        "g (float[B, S, 6] x, float[B, 2, 9, 3] foo, float[B, 2, 9, 3] bar, int64[B] place)"
        f" => (float[B, S, 6] y, float[B, 2, 9, 3] keys, float[B, 2, 9, 3] values) {WEIGHTS} {{ {LAYER.format(join=join)} }}"  # noqa: E501
    )
    cache = layer_of(oir.from_proto(parse_graph(text))).cache
    assert (cache.kind, cache.form) == ("kv", "update")
    assert [one.name for one in (*cache.past, *cache.present)] == ["foo", "bar", "keys", "values"]
    assert cache.key is not None
    assert cache.key.past_axes == ("batch", "heads", "length", "size")


def test_keys_and_values_that_are_only_given() -> None:
    outputs = "float[B, 2, S, 3] keys, float[B, 2, S, 3] values"
    cache = layer_of(model_of("float z", outputs, HEADS_FIRST + "  keys = Identity (kn)  values = Identity (vn)")).cache
    assert cache.kind == "kv-output"
    assert [one.name for one in cache.present] == ["keys", "values"]


def test_keys_and_values_that_are_only_taken() -> None:
    text = LAYER.format(join="keys = Identity (foo)  values = Identity (bar)")
    text = text.replace("k = MatMul (x, wk)  v = MatMul (x, wv)", "").replace(
        "ks = Reshape (k, heads)  vs = Reshape (v, heads)", ""
    )
    model = oir.from_proto(
        parse_graph(
            f"g (float[B, S, 6] x, float[B, 2, M, 3] foo, float[B, 2, M, 3] bar) => (float[B, S, 6] y) {WEIGHTS} {{ {text} }}"  # noqa: E501
        )
    )
    layer = layer_of(model)
    assert layer.cross
    assert (layer.cache.kind, layer.memory, layer.key) == ("cross", None, None)
    assert [one.name for one in layer.cache.past] == ["foo", "bar"]
    read = layer.read()
    assert read.key is None
    layer.write(model, read)


def test_names_and_look_alikes_do_not_matter() -> None:
    """An input that is joined with the keys but does not come back is no cache's other half."""
    inputs, _, join, _ = CACHES["heads before positions"]
    model = model_of(inputs, "float[B, 2, T, 3] past_key_values", join, "past_key_values = Neg (keys)")
    cache = layer_of(model).cache
    assert (cache.kind, [one.name for one in cache.past], cache.present) == ("kv", ["foo", "bar"], ())


STATES = {
    "conv-state": "n = MatMul (x, w)  t = Transpose <perm = [0, 2, 1]> (n)  cut = Slice (s, b1, b9, b2)"
    "  s1 = Concat <axis = 2> (cut, t)  c = Conv <group = 4> (s1, kernel)  y = Transpose <perm = [0, 2, 1]> (c)",
    "ssm-state": "n = MatMul (x, w)  t = Transpose <perm = [0, 2, 1]> (n)  d = Sigmoid (t)  kept = Mul (d, s)"
    "  e = Expand (t, whole)  s1 = Add (kept, e)  y = ReduceSum <keepdims = 0> (s1)",
    "kept": "n = MatMul (x, w)  y = Relu (n)  s1 = Identity (s)",
    "shifted": "n = MatMul (x, w)  t = Transpose <perm = [0, 2, 1]> (n)  cut = Slice (s, b1, b9, b2)"
    "  s1 = Concat <axis = 2> (cut, t)  y = ReduceSum <keepdims = 0> (s1)",
    "": "n = MatMul (x, w)  y = Relu (n)  m = ReduceSum <keepdims = 1> (s)  s1 = Expand (m, whole)",
}


@pytest.mark.parametrize("kind", STATES)
def test_a_state_is_typed_by_how_it_is_updated(kind: str) -> None:
    model = oir.from_proto(
        parse_graph(
            "g (float[2, 1, 5] x, float[2, 4, 3] s) => (float y, float[2, 4, 3] s1) <float[5, 4] w,"
            " float[4, 1, 3] kernel, int64[1] b1 = {1}, int64[1] b9 = {9}, int64[1] b2 = {2},"
            f" int64[3] whole = {{2, 4, 3}}> {{ {STATES[kind]} }}"
        )
    )
    found = [(one.kind, one.past.name, one.present.name) for one in states(model)]
    assert found == ([(kind, "s", "s1")] if kind else [])


def test_a_recurrent_cell() -> None:
    model = oir.from_proto(
        parse_graph(
            "g (float[T, B, 3] x, float[2, B, 4] s) => (float[T, 1, B, 4] y, float[2, B, 4] s1)"
            " <float[1, 16, 3] w, float[1, 16, 4] r, float[1, 32] b, int64 zero = {0}, int64 one = {1},"
            " int64[1] first = {0}> {"
            " h = Gather <axis = 0> (s, zero)  c = Gather <axis = 0> (s, one)"
            " h0 = Unsqueeze (h, first)  c0 = Unsqueeze (c, first)"
            " y, h1, c1 = LSTM <hidden_size = 4> (x, w, r, b, , h0, c0)  s1 = Concat <axis = 0> (h1, c1) }"
        )
    )
    assert [(one.kind, one.past.name, one.present.name) for one in states(model)] == [("rnn-state", "s", "s1")]


def test_near_misses_say_why() -> None:
    inputs, outputs, join, _ = CACHES["heads before positions"]
    good = LAYER.format(join=join)
    for old, new, reason in (
        ("y = MatMul (flat, wo)", "y = Relu (flat)", "its result goes through Relu before any linear layer"),
        ("q = MatMul (x, wq)", "q = Relu (x)", "the queries come from Relu, not from a linear layer"),
        ("values = Concat <axis = 2> (bar, vn)", "m = Concat <axis = 2> (bar, vn)  values = Abs (m)",
         "the values come from Abs, not from a linear layer"),
        ("(scores)", "(scored)", "the scores pass through Abs"),
    ):  # fmt: skip
        text = good.replace(old, new).replace("p = Softmax", "scored = Abs (scores)  p = Softmax")
        model = oir.from_proto(
            parse_graph(f"g (float[B, S, 6] x, {inputs}) => (float[B, S, 6] y, {outputs}) {WEIGHTS} {{ {text} }}")
        )
        (found,) = attention_layers(model)
        assert not isinstance(found, AttentionLayer)
        assert isinstance(found, Miss)
        assert found.reason == reason
        assert found.anchor.op_type == "Softmax"


def test_a_layer_that_reads_the_keys_of_another() -> None:
    """Both layers name the same ports, the second as shared, and neither is written alone."""
    inputs, outputs, join, _ = CACHES["heads before positions"]
    second = (
        "  q2 = MatMul (y1, wq)  qs2 = Reshape (q2, heads)  qt2 = Transpose <perm = [0, 2, 1, 3]> (qs2)"
        "  scores2 = MatMul (qt2, kt)  p2 = Softmax <axis = -1> (scores2)  a2 = MatMul (p2, values)"
        "  at2 = Transpose <perm = [0, 2, 1, 3]> (a2)  flat2 = Reshape (at2, whole)  y = MatMul (flat2, wo)"
    )
    lines = LAYER.format(join=join).replace("y = MatMul", "y1 = MatMul") + second
    model = oir.from_proto(
        parse_graph(f"g (float[B, S, 6] x, {inputs}) => (float[B, S, 6] y, {outputs}) {WEIGHTS} {{ {lines} }}")
    )
    first, other = (one for one in attention_layers(model) if isinstance(one, AttentionLayer))
    assert (first.cache.kind, other.cache.kind) == ("kv", "shared")
    assert first.cache.past == other.cache.past
    read = first.read()
    first.write(model, read)
    assert read.key is not None
    with pytest.raises(ValueError, match="reads its queries, keys or values as well"):
        first.write(model, replace(read, key=2 * read.key))
    first.write(model, replace(read, output=2 * read.output))


def test_branches_with_and_without_a_cache() -> None:
    """A decoder whose first call has no past: both branches give the outputs of the model."""
    joins = {
        "some": "  keys = Concat <axis = 2> (foo, kn)  values = Concat <axis = 2> (bar, vn)",
        "none": "  keys = Identity (kn)  values = Identity (vn)",
    }
    some, none = (
        f"{name} () => (float[B, S, 6] y, float[B, 2, T, 3] keys, float[B, 2, T, 3] values)"
        f" {{ {LAYER.format(join=HEADS_FIRST + join)} }}"
        for name, join in joins.items()
    )
    text = (
        "g (float[B, S, 6] x, bool again, float[B, 2, P, 3] foo, float[B, 2, P, 3] bar)"
        f" => (float[B, S, 6] z, float[B, 2, T, 3] k1, float[B, 2, T, 3] v1) {WEIGHTS} {{"
        f" z, k1, v1 = If (again) <then_branch = {some}, else_branch = {none}> }}"
    )
    found = [one for one in attention_layers(oir.from_proto(parse_graph(text))) if isinstance(one, AttentionLayer)]
    caches = {one.cache.kind: one.cache for one in found}
    assert set(caches) == {"kv", "kv-output"}
    assert [one.name for one in caches["kv"].past] == ["foo", "bar"]
    assert caches["kv"].present == caches["kv-output"].present
    assert [one.name for one in caches["kv"].present] == ["k1", "v1"]


def test_probabilities_that_no_product_takes() -> None:
    """Products of two computed values are a near miss; scores of a linear layer are none."""
    body = "k = Transpose <perm = [0, 2, 1]> (x)  a = MatMul (x, k)  p = Softmax (a)  y = Abs (p)"
    (found,) = attention_layers(oir.from_proto(parse_graph(f"g (float[B, S, 6] x) => (float[B, S, S] y) {{ {body} }}")))
    assert isinstance(found, Miss)
    assert found.reason == "its probabilities go through Abs, not into a product with values"
    router = "g (float[B, 6] x) => (float[B, 4] y) <float[6, 4] w> { a = MatMul (x, w)  p = Softmax (a)  y = Abs (p) }"
    assert not list(attention_layers(oir.from_proto(parse_graph(router))))


def test_the_ports_of_a_cache_are_renamed_all_at_once() -> None:
    inputs, outputs, join, _ = CACHES["heads before positions"]
    model = model_of(inputs, outputs, join)
    before = text.text(model)
    cache = layer_of(model).cache
    ports = (*cache.past, *cache.present)
    rename_ports(model, {port: str(port.name) for port in ports})
    assert text.text(model) == before
    rng = np.random.default_rng(0)
    shapes = {"x": (2, 3, 6), "foo": (2, 2, 4, 3), "bar": (2, 2, 4, 3)}
    feeds = {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}
    expected = executor()(model).run(feeds)
    crossed = {"foo": "bar", "bar": "foo", "keys": "present.7.key", "values": "keys", "x": "x", "y": "y"}
    rename_ports(model, {port: crossed[str(port.name)] for port in ports})
    found = executor()(model).run({crossed[name]: array for name, array in feeds.items()})
    assert list(found) == ["y", "present.7.key", "keys"]
    for name, array in expected.items():
        np.testing.assert_array_equal(found[crossed[name]], array)


@pytest.mark.parametrize(
    "name, cause", [("", "needs a name"), ("y", "taken"), ("scores", "taken"), ("bar", "given twice")]
)
def test_a_name_that_a_port_cannot_have_is_refused_and_nothing_renamed(name: str, cause: str) -> None:
    inputs, outputs, join, _ = CACHES["heads before positions"]
    model = model_of(inputs, outputs, join)
    before = text.text(model)
    foo, bar = layer_of(model).cache.past
    with pytest.raises(InputError, match=cause):
        rename_ports(model, {foo: name, bar: "bar"})
    with pytest.raises(InputError, match="no input or output"):
        rename_ports(model, {model.graph[0].outputs[0]: "inner"})
    assert text.text(model) == before
