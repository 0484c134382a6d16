"""The lock of a model holds what the model is, and nothing of its names and its order."""

from __future__ import annotations

from pathlib import Path

import pytest

from burnish.frontends import onnx_file
from burnish.tools.check import lock_file
from burnish.tools.check.take import Request, take

DEMO = Path(__file__).resolve().parents[3] / "tools" / "demo"


@pytest.mark.parametrize("name", ["digits_resnet", "digits_vit"])
def test_a_lock_taken_again_is_the_same_and_so_is_its_file(name: str, tmp_path: Path) -> None:
    path = DEMO / f"{name}.onnx"
    first = take(onnx_file.read(path), Request())
    assert take(onnx_file.read(path), Request(), first) == first
    lock_file.write(first, tmp_path / "a.lock.yaml")
    assert lock_file.read(tmp_path / "a.lock.yaml") == first
