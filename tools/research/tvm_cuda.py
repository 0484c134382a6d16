"""Compiled models for GPUs, made without a GPU: `python -m burnish.tools.research.tvm_cuda [--only NAME;...]`.

Each model is compiled as `optimize MODEL -o out/ --target cuda:sm_80` (and `sm_90`) does. Then the artefact's own
library is inspected: the CUDA source in it is compiled by nvcc to the code object that its first load on a GPU would
make, and the kernels of that are compared with the functions that the library has. Writes what it found of each model
and architecture into `docs/results/tvm-cuda.json` at once, and the page from all of them in the end.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
import struct
import subprocess
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import burnish
from burnish.backends.tvm import artifact
from burnish.backends.tvm.kernels import inspection
from burnish.ir.errors import BurnishError
from burnish.tools.research import tvm_made, tvm_regions

ROOT = Path(__file__).resolve().parents[2]
ZOO, DEMO = ROOT / ".zoo", ROOT / "tools" / "demo"
RESULTS = ROOT / "docs" / "results" / "tvm-cuda.json"
PAGE = RESULTS.with_suffix(".md")
ARCHITECTURES = ("sm_80", "sm_90")
_BEGIN = b"\n#ifdef __CUDACC_RTC__"
"""How the source starts that TVM writes; its length stands before it, in 8 bytes."""
_LONGEST = 1800
"""Seconds that nvcc may take."""
Made = Callable[[Path], Any]


def _random(name: str, folder: Path) -> Any:
    from burnish.tools.research.gpu import models_check

    return models_check.module(name, 1)


def _halves(path: Path, folder: Path) -> Path:
    import onnx

    from burnish.tools.research.gpu.kernels_prepare import halved

    onnx.save(halved(onnx.load(path)), folder / "half.onnx")
    return folder / "half.onnx"


def _file(path: Path, folder: Path) -> Path:
    return path


def _zoo(name: str) -> Made:
    return partial(_file, ZOO / f"{name}.onnx")


MODELS: dict[str, Made] = {
    "digits ResNet": partial(_file, DEMO / "digits_resnet.onnx"),
    "digits ViT": partial(_file, DEMO / "digits_vit.onnx"),
    "digits ResNet, int8 QDQ": tvm_made.MADE["digits_resnet, int8 QDQ"],
    "A1 EfficientNet": _zoo("a1-efficientnet"),
    "A2 MiniLM": _zoo("a2-minilm"),
    "A4 Silero VAD, opset 18 without If": _zoo("a4-silero-op18-ifless"),
    "A5 Magika": _zoo("a5-magika"),
    "A6 PP-OCR, direction": _zoo("a6-ppocr-cls"),
    "A6 PP-OCR, recognition": _zoo("a6-ppocr-rec"),
    "Llama with cache, 2 layers": _zoo("llama-kv-dynp"),
    "Llama with cache, 4 bits by MatMulNBits": tvm_made.MADE["llama-kv-dynp, MatMulNBits 4"],
    "Llama with cache, 4 bits by QDQ": tvm_made.MADE["llama-kv-dynp, int4 QDQ"],
    "Llama with GroupQueryAttention, 4 bits": _zoo("genai-llama-int4"),
    "BERT-base, random weights": partial(_random, "bert"),
    "ResNet-50, random weights": partial(_random, "resnet50"),
    "ViT-B/16, random weights": partial(_random, "vit"),
    "A3 SmolLM2 with cache": _zoo("a3-smollm2-kv"),
    "A3 SmolLM2": _zoo("a3-smollm2-nocache"),
    "digits ViT, float16": partial(_halves, DEMO / "digits_vit.onnx"),
    "A1 EfficientNet, float16": partial(_halves, ZOO / "a1-efficientnet.onnx"),
    "A2 MiniLM, float16": partial(_halves, ZOO / "a2-minilm.onnx"),
    "A6 PP-OCR, detection": _zoo("a6-ppocr-det"),
}


def main() -> None:
    """Compile the models that are named, or all, and write the page."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", default="", help="models, with semicolons between; `none` to write the page alone")
    parser.add_argument("--share", action="store_true", help="compile the source of the last architecture for all")
    given = parser.parse_args()
    chosen = given.only.split(";") if given.only else list(MODELS)
    groups = [ARCHITECTURES] if given.share else [(one,) for one in ARCHITECTURES]
    for name in chosen if given.only != "none" else []:
        for group in groups:
            with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
                rows = pool.submit(measured, name, group).result()
            for architecture, row in rows.items():
                _keep(name, architecture, row)
                print(name, architecture, row, flush=True)
    PAGE.write_text(page(json.loads(RESULTS.read_text())))


def _keep(name: str, architecture: str, row: dict[str, Any]) -> None:
    known = json.loads(RESULTS.read_text()) if RESULTS.is_file() else {}
    known.setdefault(name, {})[architecture] = row
    ordered = {one: known[one] for one in MODELS if one in known}
    RESULTS.write_text(json.dumps(ordered, indent=1) + "\n")


def measured(name: str, architectures: Sequence[str]) -> dict[str, dict[str, Any]]:
    """What became of one model for architectures; it is made for the last, and its source compiled for each."""
    try:
        with tempfile.TemporaryDirectory() as folder:
            made = MODELS[name](Path(folder))
            source, inputs = made if isinstance(made, tuple) else (made, None)
            out, started = Path(folder) / "out", time.perf_counter()
            target = f"cuda:{architectures[-1]}"
            result = burnish.optimize(source, out, inputs=inputs, target=target, regions="all", verify="off")
            seconds = time.perf_counter() - started
            assert result.compiled is not None
            known = {"seconds": round(seconds, 1), "made for": architectures[-1]}
            return {one: _inspected(result.compiled.manifest, out, one) | known for one in architectures}
    except BurnishError as error:
        return dict.fromkeys(architectures, {"failed": " ".join(str(error).split())[:300]})


def _inspected(manifest: artifact.Manifest, out: Path, architecture: str) -> dict[str, Any]:
    """What lies in an artefact."""
    row: dict[str, Any] = {"functions": manifest.kernels}
    for kind in ("tvm", "ort"):
        row[f"{kind} regions"] = sum(step.kind == kind for step in manifest.steps)
        row[f"{kind} nodes"] = sum(step.nodes for step in manifest.steps if step.kind == kind)
    row["reasons"] = tvm_regions._reasons([step.evidence.note for step in manifest.steps if step.kind == "ort"])
    library = (out / artifact.CODE).read_bytes()
    source, cubin = out / "kernels.cu", out / "kernels.cubin"
    source.write_bytes(cuda_source(library))
    started = time.perf_counter()
    command = ["nvcc", "-w", "-O3", "-cubin", f"-arch={architecture}", "-o", str(cubin), str(source)]
    subprocess.run(command, check=True, timeout=_LONGEST)
    found = inspection.kernels(cubin)
    names = [one.name for one in found]
    functions = host_functions(out / artifact.CODE)
    return row | {
        "source": hashlib.sha256(source.read_bytes()).hexdigest()[:16],
        "nvcc": round(time.perf_counter() - started, 1),
        "library": len(library),
        "weights": (out / artifact.WEIGHTS).stat().st_size if (out / artifact.WEIGHTS).is_file() else 0,
        "kernels": " ".join(names),
        "on the host": sorted(set(functions) - {re.sub(r"_kernel(_\d+)?$", "", one) for one in names}),
        "matrix": {one.name: sum(one.matrix.values()) for one in found if one.matrix},
        "shared": max(one.shared for one in found),
    }


def cuda_source(library: bytes) -> bytes:
    """The CUDA source that a library of TVM holds."""
    begin = library.find(_BEGIN)
    (length,) = struct.unpack_from("<Q", library, begin - 8)
    return library[begin : begin + length]


def host_functions(library: Path) -> list[str]:
    """The functions of a library that launch kernels, or compute on the host; not those that compute sizes alone."""
    said = subprocess.run(["nm", "-D", "--defined-only", str(library)], capture_output=True, text=True, check=True)
    names = [line.split()[-1] for line in said.stdout.splitlines()]
    functions = [one.removeprefix("__tvm_ffi_") for one in names if one.startswith("__tvm_ffi_")]
    return [one for one in functions if not one.startswith(("_library_", "shape_func"))]


def page(known: dict[str, dict[str, dict[str, Any]]]) -> str:
    """The rows as a page."""
    lines = [_COLUMNS, "|" + " --- |" * _COLUMNS.count(" | ") + " --- |"]
    why, host = [], []
    for name, rows in known.items():
        for architecture, row in rows.items():
            start = f"| {name} | {architecture} |"
            if "failed" in row:
                lines.append(
                    f"{start} refused: {row['failed'].replace('|', '/')[:120]}" + " |" * (_COLUMNS.count(" | ") - 1)
                )
                continue
            names = row["kernels"].split()
            matrix = f"{sum(row['matrix'].values())} in {len(row['matrix'])}" if row["matrix"] else "0"
            cells = [row["tvm regions"], row["tvm nodes"], row["functions"], len(names), len(row["on the host"])]
            cells += [row["ort nodes"], matrix, f"{row['seconds']:.0f}", f"{row['nvcc']:.0f}"]
            shared = "" if row.get("made for", architecture) == architecture else f", source of {row['made for']}"
            lines.append(f"{start} {' | '.join(map(str, cells))} | {row['library'] / 1e6:.1f}{shared} |")
            host += [f"- {name}, {architecture}: `{one}`" for one in row["on the host"]]
        last = list(rows.values())[-1]
        if last.get("reasons"):
            why.append(f"- {name}: {'; '.join(last['reasons'])}")
    missing = ", ".join(one for one in MODELS if one not in known)
    return "\n".join(
        [
            _HEAD,
            *lines,
            *(["", f"Not run yet: {missing}."] if missing else []),
            "",
            "## What stays on ONNX Runtime, and why",
            "",
            *(why or ["- nothing"]),
            "",
            "## What computes on the host, but for sizes",
            "",
            *(host or ["- nothing"]),
            "",
        ]
    )


_COLUMNS = (
    "| model | target | regions on TVM | nodes | functions | kernels | on the host | nodes on ONNX Runtime"
    " | tensor cores | TVM s | nvcc s | MB |"
)
_HEAD = """# Compiled models for GPUs, made without a GPU

What `optimize MODEL -o out/ --target cuda:sm_80` and `cuda:sm_90` write on a machine without a GPU. **Nothing of it was
run**: [what a GPU measured](tvm-gpu.md) is a page of its own. Made by `python -m burnish.tools.research.tvm_cuda`.

Each artefact's own library was inspected: the CUDA source in it was compiled by nvcc 13.0 to the code object that the
first load on a GPU makes, and the kernels in that were counted and named (`docs/results/tvm-cuda.json` has the names).

- **functions**: that the library calls kernels by, one for each fused operator; **kernels**: in the code object.
- **on the host**: functions without a kernel of theirs. Functions that compute sizes alone do not count.
- **nodes on ONNX Runtime**: of the optimized model; they are listed below with the reasons, there is no other fallback.
- **tensor cores**: their instructions in the SASS, and in how many kernels. float32 products are not put on them.
- **TVM s**, **nvcc s**: wall-clock time on one core that was shared with much else, so only an upper bound.
- **MB**: the library with its source, without weights. Where it says so the model was lowered once, and its source
  compiled for both: of the four models that were lowered twice, kernels and sizes of libraries are the same.
"""

if __name__ == "__main__":
    main()
