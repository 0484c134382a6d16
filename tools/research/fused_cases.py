"""Models of one fused region each, with random weights, for measurements on a processor and on a GPU."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import ml_dtypes
import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

Rows = int | str
_BLOCK = 32


def bits(rows: Rows, depth: int, width: int, number: int, dtype: type = np.float32) -> onnx.ModelProto:
    """MatMulNBits of weights of some bits, in blocks of 32, as exporters of language models write it."""
    random = np.random.default_rng(0)
    weight = random.integers(0, 256, (width, depth // _BLOCK, _BLOCK * number // 8), dtype=np.uint8)
    scales: np.ndarray = (random.random(width * depth // _BLOCK) * 0.02 + 0.001).astype(dtype)
    node = helper.make_node(
        "MatMulNBits", ["x", "q", "s"], ["y"], domain="com.microsoft", K=depth, N=width, bits=number, block_size=_BLOCK
    )
    return _model([node], {"q": weight, "s": scales}, rows, depth, width, dtype)


def dequantized(
    rows: Rows, depth: int, width: int, number: int, *, transposed: bool, dtype: type = np.float32
) -> onnx.ModelProto:
    """DequantizeLinear before MatMul, [K, N], or Gemm, [N, K]: 8 bits with a scale a column, 4 bits in blocks of 32."""
    random = np.random.default_rng(0)
    shape = (width, depth) if transposed else (depth, width)
    half = 1 << number - 1
    weight = random.integers(-half, half, shape).astype(np.int8 if number == 8 else ml_dtypes.int4)
    place = int(transposed)  # of the depth
    scaled = [width] if number == 8 else [size // (_BLOCK if at == place else 1) for at, size in enumerate(shape)]
    scales: np.ndarray = (random.random(scaled) * 0.02 + 0.001).astype(dtype)
    options: dict[str, Any] = {"axis": 1 - place} if number == 8 else {"axis": place, "block_size": _BLOCK}
    product = helper.make_node("Gemm", ["x", "w"], ["y"], transB=1) if transposed else None
    nodes = [
        helper.make_node("DequantizeLinear", ["q", "s"], ["w"], **options),
        product or helper.make_node("MatMul", ["x", "w"], ["y"]),
    ]
    return _model(nodes, {"q": weight, "s": scales}, rows, depth, width, dtype)


def plain(rows: Rows, depth: int, width: int, dtype: type = np.float32) -> onnx.ModelProto:
    """The product with a weight that is not quantized."""
    weight = (np.random.default_rng(0).standard_normal((depth, width)) / depth**0.5).astype(dtype)
    return _model([helper.make_node("MatMul", ["x", "w"], ["y"])], {"w": weight}, rows, depth, width, dtype)


def pair(rows: Rows, depth: int, rank: int, width: int, dtype: type = np.float32) -> onnx.ModelProto:
    """A product of low rank: `(x @ a) @ b`."""
    random = np.random.default_rng(0)
    weights = {
        name: (random.standard_normal(shape) / shape[0] ** 0.5).astype(dtype)
        for name, shape in (("a", (depth, rank)), ("b", (rank, width)))
    }
    nodes = [helper.make_node("MatMul", ["x", "a"], ["m"]), helper.make_node("MatMul", ["m", "b"], ["y"])]
    return _model(nodes, weights, rows, depth, width, dtype)


def bag(tokens: Rows, rows: int, picked: int, width: int) -> onnx.ModelProto:
    """The last step of a memory layer with product keys: rows of a table, picked by token, times weights, summed."""
    table = np.random.default_rng(0).standard_normal((rows, width), dtype=np.float32)
    arrays = {"t": table, "last": np.array([-1]), "over": np.array([-2])}
    nodes = [
        helper.make_node("Gather", ["t", "i"], ["g"]),
        helper.make_node("Unsqueeze", ["w", "last"], ["u"]),
        helper.make_node("Mul", ["g", "u"], ["p"]),
        helper.make_node("ReduceSum", ["p", "over"], ["y"], keepdims=0),
    ]
    ends = [("i", TensorProto.INT64, picked), ("w", TensorProto.FLOAT, picked), ("y", TensorProto.FLOAT, width)]
    return _graph(nodes, arrays, [helper.make_tensor_value_info(name, kind, [tokens, n]) for name, kind, n in ends], 2)


def projections(rows: Rows, depth: int, widths: Sequence[int], *, merged: bool) -> onnx.ModelProto:
    """Linear layers with bias that read one value, as query, key and value do; or one layer and a Split."""
    random = np.random.default_rng(0)
    ends = [helper.make_tensor_value_info("x", TensorProto.FLOAT, [rows, depth])]
    outputs = [f"y{place}" for place in range(len(widths))]
    ends += [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, [rows, width])
        for name, width in zip(outputs, widths, strict=True)
    ]
    arrays: dict[str, np.ndarray] = {"sizes": np.array(widths)} if merged else {}
    layers = {"all": sum(widths)} if merged else dict(zip(outputs, widths, strict=True))
    nodes = [helper.make_node("Gemm", ["x", f"w_{name}", f"b_{name}"], [name]) for name in layers]
    for name, width in layers.items():
        arrays[f"w_{name}"] = random.standard_normal((depth, width), dtype=np.float32) / np.float32(depth**0.5)
        arrays[f"b_{name}"] = random.standard_normal(width, dtype=np.float32)
    if merged:
        nodes.append(helper.make_node("Split", ["all", "sizes"], outputs, axis=-1))
    return _graph(nodes, arrays, ends, 1)


def _model(
    nodes: Sequence[onnx.NodeProto], weights: dict[str, np.ndarray], rows: Rows, depth: int, width: int, dtype: type
) -> onnx.ModelProto:
    kind = TensorProto.FLOAT16 if dtype is np.float16 else TensorProto.FLOAT
    ends = [helper.make_tensor_value_info(name, kind, [rows, size]) for name, size in (("x", depth), ("y", width))]
    return _graph(nodes, weights, ends, 1)


def _graph(
    nodes: Sequence[onnx.NodeProto], weights: dict[str, np.ndarray], ends: list[onnx.ValueInfoProto], inputs: int
) -> onnx.ModelProto:
    constants = [numpy_helper.from_array(array, name) for name, array in weights.items()]
    graph = helper.make_graph(nodes, "region", ends[:inputs], ends[inputs:], constants)
    domains = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    return helper.make_model(graph, opset_imports=domains, ir_version=10)
