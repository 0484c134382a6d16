"""Edits of several depth passes at once: each hits what it was proposed for, however the blocks are read meanwhile."""

from __future__ import annotations

import copy

import numpy as np
import onnx_ir as oir
import pytest
from block_networks import Encoder, built, exported, torch
from laws import OrtRunner, check_nothing_unused

from burnish.passes import catalog, lossy
from burnish.passes.base import Outcome
from burnish.passes.lossy import LossyPass
from burnish.passes.pipeline import Pipeline
from burnish.passes.recipes import NORMAL_FORM

IDS = torch.randint(0, 11, (3, 6), generator=torch.Generator().manual_seed(1))
MASK = torch.tensor([[1] * 6, [1] * 4 + [0] * 2, [1] * 5 + [0]])


class Zero(torch.nn.Module):
    """Adds nothing."""

    def forward(self, x: torch.Tensor, *others: torch.Tensor) -> torch.Tensor:
        return torch.zeros_like(x)


@pytest.mark.parametrize("order", ["drop-mlp,drop-attention", "drop-attention,drop-mlp"])
@pytest.mark.parametrize("more", [(), ("fuse-norm", "fuse-skip-norm{target=ort-cuda}")], ids=["plain", "skip-fused"])
@pytest.mark.parametrize("form", ["pre", "post"])
def test_branches_that_go_one_after_the_other_are_the_chosen_ones(form: str, more: tuple[str, ...], order: str) -> None:
    module = built(Encoder(form, layers=4))
    axes = {name: {0: "batch", 1: "seq"} for name in ("ids", "mask", "y")}
    model = exported(module, (IDS, MASK), ["ids", "mask"], ["y"], axes)
    model = Pipeline([*NORMAL_FORM, *more]).rewrite(model).model
    passes = catalog.parse(f"{order},tie-blocks")
    wanted = {
        *((name, f"block {index}") for name in ("drop-mlp", "drop-attention") for index in (1, 3)),
        ("tie-blocks", "block 2"),
    }
    edits = []
    for one in passes:
        assert isinstance(one, LossyPass)
        context = lossy.Context([], None, None, None)  # type: ignore[arg-type]
        for edit in one.propose(model, context, Outcome(one.pass_name())):
            if (edit.spec, edit.site) in wanted and edit.option != "weights of block 1":
                edits.append(edit)
    assert len(edits) == len(wanted)
    after, _ = lossy.apply(model, edits, [one for one in passes if isinstance(one, LossyPass)])
    check_nothing_unused(model, after)
    left = copy.deepcopy(module)
    left.blocks[2] = left.blocks[0]
    for index in (1, 3):
        left.blocks[index].attention = left.blocks[index].mlp = Zero()
    found = OrtRunner(after, optimize=False).run({"ids": IDS.numpy(), "mask": MASK.numpy()})["y"]
    with torch.no_grad():
        np.testing.assert_allclose(found, left(IDS, MASK).numpy(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("more", [(), ("fuse-norm", "fuse-skip-norm{target=ort-cuda}")], ids=["plain", "skip-fused"])
@pytest.mark.parametrize(
    ("spec", "index", "site"), [("drop-mlp", 1, "blocks 2 to 3"), ("drop-attention", 2, "blocks 0 to 1")]
)
def test_a_group_is_found_again_beside_branches_that_are_gone(
    spec: str, index: int, site: str, more: tuple[str, ...]
) -> None:
    module = built(Encoder("pre", layers=4))
    axes = {name: {0: "batch", 1: "seq"} for name in ("ids", "mask", "y")}
    model = exported(module, (IDS, MASK), ["ids", "mask"], ["y"], axes)
    model = Pipeline([*NORMAL_FORM, *more]).rewrite(model).model
    (one, other) = catalog.parse(f"{spec},parallel-blocks")
    assert isinstance(one, LossyPass) and isinstance(other, LossyPass)
    context = lossy.Context([], None, None, None)  # type: ignore[arg-type]
    drop = next(edit for edit in one.propose(model, context, Outcome("")) if edit.site == f"block {index}")
    group = next(edit for edit in other.propose(model, context, Outcome("")) if edit.site == site)
    assert not drop.claims & group.claims
    found = run(lossy.apply(model, [drop, group], [one, other])[0])
    quiet = copy.deepcopy(module)
    layer = quiet.blocks[index]
    part = layer.mlp if spec == "drop-mlp" else layer.attention
    last = [one for one in part.modules() if isinstance(one, torch.nn.Linear)][-1]
    with torch.no_grad():
        last.weight.zero_()
        last.bias.zero_()
    still = exported(quiet, (IDS, MASK), ["ids", "mask"], ["y"], axes)
    still = Pipeline([*NORMAL_FORM, *more]).rewrite(still).model
    again = next(edit for edit in other.propose(still, context, Outcome("")) if edit.site == site)
    np.testing.assert_allclose(found, run(lossy.apply(still, [again], [other])[0]), rtol=1e-4, atol=1e-5)


def run(model: oir.Model) -> np.ndarray:
    return OrtRunner(model, optimize=False).run({"ids": IDS.numpy(), "mask": MASK.numpy()})["y"]
