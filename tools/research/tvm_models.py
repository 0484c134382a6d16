"""Whole models through TVM: `python -m burnish.tools.research.tvm_models --out models.jsonl`.

Models of `.zoo`, the ones of the demo, and some made here of these (halves, quantized), each compiled for this machine
by `burnish.backends.tvm.lowering`, dynamic sizes kept, and by TVM's own importer: the file as it is, and where that is
not right once more with its sizes fixed to those of the first sample. Both are compared with ONNX Runtime on up to
three samples. One line of JSON each; every model and way has a process of its own. `tvm_lowering` makes the page.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from burnish.backends.ort.session import executor
from burnish.frontends import onnx_file
from burnish.ir.errors import BurnishError
from burnish.ir.samples import Sample
from burnish.passes import recipes, verify
from burnish.passes.pipeline import Pipeline
from burnish.tools.api import samples_for
from burnish.tools.research import tvm_made
from burnish.tools.research.tvm_nodes import _hush

ROOT = Path(__file__).resolve().parents[2]
DEMO = ROOT / "tools" / "demo"
FILES = (
    "a1-efficientnet", "a2-minilm", "a3-smollm2-nocache", "a3-smollm2-kv", "a4-silero-op18-ifless", "a5-magika",
    "a6-ppocr-det", "a6-ppocr-cls", "a6-ppocr-rec", "digits_resnet", "digits_vit", "cnn-ts", "cnn-dynp", "vit-ts",
    "vit-dynp", "vit-dyn23", "bert-ts", "bert-dynp", "bert-s-op23", "llama-ts", "llama-dynp", "llama-dyn23",
    "llama-kv-ts", "llama-kv-dynp", "llama-kv-op23", "resnet-ts", "resnet-dynp", "mobilenet-dynp", "efficientnet-dynp",
    "gpt2-dynp", "gemma-kv-dynp", "qwen-dynp", "phi-dynp", "t5-dynp", "swin-ts", "tf-bert", "genai-llama",
    "genai-llama-int4",
)  # fmt: skip
LIMIT = 1e-4
HALVES = 3e-2
SECONDS = 900


def main() -> None:
    """Run the models and write a line for each way."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--only", default="", help="models, with semicolons between")
    parser.add_argument("--ways", default="lowering,importer")
    given = parser.parse_args()
    chosen = given.only.split(";") if given.only else [*FILES, *tvm_made.MADE]
    given.out.write_text("")
    for name in chosen:
        for way in given.ways.split(","):
            with given.out.open("a") as file:
                file.write(json.dumps({"model": name, "way": way} | _apart(name, way)) + "\n")


def _apart(name: str, way: str) -> dict[str, Any]:
    """The result of a process of its own."""
    context = multiprocessing.get_context("spawn")
    reader, writer = context.Pipe(duplex=False)
    child = context.Process(target=_work, args=(name, way, writer))
    child.start()
    writer.close()
    try:
        if reader.poll(SECONDS):
            return dict(reader.recv())
        return {"result": "refused", "why": f"not done in {SECONDS} s"}
    except EOFError:
        return {"result": "refused", "why": "the process was killed"}
    finally:
        child.kill()
        child.join()


def _work(name: str, way: str, writer: Any) -> None:
    _hush()
    try:
        with tempfile.TemporaryDirectory() as folder:
            path = path_of(name, Path(folder))
            found = by_lowering(path) if way == "lowering" else by_importer(path)
    except Exception as error:
        lines = str(error).strip().splitlines() or [""]
        words = lines[0] if isinstance(error, BurnishError) else f"{type(error).__name__}: {lines[-1]}"
        found = {"result": "refused", "why": words[:300]}
    writer.send(found)


def path_of(name: str, folder: Path) -> Path:
    """The file of a model; the made ones are written into `folder`."""
    if name in tvm_made.MADE:
        return tvm_made.MADE[name](folder)
    return next(path for path in (ROOT / ".zoo" / f"{name}.onnx", DEMO / f"{name}.onnx") if path.exists())


def by_lowering(path: Path) -> dict[str, Any]:
    """Compiled by our lowering."""
    import tvm

    from burnish.backends.tvm import compiling
    from burnish.backends.tvm.lowering import lower
    from burnish.backends.tvm.runner import TvmRunner
    from burnish.backends.tvm.target import parse

    target, start = parse("llvm"), time.monotonic()
    model = Pipeline(recipes.named("default", "onnx", None)[:-1]).rewrite(onnx_file.read(path)).model
    lowered = lower(model)
    code = compiling.build(compiling.scheduled(compiling.fused(lowered.module, target), target), target)
    seconds = time.monotonic() - start
    runner = TvmRunner(code, tvm.cpu(), lowered.inputs, lowered.outputs, list(lowered.arrays()))
    worst, allowed, count = 0.0, LIMIT, 0
    for sample, expected, noise in references(path):
        found = runner.run(sample.feeds)
        for name, array in expected.items():
            worst = max(worst, verify.relative_error(found[name], array))
            allowed = max(allowed, HALVES if array.dtype.itemsize == 2 else 0.0, noise)
        count += 1
    return {
        "result": "right" if worst <= allowed else "wrong",
        "why": "" if worst <= allowed else f"differs by {worst:.2g}, allowed {allowed:.2g}",
        "error": worst, "allowed": allowed, "samples": count, "seconds": seconds,
    }  # fmt: skip


def references(path: Path) -> list[tuple[Sample, dict[str, np.ndarray], float]]:
    """Up to three samples that ONNX Runtime takes, its outputs, and the noise of its own optimizations."""
    model = onnx_file.read(path)
    plain, whole = executor(level="off")(model), executor(level="all")(model)
    found: list[tuple[Sample, dict[str, np.ndarray], float]] = []
    for sample in sorted(samples_for(model), key=lambda one: sum(a.size for a in one.feeds.values())):
        if any(array.size == 0 for array in sample.feeds.values()) and found:
            continue
        try:
            expected, other = plain.run(sample.feeds), whole.run(sample.feeds)
        except BurnishError:
            continue
        noise = max(verify.relative_error(other[name], array) for name, array in expected.items())
        found.append((sample, expected, verify.NOISE_FACTOR * noise if np.isfinite(noise) else 0.0))
        if len(found) == 3:
            break
    return found


def by_importer(path: Path) -> dict[str, Any]:
    """Compiled by TVM's importer."""
    samples = references(path)
    try:
        found = _imported(path, samples, fixed=False)
    except Exception:
        found = {"result": "refused"}
    return found if found["result"] == "right" else _imported(path, samples[:1], fixed=True)


def _imported(path: Path, samples: list[Any], fixed: bool) -> dict[str, Any]:
    import tvm
    from tvm import relax
    from tvm.relax.frontend.onnx import from_onnx
    from tvm.runtime import vm

    start = time.monotonic()
    model = onnx.load(path)
    held = {tensor.name for tensor in model.graph.initializer}
    names = [value.name for value in model.graph.input if value.name not in held]
    shapes = {name: list(samples[0][0].feeds[name].shape) for name in names} if fixed else None
    target = tvm.target.Target({"kind": "llvm"})
    module = from_onnx(model, shape_dict=shapes)
    with target, tvm.transform.PassContext(opt_level=3):
        code = tvm.compile(module, target=target, relax_pipeline=relax.get_default_pipeline(target))
    seconds = time.monotonic() - start
    machine: Any = vm.VirtualMachine(code, tvm.cpu())
    worst, allowed = 0.0, LIMIT
    for sample, expected, noise in samples:
        given = [tvm.runtime.tensor(np.asarray(sample.feeds[name], order="C")) for name in names]
        got = machine["main"](*given)
        several = [got] if isinstance(got, tvm.runtime.Tensor) else list(got)
        for value, one in zip(model.graph.output, several, strict=True):
            array = expected[value.name]
            worst = max(worst, verify.relative_error(one.numpy(), array))
            allowed = max(allowed, HALVES if array.dtype.itemsize == 2 else 0.0, noise)
    return {
        "result": "right" if worst <= allowed else "wrong",
        "why": "sizes fixed" if fixed and worst <= allowed else "" if worst <= allowed else f"differs by {worst:.2g}",
        "error": worst, "allowed": allowed, "samples": len(samples), "seconds": seconds,
    }  # fmt: skip


if __name__ == "__main__":
    main()
