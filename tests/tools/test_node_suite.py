"""Every test of the onnx package that ONNX Runtime runs is correct after every recipe, and no pass raises."""

from __future__ import annotations

import pytest

from burnish.tools.research import node_tests

LEAST = {"node": 1500, "simple": 15, "pytorch-operator": 20, "pytorch-converted": 55, "light": 9}
"""At least so many cases run in ONNX Runtime before any rewrite; the exact number depends on its version."""


@pytest.mark.slow
def test_every_case_stays_correct() -> None:
    counts = node_tests.measure()
    assert [wrong for count in counts.values() for wrong in count.wrong] == []
    for group, least in LEAST.items():
        assert counts[group].run >= least
        assert counts[group].correct == counts[group].asked
        assert list(counts[group].asked.values()).count(counts[group].run) >= 3


def test_a_case_travels_the_whole_way() -> None:
    counts = node_tests.measure("test_layer_normalization_4d_axis1_expanded")
    (count,) = counts.values()
    assert count.run == 2
    assert count.wrong == []
    assert all(count.changed.values())
