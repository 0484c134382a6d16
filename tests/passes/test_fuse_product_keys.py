"""`fuse-product-keys` finds the lookup in what torch exports; the rows that are read stay, ties included."""

from __future__ import annotations

from collections import Counter
from itertools import product
from pathlib import Path

import numpy as np
import onnx_ir as oir
import pytest
from laws import OrtRunner, check_laws, check_same_outputs, rewrite
from product_keys import exported

from burnish.ir import edit
from burnish.ir.views.product_keys import ProductKeys, best_pairs, product_keys
from burnish.ir.walk import walk
from burnish.passes import catalog, lossy, recipes
from burnish.passes.base import Outcome
from burnish.passes.pipeline import Pipeline
from burnish.tools.research.zoo_memory import STYLES

_QUICK = {(style, "torchscript") for style in STYLES} | {("divided", "dynamo")}
_WAYS = [
    pytest.param(*way, marks=() if way in _QUICK else pytest.mark.slow)
    for way in product(STYLES, ("dynamo", "torchscript"))
]


def _only(model: oir.Model) -> ProductKeys:
    (found,) = product_keys(model)
    assert isinstance(found, ProductKeys)
    return found


@pytest.mark.parametrize(("style", "exporter"), _WAYS)
def test_the_lookup_is_found_in_every_spelling_and_rows_are_the_same_where_scores_are_equal(
    style: str, exporter: str, tmp_path: Path
) -> None:
    before = exported(style, exporter, tmp_path, ties=True)
    found = _only(before)
    assert (found.heads, found.outer.keys, found.inner.keys, found.lists, found.kept) == (2, 16, 16, (8, 8), 8)
    assert found.rows is not None and found.rows.late == (style == "divided")
    assert found.table == (256, 24)
    rows = found.rows.value
    before.graph.outputs.extend([rows, found.anchor.outputs[0]])
    rows.shape, found.anchor.outputs[0].shape = oir.Shape(["n", 2, 8]), oir.Shape(["n", 2, 8])
    names = [value.name for value in before.graph.outputs]
    x = np.random.default_rng(1).integers(-2, 3, (3, 5, 32)).astype(np.float32)
    x[:, 0] = 0  # all scores are equal
    feeds = {before.graph.inputs[0].name: x}
    expected = OrtRunner(before, optimize=True).run(feeds)
    sums = np.sort(expected[names[2]].reshape(-1, 8))
    assert (np.diff(sums) == 0).any(1).mean() > 0.8
    for target in ("onnx", "ort-cpu"):
        one = catalog.make("fuse-product-keys", {"target": target})
        after, outcome = rewrite(one, before)
        assert outcome.rewritten == (0 if target == "onnx" and style == "divided" else 1), outcome.skipped
        given = OrtRunner(after, optimize=True).run(feeds)
        for name in names:
            assert np.array_equal(given[name], expected[name]), (target, name)


@pytest.mark.parametrize(
    ("style", "exporter"),
    [
        ("expanded", "torchscript"),
        ("stacked", "torchscript"),
        ("weighted", "torchscript"),
        ("bag", "torchscript"),
        ("bag", "dynamo"),
    ],
)
def test_by_the_default_recipe_every_spelling_becomes_one(style: str, exporter: str, tmp_path: Path) -> None:
    before = exported(style, exporter, tmp_path)
    run = Pipeline(recipes.named("default", "ort-cpu", None)).rewrite(before)
    used = Counter(node.op_type for node in walk(run.model))
    assert not used.keys() & {"Einsum", "ReduceSum", "Loop", "Unsqueeze", "Div", "Mod"}, used
    assert (used["TopK"], used["Gather"] - 4 * (style == "stacked")) == (2 + (style != "stacked"), 3), used
    check_same_outputs(before, run.model)


def test_the_table_is_stored_in_few_bits_and_still_summed_up_by_one_product(tmp_path: Path) -> None:
    before = exported("expanded", "torchscript", tmp_path)
    edit.name_nodes(before)
    (weights,) = catalog.parse("quantize-weights{bits=8}")
    stored, _ = lossy.apply(before, weights.asked(before, Outcome("weights")), [weights])
    found = _only(stored)
    assert [node.op_type for node in found.tables] == ["GatherBlockQuantized"] and found.table == (256, 24)
    after, outcome = rewrite(catalog.make("fuse-embedding-bag"), stored)
    assert outcome.rewritten == 1
    check_same_outputs(stored, after)
    feeds = {before.graph.inputs[0].name: np.random.default_rng(0).standard_normal((2, 3, 32)).astype(np.float32)}
    expected, given = (next(iter(OrtRunner(one, True).run(feeds).values())) for one in (before, after))
    assert np.linalg.norm(given - expected) < 0.02 * np.linalg.norm(expected)


def test_the_whole_layer_is_as_before(tmp_path: Path) -> None:
    before = exported("expanded", "torchscript", tmp_path)
    one = catalog.make("fuse-product-keys", {"target": "ort-cpu"})
    after, outcome = rewrite(one, before)
    assert len(walk(after)) < len(walk(before))
    check_laws(one, before, after, outcome)


@pytest.mark.parametrize(("first", "second", "kept"), [(8, 8, 8), (5, 9, 7), (4, 4, 11), (32, 32, 32), (3, 3, 9)])
def test_no_other_pair_is_ever_among_the_largest(first: int, second: int, kept: int) -> None:
    random = np.random.default_rng(first)
    chosen = {tuple(pair) for pair in best_pairs(first, second, kept).tolist()}
    used = set()
    for _ in range(300):
        v, w = (np.sort(random.integers(0, 4, size) / 3.0)[::-1] for size in (first, second))
        order = np.argsort(-(v[:, None] + w[None]).reshape(-1), kind="stable")[:kept]
        used |= {(int(at) // second, int(at) % second) for at in order}
    for i, j in chosen:  # each of them is needed: all before it are equal, all others smaller
        v, w = (np.arange(first) <= i) - 1.0 - (np.arange(first) > i), (np.arange(second) <= j) - 1.0
        order = np.argsort(-(v[:, None] + w[None]).reshape(-1), kind="stable")[:kept]
        used |= {(int(at) // second, int(at) % second) for at in order}
    assert used == chosen
