"""Models cut into regions for TVM and ONNX Runtime: `python -m burnish.tools.research.tvm_regions [NAME...]`.

Each model is optimized and everything that can be is compiled for this machine, untuned; the artefact is loaded and
compared with the original in ONNX Runtime on the samples that run within a few seconds. Writes a line of JSON for each
model into `docs/results/tvm-regions.json` at once, and the page from all of them in the end.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as oir

import burnish
from burnish.backends.tvm import load
from burnish.frontends import onnx_file
from burnish.ir.errors import BurnishError
from burnish.passes.verify import COMPILED, NOISE_FACTOR, relative_error
from burnish.tools.api import samples_for
from burnish.tools.research import tvm_regions_page

ROOT = Path(__file__).resolve().parents[2]
ZOO, DEMO = ROOT / ".zoo", ROOT / "tools" / "demo"
RESULTS = ROOT / "docs" / "results" / "tvm-regions.json"
MODELS: dict[str, tuple[str, str]] = {
    "resnet": ("digits ResNet", "digits_resnet.onnx"),
    "vit": ("digits ViT", "digits_vit.onnx"),
    "int8": ("digits ResNet, int8 QDQ", "digits_resnet.onnx"),
    "qoperator": ("digits ResNet, int8 QOperator", "digits_resnet.onnx"),
    "a4-ifless": ("A4 Silero VAD, opset 18 without If", "a4-silero-op18-ifless.onnx"),
    "a4": ("A4 Silero VAD", "a4-silero.onnx"),
    "a5": ("A5 Magika", "a5-magika.onnx"),
    "llama-kv": ("Llama with cache, 2 layers", "llama-kv-dynp.onnx"),
    "int4": ("Llama, int4 MatMulNBits; ONNX Runtime held to float32 activations", "genai-llama-int4.onnx"),
    "mixtral": ("Mixtral, experts by NonZero", "mixtral-loop-ts.onnx"),
    "t5": ("T5", "t5-dynp.onnx"),
    "a2": ("A2 MiniLM", "a2-minilm.onnx"),
    "a6-cls": ("A6 PP-OCR, direction", "a6-ppocr-cls.onnx"),
    "a6-rec": ("A6 PP-OCR, recognition", "a6-ppocr-rec.onnx"),
    "a6-det": ("A6 PP-OCR, detection", "a6-ppocr-det.onnx"),
    "a1": ("A1 EfficientNet", "a1-efficientnet.onnx"),
}
_SAMPLES = 3
_SECONDS = 20.0
"""Of running untuned code, after which no further sample of a model is run."""


def main() -> None:
    """Measure the models that are named, or all."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("names", nargs="*", choices=[[], *MODELS], default=[])
    for name in parser.parse_args().names or MODELS:
        line = measured(name)
        known = json.loads(RESULTS.read_text()) if RESULTS.is_file() else {}
        known[name] = line
        ordered = {one: known[one] for one in MODELS if one in known}
        RESULTS.write_text(json.dumps(ordered, indent=1) + "\n")
        print(name, line, flush=True)
    tvm_regions_page.write(json.loads(RESULTS.read_text()))


def measured(name: str) -> dict[str, Any]:
    """What became of one model."""
    title, file = MODELS[name]
    line: dict[str, Any] = {"model": title}
    try:
        with tempfile.TemporaryDirectory() as folder:
            model = _model(name, file, Path(folder))
            started = time.perf_counter()
            result = burnish.optimize(model, Path(folder) / "out", target="llvm", regions="all", verify="off")
            line["seconds"] = round(time.perf_counter() - started, 1)
            assert result.compiled is not None
            steps = result.compiled.manifest.steps
            for kind in ("tvm", "ort"):
                line[f"{kind} regions"] = sum(step.kind == kind for step in steps)
                line[f"{kind} nodes"] = sum(step.nodes for step in steps if step.kind == kind)
            line["reasons"] = _reasons([step.evidence.note for step in steps if step.kind == "ort"])
            for node in model.graph:
                node.attributes.pop("accuracy_level", None)  # 4 lets ONNX Runtime round activations to int8
            line |= _compared(model, Path(folder) / "out")
    except BurnishError as error:
        line["failed"] = str(error)
    return line


def _model(name: str, file: str, folder: Path) -> oir.Model:
    path = (DEMO if file.startswith("digits") else ZOO) / file
    if name in ("int8", "qoperator"):
        path = _quantized(path, folder / "quantized.onnx", name)
    return onnx_file.read(path)


def _quantized(path: Path, written: Path, name: str) -> Path:
    """The model with 8-bit weights and activations, as ONNX Runtime's quantizer writes it."""
    from onnxruntime import quantization

    class Images(quantization.CalibrationDataReader):
        def __init__(self) -> None:
            images = np.load(DEMO / "digits.npz")["image"][:64]
            self.rows = iter([{"image": images[i : i + 16].astype(np.float32)} for i in range(0, 64, 16)])

        def get_next(self) -> dict[str, np.ndarray] | None:
            return next(self.rows, None)

    formats = {"int8": quantization.QuantFormat.QDQ, "qoperator": quantization.QuantFormat.QOperator}
    quantization.quantize_static(str(path), str(written), Images(), quant_format=formats[name])
    return written


def _compared(model: oir.Model, folder: Path) -> dict[str, Any]:
    from burnish.backends.ort.session import executor

    original, runner, optimized = executor(level="off")(model), load(folder, threads=1), executor()(model)
    worst: dict[str, float] = {}
    noise: dict[str, float] = {}
    seen, refused = 0, list[str]()
    started = time.perf_counter()
    for sample in samples_for(model):
        try:
            expected, rounded = original.run(sample.feeds), optimized.run(sample.feeds)
        except BurnishError:
            continue
        try:
            found = runner.run(sample.feeds)
        except BurnishError as error:
            refused.append(error.cause)
            continue
        for output, array in expected.items():
            kind = array.dtype.name
            worst[kind] = max(worst.get(kind, 0.0), relative_error(found[output], array))
            noise[kind] = max(noise.get(kind, 0.0), relative_error(rounded[output], array))
        seen += 1
        if seen == _SAMPLES or time.perf_counter() - started > _SECONDS:
            break
    right = all(error <= max(COMPILED.get(kind, 0.0), NOISE_FACTOR * noise[kind]) for kind, error in worst.items())
    most = max(worst, key=worst.__getitem__, default="")
    return {"error": worst.get(most), "rounding": noise.get(most), "right": right, "samples": seen, "refused": refused}


def _reasons(notes: list[str]) -> list[str]:
    """The commonest reasons, without the names of nodes."""
    found = Counter(part.split(": ", 1)[1] for note in notes for part in note.split("; ") if ": " in part)
    return [reason for reason, _ in found.most_common(3)]


if __name__ == "__main__":
    main()
