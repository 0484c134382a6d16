"""Runs of `optimize` that are killed at chosen moments, and a second run of each.

A process of its own, `python killing.py FOLDER DATA KIND MOMENT...`: it forks, which nothing that has made a session
may do. A kind is one of `WORK`, a moment is a step that `on_step` tells, as `scoring edits:6`, or `writing:0`, or
seconds. On standard output it leaves, as JSON, what came of each.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import burnish
from burnish.backends.fx import healing_loop
from burnish.backends.fx.healing import HealOptions
from burnish.backends.onnx_writer import Staged
from burnish.backends.ort import session
from burnish.passes import book, scoring
from burnish.tools import lossy_stage, report

MODEL = Path(__file__).resolve().parents[1] / "tools" / "demo" / "digits_vit.onnx"
WORK: dict[str, dict[str, Any]] = {
    "search": {"passes": ["project-rank{ranks=1,joint=False}"], "max_drop": "2%"},
    "gptq": {"passes": ["quantize-weights{bits=4,rounding=gptq}"]},
    "static": {"passes": ["quantize-static{rounding=gptq}"]},
    "fptq": {"passes": ["quantize-fptq{rounding=gptq}"]},
    "dynamic": {"passes": ["quantize-dynamic{balanced=True}"]},
    "simulated": {"passes": ["learn-rotations{steps=4,texts=1,starts=2}", "simulate-bits"]},
}
WORK["healing"] = WORK["search"] | {"heal": HealOptions(steps=24, evaluations=6)}
LOADED = (lossy_stage, report, session)
"""Imported before the first fork."""


def counted(owner: Any, name: str, count: Callable[[], None]) -> None:
    """Have `count` called with each call of a method."""
    method = getattr(owner, name)

    def call(self: Any, *arguments: Any) -> Any:
        count()
        return method(self, *arguments)

    setattr(owner, name, call)


def start(folder: Path, data: Path, kind: str, moment: str | None) -> int:
    """Run `optimize` in a child, which kills itself at a moment; returns its process id."""
    child = os.fork()
    if child:
        return child
    os.environ |= {"BURNISH_CACHE": str(folder / "cache"), "TMPDIR": str(folder / "tmp")}
    tempfile.tempdir = None
    work = {"scores": 0, "steps": 0, "samples": 0}

    def count(what: str) -> None:
        work[what] += 1
        (folder / "work.json").write_text(json.dumps(work))

    def told(what: str, number: int, total: int) -> None:
        step, _, at = (moment or "").partition(":")
        if at and what.startswith(step) and number >= int(at):
            os.kill(os.getpid(), signal.SIGKILL)

    counted(scoring.Scorer, "_keep", lambda: count("scores"))
    counted(healing_loop.Loop, "_step", lambda: count("steps"))
    counted(book.Page, "seen", lambda: count("samples"))
    counted(Staged, "commit", lambda: told("writing", 0, 1))
    try:
        burnish.optimize(MODEL, folder / "out" / "out.onnx", data=data, guard=["size"], on_step=told, **WORK[kind])
        os._exit(0)
    finally:
        os._exit(1)


def run(folder: Path, data: Path, kind: str, moment: str | None) -> dict[str, Any]:
    """What became of a run."""
    for one in ("out", "tmp"):
        (folder / one).mkdir(parents=True, exist_ok=True)
    (folder / "work.json").write_text(json.dumps({"scores": 0, "steps": 0, "samples": 0}))
    seconds = moment is not None and ":" not in moment
    child = start(folder, data, kind, None if seconds else moment)
    if seconds:
        time.sleep(float(moment or 0))
        os.kill(child, signal.SIGKILL)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    written = folder / "out" / "out.onnx"
    left = [
        *folder.glob("out/*"),
        *folder.glob("tmp/*"),
        *folder.glob("cache/heal/*/*"),
        *folder.glob("cache/observed/*/*"),
        *folder.glob("cache/rotations/*/*"),
    ]
    return {
        "status": status,
        "bytes": written.read_bytes().hex() if written.exists() else None,
        "left": sorted(one.name for one in left if one != written),
        **json.loads((folder / "work.json").read_text()),
    }


def main(folder: Path, data: Path, kind: str, moments: list[str]) -> None:
    """Print what became of a run that nothing happens to, then of each that is killed and of the run after it."""
    found = [[run(folder / "whole", data, kind, None)]]
    for number, moment in enumerate(moments):
        own = folder / f"{number}"
        found.append([run(own, data, kind, moment), run(own, data, kind, None)])
    print(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3], sys.argv[4:])
