"""The user's metric: a number of all outputs and labels, and every way in which it can go wrong."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from burnish.frontends.measures import UserMeasure, user_measure
from burnish.ir.errors import InputError
from burnish.ir.samples import Sample
from burnish.passes.measures import spread
from burnish.passes.protocols import Measure

SAMPLES = [Sample(f"s{i}", {}, np.array([i % 2])) for i in range(6)]
OUTPUTS = [{"y": np.array([[0.1 * i, 0.3]], np.float32)} for i in range(6)]


def partials(measure: Measure, samples: list[Sample] = SAMPLES) -> list[Any]:
    return [measure.partial(outputs, outputs, sample) for outputs, sample in zip(OUTPUTS, samples, strict=True)]


def asked(function: Any, samples: list[Sample] = SAMPLES) -> float:
    measure = user_measure(function)
    return measure.value(partials(measure, samples))


def accuracy(outputs: list[dict[str, np.ndarray]], labels: list[Any]) -> float:
    return float(np.mean([one["y"].argmax(-1) == label for one, label in zip(outputs, labels, strict=True)]))


def test_a_function_is_asked_about_all_outputs_and_labels_in_order() -> None:
    measure: Measure = user_measure(accuracy)
    assert (measure.name, measure.higher_is_better) == ("accuracy", True)
    expected = np.mean([(0.1 * i <= 0.3) == (i % 2) for i in range(6)])
    assert measure.value(partials(measure)) == expected
    assert 0 <= spread(measure, partials(measure), partials(measure), range(6)) < 1e-12


def test_a_function_is_found_by_name_and_says_which_way_is_better(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "own_metric.py").write_text(
        "def loss(outputs, labels):\n    return sum(float(one['y'].sum()) for one in outputs)\n"
        "loss.higher_is_better = False\n"
        "def odd(outputs, labels):\n    return 1\nodd.higher_is_better = 'no'\n"
        "number = 3\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    measure = user_measure("own_metric:loss")
    assert (measure.name, measure.higher_is_better) == ("own_metric:loss", False)
    assert measure.value(partials(measure)) == pytest.approx(3.3)
    for spec, cause in (
        ("own_metric:los", "no function `los`"),
        ("own_metric:number", "no function `number`"),
        ("own_metrics:loss", "cannot be imported"),
        ("own_metric:odd", "`higher_is_better` is 'no'"),
        ("own_metric", "no name of a function"),
        ("own metric:loss", "no name of a function"),
    ):
        with pytest.raises(InputError, match=cause):
            user_measure(spec)
    with pytest.raises(InputError, match="is no metric"):
        user_measure(3)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "number",
    [
        *(1, True, 0.5, np.float32(2), np.array(3.0), np.array([4]), np.int8(5), np.bool_(True)),
        np.array([[ml_dtypes.bfloat16(6)]]),
    ],
)
def test_numbers_of_any_kind_are_taken(number: Any) -> None:
    found = asked(lambda outputs, labels: number)
    assert type(found) is float and found == float(np.asarray(number).reshape(-1)[0])


@pytest.mark.parametrize(
    ("returned", "cause"),
    [
        (math.nan, "returned nan"),
        (np.float64("inf"), "returned inf"),
        (None, "returned NoneType, not a number"),
        ("0.5", "returned str, not a number"),
        (1j, "returned complex, not a number"),
        (np.complex64(1), "returned complex64, not a number"),
        ([0.5], "returned list, not a number"),
        ({"accuracy": 0.5}, "returned dict, not a number"),
        (np.zeros(3), r"of shape \[3\], not a number"),
        (np.zeros(0), r"of shape \[0\], not a number"),
        (10**400, "not a number"),
    ],
)
def test_anything_else_is_refused(returned: Any, cause: str) -> None:
    with pytest.raises(InputError, match=cause) as caught:
        asked(lambda outputs, labels: returned)
    assert caught.value.exit_code == 2 and caught.value.place and caught.value.hint


def test_what_the_function_raises_is_said() -> None:
    def fails(outputs: Any, labels: Any) -> float:
        return float(labels[0] + outputs["y"])

    def leaves(outputs: Any, labels: Any) -> float:
        raise SystemExit(3)

    with pytest.raises(InputError, match="the function failed: TypeError: list indices") as caught:
        asked(fails)
    assert caught.value.place == "metric `fails`" and isinstance(caught.value.__cause__, TypeError)
    with pytest.raises(InputError, match="SystemExit: 3"):
        asked(leaves)
    bare = [*SAMPLES[:5], Sample("bare", {})]
    with pytest.raises(InputError, match="TypeError") as caught:
        asked(lambda outputs, labels: sum(int(label) for label in labels), bare)
    assert "no labels" in str(caught.value.hint)
    with pytest.raises(InputError, match="takes 0 positional arguments"):
        asked(lambda: 0.0)
    with pytest.raises(InputError, match="no samples"):
        user_measure(accuracy).value([])


def test_a_function_cannot_change_what_it_is_asked_about() -> None:
    def shifts(outputs: list[dict[str, np.ndarray]], labels: list[Any]) -> float:
        for one in outputs:
            one["y"] -= one["y"].max()
        return 0.0

    def drops(outputs: list[dict[str, np.ndarray]], labels: list[Any]) -> float:
        labels.clear()
        return float(len([one.pop("y") for one in outputs]))

    with pytest.raises(InputError, match="read-only") as caught:
        asked(shifts)
    assert "copy" in str(caught.value.hint)
    measure = UserMeasure("drops", drops)
    kept = partials(measure)
    assert measure.value(kept) == measure.value(kept) == 6


def test_scores_are_kept_under_a_key_that_tells_one_metric_from_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(tmp_path))
    keys = set()
    for name, number in (("first", 1), ("first", 1), ("second", 2)):
        (tmp_path / f"metric_{name}.py").write_text(f"def metric(outputs, labels):\n    return {number}\n")
        keys.add(user_measure(f"metric_{name}:metric").key.partition(" | ")[2])
    assert len(keys) == 2
    bound = 3
    assert user_measure(accuracy).key == user_measure(accuracy).key
    assert user_measure(lambda o, l: bound).key != user_measure(lambda o, l: bound).key  # noqa: E741
