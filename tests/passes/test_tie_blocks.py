"""Tied blocks: the model is the module whose layers share parameters, and the file holds them once."""

from __future__ import annotations

import copy
from functools import cache
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as oir
import pytest
from block_networks import Cached, Encoder, built, exported, torch
from golden import name_nodes, parse_graph
from laws import OrtRunner
from lossy_laws import check_edits, check_sound, proposals

from burnish.ir.errors import InputError
from burnish.ir.text import text
from burnish.ir.views.blocks import stacks
from burnish.passes import catalog, lossy
from burnish.passes.base import Outcome
from burnish.passes.lossy import Edit, LossyPass
from burnish.passes.pipeline import Pipeline, constant_bytes
from burnish.passes.recipes import NORMAL_FORM

AXES = {"ids": {0: "batch", 1: "seq"}, "mask": {0: "batch", 1: "seq"}, "y": {0: "batch", 1: "seq"}}
IDS = torch.randint(0, 11, (3, 6), generator=torch.Generator().manual_seed(1))
MASK = torch.tensor([[1] * 6, [1] * 4 + [0] * 2, [1] * 5 + [0]])
SKIP_FUSED = ("fuse-norm", "fuse-skip-norm{target=ort-cuda}")
APART = tuple("share-repeats{weights=false}" if one == "share-repeats" else one for one in NORMAL_FORM)
"""The normal form in which equal weights stay two."""


@cache
def encoder(form: str, equal: bool, *more: str) -> tuple[torch.nn.Module, oir.Model]:
    module = built(Encoder(form))
    if equal:
        module.blocks[2] = copy.deepcopy(module.blocks[1])
    model = exported(module, (IDS, MASK), ["ids", "mask"], ["y"], AXES)
    return module, Pipeline([*APART, *more]).rewrite(model).model


def tied(model: oir.Model, pairs: str) -> oir.Model:
    (one,) = catalog.parse(f"tie-blocks{{map={pairs}}}")
    assert isinstance(one, LossyPass)
    return lossy.apply(model, one.asked(model, Outcome("tie-blocks")), [one])[0]


def run(model: oir.Model) -> np.ndarray:
    runner = OrtRunner(model, optimize=False)
    return runner.run({"ids": IDS.numpy(), "mask": MASK.numpy()})["y"]


@pytest.mark.parametrize("more", [(), SKIP_FUSED], ids=["plain", "skip-fused"])
@pytest.mark.parametrize(
    ("form", "pairs"),
    [("pre", "1:0+2:0"), ("post", "1:0+2:0"), ("parallel", "0:2"), ("sandwich", "1:0+2:0"), ("pre", "0:1")],
)
def test_a_tied_model_is_the_module_whose_layers_share(form: str, pairs: str, more: tuple[str, ...]) -> None:
    module, model = encoder(form, False, *more)
    shared = copy.deepcopy(module)
    for taker, donor in (map(int, pair.split(":")) for pair in pairs.split("+")):
        shared.blocks[taker] = shared.blocks[donor]
    after = tied(model, pairs)
    with torch.no_grad():
        np.testing.assert_allclose(run(after), shared(IDS, MASK).numpy(), rtol=1e-4, atol=1e-5)
    own = sum(parameter.nbytes for parameter in module.blocks[0].parameters()) - (
        0 if form == "sandwich" else sum(p.nbytes for n in module.blocks[0].norms[2:] for p in n.parameters())
    )
    unused = sum(p.nbytes for p in module.blocks[0].norms[4].parameters()) if form == "sandwich" else 0
    unused += sum(p.nbytes for p in module.blocks[0].norms[1].parameters()) if form == "parallel" else 0
    assert constant_bytes(model) - constant_bytes(after) == len(pairs.split("+")) * (own - unused)


@pytest.mark.parametrize("more", [(), SKIP_FUSED], ids=["plain", "skip-fused"])
@pytest.mark.parametrize("form", ["pre", "post"])
def test_equal_blocks_give_equal_bits_and_one_copy_on_disk(form: str, more: tuple[str, ...], tmp_path: Path) -> None:
    _, model = encoder(form, True, *more)
    after = tied(model, "2:1")
    np.testing.assert_array_equal(run(after), run(model))
    sizes = []
    for name, one in (("before", model), ("after", after)):
        data = {"save_as_external_data": True, "location": f"{name}.data", "size_threshold": 64}
        onnx.save(oir.to_proto(one), tmp_path / f"{name}.onnx", **data)
        sizes.append((tmp_path / f"{name}.data").stat().st_size)
    assert sizes[0] - sizes[1] == sum(
        value.const_value.nbytes  # type: ignore[union-attr]
        for name, value in model.graph.initializers.items()
        if name not in after.graph.initializers and value.const_value.nbytes >= 64  # type: ignore[union-attr]
    )
    assert text(tied(model, "2:2")) == text(model)


def test_what_is_proposed_keeps_the_laws_and_caches_of_their_own() -> None:
    past = tuple(torch.randn(3, 2, 4, 8) for _ in range(6))
    names, outputs = [f"past.{i}" for i in range(6)], ["y", *(f"present.{i}" for i in range(6))]
    axes = {"ids": AXES["ids"]} | {name: {0: "batch", 2: "past"} for name in names}
    model = exported(built(Cached()), (IDS, *past), ["ids", *names], outputs, axes)
    model = Pipeline(NORMAL_FORM).rewrite(model).model
    (one,) = catalog.parse("tie-blocks")
    assert isinstance(one, LossyPass)
    edits, outcome = proposals(one, model)
    assert [(edit.site, edit.option) for edit in edits] == [
        ("block 1", "weights of block 0"),
        ("block 2", "weights of block 1"),
        ("block 2", "weights of block 0"),
    ]
    assert not outcome.skipped
    check_edits(one, model, edits)
    after = tied(model, "1:0+2:0")
    assert [value.name for value in after.graph.inputs] == [value.name for value in model.graph.inputs]
    ids = {"ids": IDS.numpy()} | {name: one.numpy() for name, one in zip(names, past, strict=True)}
    found = OrtRunner(after, optimize=False).run(ids)
    assert not np.allclose(found["present.0"], found["present.2"])


def test_edits_exclude_each_other_where_they_must() -> None:
    _, model = encoder("pre", False)
    (one, other) = catalog.parse("tie-blocks,remove-blocks")
    assert isinstance(one, LossyPass) and isinstance(other, LossyPass)
    first, second, third = proposals(one, model)[0]  # 1 <- 0, 2 <- 1, 2 <- 0
    drops: list[Edit] = proposals(other, model)[0]
    assert first.claims & second.claims, "a donor cannot take weights itself"
    assert second.claims & third.claims, "a block takes weights once"
    assert not first.claims & third.claims, "two blocks may take the weights of one"
    wanted = {0: (first, third), 1: (first, second), 2: (second, third)}
    for index, drop in enumerate(drops):
        for edit in (first, second, third):
            assert bool(drop.claims & edit.claims) == (edit in wanted[index]), "taker and donor stay"


@pytest.mark.parametrize("spec", ["project-rank{multiple=1}", "tensor-train{force=true}"])
def test_factors_of_a_layer_whose_weights_others_take_are_theirs_too(spec: str) -> None:
    _, model = encoder("pre", False)
    (tie, factor) = catalog.parse(f"tie-blocks,{spec}")
    assert isinstance(tie, LossyPass) and isinstance(factor, LossyPass)
    first, _, second = proposals(tie, model)[0]  # 1 <- 0, 2 <- 0
    taken: frozenset[str] = first.claims | second.claims
    chosen = [first, second]
    for edit in proposals(factor, model)[0]:
        if not edit.claims & taken:
            chosen.append(edit)
            taken |= edit.claims
    assert len(chosen) > 3
    after = lossy.apply(model, chosen, [tie, factor])[0]
    assert constant_bytes(model) - constant_bytes(after) >= sum(edit.savings.bytes for edit in chosen)
    check_sound(tie, model, after)
    (select,) = catalog.parse("select-layers{ranges=0:1+0:1+0:1}")
    assert isinstance(select, LossyPass)
    alone = lossy.apply(model, chosen[2:], [factor])[0]
    thrice = lossy.apply(alone, select.asked(alone, Outcome("select-layers")), [select])[0]
    np.testing.assert_allclose(run(after), run(thrice), rtol=1e-4, atol=1e-5)


REFUSED = {
    "a scale of its own": (
        "a4 = Mul (a3, k)  p = Add (x, a4)",
        "c4 = Mul (c3, l)  q = Add (p, c4)",
        "`l` and `k` are not known to be weights and differ",
    ),
    "another attribute": (
        "a4 = LeakyRelu <alpha = 0.5> (a3)  p = Add (x, a4)",
        "c4 = LeakyRelu <alpha = 0.25> (c3)  q = Add (p, c4)",
        "LeakyRelu `.*` and LeakyRelu `.*` differ",
    ),
    "a table": (
        "a4 = Mul (a3, m)  p = Add (x, a4)",
        "c4 = Mul (c3, n)  q = Add (p, c4)",
        "`n` and `m` are not known to be weights and differ",
    ),
    "another input": (
        "a4 = Mul (a3, u)  p = Add (x, a4)",
        "c4 = Mul (c3, w)  q = Add (p, c4)",
        "one reads `w`, the other `u`",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_no_weight_has_to_be_equal(case: str) -> None:
    first, second, reason = REFUSED[case]
    graph = f"""g (float[4, 4] x, float[4, 4] u, float[4, 4] w) => (float[4, 4] q)
    <float[4, 8] a, float[8, 4] b, float[4, 8] c, float[8, 4] d, float k = {{0.5}}, float l = {{0.25}},
     float[4, 4] m, float[4, 4] n> {{
      a1 = MatMul (x, a)  a2 = Relu (a1)  a3 = MatMul (a2, b)  {first}
      c1 = MatMul (p, c)  c2 = Relu (c1)  c3 = MatMul (c2, d)  {second} }}"""
    model = oir.from_proto(parse_graph(graph))
    name_nodes(model)
    assert len(stacks(model).blocks) == 2
    with pytest.raises(InputError, match=reason):
        tied(model, "1:0")


@pytest.mark.parametrize(
    ("pairs", "reason"),
    [
        ("1", "no list of pairs"),
        ("1:0:2", "no list of pairs"),
        ("1:7", "there is no block 7: the model has 0 to 2"),
        ("1:0+1:2", "a block takes weights twice"),
        ("2:1+1:0", "block 1 takes the weights of another itself"),
    ],
)
def test_maps_that_cannot_be_read(pairs: str, reason: str) -> None:
    _, model = encoder("pre", False)
    with pytest.raises(InputError, match=reason):
        tied(model, pairs)


def test_what_is_tied_stays_tied_when_it_is_healed() -> None:
    from burnish.backends.fx.healing import HealOptions, heal
    from burnish.ir.samples import Sample

    _, model = encoder("pre", False)
    student = tied(model, "2:1")
    random = np.random.default_rng(0)
    ids = random.integers(0, 11, (64, 6))
    samples = [Sample("ids", {"ids": ids, "mask": np.ones_like(ids)})]
    healed = heal(student, model, samples, HealOptions(steps=60, batch=16, rate=5e-3))
    assert healed.improved
    before, after = (stacks(one).blocks for one in (student, healed.model))
    assert set(healed.model.graph.initializers) == set(student.graph.initializers)
    assert constant_bytes(healed.model) == constant_bytes(student) < constant_bytes(model)
    assert [one.hash for one in after] == [one.hash for one in before]
    assert not np.array_equal(run(healed.model), run(student))
