"""What is written through the views of exported graphs is what they then read, and the models still run."""

from dataclasses import fields

import numpy as np
import onnx_ir as oir
import pytest

from burnish.backends.ort import session
from burnish.frontends.synthesis import synthesise, usable
from burnish.ir.views.attention_layer import AttentionLayer, Heads, attention_layers
from burnish.ir.views.embedding import Head, heads, token_embedding
from burnish.passes import recipes
from burnish.passes.pipeline import Pipeline
from burnish.tools.research import structures, zoo_families, zoo_truth

FAST = ("dynp", "eager-ort", "dynp-fuse", "")
"""Flavours that are written in every run."""


def marks(name):
    flavour = zoo_families.FILES[name][1] if name in zoo_families.FILES else ""
    return [] if flavour in FAST and "smollm2" not in name else [pytest.mark.slow]


def cases(wanted):
    return [pytest.param(name, marks=marks(name)) for name in structures.names() if wanted(zoo_truth.of(name))]


def normal(name):
    return Pipeline(recipes.NORMAL_FORM).rewrite(oir.from_proto(structures.load(name))).model


def layers_of(model):
    return [one for one in attention_layers(model) if isinstance(one, AttentionLayer)]


def same(one, other):
    pairs = [(getattr(one, field.name), getattr(other, field.name)) for field in fields(Heads)]
    return all((a is None) == (b is None) and (a is None or np.allclose(a, b, 1e-5, 1e-6)) for a, b in pairs)


def runs(model):
    runner = session.executor(level="basic", lean=True)(model)
    try:
        kept, _ = usable(synthesise(model, settings=1)[:3], runner)
        return all(np.isfinite(output).all() for output in runner.run(kept[0].feeds).values())
    finally:
        runner.close()


@pytest.mark.parametrize("name", cases(lambda truth: truth.attention))
def test_attention_weights_are_written_where_they_are_read(name):
    model = normal(name)
    before = [one.read() for one in layers_of(model)]
    layer = layers_of(model)[1]
    random = np.random.default_rng(0)
    found = {field.name: getattr(before[1], field.name) for field in fields(Heads)}
    changed = Heads(
        **{
            key: None if array is None else array * random.uniform(0.5, 1.0, array.shape)
            for key, array in found.items()
        }
    )
    if any(linear is not None and linear.read_only for linear in (layer.query, layer.key, layer.value, layer.output)):
        pytest.skip("the weights can only be read")
    layer.write(model, changed)
    after = [one.read() for one in layers_of(model)]
    assert same(after[1], changed)
    assert not same(after[1], before[1])
    assert all(same(one, other) for at, (one, other) in enumerate(zip(after, before, strict=True)) if at != 1)
    assert runs(model)


@pytest.mark.parametrize("name", cases(lambda truth: truth.embedding and truth.head))
def test_a_head_is_written_and_the_embedding_keeps_its_table(name):
    model = normal(name)
    embedding, (head,) = token_embedding(model), [one for one in heads(model) if isinstance(one, Head)]
    assert embedding is not None
    table = embedding.read()
    if head.linear.read_only:
        pytest.skip("the weights can only be read")
    weight, bias = head.linear.weight() / 2, head.linear.bias()
    head.write(model, weight, bias)
    (again,) = [one for one in heads(model) if isinstance(one, Head)]
    assert np.allclose(again.linear.weight(), weight, 1e-6)
    assert again.tie == ""
    found = token_embedding(model)
    assert found is not None
    assert np.array_equal(found.read(), table)
    assert runs(model)
