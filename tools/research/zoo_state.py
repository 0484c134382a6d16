"""A state-space language model with random weights that reads one token a call, its states going in and out: the
recurrent form of Mamba (Gu and Dao, arXiv:2312.00752), as `MambaMixer.slow_forward` of transformers computes it."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from burnish.tools.research.zoo_random import Network

LAYERS, WIDTH, INNER, STATE, KERNEL, RANK, VOCABULARY = 4, 32, 64, 8, 4, 4, 500


def mamba() -> Network:
    """Inputs input_ids [batch, 1], conv_state.i [batch, 64, 4] and ssm_state.i [batch, 64, 8]; outputs logits and the
    new states, present_conv.i and present_ssm.i."""
    past = tuple(f"{kind}_state.{layer}" for layer in range(LAYERS) for kind in ("conv", "ssm"))
    present = tuple(f"present_{kind}.{layer}" for layer in range(LAYERS) for kind in ("conv", "ssm"))
    states = [torch.randn(2, INNER, size) for _ in range(LAYERS) for size in (KERNEL, STATE)]
    axes = {name: {0: "batch"} for name in ("input_ids", "logits", *past, *present)}
    ids = torch.randint(0, VOCABULARY, (2, 1))
    return Network(Mamba(), (ids, *states), ("input_ids", *past), ("logits", *present), axes)


class _Norm(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-5))


class _Mixer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.in_proj = nn.Linear(WIDTH, 2 * INNER, bias=False)
        self.conv1d = nn.Conv1d(INNER, INNER, KERNEL, groups=INNER, padding=KERNEL - 1)
        self.x_proj = nn.Linear(INNER, RANK + 2 * STATE, bias=False)
        self.dt_proj = nn.Linear(RANK, INNER)
        self.A_log = nn.Parameter(torch.zeros(INNER, STATE))
        self.D = nn.Parameter(torch.ones(INNER))
        self.out_proj = nn.Linear(INNER, WIDTH, bias=False)

    def forward(self, x: Tensor, conv_state: Tensor, ssm_state: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        hidden, gate = self.in_proj(x).transpose(1, 2).chunk(2, dim=1)
        conv_state = torch.cat([conv_state[:, :, 1:], hidden], dim=-1)
        hidden = torch.sum(conv_state * self.conv1d.weight[:, 0, :], dim=-1) + self.conv1d.bias
        hidden = F.silu(hidden).unsqueeze(-1)
        step, into, out_of = torch.split(self.x_proj(hidden.transpose(1, 2)), [RANK, STATE, STATE], dim=-1)
        step = F.softplus(self.dt_proj(step)).transpose(1, 2)
        decay = torch.exp(-torch.exp(self.A_log)[None] * step)
        ssm_state = decay * ssm_state + step * into * hidden
        y = torch.matmul(ssm_state, out_of.transpose(1, 2)) + hidden * self.D[None, :, None]
        y = y * F.silu(gate)
        return self.out_proj(y.transpose(1, 2)), conv_state, ssm_state


class _Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = _Norm(WIDTH)
        self.mixer = _Mixer()

    def forward(self, x: Tensor, conv_state: Tensor, ssm_state: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        y, conv_state, ssm_state = self.mixer(self.norm(x), conv_state, ssm_state)
        return x + y, conv_state, ssm_state


class Mamba(nn.Module):
    """Embedding, blocks of one mixer each, a norm, and a head that is the embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.embeddings = nn.Embedding(VOCABULARY, WIDTH)
        self.layers = nn.ModuleList(_Block() for _ in range(LAYERS))
        self.norm_f = _Norm(WIDTH)

    def forward(self, input_ids: Tensor, *states: Tensor) -> tuple[Tensor, ...]:
        x = self.embeddings(input_ids)
        present: list[Tensor] = []
        for index, layer in enumerate(self.layers):
            x, conv_state, ssm_state = layer(x, states[2 * index], states[2 * index + 1])
            present += [conv_state, ssm_state]
        return F.linear(self.norm_f(x), self.embeddings.weight), *present
