"""What must hold of layers that are written as two factors."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np
import onnx_ir as oir
import pytest
from factor_models import KINDS, error, model_of, outputs, samples_of

from burnish.ir.errors import InputError
from burnish.ir.samples import Sample
from burnish.ir.walk import walk
from burnish.passes import catalog, factors, lossy
from burnish.passes.base import Outcome
from burnish.passes.lossy import Edit, LossyPass
from burnish.passes.pipeline import Pipeline
from burnish.tools.lossy_context import context_for


def proposed(model: oir.Model, samples: Sequence[Sample], **options: object) -> tuple[LossyPass, list[Edit], Outcome]:
    one = catalog.make("project-rank", options)
    assert isinstance(one, LossyPass)
    outcome = Outcome("project-rank")
    return one, one.propose(model, context_for(model, samples), outcome), outcome


def whitened(weight: np.ndarray, moment: np.ndarray, rank: int) -> np.ndarray:
    """SVD-LLM: the truncated SVD of W L, times the inverse of L, with L Lᵀ the moment; L is its symmetric root."""
    energies, directions = np.linalg.eigh(moment)
    kept = energies > 1e-9 * energies[-1]
    root = directions[:, kept] * np.sqrt(energies[kept])
    inverse = (directions[:, kept] / np.sqrt(energies[kept])).T
    left, sizes, right = np.linalg.svd(weight @ root, full_matrices=False)
    return (left[:, :rank] * sizes[:rank]) @ right[:rank] @ inverse


@pytest.mark.parametrize("directions", [30, 12])
@pytest.mark.parametrize("out", [16, 50])
def test_the_projection_is_the_whitened_svd_in_the_metric_of_the_data(out: int, directions: int) -> None:
    rng = np.random.default_rng(out)
    rows = rng.standard_normal((500, directions)) @ (
        rng.standard_normal((directions, 30)) * np.geomspace(1, 0.01, directions)[:, None]
    )
    weight = rng.standard_normal((out, 30))
    moment = rows.T @ rows / len(rows)
    for rank in (1, 5, 11):
        found = factors.basis(weight[None], moment[None], 12)
        first, second = factors.split(weight[None], found, rank)
        ours, theirs = rows @ (second[0] @ first[0]).T, rows @ whitened(weight, moment, rank).T
        assert np.linalg.norm(ours - theirs) <= 1e-6 * np.linalg.norm(theirs)
        np.testing.assert_allclose(np.linalg.norm(first[0], axis=1), np.linalg.norm(second[0], axis=0))
        if directions == 30:
            np.testing.assert_allclose(second[0] @ first[0], whitened(weight, moment, rank), atol=1e-6)


@pytest.mark.parametrize("out", [16, 50])
def test_with_the_unit_moment_the_projection_is_the_truncated_svd(out: int) -> None:
    weight = np.random.default_rng(out).standard_normal((out, 30))
    first, second = factors.split(weight[None], factors.basis(weight[None], np.eye(30)[None], 7), 7)
    left, sizes, right = np.linalg.svd(weight, full_matrices=False)
    np.testing.assert_allclose(second[0] @ first[0], (left[:, :7] * sizes[:7]) @ right[:7], atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("centred", [True, False])
def test_at_full_rank_every_kind_of_layer_computes_what_it_did(kind: str, centred: bool) -> None:
    model = model_of(KINDS[kind])
    copy = model.clone()
    group = [factors.found(node) for node in walk(copy, "MatMul", "Gemm", "Conv")]
    assert all(factors.refusal(copy, layer) is None for layer in group)
    weight = factors.stacked(group)
    groups, out, size = weight.shape
    rng = np.random.default_rng(0)
    rows = rng.standard_normal((groups, 2 * size, size)) + 1
    found = factors.basis(weight, rows.transpose(0, 2, 1) @ rows, min(out, size))
    pair = factors.split(weight, found, min(out, size))
    mean = rows.mean(1).reshape(-1) if centred else None
    factors.write(copy, group, pair, factors.biases(group, weight, pair, mean))
    assert error(model, copy, samples_of(model)) <= 1e-5


@pytest.mark.parametrize("kind", KINDS)
def test_edits_keep_the_mean_of_each_output_and_more_ranks_keep_more(kind: str) -> None:
    model = model_of(KINDS[kind])
    samples = samples_of(model)
    one, edits, _ = proposed(model, samples, multiple=2)
    assert edits
    before = outputs(model, samples)
    alone = [edit for edit in edits if edit.site == edits[0].site]
    errors = []
    for edit in alone:
        changed, _ = lossy.apply(model, [edit], [one])
        errors.append(error(model, changed, samples))
        after = outputs(changed, samples)
        for name, array in before[0].items():
            axis = 1 if "Conv" in kind else array.ndim - 1
            means = [
                np.concatenate([np.moveaxis(o[name], axis, -1).reshape(-1, array.shape[axis]) for o in some]).mean(0)
                for some in (before, after)
            ]
            np.testing.assert_allclose(*means, atol=1e-4)
    assert all(after <= before + 1e-6 for before, after in itertools.pairwise(errors))


@pytest.mark.parametrize("kind", ["MatMul", "MatMul and Add", "Conv", "Conv with groups"])
def test_no_other_basis_changes_the_outputs_less_at_the_same_rank(kind: str) -> None:
    model = model_of(KINDS[kind])
    rng = np.random.default_rng(1)
    samples = [
        Sample(one.name, {"x": (one.feeds["x"] * np.exp(rng.standard_normal(one.feeds["x"].shape))).astype(np.float32)})
        for one in samples_of(model)
    ]
    errors = {}
    for basis in ("data", "activation", "weight"):
        one, edits, _ = proposed(model, samples, multiple=3, ranks=1, basis=basis)
        errors[basis] = error(model, lossy.apply(model, edits, [one])[0], samples)
    assert errors["data"] == min(errors.values())
    assert len(set(errors.values())) == 3


@pytest.mark.parametrize("kind", ["MatMul", "MatMul and Add"])
@pytest.mark.parametrize("centred", [True, False])
def test_data_of_few_directions_need_that_many_ranks_and_lose_nothing(kind: str, centred: bool) -> None:
    model = model_of(KINDS[kind])
    width = 24 if kind == "MatMul" else 40
    rng = np.random.default_rng(0)
    spread = rng.standard_normal((6, width))
    samples = [Sample("one", {"x": (rng.standard_normal((100, 7, 6)) @ spread).astype(np.float32)})]
    one, edits, _ = proposed(model, samples, policy="energy", share=1 - 1e-6, multiple=1, centred=centred)
    assert [edit.option for edit in edits] == ["rank 6"]
    assert error(model, lossy.apply(model, edits, [one])[0], samples) <= 1e-6


def test_what_a_normalization_multiplies_the_outputs_by_counts_as_if_it_were_in_the_weight() -> None:
    model = model_of(
        "g (float[N, 6, 9, 9] x) => (float[N, 20, 9, 9] y) <float[20, 6, 3, 3] w, float[20] scale, float[20] shift, "
        "float[20] mean, float[20] var> { c = Conv <pads = [1, 1, 1, 1]> (x, w)  "
        "y = BatchNormalization (c, scale, shift, mean, var) }"
    )
    folded = Pipeline(["fold-batchnorm", "drop-unused"]).rewrite(model).model
    samples = samples_of(model)
    changed = []
    for before in (model, folded):
        one, edits, _ = proposed(before, samples, ranks=1)
        changed.append(lossy.apply(before, edits, [one])[0])
    assert error(*changed, samples) <= 1e-5


def test_of_few_rows_the_moment_is_mixed_with_the_unit_matrix_and_of_many_it_is_not() -> None:
    moment = np.diag([4.0, 0.0])[None]
    assert factors.steadied(moment, 21) is moment
    share = 2 / (2 + 10 * 3)
    np.testing.assert_allclose(factors.steadied(moment, 3)[0], np.diag([4 - 2 * share, 2 * share]))
    assert np.trace(factors.steadied(moment, 1)[0]) == pytest.approx(4.0)


def test_padding_has_no_say() -> None:
    model = model_of(
        "g (int64[N, S] mask, float[N, S, 32] x) => (float[N, S, 40] y) <float[32, 40] w, int64[1] last = {2}> "
        "{ a = MatMul (x, w)  f = Cast <to = 1> (mask)  u = Unsqueeze (f, last)  y = Mul (a, u) }"
    )
    rng = np.random.default_rng(0)
    rows = rng.standard_normal((3, 60, 32)).astype(np.float32)
    mask = (np.arange(60) < 50).astype(np.int64)[None].repeat(3, 0)
    found = []
    for junk in (0.0, 100.0):
        feeds = {"mask": mask, "x": np.where(mask[:, :, None] == 1, rows, np.float32(junk))}
        context = context_for(model, [Sample("one", feeds)])
        one = catalog.make("project-rank", {"ranks": 1})
        assert isinstance(one, LossyPass)
        (edit,) = one.propose(model, context, Outcome("project-rank"))
        found.append(edit.payload)
    np.testing.assert_array_equal(found[0]["basis"], found[1]["basis"])
    np.testing.assert_array_equal(found[0]["mean"], found[1]["mean"])


@pytest.mark.parametrize("tolerance", [1e-9, 0.3, 1e9])
def test_validation_takes_the_smallest_rank_that_alone_stays_within_the_tolerance(tolerance: float) -> None:
    model = model_of(KINDS["Conv"])
    samples = samples_of(model)
    grid = {"ranks": 5, "multiple": 2}
    _, edits, outcome = proposed(model, samples, policy="validation", tolerance=tolerance, **grid)
    one, every, _ = proposed(model, samples, **grid)
    near = [edit for edit in every if error(model, lossy.apply(model, [edit], [one])[0], samples) ** 2 <= tolerance]
    assert [edit.option for edit in edits] == [edit.option for edit in near[:1]]
    assert [skip.reason for skip in outcome.skipped] == (
        [] if near else [f"no rank keeps the divergence within {tolerance:g}"]
    )


def test_inputs_that_are_not_finite_are_a_reason() -> None:
    model = model_of(KINDS["MatMul"])
    feeds = {"x": np.full((2, 7, 24), np.inf, np.float32)}
    _, edits, outcome = proposed(model, [Sample("one", feeds)])
    assert not edits
    assert "NaN, infinity" in outcome.skipped[0].reason


@pytest.mark.parametrize("options", [{"ranks": 0}, {"multiple": 0}, {"share": 0.0}, {"share": 1.5}, {"tolerance": 0.0}])
def test_options_that_mean_nothing_are_refused(options: dict[str, object]) -> None:
    with pytest.raises(InputError):
        catalog.make("project-rank", options)
