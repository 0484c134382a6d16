"""Pairs of products, weighted sums of rows, and merged projections in TVM: sections of docs/results/tvm-fused.md.

    python -m burnish.tools.research.tvm_joined measure ROWS.jsonl [--only pair|bag|projections]
    python -m burnish.tools.research.tvm_joined tables ROWS.jsonl

Times are medians of one thread, all forms taken in turns; rows that are in the file are not made again.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import click
import numpy as np
import onnx_ir as oir
import tvm

from burnish.backends.ort import timing
from burnish.backends.ort.session import executor
from burnish.backends.tvm import pairs
from burnish.backends.tvm.operators import rows as bags
from burnish.tools.research import fused_cases
from burnish.tools.research.tvm_fused import built, unfused

Feeds = list[dict[str, np.ndarray]]
_TABLE = 65_536
_COLUMNS = {
    "pair": ("fused", "ort", "apart", "whole", "dynamic"),
    "bag": ("fused", "ort", "apart", "dynamic"),
    "projections": ("merged", "separate", "ort_merged", "ort_separate"),
}


def pair(rows: int, depth: int, rank: int, width: int) -> dict[str, Any]:
    """Two factors: one kernel, ONNX Runtime, two kernels, one that writes its whole middle, one for dynamic rows."""
    model = fused_cases.pair(rows, depth, rank, width)
    fused, dynamic = built(model), built(fused_cases.pair("n", depth, rank, width))
    with mock.patch.object(pairs, "joined", lambda module: module):
        apart = built(model)
    with unfused():
        whole = built(model)
    feeds: Feeds = [{"x": np.random.default_rng(1).standard_normal((rows, depth), dtype=np.float32)}]
    runners = {"fused": fused, "ort": executor()(oir.from_proto(model)), "apart": apart, "whole": whole}
    return timed({**runners, "dynamic": dynamic}, feeds)


def bag(tokens: int, picked: int, width: int) -> dict[str, Any]:
    """Rows of a table: one kernel, ONNX Runtime, kernels of their own, one kernel for dynamic tokens."""
    model = fused_cases.bag(tokens, _TABLE, picked, width)
    fused, dynamic = built(model), built(fused_cases.bag("n", _TABLE, picked, width))
    with mock.patch.object(bags, "_picking", lambda value: None):
        apart = built(model)
    random = np.random.default_rng(1)
    feeds: Feeds = [
        {"i": random.integers(0, _TABLE, (tokens, picked)), "w": random.random((tokens, picked), dtype=np.float32)}
        for _ in range(16)  # the same rows again and again would lie in caches
    ]
    runners = {"fused": fused, "ort": executor()(oir.from_proto(model)), "apart": apart, "dynamic": dynamic}
    return timed(runners, feeds)


def projections(rows: int, depth: int, widths: list[int]) -> dict[str, Any]:
    """Query, key and value as one product or three, in TVM and in ONNX Runtime."""
    models = [fused_cases.projections(rows, depth, widths, merged=merged) for merged in (True, False)]
    merged, separate = map(built, models)
    others = [executor()(oir.from_proto(model)) for model in models]
    feeds: Feeds = [{"x": np.random.default_rng(1).standard_normal((rows, depth), dtype=np.float32)}]
    runners = {"merged": merged, "separate": separate, "ort_merged": others[0], "ort_separate": others[1]}
    return timed(runners, feeds)


def timed(runners: dict[str, Any], feeds: Feeds) -> dict[str, Any]:
    """Times of runners in turns, and the largest difference of the first two, relative to the largest number."""
    given = [[tvm.runtime.tensor(one) for one in some.values()] for some in feeds]

    def action(runner: Any) -> Callable[[], object]:
        if hasattr(runner, "run_tensors"):
            return lambda: [runner.run_tensors(one) for one in given]
        return lambda: [runner.run(one) for one in feeds]

    first, second = list(runners.values())[:2]
    found, truth = first.run(feeds[0]), second.run(feeds[0])
    worst: dict[str, Any] = {}
    if "merged" not in runners:  # whose weights are others
        worst["error"] = max(
            float(np.abs(found[name] - truth[name]).max() / np.abs(truth[name]).max()) for name in truth
        )
    times = timing.in_turns([action(one) for one in runners.values()], rounds=11, seconds=1.0)
    for name, (spread, ratio) in zip(runners, times, strict=True):
        worst[name] = {"us": spread.median * 1e6 / len(feeds), "share": 1 / ratio.ratio}
    return worst


def jobs() -> Iterator[tuple[dict[str, Any], Callable[[], dict[str, Any]]]]:
    """What identifies a row, and what makes it."""
    for depth, width in ((768, 768), (768, 3072), (2048, 2048)):
        for rank in (32, 128, 256):
            for rows in (1, 16, 128):
                sizes = {"rows": rows, "depth": depth, "rank": rank, "width": width}
                yield {"kind": "pair", **sizes}, lambda sizes=sizes: pair(**sizes)  # type: ignore[misc]
    for picked, width in ((32, 128), (32, 512), (128, 512)):
        for tokens in (1, 16, 128):
            sizes = {"tokens": tokens, "picked": picked, "width": width}
            yield {"kind": "bag", **sizes}, lambda sizes=sizes: bag(**sizes)  # type: ignore[misc]
    for depth, widths in ((768, [768] * 3), (2048, [2048, 512, 512])):
        for rows in (1, 16, 64):
            some: dict[str, Any] = {"rows": rows, "depth": depth, "widths": widths}
            yield {"kind": "projections", **some}, lambda some=some: projections(**some)  # type: ignore[misc]


@click.group()
def main() -> None:
    """Measure, write the tables."""


@main.command()
@click.argument("rows", type=click.Path(path_type=Path))
@click.option("--only", default="")
def measure(rows: Path, only: str) -> None:
    """Add rows of times on this machine."""
    for key, make in jobs():
        known = [json.loads(line) for line in rows.read_text().splitlines()] if rows.exists() else []
        if key["kind"].startswith(only) and not any(key.items() <= one.items() for one in known):
            with rows.open("a") as stream:
                stream.write(json.dumps(key | make()) + "\n")


@main.command()
@click.argument("rows", type=click.Path(path_type=Path))
def tables(rows: Path) -> None:
    """Print the tables of the page."""
    known = [json.loads(line) for line in rows.read_text().splitlines()]
    for kind, names in _COLUMNS.items():
        print()
        for place, one in enumerate(row for row in known if row["kind"] == kind):
            sizes = [key for key in one if key not in (*names, "kind", "error")]
            if not place:
                print(f"| {' | '.join((*sizes, f'{names[0]}, us', *(f'/ {name}' for name in names[1:])))} | error |")
                print("|" + " --- |" * (len(sizes) + len(names) + 1))
            shares = [f"{one[name]['share']:.2f}" for name in names[1:]]
            error = f"{one['error']:.0e}" if "error" in one else ""
            cells = (*(str(one[key]) for key in sizes), f"{one[names[0]]['us']:,.0f}", *shares)
            print(f"| {' | '.join(cells)} | {error} |")


if __name__ == "__main__":
    main()
