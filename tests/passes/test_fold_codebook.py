"""`fold-codebook` makes a plain codebook of one that torch exports as SimVQ trains it: codes times a linear layer."""

from __future__ import annotations

import io
import warnings
from pathlib import Path

import numpy as np
import onnx_ir as oir
import pytest
import torch
from laws import OrtRunner
from torch import nn

import burnish
from burnish.ir.views.codebook import codebooks
from burnish.ir.walk import walk
from burnish.passes.pipeline import Pipeline
from burnish.passes.recipes import NORMAL_FORM

CODES, WIDTH = 2048, 64


class SimVQ(nn.Module):
    """Frozen codes behind a linear layer (Zhu et al. 2024, arXiv:2411.02038), searched by distances."""

    def __init__(self, spelling: str) -> None:
        super().__init__()
        self.spelling = spelling
        self.embedding = nn.Embedding(CODES, WIDTH)
        self.projection = nn.Linear(WIDTH, WIDTH)

    def forward(self, z: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        codes = self.projection(self.embedding.weight)
        rows = z.reshape(-1, WIDTH)
        if self.spelling == "einsum":
            product = torch.einsum("bd,dn->bn", rows, codes.t())
        else:
            product = rows @ codes.t()
        distances = (rows**2).sum(1, keepdim=True) + (codes**2).sum(1) - 2 * product
        index = distances.argmin(1)
        found = nn.functional.embedding(index, codes).view(z.shape)
        return z + (found - z).detach(), index.view(z.shape[:-1])


def _exported(spelling: str, exporter: str, file: Path) -> oir.Model:
    torch.manual_seed(0)
    module, z = SimVQ(spelling).eval(), torch.randn(2, 7, WIDTH)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if exporter == "dynamo":
            shapes = ({0: torch.export.Dim("batch"), 1: torch.export.Dim("tokens")},)
            program = torch.onnx.export(module, (z,), dynamo=True, dynamic_shapes=shapes, optimize=False, verbose=False)
            program.save(file)
        else:
            axes, stream = {"z": {0: "batch", 1: "tokens"}}, io.BytesIO()
            torch.onnx.export(
                module, (z,), stream, dynamo=False, opset_version=17, input_names=["z"], dynamic_axes=axes,
                do_constant_folding=False,
            )  # fmt: skip
            file.write_bytes(stream.getvalue())
    return burnish.load(file)


@pytest.mark.parametrize(
    ("spelling", "exporter"),
    [
        ("einsum", "torchscript"),
        ("matmul", "torchscript"),
        pytest.param("matmul", "dynamo", marks=pytest.mark.slow),
    ],
)
def test_one_codebook_is_left_and_the_same_codes_are_found(spelling: str, exporter: str, tmp_path: Path) -> None:
    before = _exported(spelling, exporter, tmp_path / "simvq.onnx")
    after = Pipeline((*NORMAL_FORM, "fold-codebook", "drop-unused")).rewrite(before).model
    (book,) = codebooks(after)
    large = [value for value in after.graph.initializers.values() if np.prod(value.shape.numpy()) >= CODES * WIDTH]
    assert len(large) == 1 and len(book.lookups) == 1
    assert not [node for node in walk(after) if node.op_type in ("ReduceSum", "Pow", "Sub")]
    assert len(oir.to_proto(after).SerializeToString()) < len(oir.to_proto(before).SerializeToString())
    z = np.random.default_rng(0).standard_normal((8, 500, WIDTH)).astype(np.float32)
    results = [list(OrtRunner(one, True).run({one.graph.inputs[0].name: z}).values()) for one in (before, after)]
    (codes, index), (found, number) = results
    differ = index != number
    assert differ.mean() <= 1e-4
    exact = book.codes()
    for row, one, other in zip(z[differ].astype(np.float64), index[differ], number[differ], strict=True):
        assert abs(((row - exact[one]) ** 2).sum() - ((row - exact[other]) ** 2).sum()) <= 1e-5
    assert np.array_equal(found, exact[number].astype(np.float32))  # what the numbers stand for is what comes out
    assert np.abs(found - codes)[~differ].max() < 1e-5
