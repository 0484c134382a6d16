"""Laws of synthesised samples: they fit the model, cover its dynamic shapes and masks, and catch wrong rewrites."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnx
import onnx_ir as oir
import onnxruntime
import pytest
from onnx import parser

from burnish.frontends.roles import roles
from burnish.frontends.synthesis import synthesise, usable
from burnish.ir.errors import InputError
from burnish.ir.samples import Sample

HEADER = '<ir_version: 10, opset_import: ["": 20, "com.microsoft": 1]>'
MASKS = ("mask of ones", "left-padded mask", "right-padded mask", "mask with holes", "mask rows differ")

ENCODER = """
g (int64[batch, seq] tokens, int64[batch, seq] which, int64[batch, seq] keep,
   float[37, 8] words, float[2, 8] kinds, float[8, 8] wq, float[8, 8] wk) => (float[batch, seq, 8] y)
<int64[2] ax = {1, 2}, int64[1] last = {2}, int64 zero = {0}, int64 one = {1}, int64[1] row = {1}> {
  a = Gather (words, tokens)
  b = Gather (kinds, which)
  x = Add (a, b)
  q = MatMul (x, wq)
  k = MatMul (x, wk)
  kt = Transpose <perm = [0, 2, 1]> (k)
  s = MatMul (q, kt)
  MASK
  t = Add (s, bias)
  p = Softmax <axis = -1> (t)
  y = MatMul (p, x)
}
"""
RIGHT_MASK = """
  m = Cast <to = 1> (keep)
  n = Unsqueeze (m, row)
  unit = Constant <value_float = 1.0> ()
  low = Constant <value_float = -10000.0> ()
  c = Sub (unit, n)
  bias = Mul (c, low)
"""
# What several fusions do: count the ones and let through as many positions from the left.
FIRST_POSITIONS = """
  counts = ReduceSum <keepdims = 1> (keep, row)
  shape = Shape (keep)
  length = Gather (shape, one)
  order = Range (zero, length, one)
  m = Less (order, counts)
  n = Unsqueeze (m, row)
  high = Constant <value_float = 0.0> ()
  low = Constant <value_float = -10000.0> ()
  bias = Where (n, high, low)
"""
# Lets through everything after the first position that is kept: right under left padding, wrong with holes.
AFTER_FIRST = """
  sums = CumSum (keep, one)
  m = Greater (sums, zero)
  n = Unsqueeze (m, row)
  high = Constant <value_float = 0.0> ()
  low = Constant <value_float = -10000.0> ()
  bias = Where (n, high, low)
"""
DECODER = """
g (int64[b, s] ids, int64[b, total] keep, int64[b, s] places, float[b, 1, past, 4] pk, float[b, 1, past, 4] pv,
   float[50, 4] words, float[16, 4] table, float[4, 4] w) =>
  (float[b, 1, s, 4] y, float[b, 1, all, 4] nk, float[b, 1, all, 4] nv)
<int64[1] one = {1}, int64[2] heads = {1, 2}> {
  e = Gather (words, ids)
  c = Gather (table, places)
  l = MatMul (e, w)
  turned = Mul (l, c)
  r = Add (turned, l)
  x = Unsqueeze (r, one)
  nk = Concat <axis = 2> (pk, x)
  nv = Concat <axis = -2> (pv, x)
  kt = Transpose <perm = [0, 1, 3, 2]> (nk)
  scores = MatMul (x, kt)
  m = Cast <to = 9> (keep)
  n = Unsqueeze (m, heads)
  high = Constant <value_float = 0.0> ()
  low = Constant <value_float = -3.4e38> ()
  bias = Where (n, high, low)
  t = Add (scores, bias)
  p = Softmax (t)
  y = MatMul (p, nv)
}
"""


def build(text: str) -> oir.Model:
    """Parse a graph; inputs of static two-dimensional float shape become seeded random weights."""
    proto = parser.parse_model(HEADER + text)
    rng = np.random.default_rng(0)
    for value in list(proto.graph.input):
        dims = [d.dim_value for d in value.type.tensor_type.shape.dim]
        if value.type.tensor_type.elem_type == onnx.TensorProto.FLOAT and len(dims) == 2 and all(dims):
            proto.graph.initializer.append(
                onnx.numpy_helper.from_array(rng.standard_normal(dims, np.float32), value.name)
            )
            proto.graph.input.remove(value)
    return oir.from_proto(proto)


class Runner:
    """ONNX Runtime as the protocol asks for it."""

    def __init__(self, model: oir.Model) -> None:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        options.log_severity_level = 4
        data = oir.to_proto(model).SerializeToString()
        self.session = onnxruntime.InferenceSession(data, options, providers=["CPUExecutionProvider"])

    def run(self, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        try:
            found = self.session.run(None, dict(feeds))
        except Exception as error:
            raise InputError(str(error)) from error
        return {output.name: array for output, array in zip(self.session.get_outputs(), found, strict=True)}


def kept(model: oir.Model) -> list[Sample]:
    samples, refused = usable(synthesise(model), Runner(model))
    assert not refused
    return samples


def kinds(text: str) -> dict[str, str]:
    return {name: role.kind for name, role in roles(build(text)).items()}


def test_an_encoder_gets_every_kind_of_mask_and_at_least_three_shapes() -> None:
    model = build(ENCODER.replace("MASK", RIGHT_MASK))
    assert {n: r.kind for n, r in roles(model).items()} == {"tokens": "ids", "which": "ids", "keep": "mask"}
    samples = kept(model)
    for mask in MASKS:
        assert any(sample.name.startswith(mask) for sample in samples)
    assert len({sample.feeds["tokens"].shape for sample in samples}) >= 3
    for sample in samples:
        tokens, which, keep = sample.feeds.values()
        assert tokens.max() < 37 and tokens.min() >= 0 and set(np.unique(which)) <= {0, 1}
        assert keep.any(axis=1).all() != ("empty row" in sample.name) and tokens.shape == keep.shape
    assert any(36 in sample.feeds["tokens"] for sample in samples)


@pytest.mark.parametrize("wrong", [FIRST_POSITIONS, AFTER_FIRST], ids=["right padding assumed", "holes ignored"])
def test_a_wrong_mask_rewrite_is_caught_though_a_kind_mask_passes_it(wrong: str) -> None:
    model = build(ENCODER.replace("MASK", RIGHT_MASK))
    good, bad = Runner(model), Runner(build(ENCODER.replace("MASK", wrong)))
    caught = {
        sample.name
        for sample in kept(model)
        if not np.allclose(good.run(sample.feeds)["y"], bad.run(sample.feeds)["y"], atol=1e-3)
    }
    assert any(name.startswith("mask with holes") for name in caught)
    assert not any(name.startswith("mask of ones") for name in caught)


def test_a_decoder_gets_empty_and_filled_pasts_and_masks_that_cover_both() -> None:
    model = build(DECODER)
    found = roles(model)
    assert {n: r.kind for n, r in found.items()} == dict(
        ids="ids", keep="mask", places="positions", pk="past", pv="past"
    )
    assert found["pk"].axis == found["pv"].axis == 2 and found["places"].rows == 16
    samples = kept(model)
    pasts = {sample.feeds["pk"].shape[2] for sample in samples}
    assert 0 in pasts and len(pasts) >= 3
    for mask in MASKS:
        assert any(sample.name.startswith(mask) for sample in samples)
    for sample in samples:
        feeds = sample.feeds
        total = feeds["ids"].shape[1] + feeds["pk"].shape[2]
        assert feeds["keep"].shape == (feeds["ids"].shape[0], total)
        expected = np.clip(np.cumsum(feeds["keep"], axis=1) - 1, 0, 15)[:, -feeds["ids"].shape[1] :]
        assert np.array_equal(feeds["places"], expected)


def test_the_same_seed_gives_the_same_samples() -> None:
    model = build(ENCODER.replace("MASK", RIGHT_MASK))
    first, again, other = synthesise(model), synthesise(model), synthesise(model, seed=1)
    assert [s.name for s in first] == [s.name for s in again]
    for one, two in zip(first, again, strict=True):
        assert all(np.array_equal(array, two.feeds[name]) for name, array in one.feeds.items())
    assert any(not np.array_equal(a.feeds["tokens"], b.feeds["tokens"]) for a, b in zip(first, other, strict=True))


def test_more_settings_give_more_shapes() -> None:
    model = build(ENCODER.replace("MASK", RIGHT_MASK))
    assert len({sample.feeds["tokens"].shape for sample in synthesise(model, settings=9)}) >= 9


@pytest.mark.parametrize(
    ("graph", "expected"),
    [
        ("g (int64[n] x) => (float[n, 5] y) <int64 d = {5}, float[2] v = {0.0, 1.0}> { y = OneHot (x, d, v) }", "ids"),
        (
            "g (int32[n, 4] x) => (float[n, 4, 3] y) <int32[1, 1, 3] v = {0, 1, 2}, int64[1] a = {2}> "
            "{ u = Unsqueeze (x, a)  e = Equal (u, v)  y = Cast <to = 1> (e) }",
            "ids",
        ),
        ("g (int64 x) => (bool y) <int64 v = {16000}> { y = Equal (x, v) }", "choice"),
        ("g (int64[b, s] x) => (float[b, s] y) <float v = {1.0}> { f = Cast <to = 1> (x)  y = Mul (f, v) }", "integer"),
        (
            "g (int64[b, s] x) => (float[b, s, 3] y) <float[3] v = {1.0, 0.1, 0.01}, int64[1] a = {2}> "
            "{ u = Unsqueeze (x, a)  f = Cast <to = 1> (u)  m = Mul (f, v)  y = Cos (m) }",
            "positions",
        ),
        ("g (float[b, 1, 4, 4] x) => (float[b, 1, 4, 4] y) { y = Softmax (x) }", "number"),
        ("g (float[b, s] x, float[b, s] z) => (float[b, s] y) { a = Add (z, x)  y = Softmax (a) }", "mask"),
        ("g (float[b, 3, h, w] x, float[2, 3, 3, 3] v) => (float[b, 2, i, j] y) { y = Conv (x, v) }", "image"),
        ("g (float[b, n] x) => (float[b, 1, m] y) <float[1, 1, 3] v = {1.0, 2.0, 3.0}, int64[1] a = {1}> "
         "{ u = Unsqueeze (x, a)  y = Conv <strides = [2]> (u, v) }", "signal"),
        ("g (string[n] x) => (string[n] y) { y = Identity (x) }", "text"),
        ("g (int64[n, 2] x, float[n, 3] z) => (float[n, 3] y) { y = GatherND <batch_dims = 0> (z, x) }", "ids"),
        ("g (bool c) => (bool y) { y = Not (c) }", "choice"),
    ],
)  # fmt: skip
def test_the_graph_says_what_an_input_means(graph: str, expected: str) -> None:
    assert kinds(graph)["c" if "bool c" in graph else "x"] == expected


@pytest.mark.parametrize(
    ("rule", "value"),
    [
        ("high = Cast <to = 1> (x)  low = Constant <value_float = -10000.0> ()  m = Mul (high, low)", 0),
        ("b = Cast <to = 9> (x)  n = Not (b)  z = Constant <value_float = 0.0> () "
         " low = Constant <value_float = -10000.0> ()  m = Where (n, low, z)", 1),
        ("zero = Constant <value_int = 0> ()  b = Equal (x, zero)  z = Constant <value_float = 0.0> () "
         " low = Constant <value_float = -10000.0> ()  m = Where (b, z, low)", 0),
    ],
)  # fmt: skip
def test_a_mask_says_which_value_lets_through(rule: str, value: int) -> None:
    text = "g (int64[b, s] x, float[b, s] z) => (float[b, s] y) { " + rule.replace("z =", "nil =").replace(
        "(n, low, z)", "(n, low, nil)"
    ).replace("(b, z, low)", "(b, nil, low)") + "  a = Add (z, m)  y = Softmax (a) }"  # fmt: skip
    role = roles(build(text))["x"]
    assert (role.kind, role.kept) == ("mask", value)
    ones = next(sample for sample in synthesise(build(text)) if sample.name.startswith("mask of ones"))
    assert (ones.feeds["x"] == value).all()


def test_images_are_in_range_extreme_and_constant_and_sized_for_the_model() -> None:
    text = """g (float[b, c, h, w] x) => (float[b, 2, i, j] y)
    <float[2, 3, 1, 1] v = {1.0, 2.0, 3.0, 4.0, 5.0, 6.0}> { y = Conv (x, v) }"""
    samples = kept(build(text))
    arrays = [sample.feeds["x"] for sample in samples]
    assert {array.shape[1] for array in arrays} == {3} and len({array.shape for array in arrays}) >= 3
    assert any(0 <= a.min() < a.max() <= 1 for a in arrays)
    assert any(np.abs(a).max() > 1000 for a in arrays) and any(not a.any() for a in arrays)
    assert all(np.isfinite(a).all() for a in arrays)


def test_a_choice_takes_the_compared_number_and_another() -> None:
    model = build("g (float[b, 4] x, int64 r) => (float[b, 4] y) <int64 v = {16000}> "
                  "{ e = Equal (r, v)  f = Cast <to = 1> (e)  y = Mul (x, f) }")  # fmt: skip
    assert {int(sample.feeds["r"]) for sample in kept(model)} == {16000, 8000}


def test_a_recurrent_state_starts_at_zero_and_follows_the_batch() -> None:
    model = build(
        """g (float[?, 2] x, float[1, ?, 2] h, float[1, 6, 2] w, float[1, 6, 2] r) => (float[1, ?, 2] y)
    <int64[1] zero = {0}> { u = Unsqueeze (x, zero)  s, y = GRU <hidden_size = 2> (u, w, r, , , h) }""".replace(
            "?", "N"
        )
    )
    for value in ("w", "r"):
        chosen = next(v for v in model.graph.inputs if v.name == value)
        model.graph.inputs.remove(chosen)
        chosen.const_value = oir.tensor(np.ones((1, 6, 2), np.float32), name=value)
        model.graph.register_initializer(chosen)
    for value in model.graph.inputs:
        value.shape = oir.Shape([None if isinstance(dim, oir.SymbolicDim) else dim for dim in value.shape or ()])
    samples = kept(model)
    assert not samples[0].feeds["h"].any() and samples[1].feeds["h"].any()
    assert all(sample.feeds["h"].shape[1] == sample.feeds["x"].shape[0] for sample in samples)


def test_a_padding_token_is_put_where_the_ids_are_padded() -> None:
    model = build("""g (int64[b, s] x, float[9, 2] words) => (float[b, s, 2] y) <int64 pad = {1}, int64[1] a = {2}>
    { e = Equal (x, pad)  f = Cast <to = 1> (e)  u = Unsqueeze (f, a)  r = Gather (words, x)  y = Mul (r, u) }""")
    samples = kept(model)
    left = next(sample for sample in samples if sample.name.startswith("left-padded"))
    assert left.feeds["x"][0, 0] == 1 and left.feeds["x"][0, -1] != 1


def test_without_dynamic_dimensions_there_are_still_several_draws() -> None:
    samples = kept(build("g (int32[2, 4] x, float[7, 3] words) => (float[2, 4, 3] y) { y = Gather (words, x) }"))
    assert len(samples) == 3 and len({sample.name for sample in samples}) == 3


def test_what_the_model_refuses_itself_is_told_apart() -> None:
    model = build("g (float[b, s] x) => (float[b, 4] y) <int64[2] v = {-1, 4}> { y = Reshape (x, v) }")
    found, refused = usable(synthesise(model), Runner(model))
    assert found and refused and all("\n" not in reason and reason for _, reason in refused)
    assert all(sample.feeds["x"].size % 4 == 0 for sample in found)


def test_a_model_that_refuses_everything_is_an_error_with_a_hint() -> None:
    model = build("g (float[b, s] x, float[7919, 1] w) => (float[b, 1] y) { y = MatMul (x, w) }")
    with pytest.raises(InputError, match="refuses every input") as caught:
        usable(synthesise(model), Runner(model))
    assert "--data" in str(caught.value)


def test_an_input_that_is_no_tensor_is_an_error() -> None:
    model = build("g (seq(float[n]) x) => (int64 y) { y = SequenceLength (x) }")
    with pytest.raises(InputError, match="not a tensor") as caught:
        synthesise(model)
    assert caught.value.place == "input `x`"
