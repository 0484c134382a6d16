"""What must hold of layers that multiply integers whose inputs are quantized in each run."""

from __future__ import annotations

import numpy as np
import onnx_ir as oir
import pytest
from golden import parse_graph, prepare
from laws import OrtRunner, make_samples
from lossy_laws import check_edits, made, proposals

from burnish.ir.errors import InputError
from burnish.ir.samples import Sample
from burnish.ir.views.linear import linears
from burnish.ir.walk import walk
from burnish.passes import balance, catalog
from burnish.passes.base import Outcome
from burnish.passes.lossy import LossyPass, Undecided
from burnish.tools.lossy_context import context_for

MODELS = {
    "two readers": """
g (float[N, 7, 32] x) => (float[N, 7, 16] a, float[N, 7, 32] b) <float[32, 16] wa, float[16] ba, float[32, 32] wb> {
  p = MatMul (x, wa)
  a = Add (p, ba)
  b = MatMul (x, wb)
}""",
    "Gemm": """
g (float[N, 24] x) => (float[N, 40] y) <float[40, 24] w, float[1, 40] b> {
  y = Gemm <transB = 1, alpha = 0.5, beta = 2.0> (x, w, b)
}""",
    "held twice": """
g (int64[N] ids) => (float[N, 40] y) <float[40, 16] w> {
  x = Gather (w, ids)
  t = Transpose <perm = [1, 0]> (w)
  y = MatMul (x, t)
}""",
    "one weight": """
g (float[N, 16] x) => (float[N, 16] y) <float[16, 16] w> {
  a = MatMul (x, w)
  b = Relu (a)
  y = MatMul (b, w)
}""",
    "LSTM": """
g (float[7, N, 12] x, float[2, N, 8] h, float[2, N, 8] c) => (float[7, 2, N, 8] y, float[2, N, 8] k)
    <float[2, 32, 12] w, float[2, 32, 8] r, float[2, 64] b, float[2, 24] p> {
  y, s, k = LSTM <direction = "bidirectional", hidden_size = 8> (x, w, r, b, , h, c, p)
}""",
    "convolution": """
g (float[N, 4, 9, 9] x) => (float[N, 6, 5, 5] y) <float[6, 2, 3, 3] w, float[6] b> {
  y = Conv <pads = [1, 1, 1, 1], strides = [2, 2], group = 2> (x, w, b)
}""",
    "along one axis": """
g (float[N, 20, 24] x) => (float[N, 18, 9] y)
    <float[18, 20, 4] w, float[18] b, float[18, 18, 3, 1] v, int64[1] a = {3}> {
  c = Conv <pads = [2, 1], strides = [2], dilations = [2]> (x, w, b)
  r = Relu (c)
  u = Unsqueeze (r, a)
  d = Conv <kernel_shape = [3, 1]> (u, v)
  y = Squeeze (d, a)
}""",
    "branches": """
g (bool[1] up, float[N, 16] x) => (float[N, 16] y) <float[16, 16] w, float[16, 16] v> {
  y = If (up) <
    then_branch = t () => (float[N, 16] a) { a = MatMul (x, w) },
    else_branch = e () => (float[N, 16] b) { n = Neg (x) b = MatMul (n, v) }
  >
}""",
}


def model_of(name: str, **options: object) -> tuple[LossyPass, oir.Model]:
    one = catalog.make("quantize-dynamic", options)
    assert isinstance(one, LossyPass)
    return one, prepare(parse_graph(MODELS[name]), one)


@pytest.mark.parametrize("options", [{}, {"signed": False}, {"bits": 7, "clip": "minmax"}])
@pytest.mark.parametrize("name", MODELS)
def test_a_quantized_layer_computes_nearly_what_it_did_and_saves_what_it_promises(
    name: str, options: dict[str, object]
) -> None:
    one, model = model_of(name, convolutions=True, **options)
    edits, _ = proposals(one, model)
    check_edits(one, model, edits)
    after, _ = made(one, model, edits)
    before, now = OrtRunner(model, optimize=True), OrtRunner(after, optimize=True)
    for sample in make_samples(model):
        wanted, found = before.run(sample.feeds), now.run(sample.feeds)
        for key, array in wanted.items():
            assert np.linalg.norm(found[key] - array) <= 0.05 * np.linalg.norm(array) + 1e-6
    before.close()
    now.close()


@pytest.mark.parametrize("name", ["two readers", "branches"])
def test_a_value_is_quantized_once_in_a_graph_whatever_the_order_of_the_edits(name: str) -> None:
    one, model = model_of(name)
    edits, _ = proposals(one, model)
    for order in (edits, edits[::-1]):
        after, _ = made(one, model, order)
        assert len(walk(after, "DynamicQuantizeLinear")) == (1 if name == "two readers" else 2)
        assert not list(linears(after))


def test_what_is_held_twice_is_only_proposed_to_a_search() -> None:
    one, model = model_of("held twice")
    edits, _ = proposals(one, model)
    assert [edit.savings.bytes < 0 for edit in edits] == [True]


def test_the_same_model_gives_the_same_bytes() -> None:
    found = []
    for _ in range(2):
        one, model = model_of("LSTM")
        after, _ = made(one, model, proposals(one, model)[0])
        found.append(oir.to_proto(after).SerializeToString())
    assert found[0] == found[1]


def test_balanced_channels_lose_less() -> None:
    random = np.random.default_rng(0)
    wide = np.where(np.arange(32) % 8 == 0, 50.0, 1.0)
    weight = random.standard_normal((32, 48)) / wide[:, None]
    source = """
g (float[N, 32] x) => (float[N, 48] y) <float[32, 48] w> {
  y = MatMul (x, w)
}"""
    rows = (random.standard_normal((200, 32)) * wide).astype(np.float32)
    errors = []
    for balanced in (False, True):
        one = catalog.make("quantize-dynamic", {"balanced": balanced})
        assert isinstance(one, LossyPass)
        model = prepare(parse_graph(source), one)
        model.graph.initializers["w"].const_value = oir.tensor(weight.astype(np.float32), name="w")
        context = context_for(model, [Sample("rows", {"x": rows[:100]})])
        after, _ = made(one, model, one.propose(model, context, Outcome("")))
        runner = OrtRunner(after, optimize=True)
        found = runner.run({"x": rows[100:]})["y"]
        runner.close()
        errors.append(np.linalg.norm(found - rows[100:] @ weight))
    assert errors[1] < 0.2 * errors[0]


def test_channels_that_samples_hardly_show_are_not_made_wide() -> None:
    random = np.random.default_rng(0)
    seen = random.standard_normal((100, 64)) * np.where(np.arange(64) < 4, 30, 1) * (np.arange(64) < 50)
    reducer = balance.reducer()
    reducer.add(seen.astype(np.float32))
    divisors = balance.divisors(reducer, [random.standard_normal((32, 64))], 8)
    assert divisors is not None and divisors.min() >= 0.99 * np.median(divisors)
    ones = balance.reducer()
    ones.add(np.eye(64, dtype=np.float32)[:20])
    assert balance.divisors(ones, [random.standard_normal((32, 64))], 8) is None


@pytest.mark.parametrize(
    "before",
    [
        "z = LayerNormalization (x, g, b)",
        "z = LayerNormalization (x, g)",
        "m = Mul (x, g) z = Add (b, m)",
    ],
)
def test_a_norm_that_only_balanced_layers_read_balances_by_itself(before: str) -> None:
    one = catalog.make("quantize-dynamic", {"balanced": True})
    assert isinstance(one, LossyPass)
    source = f"""
g (float[N, 32] x) => (float[N, 48] y, float[N, 8] u) <float[32] g, float[32] b, float[32, 48] w, float[32, 8] v> {{
  {before}
  y = MatMul (z, w)
  u = MatMul (z, v)
}}"""
    model = prepare(parse_graph(source), one)
    held = model.graph.initializers["g"].const_value
    assert held is not None
    wide = np.where(np.arange(32) == 5, 40, 1).astype(np.float32)
    model.graph.initializers["g"].const_value = oir.tensor(held.numpy() * wide, name="g")
    rows = np.random.default_rng(0).standard_normal((200, 32)).astype(np.float32)
    edits = one.propose(model, context_for(model, [Sample("rows", {"x": rows})]), Outcome(""))
    whole, _ = made(one, model, edits)
    part, _ = made(one, model, edits[:1])
    kinds = [[node.op_type for node in walk(each)] for each in (model, part, whole)]
    assert [kind.count("Mul") - kinds[0].count("Mul") for kind in kinds] == [0, 3, 4]
    found, wanted = (OrtRunner(each, optimize=True).run({"x": rows})["y"] for each in (whole, model))
    assert np.linalg.norm(found - wanted) <= 0.02 * np.linalg.norm(wanted)


def test_balancing_is_never_made_without_samples() -> None:
    one, model = model_of("two readers", balanced=True)
    with pytest.raises(Undecided):
        one.asked(model, Outcome(""))


def test_bits_that_no_kernel_has_are_refused() -> None:
    with pytest.raises(InputError, match="`bits` is 4"):
        catalog.make("quantize-dynamic", {"bits": 4})
