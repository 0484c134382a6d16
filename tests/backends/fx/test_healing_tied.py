"""Blocks that share their weights learn as one: gradients add up, and the file still holds the weights once."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as oir
import pytest
import torch
from fx_checks import bytes_of, structure

from burnish.backends.fx.bridge import bridge_of
from burnish.backends.fx.builder import to_graph_module
from burnish.backends.fx.healing import HealOptions, heal
from burnish.ir.samples import Sample
from burnish.passes import catalog, lossy
from burnish.passes.base import Outcome
from burnish.passes.lossy import LossyPass
from burnish.passes.pipeline import constant_bytes

torch.set_num_threads(1)
DEMO = Path(__file__).resolve().parents[3] / "tools" / "demo"


def tied(model: oir.Model, pairs: str) -> tuple[oir.Model, dict[str, str]]:
    """The model, and of each weight that went the name of the one in its place."""
    (one,) = catalog.parse(f"tie-blocks{{map={pairs}}}")
    assert isinstance(one, LossyPass)
    edits = one.asked(model, Outcome("tie-blocks"))
    anchors = [name for edit in edits for name in edit.anchors]
    return lossy.apply(model, edits, [one])[0], dict(zip(anchors[::4], anchors[1::4], strict=True))


def gradients(model: oir.Model, images: np.ndarray) -> dict[str, torch.Tensor]:
    """Of a sum of all scores, each with another weight, by initializer."""
    module = to_graph_module(model).eval()
    (scores,) = module(torch.from_numpy(images))
    (scores * torch.linspace(-1, 1, scores.numel()).reshape(scores.shape)).sum().backward()
    parameters = dict(module.named_parameters())
    origins = bridge_of(module).weights
    return {str(origins[path].name): grad for path, one in parameters.items() if (grad := one.grad) is not None}


@pytest.mark.parametrize("pairs", ["2:1", "1:0+2:0"])
def test_the_gradient_of_a_shared_weight_is_the_sum_of_those_of_its_copies(
    vit: oir.Model, samples: list[Sample], pairs: str
) -> None:
    student, donors = tied(vit, pairs)
    copies = vit.clone()
    for own, other in donors.items():
        copies.graph.initializers[own].const_value = copies.graph.initializers[other].const_value
    images = samples[0].feeds["image"][:8]
    shared, apart = gradients(student, images), gradients(copies, images)
    assert donors and not donors.keys() & shared.keys()
    for name, found in shared.items():
        parts = [apart[name], *(apart[own] for own, other in donors.items() if other == name)]
        torch.testing.assert_close(found, torch.stack(parts).sum(0), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("train", ["all", "lora"])
def test_tied_blocks_stay_tied_when_they_heal(vit: oir.Model, samples: list[Sample], train: str) -> None:
    student, donors = tied(vit, "1:0+2:0")
    options = HealOptions(steps=20, batch=16, rate=2e-3, patience=10, train=train)  # type: ignore[arg-type]
    healed = heal(student, vit, samples, options)
    assert healed.improved and structure(healed.model) == structure(student)
    assert constant_bytes(healed.model) == constant_bytes(student) < 0.5 * constant_bytes(vit)
    before, after = bytes_of(student), bytes_of(healed.model)
    assert before.keys() == after.keys() and not donors.keys() & after.keys()
    assert set(healed.written) == {name for name in after if after[name] != before[name]}
    wide = {other for other in donors.values() if np.prod(student.graph.initializers[other].shape) > 1000}  # type: ignore[arg-type]
    assert len(wide) == 4 and wide <= set(healed.written)
