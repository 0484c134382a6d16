"""A memory layer with product keys in the spellings that people write it in.

As Memory Layers at Scale (Berges et al. 2024, arXiv:2412.09764) describes it, and product-key networks before (Lample
et al. 2019, arXiv:1907.05242): two halves of a query, the best keys of each, the best pairs of these, a softmax over
their scores, a weighted sum of rows of a table, and the "+" layer's gate and projection.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from burnish.tools.research.zoo_random import Network

STYLES = {"expanded": "sum", "stacked": "flat", "divided": "matmul", "weighted": "einsum", "bag": "bag"}
"""How the pairs are written, and how the rows of the table are summed up."""


class Memory(nn.Module):
    """Adds to rows [..., width] what `best` of keys * keys rows say for each head.

    Args:
        style: of `STYLES`.
        width: of the rows.
        heads: lookups for each row.
        keys: of each half.
        half: numbers in a half of a query.
        best: pairs that are chosen.
        values: numbers in a row of the table.
    """

    def __init__(
        self, style: str, width: int = 32, heads: int = 2, keys: int = 16, half: int = 8, best: int = 8,
        values: int = 24,
    ) -> None:  # fmt: skip
        super().__init__()
        self.heads, self.keys, self.half, self.best, self.style = heads, keys, half, best, style
        self.query = nn.Linear(width, heads * 2 * half)
        self.sub_keys = nn.Parameter(torch.randn(heads, 2, keys, half))
        bag = STYLES[style] == "bag"
        self.values = nn.EmbeddingBag(keys**2, values, mode="sum") if bag else nn.Embedding(keys**2, values)
        self.out, self.gate = nn.Linear(values, width), nn.Linear(width, values)

    def forward(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        scores, index = self._chosen(rows)
        memory = self._summed(index, F.softmax(scores, dim=-1))
        return x + self.out(memory * F.silu(self.gate(rows))).view(x.shape)

    def _chosen(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        h, k, half = self.heads, self.best, self.half
        if self.style == "stacked":
            query = self.query(rows).view(-1, h, 2, half)
            values, index = torch.einsum("bhpd,hpnd->bhpn", query, self.sub_keys).topk(k, dim=-1)
            (v, w), (i, j) = values.unbind(2), index.unbind(2)
        else:
            query = self.query(rows).view(-1, h, 2 * half)
            v, i = torch.einsum("blh,lkh->blk", query[..., :half], self.sub_keys[:, 0]).topk(k, dim=2)
            w, j = torch.einsum("blh,lkh->blk", query[..., half:], self.sub_keys[:, 1]).topk(k, dim=2)
        if self.style in ("expanded", "bag"):
            n = rows.shape[0]
            shape = (n, h, k, k)
            sums = v.view(n, h, k, 1).expand(shape) + w.view(n, h, 1, k).expand(shape)
            pairs = i.view(n, h, k, 1).expand(shape) * self.keys + j.view(n, h, 1, k).expand(shape)
            sums, pairs = sums.reshape(n, h, -1), pairs.reshape(n, h, -1)
        else:
            sums = (v[..., :, None] + w[..., None, :]).flatten(-2)
            pairs = (i[..., :, None] * self.keys + j[..., None, :]).flatten(-2)
        best, at = sums.topk(k, dim=-1)
        if self.style == "divided":
            return best, i.gather(-1, at // k) * self.keys + j.gather(-1, at % k)
        return best, pairs.gather(-1, at)

    def _summed(self, index: Tensor, weight: Tensor) -> Tensor:
        count = self.heads * self.best
        flat, by = index.reshape(-1, count), weight.reshape(-1, count)
        match STYLES[self.style]:
            case "bag":
                return self.values(flat, per_sample_weights=by)
            case "sum":
                return (self.values(index) * weight[..., None]).sum(dim=(1, 2))
            case "flat":
                return (self.values(flat) * by[..., None]).sum(1)
            case "matmul":
                return (by[:, None] @ self.values(flat)).squeeze(1)
        return torch.einsum("bhk,bhkd->bd", weight, self.values(index))


def network(module: Memory, width: int = 32) -> Network:
    """The layer with rows [batch, tokens, width]."""
    axes = {"x": {0: "batch", 1: "tokens"}, "y": {0: "batch", 1: "tokens"}}
    return Network(module.eval(), (torch.randn(3, 5, width),), ("x",), ("y",), axes)
