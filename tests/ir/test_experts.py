"""Mixtures of experts and codebooks: views read what the model has, and what they write is what it computes."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as oir
import onnxruntime
import pytest
from block_networks import built, exported, torch
from golden import parse_graph
from torch import nn
from torch.nn import functional as F

from burnish.backends.reference.runner import ReferenceRunner
from burnish.ir.views.attention import Miss
from burnish.ir.views.blocks import stacks
from burnish.ir.views.codebook import codebooks
from burnish.ir.views.experts import Experts, find_experts
from burnish.passes.pipeline import Pipeline
from burnish.passes.recipes import NORMAL_FORM

EXPERTS, WIDTH, INNER, TOP = 4, 6, 10, 2


class Mixture(nn.Module):
    """A residual mixture of experts with biases; `spelling` is how the chosen matrices are applied."""

    def __init__(self, spelling):
        super().__init__()
        self.spelling = spelling
        self.router = nn.Linear(WIDTH, EXPERTS)
        first, second = (INNER, WIDTH), (WIDTH, INNER)
        if spelling == "gathered, in by out":
            first, second = first[::-1], second[::-1]
        self.one, self.two = nn.Parameter(torch.zeros(EXPERTS, *first)), nn.Parameter(torch.zeros(EXPERTS, *second))
        self.one_bias = nn.Parameter(torch.zeros(EXPERTS, INNER))
        self.two_bias = nn.Parameter(torch.zeros(EXPERTS, WIDTH))
        if spelling == "separate":
            self.ones = nn.ModuleList(nn.Linear(WIDTH, INNER) for _ in range(EXPERTS))
            self.twos = nn.ModuleList(nn.Linear(INNER, WIDTH) for _ in range(EXPERTS))

    def forward(self, x):
        weights, chosen = self.router(x).softmax(-1).topk(TOP, -1)
        if self.spelling == "separate":
            return x + self.loop(x, weights, chosen)
        y = 0
        for slot in range(TOP):
            picked = chosen[:, slot]
            one, two = self.one[picked], self.two[picked]
            if self.spelling == "gathered":
                hidden = F.relu(torch.bmm(one, x[:, :, None])[:, :, 0] + self.one_bias[picked])
                out = torch.bmm(two, hidden[:, :, None])[:, :, 0] + self.two_bias[picked]
            else:
                hidden = F.relu(torch.bmm(x[:, None, :], one)[:, 0] + self.one_bias[picked])
                out = torch.bmm(hidden[:, None, :], two)[:, 0] + self.two_bias[picked]
            y = y + out * weights[:, slot : slot + 1]
        return x + y

    def loop(self, x, weights, chosen):
        y = torch.zeros_like(x)
        mask = F.one_hot(chosen, EXPERTS).permute(2, 1, 0)
        for expert in range(EXPERTS):
            slot, token = torch.where(mask[expert])
            hidden = F.relu(self.ones[expert](x[token]))
            y.index_add_(0, token, self.twos[expert](hidden) * weights[token, slot, None])
        return y

    def matrices(self):
        """The parameters of the first and the second matrix of all experts, [experts, out, in] and [experts, out]."""
        if self.spelling == "separate":
            return [
                (torch.stack([one.weight for one in layers]), torch.stack([one.bias for one in layers]))
                for layers in (self.ones, self.twos)
            ]
        found = [(self.one, self.one_bias), (self.two, self.two_bias)]
        return [(w.transpose(1, 2), b) for w, b in found] if "in by out" in self.spelling else found

    def assign(self, new):
        """Take over matrices in the form in which `matrices` gives them."""
        with torch.no_grad():
            for index, (weight, bias) in enumerate(new):
                weight, bias = torch.tensor(weight, dtype=torch.float32), torch.tensor(bias, dtype=torch.float32)
                if self.spelling == "separate":
                    for layer, w, b in zip((self.ones, self.twos)[index], weight, bias, strict=True):
                        layer.weight.copy_(w)
                        layer.bias.copy_(b)
                    continue
                stack, biases = ((self.one, self.one_bias), (self.two, self.two_bias))[index]
                stack.copy_(weight.transpose(1, 2) if "in by out" in self.spelling else weight)
                biases.copy_(bias)


def run(model: oir.Model, x: np.ndarray) -> np.ndarray:
    proto = oir.to_proto(model)
    onnx.checker.check_model(proto, full_check=True)
    session = onnxruntime.InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(None, {"x": x})[0]


@pytest.mark.parametrize("spelling", ["gathered", "gathered, in by out", "separate"])
def test_experts_read_and_write(spelling: str) -> None:
    module, x = built(Mixture(spelling)), torch.randn(9, WIDTH, generator=torch.Generator().manual_seed(3))
    axes = {"x": {0: "tokens"}, "y": {0: "tokens"}}
    model = Pipeline(NORMAL_FORM).rewrite(exported(module, (x,), ["x"], ["y"], axes)).model
    (block,) = stacks(model).blocks
    assert block.kinds == ("moe",)
    (mixture,) = block.experts
    assert (mixture.count, mixture.chosen, mixture.spelling) == (EXPERTS, TOP, spelling.partition(",")[0])
    assert mixture.source is block.entry
    np.testing.assert_allclose(mixture.router.weight(), module.router.weight.detach().numpy())
    random, new = np.random.default_rng(0), []
    for matrix, (weight, bias) in zip(mixture.matrices, module.matrices(), strict=True):
        np.testing.assert_allclose(matrix.weight(), weight.detach().numpy())
        np.testing.assert_allclose(matrix.bias(), bias.detach().numpy())
        assert (matrix.out_features, matrix.in_features) == tuple(weight.shape[1:])
        new.append((random.standard_normal(weight.shape), random.standard_normal(bias.shape)))
        matrix.write(model, *new[-1])
    module.assign(new)
    with torch.no_grad():
        np.testing.assert_allclose(run(model, x.numpy()), module(x).numpy(), rtol=1e-4, atol=1e-4)
    (again,) = find_experts(model)
    assert isinstance(again, Experts)
    for matrix, (weight, bias) in zip(again.matrices, new, strict=True):
        np.testing.assert_allclose(matrix.weight(), weight)
        np.testing.assert_allclose(matrix.bias(), bias)


OPERATOR = """
<ir_version: 9, opset_import: ["": 17, "com.microsoft": 1]>
g (float[N, 6] x) => (float[N, 6] y) <float[6, 4] r, float[4, 10, 6] a, float[4, 10] b, float[4, 6, 10] c> {
  p = MatMul (x, r)
  y = com.microsoft.MoE <k = 2, activation_type = "relu"> (x, p, a, b, c)
}"""


def test_the_operator_reads_and_writes() -> None:
    model = oir.from_proto(parse_graph(OPERATOR))
    (mixture,) = find_experts(model)
    assert isinstance(mixture, Experts)
    assert (mixture.count, mixture.chosen, mixture.spelling, mixture.source.name) == (4, 2, "operator", "x")
    first, second = mixture.matrices
    assert second.bias() is None
    random = np.random.default_rng(0)
    one, bias, two = (random.standard_normal(shape) for shape in ((4, 10, 6), (4, 10), (4, 6, 10)))
    first.write(model, one, bias)
    second.write(model, two, None)
    x = random.standard_normal((5, 6)).astype(np.float32)
    scores = x @ mixture.router.weight().T
    shares = np.exp(scores) / np.exp(scores).sum(-1, keepdims=True)
    expected = np.zeros((5, 6))
    for token in range(5):
        for expert in np.argsort(-shares[token])[:2]:
            hidden = np.maximum(one[expert] @ x[token] + bias[expert], 0)
            expected[token] += shares[token, expert] * (two[expert] @ hidden)
    session = onnxruntime.InferenceSession(oir.to_proto(model).SerializeToString(), providers=["CPUExecutionProvider"])
    np.testing.assert_allclose(session.run(None, {"x": x})[0], expected, rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match=r"the matrices are \[4, 6, 10\], with biases only where there were some"):
        second.write(model, two, np.zeros((4, 6)))


MISSES = {
    "how many experts are chosen is not known": "int64[1] k) => (float[N, 6] y) <float[6, 4] r, float[4, 6, 6] a> "
    "{ p = MatMul (x, r) v, i = TopK (p, k) j = Flatten <axis = 0> (i) w = Gather (a, j) y = MatMul (x, w) }",
    "how its matrices are multiplied is not known": "float[M, 6, 6] z) => (float[M, 6, 6] y) "
    "<float[6, 4] r, float[4, 6, 6] a, int64[1] k = {1}, int64[1] s = {-1}> "
    "{ p = MatMul (x, r) v, i = TopK (p, k) j = Reshape (i, s) w = Gather (a, j) y = Add (z, w) }",
}


@pytest.mark.parametrize("reason", MISSES)
def test_what_is_no_mixture_of_experts_is_said(reason: str) -> None:
    (miss,) = find_experts(oir.from_proto(parse_graph(f"g (float[N, 6] x, {MISSES[reason]}")))
    assert isinstance(miss, Miss) and miss.reason == reason


def test_a_choice_of_words_is_no_mixture() -> None:
    graph = """g (float[N, 6] x) => (int64[N, 2] i) <float[6, 50] r, int64[1] k = {2}> {
      p = MatMul (x, r)  v, i = TopK (p, k) }"""
    assert [
        one for one in find_experts(oir.from_proto(parse_graph(graph))) if not isinstance(one, Miss) or one.near
    ] == []


def typed(graph: str) -> oir.Model:
    return oir.from_proto(onnx.shape_inference.infer_shapes(parse_graph(graph), strict_mode=True))


CODEBOOKS = {
    "squares of the codes": """<float[16, 8] e, float two = {2.0}, int64[1] k = {1}> {
      z2 = Pow (z, two)  zz = ReduceSum <keepdims = 1> (z2, k)  e2 = Pow (e, two)  ee = ReduceSum <keepdims = 0> (e2, k)
      s = Add (zz, ee)  t = Transpose <perm = [1, 0]> (e)  m = MatMul (z, t)  m2 = Mul (m, two)  d = Sub (s, m2)
      i = ArgMin <axis = 1, keepdims = 0> (d)  y = Gather (e, i) }""",
    "doubled queries": """<float[16, 8] e, float two = {2.0}, int64[1] k = {1}> {
      z2 = Pow (z, two)  zz = ReduceSum <keepdims = 1> (z2, k)  e2 = Pow (e, two)  ee = ReduceSum <keepdims = 0> (e2, k)
      w = Mul (z, two)  t = Transpose <perm = [1, 0]> (e)  m = MatMul (w, t)  s = Sub (zz, m)  d = Add (s, ee)
      n = Neg (d)  i = ArgMax <axis = 1, keepdims = 0> (n)  y = Gather (e, i) }""",
    "products only": """<float[16, 8] e> {
      m = Gemm <transB = 1> (z, e)  i = ArgMax <axis = 1, keepdims = 0> (m)  y = Gather (e, i) }""",
}


@pytest.mark.parametrize("spelling", CODEBOOKS)
def test_codes_read_and_write(spelling: str) -> None:
    model = typed(f"g (float[N, 8] z) => (float[N, 8] y) {CODEBOOKS[spelling]}")
    (book,) = codebooks(model)
    assert book.codes().shape == (16, 8) and len(book.lookups) == 1 and book.read_only is None
    random = np.random.default_rng(0)
    codes, z = random.standard_normal((16, 8)), random.standard_normal((32, 8))
    with pytest.raises(ValueError, match="the codes are"):
        book.write(model, codes.T)
    book.write(model, codes)
    scores = z @ codes.T - ((codes**2).sum(1) / 2 if spelling != "products only" else 0.0)
    (y,) = ReferenceRunner(model).run({"z": z}).values()
    np.testing.assert_allclose(y, codes[scores.argmax(1)], rtol=1e-6)
    (again,) = codebooks(model)
    np.testing.assert_allclose(again.codes(), codes)


def test_codes_with_other_offsets_are_only_read() -> None:
    graph = """g (float[N, 8] z) => (float[N, 8] y) <float[16, 8] e, float[16] b> {
      m = Gemm <transB = 1> (z, e, b)  i = ArgMax <axis = 1, keepdims = 0> (m)  y = Gather (e, i) }"""
    model = typed(graph)
    (book,) = codebooks(model)
    assert book.read_only == "what is added to its products are not the norms of the codes"
    with pytest.raises(ValueError, match="are not the norms"):
        book.write(model, book.codes())


def test_the_class_that_a_linear_layer_finds_is_no_code() -> None:
    graph = """g (float[N, 8] z) => (int64[N] i) <float[16, 8] e, float[16] b> {
      m = Gemm <transB = 1> (z, e, b)  i = ArgMax <axis = 1, keepdims = 0> (m) }"""
    assert list(codebooks(typed(graph))) == []
