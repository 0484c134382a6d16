"""A U-Net that denoises under a text condition, with seeded random weights, spelt as diffusers spells it (Rombach et
al., arXiv:2112.10752): ResNet blocks with GroupNorm and a time embedding, transformers with self- and cross-attention,
skips from the way down concatenated on the way up."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from burnish.tools.research.zoo_random import Network

CONTEXT_WIDTH, HEADS, GROUPS = 24, 4, 8


def unet(attention: str) -> Network:
    """Two levels of 32 and 64 channels: sample [batch, 4, 16, 16], timestep [batch], context [batch, tokens, 24]."""
    inputs = (torch.randn(2, 4, 16, 16), torch.tensor([3, 700]), torch.randn(2, 7, CONTEXT_WIDTH))
    axes = {name: {0: "batch"} for name in ("sample", "timestep", "noise")}
    axes["encoder_hidden_states"] = {0: "batch", 1: "tokens"}
    names = ("sample", "timestep", "encoder_hidden_states")
    return Network(UNet(attention == "sdpa"), inputs, names, ("noise",), axes)


class _ResnetBlock(nn.Module):
    def __init__(self, before: int, after: int, time: int) -> None:
        super().__init__()
        self.norm1 = nn.GroupNorm(GROUPS, before, eps=1e-5)
        self.conv1 = nn.Conv2d(before, after, 3, padding=1)
        self.time_emb_proj = nn.Linear(time, after)
        self.norm2 = nn.GroupNorm(GROUPS, after, eps=1e-5)
        self.conv2 = nn.Conv2d(after, after, 3, padding=1)
        self.conv_shortcut = nn.Conv2d(before, after, 1) if before != after else None

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        hidden = self.conv1(F.silu(self.norm1(x)))
        hidden = hidden + self.time_emb_proj(F.silu(time))[:, :, None, None]
        hidden = self.conv2(F.silu(self.norm2(hidden)))
        return (x if self.conv_shortcut is None else self.conv_shortcut(x)) + hidden


class _CrossAttention(nn.Module):
    def __init__(self, width: int, memory: int, fused: bool) -> None:
        super().__init__()
        self.fused = fused
        self.to_q = nn.Linear(width, width, bias=False)
        self.to_k = nn.Linear(memory, width, bias=False)
        self.to_v = nn.Linear(memory, width, bias=False)
        self.to_out = nn.Linear(width, width)

    def forward(self, x: Tensor, memory: Tensor) -> Tensor:
        batch, tokens, width = x.shape
        q, k, v = (
            t.view(batch, -1, HEADS, width // HEADS).transpose(1, 2)
            for t in (self.to_q(x), self.to_k(memory), self.to_v(memory))
        )
        if self.fused:
            y = F.scaled_dot_product_attention(q, k, v)
        else:
            y = (q @ k.transpose(-2, -1) * (width // HEADS) ** -0.5).softmax(-1) @ v
        return self.to_out(y.transpose(1, 2).reshape(batch, tokens, width))


class _GatedMlp(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.proj = nn.Linear(width, 8 * width)
        self.out = nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        x, gate = self.proj(x).chunk(2, dim=-1)
        return self.out(x * F.gelu(gate))


class _Transformer(nn.Module):
    """One transformer block over the pixels, between two 1x1 convolutions, added to its input."""

    def __init__(self, channels: int, fused: bool) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(GROUPS, channels, eps=1e-6)
        self.proj_in = nn.Conv2d(channels, channels, 1)
        self.norm1, self.norm2, self.norm3 = (nn.LayerNorm(channels) for _ in range(3))
        self.attn1 = _CrossAttention(channels, channels, fused)
        self.attn2 = _CrossAttention(channels, CONTEXT_WIDTH, fused)
        self.ff = _GatedMlp(channels)
        self.proj_out = nn.Conv2d(channels, channels, 1)

    def forward(self, image: Tensor, context: Tensor) -> Tensor:
        batch, channels, height, width = image.shape
        x = self.proj_in(self.norm(image)).permute(0, 2, 3, 1).reshape(batch, height * width, channels)
        normed = self.norm1(x)
        x = x + self.attn1(normed, normed)
        x = x + self.attn2(self.norm2(x), context)
        x = x + self.ff(self.norm3(x))
        x = x.reshape(batch, height, width, channels).permute(0, 3, 1, 2).contiguous()
        return self.proj_out(x) + image


class UNet(nn.Module):
    """Down: two blocks, stride-2 convolution, two blocks. Middle: block, transformer, block. Up: three blocks on each
    level, each after concatenation with a skip."""

    def __init__(self, fused: bool, low: int = 32, high: int = 64) -> None:
        super().__init__()
        time = 4 * low
        self.width = low
        self.time1, self.time2 = nn.Linear(low, time), nn.Linear(time, time)
        self.conv_in = nn.Conv2d(4, low, 3, padding=1)
        self.down1 = nn.ModuleList(_ResnetBlock(low, low, time) for _ in range(2))
        self.attend_down1 = nn.ModuleList(_Transformer(low, fused) for _ in range(2))
        self.downsample = nn.Conv2d(low, low, 3, 2, 1)
        self.down2 = nn.ModuleList(_ResnetBlock(before, high, time) for before in (low, high))
        self.middle1, self.middle2 = _ResnetBlock(high, high, time), _ResnetBlock(high, high, time)
        self.attend_middle = _Transformer(high, fused)
        self.up2 = nn.ModuleList(_ResnetBlock(high + skip, high, time) for skip in (high, high, low))
        self.upsample = nn.Conv2d(high, high, 3, padding=1)
        self.up1 = nn.ModuleList(_ResnetBlock(before + low, low, time) for before in (high, low, low))
        self.attend_up1 = nn.ModuleList(_Transformer(low, fused) for _ in range(3))
        self.norm_out = nn.GroupNorm(GROUPS, low, eps=1e-5)
        self.conv_out = nn.Conv2d(low, 4, 3, padding=1)

    def _time(self, timestep: Tensor) -> Tensor:
        half = self.width // 2
        rates = torch.exp(-math.log(10000) * torch.arange(half, dtype=torch.float32) / half)
        angles = timestep[:, None].float() * rates[None, :]
        return self.time2(F.silu(self.time1(torch.cat([torch.cos(angles), torch.sin(angles)], dim=-1))))

    def forward(self, sample: Tensor, timestep: Tensor, encoder_hidden_states: Tensor) -> Tensor:
        time, context = self._time(timestep), encoder_hidden_states
        x = self.conv_in(sample)
        skips = [x]
        for block, attend in zip(self.down1, self.attend_down1, strict=True):
            x = attend(block(x, time), context)
            skips.append(x)
        x = self.downsample(x)
        skips.append(x)
        for block in self.down2:
            x = block(x, time)
            skips.append(x)
        x = self.middle2(self.attend_middle(self.middle1(x, time), context), time)
        for block in self.up2:
            x = block(torch.cat([x, skips.pop()], dim=1), time)
        x = self.upsample(F.interpolate(x, scale_factor=2.0, mode="nearest"))
        for block, attend in zip(self.up1, self.attend_up1, strict=True):
            x = attend(block(torch.cat([x, skips.pop()], dim=1), time), context)
        return self.conv_out(F.silu(self.norm_out(x)))
