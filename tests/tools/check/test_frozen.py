"""Lock files of older versions are still read, and still match their models."""

from __future__ import annotations

from pathlib import Path

import pytest

from burnish.frontends import onnx_file
from burnish.tools.check import lock_file
from burnish.tools.check.check import check
from burnish.tools.check.difference import Verdict
from burnish.tools.check.lock import VERSION
from burnish.tools.check.take import Request

FROZEN = Path(__file__).parent / "frozen"
DEMO = Path(__file__).parents[3] / "tools" / "demo"
LOCKS = sorted(FROZEN.glob("*.lock.yaml"))


@pytest.mark.parametrize("path", LOCKS, ids=lambda path: path.stem)
def test_an_older_lock_still_matches_its_model(path: Path) -> None:
    name = path.name.split("-")[0]
    model = onnx_file.read((DEMO if name.startswith("digits") else FROZEN) / f"{name}.onnx")
    lock = lock_file.read(path)
    data = DEMO / "digits.npz" if lock.samples is not None and lock.samples.given else None
    report = check(model, lock, Request(data=data))
    assert report.passed, [one.message for one in report.regressions]
    assert not [one.message for one in report.differences if one.verdict is not Verdict.NOTE]
    assert report.new.values


@pytest.mark.parametrize("form", range(1, VERSION + 1))
def test_there_are_frozen_locks_of_every_form(form: int) -> None:
    assert {path.name for path in LOCKS} >= {
        f"{name}-{form}.lock.yaml" for name in ("digits_resnet", "digits_vit", "attention")
    }
