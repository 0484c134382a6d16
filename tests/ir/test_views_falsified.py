"""Views of models that are nearly the known ones: right by the numbers, or refused with a reason."""

from __future__ import annotations

import io
import warnings
from collections.abc import Callable
from functools import cache

import attention_modules
import block_networks
import mutants
import numpy as np
import onnx
import onnx_ir as oir
import pytest
import view_oracle
from attention_modules import HEADS, SIZE, WIDTH, Layer
from block_networks import Encoder, torch

from burnish.ir.views.attention_layer import AttentionLayer, attention_layers
from burnish.ir.views.blocks import Structure, stacks
from burnish.ir.views.embedding import Head, heads
from burnish.ir.views.experts import Experts, find_experts
from burnish.passes.pipeline import Pipeline
from burnish.passes.recipes import NORMAL_FORM

Tensor = torch.Tensor
Arrays = dict[str, np.ndarray]
HIDE = -1e4


def exported(module: torch.nn.Module, *inputs: Tensor) -> tuple[oir.Model, Arrays]:
    """The module's TorchScript export, batch and positions dynamic, and the inputs by name."""
    names, file = [f"x{index}" for index in range(len(inputs))], io.BytesIO()
    torch.manual_seed(0)
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            module.eval(), inputs, file, input_names=names, dynamo=False, opset_version=17,
            dynamic_axes={name: {0: "batch", one.ndim - 2: "length"} for name, one in zip(names, inputs, strict=True)},
        )  # fmt: skip
    model = onnx.shape_inference.infer_shapes(onnx.load_from_string(file.getvalue()))
    return oir.from_proto(model), {name: one.numpy() for name, one in zip(names, inputs, strict=True)}


def normal(model: oir.Model) -> oir.Model:
    return Pipeline(list(NORMAL_FORM)).rewrite(model).model


class Near(Layer):
    """The plain layer with something else in the place of its mask, and keys and values that join others."""

    def __init__(self, mask: Callable[..., Tensor] | None = None, join: Callable[..., Tensor] | None = None) -> None:
        super().__init__()
        self.masked, self.joined = mask, join

    def forward(self, x: Tensor, *more: Tensor) -> Tensor:
        q, k, v = self.split(self.q(x)), self.split(self.k(x)), self.split(self.v(x))
        if self.joined is not None:
            k, v = self.joined(k, more[0]), self.joined(v, more[1])
        scores = q @ k.transpose(-1, -2) / SIZE**0.5
        scores = self.masked(scores, *more) if self.masked is not None else scores
        return x + self.o(self.join(scores.softmax(-1) @ v))


def later(scores: Tensor) -> Tensor:
    """Bool: the key stands behind the query."""
    queries, keys = torch.arange(scores.shape[-2]), torch.arange(scores.shape[-1])
    return keys[None] > queries[:, None]


def hidden(scores: Tensor, low: float = HIDE) -> Tensor:
    return scores + torch.where(later(scores), low, 0.0)


def uncovered(scores: Tensor, some: Tensor) -> Tensor:
    return hidden(scores).masked_fill(some, -3.0)


def raised(scores: Tensor) -> Tensor:
    scores = hidden(scores, -9100.0)
    for _ in range(10):
        scores = scores + torch.where(torch.arange(8) == 7, 990.0, 0.0)
    return scores


X = torch.randn(2, 8, WIDTH, generator=torch.Generator().manual_seed(3))
SOME = torch.rand(2, 1, 8, 8, generator=torch.Generator().manual_seed(4)) > 0.5


@pytest.mark.parametrize(
    ("mask", "inputs", "reason"),
    [
        (lambda scores: hidden(scores) * 1e-4, (), "the mask is scaled together with the scores"),
        (lambda scores: hidden(scores) / 1e4, (), "the mask is scaled together with the scores"),
        (uncovered, (SOME,), None),
        (raised, (), None),
        (lambda scores: scores + torch.where(later(scores).transpose(0, 1), HIDE, 0.0), (), None),
        (lambda scores: scores.masked_fill(later(scores).flip(0), HIDE), (), None),
        (lambda scores: scores.masked_fill(later(scores) & (torch.arange(8) != 3), HIDE), (), None),
    ],
    ids=["scaled", "divided", "uncovered", "raised", "turned", "flipped", "hole"],
)
def test_a_mask_that_hides_not_all_later_keys_is_not_causal(
    mask: Callable[..., Tensor], inputs: tuple[Tensor, ...], reason: str | None
) -> None:
    model, feeds = exported(Near(mask), X, *inputs)
    (found,) = attention_layers(model)
    if reason is None:
        assert isinstance(found, AttentionLayer)
        assert not found.causal
        assert found.window is None
    else:
        assert getattr(found, "reason", None) == reason
    assert view_oracle.attention_complaints(model, feeds)[1] == []


PAST = (torch.randn(2, HEADS, 8, SIZE), torch.randn(2, HEADS, 8, SIZE))


@pytest.mark.parametrize(
    ("join", "kind"),
    [
        (lambda new, past: torch.cat([past, new], 2), "kv"),
        (lambda new, past: torch.cat([past[:, :, 1:], new], 2), "unknown"),
        (lambda new, past: torch.cat([past * 0.5, new], 2), "unknown"),
        (
            lambda new, past: torch.cat([new, past], 2),
            "the keys join two tensors, and no linear layer makes the second",
        ),
    ],
    ids=["kept", "cut", "scaled", "in front"],
)
def test_keys_that_join_others_in_another_way_are_no_known_cache(join: Callable[..., Tensor], kind: str) -> None:
    model, feeds = exported(Near(None, join), X, *PAST)
    (found,) = attention_layers(model)
    assert (found.cache.kind if isinstance(found, AttentionLayer) else found.reason) == kind
    assert view_oracle.attention_complaints(model, feeds)[1] == []


class Streams(Encoder):
    """An encoder whose layers are put together, and read, in other ways."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how

    def forward(self, x: Tensor, *noise: Tensor) -> tuple[Tensor, ...]:
        given, other = [], 2 * x
        for index, block in enumerate(self.blocks):
            first, second = block.norms[:2]
            if self.how == "crossed":
                x = x + block.attention(first(other))
                other = other + block.mlp(second(x))
                continue
            y = block.attention(first(x))
            x = x + y
            x = x + block.mlp(second(x) + (noise[index] if noise else 0.0))
            given.append(y if self.how == "no state" else x)
        return (self.head(self.last(x + other if self.how == "crossed" else x)), *given)


def streams(how: str, *more: Tensor) -> tuple[oir.Model, Arrays, Structure]:
    module = Streams(how)
    del module.words, module.first
    model, feeds = exported(module, X[..., : block_networks.WIDTH], *more)
    model = normal(model)
    return model, feeds, stacks(model)


def test_the_stream_between_two_dropped_blocks_that_is_read_elsewhere_is_the_one_before_both() -> None:
    model, feeds, found = streams("outputs between")
    assert [block.droppable for block in found.blocks] == [True] * 3
    assert view_oracle.block_complaints(model, feeds, most=3) == (7, [])


def test_an_output_that_does_not_depend_on_the_input_beside_it_is_no_state() -> None:
    noise = tuple(torch.randn(2, 8, block_networks.WIDTH) for _ in range(3))
    _, _, found = streams("no state", *noise)
    assert len(found.blocks) == 3
    assert all("no state" in (block.refusal or "") for block in found.blocks)


def test_streams_that_read_each_other_in_turns_are_no_blocks() -> None:
    model, feeds, found = streams("crossed")
    assert found.blocks == []
    assert any("another stream is computed with the same nodes" in one for one in found.missing)
    assert view_oracle.block_complaints(model, feeds) == (0, [])


class Mixture(torch.nn.Module):
    """Four experts of one matrix, two for each token, whose numbers are changed before the matrices are gathered."""

    def __init__(self, change: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.router, self.change = torch.nn.Linear(WIDTH, 4), change
        self.matrices = torch.nn.Parameter(torch.zeros(4, WIDTH, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.reshape(-1, WIDTH)
        numbers = self.change(self.router(tokens).softmax(-1).topk(2)[1])
        return (self.matrices[numbers] @ tokens[:, None, :, None]).sum(1).reshape(x.shape)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda numbers: numbers, ""),
        (lambda numbers: (numbers + 1) % 4, "changes the numbers of the chosen experts"),
        (lambda numbers: 3 - numbers, "changes the numbers of the chosen experts"),
        (lambda numbers: numbers.clamp(0, 2), "changes the numbers of the chosen experts"),
        (lambda numbers: numbers[:, :1], "takes only some of the chosen experts"),
    ],
    ids=["chosen", "next", "opposite", "clamped", "first"],
)
def test_experts_of_other_numbers_than_were_chosen_are_refused(change: Callable[[Tensor], Tensor], reason: str) -> None:
    model, _ = exported(Mixture(change), X)
    for one in (model, normal(model)):
        (found,) = find_experts(one)
        assert isinstance(found, Experts) if not reason else reason in getattr(found, "reason", "")


class Scores(torch.nn.Module):
    """Words, and a product with the same square table, the one way round or the other, of which a part is given."""

    def __init__(self, turned: bool, part: int) -> None:
        super().__init__()
        self.words, self.turned, self.part = torch.nn.Parameter(torch.zeros(WIDTH, WIDTH)), turned, part

    def forward(self, ids: Tensor) -> Tensor:
        x = self.words[ids]
        return (x @ (self.words.t() if self.turned else self.words))[..., : self.part]


@pytest.mark.parametrize("form", [oir.Model.clone, normal], ids=["raw", "normal"])
def test_a_head_that_multiplies_with_the_table_the_wrong_way_round_is_not_tied(
    form: Callable[[oir.Model], oir.Model],
) -> None:
    ids = torch.randint(0, WIDTH, (2, 5))
    for turned in (True, False):
        (found,) = heads(form(exported(Scores(turned, WIDTH + 1), ids)[0]))
        assert isinstance(found, Head)
        assert bool(found.tie) == turned
    (found,) = heads(form(exported(Scores(True, 3), ids)[0]))
    assert getattr(found, "reason", None) == "the output is a part of the scores of a linear layer"


@cache
def attention_base(name: str) -> tuple[onnx.ModelProto, Arrays, Arrays]:
    proto, feeds, _ = attention_modules.export(name)
    return proto, feeds, view_oracle.inner(oir.from_proto(proto), feeds)


@cache
def block_base(form: str) -> tuple[onnx.ModelProto, Arrays, Arrays]:
    module = block_networks.built(Encoder(form))
    inputs = torch.randint(0, 11, (2, 5)), torch.ones(2, 5, dtype=torch.int64)
    axes = {name: {0: "batch", 1: "seq"} for name in ("ids", "mask", "y")}
    model = normal(block_networks.exported(module, inputs, ["ids", "mask"], ["y"], axes))
    feeds = {name: one.numpy() for name, one in zip(("ids", "mask"), inputs, strict=True)}
    return oir.to_proto(model), feeds, view_oracle.inner(model, feeds)


def mutants_of(base: tuple[onnx.ModelProto, Arrays, Arrays], seed: int) -> tuple[onnx.ModelProto, list[str]] | None:
    """A mutant that runs and gives finite numbers, with what was changed."""
    proto, said = mutants.Mutator(base[0], base[2], seed).mutate(1 + seed % 3)
    try:
        outputs = view_oracle.run(proto, base[1])
    except view_oracle.NotRun:
        return None
    finite = all(np.isfinite(one).all() for one in outputs.values() if one.dtype.kind == "f")
    return (proto, said) if finite else None


def check_attention(base: tuple[onnx.ModelProto, Arrays, Arrays], seeds: range, spelled: bool) -> int:
    """Layers that were checked of mutants as they are, or in their normal form."""
    checked = 0
    for seed in seeds:
        mutant = mutants_of(base, seed)
        if mutant is not None:
            model = oir.from_proto(mutant[0])
            count, wrong = view_oracle.attention_complaints(model if spelled else normal(model), base[1])
            assert wrong == [], (seed, mutant[1])
            checked += count
    return checked


def check_blocks(base: tuple[onnx.ModelProto, Arrays, Arrays], seeds: range) -> int:
    """Sets of blocks of mutants that were dropped."""
    checked = 0
    for seed in seeds:
        mutant = mutants_of(base, seed)
        if mutant is not None:
            count, wrong = view_oracle.block_complaints(oir.from_proto(mutant[0]), base[1])
            assert wrong == [], (seed, mutant[1])
            checked += count
    return checked


@pytest.mark.parametrize("name", attention_modules.LAYERS)
def test_attention_layers_of_mutants_are_right_or_refused(name: str) -> None:
    assert check_attention(attention_base(name), range(12), name != "normed") > 0


@pytest.mark.parametrize("form", ["pre", "post", "parallel", "sandwich"])
def test_mutants_without_blocks_compute_what_the_stream_before_them_gives(form: str) -> None:
    assert check_blocks(block_base(form), range(3)) > 0


@pytest.mark.slow
@pytest.mark.parametrize("name", attention_modules.LAYERS)
def test_many_mutants_of_attention_layers(name: str) -> None:
    for spelled in (True, False):
        check_attention(attention_base(name), range(100, 400), spelled)


@pytest.mark.slow
@pytest.mark.parametrize("form", ["pre", "post", "parallel", "sandwich"])
def test_many_mutants_of_blocks(form: str) -> None:
    check_blocks(block_base(form), range(100, 200))
