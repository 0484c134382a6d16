"""The generated ReXNet is the one of the paper, and its partial residuals become one Pad and one Add each."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from laws import OrtRunner

from burnish.frontends import onnx_file
from burnish.ir.cost import model_cost
from burnish.passes import plan
from burnish.passes.pipeline import Pipeline
from burnish.tools.research import zoo_export
from burnish.tools.research.rexnet_networks import Bottlenecks, Design, along_a_line, network, rexnet


def test_its_sizes_are_those_that_the_paper_gives(tmp_path: Path) -> None:
    design = rexnet()
    assert design.widths == [16, 27, 38, 50, 61, 72, 84, 95, 106, 117, 128, 140, 151, 162, 174, 185]
    assert abs(sum(parameter.numel() for parameter in Bottlenecks(design).parameters()) / 4.8e6 - 1) < 0.01
    zoo_export.torchscript(network(design, 224), tmp_path / "rexnet.onnx", opset=17)
    model = Pipeline(plan.resolve(target="onnx").passes).rewrite(onnx_file.read(tmp_path / "rexnet.onnx")).model
    model = Pipeline(["infer-types"]).rewrite(model).model
    counted = model_cost(model, {"batch": 1}).total.macs
    assert counted is not None and abs(counted / 0.40e9 - 1) < 0.02


@pytest.mark.parametrize("flavour", ["ts", "dynp"])
def test_partial_residuals_become_pads(flavour: str, tmp_path: Path) -> None:
    design = Design(8, along_a_line(4, 9, 5), (1, 1, 2, 1, 1), (1, 6, 6, 6, 6), (False, True) * 2 + (True,), 24, 10, 1)
    made = network(design, 16)
    zoo_export.write(made, flavour, tmp_path / "network.onnx")
    model = Pipeline(plan.resolve(target="onnx").passes).rewrite(onnx_file.read(tmp_path / "network.onnx")).model
    operators = Counter(node.op_type for node in model.graph)
    assert operators["Pad"] == operators["Add"] == 3 and not operators["ScatterND"] + operators["Concat"]
    images = torch.randn(3, 1, 16, 16, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        wanted = made.module(images).numpy()
    found = OrtRunner(model, optimize=True).run({"image": images.numpy()})["logits"]
    np.testing.assert_allclose(found, wanted, atol=1e-4 * np.abs(wanted).max())
