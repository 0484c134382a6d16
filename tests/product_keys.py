"""A memory layer with product keys, written in several ways, as torch exports it."""

from __future__ import annotations

import io
import warnings
from pathlib import Path

import onnx_ir as oir
import torch
import torch.nn.functional as F
from torch import nn

import burnish
from burnish.passes.pipeline import Pipeline
from burnish.passes.recipes import NORMAL_FORM

STYLES = {"expanded": "sum", "stacked": "flat", "divided": "matmul", "weighted": "einsum", "bag": "bag"}
"""How the pairs are written, and how the rows of the table are summed up."""


class Memory(nn.Module):
    """Queries [.., 32] look up 24 numbers for each of 2 heads, and the "+" layer's gate and projection make 32 of them.

    As Memory Layers at Scale (Berges et al. 2024, arXiv:2412.09764) describes it, and product-key networks before.
    """

    def __init__(self, style: str, heads: int = 2, keys: int = 16, half: int = 8, best: int = 8) -> None:
        super().__init__()
        self.heads, self.keys, self.half, self.best, self.style = heads, keys, half, best, style
        self.query = nn.Linear(32, heads * 2 * half)
        self.sub_keys = nn.Parameter(torch.randn(heads, 2, keys, half))
        self.values = nn.EmbeddingBag(keys**2, 24, mode="sum") if STYLES[style] == "bag" else nn.Embedding(keys**2, 24)
        self.out, self.gate = nn.Linear(24, 32), nn.Linear(32, 24)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        rows = x.reshape(-1, x.shape[-1])
        scores, index = self.chosen(rows)
        weight = F.softmax(scores, dim=-1)
        memory = self.summed(index, weight)
        return x + self.out(memory * F.silu(self.gate(rows))).view(x.shape)

    def chosen(self, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
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

    def summed(self, index: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
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


def exported(style: str, exporter: str, folder: Path, *, ties: bool = False) -> oir.Model:
    """The layer as an exporter writes it, in normal form, with batch and tokens symbolic.

    Args:
        style: of `STYLES`.
        exporter: "dynamo" or "torchscript".
        folder: for the file.
        ties: keys and queries are small whole numbers, so that many scores are equal.
    """
    torch.manual_seed(0)
    layer = Memory(style).eval()
    if ties:
        with torch.no_grad():
            layer.sub_keys.round_()
            layer.query.weight.mul_(4).round_()
            layer.query.bias.zero_()
    file, x = folder / f"{style}-{exporter}.onnx", torch.randn(3, 5, 32)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if exporter == "dynamo":
            shapes = ({0: torch.export.Dim("batch"), 1: torch.export.Dim("tokens")},)
            program = torch.onnx.export(layer, (x,), dynamo=True, dynamic_shapes=shapes, optimize=False, verbose=False)
            program.save(file)
        else:
            target = io.BytesIO()
            axes = {"x": {0: "batch", 1: "tokens"}}
            torch.onnx.export(layer, (x,), target, dynamo=False, opset_version=17, input_names=["x"], dynamic_axes=axes)
            file.write_bytes(target.getvalue())
    return Pipeline(NORMAL_FORM).rewrite(burnish.load(file)).model
