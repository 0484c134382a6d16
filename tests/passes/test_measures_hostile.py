"""Measures of what no user means to give: NaN, classes ruled out, padding, empty arrays, labels that do not fit."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pytest
from measuring import MEASURES, PADDED, drawn, look, measured, over, softmax

from burnish.ir.errors import InputError
from burnish.ir.samples import Sample
from burnish.passes.criticality import Kind
from burnish.passes.label_measures import Auc, Perplexity, Psnr, Recall
from burnish.passes.measures import Accuracy, Agreement, Cosine, Divergence, Fidelity, RelativeError, spread
from burnish.passes.protocols import Measure


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


def test_a_spread_that_cannot_be_told_is_infinite() -> None:
    measure = Auc(look("chances"))
    assert spread(Agreement(look("logits")), [(1.0, 2.0, 2)], [(1.0, 2.0, 2)], [0]) == math.inf
    one, two = (np.array([0.5]), np.array([True])), (np.array([0.4]), np.array([False]))
    assert spread(measure, [one, two], [one, two], [0, 1]) == math.inf
    assert spread(Divergence(look("logits")), [(0.0, 1.0, 1)] * 3, [(math.inf, 1.0, 1)] * 3, range(3)) == math.inf


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
