"""Pooling by norms, and what undoes pooling and unfolding."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F

from burnish.backends.fx.operators.network import Ints, overhang, padded, spatial_pads, windows
from burnish.backends.fx.registry import operator
from burnish.backends.fx.values import Tensor, Value, integers, on_device, tensor


@operator("LpPool")
def lp_pool(
    x: Tensor, kernel_shape: Sequence[int], strides: Ints = None, pads: Ints = None, dilations: Ints = None,
    ceil_mode: int = 0, auto_pad: str = "NOTSET", p: float = 2,
) -> Tensor:  # fmt: skip
    """The p-norm of every window."""
    n = len(kernel_shape)
    kernel, steps, spread = list(kernel_shape), list(strides or [1] * n), list(dilations or [1] * n)
    before, after = spatial_pads(x.shape[2:], kernel, steps, spread, pads, auto_pad)
    spans = [(k - 1) * d + 1 for k, d in zip(kernel, spread, strict=True)]
    more = overhang(x.shape[2:], spans, steps, [*before, *after], bool(ceil_mode) and auto_pad in ("NOTSET", ""))
    view = windows(padded(x, before, [a + m for a, m in zip(after, more, strict=True)]), kernel, steps, spread)
    return torch.linalg.vector_norm(view.flatten(-n), p, -1)


@operator("GlobalLpPool")
def global_lp_pool(x: Tensor, p: float = 2) -> Tensor:
    """The p-norm over the spatial axes."""
    return torch.linalg.vector_norm(x, p, list(range(2, x.dim())), True)


@operator("MaxUnpool", static=(2,))
def max_unpool(
    x: Tensor, indices: Value, output_shape: Value = None, kernel_shape: Sequence[int] = (), pads: Ints = None,
    strides: Ints = None,
) -> Tensor:  # fmt: skip
    """Zeros, with every element of x where MaxPool found it."""
    n = len(kernel_shape)
    steps, edges = list(strides or [1] * n), list(pads or [0] * 2 * n)
    dims = [
        (x.shape[2 + i] - 1) * steps[i] - edges[i] - edges[n + i] + kernel_shape[i] for i in range(n)
    ]  # fmt: skip
    shape = [*x.shape[:2], *dims]
    places = on_device(tensor(indices), x).reshape(-1)
    y = x.new_zeros(math.prod(shape)).scatter(0, places, x.reshape(-1)).reshape(shape)
    if output_shape is None:
        return y
    wanted = integers(output_shape)
    return F.pad(y, [a for i in range(len(shape) - 1, -1, -1) for a in (0, wanted[i] - shape[i])])


@operator("Col2Im", static=(1, 2))
def col2im(
    x: Tensor, image_shape: Value, block_shape: Value, dilations: Ints = None, pads: Ints = None, strides: Ints = None
) -> Tensor:
    """Blocks, the columns of x [N, C * block, blocks], added where they lie in an image [N, C, *image]."""
    image, block = integers(image_shape), integers(block_shape)
    n = len(image)
    spread, steps, edges = list(dilations or [1] * n), list(strides or [1] * n), list(pads or [0] * 2 * n)
    full = [d + edges[i] + edges[n + i] for i, d in enumerate(image)]
    places = torch.zeros((1,) * (2 * n), dtype=torch.int64, device=x.device)
    for i in range(n):
        count = (full[i] - (block[i] - 1) * spread[i] - 1) // steps[i] + 1
        taps = torch.arange(block[i], device=x.device)[:, None] * spread[i]
        at = taps + torch.arange(count, device=x.device) * steps[i]
        places = places * full[i] + at.reshape([at.shape[j != i] if j % n == i else 1 for j in range(2 * n)])
    columns = x.reshape(x.shape[0], x.shape[1] // math.prod(block), -1)
    y = columns.new_zeros(*columns.shape[:2], math.prod(full)).index_add(2, places.reshape(-1), columns)
    y = y.reshape(*columns.shape[:2], *full)
    for i in range(n):
        y = y.narrow(2 + i, edges[i], image[i])
    return y
