"""Heads of layers whose queries, keys and values are slices of one matrix, their own or one of two layers."""

from __future__ import annotations

import numpy as np
import pytest
from lossy_laws import check_edits, proposals
from packed_attention import graph, output
from pooled_heads import heads_of, parsed

from burnish.passes import catalog, lossy
from burnish.passes.base import ExactPass, Outcome
from burnish.passes.lossy import LossyPass


@pytest.mark.parametrize("options", ["groups=2,how=mean", "groups=2", "groups=1"])
@pytest.mark.parametrize(
    ("rows", "second"),
    [
        ("q=0 k=16 v=32", ""),
        ("q=0 k=16 v=32", "q=48 k=64 v=80"),
        ("q=64 k=0 v=80", "q=48 k=16 v=32"),
        ("q=0 k=16 v=32", "q=48 k=k v=v"),
    ],
)
def test_packed_layers_become_what_they_become_apart(rows: str, second: str, options: str) -> None:
    one, found = parsed(options), []
    for apart in (False, True):
        model = graph(one, rows, second, apart)
        edits = one.asked(model, Outcome(""))
        after, _ = lossy.apply(model, edits, [one])
        assert set(heads_of(after)) == {int(options[7])}
        found.append(output(after))
        for edit in edits:
            check_edits(one, model, [edit])
        check_edits(one, model, *proposals(one, model))
    np.testing.assert_allclose(found[0], found[1], atol=1e-4 * float(np.abs(found[1]).max()))


@pytest.mark.parametrize(
    ("rows", "second"),
    [
        ("q=0 k=8 v=32", ""),
        ("q=0 k=24 v=32", ""),
        ("q=0 k=0 v=32", ""),
        ("q=0 k=16 v=16", ""),
        ("q=0 k=16 v=0", ""),
        ("q=0 k=16 v=32", "q=0 k=48 v=64"),
        ("q=0 k=16 v=32", "q=24 k=48 v=64"),
        ("q=0 k=16 v=32", "q=0 k=k v=v"),
        ("q=0 k=16 v=32", "q=k k=k v=v"),
        ("q=0 k=16 v=32", "q=48 k=k v=80"),
    ],
)
def test_rows_of_two_kinds_are_told_and_stay(rows: str, second: str) -> None:
    outcome = Outcome("")
    assert not parsed("groups=2").asked(graph(parsed("groups=2"), rows, second), outcome)
    told = ("that make others, too", "as well", "layers with other values read its keys")
    assert outcome.skipped and all(any(why in skip.reason for why in told) for skip in outcome.skipped)


def test_a_layer_whose_queries_are_keys_of_the_layer_whose_keys_it_reads_stays() -> None:
    outcome = Outcome("")
    assert not parsed("groups=2").asked(graph(parsed("groups=2"), "q=0 k=16 v=32", "q=k k=k v=v", apart=True), outcome)
    assert "that make others, too" in outcome.skipped[0].reason


@pytest.mark.parametrize(
    ("rows", "second", "changed"),
    [
        ("q=0 k=16 v=32", "q=48 k=64 v=80", 4),
        ("q=0 k=16 v=32", "q=24 k=48 v=64", 0),
        ("q=0 k=16 v=32", "q=48 k=16 v=64", 0),
        ("q=0 k=16 v=16", "q=48 k=64 v=80", 2),
    ],
)
def test_scales_of_two_layers_that_share_a_matrix_change_nothing(rows: str, second: str, changed: int) -> None:
    one, outcome = catalog.make("scale-pairs"), Outcome("")
    assert isinstance(one, ExactPass)
    model = graph(one, rows, second)
    before = output(model)
    one.rewrite(model, outcome)
    assert outcome.rewritten == changed
    np.testing.assert_allclose(output(model), before, atol=1e-5 * float(np.abs(before).max()))


@pytest.mark.parametrize("second", ["q=48 k=v v=k", "q=48 k=80 v=v", "q=48 k=64 v=64"])
@pytest.mark.parametrize("apart", [False, True])
def test_sharing_beside_what_is_shared_already_saves_what_it_says(second: str, apart: bool) -> None:
    one = catalog.make("share-kv")
    assert isinstance(one, LossyPass)
    model = graph(one, "q=0 k=16 v=32", second, apart)
    check_edits(one, model, *proposals(one, model))
