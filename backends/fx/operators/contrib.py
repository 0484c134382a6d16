"""The operators of ONNX Runtime's own domain `com.microsoft` that fusions write.

Source of the semantics: https://github.com/microsoft/onnxruntime/blob/main/docs/ContribOperators.md, and for what it
leaves open (masks over whole rows, positions of padded prompts) the CPU kernels.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F

from burnish.backends.fx.operators.network import conv, gemm, per_channel, rms_normalization
from burnish.backends.fx.operators.recurrent import activation as named_activation
from burnish.backends.fx.registry import operator
from burnish.backends.fx.values import Tensor, Value, tensors

DOMAIN = "com.microsoft"
Ints = Sequence[int] | None


@operator("Gelu", "BiasGelu", domain=DOMAIN)
def bias_gelu(x: Value, bias: Value = None) -> Tensor:
    """gelu(x + bias)."""
    x, bias = tensors(x, bias)
    return F.gelu(x if bias is None else x + bias)


@operator("FastGelu", domain=DOMAIN)
def fast_gelu(x: Value, bias: Value = None) -> Tensor:
    """The approximation of gelu by tanh, of x + bias."""
    x, bias = tensors(x, bias)
    return F.gelu(x if bias is None else x + bias, approximate="tanh")


@operator("QuickGelu", domain=DOMAIN)
def quick_gelu(x: Tensor, alpha: float = 1.702) -> Tensor:
    """x times the sigmoid of `alpha` x."""
    return x * torch.sigmoid(alpha * x)


def _transposed(x: Tensor, last: int, batch: int) -> Tensor:
    if x.dim() < 2:
        return x
    x = x.movedim(0, -2) if batch else x
    return x.transpose(-1, -2) if last else x


@operator("FusedMatMul", "TransposeMatMul", domain=DOMAIN)
def fused_matmul(
    a: Value, b: Value, alpha: float = 1.0, transA: int = 0, transB: int = 0, transBatchA: int = 0, transBatchB: int = 0
) -> Tensor:
    """`alpha` times the matrix product, with operands transposed on the way."""
    a, b = tensors(a, b)
    y = torch.matmul(_transposed(a, transA, transBatchA), _transposed(b, transB, transBatchB))
    return y if alpha == 1.0 else y * alpha


@operator("FusedGemm", domain=DOMAIN)
def fused_gemm(
    a: Value, b: Value, c: Value = None, alpha: float = 1.0, beta: float = 1.0, transA: int = 0, transB: int = 0,
    activation: str = "", activation_alpha: float | None = None, activation_beta: float | None = None,
    activation_gamma: float | None = None,
) -> Tensor:  # fmt: skip
    """Gemm and an activation."""
    y = gemm(a, b, c, alpha, beta, transA, transB)
    return named_activation(activation, activation_alpha, activation_beta)(y) if activation else y


@operator("FusedConv", domain=DOMAIN)
def fused_conv(
    x: Tensor, w: Tensor, b: Value = None, z: Value = None, strides: Ints = None, dilations: Ints = None,
    pads: Ints = None, group: int = 1, auto_pad: str = "NOTSET", kernel_shape: Ints = None, activation: str = "",
    activation_params: Sequence[float] = (),
) -> Tensor:  # fmt: skip
    """Convolution, a sum and an activation."""
    y = conv(x, w, None, strides, dilations, pads, group, auto_pad, kernel_shape)
    y = y if b is None else y + per_channel(b, y)
    y = y if z is None else y + z
    alpha, beta, *_ = [*activation_params, None, None]
    return named_activation(activation, alpha, beta)(y) if activation else y


@operator("SimplifiedLayerNormalization", domain=DOMAIN, several=True)
def simplified_layer_normalization(
    x: Tensor, scale: Tensor, axis: int = -1, epsilon: float = 1e-5, stash_type: int = 1
) -> tuple[Tensor, Tensor]:
    """RMSNormalization under its older name."""
    y, inverse = rms_normalization(x, scale, axis, epsilon, stash_type)
    return y, inverse


@operator("SkipLayerNormalization", domain=DOMAIN, several=True)
def skip_layer_normalization(
    x: Tensor, skip: Tensor, gamma: Tensor, beta: Value = None, bias: Value = None, epsilon: float = 1e-12
) -> tuple[Tensor | None, ...]:
    """The layer normalization of a sum, and the sum."""
    total = x + skip if bias is None else x + skip + bias
    y = F.layer_norm(total, gamma.shape, gamma, beta, epsilon)
    mean = total.mean(-1, True)
    return y, mean, (total.var(-1, correction=0, keepdim=True) + epsilon).rsqrt(), total


@operator("SkipSimplifiedLayerNormalization", domain=DOMAIN, several=True)
def skip_simplified_layer_normalization(
    x: Tensor, skip: Tensor, gamma: Tensor, bias: Value = None, epsilon: float = 1e-12
) -> tuple[Tensor | None, ...]:
    """The RMS normalization of a sum, and the sum."""
    total = x + skip if bias is None else x + skip + bias
    y, inverse = rms_normalization(total, gamma, -1, epsilon)
    return y, torch.zeros_like(inverse), inverse, total


@operator("MatMulNBits", domain=DOMAIN, fixed=(2, 3))
def matmul_n_bits(
    a: Tensor, b: Tensor, scales: Tensor, zero_points: Value = None, groups: Value = None, bias: Value = None, *,
    K: int, N: int, bits: int = 4, block_size: int, accuracy_level: int = 0,
) -> Tensor:  # fmt: skip
    """a times a weight [N, K] stored in blocks of packed unsigned integers, each with a scale.

    `groups` gives the block of every column where they are not in order.
    """
    blocks = -(-K // block_size)
    weight = unpacked(b.reshape(N, blocks, -1), bits)[..., :block_size].to(a.dtype).reshape(N, -1)[:, :K]
    if zero_points is None:
        offset = a.new_full((N, blocks), float(2 ** (bits - 1)))
    elif zero_points.is_floating_point():
        offset = zero_points.reshape(N, blocks).to(a.dtype)
    else:
        offset = unpacked(zero_points.reshape(N, -1), bits)[:, :blocks].to(a.dtype)
    block = torch.arange(K, device=a.device) // block_size if groups is None else groups.long()
    weight = (weight - offset[:, block]) * scales.reshape(N, blocks).to(a.dtype)[:, block]
    return F.linear(a, weight, bias)


def unpacked(packed: Tensor, bits: int) -> Tensor:
    """Unsigned integers of `bits` bits out of the bytes of the last axis, the lowest bits first."""
    if bits == 8:
        return packed
    shifts = torch.arange(0, 8, bits, device=packed.device, dtype=torch.uint8)
    parts = torch.bitwise_right_shift(packed.unsqueeze(-1), shifts)
    return torch.bitwise_and(parts, 2**bits - 1).flatten(-2)


def _other_axes(attributes: Mapping[str, Any]) -> str | None:
    if attributes.get("gather_axis", 0) != 0 or attributes.get("quantize_axis", 1) not in (1, -1):
        return "only rows of a table that is quantized along its last axis"
    return None


@operator("GatherBlockQuantized", domain=DOMAIN, fixed=(2, 3), refuses=_other_axes)
def gather_block_quantized(
    data: Tensor, indices: Tensor, scales: Tensor, zero_points: Value = None, bits: int = 4, block_size: int = 128,
    gather_axis: int = 0, quantize_axis: int = 1,
) -> Tensor:  # fmt: skip
    """Rows of a table stored in blocks of packed unsigned integers along its last axis, each with a scale."""
    if data.dtype != torch.uint8 or data.dim() != 2:
        raise ValueError("only tables of bytes are supported")
    rows = unpacked(data[indices.long()], bits).to(scales.dtype)
    factors = scales[indices.long()].repeat_interleave(block_size, -1)[..., : rows.shape[-1]]
    offset: Tensor | float = float(2 ** (bits - 1))
    if zero_points is not None:
        zeros = unpacked(zero_points[indices.long()], bits)[..., : scales.shape[-1]]
        offset = zeros.to(scales.dtype).repeat_interleave(block_size, -1)[..., : rows.shape[-1]]
    return (rows - offset) * factors


# ONNX Runtime's "gelu" here is the approximation by tanh.
_EXPERTS = {
    "relu": torch.relu, "gelu": partial(F.gelu, approximate="tanh"), "silu": F.silu, "identity": torch.clone,
}  # fmt: skip


def _unknown_experts(attributes: Mapping[str, Any]) -> str | None:
    activation = attributes.get("activation_type", "relu")
    if activation not in _EXPERTS or attributes.get("use_sparse_mixer"):
        return f"experts with activation {activation} or a sparse mixer"
    return None


@operator("MoE", domain=DOMAIN, refuses=_unknown_experts)
def mixture_of_experts(
    x: Tensor, router: Tensor, first: Tensor, first_bias: Value, second: Tensor, second_bias: Value = None,
    third: Value = None, third_bias: Value = None, activation_type: str = "relu", k: int = 1,
    normalize_routing_weights: int = 0, use_sparse_mixer: int = 0,
) -> Tensor:  # fmt: skip
    """The `k` experts with the largest probability, mixed; expert weights are [experts, out, in]."""
    rows = x.reshape(-1, x.shape[-1])
    weights, chosen = torch.topk(torch.softmax(router, -1), k, -1)
    if normalize_routing_weights:
        weights = weights / weights.sum(-1, True)
    share = torch.zeros_like(router).scatter(-1, chosen, weights)
    act = _EXPERTS[activation_type]
    total = torch.zeros_like(rows)
    for expert in range(first.shape[0]):
        hidden = act(F.linear(rows, first[expert], None if first_bias is None else first_bias[expert]))
        if third is not None:
            hidden = hidden * F.linear(rows, third[expert], None if third_bias is None else third_bias[expert])
        made = F.linear(hidden, second[expert], None if second_bias is None else second_bias[expert])
        total = total + share[:, expert, None] * made
    return total.reshape(x.shape)
