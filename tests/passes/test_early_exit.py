"""Early exits: the state behind a layer is bit for bit that of the whole model, and padding counts for no pooling."""

from __future__ import annotations

from functools import cache

import numpy as np
import onnx_ir as oir
import pytest
from block_networks import Cached, ConvNet, Encoder, Translator, UNet, built, exported, torch
from decoding import normal as packed
from golden import name_nodes, parse_graph
from laws import OrtRunner

from burnish.ir.errors import InputError
from burnish.ir.views.blocks import stacks
from burnish.passes import catalog, lossy
from burnish.passes.base import Outcome
from burnish.passes.lossy import LossyPass
from burnish.passes.pipeline import Pipeline
from burnish.passes.recipes import NORMAL_FORM

AXES = {"ids": {0: "batch", 1: "seq"}, "mask": {0: "batch", 1: "seq"}}
SKIP_FUSED = ("fuse-norm", "fuse-skip-norm{target=ort-cuda}")
GENERATOR = torch.Generator().manual_seed(1)
IDS = torch.randint(0, 11, (3, 6), generator=GENERATOR)
MASK = torch.tensor([[1] * 6, [1] * 4 + [0] * 2, [1] * 5 + [0]])


class Sentence(Encoder):
    """An encoder whose head makes one vector of the tokens of a row: their mean without padding, or the first."""

    def __init__(self, form: str, way: str) -> None:
        super().__init__(form)
        self.way = way

    def states(self, ids: torch.Tensor, mask: torch.Tensor) -> list[torch.Tensor]:
        hidden = (1.0 - mask[:, None, None, :].float()) * -1e4
        found = [self.first(self.words(ids))]
        for block in self.blocks:
            found.append(block(found[-1], hidden))
        return found

    def forward(self, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        x = self.last(self.states(ids, mask)[-1])
        if self.way == "first":
            return self.head(torch.tanh(x[:, 0]))
        kept = mask[:, :, None].float()
        return self.head((x * kept).sum(1) / kept.sum(1).clamp(min=1e-9))


@cache
def sentence(form: str, way: str = "mean", *more: str) -> tuple[Sentence, oir.Model]:
    module = built(Sentence(form, way))
    model = exported(module, (IDS, MASK), ["ids", "mask"], ["y"], AXES | {"y": {0: "batch"}})
    return module, Pipeline([*NORMAL_FORM, *more]).rewrite(model).model


@cache
def normal(kind: type[torch.nn.Module]) -> oir.Model:
    module = built(kind())
    if kind in (ConvNet, UNet):
        model = exported(module, (torch.randn(2, 3, 16, 16),), ["image"], ["y"], {"image": {0: "batch"}})
    elif kind is Translator:
        target = {"target": {0: "batch", 1: "tokens"}, "y": {0: "batch", 1: "tokens"}}
        model = exported(module, (IDS, IDS[:, :4]), ["ids", "target"], ["y"], {"ids": AXES["ids"]} | target)
    elif kind is Encoder:
        model = exported(module, (IDS, MASK), ["ids", "mask"], ["y"], AXES | {"y": {0: "batch", 1: "seq"}})
    else:
        past = tuple(torch.randn(3, 2, 4, 8) for _ in range(6))
        names = [f"past.{i}" for i in range(6)]
        axes = {"ids": AXES["ids"]} | {name: {0: "batch", 2: "past"} for name in names}
        outputs = ["y", *(f"present.{i}" for i in range(6))]
        model = exported(module, (IDS, *past), ["ids", *names], outputs, axes)
    return Pipeline(NORMAL_FORM).rewrite(model).model


def parse(spec: str) -> LossyPass:
    (one,) = catalog.parse(spec)
    assert isinstance(one, LossyPass)
    return one


def left(model: oir.Model, spec: str) -> oir.Model:
    one = parse(spec)
    return lossy.apply(model, one.asked(model, Outcome("early-exit")), [one])[0]


def run(model: oir.Model, ids: torch.Tensor = IDS, mask: torch.Tensor = MASK, **more: np.ndarray) -> np.ndarray:
    runner = OrtRunner(model, optimize=False)
    return runner.run({"ids": ids.numpy(), "mask": mask.numpy(), **more})["y"]


@pytest.mark.parametrize("more", [(), SKIP_FUSED], ids=["plain", "skip-fused"])
@pytest.mark.parametrize("layer", [1, 2])
@pytest.mark.parametrize("form", ["pre", "post", "parallel", "sandwich"])
def test_the_head_reads_the_layer(form: str, layer: int, more: tuple[str, ...]) -> None:
    module, model = sentence(form, "mean", *more)
    found = run(left(model, f"early-exit{{layer={layer}}}"))
    shorter = built(Sentence(form, "mean"))
    shorter.blocks = shorter.blocks[:layer]
    with torch.no_grad():
        np.testing.assert_allclose(found, shorter(IDS, MASK).numpy(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("layer", [1, 2, 3])
@pytest.mark.parametrize("form", ["pre", "post"])
def test_the_state_is_that_of_the_whole_model_bit_for_bit(form: str, layer: int) -> None:
    _, model = sentence(form)
    short = left(model, f"early-exit{{layer={layer},pooling=first}}")
    states = []
    for one in (model.clone(), short):
        blocks = stacks(one).blocks
        assert one is not short or len(blocks) == layer
        state = blocks[layer - 1].exit
        one.graph.outputs.append(state)
        states.append(OrtRunner(one, optimize=False).run({"ids": IDS.numpy(), "mask": MASK.numpy()})[str(state.name)])
    np.testing.assert_array_equal(*states)


def test_each_layer_that_goes_takes_its_bytes_along() -> None:
    _, model = sentence("pre")
    one = parse("early-exit")
    context = lossy.Context([], None, None, None)  # type: ignore[arg-type]
    edits = one.propose(model, context, Outcome("early-exit"))
    sizes = [block.parameters * 4 for block in stacks(model).blocks]
    assert [edit.option for edit in edits] == ["exit at layer 1", "exit at layer 2"]
    assert sizes[0] == sizes[1] == sizes[2]
    for edit, gone in zip(edits, (2, 1), strict=True):
        assert 0 <= edit.savings.bytes - gone * sizes[0] < 64, "but for single numbers"
    assert edits[0].claims & edits[1].claims, "one excludes the other"


def test_tables_that_only_blocks_of_the_end_share_are_among_what_is_saved() -> None:
    model = packed("gemma-kv-op23")
    (one,) = catalog.parse("early-exit")
    assert isinstance(one, LossyPass)
    edits = one.propose(model, lossy.Context([], None, None, None), Outcome("early-exit"))  # type: ignore[arg-type]
    assert len(edits) == 5
    for edit in edits:
        found = lossy.saved(model, lossy.apply(model, [edit], [one])[0], {})
        assert (found.parameters, found.bytes) == (edit.savings.parameters, edit.savings.bytes)


def test_a_shorter_decoder_keeps_the_names_of_its_caches() -> None:
    model = normal(Cached)
    short = left(model, "early-exit{layer=2}")
    assert [value.name for value in short.graph.inputs] == ["ids", "past.0", "past.1", "past.2", "past.3"]
    assert [value.name for value in short.graph.outputs] == ["y", *(f"present.{i}" for i in range(4))]
    assert short.metadata_props["burnish.blocks"] == "[0,1]"


@pytest.mark.parametrize("more", [(), SKIP_FUSED], ids=["plain", "skip-fused"])
def test_the_mean_of_layers_is_the_mean_of_single_exits(more: tuple[str, ...]) -> None:
    _, model = sentence("post", "mean", *more)
    single = [run(left(model, f"early-exit{{layer={layer}}}") if layer < 3 else model) for layer in (2, 3)]
    np.testing.assert_allclose(run(left(model, "early-exit{last=2}")), np.mean(single, 0), rtol=0, atol=1e-6)


POOLED = {
    "pooling=first": lambda x, kept: x[0][:, 0],
    "pooling=mean": lambda x, kept: (x[0] * kept).sum(1) / kept.sum(1),
    "pooling=max": lambda x, kept: np.where(kept, x[0], -np.inf).max(1),
    "pooling=weighted,tokens=4": lambda x, kept: (x[0] * kept).sum(1) / kept.sum(1),
    "pooling=first,last=3,mix=max": lambda x, kept: np.max(x, 0)[:, 0],
    "pooling=max,last=3,mix=max": lambda x, kept: np.where(kept, np.max(x, 0), -np.inf).max(1),
    "pooling=max,last=3,mix=weighted": lambda x, kept: np.mean([np.where(kept, y, -np.inf).max(1) for y in x], 0),
    "pooling=weighted,last=3,mix=max": lambda x, kept: (np.max(x, 0) * kept).sum(1) / kept.sum(1),
    "pooling=weighted,last=3,mix=weighted": lambda x, kept: (np.mean(x, 0) * kept).sum(1) / kept.sum(1),
}


@pytest.mark.parametrize("way", ["mean", "first"])
@pytest.mark.parametrize("options", POOLED)
def test_another_pooling_takes_the_place_of_the_heads_own(options: str, way: str) -> None:
    module, model = sentence("post", way)
    short = left(model, f"early-exit{{{options}}}")
    with torch.no_grad():
        states = [state.numpy() for state in module.states(IDS, MASK)[1:]]
        chosen = np.stack(states if "last" in options else states[-1:])
        pooled = torch.tensor(POOLED[options](chosen, MASK.numpy()[:, :, None] > 0)).float()
        wanted = module.head(torch.tanh(pooled) if way == "first" else pooled).numpy()
    np.testing.assert_allclose(run(short), wanted, rtol=1e-4, atol=1e-5)
    longer, kept = torch.nn.functional.pad(IDS, (0, 3)), torch.nn.functional.pad(MASK, (0, 3))
    np.testing.assert_allclose(run(short, longer, kept), run(short), rtol=1e-5, atol=1e-6)
    assert str(short.graph.outputs[0].shape) == str(model.graph.outputs[0].shape)


def test_the_final_norm_stays_between_the_layer_and_the_pooling() -> None:
    module, model = sentence("pre")
    found = run(left(model, "early-exit{layer=2,pooling=max}"))
    with torch.no_grad():
        state = module.last(module.states(IDS, MASK)[2]).numpy()
        pooled = np.where(MASK.numpy()[:, :, None] > 0, state, -np.inf).max(1)
        np.testing.assert_allclose(found, module.head(torch.tensor(pooled)).numpy(), rtol=1e-4, atol=1e-5)
    with pytest.raises(InputError, match="a norm stands between"):
        left(model, "early-exit{pooling=max,last=2,mix=weighted}")


REFUSED = {
    "encoder and decoder": (Translator, "layer=2", "block 2 has cross-attention"),
    "stages": (ConvNet, "layer=2", "block 3 is another stage: its shortcut changes the shape"),
    "skips": (UNet, "layer=2", "blocks 0 and 1 are not on one stream"),
    "no pooling": (Encoder, "layer=2,pooling=mean", "the head makes no single state of all tokens"),
    "too late": (Encoder, "layer=4", "there is no layer 4: the model has 3"),
    "too many": (Encoder, "layer=2,last=3", "there is no layer 2 with the 2 before it"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_has_no_early_exit(case: str) -> None:
    kind, options, reason = REFUSED[case]
    with pytest.raises(InputError, match=reason):
        left(normal(kind), f"early-exit{{{options}}}")


def test_numbers_below_one_are_refused() -> None:
    for option in ("layer=0", "last=0", "tokens=0"):
        with pytest.raises(InputError, match="is 0"):
            parse(f"early-exit{{{option}}}")


READ = """g (float[N, 4] x) => (float[N, 2] y, float[N, 4] {output})
<float[4, 8] a, float[8, 4] b, float[4, 8] c, float[8, 4] d, float[4, 8] e, float[8, 4] f, float[4, 2] h> {{
  a1 = MatMul (x, a)  a2 = Relu (a1)  a3 = MatMul (a2, b)  p = Add (x, a3)
  c1 = MatMul (p, c)  c2 = Relu (c1)  c3 = MatMul (c2, d)  q = Add (p, c3)
  e1 = MatMul (q, e)  e2 = Relu (e1)  e3 = MatMul (e2, f)  r = Add (q, e3)
  z = Neg (q)
  y = MatMul (r, h)
}}"""


@pytest.mark.parametrize(("output", "reason"), [("q", "is the output `q`"), ("z", "Neg .* reads the state behind bl")])
def test_a_state_that_is_read_elsewhere_is_not_exchanged_for_an_earlier_one(output: str, reason: str) -> None:
    model = oir.from_proto(parse_graph(READ.format(output=output)))
    name_nodes(model)
    with pytest.raises(InputError, match=reason):
        left(model, "early-exit{layer=1}")
    assert len(stacks(left(model, "early-exit{layer=2}")).blocks) == 2
    outcome = Outcome("early-exit")
    edits = parse("early-exit").propose(model, lossy.Context([], None, None, None), outcome)  # type: ignore[arg-type]
    assert [edit.option for edit in edits] == ["exit at layer 2"] and len(outcome.skipped) == 1


def test_states_are_not_mixed_where_one_is_read_as_it_is() -> None:
    model = oir.from_proto(parse_graph(READ.format(output="z")))
    name_nodes(model)
    with pytest.raises(InputError, match="reads the state behind block 1"):
        left(model, "early-exit{layer=2,last=2}")
    assert len(stacks(left(model, "early-exit{layer=3,last=2}")).blocks) == 3
