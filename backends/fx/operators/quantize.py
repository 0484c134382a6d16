"""Quantization: exact integers forwards, straight-through gradients for fake quantization."""

from __future__ import annotations

import torch

from burnish.backends.fx.operators.casts import LIMITS, to_dtype
from burnish.backends.fx.operators.network import Ints, conv, per_channel
from burnish.backends.fx.registry import operator
from burnish.backends.fx.values import DTYPES, HELD, Tensor, Value, held, tensors


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
    precision: int = 0, saturate: int = 1, *, straight_through: bool = False, result: int = 0,
) -> Tensor:  # fmt: skip
    """x / scale rounded half to even, plus the zero point, saturated.

    With `straight_through` the quantized numbers stay in a float tensor through which gradients pass.
    """
    code = output_dtype or (result if result in HELD else 0)
    kind = held(code) if code else torch.uint8 if zero is None else zero.dtype
    if kind.is_floating_point:
        y = x / spread(scale.to(x.device), x, axis, block_size)
        code = code or next(number for number, dtype in DTYPES.items() if dtype == kind)
        rounded = to_dtype(y.detach(), code, saturate)
        return y + (rounded.to(y.dtype) - y).detach() if straight_through else rounded
    low, high = LIMITS[code] if code in LIMITS else (torch.iinfo(kind).min, torch.iinfo(kind).max)
    scale = spread(scale.to(x.device), x, axis, block_size)
    offset = 0.0 if zero is None else spread(zero.to(x.device), x, axis, block_size).to(scale.dtype)
    # Clamped once before rounding, which keeps infinities out of it, and once after the zero point is added.
    room = torch.clamp(x.to(scale.dtype) / scale, low - high - 2.0, 2.0 * high + 2.0)
    y = torch.clamp(nearest(room) + offset, low, high)
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


def columns(vector: Tensor, like: Tensor) -> Tensor:
    """One number, or one an output channel of the weight `like` [M, ...], shaped to broadcast along its first axis."""
    return vector.reshape(-1, *[1] * (like.dim() - 1)) if vector.numel() > 1 else vector.reshape(())


@operator("ConvInteger", fixed=(2, 3))
def conv_integer(
    x: Tensor, w: Tensor, x_zero: Value = None, w_zero: Value = None, strides: Ints = None, dilations: Ints = None,
    pads: Ints = None, group: int = 1, auto_pad: str = "NOTSET", kernel_shape: Ints = None,
) -> Tensor:  # fmt: skip
    """The convolution of integers less their zero points, int32."""
    left = x.double() if x_zero is None else x.double() - x_zero.double()
    right = w.double() if w_zero is None else w.double() - columns(w_zero.double(), w)
    return conv(left, right, None, strides, dilations, pads, group, auto_pad, kernel_shape).to(torch.int32)


@operator("QLinearConv", fixed=(1, 2, 4, 5, 6, 7, 8))
def qlinear_conv(
    x: Tensor, x_scale: Tensor, x_zero: Tensor, w: Tensor, w_scale: Tensor, w_zero: Tensor, scale: Tensor,
    zero: Tensor, b: Value = None, strides: Ints = None, dilations: Ints = None, pads: Ints = None, group: int = 1,
    auto_pad: str = "NOTSET", kernel_shape: Ints = None,
) -> Tensor:  # fmt: skip
    """The convolution of quantized tensors, quantized again; the bias is in steps of `x_scale` `w_scale`."""
    right = w.double() - columns(w_zero.double(), w)
    bias = None if b is None else b.double()
    total = conv(x.double() - x_zero.double(), right, bias, strides, dilations, pads, group, auto_pad, kernel_shape)
    factor = x_scale * w_scale / scale
    factor = per_channel(factor, total) if factor.numel() > 1 else factor.reshape(())
    limits = torch.iinfo(zero.dtype)
    y = torch.round((total * factor).to(torch.float32)) + zero.to(torch.float32)
    return torch.clamp(y, limits.min, limits.max).to(zero.dtype)


@operator("BiasAdd", domain="com.microsoft")
def bias_add(x: Value, bias: Value, skip: Value) -> Tensor:
    """x + bias + skip."""
    x, bias, skip = tensors(x, bias, skip)
    return x + bias + skip
