"""The fused operators of `com.microsoft`: the float64 interpreter and torch mean what ONNX Runtime computes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx
import onnx_ir as oir
import pytest
from onnx import helper

from burnish.backends.fx.runner import executor as torch_executor
from burnish.backends.ort.session import executor
from burnish.backends.reference.runner import ReferenceRunner
from burnish.passes.verify import relative_error

Feeds = Mapping[str, np.ndarray | None]
BOTH = (ReferenceRunner, torch_executor(fallback=False))


def single(op: str, feeds: Feeds, outputs: int, domain: str = "com.microsoft", **attributes: Any) -> oir.Model:
    """A model of one node whose inputs are all fed; an input fed with None is absent."""
    kinds = {name: helper.np_dtype_to_tensor_dtype(x.dtype) for name, x in feeds.items() if x is not None}
    names = [name if x is not None else "" for name, x in feeds.items()]
    outs = [f"y{i}" for i in range(outputs)]
    graph = helper.make_graph(
        [helper.make_node(op, names, outs, domain=domain, **attributes)],
        "g",
        [helper.make_tensor_value_info(n, k, feeds[n].shape) for n, k in kinds.items()],
        [helper.make_tensor_value_info(o, onnx.TensorProto.FLOAT, None) for o in outs],
    )
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    return oir.serde.deserialize_model(helper.make_model(graph, opset_imports=opsets, ir_version=10))


def assert_agrees(op: str, feeds: Feeds, outputs: int = 1, *, tolerance: float = 2e-6, **attributes: Any) -> None:
    """All runners give the same to float32 rounding."""
    model = single(op, feeds, outputs, **attributes)
    given = {n: x for n, x in feeds.items() if x is not None}
    expected = executor()(model).run(given)
    for load in BOTH:
        found = load(model).run(given)
        for name, wanted in expected.items():
            assert found[name].shape == wanted.shape
            assert relative_error(found[name], wanted) < tolerance, name


def random(*shape: int, seed: int = 0) -> np.ndarray:
    """Normal float32 numbers."""
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


X = random(2, 5, 24)
BIAS = random(24, seed=1)


@pytest.mark.parametrize(
    ("op", "inputs"),
    [
        ("Gelu", [X]),
        ("BiasGelu", [X, BIAS]),
        ("FastGelu", [X]),
        ("FastGelu", [X, BIAS]),
        ("QuickGelu", [X]),
        ("SimplifiedLayerNormalization", [X, BIAS]),
    ],
)
def test_activations_and_norms(op: str, inputs: list[np.ndarray]) -> None:
    domain = "" if op == "SimplifiedLayerNormalization" else "com.microsoft"
    assert_agrees(op, {f"x{i}": x for i, x in enumerate(inputs)}, domain=domain)


@pytest.mark.parametrize("skip_shape", [(2, 5, 24), (1, 5, 24), (5, 24)])
@pytest.mark.parametrize("biased", [True, False])
def test_skip_norms(skip_shape: tuple[int, ...], biased: bool) -> None:
    skip, gamma, beta = random(*skip_shape, seed=2), random(24, seed=3), random(24, seed=4)
    bias = BIAS if biased else None
    for op, own in (("SkipLayerNormalization", {"beta": beta}), ("SkipSimplifiedLayerNormalization", {})):
        feeds = {"x": X, "skip": skip, "gamma": gamma, **own, "bias": bias}
        model = single(op, feeds, 4, epsilon=1e-5)
        given = {n: x for n, x in feeds.items() if x is not None}
        model.graph.outputs[:] = [model.graph.outputs[0], model.graph.outputs[3]]
        expected = executor()(model).run(given)
        for load in BOTH:
            found = load(model).run(given)
            assert all(relative_error(found[n], expected[n]) < 2e-6 for n in expected)


@pytest.mark.parametrize("trans", [{}, {"transA": 1}, {"transB": 1}, {"transA": 1, "transB": 1, "alpha": 0.3}])
def test_fused_matmul(trans: dict[str, Any]) -> None:
    a, b = random(2, 3, 4, 5), random(2, 3, 5, 6, seed=1)
    a = a.swapaxes(2, 3).copy() if trans.get("transA") else a
    b = b.swapaxes(2, 3).copy() if trans.get("transB") else b
    assert_agrees("FusedMatMul", {"a": a, "b": b}, **trans)


@pytest.mark.parametrize("trans", [{"transBatchA": 1}, {"transBatchB": 1}, {"transBatchA": 1, "transA": 1}])
def test_fused_matmul_over_moved_batches(trans: dict[str, Any]) -> None:
    a = random(4, 2, 3, 5) if "transBatchA" in trans else random(2, 3, 4, 5)
    if trans.get("transA"):
        a = random(5, 2, 3, 4)
    b = random(5, 2, 3, 6, seed=1) if "transBatchB" in trans else random(2, 3, 5, 6, seed=1)
    assert_agrees("FusedMatMul", {"a": a, "b": b}, **trans)


@pytest.mark.parametrize(
    "attributes",
    [
        {"activation": "Relu"},
        {"activation": "LeakyRelu", "activation_params": [0.2]},
        {"activation": "Clip", "activation_params": [-0.5, 0.5]},
        {"activation": "HardSigmoid", "activation_params": [0.2, 0.4]},
    ],
)
@pytest.mark.parametrize("added", [True, False])
def test_fused_conv(attributes: dict[str, Any], added: bool) -> None:
    if added and attributes["activation"] == "HardSigmoid":
        pytest.skip("ONNX Runtime has no such kernel")
    feeds = {"x": random(2, 4, 7, 7), "w": random(6, 2, 3, 3, seed=1), "b": random(6, seed=2)}
    if added:
        feeds["z"] = random(2, 6, 4, 4, seed=3)
    assert_agrees("FusedConv", feeds, group=2, strides=[2, 2], pads=[1, 1, 1, 1], **attributes)


def mask(kind: str, batch: int, s: int, t: int) -> np.ndarray | None:
    """A key padding mask of the given form: the second row is padded."""
    lengths = np.array([t, t - 2], np.int32)
    plain = (np.arange(t) < lengths[:, None]).astype(np.int32)
    left = plain[:, ::-1].copy()
    holey = plain.copy()
    holey[0, 1] = 0
    cube = np.repeat(left[:, None], s, 1)
    cube[:, 0, 1] = 0
    return {
        "none": None,
        "lengths": lengths,
        "right": plain,
        "left": left,
        "holes": holey,
        "cube": cube,
        "blind": np.zeros((batch, t), np.int32),
    }[kind]


@pytest.mark.parametrize("kind", ["none", "lengths", "right", "left", "holes", "cube", "blind"])
@pytest.mark.parametrize("causal", [0, 1])
@pytest.mark.parametrize("past", [0, 3])
def test_multi_head_attention(kind: str, causal: int, past: int) -> None:
    s, heads, size = 4, 2, 8
    q, k, v = (random(2, s, heads * size, seed=i) for i in range(3))
    feeds: dict[str, np.ndarray | None] = {"q": q, "k": k, "v": v, "bias": random(3 * heads * size, seed=3)}
    feeds["mask"] = mask(kind, 2, s, s + past)
    feeds["extra"] = random(1, heads, s, s + past, seed=4)
    if past:
        feeds |= {"pk": random(2, heads, past, size, seed=5), "pv": random(2, heads, past, size, seed=6)}
    blind = kind == "blind" or (causal and kind in ("left", "cube"))  # logits near -10000 keep four digits in float32
    tolerance = 2e-3 if blind else 2e-6
    assert_agrees("MultiHeadAttention", feeds, 3, num_heads=heads, unidirectional=causal, tolerance=tolerance)


def test_multi_head_attention_across_lengths_and_packings() -> None:
    heads, size = 2, 8
    q = random(2, 3, heads * size)
    feeds = {"q": q, "k": random(2, 6, heads * size, seed=1), "v": random(2, 6, heads * size, seed=2)}
    assert_agrees("MultiHeadAttention", feeds, num_heads=heads, scale=0.2)
    split = {n: feeds[n].reshape(2, 6, heads, size).transpose(0, 2, 1, 3).copy() for n in "kv"}
    assert_agrees("MultiHeadAttention", {"q": q, **split}, num_heads=heads)


@pytest.mark.parametrize("kind", ["none", "lengths", "right", "left", "cube", "blind"])
@pytest.mark.parametrize("causal", [0, 1])
@pytest.mark.parametrize("past", [0, 3])
def test_packed_attention(kind: str, causal: int, past: int) -> None:
    s, heads, size = 4, 2, 8
    feeds: dict[str, np.ndarray | None] = {
        "x": random(2, s, 12),
        "w": random(12, 3 * heads * size, seed=1),
        "b": random(3 * heads * size, seed=2),
        "mask": mask(kind, 2, s, s + past),
    }
    feeds["past"] = random(2, 2, heads, past, size, seed=3) if past else None
    feeds["extra"] = None if past else random(2, heads, s, s, seed=4)
    tolerance = 2e-3 if kind == "blind" or (causal and kind in ("left", "cube")) else 2e-6
    assert_agrees("Attention", feeds, 2 if past else 1, num_heads=heads, unidirectional=causal, tolerance=tolerance)


@pytest.mark.parametrize("interleaved", [0, 1])
@pytest.mark.parametrize("positions", ["offset", "rows"])
@pytest.mark.parametrize("rank", [3, 4])
@pytest.mark.parametrize("partial", [False, True])
def test_rotary_embedding(interleaved: int, positions: str, rank: int, partial: bool) -> None:
    angles = random(20, 2 if partial else 4, seed=1)
    where = np.array([3], np.int64) if positions == "offset" else np.array([[0, 1, 2, 3, 4], [5, 1, 7, 3, 9]], np.int64)
    x = random(2, 3, 5, 8) if rank == 4 else X
    extra: dict[str, Any] = {"num_heads": 3, "rotary_embedding_dim": 4} if partial else {}
    feeds = {"x": x, "p": where, "cos": np.cos(angles), "sin": np.sin(angles)}
    assert_agrees("RotaryEmbedding", feeds, interleaved=interleaved, **extra)


@pytest.mark.parametrize("past", [0, 3])
@pytest.mark.parametrize("s", [1, 4])
@pytest.mark.parametrize(
    "attributes",
    [
        {},
        {"do_rotary": 1},
        {"do_rotary": 1, "rotary_interleaved": 1},
        {"softcap": 5.0},
        {"local_window_size": 2},
        {"smooth_softmax": 1},
        {"scale": 0.2},
    ],
)
@pytest.mark.parametrize("ragged", [False, True])
def test_group_query_attention(past: int, s: int, attributes: dict[str, Any], ragged: bool) -> None:
    heads, groups, size = 4, 2, 16
    total = past + s
    batch = 1 if past and s > 1 else 2
    lengths = np.array([total, max(total - 2, s if past else 1) if ragged else total])[:batch]
    angles = random(20, size // 2, seed=7)
    rotary = "do_rotary" in attributes
    feeds = {
        "q": random(batch, s, heads * size),
        "k": random(batch, s, groups * size, seed=1),
        "v": random(batch, s, groups * size, seed=2),
        "pk": random(batch, groups, past, size, seed=3),
        "pv": random(batch, groups, past, size, seed=4),
        "last": (lengths - 1).astype(np.int32),
        "total": np.array(total, np.int32),
        "cos": np.cos(angles) if rotary else None,
        "sin": np.sin(angles) if rotary else None,
    }
    if ragged:
        model = single("GroupQueryAttention", feeds, 3, num_heads=heads, kv_num_heads=groups, **attributes)
        given = {n: x for n, x in feeds.items() if x is not None}
        expected = executor()(model).run(given)
        for found in (load(model).run(given) for load in BOTH):
            for b, length in enumerate(lengths):
                used = length if not past else s
                assert relative_error(found["y0"][b, :used], expected["y0"][b, :used]) < 2e-6
                for name in ("y1", "y2"):
                    assert relative_error(found[name][b, :, :length], expected[name][b, :, :length]) < 2e-6
        return
    assert_agrees("GroupQueryAttention", feeds, 3, num_heads=heads, kv_num_heads=groups, **attributes)


@pytest.mark.parametrize("attributes", [{}, {"softcap": 5.0}, {"smooth_softmax": 1}])
def test_group_query_attention_behind_the_end_of_a_prompt(attributes: dict[str, Any]) -> None:
    """Rows of padding see the keys of their own prompt only.

    With a window ONNX Runtime reads memory for them that it never wrote, so nothing can be expected there.
    """
    heads, groups, size, s = 4, 2, 16, 6
    feeds = {
        "q": random(2, s, heads * size),
        "k": random(2, s, groups * size, seed=1),
        "v": random(2, s, groups * size, seed=2),
        "pk": random(2, groups, 0, size, seed=3),
        "pv": random(2, groups, 0, size, seed=4),
        "last": np.array([s - 1, 2], np.int32),
        "total": np.array(s, np.int32),
    }
    assert_agrees("GroupQueryAttention", feeds, 1, num_heads=heads, kv_num_heads=groups, **attributes)


def test_group_query_attention_packed_with_bias_and_positions() -> None:
    heads, groups, size, s = 4, 2, 16, 3
    angles = random(20, size // 2, seed=7)
    feeds = {
        "q": random(1, s, (heads + 2 * groups) * size),
        "k": None,
        "v": None,
        "pk": random(1, groups, 2, size, seed=3),
        "pv": random(1, groups, 2, size, seed=4),
        "last": np.array([4], np.int32),
        "total": np.array(5, np.int32),
        "cos": np.cos(angles),
        "sin": np.sin(angles),
        "positions": np.array([[1, 2, 3]], np.int64),
        "extra": random(1, 1, s, 5, seed=8),
    }
    assert_agrees("GroupQueryAttention", feeds, 3, num_heads=heads, kv_num_heads=groups, do_rotary=1)


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("zeros", ["none", "packed", "floats", "order"])
@pytest.mark.parametrize("width", [64, 40])
def test_a_packed_weight_of_few_bits(bits: int, zeros: str, width: int) -> None:
    if zeros in ("floats", "order") and bits != 4:
        pytest.skip("ONNX Runtime has no such kernel")
    rows, block = 6, 16
    blocks, draw = -(-width // block), np.random.default_rng(0)
    feeds: dict[str, np.ndarray | None] = {
        "a": random(2, 3, width),
        "b": draw.integers(0, 256, (rows, blocks, block * bits // 8)).astype(np.uint8),
        "s": draw.uniform(0.01, 0.1, (rows, blocks)).astype(np.float32),
    }
    if zeros == "packed":
        feeds["z"] = draw.integers(0, 256, (rows, -(-blocks * bits // 8))).astype(np.uint8)
    elif zeros == "order":
        feeds |= {"z": None, "g": draw.integers(0, blocks, width).astype(np.int32)}
    elif zeros == "floats":
        feeds["z"] = draw.uniform(0, 15, (rows, blocks)).astype(np.float32)
    assert_agrees("MatMulNBits", feeds, K=width, N=rows, bits=bits, block_size=block)


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("zeros", [True, False])
@pytest.mark.parametrize("width", [64, 40])
def test_rows_of_a_table_of_few_bits(bits: int, zeros: bool, width: int) -> None:
    rows, block = 7, 32
    blocks, draw = -(-width // block), np.random.default_rng(1)
    feeds: dict[str, np.ndarray | None] = {
        "b": draw.integers(0, 256, (rows, width * bits // 8)).astype(np.uint8),
        "i": np.array([[0, -1, 3], [6, 6, -7]]),
        "s": draw.uniform(0.01, 0.1, (rows, blocks)).astype(np.float32),
    }
    if zeros:
        feeds["z"] = draw.integers(0, 256, (rows, -(-blocks * bits // 8))).astype(np.uint8)
    assert_agrees("GatherBlockQuantized", feeds, bits=bits, block_size=block, gather_axis=0, quantize_axis=1)


@pytest.mark.parametrize("activation", ["relu", "gelu", "silu", "identity"])
@pytest.mark.parametrize("normalized", [0, 1])
def test_experts_in_torch(activation: str, normalized: int) -> None:
    feeds = {
        "x": random(2, 5, 16),
        "router": random(10, 4, seed=1),
        "w1": random(4, 24, 16, seed=2),
        "b1": random(4, 24, seed=3),
        "w2": random(4, 16, 24, seed=4),
        "b2": random(4, 16, seed=5),
    }
    options = {"activation_type": activation, "k": 2, "normalize_routing_weights": normalized}
    model = single("MoE", feeds, 1, **options)
    expected, found = executor()(model).run(feeds), BOTH[1](model).run(feeds)
    assert relative_error(found["y0"], expected["y0"]) < 2e-6
