"""Meters read what the system counts; energy is what a call takes above idle, and the break-even follows exactly."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from burnish.backends import energy, meters

SPAN = 65_532_610_987


def zone(root: Path, folder: str, name: str, energy_uj: int = 0) -> Path:
    path = root / folder
    path.mkdir(parents=True)
    (path / "name").write_text(f"{name}\n")
    (path / "max_energy_range_uj").write_text(f"{SPAN}\n")
    (path / "energy_uj").write_text(f"{energy_uj}\n")
    return path


@pytest.fixture
def powercap(tmp_path: Path) -> Path:
    """A machine of two sockets, one of them with a counter of its memory, as Linux lays it out."""
    (tmp_path / "intel-rapl").mkdir()
    zone(tmp_path, "intel-rapl:0", "package-0", 5)
    zone(tmp_path, "intel-rapl:0:0", "core", 3)
    zone(tmp_path, "intel-rapl:0:1", "dram", SPAN - 9)
    zone(tmp_path, "intel-rapl:1", "package-1", 7)
    zone(tmp_path, "intel-rapl:2", "psys", 1000)
    zone(tmp_path, "intel-rapl-mmio:0", "package-0", 5)
    return tmp_path


def use(zone: Path, microjoules: int) -> None:
    file = zone / "energy_uj"
    file.write_text(str((int(file.read_text()) + microjoules) % (SPAN + 1)))


def test_packages_and_their_memory_are_counted_once_and_counters_run_over(powercap: Path) -> None:
    meter = meters.rapl(powercap)
    assert meter.name == "RAPL: package-0, dram-0, package-1"
    for folder, used in (("intel-rapl:0", 2_000_000), ("intel-rapl:0:0", 1_500_000), ("intel-rapl:2", 9_000_000)):
        use(powercap / folder, used)
    use(powercap / "intel-rapl:0:1", 1_000_000)  # over its end
    assert meter.joules() == pytest.approx(3.0)
    use(powercap / "intel-rapl:1", 500_000)
    assert meter.joules() == pytest.approx(3.5)


@pytest.mark.parametrize(
    ("spoil", "cause"),
    [
        (lambda root: (root / "intel-rapl:0" / "energy_uj").write_text("many"), "holds no number"),
        (lambda root: (root / "intel-rapl:1" / "max_energy_range_uj").unlink(), "cannot be read"),
    ],
)
def test_a_counter_that_cannot_be_read_is_no_meter(spoil: Callable[[Path], object], cause: str, powercap: Path) -> None:
    spoil(powercap)
    with pytest.raises(meters.MeterMissing, match=cause):
        meters.rapl(powercap)


def test_without_counters_there_is_no_meter(tmp_path: Path) -> None:
    with pytest.raises(meters.MeterMissing, match="no RAPL counter"):
        meters.rapl(tmp_path)


def test_energy_per_call_and_break_even_are_exact(powercap: Path) -> None:
    package = powercap / "intel-rapl:0"
    actions = [lambda: use(package, 5000), lambda: use(package, 2000)]
    (first, second), idle = energy.measured(actions, meters.rapl(powercap), seconds=0.05)
    assert idle == 0
    for found, joules in ((first, 5e-3), (second, 2e-3)):
        assert found.joules == pytest.approx(joules, rel=1e-9)
        assert found.low == pytest.approx(joules, rel=1e-9) and found.high == pytest.approx(joules, rel=1e-9)
    number, reason = energy.break_even(30.0, first, second)
    assert number == pytest.approx(10_000, rel=1e-6) and not reason


def test_what_the_machine_uses_while_idle_is_taken_off() -> None:
    import time

    class Clock:
        name = "100 W all the time"

        def joules(self) -> float:
            return 100 * time.perf_counter()

    (found,), idle = energy.measured([lambda: time.sleep(0.001)], Clock(), seconds=0.2)
    assert idle == pytest.approx(100, rel=0.01)
    assert abs(found.joules) < 0.02 * 100 * found.seconds


def test_equal_models_tie_and_a_dearer_one_never_pays() -> None:
    def of(joules: float) -> energy.Use:
        return energy.Use(joules, 0.98 * joules, 1.02 * joules, 1.0, 12)

    assert energy.break_even(1.0, of(1.0), of(0.99)) == (None, "the two cannot be told apart")
    assert energy.break_even(1.0, of(1.0), of(2.0)) == (None, "it takes more energy for each use")
    assert energy.break_even(0.0, of(2.0), of(1.0)) == (0.0, "")


def test_an_estimate_is_the_power_times_the_time() -> None:
    import time

    (found,) = energy.estimated([lambda: time.sleep(0.002)], 10.0, seconds=0.2)
    assert found.joules == pytest.approx(10 * found.seconds) and 0.02 <= found.joules < 0.2
    slow, quick = energy.estimated([lambda: time.sleep(0.004), lambda: time.sleep(0.001)], 10.0, seconds=0.3)
    number, _ = energy.break_even(1.0, slow, quick)
    assert number == pytest.approx(1 / (slow.joules - quick.joules))


@pytest.mark.gpu
def test_the_counter_of_a_gpu_runs() -> None:
    import time

    meter = meters.nvml()
    time.sleep(1)
    assert 5 < meter.joules() < 1000
