"""Vision transformers with seeded random weights, spelt as timm spells them: `VisionTransformer` (Dosovitskiy et al.,
arXiv:2010.11929) with one matrix for query, key and value, and `SwinTransformer` (Liu et al., arXiv:2103.14030)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from burnish.tools.research.zoo_random import Network


def vit(attention: str) -> Network:
    """Five pre-norm blocks of width 48 with 3 heads: image [batch, 3, 32, 32] to 20 logits."""
    axes = {"image": {0: "batch"}, "logits": {0: "batch"}}
    module = VisionTransformer(attention == "sdpa")
    return Network(module, (torch.randn(2, 3, 32, 32),), ("image",), ("logits",), axes)


def swin(attention: str) -> Network:
    """Stages of 2, 2 and 4 blocks, every second one shifted: image [batch, 3, 64, 64] to 20 logits."""
    axes = {"image": {0: "batch"}, "logits": {0: "batch"}}
    module = SwinTransformer(attention == "sdpa")
    return Network(module, (torch.randn(2, 3, 64, 64),), ("image",), ("logits",), axes)


class _Mlp(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, 4 * width)
        self.act = nn.GELU()
        self.fc2 = nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.act(self.fc1(x)))


class _Attention(nn.Module):
    def __init__(self, width: int, heads: int, fused: bool) -> None:
        super().__init__()
        self.num_heads, self.head_dim, self.fused_attn = heads, width // heads, fused
        self.scale = self.head_dim**-0.5
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        B, N, C = x.shape  # noqa: N806
        q, k, v = self.qkv(x).reshape(B, N, 3, self.num_heads, self.head_dim).permute(2, 0, 3, 1, 4).unbind(0)
        if self.fused_attn:
            x = F.scaled_dot_product_attention(q, k, v)
        else:
            x = (q * self.scale @ k.transpose(-2, -1)).softmax(dim=-1) @ v
        return self.proj(x.transpose(1, 2).reshape(B, N, C))


class _Block(nn.Module):
    def __init__(self, width: int, heads: int, fused: bool) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=1e-6)
        self.attn = _Attention(width, heads, fused)
        self.norm2 = nn.LayerNorm(width, eps=1e-6)
        self.mlp = _Mlp(width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class VisionTransformer(nn.Module):
    """Class token, learnt positions, blocks, a norm, and the class token's logits."""

    def __init__(self, fused: bool, width: int = 48, layers: int = 5, heads: int = 3) -> None:
        super().__init__()
        self.patch_embed = nn.Conv2d(3, width, 8, 8)
        self.cls_token_embed = nn.Parameter(torch.zeros(1, 1, width))
        self.pos_embed = nn.Parameter(torch.zeros(1, 17, width))
        self.blocks = nn.Sequential(*(_Block(width, heads, fused) for _ in range(layers)))
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.head = nn.Linear(width, 20)

    def forward(self, image: Tensor) -> Tensor:
        x = self.patch_embed(image).flatten(2).transpose(1, 2)
        x = torch.cat([self.cls_token_embed.expand(x.shape[0], -1, -1), x], dim=1) + self.pos_embed
        return self.head(self.norm(self.blocks(x))[:, 0])


def window_partition(x: Tensor, size: int) -> Tensor:
    """[B, H, W, C] to [B * windows, size, size, C]."""
    B, H, W, C = x.shape  # noqa: N806
    x = x.view(B, H // size, size, W // size, size, C)
    return x.permute(0, 1, 3, 2, 4, 5).contiguous().view(-1, size, size, C)


def window_reverse(windows: Tensor, size: int, H: int, W: int) -> Tensor:  # noqa: N803
    """The inverse of `window_partition`."""
    x = windows.view(-1, H // size, W // size, size, size, windows.shape[-1])
    return x.permute(0, 1, 3, 2, 4, 5).contiguous().view(-1, H, W, windows.shape[-1])


def _relative_positions(size: int) -> Tensor:
    """Index into the bias table for each pair of positions of a window: [size², size²]."""
    coords = torch.stack(torch.meshgrid(torch.arange(size), torch.arange(size), indexing="ij")).flatten(1)
    relative = (coords[:, :, None] - coords[:, None, :]).permute(1, 2, 0).contiguous() + size - 1
    relative[:, :, 0] *= 2 * size - 1
    return relative.sum(-1)


class _WindowAttention(nn.Module):
    relative_position_index: Tensor

    def __init__(self, width: int, heads: int, size: int, fused: bool) -> None:
        super().__init__()
        self.num_heads, self.window_area, self.fused_attn = heads, size * size, fused
        self.scale = (width // heads) ** -0.5
        self.relative_position_bias_table = nn.Parameter(torch.zeros((2 * size - 1) ** 2, heads))
        self.register_buffer("relative_position_index", _relative_positions(size), persistent=False)
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def _bias(self) -> Tensor:
        bias = self.relative_position_bias_table[self.relative_position_index.view(-1)]
        bias = bias.view(self.window_area, self.window_area, -1)
        return bias.permute(2, 0, 1).contiguous().unsqueeze(0)

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        B, N, C = x.shape  # noqa: N806
        q, k, v = self.qkv(x).reshape(B, N, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
        if self.fused_attn:
            bias = self._bias()
            if mask is not None:
                windows = mask.shape[0]
                mask = mask.view(1, windows, 1, N, N).expand(B // windows, -1, self.num_heads, -1, -1)
                bias = bias + mask.reshape(-1, self.num_heads, N, N)
            x = F.scaled_dot_product_attention(q, k, v, attn_mask=bias)
        else:
            attn = q * self.scale @ k.transpose(-2, -1) + self._bias()
            if mask is not None:
                windows = mask.shape[0]
                attn = attn.view(-1, windows, self.num_heads, N, N) + mask.unsqueeze(1).unsqueeze(0)
                attn = attn.view(-1, self.num_heads, N, N)
            x = attn.softmax(dim=-1) @ v
        return self.proj(x.transpose(1, 2).reshape(B, N, -1))


class _SwinBlock(nn.Module):
    attn_mask: Tensor | None

    def __init__(self, width: int, heads: int, resolution: int, size: int, shift: int, fused: bool) -> None:
        super().__init__()
        self.window_size, self.shift_size = size, shift
        self.norm1 = nn.LayerNorm(width)
        self.attn = _WindowAttention(width, heads, size, fused)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = _Mlp(width)
        self.register_buffer("attn_mask", self._mask(resolution) if shift else None, persistent=False)

    def _mask(self, resolution: int) -> Tensor:
        """-100 between positions of a shifted window that are no neighbours in the image: [windows, size², size²]."""
        size, shift = self.window_size, self.shift_size
        image = torch.zeros((1, resolution, resolution, 1))
        count = 0
        for rows in ((0, -size), (-size, -shift), (-shift, None)):
            for columns in ((0, -size), (-size, -shift), (-shift, None)):
                image[:, slice(*rows), slice(*columns), :] = count
                count += 1
        windows = window_partition(image, size).view(-1, size * size)
        mask = windows.unsqueeze(1) - windows.unsqueeze(2)
        return mask.masked_fill(mask != 0, -100.0).masked_fill(mask == 0, 0.0)

    def _attend(self, x: Tensor) -> Tensor:
        _, H, W, C = x.shape  # noqa: N806
        size, shift = self.window_size, self.shift_size
        if shift:
            x = torch.roll(x, shifts=(-shift, -shift), dims=(1, 2))
        windows = window_partition(x, size).view(-1, size * size, C)
        windows = self.attn(windows, self.attn_mask).view(-1, size, size, C)
        x = window_reverse(windows, size, H, W)
        return torch.roll(x, shifts=(shift, shift), dims=(1, 2)) if shift else x

    def forward(self, x: Tensor) -> Tensor:
        B, H, W, C = x.shape  # noqa: N806
        x = x + self._attend(self.norm1(x))
        x = x.reshape(B, -1, C)
        x = x + self.mlp(self.norm2(x))
        return x.reshape(B, H, W, C)


class _PatchMerging(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(4 * width)
        self.reduction = nn.Linear(4 * width, 2 * width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        B, H, W, C = x.shape  # noqa: N806
        x = x.reshape(B, H // 2, 2, W // 2, 2, C).permute(0, 1, 3, 4, 2, 5).flatten(3)
        return self.reduction(self.norm(x))


class SwinTransformer(nn.Module):
    """Patches of 2x2 pixels, windows of 4x4 patches, widths 24, 48 and 96 with 2, 4 and 8 heads."""

    def __init__(self, fused: bool, width: int = 24, stages: tuple[int, ...] = (2, 2, 4)) -> None:
        super().__init__()
        self.patch_embed = nn.Conv2d(3, width, 2, 2)
        self.patch_norm = nn.LayerNorm(width)
        layers: list[nn.Module] = []
        resolution, heads = 32, 2
        for stage, count in enumerate(stages):
            if stage:
                layers.append(_PatchMerging(width))
                width, heads, resolution = 2 * width, 2 * heads, resolution // 2
            for index in range(count):
                layers.append(_SwinBlock(width, heads, resolution, 4, 2 * (index % 2), fused))
        self.layers = nn.Sequential(*layers)
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, 20)

    def forward(self, image: Tensor) -> Tensor:
        x = self.patch_norm(self.patch_embed(image).permute(0, 2, 3, 1))
        return self.head(self.norm(self.layers(x)).mean(dim=(1, 2)))
