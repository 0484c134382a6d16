"""Graphs written by hand the way tools write them that no test can run: the model builder of onnxruntime-genai
(`src/python/py/models/builders/base.py` of microsoft/onnxruntime-genai) and tf2onnx. Weights are seeded.

The builder's decoders read input_ids [batch, seq], attention_mask [batch, total] and past_key_values.N.key|value
[batch, kv heads, past, head size], and give logits and present.N.key|value. Their residual stream is a pair of values
that each SkipSimplifiedLayerNormalization adds; the sum is its fourth output.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

WIDTH, HEADS, KV_HEADS, HEAD, INNER, LAYERS, VOCABULARY, POSITIONS = 48, 4, 2, 16, 112, 3, 500, 128
EXPERTS, TOP = 4, 2
MICROSOFT = "com.microsoft"

Shape = list[str | int | None]


class Graph:
    """Nodes and seeded weights in the order in which they are asked for."""

    def __init__(self) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.weights: list[onnx.TensorProto] = []
        self._generator = np.random.default_rng(0)

    def op(self, op_type: str, inputs: Sequence[str], outputs: int = 1, domain: str = "", **attributes: Any) -> str:
        """A node, and the name of its first output; the others are `name:1` and so on."""
        name = f"v{len(self.nodes)}"
        names = [name, *(f"{name}:{index}" for index in range(1, outputs))]
        self.nodes.append(helper.make_node(op_type, inputs, names, f"n_{name}", domain=domain, **attributes))
        return name

    def rename(self, old: str, new: str) -> None:
        """Give an output of a node the name that the graph promises."""
        for node in self.nodes:
            node.output[:] = [new if name == old else name for name in node.output]
            node.input[:] = [new if name == old else name for name in node.input]

    def constant(self, value: Any, dtype: Any = np.int64) -> str:
        """An initializer with this value."""
        name = f"w{len(self.weights)}"
        self.weights.append(numpy_helper.from_array(np.asarray(value, dtype), name))
        return name

    def weight(self, *shape: int, mean: float = 0.0, deviation: float | None = None) -> str:
        """A random float32 initializer; the deviation keeps the size of a signal unless it is given."""
        scale = shape[-2] ** -0.5 if deviation is None else deviation
        return self.constant(mean + scale * self._generator.standard_normal(shape), np.float32)

    def linear(self, x: str, before: int, after: int, bias: bool = False) -> str:
        """MatMul, and Add with the bias on the left, as the builder writes it."""
        y = self.op("MatMul", [x, self.weight(before, after)])
        return self.op("Add", [y, self.weight(after, deviation=0.1)]) if bias else y

    def save(self, target: Path, inputs: Sequence[Any], outputs: Sequence[Any], opset: int) -> None:
        graph = helper.make_graph(self.nodes, "main_graph", inputs, outputs, self.weights)
        opsets = [helper.make_opsetid("", opset), helper.make_opsetid(MICROSOFT, 1)]
        onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=10), target)


@dataclass(frozen=True)
class Builder:
    """A decoder as onnxruntime-genai's builder writes it; `window` is the local window of every second layer."""

    packed: bool = False
    norms: bool = False
    window: int | None = None
    experts: bool = False
    separate_rotary: bool = False
    layers: int = LAYERS

    def write(self, target: Path) -> None:
        graph = Graph()
        lengths = self._lengths(graph)
        tables = self._tables(graph)
        root = graph.op("Gather", [graph.weight(VOCABULARY, WIDTH, deviation=0.5), "input_ids"])
        skip = ""
        for layer in range(self.layers):
            normed, root = self._norm(graph, root, skip)
            skip = self._attention(graph, normed, layer, lengths, tables)
            normed, root = self._norm(graph, root, skip)
            skip = self._experts(graph, normed) if self.experts else self._mlp(graph, normed)
        normed, _ = self._norm(graph, root, skip, last=True)
        graph.rename(graph.linear(normed, WIDTH, VOCABULARY), "logits")
        graph.save(target, *self._ports(), 21)

    def _ports(self) -> tuple[list[Any], list[Any]]:
        kv_heads = HEADS if self.separate_rotary else KV_HEADS
        cache: Shape = ["batch_size", kv_heads, "past_sequence_length", HEAD]
        present: Shape = ["batch_size", kv_heads, "total_sequence_length", HEAD]
        sequence: Shape = ["batch_size", "sequence_length"]
        inputs = [
            helper.make_tensor_value_info("input_ids", TensorProto.INT64, sequence),
            helper.make_tensor_value_info("attention_mask", TensorProto.INT64, ["batch_size", "total_sequence_length"]),
        ]
        if self.separate_rotary:
            inputs.append(helper.make_tensor_value_info("position_ids", TensorProto.INT64, sequence))
        outputs = [helper.make_tensor_value_info("logits", TensorProto.FLOAT, [*sequence, VOCABULARY])]
        for layer in range(self.layers):
            for kind in ("key", "value"):
                name = f"past_key_values.{layer}.{kind}"
                inputs.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, cache))
                outputs.append(helper.make_tensor_value_info(f"present.{layer}.{kind}", TensorProto.FLOAT, present))
        return inputs, outputs

    def _lengths(self, graph: Graph) -> list[str]:
        """`seqlens_k` [batch] and `total_sequence_length` [] for GroupQueryAttention, or a bias [batch, 1, seq, total]
        that is -3e4 for what a token does not see."""
        if self.separate_rotary:
            return [_causal_bias(graph)]
        total = graph.op("ReduceSum", ["attention_mask", graph.constant([1])], keepdims=0)
        less = graph.op("Sub", [total, graph.constant([1])])
        length = graph.op("Gather", [graph.op("Shape", ["attention_mask"]), graph.constant(1)], axis=0)
        return [graph.op("Cast", [value], to=TensorProto.INT32) for value in (less, length)]

    def _tables(self, graph: Graph) -> list[str]:
        angles = np.outer(np.arange(POSITIONS), 1e4 ** -(np.arange(0, HEAD, 2) / HEAD))
        return [graph.constant(table(angles), np.float32) for table in (np.cos, np.sin)]

    def _norm(self, graph: Graph, root: str, skip: str, last: bool = False) -> tuple[str, str]:
        """The normed value and the residual stream after `skip` was added."""
        weight = graph.weight(WIDTH, mean=1.0, deviation=0.1)
        if not skip:
            y = graph.op("SimplifiedLayerNormalization", [root, weight], axis=-1, epsilon=1e-6, stash_type=1)
            return y, root
        y = graph.op("SkipSimplifiedLayerNormalization", [root, skip, weight], domain=MICROSOFT, epsilon=1e-6)
        if not last:
            graph.nodes[-1].output.extend(["", "", f"{y}:3"])
        return y, f"{y}:3"

    def _attention(self, graph: Graph, x: str, layer: int, lengths: list[str], tables: list[str]) -> str:
        past = [f"past_key_values.{layer}.{kind}" for kind in ("key", "value")]
        wide, narrow = HEADS * HEAD, (HEADS if self.separate_rotary else KV_HEADS) * HEAD
        if self.packed:
            query, key, value = graph.linear(x, WIDTH, wide + 2 * narrow, bias=True), "", ""
        else:
            query, key, value = (graph.linear(x, WIDTH, size) for size in (wide, narrow, narrow))
        if self.norms:
            query, key = self._head_norm(graph, query, wide), self._head_norm(graph, key, narrow)
        if self.separate_rotary:
            query, key = (
                graph.op("RotaryEmbedding", [t, "position_ids", *tables], domain=MICROSOFT, interleaved=0, num_heads=0)
                for t in (query, key)
            )
            inputs = [query, key, value, "", "", lengths[0], *past]
            y = graph.op("MultiHeadAttention", inputs, 3, MICROSOFT, num_heads=HEADS, scale=HEAD**-0.5)
        else:
            y = graph.op(
                "GroupQueryAttention",
                [query, key, value, *past, *lengths, *tables],
                3,
                MICROSOFT,
                num_heads=HEADS,
                kv_num_heads=KV_HEADS,
                scale=HEAD**-0.5,
                local_window_size=self.window if self.window and layer % 2 == 0 else -1,
                softcap=0.0,
                do_rotary=1,
                rotary_interleaved=0,
            )
        for index, kind in enumerate(("key", "value"), 1):
            graph.rename(f"{y}:{index}", f"present.{layer}.{kind}")
        return graph.linear(y, wide, WIDTH)

    def _head_norm(self, graph: Graph, x: str, width: int) -> str:
        weight = graph.weight(HEAD, mean=1.0, deviation=0.1)
        y = graph.op("Reshape", [x, graph.constant([0, -1, HEAD])])
        y = graph.op("SimplifiedLayerNormalization", [y, weight], axis=-1, epsilon=1e-6, stash_type=1)
        return graph.op("Reshape", [y, graph.constant([0, -1, width])])

    def _mlp(self, graph: Graph, x: str) -> str:
        gate, up = graph.linear(x, WIDTH, INNER), graph.linear(x, WIDTH, INNER)
        gate = graph.op("Mul", [gate, graph.op("Sigmoid", [gate])])
        return graph.linear(graph.op("Mul", [gate, up]), INNER, WIDTH)

    def _experts(self, graph: Graph, x: str) -> str:
        router = graph.linear(x, WIDTH, EXPERTS)
        router = graph.op("Reshape", [router, graph.constant([-1, EXPERTS])])
        first = graph.weight(EXPERTS, INNER, WIDTH, deviation=WIDTH**-0.5)
        second = graph.weight(EXPERTS, WIDTH, INNER, deviation=INNER**-0.5)
        return graph.op(
            "MoE",
            [x, router, first, "", second],
            domain=MICROSOFT,
            k=TOP,
            activation_type="silu",
            normalize_routing_weights=1,
        )


def _causal_bias(graph: Graph) -> str:
    """[batch, 1, seq, total]: 0 where a token sees a key (no later one, mask 1), else -3e4."""
    sizes = [("attention_mask", 1), ("input_ids", 1), ("past_key_values.0.key", 2)]
    total, new, past = (graph.op("Gather", [graph.op("Shape", [x]), graph.constant(i)], axis=0) for x, i in sizes)
    zero, one = graph.constant(0), graph.constant(1)
    keys = graph.op("Range", [zero, total, one])
    queries = graph.op("Unsqueeze", [graph.op("Range", [zero, new, one]), graph.constant([1])])
    seen = graph.op("LessOrEqual", [keys, graph.op("Add", [queries, past])])
    kept = graph.op("Cast", [graph.op("Unsqueeze", ["attention_mask", graph.constant([1, 2])])], to=TensorProto.BOOL)
    seen = graph.op("And", [seen, kept])
    return graph.op("Where", [seen, graph.constant(0.0, np.float32), graph.constant(-3e4, np.float32)])


def tf_bert(target: Path) -> None:
    """BERT of TensorFlow as tf2onnx writes it: dense layers on [tokens, width], norms as the arithmetic of
    tf.nn.batch_normalization, GELU with tanh, heads split by Reshape to four axes and Transpose."""
    graph = Graph()
    hidden = graph.op("Gather", [graph.weight(VOCABULARY, WIDTH, deviation=0.5), "input_ids"])
    hidden = graph.op("Add", [hidden, graph.weight(1, 8, WIDTH, deviation=0.5)])
    x = _tf_norm(graph, graph.op("Reshape", [hidden, graph.constant([-1, WIDTH])]))
    mask = graph.op("Cast", [graph.op("Unsqueeze", ["input_mask", graph.constant([1, 2])])], to=TensorProto.FLOAT)
    mask = graph.op("Sub", [graph.constant(1.0, np.float32), mask])
    mask = graph.op("Mul", [mask, graph.constant(-10000.0, np.float32)])
    for _ in range(LAYERS):
        x = _tf_norm(graph, graph.op("Add", [_tf_attention(graph, x, mask), x]))
        x = _tf_norm(graph, graph.op("Add", [_tf_mlp(graph, x), x]))
    result = graph.op("Reshape", [x, graph.constant([-1, 8, WIDTH])])
    graph.rename(result, "sequence_output")
    inputs = [
        helper.make_tensor_value_info(name, TensorProto.INT64, ["batch", 8]) for name in ("input_ids", "input_mask")
    ]
    outputs = [helper.make_tensor_value_info("sequence_output", TensorProto.FLOAT, ["batch", 8, WIDTH])]
    graph.save(target, inputs, outputs, 15)


def _tf_attention(graph: Graph, x: str, mask: str) -> str:
    size = WIDTH // HEADS
    shape = graph.constant([-1, 8, HEADS, size])
    query, key, value = (graph.op("Reshape", [graph.linear(x, WIDTH, WIDTH, bias=True), shape]) for _ in range(3))
    query = graph.op("Transpose", [query], perm=[0, 2, 1, 3])
    key = graph.op("Transpose", [key], perm=[0, 2, 3, 1])
    value = graph.op("Transpose", [value], perm=[0, 2, 1, 3])
    scores = graph.op("Mul", [graph.op("MatMul", [query, key]), graph.constant(size**-0.5, np.float32)])
    weights = graph.op("Softmax", [graph.op("Add", [scores, mask])], axis=-1)
    y = graph.op("Transpose", [graph.op("MatMul", [weights, value])], perm=[0, 2, 1, 3])
    return graph.linear(graph.op("Reshape", [y, graph.constant([-1, WIDTH])]), WIDTH, WIDTH, bias=True)


def _tf_mlp(graph: Graph, x: str) -> str:
    x = graph.linear(x, WIDTH, INNER, bias=True)
    cube = graph.op("Pow", [x, graph.constant(3.0, np.float32)])
    cube = graph.op("Mul", [cube, graph.constant(0.044715, np.float32)])
    inner = graph.op("Mul", [graph.op("Add", [x, cube]), graph.constant(0.7978845834732056, np.float32)])
    gate = graph.op("Add", [graph.op("Tanh", [inner]), graph.constant(1.0, np.float32)])
    half = graph.op("Mul", [gate, graph.constant(0.5, np.float32)])
    return graph.linear(graph.op("Mul", [x, half]), INNER, WIDTH, bias=True)


def _tf_norm(graph: Graph, x: str) -> str:
    mean = graph.op("ReduceMean", [x], axes=[-1], keepdims=1)
    centred = graph.op("Sub", [x, mean])
    variance = graph.op("ReduceMean", [graph.op("Mul", [centred, centred])], axes=[-1], keepdims=1)
    shifted = graph.op("Add", [variance, graph.constant(1e-12, np.float32)])
    rate = graph.op("Reciprocal", [graph.op("Sqrt", [shifted])])
    scale = graph.op("Mul", [rate, graph.weight(WIDTH, mean=1.0, deviation=0.1)])
    offset = graph.op("Sub", [graph.weight(WIDTH, deviation=0.1), graph.op("Mul", [mean, scale])])
    return graph.op("Add", [graph.op("Mul", [x, scale]), offset])


def example(name: str) -> dict[str, NDArray[Any]]:
    """Inputs for a graph of `WRITERS`: 8 tokens; the decoders continue from 5 cached ones (GroupQueryAttention then
    takes one sequence only)."""
    generator = np.random.default_rng(1)
    ids = generator.integers(3, VOCABULARY, (1, 8))
    if name == "tf-bert":
        return {"input_ids": ids, "input_mask": np.ones((1, 8), np.int64)}
    builder = BUILDERS[name]
    feeds: dict[str, NDArray[Any]] = {"input_ids": ids, "attention_mask": np.ones((1, 13), np.int64)}
    if builder.separate_rotary:
        feeds["position_ids"] = np.arange(5, 13)[None]
    kv_heads = HEADS if builder.separate_rotary else KV_HEADS
    for layer in range(builder.layers):
        for kind in ("key", "value"):
            past = generator.standard_normal((1, kv_heads, 5, HEAD)).astype(np.float32)
            feeds[f"past_key_values.{layer}.{kind}"] = past
    return feeds


BUILDERS = {
    "genai-llama": Builder(),
    "genai-window": Builder(packed=True, window=6, layers=4),
    "genai-qwen": Builder(norms=True),
    "genai-mha": Builder(separate_rotary=True),
    "genai-moe": Builder(experts=True),
}
WRITERS = {**{name: builder.write for name, builder in BUILDERS.items()}, "tf-bert": tf_bert}
