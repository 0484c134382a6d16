"""The machine's ceilings are measured for what can be multiplied."""

from __future__ import annotations

from burnish.backends.ort.machine import measure


def test_ceilings_are_positive_and_only_for_what_is_multiplied() -> None:
    found = measure(["float32", "int64", "uint8", "float32", ""], seconds=0.05)
    assert set(found.flops) == {"float32", "uint8"}
    assert min(found.flops.values()) > 1e8
    assert found.bandwidth > 1e8
    assert 0 <= found.call < 1e-3 and 0 <= found.probe < 1e-3
