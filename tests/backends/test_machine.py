"""The machine's ceilings are measured for what can be multiplied."""

from __future__ import annotations

import os

import pytest

from burnish.backends.ort.machine import disturbance, measure


def test_ceilings_are_positive_and_only_for_what_is_multiplied() -> None:
    found = measure(["float32", "int64", "uint8", "float32", ""], seconds=0.05)
    assert set(found.flops) == {"float32", "uint8"}
    assert min(found.flops.values()) > 1e8
    assert found.bandwidth > 1e8
    assert 0 <= found.call < 1e-3 and 0 <= found.probe < 1e-3


def test_other_work_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: 4)
    monkeypatch.setattr(os, "getloadavg", lambda: (3.2, 0.0, 0.0))
    assert disturbance(1) == ""
    assert disturbance(2) == "other work runs here (load 3.2 on 4 processors), which makes all times longer"
