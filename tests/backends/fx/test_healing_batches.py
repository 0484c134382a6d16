"""What healing holds: activations within a budget, frozen parts computed once, samples cut into rows and batches."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import onnx_ir as oir
import pytest
import torch
from fx_checks import bytes_of, floats, model_of
from healing_checks import QUICK, TIED

from burnish.backends.fx.bridge import bridge_of
from burnish.backends.fx.builder import to_graph_module
from burnish.backends.fx.healing import heal
from burnish.backends.fx.healing_graph import size_of, storages
from burnish.backends.fx.healing_memory import Stretches
from burnish.backends.fx.healing_rows import Batches, joined, rows
from burnish.backends.fx.healing_runs import Frozen, Trained, outputs_of
from burnish.ir.errors import InputError
from burnish.ir.samples import Sample
from burnish.ir.views import blocks


def test_activations_within_a_budget_give_the_same_weights(
    vit: oir.Model, short: oir.Model, samples: list[Sample]
) -> None:
    options = replace(QUICK, steps=4)
    free, tight = (
        bytes_of(heal(short, vit, samples, one).model) for one in (options, replace(options, memory=1_500_000))
    )
    assert free == tight
    with pytest.raises(InputError, match="even with every block computed twice"):
        heal(short, vit, samples, replace(options, memory=1000))


def test_stretches_hold_what_they_promise(vit: oir.Model, samples: list[Sample]) -> None:
    module = to_graph_module(vit)
    marks = {bridge_of(module).values[str(block.exit.name)] for block in blocks.stacks(vit).blocks}
    image = torch.from_numpy(samples[0].feeds["image"])
    sizes = []
    for budget in (1 << 40, 14_000_000):
        stretches = Stretches(module, marks)
        expected = stretches.fit([image], budget)
        held: list[torch.Tensor] = []

        def keep(one: torch.Tensor, held: list[torch.Tensor] = held) -> torch.Tensor:
            held.append(one)
            return one

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda one: one):
            (found,) = stretches(image)
        sizes.append(size_of(held, storages(module)))
        torch.testing.assert_close(found, module(image)[0])
        assert sizes[-1] <= expected <= budget
    assert 0 < sizes[1] < 0.6 * sizes[0]


def test_what_is_frozen_before_the_weights_is_computed_once(vit: oir.Model, samples: list[Sample]) -> None:
    module = to_graph_module(vit)
    node = next(node for node in reversed(module.graph.nodes) if node.op == "get_attr")
    wanted = outputs_of(module, ["logits"])
    last = Trained(module, wanted, {str(node.target)}, 1 << 30, {}, {})
    assert len(list(last.behind.graph.nodes)) < 0.2 * len(list(module.graph.nodes))
    (expected,) = module(torch.from_numpy(samples[0].feeds["image"]))
    torch.testing.assert_close(last(samples[0], 0)["logits"], expected)
    other = Sample("other", {"image": samples[0].feeds["image"] * 0})
    torch.testing.assert_close(last(other, 0)["logits"], expected)
    assert not torch.allclose(last(other, 1)["logits"], expected)
    for limit in (0, 1 << 30):
        frozen = Frozen(module, wanted, None, limit, 1)
        torch.testing.assert_close(frozen(samples[0], 0)["logits"], expected)
        assert torch.allclose(frozen(other, 0)["logits"], expected) == bool(limit)


def test_large_outputs_are_computed_again_from_the_last_stream(vit: oir.Model, samples: list[Sample]) -> None:
    module = to_graph_module(vit)
    name = bridge_of(module).values[str(blocks.stacks(vit).blocks[-1].exit.name)]
    end = next(node for node in module.graph.nodes if node.name == name)
    frozen = Frozen(module, outputs_of(module, ["logits"]), end, 1 << 30, 1 << 30)
    (expected,) = module(torch.from_numpy(samples[0].feeds["image"]))
    for _ in range(3):
        torch.testing.assert_close(frozen(samples[0], 0)["logits"], expected)


def test_samples_are_cut_into_rows_and_put_together() -> None:
    model = model_of(TIED)
    texts = [Sample(str(n), {"ids": np.full((2, n), n)}, np.arange(2)) for n in (3, 3, 5)]
    found, joins = rows(texts, model)
    assert joins and [(one.feeds["ids"].shape, one.labels.tolist()) for one in found] == [
        ((1, n), [k]) for n in (3, 3, 5) for k in (0, 1)
    ]
    assert [(one.feeds["ids"].shape, one.labels.tolist()) for one in joined(found)] == [
        ((4, 3), [0, 1, 0, 1]),
        ((2, 5), [0, 1]),
    ]
    whole, joins = rows([replace(texts[0], labels=np.arange(6))], model)
    assert not joins and len(whole) == 1
    fixed = model_of("g (float[2, 4] x) => (float[2, 4] y) { y = Relu (x) }")
    assert not rows([Sample("s", {"x": floats(2, 4)})], fixed)[1]


def test_every_row_is_in_one_batch_and_every_batch_has_its_turn() -> None:
    model = model_of("g (float[N, 1] x) => (float[N, 1] y) { y = Relu (x) }")
    sample = Sample("s", {"x": np.arange(23, dtype=np.float32)[:, None]})
    parts = [Batches([sample], model, 4, 0.2, 7, rank, 3) for rank in range(3)]
    batches = [[one.feeds["x"] for part in parts for batch in (*part.training, *part.held_out) for one in batch]]
    assert sorted(np.concatenate(batches[0])[:, 0]) == list(range(23))
    count = len(parts[0].training)
    assert [sorted(parts[0].at(step) for step in range(start, start + count)) for start in (0, count)] == [
        list(range(count))
    ] * 2
