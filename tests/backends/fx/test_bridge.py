"""ONNX to torch.fx and back: the same outputs, the same bytes, gradients where weights are."""

from __future__ import annotations

import copy
import io
import pickle
import warnings

import numpy as np
import onnx_ir as oir
import pytest
import torch
from fx_checks import check, floats, model_of, saved

from burnish.backends.fx.bridge import bridge_of
from burnish.backends.fx.builder import to_graph_module
from burnish.backends.fx.fallback import FallbackWarning
from burnish.backends.fx.runner import executor
from burnish.backends.fx.write_back import write_back
from burnish.backends.ort.session import executor as ort_executor
from burnish.frontends import onnx_file
from burnish.ir.errors import BurnishError, InputError

torch.set_num_threads(1)

MLP = """
g (float[N, 4] x) => (float[N, 3] y)
    <float[4, 8] fc1__weight, float[8] fc1__bias, float[3, 8] fc2__weight, float[3] b> {
    h = MatMul (x, fc1__weight)
    a = Add (h, fc1__bias)
    r = Relu (a)
    y = Gemm <transB = 1> (r, fc2__weight, b)
}
"""


def test_parameters_carry_the_names_of_the_initializers() -> None:
    module = to_graph_module(model_of(MLP))
    names = {name: tuple(p.shape) for name, p in module.named_parameters()}
    assert names == {"fc1.weight": (4, 8), "fc1.bias": (8,), "fc2.weight": (3, 8), "b": (3,)}
    nodes = {node.name: node for node in module.graph.nodes}
    assert {"h", "a", "r", "y"} <= set(nodes)
    assert nodes["y"].meta["onnx_op"] == ("", "Gemm") and nodes["y"].meta["onnx_outputs"] == ["y"]


@pytest.mark.parametrize("rows", [1, 5, 0])
def test_outputs_are_those_of_onnx_runtime(rows: int) -> None:
    check(model_of(MLP), {"x": floats(rows, 4)})


def test_a_training_step_lowers_the_loss_and_is_written_back() -> None:
    model = model_of(MLP)
    before = {name: value.const_value for name, value in model.graph.initializers.items()}
    module = to_graph_module(model)
    frozen = module.get_parameter("fc1.weight").requires_grad_(False)
    x, target = torch.from_numpy(floats(16, 4)), torch.from_numpy(floats(16, 3, seed=1))
    optimizer = torch.optim.SGD([p for p in module.parameters() if p.requires_grad], lr=0.05)
    losses = []
    for _ in range(10):
        loss = torch.nn.functional.mse_loss(module(x)[0], target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert frozen.grad is None
    assert sorted(write_back(module, model)) == ["b", "fc1.bias", "fc2.weight"]
    assert model.graph.initializers["fc1.weight"].const_value is before["fc1.weight"]
    found = ort_executor()(model).run({"x": x.numpy()})["y"]
    np.testing.assert_allclose(found, module(x)[0].detach().numpy(), atol=1e-6)


def test_nothing_trained_leaves_every_byte() -> None:
    model = model_of(MLP)
    before = saved(model)
    assert write_back(to_graph_module(model), model) == []
    assert write_back(to_graph_module(model).half(), model) == []
    assert saved(model) == before


def test_a_shared_and_transposed_weight_in_float16_is_written_once() -> None:
    model = model_of(
        """
        g (float[N, 4] x) => (float[N, 4] y) <float16[4, 4] w> {
            wide = Cast <to = 1> (w)
            t = Transpose (wide)
            h = MatMul (x, wide)
            y = MatMul (h, t)
        }
        """
    )
    module = check(model, {"x": floats(3, 4)}).module
    assert module is not None and [n for n, _ in module.named_parameters()] == ["w"]
    with torch.no_grad():
        module.get_parameter("w").mul_(0.5)
    assert write_back(module, model) == ["w"]
    assert model.graph.initializers["w"].dtype == oir.DataType.FLOAT16
    check(model, {"x": floats(3, 4)})


def test_weights_in_constant_nodes_are_parameters_and_written_back() -> None:
    model = model_of(
        """
        g (float[N, 2] x) => (float[N, 2] y) {
            w = Constant <value = float[2, 2] {1.0, 2.0, 3.0, 4.0}> ()
            b = Constant <value_floats = [0.5, 0.25]> ()
            h = MatMul (x, w)
            y = Add (h, b)
        }
        """
    )
    module = check(model, {"x": floats(3, 2)}).module
    assert module is not None and [n for n, _ in module.named_parameters()] == ["w", "b"]
    with torch.no_grad():
        module.get_parameter("w").add_(1.0)
        module.get_parameter("b").add_(1.0)
    assert write_back(module, model) == ["w", "b"]
    assert [node.op_type for node in model.graph] == ["Constant", "Constant", "MatMul", "Add"]
    check(model, {"x": floats(3, 2)})


def test_a_module_of_another_model_is_refused() -> None:
    other = model_of(MLP.replace("Relu", "Tanh"))
    with pytest.raises(InputError, match="another model"):
        write_back(to_graph_module(model_of(MLP)), other)
    with pytest.raises(InputError, match="not made from an ONNX model"):
        write_back(torch.nn.Linear(2, 2), other)


def test_every_gradient_agrees_with_finite_differences() -> None:
    model = model_of(MLP)
    module = to_graph_module(model).double()
    x = torch.from_numpy(floats(3, 4)).double()
    module(x)[0].square().sum().backward()
    for parameter in module.parameters():
        assert parameter.grad is not None
        flat, gradient = parameter.data.reshape(-1), parameter.grad.reshape(-1)
        for i in range(0, len(flat), 3):
            values = []
            for step in (1e-6, -1e-6):
                flat[i] += step
                values.append(module(x)[0].square().sum().item())
                flat[i] -= step
            assert abs((values[0] - values[1]) / 2e-6 - gradient[i].item()) < 1e-5 * max(1.0, abs(gradient[i].item()))


SHAPES = """
g (float[B, S, 6] x) => (float[B, H, S, D] y, int64[R] d)
    <int64[1] zero = {0}, int64[1] one = {1}, int64[2] hd = {2, -1}, int64[1] two = {2}> {
    s = Shape (x)
    b = Gather (s, zero)
    q = Gather (s, one)
    n = Concat <axis = 0> (b, q, hd)
    r = Reshape (x, n)
    y = Transpose <perm = [0, 2, 1, 3]> (r)
    tail = Slice (s, one, two)
    m = Mul (tail, two)
    d = Concat <axis = 0> (m, s)
}
"""


def test_shape_arithmetic_stays_on_the_host_and_exports_with_dynamic_shapes() -> None:
    model = model_of(SHAPES)
    for batch, length in ((1, 3), (4, 7)):
        check(model, {"x": floats(batch, length, 6)})
    module = to_graph_module(model)
    dims = {"x": {0: torch.export.Dim("batch", min=1, max=64), 1: torch.export.Dim("length", min=2, max=64)}}
    program = torch.export.export(module, (torch.zeros(2, 3, 6),), dynamic_shapes=dims)
    x = torch.from_numpy(floats(5, 9, 6))
    for found, wanted in zip(program.module()(x), module(x), strict=True):
        assert torch.equal(found, wanted)


def test_a_module_survives_a_copy_and_a_pickle() -> None:
    model = model_of(MLP)
    module = to_graph_module(model)
    x = torch.from_numpy(floats(3, 4))
    for again in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert torch.equal(again(x)[0], module(x)[0])
        assert bridge_of(again) == bridge_of(module)
        with torch.no_grad():
            again.get_parameter("b").add_(1.0)
        assert write_back(again, onnx_file.read_bytes(saved(model))) == ["b"]
    torch.save(module.state_dict(), io.BytesIO())


UNKNOWN = """
<ir_version: 10, opset_import: ["": 20, "com.microsoft": 1]>
g (float[N, 4] x) => (float[N, 4] y) <float[4, 4] w> {
    h = MatMul (x, w)
    k = com.microsoft.CDist <metric = "euclidean"> (h, w)
    y = Add (k, h)
}
"""


def test_an_unknown_operator_runs_in_onnx_runtime_and_stops_gradients() -> None:
    model = model_of(UNKNOWN)
    with pytest.warns(FallbackWarning, match=r"com.microsoft::CDist at CDist .*@operator"):
        runner = check(model, {"x": floats(4, 4)})
    assert runner.module is not None
    assert bridge_of(runner.module).opaque == ("com.microsoft::CDist",)
    with pytest.raises(BurnishError, match="gradient") as caught:
        runner.module(torch.zeros(4, 4))[0].sum().backward()
    assert "CDist" in str(caught.value) and "registry" in str(caught.value)


def test_without_fallback_every_missing_operator_is_named() -> None:
    with pytest.raises(InputError) as caught:
        to_graph_module(model_of(UNKNOWN), fallback=False)
    assert "CDist" in caught.value.cause and "@operator" in str(caught.value.hint)


def test_an_operator_that_nobody_knows_is_an_input_error() -> None:
    model = model_of(UNKNOWN.replace("com.microsoft.CDist", "com.microsoft.Nonsense"))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FallbackWarning)
        runner = executor()(model)
    with pytest.raises(InputError, match="neither torch nor ONNX Runtime"):
        runner.run({"x": floats(4, 4)})


@pytest.mark.parametrize(
    "name",
    [
        'a"); raise SystemExit("', "a.b..c", ".", "forward", "class", "0", "weight'\n", "ü.π", "training.x", "_graph",
        "_wrapped_call", "_codegen.x", "../x", "x" * 10_000, "{0}%s", "__class__", "a\x00b", "ａ",
    ],
)  # fmt: skip
def test_hostile_names_are_data(name: str) -> None:
    model = model_of(MLP)
    value = model.graph.initializers.pop("fc1.weight")
    value.name = name
    model.graph.initializers[name] = value
    model.graph.inputs[0].name = f"in{name}"
    module = check(model, {f"in{name}": floats(2, 4)}).module
    assert module is not None and len(list(module.parameters())) == 4
    (path,) = [path for path, origin in bridge_of(module).weights.items() if origin.name == name]
    with torch.no_grad():
        module.get_parameter(path).add_(1.0)
    assert write_back(module, model) == [name]


@pytest.mark.parametrize(
    "name",
    ['x"); raise SystemExit("', 'x"\nraise SystemExit\n"', "a.b", "..", "forward", "ａ", "a\x00b", "x\\'", "class", ""],
)
def test_hostile_operators_are_data(name: str) -> None:
    model = model_of(UNKNOWN)
    model.graph[0].op_type = name
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FallbackWarning)
        runner = executor()(model)
    with pytest.raises(InputError, match="neither torch nor ONNX Runtime"):
        runner.run({"x": floats(4, 4)})


def test_wrong_feeds_are_refused() -> None:
    runner = executor()(model_of(MLP))
    for feeds, cause in (
        ({}, "`x` is missing"),
        ({"x": floats(1, 4), "z": floats(1)}, "no input `z`"),
        ({"x": floats(1, 5)}, "torch refuses"),
    ):
        with pytest.raises(InputError, match=cause):
            runner.run(feeds)
    runner.close()
    with pytest.raises(InputError, match="closed"):
        runner.run({"x": floats(1, 4)})


def test_watchers_see_values_as_they_are_computed() -> None:
    runner = executor()(model_of(MLP))
    seen: list[torch.Tensor] = []
    outputs = runner.watch({"x": floats(2, 4)}, {"r": lambda value: seen.append(value.clone())})
    assert len(seen) == 1 and seen[0].shape == (2, 8) and bool((seen[0] >= 0).all())
    np.testing.assert_array_equal(outputs["y"], runner.run({"x": floats(2, 4)})["y"])
    with pytest.raises(InputError, match="no value `nope`"):
        runner.watch({"x": floats(2, 4)}, {"nope": lambda value: None})


def test_compilation_sees_one_graph_for_all_sizes() -> None:
    module = to_graph_module(model_of(SHAPES))
    graphs = []

    def count(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> torch.fx.GraphModule:
        graphs.append(graph)
        return graph

    torch._dynamo.reset()
    compiled = torch.compile(module, backend=count, dynamic=True, fullgraph=True)
    for batch, length in ((2, 3), (4, 7), (3, 5)):
        x = torch.from_numpy(floats(batch, length, 6))
        for found, wanted in zip(compiled(x), module(x), strict=True):
            assert torch.equal(found, wanted)
    assert len(graphs) == 1


DEVICES = """
g (float[N, S, 4] x, int64[N, S] ids, bool[N, S] keep) => (float[N, S, 4] y)
    <float[9, 4] table, float[4] gain, int64[1] last = {-1}, int64[1] two = {2}, float low = {-9}, float zero = {0}> {
    e = Gather (table, ids)
    h = Add (x, e)
    n = LayerNormalization (h, gain)
    s = Shape (ids)
    d = Gather (s, last)
    k = Squeeze (d)
    origin = Constant <value = int64 {0}> ()
    step = Constant <value = int64 {1}> ()
    r = Range (origin, k, step)
    c = Unsqueeze (r, last)
    f = Cast <to = 1> (c)
    b = Where (keep, zero, low)
    w = Unsqueeze (b, two)
    p = Add (n, f)
    y = Add (p, w)
}
"""


def test_what_is_made_on_the_way_follows_the_device_of_the_inputs() -> None:
    model, ids = model_of(DEVICES), np.array([[0, 8, -1], [3, 4, 5]])
    feeds = {"x": floats(2, 3, 4), "ids": ids, "keep": ids > 0}
    check(model, feeds)
    module = to_graph_module(model).to("meta")
    (y,) = module(*(torch.from_numpy(array).to("meta") for array in feeds.values()))
    assert y.device.type == "meta" and y.shape == (2, 3, 4)


def test_a_device_that_is_missing_is_an_input_error() -> None:
    if torch.cuda.is_available():
        check(model_of(DEVICES), {"x": floats(1, 1, 4), "ids": np.zeros((1, 1), int), "keep": np.ones((1, 1), bool)})
        return
    with pytest.raises(InputError, match="cannot use the device `cuda`"):
        executor(device="cuda")(model_of(MLP))
    with pytest.raises(InputError, match="cannot use the device `toaster`"):
        executor(device="toaster")(model_of(MLP))


def test_the_caller_decides_what_is_trained() -> None:
    wanted = {"fc1.weight": False, "b": True}
    module = to_graph_module(model_of(MLP), trainable=lambda value: wanted.get(str(value.name)))
    assert {name for name, _ in module.named_parameters()} == {"fc1.bias", "fc2.weight", "b"}
    assert "fc1.weight" in dict(module.named_buffers())


def test_bounds_and_scales_are_no_parameters_even_behind_other_nodes() -> None:
    model = model_of(
        """
        g (float[1, 1, 2, 2] x) => (float[1, 1, 4, 4] y) <float[2] ones = {1.0, 1.0}, float[2] twos = {2.0, 2.0}> {
            scales = Concat <axis = 0> (ones, twos)
            top = Constant <value_float = 0.5> ()
            c = Clip (x, , top)
            y = Resize (c, , scales)
        }
        """
    )
    runner = check(model, {"x": floats(1, 1, 2, 2)})
    assert runner.module is not None and not list(runner.module.parameters())
