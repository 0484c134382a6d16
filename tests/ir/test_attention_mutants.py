"""Attention layers with something changed at random: whatever is still read as attention is attention as it is read.

A layer that was misread would not survive its heads being written in another order, or its scale as twice the queries.
"""

from __future__ import annotations

import copy
from dataclasses import replace

import numpy as np
import onnx
import onnx_ir as oir
import onnxruntime as ort
import pytest
from attention_laws import normal, permuted
from attention_modules import LAYERS, export

from burnish.ir.views.attention_layer import AttentionLayer, attention_layers

Feeds = dict[str, np.ndarray]
REFUSALS = ("share rows", "counts for something else", "adds one number to all elements")
"""Why a layer that was read may not be written."""


def run(model: oir.Model, feeds: Feeds) -> np.ndarray:
    options = ort.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 4
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    data = oir.to_proto(model).SerializeToString()
    session = ort.InferenceSession(data, options, providers=["CPUExecutionProvider"])
    return np.asarray(session.run(None, feeds)[0])


def mutate(graph: onnx.GraphProto, random: np.random.Generator) -> str:
    """Change one thing in place; what was changed, empty for nothing."""
    node = graph.node[random.integers(len(graph.node))]
    kind = random.choice(["order", "numbers", "axis", "inputs", "outputs", "source", "operator"])
    if kind == "order":
        for attribute in node.attribute:
            if attribute.name == "perm":
                attribute.ints[:] = random.permutation(attribute.ints).tolist()
    elif kind == "numbers":
        tensors = [one for one in graph.initializer if one.data_type == onnx.TensorProto.INT64 and one.dims != [0]]
        if not tensors:
            return ""
        tensor = tensors[random.integers(len(tensors))]
        array = onnx.numpy_helper.to_array(tensor).copy()
        flat = array.reshape(-1)
        flat[random.integers(flat.size)] += random.integers(-2, 3)
        flat[:] = random.permutation(flat) if random.random() < 0.5 else flat
        tensor.CopyFrom(onnx.numpy_helper.from_array(array, tensor.name))
    elif kind == "axis":
        for attribute in node.attribute:
            if attribute.name == "axis":
                attribute.i = int(random.integers(-4, 4))
    elif kind == "inputs" and len(node.input) > 1:
        node.input[:] = random.permutation(list(node.input)).tolist()
    elif kind == "outputs" and len(node.output) > 1:
        node.output[:] = random.permutation(list(node.output)).tolist()
    elif kind == "source" and node.input:
        made = [out for one in graph.node for out in one.output]
        node.input[random.integers(len(node.input))] = made[random.integers(len(made))]
    elif kind == "operator":
        others = {"Mul": "Add", "Add": "Mul", "Div": "Mul", "Sub": "Add", "LessOrEqual": "Less", "Greater": "Less"}
        node.op_type = others.get(node.op_type, node.op_type)
    return f"{kind} of {node.op_type} {node.name}"


def mutants(count: int, seed: int) -> list[tuple[str, oir.Model, Feeds, np.ndarray]]:
    """Models that run, each with the layer it comes from and what was changed, its inputs and its output."""
    random = np.random.default_rng(seed)
    names = [name for name in LAYERS if name != "windows"]
    exported = {name: export(name) for name in names}
    found: list[tuple[str, oir.Model, Feeds, np.ndarray]] = []
    while len(found) < count:
        name = names[random.integers(len(names))]
        proto, feeds, _ = exported[name]
        proto = copy.deepcopy(proto)
        changes = [mutate(proto.graph, random) for _ in range(random.integers(1, 3))]
        del proto.graph.value_info[:]
        for output in proto.graph.output:
            output.type.tensor_type.ClearField("shape")
        try:
            model = oir.from_proto(proto)
            model.graph.sort()
            result = run(model, feeds)
        except Exception:  # noqa: S112  a model that is none any more is of no interest
            continue
        if np.isfinite(result).all():
            found.append((f"{name}: {' and '.join(changes)}", model, feeds, result))
    return found


def headed(layer: AttentionLayer) -> bool:
    """Whether a mask may differ by head."""
    values = [value for mask in layer.mask for value in (*mask.values, mask.keep) if value is not None]
    return any(value.shape is None or (len(value.shape) > 2 and value.shape[-3] != 1) for value in values)


def check(label: str, model: oir.Model, feeds: Feeds, expected: np.ndarray) -> int:
    """The laws of the layer, if the model has one; how many layers were checked."""
    layers = [one for one in attention_layers(model) if isinstance(one, AttentionLayer)]
    if not layers or layers[0].shared:
        return 0
    layer, allowed = layers[0], 1e-3 * (1 + np.abs(expected).max())
    read, twin = layer.read(), model.clone()
    free = layer.rotary is None and layer.query_norm is None and layer.key_norm is None
    (other,) = (one for one in attention_layers(twin) if isinstance(one, AttentionLayer))
    try:
        other.write(twin, permuted(read, layer.kv_heads, elements=free))
    except ValueError as error:
        assert any(reason in str(error) for reason in REFUSALS)
        return 0
    if not headed(layer):
        assert np.abs(run(twin, feeds) - expected).max() < allowed, label
    if layer.query_norm is None and layer.scales:
        scaled, queried = model.clone(), model.clone()
        first, second = (
            next(one for one in attention_layers(each) if isinstance(one, AttentionLayer)) for each in (scaled, queried)
        )
        bias = None if read.query_bias is None else 2 * read.query_bias
        try:
            first.write_scale(scaled, 2 * layer.scale)
            second.write(queried, replace(read, query=2 * read.query, query_bias=bias))
        except ValueError as error:
            assert any(reason in str(error) for reason in REFUSALS)
            return 1
        assert np.abs(run(scaled, feeds) - run(queried, feeds)).max() < allowed, label
    return 1


@pytest.mark.parametrize(
    ("count", "seed"), [(60, 0), *(pytest.param(400, seed, marks=pytest.mark.slow) for seed in range(1, 6))]
)
def test_what_is_read_of_a_changed_layer_is_so(count: int, seed: int) -> None:
    checked = 0
    for label, model, feeds, result in mutants(count, seed):
        checked += check(label, normal(model), feeds, result)
    assert checked > count // 4
