"""Measures: what scikit-learn and scipy say, and what the definition says."""

from __future__ import annotations

import math

import numpy as np
import pytest
from measuring import MEASURES, PADDED, drawn, halves, look, over, softmax

from burnish.ir.samples import Sample
from burnish.passes.criticality import Kind, Reading
from burnish.passes.label_measures import Auc, Perplexity, Psnr
from burnish.passes.measures import Accuracy, Agreement, Cosine, Divergence, Fidelity, RelativeError, spread
from burnish.passes.protocols import Measure
from burnish.passes.sites import Keep


def test_accuracy_is_that_of_scikit_learn() -> None:
    from sklearn.metrics import accuracy_score

    rows, labels = drawn(50, 4), np.random.default_rng(1).integers(0, 4, 50)
    expected = accuracy_score(labels, rows.argmax(1))
    assert over(Accuracy(look("logits")), halves(rows), halves(rows), halves(labels)) == pytest.approx(expected)
    assert over(Accuracy(look("values")), halves(rows), halves(rows), halves(labels[:, None])) == pytest.approx(
        expected
    )


@pytest.mark.parametrize("kind", ["chances", "logits"])
def test_accuracy_of_one_number_a_row(kind: Kind) -> None:
    from sklearn.metrics import accuracy_score

    rows, labels = drawn(50, 1), np.random.default_rng(1).integers(0, 2, 50)
    shown = 1 / (1 + np.exp(-rows)) if kind == "chances" else rows
    expected = accuracy_score(labels, rows[:, 0] > 0)
    assert over(Accuracy(look(kind)), halves(shown), halves(shown), halves(labels)) == pytest.approx(expected)


def test_accuracy_of_many_chances_counts_each_or_takes_the_largest() -> None:
    chances = 1 / (1 + np.exp(-drawn(9, 3)))
    each = np.random.default_rng(1).integers(0, 2, (9, 3))
    assert over(Accuracy(look("chances")), [chances], [chances], [each]) == np.mean((chances > 0.5) == each)
    one = np.random.default_rng(1).integers(0, 3, 9)
    assert over(Accuracy(look("chances")), [chances], [chances], [one]) == np.mean(chances.argmax(1) == one)


@pytest.mark.parametrize("kind", ["logits", "probabilities"])
def test_perplexity_is_the_exponential_of_the_log_loss(kind: Kind) -> None:
    from sklearn.metrics import log_loss

    rows, labels = drawn(50, 5, scale=3), np.random.default_rng(1).integers(0, 5, 50)
    chances = softmax(rows.astype(np.float64))
    shown = rows if kind == "logits" else chances
    expected = math.exp(log_loss(labels, chances, labels=range(5)))
    found = over(Perplexity(look(kind)), halves(shown), halves(shown), halves(labels))
    assert found == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("kind", ["chances", "logits", "probabilities", "one"])
def test_the_area_under_the_curve_is_that_of_scikit_learn(kind: str) -> None:
    from sklearn.metrics import roc_auc_score

    rng = np.random.default_rng(1)
    scores, labels = np.round(drawn(60, 1), 1), rng.integers(0, 2, 60)
    expected = roc_auc_score(labels, scores[:, 0])
    shown: dict[str, tuple[np.ndarray, Kind]] = {
        "chances": (1 / (1 + np.exp(-scores[:, 0])), "chances"),
        "logits": (np.concatenate([0 * scores, scores], 1), "logits"),
        "probabilities": (softmax(np.concatenate([0 * scores, scores], 1)), "probabilities"),
        "one": (scores, "logits"),
    }
    array, read = shown[kind]
    assert over(Auc(look(read)), halves(array), halves(array), halves(labels)) == pytest.approx(expected, rel=1e-12)


def test_divergence_is_the_kl_divergence_of_scipy() -> None:
    from scipy.special import log_softmax
    from scipy.stats import entropy

    one, two = drawn(40, 6, scale=4), drawn(40, 6, seed=1, scale=4)
    expected = np.mean(entropy(np.exp(log_softmax(one, 1)), np.exp(log_softmax(two, 1)), axis=1))
    assert over(Divergence(look("logits")), halves(two), halves(one)) == pytest.approx(expected, rel=1e-5)
    pair = [softmax(rows.astype(np.float64)) for rows in (one, two)]
    assert over(Divergence(look("probabilities")), [pair[1]], [pair[0]]) == pytest.approx(expected, rel=1e-5)
    chances = [rows[:, :2] / rows[:, :2].sum(1, keepdims=True) for rows in pair]
    expected = np.mean(entropy(*chances, axis=1))
    assert over(Divergence(look("chances")), [chances[1][:, 0]], [chances[0][:, 0]]) == pytest.approx(
        expected, rel=1e-9
    )


def test_small_divergences_keep_their_digits_and_grow_with_the_square() -> None:
    rows, noise = drawn(20, 1000, scale=3).astype(np.float64), drawn(20, 1000, seed=1).astype(np.float64)
    small, large = (over(Divergence(look("logits")), [rows + size * noise], [rows]) for size in (1e-5, 1e-3))
    assert large / small == pytest.approx(1e4, rel=0.02)


def test_wide_rows_are_looked_at_in_blocks() -> None:
    from scipy.special import log_softmax

    rows, labels = drawn(70, 49152, scale=3), np.random.default_rng(1).integers(0, 49152, 70)
    logs = log_softmax(rows.astype(np.float64), 1)
    expected = math.exp(-logs[np.arange(70), labels].mean())
    assert over(Perplexity(look("logits")), [rows], [rows], [labels]) == pytest.approx(expected, rel=1e-7)
    other = rows[::-1]
    expected = (np.exp(logs) * (logs - logs[::-1])).sum(1).mean()
    assert over(Divergence(look("logits")), [other], [rows]) == pytest.approx(expected, rel=1e-7)


@pytest.mark.parametrize(("measure", "best"), MEASURES)
@pytest.mark.parametrize("dtype", ["float16", "float32", "float64", "bfloat16"])
def test_the_original_is_exactly_as_good_as_itself(measure: Measure, best: float, dtype: str) -> None:
    import ml_dtypes

    rows = drawn(30, 5, scale=9).astype(ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype)
    assert over(measure, halves(rows), halves(rows)) == best
    assert (over(measure, halves(-rows), halves(rows)) < best) == measure.higher_is_better


def test_perplexity_shifts_identifiers_and_leaves_padding_out() -> None:
    from scipy.special import log_softmax

    rows, ids = drawn(2, 5, 7), np.random.default_rng(1).integers(0, 7, (2, 5))
    mask = np.array([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])
    logs = log_softmax(rows.astype(np.float64), -1)
    picked = [logs[0, t, ids[0, t + 1]] for t in (2, 3)] + [logs[1, t, ids[1, t + 1]] for t in range(4)]
    measure = Perplexity(look("logits"), PADDED, "ids")
    expected = pytest.approx(math.exp(-np.mean(picked)), rel=1e-9)
    assert over(measure, [rows], [rows], ids=[ids], mask=[mask]) == expected
    assert over(measure, [rows], [rows], [ids], ids=[ids], mask=[mask]) == expected
    assert over(measure, [rows], [rows], [np.where(mask == 1, ids, -100)], ids=[ids], mask=[mask]) == expected
    following = np.concatenate([ids[:, 1:], np.full((2, 1), -100)], 1)
    following[0, :2] = -100
    assert over(measure, [rows], [rows], [following], ids=[ids], mask=[mask]) == expected


def test_psnr_is_that_of_the_definition_and_finite_for_the_original() -> None:
    image, wanted = drawn(2, 3, 8, 8), drawn(2, 3, 8, 8, seed=1)
    expected = 10 * math.log10(float(np.ptp(wanted)) ** 2 / float(np.square(image - wanted).mean()))
    measure = Psnr(look("values"))
    assert over(measure, list(image), list(image), list(wanted)) == pytest.approx(expected, rel=1e-6)
    assert over(measure, list(image), list(wanted)) == pytest.approx(expected, rel=1e-6)
    assert over(measure, [wanted], [wanted]) == pytest.approx(138.47, abs=0.01)
    assert over(measure, [wanted * np.nan], [wanted]) == -math.inf


def test_cosine_and_relative_error_by_hand() -> None:
    one, two = np.array([[3.0, 4.0], [1.0, 0.0]]), np.array([[3.0, 4.0], [0.0, 1.0]])
    assert over(Cosine(look("values")), [two], [one]) == 0.5
    assert over(RelativeError(), [two], [one]) == pytest.approx(math.sqrt(2 / 26))
    assert over(Divergence(look("values")), [two], [one]) == pytest.approx(2 / 26)
    assert over(Divergence(look("logits")), [two[:, :1]], [one[:, :1]]) == pytest.approx(1 / 10)


def test_relative_error_is_that_of_the_worst_output() -> None:
    measure, sample = RelativeError(), Sample("s", {})
    original = {"a": drawn(3, 4) * 1e6, "b": drawn(3, 4, seed=1), "index": np.arange(3)}
    edited = original | {"b": original["b"] * 1.5, "index": np.zeros(3, int)}
    assert measure.value([measure.partial(edited, original, sample)]) == pytest.approx(0.5)


def test_the_spread_is_the_standard_error_of_a_mean_and_pairs_the_models() -> None:
    rng = np.random.default_rng(0)
    measure = Agreement(look("logits"))
    original = [(float(right), 1.0, 1) for right in rng.integers(0, 2, 10)]
    edited = [(float(right), 1.0, 1) for right in rng.integers(0, 2, 10)]
    differences = [after[0] - before[0] for after, before in zip(edited, original, strict=True)]
    expected = np.std(differences, ddof=1) / math.sqrt(10)
    assert spread(measure, original, edited, range(10)) == pytest.approx(expected)
    assert spread(measure, original, original, range(10)) == 0
    many = [(float(right), 1.0, 1) for right in rng.integers(0, 2, 5000)]
    some = [(float(right), 1.0, 1) for right in rng.integers(0, 2, 5000)]
    assert spread(measure, many, some, range(5000)) == pytest.approx(math.sqrt(0.5 / 5000), rel=0.6)


def test_the_spread_is_that_of_groups_whose_samples_are_alike() -> None:
    rng = np.random.default_rng(0)
    measure = Agreement(look("logits"))
    groups = rng.permutation(np.repeat(np.arange(10), 24)).tolist()
    right = rng.integers(0, 2, (2, 10))
    original, edited = ([(float(row[group]), 1.0, 1) for group in groups] for row in right)
    expected = np.std(right[1] - right[0], ddof=1) / math.sqrt(10)
    assert spread(measure, original, edited, groups) == pytest.approx(expected)
    assert spread(measure, original, edited, range(240)) < expected / 2
    assert spread(measure, original, edited, [0] * 240) == math.inf


def test_keys_tell_measures_apart() -> None:
    other = Reading("other", "logits", "asked for")
    measures = [
        *(
            kind(one, keep)
            for kind in (Agreement, Divergence)
            for one in (look("logits"), other)
            for keep in (None, PADDED)
        ),
        *(Perplexity(look("logits"), ids=ids) for ids in (None, "ids")),
        *(RelativeError(keeps) for keeps in (None, {"out": PADDED}, {"out": Keep("mask", (0, 1), kept=0)})),
        Fidelity(),
    ]
    assert len({one.key for one in measures}) == len(measures)
    assert Divergence(look("values")).key == Divergence(look("values")).key != Divergence(look("logits")).key
