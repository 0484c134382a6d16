"""Nested graphs, functions, layers that change in training, and quantization, beside ONNX Runtime."""

from __future__ import annotations

import copy
import pickle

import numpy as np
import onnx_ir as oir
import pytest
import torch
from fx_checks import check, floats, model_of

from burnish.backends.fx.builder import to_graph_module
from burnish.backends.fx.write_back import write_back
from burnish.ir.errors import InputError

torch.set_num_threads(1)

BRANCH = """
g (float[N, 4] x, bool c) => (float[N, 4] y) <float[4, 4] w> {
    h = MatMul (x, w)
    y = If (c) <
        then_branch = t () => (float[N, 4] a) <float[4] bias> { a = Add (h, bias) },
        else_branch = e () => (float[N, 4] b) { k = Constant <value = float[2] {2.0, 3.0}> ()
            t = Concat <axis = 0> (k, k)  m = Mul (h, t)  b = MatMul (m, w) }
    >
}
"""

LOOP = """
g (float[2, 3] x, int64 n) => (float[2, 3] y, float[K, 2, 3] all) <float[3, 3] w> {
    yes = Constant <value = bool {1}> ()
    y, all = Loop (n, yes, x) <
        body = b (int64 i, bool go, float[2, 3] h) => (bool next, float[2, 3] out, float[2, 3] row) <float[3] bias> {
            m = MatMul (h, w)
            f = Cast <to = 1> (i)
            s = Add (m, f)
            out = Add (s, bias)
            row = Tanh (out)
            next = Identity (go)
        }
    >
}
"""

SCAN = """
g (float[5, 3] x, float[3] start) => (float[3] last, float[3, 5] all) <float[3, 3] w> {
    last, all = Scan <num_scan_inputs = 1, scan_input_directions = [1], scan_output_axes = [1],
        body = b (float[3] h, float[3] item) => (float[3] out, float[3] row) {
            m = MatMul (h, w)
            out = Add (m, item)
            row = Identity (out)
        }
    > (start, x)
}
"""

FUNCTION = """
<ir_version: 10, opset_import: ["": 20, "local": 1]>
g (float[N, 4] x) => (float[N, 4] y) <float[4, 4] w1, float[4, 4] w2> {
    a = local.dense <slope = 0.25> (x, w1)
    y = local.dense <slope = 0.5> (a, w2)
}
<domain: "local", opset_import: ["": 20]>
dense <slope> (x, w) => (y) {
    h = MatMul (x, w)
    b = Constant <value_floats = [1.0, 2.0, 3.0, 4.0]> ()
    s = Add (h, b)
    y = LeakyRelu <alpha: float = @slope> (s)
}
"""


def trained(text: str, *inputs: torch.Tensor) -> None:
    """Every parameter gets a gradient that agrees with finite differences."""
    module = to_graph_module(model_of(text)).double()
    inputs = tuple(x.double() if x.is_floating_point() else x for x in inputs)
    module(*inputs)[0].square().sum().backward()
    assert list(module.parameters())
    for name, parameter in module.named_parameters():
        assert parameter.grad is not None, name
        flat, gradient = parameter.data.reshape(-1), parameter.grad.reshape(-1)
        for i in range(0, len(flat), 2):
            values = []
            for step in (1e-6, -1e-6):
                flat[i] += step
                values.append(module(*inputs)[0].square().sum().item())
                flat[i] -= step
            slope = (values[0] - values[1]) / 2e-6
            assert abs(slope - gradient[i].item()) < 1e-4 * max(1.0, abs(slope)), name


@pytest.mark.parametrize("condition", [True, False])
def test_if_runs_one_branch_whose_weights_are_parameters(condition: bool) -> None:
    runner = check(model_of(BRANCH), {"x": floats(3, 4), "c": np.asarray(condition)})
    assert runner.module is not None
    assert {name for name, _ in runner.module.named_parameters()} == {"w", "bias", "k"}


def test_weights_inside_a_branch_are_written_back() -> None:
    model = model_of(BRANCH)
    module = to_graph_module(model)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(1.0)
    assert sorted(write_back(module, model)) == ["bias", "k", "w"]
    for condition in (True, False):
        check(model, {"x": floats(3, 4), "c": np.asarray(condition)})


@pytest.mark.parametrize("count", [0, 1, 4])
def test_loop_carries_and_collects(count: int) -> None:
    check(model_of(LOOP), {"x": floats(2, 3), "n": np.asarray(count)})


def test_scan_walks_backwards_and_stacks_along_an_axis() -> None:
    check(model_of(SCAN), {"x": floats(5, 3), "start": floats(3, seed=1)})


def test_functions_are_written_out_with_their_attributes() -> None:
    runner = check(model_of(FUNCTION), {"x": floats(3, 4)})
    assert runner.module is not None
    assert {name for name, _ in runner.module.named_parameters()} == {"w1", "w2", "b"}


def test_gradients_reach_the_weights_of_nested_graphs() -> None:
    x = torch.from_numpy(floats(2, 3))
    trained(LOOP, x, torch.tensor(3))
    trained(SCAN, torch.from_numpy(floats(5, 3)), torch.from_numpy(floats(3)))
    trained(FUNCTION, torch.from_numpy(floats(2, 4)))


def test_nested_modules_survive_copies_and_pickles() -> None:
    module = to_graph_module(model_of(LOOP))
    x, n = torch.from_numpy(floats(2, 3)), torch.tensor(3)
    for again in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        for found, wanted in zip(again(x, n), module(x, n), strict=True):
            assert torch.equal(found, wanted)


NORM = """
g (float[N, 3, 5] x) => (float[N, 3, 5] y) <float[3] scale, float[3] b, float[3] m, float[3] var, float ratio = {0.5}> {
    h = BatchNormalization <momentum = 0.75> (x, scale, b, m, var)
    y, mask = Dropout (h, ratio)
}
"""


def test_layers_follow_train_and_eval_only_on_request() -> None:
    model, feeds = model_of(NORM), {"x": floats(8, 3, 5)}
    x = torch.from_numpy(feeds["x"])
    check(model, feeds)
    plain = to_graph_module(model)
    assert torch.equal(plain.train()(x)[0], plain.eval()(x)[0])
    assert {name for name, _ in plain.named_parameters()} == {"scale", "b"}
    module = to_graph_module(model, training=True)
    assert torch.allclose(module.eval()(x)[0], plain(x)[0])
    assert write_back(module, model) == []
    before = {name: value.clone() for name, value in module.named_buffers()}
    dropped = module.train()(x)[0]
    assert 20 < int((dropped == 0).sum()) < 100
    mean = 0.75 * before["m"] + 0.25 * x.mean((0, 2))
    assert torch.allclose(dict(module.named_buffers())["m"], mean)
    assert sorted(write_back(module, model)) == ["m", "var"]
    check(model, feeds)


FAKE = """
g (float[N, 4] x) => (float[N, 3] y)
    <float[3, 4] w, float s = {0.05}, uint8 z = {128}, float[3] ws = {0.01, 0.02, 0.03}, int8[3] wz = {0, 0, 0}> {
    q = QuantizeLinear (x, s, z)
    d = DequantizeLinear (q, s, z)
    qw = QuantizeLinear <axis = 0> (w, ws, wz)
    dw = DequantizeLinear <axis = 0> (qw, ws, wz)
    y = Gemm <transB = 1> (d, dw)
}
"""


def test_fake_quantization_is_exact_forwards_and_straight_through_backwards() -> None:
    model = model_of(FAKE)
    x = floats(6, 4) * 4
    x[0, :2] = np.inf, -np.inf
    check(model, {"x": x})
    module = to_graph_module(model)
    assert [name for name, _ in module.named_parameters()] == ["w"]
    inside = torch.tensor([[0.3, -0.2, 1.0, 2.0]], requires_grad=True)
    module(inside)[0].sum().backward()
    assert inside.grad is not None and bool((inside.grad != 0).all())
    outside = torch.tensor([[100.0, -100.0, 0.0, 0.0]], requires_grad=True)
    module(outside)[0].sum().backward()
    assert outside.grad is not None and outside.grad[0, :2].tolist() == [0.0, 0.0]
    assert bool((module.get_parameter("w").grad != 0).any())


def test_an_integer_output_of_quantization_is_an_integer() -> None:
    text = FAKE.replace("(float[N, 3] y)", "(float[N, 3] y, uint8[N, 4] q)")
    check(model_of(text), {"x": floats(6, 4)})


def test_an_integer_weight_is_dequantized_and_stays_what_it_is() -> None:
    model = model_of(
        """
        g (float[N, 2] x) => (float[N, 2] y)
            <int8[2, 2] w = {1, -2, 3, -128}, float[2] s = {0.5, 0.25}, int8[2] z = {0, 1}> {
            d = DequantizeLinear <axis = 1> (w, s, z)
            y = MatMul (x, d)
        }
        """
    )
    module = check(model, {"x": floats(3, 2)}).module
    assert module is not None and not list(module.parameters())
    assert write_back(module, model) == []


@pytest.mark.parametrize("opset", [11, 13])
def test_softmax_means_what_the_opset_says(opset: int) -> None:
    model = model_of(
        f"""<ir_version: 7, opset_import: ["": {opset}]>
        g (float[2, 3, 4] x) => (float[2, 3, 4] y) {{ y = Softmax (x) }}"""
    )
    check(model, {"x": floats(2, 3, 4)})


def test_attributes_that_became_inputs_arrive_in_the_same_parameter() -> None:
    old = """<ir_version: 7, opset_import: ["": 11]>
        g (float[2, 1, 4] x) => (float[2, 2] y) {
            a = Squeeze <axes = [1]> (x)  b = Unsqueeze <axes = [0]> (a)  c = ReduceSum <axes = [0], keepdims = 0> (b)
            d, e = Split <axis = 1, split = [2, 2]> (c)  f = Add (d, e)  y = Clip (f) }"""
    check(model_of(old), {"x": floats(2, 1, 4)})


def test_a_value_that_nothing_computes_is_refused() -> None:
    model = model_of("g (float[2] x) => (float[2] y) { y = Relu (x) }")
    model.graph[0].replace_input_with(0, oir.Value(name="ghost"))
    with pytest.raises(InputError, match="`ghost` is read before it is computed"):
        to_graph_module(model)


def test_a_function_that_calls_itself_is_refused() -> None:
    model = model_of(FUNCTION)
    (function,) = model.functions.values()
    inner = function[0]
    inner.op_type, inner.domain = function.name, function.domain
    with pytest.raises(InputError, match="`dense` calls itself"):
        to_graph_module(model)
