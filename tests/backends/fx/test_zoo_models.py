"""Every model of the zoo in torch: outputs, gradients, and what comes back; the trained ones are fine-tuned.

Slow, and in need of what `tools/research/zoo.py` builds models with: `make test-slow`.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from burnish.tools.research import fx_models, fx_training, zoo

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def built() -> Callable[[str], Path]:
    """Builds a model of the zoo, or finds it."""
    pytest.importorskip(
        "transformers", reason="the zoo is built with transformers and the packages of its requirements"
    )
    return zoo.path


@pytest.mark.parametrize("name", zoo.NAMES)
def test_a_model_runs_trains_and_comes_back(name: str, built: Callable[[str], Path]) -> None:
    row = fx_models.measure(built(name))
    assert "failed" not in row
    assert row["right"] and row["samples"] >= 3 and not row["opaque"]
    assert row["missed"] == []
    assert row["identity"] and row["written"] and row["written_right"]


def test_ten_steps_lower_a_real_loss_in_onnx_runtime(built: Callable[[str], Path]) -> None:
    for name in fx_training.TASKS:
        built(name)
    for row in fx_training.train():
        assert row["onnxruntime"] < 0.5 * row["before"]
        assert row["error"] < 1e-5 and row["written"] == row["parameters"]
