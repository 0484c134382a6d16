"""Operators of the domain ai.onnx.ml that are tensor arithmetic."""

from __future__ import annotations

from burnish.backends.fx.registry import operator
from burnish.backends.fx.values import Tensor, Value, on_device, tensor


@operator("ArrayFeatureExtractor", domain="ai.onnx.ml")
def array_feature_extractor(x: Value, indices: Value) -> Tensor:
    """Elements of the last axis, as a matrix at least."""
    x = tensor(x)
    y = x.index_select(-1, on_device(tensor(indices), x).reshape(-1))
    return y.reshape(1, -1) if y.dim() == 1 else y


@operator("Binarizer", domain="ai.onnx.ml")
def binarizer(x: Value, threshold: float = 0.0) -> Tensor:
    """1 above the threshold, else 0."""
    x = tensor(x)
    return (x > threshold).to(x.dtype)
