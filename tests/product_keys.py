"""Memory layers with product keys as torch exports them."""

from __future__ import annotations

from pathlib import Path

import onnx_ir as oir
import torch

import burnish
from burnish.passes.pipeline import Pipeline
from burnish.passes.recipes import NORMAL_FORM
from burnish.tools.research import zoo_export
from burnish.tools.research.zoo_memory import Memory, network


def exported(style: str, exporter: str, folder: Path, *, ties: bool = False) -> oir.Model:
    """A layer as an exporter writes it, in normal form, with batch and tokens symbolic.

    Args:
        style: of `STYLES`.
        exporter: "dynamo" or "torchscript".
        folder: for the file.
        ties: keys and queries are small whole numbers, so that many scores are equal.
    """
    torch.manual_seed(0)
    layer = Memory(style)
    if ties:
        with torch.no_grad():
            layer.sub_keys.round_()
            layer.query.weight.mul_(4).round_()
            layer.query.bias.zero_()
    file = folder / f"{style}-{exporter}.onnx"
    if exporter == "dynamo":
        zoo_export.dynamo(network(layer), file, opset=20, optimize=False)
    else:
        zoo_export.torchscript(network(layer), file, opset=17)
    return Pipeline(NORMAL_FORM).rewrite(burnish.load(file)).model
