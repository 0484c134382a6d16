"""Tuned kernels against ONNX Runtime and against untuned ones, on this machine's CPU.

`python -m burnish.tools.research.tvm_tuning DB NAME=BUDGET ...` tunes and times subjects into
`docs/results/tvm-tuning.json` and writes `docs/results/tvm-tuning.md`; without names it writes the page alone. DB is a
folder of tuning records. A1 comes from the cache of models.
"""

from __future__ import annotations

import io
import json
import sys
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as oir

from burnish.backends.ort.session import executor
from burnish.backends.ort.timing import paired
from burnish.frontends import onnx_file
from burnish.ir import weights
from burnish.ir.concrete import concrete, open_dims
from burnish.passes import recipes
from burnish.passes.pipeline import Pipeline
from burnish.tools.api import samples_for

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "results" / "tvm-tuning.md"
TITLES = {
    "matmul": "matmul 512 x 512 x 512",
    "conv": "conv 3x3, 64 to 64 channels, 56 x 56, with Relu",
    "digits": "digits ResNet, batch 1",
    "a1": "A1 (EfficientNet-Lite), batch 1",
    "bert": "one BERT-base layer, batch 1, 128 tokens",
}
THREADS = 1


def model_of(name: str) -> oir.Model:
    """A subject, its sizes fixed."""
    normal = np.random.default_rng(0).normal
    if name == "matmul":
        text = "g (float[512, 512] x) => (float[512, 512] y) { y = MatMul(x, w) }"
        return _with(text, {"w": normal(size=(512, 512)).astype(np.float32)})
    if name == "conv":
        text = (
            "g (float[1, 64, 56, 56] x) => (float[1, 64, 56, 56] y) { t = Conv<pads=[1,1,1,1]>(x, w, b) y = Relu(t) }"
        )
        given = {"w": normal(size=(64, 64, 3, 3)) / 24, "b": normal(size=64)}
        return _with(text, {key: array.astype(np.float32) for key, array in given.items()})
    if name == "bert":
        return _bert()
    path = (
        ROOT / "tools" / "demo" / "digits_resnet.onnx" if name == "digits" else ROOT / ".zoo" / "a1-efficientnet.onnx"
    )
    model = onnx_file.read(path)
    return concrete(model, dict.fromkeys(open_dims(model, {}), 1))


def _with(text: str, arrays: dict[str, np.ndarray]) -> oir.Model:
    model = oir.from_onnx_text(f'<ir_version: 10, opset_import: ["": 20]> {text}')
    for node in model.graph:
        for index, value in enumerate(node.inputs):
            if value is not None and value.name in arrays:
                held = oir.val(value.name, const_value=oir.tensor(arrays[value.name], name=value.name))
                if value.name not in model.graph.initializers:
                    model.graph.register_initializer(held)
                node.replace_input_with(index, model.graph.initializers[value.name])
    return model


def _bert() -> oir.Model:
    import torch

    torch.manual_seed(0)
    layer = torch.nn.TransformerEncoderLayer(768, 12, 3072, activation="gelu", batch_first=True).eval()
    stream = io.BytesIO()
    with torch.no_grad():
        torch.onnx.export(layer, (torch.randn(1, 128, 768),), dynamo=True, opset_version=20).save(stream)
    return oir.from_proto(onnx.load_model_from_string(stream.getvalue()))


def measure(folder: Path, name: str, budget: str) -> dict[str, Any]:
    """Tune a subject, and time it in pairs with ONNX Runtime and with its untuned kernels."""
    import tvm

    from burnish.backends.tvm import compiling, quiet, tuning
    from burnish.backends.tvm.lowering import lower
    from burnish.backends.tvm.runner import TvmRunner
    from burnish.backends.tvm.target import parse
    from burnish.backends.tvm.tuning import budget as budgets

    target, database = parse("llvm"), tuning.Database(folder)
    given = model_of(name)
    model = Pipeline(recipes.named("default", "onnx", None)[:-1]).rewrite(given).model
    lowered = lower(model)
    with quiet.quiet():
        fused = compiling.fused(lowered.module, target)
    tuned = tuning.tune(fused, target, budgets.parse(budget), database, _said, threads=THREADS)
    again = tuning.tune(fused, target, budgets.parse(budget), database, threads=THREADS)
    applied = tuning.apply(fused, database, target, threads=THREADS)
    arrays = [tensor.numpy() for value in lowered.weights if (tensor := weights.tensor_of(value)) is not None]

    def runner(module: Any) -> TvmRunner:
        with quiet.quiet():
            code = compiling.build(compiling.scheduled(module, target), target)
        return TvmRunner(code, tvm.cpu(), lowered.inputs, lowered.outputs, arrays)

    fast, plain, original = runner(applied.module), runner(fused), executor(level="all", threads=THREADS)(given)
    sample = samples_for(given)[0]
    expected, found = original.run(sample.feeds), fast.run(sample.feeds)
    error = max(
        float(np.abs(found[key].astype(np.float64) - expected[key]).max() / max(np.abs(expected[key]).max(), 1e-30))
        for key in expected
    )
    assert error < 1e-4, (name, error)
    against = paired(partial(original.run, sample.feeds), partial(fast.run, sample.feeds), rounds=60, seconds=20)
    untuned = paired(partial(fast.run, sample.feeds), partial(plain.run, sample.feeds), rounds=5, seconds=10)
    everything = sum(task.before + task.trials for task in again.tasks)
    return {
        "budget": budget,
        "trials": everything,
        "kernels": len(tuned.tasks),
        "scheduled": len(applied.seconds),
        "minutes": sum(
            database.read(task.kernel, target, THREADS).spent for task in tuned.tasks if task.kernel.arguments
        )
        / 60,
        "again": [again.trials, again.wall],
        "ort": against.median_a,
        "tuned": against.median_b,
        "ratio": [against.ratio, against.low, against.high],
        "untuned": untuned.median_b,
        "gain": untuned.ratio,
        "error": error,
        "rounds": against.rounds,
        "date": datetime.now(UTC).date().isoformat(),
        "runtime": original.options,
        "versions": f"{target}, TVM {tvm.__version__}",
        "slow": [
            [task.kernel.name, task.kernel.calls, (task.seconds or 0) * task.kernel.calls]
            for task in sorted(again.tasks, key=lambda one: -(one.seconds or 0) * one.kernel.calls)[:3]
        ],
    }


def _said(progress: Any) -> None:
    best = "?" if progress.seconds is None else f"{progress.seconds * 1e3:.3f} ms"
    print(f"{progress.done:.0f}/{progress.total:.0f} {progress.kernel} {best}", file=sys.stderr, flush=True)


def page(found: dict[str, Any]) -> str:
    """The table of what was measured."""
    rows = [
        "# Tuned kernels on a CPU",
        "",
        "Made by `python -m burnish.tools.research.tvm_tuning`. One thread. Times are medians of rounds in pairs (A B "
        "B A); the ratio is tuned over ONNX Runtime (all its optimizations), below 1 is faster, with the 95 % interval "
        "of its median. Trials count every candidate in the database, failed ones too; minutes are what they took on a "
        "machine that was shared with other work.",
        "",
        "| what | budget | trials | minutes | ONNX Runtime ms | tuned ms | tuned / ONNX Runtime | untuned ms | largest "
        "relative error |",
        "| --- | --- | ---: | ---: | ---: | ---: | --- | ---: | ---: |",
    ]
    for name, one in found.items():
        ratio = "{:.2f} ({:.2f} to {:.2f})".format(*one["ratio"])
        rows.append(
            f"| {TITLES[name]} | {one['budget']} | {one['trials']} | {one['minutes']:.1f} | {one['ort'] * 1e3:.3f} "
            f"| {one['tuned'] * 1e3:.3f} | {ratio} | {one['untuned'] * 1e3:.1f} | {one['error']:.0e} |"
        )
    rows += ["", "## A second time", "", "| what | kernels | with a schedule | trials | seconds |"]
    rows += ["| --- | ---: | ---: | ---: | ---: |"]
    for name, one in found.items():
        trials, wall = one["again"]
        rows.append(f"| {TITLES[name]} | {one['kernels']} | {one['scheduled']} | {trials} | {wall:.2f} |")
    rows += ["", "## Where the time of the tuned models goes", ""]
    for name, one in found.items():
        most = ", ".join(f"`{kernel}` {seconds * 1e3:.3f} ms ({calls} x)" for kernel, calls, seconds in one["slow"])
        rows.append(f"- {TITLES[name]}: {most}")
    notes = [f"- {TITLES[name]}: {one['note']}" for name, one in found.items() if "note" in one]
    if notes:
        rows += ["", "## To be measured again", "", *notes]
    stated = sorted({f"{one['date']}: {one['versions']}; {one['runtime']}" for one in found.values()})
    return "\n".join([*rows, "", *stated, ""])


def main(arguments: list[str]) -> None:
    """Measure what is named, and write the page."""
    store = PAGE.with_suffix(".json")
    found: dict[str, Any] = json.loads(store.read_text()) if store.exists() else {}
    for pair in arguments[1:]:
        name, _, budget = pair.partition("=")
        found[name] = measure(Path(arguments[0]), name, budget)
        found = {key: found[key] for key in TITLES if key in found}
        store.write_text(json.dumps(found, indent=1) + "\n")
    PAGE.write_text(page(found))


if __name__ == "__main__":
    main(sys.argv[1:])
