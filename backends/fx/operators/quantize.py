"""Quantization: exact integers forwards, straight-through gradients for fake quantization."""

from __future__ import annotations

import torch

from burnish.backends.fx.registry import operator
from burnish.backends.fx.values import DTYPES, Tensor, Value, tensors


def spread(x: Tensor, like: Tensor, axis: int, block: int = 0) -> Tensor:
    """A scale or zero point broadcast against `like`: one for all, one a slice of `axis`, or one a block."""
    if x.numel() == 1 and x.dim() <= 1:
        return x.reshape(())
    if block and x.dim() == like.dim():
        return x.repeat_interleave(block, axis).narrow(axis, 0, like.shape[axis])
    return x.reshape([-1 if i == axis % like.dim() else 1 for i in range(like.dim())])


class _Nearest(torch.autograd.Function):
    """Rounding half to even, with the gradient of the identity."""

    @staticmethod
    def forward(context: object, x: Tensor) -> Tensor:
        return torch.round(x)

    @staticmethod
    def backward(context: object, gradient: Tensor) -> Tensor:
        return gradient


def nearest(x: Tensor) -> Tensor:
    """Rounded half to even; gradients pass straight through."""
    return _Nearest.apply(x)


_REAL = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


@operator("QuantizeLinear", fixed=(1, 2))
@operator("QuantizeLinear", domain="com.microsoft", fixed=(1, 2))
def quantize_linear(
    x: Tensor, scale: Tensor, zero: Value = None, axis: int = 1, block_size: int = 0, output_dtype: int = 0,
    precision: int = 0, saturate: int = 1, *, straight_through: bool = False,
) -> Tensor:  # fmt: skip
    """x / scale rounded half to even, plus the zero point, saturated.

    With `straight_through` the integers stay in a float tensor through which gradients pass.
    """
    kind = DTYPES[output_dtype] if output_dtype else torch.uint8 if zero is None else zero.dtype
    if kind.is_floating_point:
        raise ValueError(f"quantization to {kind} is not expressed in torch")
    limits = torch.iinfo(kind)
    scale = spread(scale.to(x.device), x, axis, block_size)
    offset = 0.0 if zero is None else spread(zero.to(x.device), x, axis, block_size).to(scale.dtype)
    # Clamped once before rounding, which keeps infinities out of it, and once after the zero point is added.
    room = torch.clamp(x.to(scale.dtype) / scale, limits.min - limits.max - 2.0, 2.0 * limits.max + 2.0)
    y = torch.clamp(nearest(room) + offset, limits.min, limits.max)
    return y if straight_through else y.to(kind)


@operator("DequantizeLinear", fixed=(1, 2))
@operator("DequantizeLinear", domain="com.microsoft", fixed=(1, 2))
def dequantize_linear(
    x: Tensor, scale: Tensor, zero: Value = None, axis: int = 1, block_size: int = 0, output_dtype: int = 0
) -> Tensor:
    """(x - zero point) * scale."""
    x, scale = x, scale.to(x.device)
    kind = DTYPES[output_dtype] if output_dtype else scale.dtype
    y = x.to(torch.float32) if x.dtype not in _REAL else x
    if zero is not None:
        y = y - spread(zero.to(x.device).to(torch.float32), x, axis, block_size)
    return (y * spread(scale, x, axis, block_size).to(y.dtype)).to(kind)


@operator("DynamicQuantizeLinear", several=True)
def dynamic_quantize_linear(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """x as uint8 in its own range, the scale and the zero point."""
    zero = x.new_zeros(())
    low, high = torch.minimum(x.amin(), zero), torch.maximum(x.amax(), zero)
    scale = (high - low) / 255.0
    scale = torch.where(scale == 0, torch.ones_like(scale), scale)
    offset = torch.round(torch.clamp(-low / scale, 0, 255))
    y = torch.clamp(torch.round(x / scale) + offset, 0, 255)
    return y.to(torch.uint8), scale, offset.to(torch.uint8)


def _centred(x: Tensor, zero: Value, rows: bool) -> Tensor:
    """Integers less their zero point, exact in float64."""
    y = x.to(torch.float64)
    if zero is None:
        return y
    offset = zero.to(torch.float64)
    return y - (offset.unsqueeze(-1) if rows and offset.dim() == 1 and offset.numel() > 1 else offset)


@operator("MatMulInteger", fixed=(2, 3))
def matmul_integer(a: Tensor, b: Tensor, a_zero: Value = None, b_zero: Value = None) -> Tensor:
    """The product of integer matrices less their zero points, int32."""
    return torch.matmul(_centred(a, a_zero, True), _centred(b, b_zero, False)).to(torch.int32)


@operator("QLinearMatMul", fixed=(1, 2, 4, 5, 6, 7))
def qlinear_matmul(
    a: Tensor, a_scale: Tensor, a_zero: Tensor, b: Tensor, b_scale: Tensor, b_zero: Tensor, scale: Tensor, zero: Tensor
) -> Tensor:
    """The product of quantized matrices, quantized again."""
    total = torch.matmul(_centred(a, a_zero, True), _centred(b, b_zero, False))
    factor = a_scale.unsqueeze(-1) if a_scale.dim() == 1 and a_scale.numel() > 1 else a_scale
    limits = torch.iinfo(zero.dtype)
    y = torch.round((total * factor * b_scale / scale).to(torch.float32)) + zero.to(torch.float32)
    return torch.clamp(y, limits.min, limits.max).to(zero.dtype)


@operator("BiasAdd", domain="com.microsoft")
def bias_add(x: Value, bias: Value, skip: Value) -> Tensor:
    """x + bias + skip."""
    x, bias, skip = tensors(x, bias, skip)
    return x + bias + skip
