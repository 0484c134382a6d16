"""Rounding that can be trained: integers forwards, and backwards the gradients of what is rounded and of its scale.

Gradients pass rounding as if it were not there (the straight-through estimator, Bengio et al. 2013, arXiv:1308.3432).
With w a number, s its scale and n = round(w / s) + zero point its integer, what is computed is (n - zero point) s. Its
gradient by w is 1 where n is in the range and 0 where it is cut off; by s it is round(w / s) - w / s in the range, and
the distance of the range's end from the zero point beyond it (learned step size quantization, Esser et al. 2020,
arXiv:1902.08153).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx

from burnish.backends.fx import registry
from burnish.backends.fx.operators.network import Ints, conv
from burnish.backends.fx.operators.quantize import columns, nearest, spread
from burnish.backends.fx.values import Tensor, Value


def levels(weight: Tensor, scale: Tensor, zero: Tensor, low: int, high: int, axis: int, block: int) -> Tensor:
    """The integers for a weight, in its dtype.

    Args:
        weight: any shape.
        scale: one for all, one for each index of `axis`, or shaped like the weight with one for each block along it.
        zero: zero points, shaped like the scale.
        low, high: the least and the largest integer.
        axis: of the scales.
        block: how many neighbours along `axis` share a scale; 0 for no blocks.
    """
    found = torch.round(weight / spread(scale, weight, axis, block))
    return found.add_(spread(zero, weight, axis, block)).clamp_(low, high)


class _Rounded(torch.autograd.Function):
    """What integers stand for; it keeps nothing of the size of the weight but the weight."""

    @staticmethod
    def forward(
        context: Any, weight: Tensor, scale: Tensor, zero: Tensor, low: int, high: int, axis: int, block: int
    ) -> Tensor:
        context.save_for_backward(weight, scale, zero)
        context.grid = low, high, axis, block
        found = levels(weight, scale, zero, low, high, axis, block)
        return found.sub_(spread(zero, weight, axis, block)).mul_(spread(scale, weight, axis, block))

    @staticmethod
    def backward(context: Any, gradient: Tensor) -> Any:
        weight, scale, zero = context.saved_tensors
        low, high, axis, block = context.grid
        offset = spread(zero, weight, axis, block)
        exact = weight / spread(scale, weight, axis, block)
        found = torch.round(exact)
        inside = ((found + offset >= low) & (found + offset <= high)).to(gradient.dtype)
        by_weight = gradient * inside if context.needs_input_grad[0] else None
        by_scale = None
        if context.needs_input_grad[1]:
            cut = (found + offset).clamp_(low, high) - offset
            by_scale = gathered(gradient * (cut - exact * inside), scale, axis, block)
        return by_weight, by_scale, None, None, None, None, None


def rounded(weight: Tensor, scale: Tensor, zero: Tensor, low: int, high: int, axis: int, block: int) -> Tensor:
    """The numbers that the integers of `levels` stand for, with gradients for the weight and for the scale."""
    made: Tensor = _Rounded.apply(weight, scale.reshape(zero.shape), zero, low, high, axis, block)
    return made


def gathered(values: Tensor, like: Tensor, axis: int, block: int) -> Tensor:
    """The sum of the values that share a scale, for each of the scales `like`: what `spread` is the transpose of."""
    if like.numel() == 1 and like.dim() <= 1:
        return values.sum().reshape(like.shape)
    axis %= values.dim()
    if block and like.dim() == values.dim():
        moved = values.movedim(axis, -1)
        filled = F.pad(moved, (0, like.shape[axis] * block - moved.shape[-1]))
        return filled.unflatten(-1, (-1, block)).sum(-1).movedim(-1, axis)
    return values.movedim(axis, 0).flatten(1).sum(1).reshape(like.shape) if values.dim() > 1 else values


def stepped(scale: Tensor, change: Tensor) -> Tensor:
    """A scale times the exponential of what was learned, so that one learning rate suits scales of every size."""
    return scale * torch.exp(change)


def in_steps(numbers: Tensor, scale: Tensor, axis: int) -> Tensor:
    """Numbers divided by their scale, one for all or one for each index of an axis."""
    return numbers / spread(scale.reshape(-1) if scale.numel() > 1 else scale.reshape(()), numbers, axis)


def same(numbers: Tensor) -> Tensor:
    """The numbers."""
    return numbers


def product(a: Tensor, weight: Tensor, bias: Value = None) -> Tensor:
    """a Wᵀ and a bias, for a weight [out, in]."""
    return F.linear(a, weight, bias)


def looked_up(indices: Tensor, table: Tensor) -> Tensor:
    """Rows of a table."""
    return F.embedding(indices.long(), table)


def dynamic_quantize(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """As DynamicQuantizeLinear, with integers that are floating-point numbers, through which gradients pass.

    The scale and the zero point count as constants: the numbers that they come from get no gradient for that.
    """
    fixed, zero = x.detach(), x.new_zeros(())
    low, high = torch.minimum(fixed.amin(), zero), torch.maximum(fixed.amax(), zero)
    scale = (high - low) / 255.0
    scale = torch.where(scale == 0, torch.ones_like(scale), scale)
    offset = torch.round(torch.clamp(-low / scale, 0, 255))
    return torch.clamp(nearest(x / scale) + offset, 0, 255), scale, offset


def _centred(x: Tensor, zero: Value) -> Tensor:
    return x.float() if zero is None else x.float() - zero.float()


def matmul_integer(a: Tensor, b: Tensor, a_zero: Value = None, b_zero: Value = None) -> Tensor:
    """As MatMulInteger, in floating point, through which gradients pass."""
    rows = a_zero.unsqueeze(-1) if a_zero is not None and a_zero.dim() == 1 and a_zero.numel() > 1 else a_zero
    return torch.matmul(_centred(a, rows), _centred(b, b_zero))


def conv_integer(
    x: Tensor, w: Tensor, x_zero: Value = None, w_zero: Value = None, strides: Ints = None, dilations: Ints = None,
    pads: Ints = None, group: int = 1, auto_pad: str = "NOTSET", kernel_shape: Ints = None,
) -> Tensor:  # fmt: skip
    """As ConvInteger, in floating point, through which gradients pass."""
    right = _centred(w, None if w_zero is None else columns(w_zero, w))
    return conv(_centred(x, x_zero), right, None, strides, dilations, pads, group, auto_pad, kernel_shape)


def _larger(x: Tensor, y: Tensor) -> Tensor:
    return torch.where(x >= y, x, y)


def _smaller(x: Tensor, y: Tensor) -> Tensor:
    return torch.where(x <= y, x, y)


_SMOOTH: Mapping[str, Callable[..., Tensor]] = {"Round": nearest, "Max": _larger, "Min": _smaller}


def through_rounding(module: fx.GraphModule, version: int) -> None:
    """Let gradients pass straight through rounding that is written out in a graph, as `simulated.TokenRounding` does.

    `Round` has no gradient of its own. Of `Max` and `Min` of two tensors, the gradient between equal numbers is the
    first's alone: torch halves it, and would send half of that of all numbers at an end of a grid to the range of their
    row.

    Args:
        module: of a graph; its nodes change, it is to be recompiled.
        version: of its operators.
    """
    found = {entry.function: _SMOOTH[name] for name in _SMOOTH if (entry := registry.find("", name, version))}
    for node in module.graph.nodes:
        node.target = found.get(node.target, node.target)
