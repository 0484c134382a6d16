"""What `--emit kernels` makes of models for GPUs, without a GPU: docs/results/tvm-kernels.md.

    python -m burnish.tools.research.tvm_kernels build ROWS.jsonl [--only NAME] [--target cuda:sm_90] [--source]
    python -m burnish.tools.research.tvm_kernels page ROWS.jsonl

A row is added to the file for each model and target; rows that are there are not made again.
"""

from __future__ import annotations

import json
import re
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import click

from burnish.backends.tvm import target as targets
from burnish.backends.tvm.kernels import compilers, emitting, inspection
from burnish.backends.tvm.quiet import quiet
from burnish.frontends import onnx_file
from burnish.ir.errors import BurnishError
from burnish.passes import recipes
from burnish.passes.pipeline import Pipeline

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "results" / "tvm-kernels.md"
MODELS = {
    "digits ResNet": "tools/demo/digits_resnet.onnx",
    "digits ViT": "tools/demo/digits_vit.onnx",
    "A5 Magika": ".zoo/a5-magika.onnx",
    "A6 PP-OCR cls": ".zoo/a6-ppocr-cls.onnx",
    "BERT (dynamic)": ".zoo/bert-s-dynp.onnx",
    "Llama with cache (dynamic)": ".zoo/llama-kv-dynp.onnx",
    "ResNet (dynamic)": ".zoo/resnet-dynp.onnx",
    "ViT (dynamic)": ".zoo/vit-dynp.onnx",
    "A1 EfficientNet": ".zoo/a1-efficientnet.onnx",
    "A2 MiniLM": ".zoo/a2-minilm.onnx",
    "A4 Silero op18": ".zoo/a4-silero-op18-ifless.onnx",
    "Llama int4 (MatMulNBits)": ".zoo/genai-llama-int4.onnx",
}
HALF = ("BERT (dynamic)", "A1 EfficientNet")
_HEAD = """# Kernels as a deliverable, compiled without a GPU

What `optimize MODEL --target cuda:sm_90 --emit kernels` writes: one CUDA C++ source and one library for each model
that needs `libtvm_ffi.so` and no TVM. Made by `tools/research/tvm_kernels.py` on a machine without a GPU;
[what a GPU measured](tvm-gpu.md) of such libraries is a page of its own.

- **calls**: of launchers in one run; **kernels**: different launchers, each of one kernel or more in the code object.
- **matrix**: tensor-core instructions in the SASS of all kernels, and in how many kernels. float32 products are not put
  on tensor cores.
- **TVM**, **nvcc**: seconds of lowering and code generation, and of the compiler, on a shared machine of two cores.
- **MB**: the library without weights, which lie beside it.
- A row without nvcc is source that was not compiled in this run; its matrix column counts `mma_sync` in the source.

"""


def build_row(name: str, file: str, target: str, half: bool, compiled: bool) -> dict[str, Any]:
    """One model for one target."""
    machine = targets.parse(target)
    row: dict[str, Any] = {"model": name, "half": half, "target": target}
    seconds = [0.0]
    library = compilers.library

    def timed(*given: Any, **options: Any) -> None:
        begun = time.perf_counter()
        if compiled:
            library(*given, **options)
        seconds[0] += time.perf_counter() - begun

    begun = time.perf_counter()
    try:
        compilers.library = timed
        with tempfile.TemporaryDirectory() as scratch:
            path = ROOT / file
            if half:
                path = _halved(path, Path(scratch) / "half.onnx")
            model = Pipeline(recipes.named("default", "onnx", None)[:-1]).rewrite(onnx_file.read(path)).model
            begun, folder = time.perf_counter(), Path(scratch) / "out"
            with quiet():
                emitted = emitting.emit(model, machine, folder, title=name)
            source = (folder / "model.cu").read_text()
            row |= {"calls": emitted.calls, "kernels": len(emitted.kernels), "source_mma": source.count("mma_sync(")}
            row["dynamic"] = any(not size.isdigit() for one in emitted.inputs for size in one[2])
            if compiled:
                found = inspection.kernels(folder / emitting.LIBRARY)
                row["found"] = len(found)
                row["matrix"] = sum(sum(one.matrix.values()) for one in found)
                row["matrix_kernels"] = sum(bool(one.matrix) for one in found)
                row["library"] = (folder / emitting.LIBRARY).stat().st_size
                row["nvcc"] = round(seconds[0], 1)
            row["weights"] = (folder / "weights.safetensors").stat().st_size
            row["tvm"] = round(time.perf_counter() - begun - seconds[0], 1)
    except BurnishError as error:
        row["refused"] = " ".join(str(error.cause).split())[:200]
    finally:
        compilers.library = library
    return row


def _halved(path: Path, out: Path) -> Path:
    import onnx

    from burnish.tools.research.gpu.kernels_prepare import halved

    onnx.save(halved(onnx.load(path)), out)
    return out


def page(rows: Iterable[dict[str, Any]]) -> str:
    """The rows as a table."""
    lines = [
        "| model | dtype | target | calls | kernels | matrix | TVM s | nvcc s | MB | refused |",
        "|" + " --- |" * 10,
    ]
    for one in sorted(rows, key=lambda row: (list(MODELS).index(row["model"]), row["half"], row["target"])):
        start = f"| {one['model']} | {'float16' if one['half'] else 'as it is'} | {one['target'].partition(':')[2]} |"
        if "refused" in one:
            lines.append(f"{start} | | | | | | {re.sub(r'[|`]', '', one['refused'])[:90]} |")
            continue
        if "library" in one:
            matrix = f"{one['matrix']} in {one['matrix_kernels']}"
            seconds = f"{one['nvcc']:.0f}" if "nvcc" in one else f"{one['seconds']:.0f} with TVM"
            built = f"{seconds} | {one['library'] / 1e6:.1f}"
        else:
            matrix, built = f"source: {one['source_mma']}", "- | -"
        tvm = f"{one['tvm']:.0f}" if "tvm" in one else "-"
        lines.append(f"{start} {one['calls']} | {one['kernels']} | {matrix} | {tvm} | {built} | |")
    return _HEAD + "\n".join(lines) + "\n"


@click.group()
def main() -> None:
    """Build rows, or write the page of them."""


@main.command()
@click.argument("rows", type=click.Path(path_type=Path))
@click.option("--only", multiple=True)
@click.option("--target", "chosen", multiple=True, default=("cuda:sm_90", "cuda:sm_80"))
@click.option("--source", is_flag=True, help="Do not run nvcc.")
@click.option("--half/--as-is", default=False, help="In float16.")
def build(rows: Path, only: tuple[str, ...], chosen: tuple[str, ...], source: bool, half: bool) -> None:
    """Add rows to a file."""
    known = [json.loads(line) for line in rows.read_text().splitlines()] if rows.exists() else []
    done = {(one["model"], one["half"], one["target"]) for one in known}
    for name in only or (HALF if half else MODELS):
        for target in chosen:
            if (name, half, target) not in done:
                row = build_row(name, MODELS[name], target, half, not source)
                print(row, flush=True)
                with rows.open("a") as stream:
                    stream.write(json.dumps(row) + "\n")


@main.command("page")
@click.argument("rows", type=click.Path(path_type=Path))
def write_page(rows: Path) -> None:
    """Write the page."""
    PAGE.write_text(page(json.loads(line) for line in rows.read_text().splitlines()))


if __name__ == "__main__":
    main()
