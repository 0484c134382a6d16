"""Some of the changes of docs/results/check.md: each is named in the first sentence, and nothing else is told of."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("torch")
pytest.importorskip("onnxscript")

from burnish.tools.check.difference import Verdict  # noqa: E402
from burnish.tools.research.check_cases import row, run  # noqa: E402
from burnish.tools.research.check_changes import Case, cases  # noqa: E402

QUICK = [
    "image encoder: TorchScript at opset 18 instead of 17",
    "text: a layer more",
    "text, opset 14: the epsilon of a norm of layer 2 is 1e-6",
    "ResNet: the epsilon of a BatchNorm is 1e-6",
    "text: the same with the old model at hand",
    "ResNet: a weight of block 2 moved by 1e-3",
    "text: half the scale of the scores in layer 1",
    "ResNet: BatchNorm left in training mode",
    "text: one output more",
    "text: weights stored twice",
    "image: exported again, other names and order",
]
LISTED = {case.title: case for part in cases().values() for case in part}


@pytest.mark.parametrize("title", QUICK)
def test_a_change_is_named_first(title: str, tmp_path: Path) -> None:
    case: Case = LISTED[title]
    result = run(case, tmp_path)
    assert result.right, row(title, result.report, "no")
    if not case.says:
        assert not result.report.differences
    assert all(one.verdict is not Verdict.TOLERATED for one in result.report.differences)


def test_every_case_of_the_page_has_its_own_title() -> None:
    assert len(LISTED) == sum(map(len, cases().values())) >= 40
