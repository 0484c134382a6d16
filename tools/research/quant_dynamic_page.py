"""The numbers and the page of `quant_dynamic.py`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).resolve().parents[2] / "docs" / "results"
NUMBERS = RESULTS / "quant-dynamic.json"
Row = dict[str, Any]

_BEDS = {
    "a2": ("all-MiniLM-L6 (A2)", "R@1", "60 texts, fitted to 96 others; timed on one row of 128 tokens"),
    "a3": ("SmolLM2-135M (A3)", "perplexity", "8 texts of 256 tokens, fitted to 4 others; timed on one"),
    "a4": ("Silero VAD (A4), branches", "accuracy", "all but 4 samples, which were fitted to; timed on one"),
    "a4-sequence": ("Silero VAD (A4), one LSTM over a sequence", "accuracy", "as before"),
    "a5": ("Magika (A5)", "accuracy", "all but 40 files, which were fitted to; timed on one"),
    "vit": ("Digits ViT", "accuracy", "all but 100 digits, which were fitted to; timed on 64"),
    "a1": ("EfficientNet-lite0 (A1)", "top-1", "all but 2 samples, which were fitted to; timed on one"),
}

_HEAD = """# Dynamic int8, halves and caches, measured

Made by `python -m burnish.tools.research.quant_dynamic`; numbers in [quant-dynamic.json](quant-dynamic.json).
[quantize-dynamic, cast-half and quantize-cache](../ideas/quantization.md), through `optimize --target ort-cpu`, beside
ONNX Runtime 1.32's `quantize_dynamic` (per channel, QInt8) and `float16.convert_float_to_float16`, on the same files.

`error` is the relative Frobenius error of all outputs. `MB` is what all constants take. `speed` is the time of float32
as it is in the file by that of the row: the median of pairs with quartiles, CPU time of one thread, on a processor with
AVX-512 VNNI where others were at work. `made` is CPU seconds of making the row. Kernels are those that ONNX Runtime
runs, read from the graph that it writes.
"""

_CACHE = """## SmolLM2-135M with a cache (A3)

8 texts of 256 tokens given at once; scales fitted to 4 others. `steps` is how far the logits of the last token are from
those of the text at once when its last 8 tokens come one by one, as a share of the largest; `speed` is that of the last
of these steps.

| cache | perplexity | MB of the cache | steps | ms of a step | speed |
| --- | --- | --- | --- | --- | --- |
"""


def read() -> dict[str, dict[str, Row]]:
    """All numbers, by bed and row."""
    return json.loads(NUMBERS.read_text()) if NUMBERS.exists() else {}


def note(bed: str, row: str, found: Row) -> None:
    """Keep the numbers of a row."""
    numbers = read()
    numbers.setdefault(bed, {})[row] = found
    NUMBERS.write_text(json.dumps(numbers, indent=1) + "\n")


def write() -> None:
    """Write the page."""
    numbers = read()
    parts = [_HEAD]
    for key, (name, metric, of) in _BEDS.items():
        if key in numbers:
            parts.append(f"## {name}\n\n{metric}: {of}.\n\n{_table(numbers[key], metric)}")
    if "cache" in numbers:
        lines = [
            f"| {row} | {one['metric']:.3f} | {one['bytes'] / 1e6:.2f} | {one['steps']:.1e} | {one['ms']:.1f}"
            f" | {_speed(one)} |"
            for row, one in numbers["cache"].items()
        ]
        parts.append(_CACHE + "\n".join(lines) + "\n")
    (RESULTS / "quant-dynamic.md").write_text("\n".join(parts))


def _table(rows: dict[str, Row], metric: str) -> str:
    lines = [f"| row | {metric} | error | MB | ms | speed | made | kernels |", "| --- " * 8 + "|"]
    for row, one in rows.items():
        if "failed" in one:
            lines.append(f"| {row} | failed: {one['failed']} | | | | | | |")
            continue
        kernels = ", ".join(f"{kernel} {count}" for kernel, count in one["kernels"].items())
        lines.append(
            f"| {row} | {one['metric']:.3f} | {one['error']:.4f} | {one['bytes'] / 1e6:.2f} | {one['ms']:.2f}"
            f" | {_speed(one)} | {one['seconds']:.0f} | {kernels} |"
        )
    return "\n".join(lines) + "\n"


def _speed(one: Row) -> str:
    middle, low, high = one["speed"]
    return f"{middle:.2f} ({low:.2f} to {high:.2f})"
