"""The onnx package's own cases in torch: all are right, or stand in the table of reasons."""

from __future__ import annotations

import warnings

import pytest

from burnish.tools.research import fx_nodes, node_tests


@pytest.fixture(scope="module")
def cases() -> list[tuple[str, node_tests.Case]]:
    """All cases with expected outputs, with their operators."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return [(name, case) for name, case in fx_nodes.grouped(node_tests.cases()) if case.group != "light"]


@pytest.mark.parametrize("constant", [False, True], ids=["fed", "constant"])
def test_every_case_is_right_or_has_a_reason(cases: list[tuple[str, node_tests.Case]], constant: bool) -> None:
    right, excused, wrong = 0, set(), []
    for name, case in cases:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            verdict = fx_nodes.judge(node_tests.with_constants(case) if constant else case, None)
        if verdict.word == fx_nodes.RIGHT:
            right += 1
            continue
        culprit, why = fx_nodes.excuse(name, verdict)
        if why is None:
            wrong.append((case.name, verdict))
        excused.add(culprit)
    assert not wrong
    assert right >= 1944
    assert set(fx_nodes.REASONS) <= excused
