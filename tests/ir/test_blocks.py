"""Blocks: what is found is what the torch module consists of, and a graph without a block is the module without it."""

from __future__ import annotations

import copy
from functools import cache

import numpy as np
import onnx
import onnx_ir as oir
import onnxruntime
import pytest
from block_networks import Cached, ConvNet, Encoder, Grid, Translator, UNet, built, exported, torch
from golden import parse_graph

from burnish.ir.views.block_drop import drop, obstacle
from burnish.ir.views.blocks import Structure, stacks
from burnish.passes.pipeline import Pipeline
from burnish.passes.recipes import NORMAL_FORM
from burnish.tools.research.respelling import respelled

SEQUENCE = {"ids": {0: "batch", 1: "seq"}, "y": {0: "batch", 1: "seq"}}
IMAGE = {"image": {0: "batch"}, "y": {0: "batch"}}


def ids(tokens: int = 5) -> torch.Tensor:
    return torch.randint(0, 11, (2, tokens), generator=torch.Generator().manual_seed(1))


@cache
def encoder(form: str) -> tuple[torch.nn.Module, tuple[torch.Tensor, ...], oir.Model]:
    mask = torch.ones(2, 5, dtype=torch.int64)
    mask[1, :2] = 0
    module, inputs = built(Encoder(form)), (ids(), mask)
    axes = SEQUENCE | {"mask": SEQUENCE["ids"]}
    return module, inputs, exported(module, inputs, ["ids", "mask"], ["y"], axes)


@cache
def translator() -> tuple[torch.nn.Module, tuple[torch.Tensor, ...], oir.Model]:
    module, inputs = built(Translator()), (ids(), ids(7))
    axes = {"ids": {0: "batch", 1: "seq"}, "target": {0: "batch", 1: "tokens"}, "y": {0: "batch", 1: "tokens"}}
    return module, inputs, exported(module, inputs, ["ids", "target"], ["y"], axes)


@cache
def image(kind: type[torch.nn.Module]) -> tuple[torch.nn.Module, tuple[torch.Tensor, ...], oir.Model]:
    module, inputs = built(kind()), (torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(2)),)
    return module, inputs, exported(module, inputs, ["image"], ["y"], IMAGE)


def normal(model: oir.Model, *more: str) -> oir.Model:
    """The model in its normal form, with more passes behind it; the same model is rewritten once."""
    key = id(model), more
    if key not in NORMAL:
        NORMAL[key] = model, Pipeline([*NORMAL_FORM, *more]).rewrite(model).model
    return NORMAL[key][1].clone()


NORMAL: dict[tuple[int, tuple[str, ...]], tuple[oir.Model, oir.Model]] = {}


def outputs(model: oir.Model, feeds: dict[str, np.ndarray]) -> list[np.ndarray]:
    proto = oir.to_proto(model)
    spelled = [node for node in proto.graph.node if node.op_type == "SimplifiedLayerNormalization"]
    if not spelled:
        onnx.checker.check_model(proto, full_check=True)
    session = onnxruntime.InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(None, {name: value for name, value in feeds.items() if name in proto_inputs(proto)})


def proto_inputs(proto: onnx.ModelProto) -> set[str]:
    return {one.name for one in proto.graph.input}


def feeds(model: oir.Model, inputs: tuple[torch.Tensor, ...]) -> dict[str, np.ndarray]:
    return {value.name: one.numpy() for value, one in zip(model.graph.inputs, inputs, strict=True)}  # type: ignore[misc]


def assert_close(found: np.ndarray, expected: torch.Tensor) -> None:
    wanted = expected.numpy()
    np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-5 * max(1.0, float(np.abs(wanted).max())))


def without(module: torch.nn.Module, chosen: list[int]) -> torch.nn.Module:
    left = copy.deepcopy(module)
    left.blocks = torch.nn.ModuleList(one for index, one in enumerate(module.blocks) if index not in chosen)
    return left


def summary(found: Structure) -> list[tuple[str, tuple[str, ...]]]:
    return [(stack.pattern, stack.blocks[0].kinds) for stack in found.stacks]


LAYER = ("attention", "mlp")


@pytest.mark.parametrize("more", [(), ("fuse-norm", "fuse-skip-norm{target=ort-cuda}")], ids=["plain", "skip-fused"])
@pytest.mark.parametrize("chosen", [[0], [1], [2], [0, 2], [0, 1]], ids=str)
@pytest.mark.parametrize("form", ["pre", "post", "parallel", "sandwich"])
def test_a_graph_without_a_layer_is_the_module_without_it(form: str, chosen: list[int], more: tuple[str, ...]) -> None:
    module, inputs, model = encoder(form)
    given = feeds(model, inputs)
    model = normal(model, *more)
    found = stacks(model)
    assert summary(found) == [("AAA", LAYER)]
    forms = {block.form for block in found.blocks}
    assert forms == {"post-norm" if form == "post" else "skip-fused" if more else "plain"}
    assert [[(layer.heads, layer.head_size) for layer in block.attention] for block in found.blocks] == [[(2, 8)]] * 3
    assert all(block.parallel == (form == "parallel") for block in found.blocks)
    drop(model, found, [found.blocks[index] for index in chosen])
    (y,) = outputs(model, given)
    with torch.no_grad():
        assert_close(y, without(module, chosen)(*inputs))
    left = stacks(normal(model))
    assert "".join(stack.pattern for stack in left.stacks) == "A" * (3 - len(chosen))


@pytest.mark.parametrize("chosen", [[0], [1], [2], [3], [4], [1, 2, 4]], ids=str)
def test_encoder_and_decoder_are_two_stacks(chosen: list[int]) -> None:
    module, inputs, model = translator()
    given = feeds(model, inputs)
    model = normal(model)
    found = stacks(model)
    assert summary(found) == [("AA", LAYER), ("BBB", ("attention", "cross-attention", "mlp"))]
    drop(model, found, [found.blocks[index] for index in chosen])
    (y,) = outputs(model, given)
    with torch.no_grad():
        assert_close(y, without(module, chosen)(*inputs))


@cache
def cached() -> tuple[torch.nn.Module, tuple[torch.Tensor, ...], oir.Model]:
    past = (torch.randn(2, 2, 4, 8, generator=torch.Generator().manual_seed(i)) for i in range(6))
    module, inputs = built(Cached()), (ids(), *past)
    axes = SEQUENCE | {name: {0: "batch", 2: "past"} for name in PAST} | {n: {0: "batch", 2: "all"} for n in PRESENT}
    return module, inputs, exported(module, inputs, ["ids", *PAST], ["y", *PRESENT], axes)


PAST = [f"past.{i // 2}.{'kv'[i % 2]}" for i in range(6)]
PRESENT = [f"present.{i // 2}.{'kv'[i % 2]}" for i in range(6)]


@pytest.mark.parametrize("chosen", [[0], [1], [2], [0, 2]], ids=str)
def test_a_dropped_layer_takes_its_cache_along(chosen: list[int]) -> None:
    module, inputs, model = cached()
    given = feeds(model, inputs)
    model = normal(model)
    found = stacks(model)
    assert summary(found) == [("AAA", LAYER)]
    for index, block in enumerate(found.blocks):
        assert [value.name for value in block.inputs] == PAST[2 * index : 2 * index + 2]
        assert [value.name for value in block.outputs] == PRESENT[2 * index : 2 * index + 2]
    drop(model, found, [found.blocks[index] for index in chosen])
    kept = [i for i in range(3) if i not in chosen]
    assert [v.name for v in model.graph.inputs] == ["ids", *(n for i in kept for n in PAST[2 * i : 2 * i + 2])]
    assert [v.name for v in model.graph.outputs] == ["y", *(n for i in kept for n in PRESENT[2 * i : 2 * i + 2])]
    with torch.no_grad():
        expected = without(module, chosen)(ids(), *(p for i in kept for p in inputs[2 * i + 1 : 2 * i + 3]))
    for one, other in zip(outputs(model, given), expected, strict=True):
        assert_close(one, other)


def test_a_cache_whose_size_is_read_stays_when_no_other_has_it() -> None:
    module = built(Cached(2))
    names = ["k", "v", "other k", "other v"]
    past = tuple(torch.randn(2, 2, 4, 8) for _ in names)
    axes = SEQUENCE | {name: {0: "batch", 2: f"past {name[:-1]}"} for name in names}
    outs = [f"new {name}" for name in names]
    model = normal(exported(module, (ids(), *past), ["ids", *names], ["y", *outs], axes))
    found = stacks(model)
    reason = obstacle(found, found.blocks[:1])
    assert reason is not None and "the size of its cache `k` is read outside" in reason
    with pytest.raises(ValueError, match="block 0 stays"):
        drop(model, found, found.blocks[:1])
    drop(model, found, found.blocks[1:])
    assert [value.name for value in model.graph.inputs] == ["ids", "k", "v"]


@pytest.mark.parametrize("chosen", [[0], [1], [2], [4], [5], [1, 2, 5]], ids=str)
def test_convolutional_blocks_of_one_shape_can_go(chosen: list[int]) -> None:
    module, inputs, model = image(ConvNet)
    given = feeds(model, inputs)
    model = normal(model)
    found = stacks(model)
    assert [stack.pattern for stack in found.stacks] == ["AAA", "B", "CC"]
    assert {block.form for block in found.blocks} == {"cnn"}
    assert [block.droppable for block in found.blocks] == [True, True, True, False, True, True]
    assert found.blocks[3].refusal == ("its shortcut changes the shape: [batch, 8, 16, 16] becomes [batch, 16, 8, 8]")
    with pytest.raises(ValueError, match="block 3 stays: its shortcut"):
        drop(model, found, [found.blocks[3]])
    drop(model, found, [found.blocks[index] for index in chosen])
    (y,) = outputs(model, given)
    with torch.no_grad():
        assert_close(y, without(module, chosen)(*inputs))


def test_the_way_up_of_a_unet_says_why_it_stays() -> None:
    module, inputs, model = image(UNet)
    given = feeds(model, inputs)
    model = normal(model)
    found = stacks(model)
    assert [block.droppable for block in found.blocks] == [True, True, True, False, False]
    assert {block.refusal for block in found.blocks[3:]} == {
        "a skip connection is concatenated before it, and it narrows the result: "
        f"[batch, 16, {size}, {size}] becomes [batch, 8, {size}, {size}]"
        for size in (8, 16)
    }
    drop(model, found, [found.blocks[2]])
    (y,) = outputs(model, given)
    left = copy.deepcopy(module)
    left.blocks[2] = torch.nn.Identity()
    with torch.no_grad():
        assert_close(y, left(*inputs))


@pytest.mark.parametrize("chosen", [[0], [2], [0, 1], [1, 2], [0, 2]], ids=str)
def test_a_stream_that_is_reshaped_on_the_way_goes_on_in_the_shape_it_had(chosen: list[int]) -> None:
    module, inputs, model = image(Grid)
    given = feeds(model, inputs)
    model = normal(model)
    found = stacks(model)
    assert summary(found) == [("AAA", LAYER)]
    assert found.blocks[2].entry_shape != found.blocks[2].exit_shape and found.blocks[2].droppable
    drop(model, found, [found.blocks[index] for index in chosen])
    (y,) = outputs(model, given)
    with torch.no_grad():
        assert_close(y, without(module, chosen)(*inputs))
    assert len(stacks(model).blocks) == 3 - len(chosen)


def test_the_places_of_a_layer() -> None:
    _, _, model = encoder("sandwich")
    block = stacks(normal(model)).blocks[1]
    norm = block.attention_in.producer()
    assert norm.op_type == "LayerNormalization" and norm.inputs[0] is block.entry
    for out, before, behind in ((block.attention_out, block.entry, block.mid), (block.mlp_out, block.mid, block.exit)):
        assert out.producer().op_type == "LayerNormalization"
        assert set(behind.producer().inputs) == {before, out}
    assert block.mlp_in.producer().inputs[0] is block.mid
    _, _, model = encoder("parallel")
    block = stacks(normal(model)).blocks[1]
    assert block.mid is None and block.attention_in is block.mlp_in
    assert block.attention_out is not block.mlp_out
    assert {block.attention_out, block.mlp_out} & set(block.parts[0].results) == set(block.parts[0].results)


def test_hashes_do_not_depend_on_names_or_order() -> None:
    _, _, model = encoder("pre")
    model = normal(model)
    before = [block.hash for block in stacks(model).blocks]
    for number, node in enumerate(model.graph):
        node.name = f"n{number}"
        for value in node.outputs:
            if not value.is_graph_output():
                value.name = f"v{number}"
    nodes = list(model.graph)
    later = [node for node in nodes if not any(v is not None and v.producer() in nodes for v in node.inputs)]
    for node in later:
        model.graph.remove(node)
    model.graph.insert_before(model.graph[0], later)
    assert [block.hash for block in stacks(model).blocks] == before


REFUSED = {
    "an inner value is read": (
        "g (float[N, 4] x) => (float[N, 4] y, float[N, 4] z) <float[4, 4] a, float[4, 4] b> "
        "{ h = MatMul (x, a) r = Relu (h) m = MatMul (r, b) y = Add (m, x) z = Neg (r) }",
        "outside reads its inner value `r`",
    ),
    "an inner value is an output": (
        "g (float[N, 4] x) => (float[N, 4] y, float[N, 4] r) <float[4, 4] a, float[4, 4] b> "
        "{ h = MatMul (x, a) r = Relu (h) m = MatMul (r, b) y = Add (m, x) }",
        "it computes outputs of the graph that are no state: `r`",
    ),
    "the sum is wider": (
        "g (float[1, 4] x) => (float[3, 4] y) <float[1, 4] a, float[3, 1] b> "
        "{ t = Transpose (x) s = MatMul (x, t) h = MatMul (b, s) m = MatMul (h, a) y = Add (m, x) }",
        "it changes the shape: [1, 4] becomes [3, 4]",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_dropped(case: str) -> None:
    graph, reason = REFUSED[case]
    (block,) = stacks(oir.from_proto(parse_graph(graph))).blocks
    assert block.refusal is not None and reason in block.refusal


def test_a_stream_of_integers_between_floats_is_read() -> None:
    graph = """g (float[N, 4] x) => (float[N, 4] y)
    <float[4, 4] a, float[4, 4] b, float s = {0.5}, uint8 z = {128}, float t = {0.25}, uint8 o = {100}> {
      q = QuantizeLinear (x, s, z)  d = DequantizeLinear (q, s, z)  e = DequantizeLinear (q, s, z)
      m = MatMul (d, a)  n = Add (m, e)  u = QuantizeLinear (n, t, o)
      v = DequantizeLinear (u, t, o)  w = DequantizeLinear (u, t, o)  k = MatMul (v, b)  y = Add (w, k) }"""
    model = oir.from_proto(parse_graph(graph))
    found = stacks(model)
    assert [(block.entry.name, block.exit.name, block.droppable) for block in found.blocks] == [
        ("x", "n", True),
        ("n", "y", True),
    ]
    drop(model, found, found.blocks[:1])
    x = np.random.default_rng(0).standard_normal((3, 4)).astype(np.float32)
    kept = np.clip(np.round(x / 0.25) + 100, 0, 255) * 0.25 - 25
    weight = model.graph.initializers["b"].const_value.numpy()
    np.testing.assert_allclose(outputs(model, {"x": x})[0], kept + kept @ weight, rtol=1e-4, atol=1e-5)


def test_blocks_in_a_branch_are_found_and_dropped() -> None:
    graph = """g (float[N, 4] x, bool c) => (float[N, 4] y) <float[4, 4] a, float[4, 4] b> {
      h = Abs (x)
      y = If (c) <then_branch = t () => (float[N, 4] p)
                    { m = MatMul (h, a) r = Relu (m) n = MatMul (r, b) p = Add (h, n) },
                  else_branch = e () => (float[N, 4] q) { q = Neg (h) }> }"""
    model = oir.from_proto(parse_graph(graph))
    found = stacks(model)
    (block,) = found.blocks
    assert (block.kinds, block.entry.name, block.exit.name, block.refusal) == (("mlp",), "h", "p", None)
    drop(model, found, [block])
    x = np.array([[-1.0, 2.0, -3.0, 4.0]], np.float32)
    np.testing.assert_array_equal(outputs(model, {"x": x, "c": np.array(True)})[0], np.abs(x))
    np.testing.assert_array_equal(outputs(model, {"x": x, "c": np.array(False)})[0], -np.abs(x))


def test_a_code_added_to_another_is_no_block() -> None:
    graph = """g (float[N, 4] z) => (float[N, 4] y) <float[9, 4] a, float[9, 4] b> {
      m = Gemm <transB = 1> (z, a)  i = ArgMax <axis = 1, keepdims = 0> (m)  q = Gather (a, i)  r = Sub (z, q)
      n = Gemm <transB = 1> (r, b)  j = ArgMax <axis = 1, keepdims = 0> (n)  s = Gather (b, j)  y = Add (q, s) }"""
    assert stacks(oir.from_proto(parse_graph(graph))).blocks == []


def test_what_is_no_residual_stream_is_said() -> None:
    graph = "g (float[N, 4] x) => (float[N, 4] y) <float[4, 4] a> { h = MatMul (x, a) y = Relu (h) }"
    found = stacks(oir.from_proto(parse_graph(graph)))
    assert found.blocks == []
    assert found.missing == ("no residual stream: no sum adds to a value what matrices compute from it",)


@pytest.mark.parametrize("form", ["pre", "post", "parallel"])
def test_blocks_are_the_same_whatever_the_names_and_the_order(form: str) -> None:
    same_blocks(encoder(form)[2])


def test_blocks_of_two_stacks_are_in_one_order() -> None:
    """An encoder comes before its decoder, even where the file begins with the decoder."""
    same_blocks(translator()[2])


def same_blocks(model: oir.Model) -> None:
    source = oir.to_proto(model)
    expected = [(one.index, one.hash, len(one.nodes), one.parameters) for one in stacks(model).blocks]
    for seed in range(8):
        other = oir.from_proto(respelled(source, seed))
        assert [(one.index, one.hash, len(one.nodes), one.parameters) for one in stacks(other).blocks] == expected
