"""Writes docs/results/tvm-gpu.md from docs/results/tvm-gpu.json, the rows that the scripts beside it printed on a GPU.

python -m burnish.tools.research.gpu.gpu_page
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).resolve().parents[3] / "docs" / "results"


def table(columns: Iterable[str], rows: Iterable[Iterable[Any]]) -> str:
    """A table in Markdown."""
    names = list(columns)
    lines = [names, ["---"] * len(names), *([str(cell) for cell in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def us(number: float | None) -> str:
    """A time in microseconds."""
    return "-" if number is None else f"{number:,.0f}"


def ratio(one: float | None, other: float | None) -> str:
    """How often the other fits in the one."""
    return "-" if not one or not other else f"{one / other:.2f}"


def kernels(rows: list[dict[str, Any]]) -> str:
    """The table of libraries of kernels."""
    cells = []
    for row in rows:
        best = min((row[key] for key in ("compiled_graph_us", "compiled_us") if key in row), default=None)
        error, other = row.get("error"), row.get("torch_error")
        cells.append(
            (
                row["model"],
                "float16" if row["half"] else "float32",
                row["sample"],
                f"{error:.1e}" if error is not None else "-",
                f"{other:.1e}" if other is not None else "-",
                us(row.get("kernels_us")),
                us(row.get("kernels_graph_us")),
                us(row.get("compiled_us")),
                us(row.get("compiled_graph_us")),
                ratio(row.get("kernels_graph_us"), best),
            )
        )
    return table(
        (
            "model",
            "dtype",
            "sample",
            "error",
            "torch's error",
            "kernels, us",
            "in a CUDA graph",
            "torch.compile, us",
            "in a CUDA graph",
            "best of ours / best of torch",
        ),  # fmt: skip
        cells,
    )


_TIMES = ("tvm_ms", "tvm_graph_ms", "eager_ms", "compiled_ms")


def models(rows: list[dict[str, Any]]) -> str:
    """The table of whole models in TVM's machine."""
    return table(
        ("model", "batch", "kernels", "built, s", "error", "TVM, ms", "with graphs, ms", "torch, ms", "compiled, ms"),
        (
            (
                *(row["model"], row["batch"], row["kernels"], f"{row['compile_s']:.0f}", f"{row['error']:.4f}"),
                *(f"{row[key]:.2f}" if key in row else "-" for key in _TIMES),
            )
            for row in rows
        ),
    )


def single(rows: dict[str, dict[str, Any]]) -> str:
    """The table of single kernels."""
    return table(
        ("kernel", "torch, us", "torch, TFLOP/s", "TVM's default schedule, us", "TVM / torch", "error"),
        (
            (
                name,
                row["torch_us"],
                f"{row['flops'] / row['torch_us'] / 1e6:.0f}",
                row["default_us"],
                ratio(row["default_us"], row["torch_us"]),
                row["error"],
            )  # fmt: skip
            for name, row in rows.items()
        ),
    )


def main() -> None:
    """Write the page."""
    found = json.loads((RESULTS / "tvm-gpu.json").read_text())
    text = f"""# Kernels on a GPU

{found["gpu"]}, {found["date"]}; {found["versions"]}. Everything was
compiled with TVM's default schedules (dlight): **no kernel was tuned on a GPU**. Times are medians of CUDA events,
those of one row taken in one process. Small models are bound by launching kernels, and there ours are quick; large
ones by the kernels themselves, and there the default schedules lose: **burnish does not beat `torch.compile` on
EfficientNet, the small ResNet or BERT-base today.**

## Libraries of kernels (`--emit kernels`)

Compiled for `cuda:sm_90` on a machine without a GPU, then loaded with tvm-ffi alone and given torch's CUDA tensors
on a stream that is not the default one. Errors are against ONNX Runtime in float32 on the CPU. `torch.compile` is
that of the same graph through [the FX bridge](../ideas/fx.md); where its column for a CUDA graph is empty, torch
could not capture it (it copies sizes from the CPU), so that its time holds the launches, which a graph would take
away. These models are small, but EfficientNet.

{kernels(found["kernels"])}

Batches of 32, and matrix products of 1024 in float16 and bfloat16, were not reached: the time was over, and samples
of 32 rows were not read (mended since).

## Whole models in TVM's machine

Random weights, sizes of the papers, float16, batch 1: BERT-base (128 tokens, in two runs), ResNet-50, ViT-B/16.
Errors are against torch in float32. `torch.compile` (`max-autotune-no-cudagraphs`, 46 s to compile) was timed for
BERT alone; the time on the GPU ended before the others, before batch 32, and before the decoder.

{models(found["models"])}

CUDA graphs gain 4 %: it is the kernels that are slow. Each product of matrices runs on tensor cores (WMMA), without
the asynchronous copies and wide instructions of cuBLAS:

## Single kernels in float16

{single(found["single"])}

## What was not measured

Tuning on a GPU (the script found no kernel to tune because of a defect, and the time was over); ONNX Runtime's CUDA
provider (not on the machine); int8 and int4; batch 32; the fused regions. The scripts are in `tools/research/gpu/`.
"""
    (RESULTS / "tvm-gpu.md").write_text(text)


if __name__ == "__main__":
    main()
