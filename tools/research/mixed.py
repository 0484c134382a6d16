"""The recipe `mixed` within 1 % on real models: what it chose, and what that does to samples that no search saw.

    python -m burnish.tools.research.mixed a2 size
    python -m burnish.tools.research.mixed a2 latency
    python -m burnish.tools.research.mixed page

Each run writes the row of a model and an objective to docs/results/mixed.json, of which `page` makes
docs/results/mixed.md. `--cache FOLDER` keeps scores, from which a run that was stopped goes on, and the processor time
of the runs before, which is added; the two searches of a model share scores there. What is written is kept there as
well, and `time` in place of an objective times it again.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from collections import Counter, defaultdict
from functools import partial
from pathlib import Path
from typing import Any

import burnish
from burnish.backends.ort import timing
from burnish.backends.ort.session import executor, from_path
from burnish.ir.errors import BurnishError
from burnish.passes.judging import Judged
from burnish.passes.measure_choice import measure
from burnish.tools.lossy import Lossy
from burnish.tools.observe import keeps_of
from burnish.tools.research import zoo_tasks
from burnish.tools.research.mixed_beds import BEDS, Bed
from burnish.tools.research.mixed_page import page

PAGE = Path(__file__).resolve().parents[2] / "docs" / "results" / "mixed.md"
DROP = "1%"


def measured(bed: Bed, objective: str, place: Path, spent: Path) -> dict[str, Any]:
    """The row of one search; `spent` holds the processor time of runs before it that were stopped."""
    target = place / f"{objective}.onnx"
    before = float(spent.read_text()) if spent.exists() else 0.0
    phases: defaultdict[str, float] = defaultdict(float)
    last, since, used = "reading", time.monotonic(), time.process_time()

    def told(what: str, number: int, total: int) -> None:
        nonlocal last, since
        now = time.monotonic()
        phases[last] += now - since
        if now - since > 1:
            spent.write_text(str(before + time.process_time() - used))
        last, since = what, now

    try:
        result = burnish.optimize(
            bed.path, target, recipe="mixed", data=bed.search, max_drop=DROP, objective=objective, on_step=told
        )
    except BurnishError as error:
        return {"failed": error.cause, "cpu": before + time.process_time() - used}
    told("", 0, 0)
    row: dict[str, Any] = {"cpu": before + time.process_time() - used}
    whole = sum(phases.values())
    row["phases"] = {name: round(taken / whole, 3) for name, taken in phases.items() if taken > 0.01 * whole}
    assert result.lossy is not None
    return row | _found(result.lossy) | _judged(bed, result.lossy, target) | _timed(bed, target)


def _found(lossy: Lossy) -> dict[str, Any]:
    """What the search saw and chose."""
    assert lossy.found is not None and lossy.measure is not None and lossy.final is not None
    kept = [edit for edit in lossy.edits]
    return {
        "measure": lossy.measure.name,
        "split": lossy.how,
        "proposed": len(lossy.scores),
        "scored": sum(one.measured for one in lossy.scores.values()),
        "plans": len(lossy.found.plans),
        "chosen": dict(Counter(f"{edit.spec.partition('{')[0]}, {_option(edit.option)}" for edit in kept)),
        "allowed": lossy.found.allowed,
        "drop": lossy.final.drop,
        "spread": lossy.final.spread,
    }


def _option(text: str) -> str:
    """What is made of a layer without its numbers: of ranks, that it is one."""
    first = text.split(",")[0].split()[0]
    return "factors" if first in ("rank", "joint") else first


def _judged(bed: Bed, lossy: Lossy, target: Path) -> dict[str, Any]:
    """Bytes, and the measure on samples that the search did not see; the task's own metric where it is another."""
    assert lossy.measure is not None
    original = burnish.load(bed.path)
    chosen = measure(lossy.measure.name, original, bed.unseen, keeps=keeps_of).measure
    judged = Judged(original, bed.unseen, chosen, executor(threads=1, target="ort-cpu"))
    found = judged.of(burnish.load(target))
    row = {
        "bytes": sum(one.stat().st_size for one in target.parent.glob(f"{target.name}*")),
        "original bytes": sum(one.stat().st_size for one in bed.path.parent.glob(f"{bed.path.name}*") if _own(one)),
        "unseen": {"original": judged.original, "drop": found.drop, "spread": found.spread},
    }
    if bed.task is not None:
        metric = zoo_tasks.metric_of(bed.task, [sample.labels for sample in bed.unseen if sample.labels is not None])
        values = []
        for path in (bed.path, target):
            runner = from_path(path, threads=1)
            values.append(metric([dict(runner.run(sample.feeds)) for sample in bed.unseen]))
            runner.close()
        row["task"] = values
    return row


def _own(path: Path) -> bool:
    return path.suffix in (".onnx", ".data")


def _timed(bed: Bed, target: Path) -> dict[str, Any]:
    """A run of the first sample in turns with the file that was given, on one thread, in three pairs of sessions.

    Sessions of one file differ; the middle of the three ratios counts, with the widest ends of their intervals.
    """
    feeds, pairs = bed.unseen[0].feeds, []
    for _ in range(3):
        first, second = (from_path(path, threads=1) for path in (bed.path, target))
        run = partial(first.run, feeds), partial(second.run, feeds)
        pairs.append(timing.paired(*run, rounds=15, seconds=20.0, alone=True))
        first.close()
        second.close()
    middle = sorted(pairs, key=lambda pair: pair.ratio)[1]
    low, high = min(pair.low for pair in pairs), max(pair.high for pair in pairs)
    return {"time": (middle.ratio, low, high), "original seconds": middle.median_a}


def main() -> None:
    """Search one model for one objective, or write the page."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("name", choices=[*BEDS, "page"])
    parser.add_argument("objective", nargs="?", choices=("size", "latency", "time"))
    parser.add_argument("--folder", type=Path, default=Path(".zoo"))
    parser.add_argument("--cache", type=Path, help="where scores are kept; by default nowhere")
    given = parser.parse_args()
    data = PAGE.with_suffix(".json")
    if given.name == "page":
        PAGE.write_text(page(json.loads(data.read_text())))
        return
    bed = BEDS[given.name](given.folder)
    with tempfile.TemporaryDirectory() as place:
        cache = (given.cache or Path(place) / "cache") / given.name
        cache.mkdir(parents=True, exist_ok=True)
        os.environ["BURNISH_CACHE"] = str(cache)
        made = [one for one in ("size", "latency") if (cache / f"{one}.onnx").exists()]
        if given.objective == "time":
            rows = {one: _timed(bed, cache / f"{one}.onnx") for one in made}
        else:
            rows = {given.objective: measured(bed, given.objective, cache, cache / f"{given.objective}.seconds")}
    known = json.loads(data.read_text()) if data.exists() else {}
    own = known.setdefault(given.name, {}) | {"title": bed.title, "data": bed.data}
    for objective, row in rows.items():
        own[objective] = own.get(objective, {}) | row if given.objective == "time" else row
    known[given.name] = own
    print(given.name, given.objective, json.dumps(own), flush=True)
    data.write_text(json.dumps(known, indent=1) + "\n")


if __name__ == "__main__":
    main()
