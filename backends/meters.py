"""Meters of energy: counters that a processor or a GPU keeps of the joules it has used.

A meter measures the whole device, whoever uses it: what it used while idle has to be taken off, and nothing else may
run meanwhile.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

POWERCAP = Path("/sys/class/powercap")


class Meter(Protocol):
    """A counter of joules.

    Attributes:
        name: what it measures, for reports.
    """

    name: str

    def joules(self) -> float:
        """Joules used since the meter was made; call it more often than its counters run over (minutes)."""
        ...


class MeterMissing(Exception):
    """There is no such meter, or it cannot be read; the text says why."""


@dataclass
class _Zone:
    """One counter of the powercap file system, in microjoules, which begins anew at 0 after `span`."""

    path: Path
    name: str
    span: int
    last: int = 0
    used: int = 0

    def read(self) -> int:
        now = _number(self.path / "energy_uj")
        self.used += (now - self.last) % self.span
        self.last = now
        return self.used


@dataclass
class Rapl:
    """The counters of processors (RAPL), as Linux shows them in `/sys/class/powercap`.

    Counted are the packages of all sockets and, where it has a counter, the memory beside each; cores and graphics are
    parts of the package. A counter that runs over is followed as long as it is read once a round.
    """

    zones: list[_Zone]
    name: str = field(init=False)

    def __post_init__(self) -> None:
        self.name = f"RAPL: {', '.join(zone.name for zone in self.zones)}"

    def joules(self) -> float:
        """Joules of all counted zones since the meter was made."""
        return sum(zone.read() for zone in self.zones) * 1e-6


def rapl(root: Path | None = None) -> Rapl:
    """The processor's counters below `root`, `POWERCAP` when None.

    Raises:
        MeterMissing: there are none, or they cannot be read.
    """
    root = POWERCAP if root is None else root
    zones = []
    for path in sorted(root.glob("intel-rapl:*")):  # AMD's processors have theirs under the same name
        parts = path.name.split(":")[1:]
        name = _text(path / "name")
        package = len(parts) == 1 and name.startswith("package")
        if package or (len(parts) == 2 and name == "dram"):
            shown = name if package else f"dram-{parts[0]}"
            zones.append(_Zone(path, shown, _number(path / "max_energy_range_uj") + 1, _number(path / "energy_uj")))
    if not zones:
        raise MeterMissing(f"there is no RAPL counter of a package in {root}")
    return Rapl(zones)


def _text(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError as error:
        hint = "; energy counters are for root alone on most systems" if isinstance(error, PermissionError) else ""
        raise MeterMissing(f"{path} cannot be read: {error.strerror}{hint}") from error


def _number(path: Path) -> int:
    text = _text(path)
    if not text.isdecimal():
        raise MeterMissing(f"{path} holds no number")
    return int(text)


class Nvml:
    """The counter of a GPU, read through NVIDIA's management library; GPUs have it from the Volta generation on."""

    def __init__(self, library: Any, handle: Any, name: str) -> None:
        self._library, self._handle = library, handle
        self._start = self._read()
        self.name = f"NVML: {name}"

    def _read(self) -> int:
        return int(self._library.nvmlDeviceGetTotalEnergyConsumption(self._handle))

    def joules(self) -> float:
        """Joules of the whole GPU since the meter was made."""
        return (self._read() - self._start) * 1e-3


def nvml() -> Nvml:
    """The counter of the first GPU that CUDA uses (`CUDA_VISIBLE_DEVICES`).

    Raises:
        MeterMissing: the package `nvidia-ml-py`, the driver, the GPU or its counter is missing.
    """
    try:
        import pynvml
    except ImportError as error:
        raise MeterMissing("NVML needs the package nvidia-ml-py (pip install 'burnish[energy]')") from error
    try:
        pynvml.nvmlInit()
        chosen = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")[0].strip() or "0"
        by_number = chosen.isdecimal()
        handle = (
            pynvml.nvmlDeviceGetHandleByIndex(int(chosen)) if by_number else pynvml.nvmlDeviceGetHandleByUUID(chosen)
        )
        name = pynvml.nvmlDeviceGetName(handle)
        return Nvml(pynvml, handle, name if isinstance(name, str) else name.decode())
    except pynvml.NVMLError as error:
        raise MeterMissing(f"NVML: {error}") from error


def meter_of(target: str) -> Meter:
    """The meter of what runs a model: the GPU's for `ort-cuda`, else the processor's; raises MeterMissing."""
    return nvml() if target == "ort-cuda" else rapl()
