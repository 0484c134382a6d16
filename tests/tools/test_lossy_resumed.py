"""A lossy run that is killed goes on, and ends with the bytes of one that was not."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from lossy_runs import DEMO, ROOT, digits

pytestmark = pytest.mark.usefixtures("own_cache")


def killed_at(
    tmp_path: Path, kind: str, *moments: str, data: Path | None = None
) -> tuple[dict[str, Any], list[list[dict[str, Any]]]]:
    """What became of a run that nothing happens to, and of each that is killed with the run after it."""
    data = data or digits(tmp_path, 100)
    command = [sys.executable, str(ROOT / "tests" / "killing.py"), str(tmp_path), str(data), kind, *moments]
    environment = os.environ | {"PYTHONPATH": str(ROOT / ".src"), "OMP_NUM_THREADS": "1"}
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=1200)
    assert ended.returncode == 0, ended.stderr
    [[whole], *others] = json.loads(ended.stdout)
    assert whole["status"] == 0 and whole["bytes"] and not whole["left"]
    for killed, again in others:
        assert killed["status"] in (-signal.SIGKILL, 0) and killed["bytes"] in (None, whole["bytes"])
        assert again["status"] == 0 and again["bytes"] == whole["bytes"] and not again["left"]
        assert killed["scores"] + again["scores"] in (whole["scores"], whole["scores"] + 1)
    return whole, others


def many(tmp_path: Path) -> Path:
    """A file of 180 digits, each a sample of its own; half of them are fitted to."""
    with np.load(DEMO / "digits.npz") as held:
        np.savez(tmp_path / "many.npz", image=held["image"][:180, None])
    return tmp_path / "many.npz"


def test_a_search_that_is_killed_goes_on_and_ends_with_the_same_bytes(tmp_path: Path) -> None:
    """The original is scored first, and then six edits."""
    _, [[scoring, _], [writing, again]] = killed_at(tmp_path, "search", "scoring edits:6", "writing:0")
    assert scoring["status"] == writing["status"] == -signal.SIGKILL and scoring["scores"] == 1 + 6
    assert writing["left"] and not again["scores"]


def test_a_calibration_that_is_killed_goes_on_and_ends_with_the_same_bytes(tmp_path: Path) -> None:
    """Of 90 samples the first 64 are kept, and all once they were seen."""
    whole, others = killed_at(tmp_path, "gptq", "observing:70", "writing:0", data=many(tmp_path))
    [[observing, again], [writing, rest]] = others
    assert observing["samples"] == 70 and again["samples"] == whole["samples"] - 64 == 26
    assert writing["samples"] == whole["samples"] and not rest["samples"] and writing["left"]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["static", "fptq", "dynamic", "simulated"])
def test_every_calibration_that_is_killed_goes_on_and_ends_with_the_same_bytes(tmp_path: Path, kind: str) -> None:
    steps = ("learning rotations:2",) if kind == "simulated" else ()
    whole, others = killed_at(tmp_path, kind, *steps, "observing:70", "writing:0", data=many(tmp_path))
    observing, again = others[len(steps)]
    assert observing["samples"] == 70 and again["samples"] == whole["samples"] - 64
    writing, rest = others[-1]
    assert writing["samples"] == whole["samples"] and not rest["samples"] and writing["left"]


@pytest.mark.slow
def test_searches_that_are_killed_anywhere_go_on(tmp_path: Path) -> None:
    steps = ("infer-types:0", "project-rank:0", "scoring edits:0", "scoring edits:11", "finding how much:3")
    killed_at(
        tmp_path,
        "search",
        *steps,
        "measuring on:0",
        "fuse-norm:0",
        *(str(moment) for moment in np.arange(0.1, 4, 0.37)),
    )


@pytest.mark.slow
def test_healing_that_is_killed_goes_on_and_no_plan_is_healed_twice(tmp_path: Path) -> None:
    """Of 24 steps every fourth is a checkpoint; a run that has ended before its moment leaves none."""
    steps = ("healing:100", "healing:500", "healing:900", "fuse-norm:0", "writing:0")
    whole, others = killed_at(tmp_path, "healing", *steps, *(str(moment) for moment in np.arange(2, 12, 1.3)))
    assert whole["steps"] >= 24
    assert all(killed["status"] == -signal.SIGKILL for killed, _ in others[: len(steps)])
    for killed, again in others:
        if killed["status"] == 0:
            assert killed["steps"] == again["steps"] == whole["steps"]
        else:
            assert whole["steps"] <= killed["steps"] + again["steps"] <= whole["steps"] + 4
    assert not others[len(steps) - 1][1]["steps"]
