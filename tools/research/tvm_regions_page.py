"""The page `docs/results/tvm-regions.md`, from what `tvm_regions` measured."""

from __future__ import annotations

from pathlib import Path
from typing import Any

PAGE = Path(__file__).resolve().parents[2] / "docs" / "results" / "tvm-regions.md"
HEAD = """# Regions: what is compiled and what stays on ONNX Runtime

`python -m burnish.tools.research.tvm_regions` cuts each model as `optimize --target llvm --regions all` does, compiles
everything that can be, loads what was written, and compares it with the original in ONNX Runtime without optimizations.
The error is the largest of all outputs, relative to the largest value. Allowed is 1e-4, or four times what ONNX
Runtime's own optimizations change (rounding). Kernels are plain loops here, not tuned, so nothing is timed.

| model | regions on TVM | nodes | regions on ONNX Runtime | nodes | error | rounding | samples | why nodes stay |
| --- | --- | --- | --- | --- | --- | --- | --- | --- |
"""


def write(lines: dict[str, dict[str, Any]]) -> None:
    """Write the page."""
    PAGE.write_text(HEAD + "".join(map(_row, lines.values())))


def _row(line: dict[str, Any]) -> str:
    if "failed" in line:
        return f"| {line['model']} | | | | | | | | {line['failed'].splitlines()[0].rstrip(':')} |\n"
    error = "" if line["error"] is None else f"{line['error']:.1e}" + ("" if line["right"] else ": wrong")
    refused = [f"{len(line['refused'])} more refused: {line['refused'][0][:60]}"] if line["refused"] else []
    reasons = "; ".join([*line["reasons"], *refused]).replace("|", "\\|")
    rounding = "" if line["rounding"] is None else f"{line['rounding']:.1e}"
    counts = (line[f"{kind} {what}"] for kind in ("tvm", "ort") for what in ("regions", "nodes"))
    cells = (*counts, error, rounding, line["samples"])
    return f"| {line['model']} | " + " | ".join(map(str, cells)) + f" | {reasons} |\n"
