"""An audio codec with random weights: a convolutional encoder, two codebooks of which the second quantizes what the
first leaves (residual vector quantization, as EnCodec has it: Défossez et al., arXiv:2210.13438), and a decoder."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from burnish.tools.research.zoo_random import Network

WIDTH, CODES = 24, 40


def codec() -> Network:
    """Sound [batch, 1, samples] to the codes [batch, 2, samples / 8] and the sound that they stand for."""
    axes = {"sound": {0: "batch"}, "codes": {0: "batch"}, "decoded": {0: "batch"}}
    return Network(Codec(), (torch.randn(2, 1, 128),), ("sound",), ("codes", "decoded"), axes)


class _Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv1d(WIDTH, WIDTH // 2, 3, padding=1)
        self.conv2 = nn.Conv1d(WIDTH // 2, WIDTH, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv2(F.elu(self.conv1(F.elu(x))))


class _Nearest(nn.Module):
    """Distances spelt out, as the VQ-VAE and EnCodec do: the smallest, or the largest of their negatives."""

    def __init__(self, negative: bool) -> None:
        super().__init__()
        self.negative = negative
        self.embed = nn.Parameter(torch.zeros(CODES, WIDTH))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        flat = x.reshape(-1, WIDTH)
        distances = flat.pow(2).sum(1, keepdim=True) - 2 * flat @ self.embed.t() + self.embed.pow(2).sum(1)
        index = (-distances).argmax(dim=-1) if self.negative else distances.argmin(dim=-1)
        index = index.view(x.shape[:-1])
        return index, F.embedding(index, self.embed)


class Codec(nn.Module):
    """Stride 8 down, two residual units, two codebooks, two residual units, stride 8 up."""

    def __init__(self) -> None:
        super().__init__()
        self.down = nn.Conv1d(1, WIDTH, 16, 8, 4)
        self.encoder = nn.Sequential(_Residual(), _Residual())
        self.first, self.second = _Nearest(False), _Nearest(True)
        self.decoder = nn.Sequential(_Residual(), _Residual())
        self.up = nn.ConvTranspose1d(WIDTH, 1, 16, 8, 4)

    def forward(self, sound: Tensor) -> tuple[Tensor, Tensor]:
        x = self.encoder(self.down(sound)).transpose(1, 2)
        first, coarse = self.first(x)
        second, fine = self.second(x - coarse)
        decoded = self.up(self.decoder((coarse + fine).transpose(1, 2)))
        return torch.stack([first, second], dim=1), decoded
