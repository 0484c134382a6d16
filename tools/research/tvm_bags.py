"""Weighted sums of picked rows in TVM and ONNX Runtime: the section of docs/results/tvm-fused.md.

python -m burnish.tools.research.tvm_bags ROWS.jsonl
python -m burnish.tools.research.tvm_bags ROWS.jsonl --tables
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any
from unittest import mock

import click
import numpy as np
import onnx_ir as oir
import tvm

from burnish.backends.ort import timing
from burnish.backends.ort.session import executor
from burnish.backends.tvm.operators import rows as bags
from burnish.tools.research import fused_cases
from burnish.tools.research.tvm_fused import built

_TABLE = 65_536
_SIZES = ((32, 128), (32, 512), (128, 512))
_TOKENS = (1, 16, 128)


def measured(tokens: int, picked: int, width: int, seconds: float) -> dict[str, Any]:
    """One size: as one kernel, as kernels of their own, for dynamic tokens, in ONNX Runtime, in turns."""
    model = fused_cases.bag(tokens, _TABLE, picked, width)
    fused, dynamic = built(model), built(fused_cases.bag("n", _TABLE, picked, width))
    with mock.patch.object(bags, "_picking", lambda value: None):
        apart = built(model)
    other = executor()(oir.from_proto(model))
    random = np.random.default_rng(1)
    many = [
        {"i": random.integers(0, _TABLE, (tokens, picked)), "w": random.random((tokens, picked), dtype=np.float32)}
        for _ in range(16)  # rows that are picked again and again would lie in caches
    ]
    truth = other.run(many[0])["y"]
    error = float(np.abs(fused.run(many[0])["y"] - truth).max() / np.abs(truth).max())
    given = [[tvm.runtime.tensor(one) for one in feeds.values()] for feeds in many]
    actions = [
        lambda: [fused.run_tensors(one) for one in given],
        lambda: [other.run(one) for one in many],
        lambda: [apart.run_tensors(one) for one in given],
        lambda: [dynamic.run_tensors(one) for one in given],
    ]
    found: dict[str, Any] = {"tokens": tokens, "picked": picked, "width": width, "error": error}
    times = timing.in_turns(actions, rounds=15, seconds=seconds)
    for name, (spread, pair) in zip(("fused", "ort", "apart", "dynamic"), times, strict=True):
        found[name] = {"us": spread.median * 1e6 / len(many), "share": 1 / pair.ratio}
    return found


@click.command()
@click.argument("rows", type=click.Path(path_type=Path))
@click.option("--seconds", default=2.0)
@click.option("--tables", is_flag=True)
def main(rows: Path, seconds: float, tables: bool) -> None:
    """Add rows that are not there yet, or print the table."""
    known = [json.loads(line) for line in rows.read_text().splitlines()] if rows.exists() else []
    if not tables:
        there = {(one["picked"], one["width"], one["tokens"]) for one in known}
        for picked, width, tokens in ((*size, tokens) for size in _SIZES for tokens in _TOKENS):
            if (picked, width, tokens) not in there:
                with rows.open("a") as stream:
                    stream.write(json.dumps(measured(tokens, picked, width, seconds)) + "\n")
        return
    print("| picked x columns | tokens | fused, us | / ONNX Runtime | / apart | / dynamic tokens | error |")
    print("|" + " --- |" * 7)
    for one in known:
        shares = " | ".join(f"{one[name]['share']:.2f}" for name in ("ort", "apart", "dynamic"))
        size = f"{one['picked']} x {one['width']} | {one['tokens']}"
        print(f"| {size} | {one['fused']['us']:,.0f} | {shares} | {one['error']:.0e} |")


if __name__ == "__main__":
    main()
