"""A lossy pass whose process is killed the first time it is used."""

from __future__ import annotations

import os
import signal
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import onnx_ir as oir
from scale_one import Scale

from burnish.passes.base import Outcome
from burnish.passes.lossy import Edit


@dataclass(frozen=True)
class ScaleAndDie(Scale):
    """Kill this process unless `marker`, a file, is there; else scale."""

    marker: str = ""
    times: int = 1

    def apply(self, model: oir.Model, edits: Sequence[Edit], outcome: Outcome) -> None:
        markers = [Path(f"{self.marker}.{number}") for number in range(self.times)]
        missing = next((marker for marker in markers if not marker.exists()), None)
        if missing is not None:
            missing.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        super().apply(model, edits, outcome)
