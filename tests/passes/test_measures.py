"""Measures: what scikit-learn says, what a user would expect of NaN, padding and labels that do not fit."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pytest

from burnish.ir.errors import InputError
from burnish.ir.samples import Sample
from burnish.passes.criticality import Kind, Reading
from burnish.passes.label_measures import Auc, Perplexity, Psnr, Recall
from burnish.passes.measures import Accuracy, Agreement, Cosine, Divergence, Fidelity, RelativeError, spread
from burnish.passes.protocols import Measure
from burnish.passes.sites import Keep

PADDED = Keep("mask", (0, 1))


def look(kind: Kind) -> Reading:
    return Reading("out", kind, "asked for")


def drawn(*shape: int, seed: int = 0, scale: float = 1.0) -> np.ndarray:
    return (np.random.default_rng(seed).normal(size=shape) * scale).astype(np.float32)


def softmax(rows: np.ndarray) -> np.ndarray:
    powers = np.exp(rows - rows.max(-1, keepdims=True))
    return powers / powers.sum(-1, keepdims=True)


def over(
    measure: Measure, found: list[np.ndarray], wanted: list[np.ndarray], labels: Any = None, **feeds: Any
) -> float:
    """The measure over several samples, one for each array."""
    partials = []
    for index, (one, other) in enumerate(zip(found, wanted, strict=True)):
        sample = Sample(f"s{index}", {k: v[index] for k, v in feeds.items()}, None if labels is None else labels[index])
        partials.append(measure.partial({"out": one}, {"out": other}, sample))
    return measure.value(partials)


def halves(array: np.ndarray) -> list[np.ndarray]:
    return [array[:7], array[7:]]


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


MEASURES: list[tuple[Measure, float]] = [
    (Divergence(look("logits")), 0.0),
    (Divergence(look("values")), 0.0),
    (RelativeError(), 0.0),
    (Fidelity(), 1.0),
    (Agreement(look("logits")), 1.0),
    (Cosine(look("values")), 1.0),
]


@pytest.mark.parametrize(("measure", "best"), MEASURES)
@pytest.mark.parametrize("dtype", ["float16", "float32", "float64", "bfloat16"])
def test_the_original_is_exactly_as_good_as_itself(measure: Measure, best: float, dtype: str) -> None:
    import ml_dtypes

    rows = drawn(30, 5, scale=9).astype(ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype)
    assert over(measure, halves(rows), halves(rows)) == best
    assert (over(measure, halves(-rows), halves(rows)) < best) == measure.higher_is_better


@pytest.mark.parametrize(
    "measure", [one for one, _ in MEASURES] + [Agreement(look("chances")), Divergence(look("chances"))]
)
def test_a_model_that_gives_nan_is_as_bad_as_can_be_and_such_an_original_is_refused(measure: Measure) -> None:
    rows = softmax(drawn(8, 4))
    lost = np.full_like(rows, np.nan)
    worst = over(measure, [lost], [rows])
    assert worst in (0.0, -math.inf) if measure.higher_is_better else worst == math.inf
    if not isinstance(measure, RelativeError):
        with pytest.raises(InputError, match="NaN"):
            over(measure, [rows], [lost])


def test_nan_counts_against_a_model_that_has_labels_to_meet() -> None:
    rows, labels = drawn(20, 2), np.arange(20) % 2
    lost = rows.copy()
    lost[::2] = np.nan
    assert over(Accuracy(look("logits")), [lost], [rows], [labels]) <= 0.5
    assert over(Perplexity(look("logits")), [lost], [rows], [labels]) == math.inf
    assert over(Auc(look("logits")), [np.full_like(rows, np.nan)], [rows], [labels]) == 0
    keys = np.concatenate([np.arange(10), -1 - np.arange(10)])
    vectors = np.tile(np.eye(10, dtype=np.float32), (2, 1))
    assert over(Recall(look("values")), [vectors], [vectors], [keys]) == 1
    vectors[0], vectors[15] = np.nan, np.nan
    assert over(Recall(look("values")), [vectors], [vectors], [keys]) == pytest.approx(0.8)
    assert over(Recall(look("values")), [np.full_like(vectors, np.nan)], [vectors], [keys]) == 0


def test_classes_that_are_ruled_out_are_no_nan() -> None:
    rows = drawn(8, 4)
    rows[:, 3] = -np.inf
    assert over(Divergence(look("logits")), [rows], [rows]) == 0
    other = rows.copy()
    other[:, 0] += 1
    assert 0 < over(Divergence(look("logits")), [other], [rows]) < 1
    other[:, 1] = -np.inf
    assert over(Divergence(look("logits")), [other], [rows]) == math.inf
    assert over(RelativeError(), [rows], [rows]) == 0


def test_a_probability_that_was_rounded_to_nothing_costs_no_more_than_its_dtype_resolves() -> None:
    one, two = np.array([[1.0, 0.0, 1e-6]], np.float32), np.array([[1.0, 1e-6, 0.0]], np.float32)
    assert over(Divergence(look("probabilities")), [two], [one]) < 1e-3
    assert over(Divergence(look("chances")), [np.ones(3, np.float32)], [np.full(3, 1 - 1e-6, np.float32)]) < 1e-4


@pytest.mark.parametrize("measure", [Divergence(look("logits")), Agreement(look("logits")), Divergence(look("values")),
                                     RelativeError({"out": PADDED}), Cosine(look("values"))])  # fmt: skip
def test_what_is_in_rows_of_padding_does_not_matter(measure: Any) -> None:
    if not isinstance(measure, RelativeError):
        measure = type(measure)(measure.look, PADDED)
    rows, mask = drawn(3, 5, 4), np.array([[0, 0, 1, 1, 1], [1, 1, 1, 1, 0], [1, 1, 1, 1, 1]])
    other = rows + 0.1 * drawn(3, 5, 4, seed=1)
    junk = np.where(mask[..., None] == 0, np.nan, other)
    assert over(measure, [junk], [rows], mask=[mask]) == over(measure, [other], [rows], mask=[mask])
    assert over(measure, [other], [np.where(mask[..., None] == 0, np.nan, rows)], mask=[mask]) < math.inf


def test_labels_of_padding_may_be_anything() -> None:
    rows, mask = drawn(2, 4, 3), np.array([[0, 1, 1, 1], [1, 1, 1, 0]])
    labels = np.where(mask == 1, rows.argmax(-1), 77)
    assert over(Accuracy(look("logits"), PADDED), [rows], [rows], [labels], mask=[mask]) == 1
    assert over(Perplexity(look("logits"), PADDED), [rows], [rows], [labels], mask=[mask]) < math.inf


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


def measured(measure: Measure, rows: np.ndarray, labels: Any = None, **feeds: np.ndarray) -> float:
    return measure.value([measure.partial({"out": rows}, {"out": rows}, Sample("s", feeds, labels))])


@pytest.mark.parametrize(
    ("measure", "labels", "cause"),
    [
        (Accuracy(look("logits")), None, "no labels"),
        (Recall(look("values")), None, "no labels"),
        (Auc(look("logits")), None, "no labels"),
        (Perplexity(look("logits")), None, "no labels"),
        (Accuracy(look("logits")), np.zeros(3, int), r"the labels have the shape \[3\]"),
        (Accuracy(look("logits")), np.zeros((4, 2), int), r"the labels have the shape \[4, 2\]"),
        (Accuracy(look("logits")), np.array([0, 1, np.nan, 0]), "no whole numbers"),
        (Accuracy(look("logits")), np.array([0, 1, 0.5, 0]), "no whole numbers"),
        (Accuracy(look("logits")), np.array(["a", "b", "c", "d"]), "no whole numbers"),
        (Accuracy(look("logits")), np.array([0, 1, 2, 0]), "the label 2 is none of the 2 classes"),
        (Accuracy(look("logits")), np.array([0, 1, -1, 0]), "the label -1 is none of the 2 classes"),
        (Accuracy(look("logits")), np.full(4, -100), "nothing to measure"),
        (Auc(look("logits")), np.ones(4, int), "all labels are the same"),
        (Recall(look("values")), np.arange(4), "name no query, or no document"),
        (Psnr(look("values")), np.zeros(4), r"the labels have the shape \[4\]"),
        (Psnr(look("values")), np.zeros((4, 2)), "the same"),
        (Psnr(look("values")), np.full((4, 2), np.nan), "NaN"),
    ],
)
def test_labels_that_do_not_fit(measure: Measure, labels: Any, cause: str) -> None:
    with pytest.raises(InputError, match=cause) as caught:
        measured(measure, drawn(4, 2), labels)
    assert caught.value.place or caught.value.hint or "nothing to measure" in caught.value.cause or "same" in cause


def test_bool_and_whole_floating_point_labels_are_class_numbers() -> None:
    rows = drawn(4, 2)
    for dtype in (bool, np.uint8, np.int32, np.float32):
        assert measured(Accuracy(look("logits")), rows, rows.argmax(1).astype(dtype)) == 1


def test_outputs_that_cannot_be_measured() -> None:
    with pytest.raises(InputError, match="no classes to agree on"):
        measured(Agreement(look("logits")), drawn(4, 1))
    with pytest.raises(InputError, match="takes two"):
        measured(Auc(look("logits")), drawn(4, 3), np.array([0, 1, 0, 1]))
    with pytest.raises(InputError, match="no output of floating point"):
        measured(RelativeError(), np.arange(4))
    with pytest.raises(InputError, match="are not the rows"):
        measured(Perplexity(look("logits"), ids="ids"), drawn(4, 3), ids=np.zeros((4, 9), int))
    with pytest.raises(InputError, match="another shape|the shape"):
        Divergence(look("logits")).partial({"out": drawn(4, 2)}, {"out": drawn(4, 3)}, Sample("s", {}))
    with pytest.raises(InputError, match="gives no array"):
        Accuracy(look("logits")).partial({}, {}, Sample("s", {}, np.zeros(1, int)))
    for measure in (Divergence(look("logits")), Agreement(look("logits")), RelativeError(), Cosine(look("values"))):
        with pytest.raises(InputError, match="no samples"):
            measure.value([])


def test_empty_outputs() -> None:
    empty = np.zeros((0, 4), np.float32)
    kinds: tuple[Kind, ...] = ("logits", "values", "chances", "probabilities")
    for measure in (*(Divergence(look(kind)) for kind in kinds), RelativeError(), Cosine(look("values"))):
        with pytest.raises(InputError, match="nothing to measure"):
            measured(measure, empty)
        assert over(measure, [empty, empty + 1, drawn(2, 4)], [empty, empty + 1, drawn(2, 4)]) in (0.0, 1.0)
    assert measured(RelativeError(), np.zeros((2, 4))) == 0


def test_the_spread_is_the_standard_error_of_a_mean_and_pairs_the_models() -> None:
    rng = np.random.default_rng(0)
    measure = Agreement(look("logits"))
    original = [(float(right), 1.0, 1) for right in rng.integers(0, 2, 10)]
    edited = [(float(right), 1.0, 1) for right in rng.integers(0, 2, 10)]
    differences = [after[0] - before[0] for after, before in zip(edited, original, strict=True)]
    expected = np.std(differences, ddof=1) / math.sqrt(10)
    assert spread(measure, original, edited) == pytest.approx(expected)
    assert spread(measure, original, original) == 0
    many = [(float(right), 1.0, 1) for right in rng.integers(0, 2, 5000)]
    some = [(float(right), 1.0, 1) for right in rng.integers(0, 2, 5000)]
    assert spread(measure, many, some) == pytest.approx(math.sqrt(0.5 / 5000), rel=0.6)


def test_a_spread_that_cannot_be_told_is_infinite() -> None:
    measure = Auc(look("chances"))
    assert spread(Agreement(look("logits")), [(1.0, 2.0, 2)], [(1.0, 2.0, 2)]) == math.inf
    one, two = (np.array([0.5]), np.array([True])), (np.array([0.4]), np.array([False]))
    assert spread(measure, [one, two], [one, two]) == math.inf
    assert spread(Divergence(look("logits")), [(0.0, 1.0, 1)] * 3, [(math.inf, 1.0, 1)] * 3) == math.inf


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


ODD = [(), (3,), (3, 1), (3, 2), (3, 4), (0, 4), (3, 0), (2, 3, 4)]


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64", "bfloat16", "int64", "bool"])
def test_whatever_the_arrays_hold_the_result_is_a_number_or_a_reason(dtype: str) -> None:
    import ml_dtypes

    kind = ml_dtypes.bfloat16 if dtype == "bfloat16" else np.dtype(dtype)
    for shape, bad in itertools.product(ODD, (0, 1, np.nan, np.inf, -np.inf, 1e300)):
        with np.errstate(over="ignore", invalid="ignore"):
            array = (drawn(*shape) * 3).astype(kind) if shape else np.asarray(drawn(1)[0]).astype(kind)
            spoilt = array.copy()
            if spoilt.size and not (kind in (np.int64, np.bool_) and not abs(bad) <= 1):
                spoilt.reshape(-1)[0] = bad
        lead = shape[:-1]
        labels = [None, np.zeros(lead, int), np.zeros(shape, int), np.arange(math.prod(lead)).reshape(lead) % 2,
                  np.full(lead, np.nan), np.full(lead, -100), np.array("x"), np.zeros(7)]  # fmt: skip
        measures: list[Any] = [RelativeError(), Fidelity()]
        kinds: tuple[Kind, ...] = ("logits", "probabilities", "chances", "values")
        for read in kinds:
            types = (Divergence, Agreement, Accuracy, Cosine, Psnr, Recall, Auc, Perplexity)
            measures += [one(look(read)) for one in types]
        for measure, label, (one, two) in itertools.product(measures, labels, [(array, spoilt), (spoilt, array)]):
            try:
                found = over(measure, [one], [two], None if label is None else [label])
                assert isinstance(found, float) and not math.isnan(found)
            except InputError as error:
                assert error.cause
