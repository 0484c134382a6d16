"""The onnx package's own cases in torch: all are right, or stand in the table of reasons."""

from __future__ import annotations

import warnings

import pytest
from fx_checks import node_cases

from burnish.tools.research import fx_cases, fx_gradients, node_tests

ROUGH = {
    "test_averagepool_2d_ceil_last_window_starts_on_pad",
    "test_gridsample_bicubic",
    "test_roialign_aligned_false",
    "test_roialign_aligned_true",
}
"""The cases whose expected numbers are given with few digits; all others are within 1e-6 of the largest number."""


@pytest.fixture(scope="module")
def cases() -> list[tuple[str, node_tests.Case]]:
    """All cases."""
    return node_cases()


def _judged(cases: list[tuple[str, node_tests.Case]]) -> tuple[int, set[str]]:
    """How many are right, and the operators because of which others are not; nothing is wrong or without a reason."""
    right, excused, rough, wrong = 0, set(), set(), []
    for name, case in cases:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            verdict = fx_cases.judge(case, None)
        if verdict.word == fx_cases.RIGHT:
            right += 1
            if verdict.error > fx_cases.FINE:
                rough.add(case.name)
            continue
        culprit, why = fx_cases.excuse(name, verdict)
        if why is None:
            wrong.append((case.name, verdict))
        excused.add(culprit)
    assert wrong == []
    assert rough <= ROUGH
    return right, excused


def _held(cases: list[tuple[str, node_tests.Case]]) -> list[tuple[str, node_tests.Case]]:
    return [(name, node_tests.with_constants(case)) for name, case in cases]


def test_every_case_is_right_or_has_a_reason(cases: list[tuple[str, node_tests.Case]]) -> None:
    right, excused = _judged(cases)
    assert right >= 1944
    assert set(fx_cases.REASONS) <= excused


def test_so_is_a_sample_with_its_inputs_as_constants(cases: list[tuple[str, node_tests.Case]]) -> None:
    right, _ = _judged(_held(cases[::4]))
    assert right > 450


@pytest.mark.slow
def test_so_is_every_case_with_its_inputs_as_constants(cases: list[tuple[str, node_tests.Case]]) -> None:
    right, _ = _judged(_held(cases))
    assert right >= 1944


def _disagreeing(cases: list[tuple[str, node_tests.Case]]) -> tuple[int, list[tuple[str, fx_gradients.Slope]]]:
    found = list(fx_gradients.slopes(cases))
    compared = [(case.name, slope) for _, case, slope in found if slope.error is not None]
    return len(compared), [(name, slope) for name, slope in compared if not slope.agrees]


def test_gradients_agree_with_finite_differences_in_a_sample(cases: list[tuple[str, node_tests.Case]]) -> None:
    compared, wrong = _disagreeing(cases[::10])
    assert wrong == []
    assert compared > 100


@pytest.mark.slow
def test_gradients_agree_with_finite_differences(cases: list[tuple[str, node_tests.Case]]) -> None:
    compared, wrong = _disagreeing(cases)
    assert wrong == []
    assert compared > 1250
