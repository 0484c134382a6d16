"""Groups of blocks: the model is the module whose attentions read the group's first state, fused or not."""

from __future__ import annotations

from functools import cache

import numpy as np
import onnx_ir as oir
import pytest
from block_networks import Cached, ConvNet, Encoder, Layer, Translator, built, exported, torch
from laws import OrtRunner
from lossy_laws import check_edits, proposals

from burnish.ir.errors import InputError
from burnish.ir.text import text
from burnish.ir.views.blocks import stacks
from burnish.passes import catalog, lossy
from burnish.passes.base import Outcome
from burnish.passes.lossy import LossyPass
from burnish.passes.pipeline import Pipeline
from burnish.passes.recipes import NORMAL_FORM

AXES = {"ids": {0: "batch", 1: "seq"}, "mask": {0: "batch", 1: "seq"}, "y": {0: "batch", 1: "seq"}}
IDS = torch.randint(0, 11, (3, 6), generator=torch.Generator().manual_seed(1))
MASK = torch.tensor([[1] * 6, [1] * 4 + [0] * 2, [1] * 5 + [0]])
SKIP_FUSED = ("fuse-norm", "fuse-skip-norm{target=ort-cuda}")


class Root(torch.nn.Module):
    """RMS normalization, spelled out as exporters of language models do."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-5))


def network(form: str) -> Encoder:
    """Four layers; `rms` are pre-norm layers with RMS norms."""
    module = Encoder("pre" if form == "rms" else form, layers=4)
    if form == "rms":
        for layer in module.blocks:
            layer.norms = torch.nn.ModuleList(Root(16) for _ in range(5))
    return built(module)


@cache
def encoder(form: str, *more: str) -> tuple[Encoder, oir.Model]:
    module = network(form)
    model = exported(module, (IDS, MASK), ["ids", "mask"], ["y"], AXES)
    return module, Pipeline([*NORMAL_FORM, *more]).rewrite(model).model


def grouped(module: Encoder, groups: list[range]) -> np.ndarray:
    """What the module computes when the attentions of a group read the state before it."""
    hidden = (1.0 - MASK[:, None, None, :].float()) * -1e4
    x = module.first(module.words(IDS))
    starts = {index: group.start for group in groups for index in group}
    state = x
    for index, layer in enumerate(module.blocks):
        assert isinstance(layer, Layer)
        one, two, three, four, _ = layer.norms
        state = x if starts.get(index, index) == index else state
        y = layer.attention(one(state), hidden)
        if layer.form == "sandwich":
            x = x + two(y)
            x = x + four(layer.mlp(three(x)))
        else:
            x = x + y
            x = x + layer.mlp(two(x))
    return module.head(module.last(x)).detach().numpy()


def made(model: oir.Model, options: str) -> oir.Model:
    (one,) = catalog.parse(f"parallel-blocks{{{options}}}")
    assert isinstance(one, LossyPass)
    return lossy.apply(model, one.asked(model, Outcome("parallel-blocks")), [one])[0]


def run(model: oir.Model) -> np.ndarray:
    return OrtRunner(model, optimize=False).run({"ids": IDS.numpy(), "mask": MASK.numpy()})["y"]


@pytest.mark.parametrize("more", [(), SKIP_FUSED], ids=["plain", "skip-fused"])
@pytest.mark.parametrize("form", ["pre", "rms", "sandwich"])
@pytest.mark.parametrize("groups", ["0:2+2:4", "1:4"])
def test_a_group_is_that_of_the_module(form: str, groups: str, more: tuple[str, ...]) -> None:
    module, model = encoder(form, *more)
    ranges = [range(*map(int, one.split(":"))) for one in groups.split("+")]
    wanted, scale = grouped(module, ranges), float(np.abs(run(model)).max())
    found = run(made(model, f"groups={groups}"))
    np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-5 * max(1.0, scale))
    assert not np.allclose(found, run(model), atol=1e-2)
    after = made(model, f"groups={groups},fuse=true")
    np.testing.assert_allclose(run(after), found, rtol=1e-5, atol=1e-5 * max(1.0, scale))
    products = [sum(node.op_type == "MatMul" for node in one.graph) for one in (model, after)]
    assert products[0] - products[1] == sum(3 * len(group) - 1 for group in ranges)


def test_a_group_of_one_changes_nothing() -> None:
    _, model = encoder("pre")
    for options in ("groups=2:3", "groups=2:3,fuse=true"):
        assert text(made(model, options)) == text(model)


@pytest.mark.parametrize("options", ["parallel-blocks", "parallel-blocks{size=3,fuse=true}"])
def test_what_is_proposed_keeps_the_laws(options: str) -> None:
    _, model = encoder("pre")
    (one, other) = catalog.parse(f"{options},remove-blocks")
    assert isinstance(one, LossyPass) and isinstance(other, LossyPass)
    edits, outcome = proposals(one, model)
    check_edits(one, model, edits)
    size = 3 if "size" in options else 2
    assert [edit.site for edit in edits] == [f"blocks {start} to {start + size - 1}" for start in range(5 - size)]
    assert not outcome.skipped
    for first, edit in enumerate(edits):
        for second, rival in enumerate(edits):
            assert bool(edit.claims & rival.claims) == (abs(first - second) < size)
        for drop in proposals(other, model)[0]:
            index = int(drop.site.split()[1])
            assert bool(edit.claims & drop.claims) == (first <= index < first + size)


def test_groups_that_the_search_may_join_are_made_together() -> None:
    _, model = encoder("rms", *SKIP_FUSED)
    (one,) = catalog.parse("parallel-blocks{fuse=true}")
    assert isinstance(one, LossyPass)
    edits, _ = proposals(one, model)
    after, _ = lossy.apply(model, [edits[0], edits[2]], [one])
    np.testing.assert_allclose(run(after), run(made(model, "groups=0:2+2:4")), rtol=1e-4, atol=1e-4)


def test_each_block_of_a_group_keeps_its_cache() -> None:
    past = tuple(torch.randn(3, 2, 4, 8) for _ in range(6))
    names, outputs = [f"past.{i}" for i in range(6)], ["y", *(f"present.{i}" for i in range(6))]
    axes = {"ids": AXES["ids"]} | {name: {0: "batch", 2: "past"} for name in names}
    model = exported(built(Cached()), (IDS, *past), ["ids", *names], outputs, axes)
    model = Pipeline(NORMAL_FORM).rewrite(model).model
    plain, fused = made(model, "groups=0:3"), made(model, "groups=0:3,fuse=true")
    assert [value.name for value in plain.graph.outputs] == outputs
    empty = {name: np.zeros((3, 2, 0, 8), np.float32) for name in names}
    for one in (plain, fused):
        runner = OrtRunner(one, optimize=False)
        whole = runner.run({"ids": IDS.numpy(), **empty})
        first = runner.run({"ids": IDS.numpy()[:, :4], **empty})
        kept = dict(zip(names, (first[name] for name in outputs[1:]), strict=True))
        rest = runner.run({"ids": IDS.numpy()[:, 4:], **kept})
        np.testing.assert_allclose(rest["y"], whole["y"][:, 4:], rtol=1e-4, atol=1e-5)


REFUSED = {
    "post": (Encoder, "groups=0:2", "norms stand behind the sums of block 0"),
    "parallel": (Encoder, "groups=0:2", "block 0 is not an attention and then an mlp"),
    "cross": (Translator, "groups=2:4", "block 2 is not an attention and then an mlp"),
    "apart": (Translator, "groups=1:3", "blocks 1 and 2 do not follow each other"),
    "cnn": (ConvNet, "groups=0:2", "block 0 is not an attention and then an mlp"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_a_group(case: str) -> None:
    kind, options, reason = REFUSED[case]
    if kind is Encoder:
        _, model = encoder(case)
    elif kind is ConvNet:
        model = exported(built(ConvNet()), (torch.randn(2, 3, 16, 16),), ["image"], ["y"], {"image": {0: "batch"}})
    else:
        target = {"target": {0: "batch", 1: "tokens"}, "y": {0: "batch", 1: "tokens"}, "ids": AXES["ids"]}
        model = exported(built(Translator()), (IDS, IDS[:, :4]), ["ids", "target"], ["y"], target)
    model = Pipeline(NORMAL_FORM).rewrite(model).model
    with pytest.raises(InputError, match=reason):
        made(model, options)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ("groups=1", "no list of ranges"),
        ("groups=3:1", "there are no blocks 3:1"),
        ("groups=2:9", "there are no blocks 2:9: the model has 0:4"),
        ("groups=0:2+1:3", "block 1 is in two groups"),
        ("size=1", "`size` is 1"),
    ],
)
def test_options_that_cannot_be(options: str, reason: str) -> None:
    with pytest.raises(InputError, match=reason):
        made(encoder("pre")[1], options)


def test_a_norm_that_is_read_elsewhere_keeps_its_block_out() -> None:
    _, model = encoder("pre")
    model = model.clone()
    norm = stacks(model).blocks[1].attention_in
    assert norm is not None
    model.graph.outputs.append(norm)
    with pytest.raises(InputError, match="reads the norm before the attention of block 1"):
        made(model, "groups=1:3")
