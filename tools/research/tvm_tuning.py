"""Tuned kernels against ONNX Runtime and against untuned ones, on this machine's CPU.

`python -m burnish.tools.research.tvm_tuning DB NAME=BUDGET ...` tunes and times subjects into
`docs/results/tvm-tuning.json` and writes `docs/results/tvm-tuning.md`; without names it writes the page alone. DB is a
folder of tuning records. A1 comes from the cache of models. With `again:NAME=BUDGET` only the seconds of the whole
command are measured, of a subject that is known.
"""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
import tempfile
import time
from datetime import UTC, datetime
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as oir

from burnish.backends import onnx_writer
from burnish.backends.ort import timing
from burnish.backends.ort.session import executor
from burnish.backends.tvm import load
from burnish.frontends import onnx_file
from burnish.ir.concrete import concrete, open_dims
from burnish.passes import plan
from burnish.passes.pipeline import Pipeline
from burnish.passes.verify import relative_error
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
WAYS = ("hybrid", "tuned", "untuned")
ROUNDS, SECONDS = 100, 12.0
CONDITIONS = (
    "Measured on two cores without other work, with records that were made before, on one core beside other work. "
    "Nothing is said of two threads: in one process the sessions' threads, which wait busily, get in each other's way, "
    "and two sessions of ONNX Runtime with the same model differed by up to a factor of three. The records of "
    "A1 hold more minutes than its budget: they were made before and after the rule that shares a budget was changed."
)
LAW = 1.03
"""The ratio to ONNX Runtime that the hybrid has to keep."""


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
    """Tune a subject, compile it three ways, and time these in turns with ONNX Runtime."""
    import tvm

    import burnish
    from burnish.backends.tvm import tuning
    from burnish.backends.tvm.target import parse
    from burnish.tools.tuned import Tuning, fused

    target, database = parse("llvm"), tuning.Database(folder)
    given = model_of(name)
    ready = Pipeline(plan.resolve(target="llvm").passes).rewrite(given).model
    tuned = Tuning(budget, str(folder)).run(fused(ready, target), target, _said)
    with tempfile.TemporaryDirectory() as held:
        place = Path(held)
        path = onnx_writer.write(given, place / "model.onnx")[0]
        again = _twice(path, place, folder, budget)
        whole = partial(burnish.optimize, path, target="llvm", regions="all", verify="off")
        made = whole(place / "tuned", tuning_db=folder).compiled
        whole(place / "untuned")
        assert made is not None
        times = _times(given, place)
        steps = load(place / "hybrid").manifest.steps
    return {
        "budget": budget,
        "trials": sum(task.before + task.trials for task in tuned.tasks),
        "kernels": made.manifest.kernels,
        "scheduled": made.manifest.tuned,
        "minutes": sum(database.read(task.kernel, target, 1).spent for task in tuned.tasks if task.kernel.arguments)
        / 60,
        "again": again,
        "regions": [[step.kind, step.nodes, step.evidence.ratio] for step in steps],
        "times": times,
        "date": datetime.now(UTC).date().isoformat(),
        "versions": f"{target}, TVM {tvm.__version__}; ONNX Runtime {metadata.version('onnxruntime')}",
        "slow": [
            [task.kernel.name, task.kernel.calls, (task.seconds or 0) * task.kernel.calls]
            for task in sorted(tuned.tasks, key=lambda one: -(one.seconds or 0) * one.kernel.calls)[:3]
        ],
    }


def _lines(folder: Path) -> int:
    """Candidates that a database holds."""
    return sum(len(file.read_text().splitlines()) - 1 for file in folder.glob("*.jsonl"))


def measure_again(folder: Path, name: str, budget: str) -> list[Any]:
    """Trials and seconds of the whole command, first and again, with the records of a subject."""
    with tempfile.TemporaryDirectory() as held:
        path = onnx_writer.write(model_of(name), Path(held) / "model.onnx")[0]
        return _twice(path, Path(held), folder, budget)


def _twice(path: Path, place: Path, folder: Path, budget: str) -> list[Any]:
    before = _lines(folder)
    runs = [_command(path, place / "hybrid", folder, budget, place / "cache") for _ in range(2)]
    return [_lines(folder) - before, *runs]


def _command(path: Path, out: Path, folder: Path, budget: str, cache: Path) -> list[float]:
    """Seconds of the whole command, in a process of its own: of the wall clock and of the processor."""
    code = "from burnish.tools.cli import optimize_main; optimize_main()"
    asked = ["--target", "llvm", "--tune", budget, "--tuning-db", str(folder)]
    command = [sys.executable, "-c", code, str(path), "-o", str(out), *asked]
    start, used = time.perf_counter(), os.times()
    subprocess.run(command, check=True, capture_output=True, env=os.environ | {"BURNISH_CACHE": str(cache)})
    now = os.times()
    worked = now.children_user + now.children_system - used.children_user - used.children_system
    return [time.perf_counter() - start, worked]


def _times(given: oir.Model, place: Path) -> dict[str, Any]:
    """Milliseconds, ratio and interval on one thread: ONNX Runtime, the hybrid, all tuned, all untuned."""
    original = executor(level="all", threads=1)(given)
    feeds = samples_for(given)[0].feeds
    ways = [load(place / way, threads=1) for way in WAYS]
    expected = original.run(feeds)
    errors = [max(relative_error(way.run(feeds)[key], expected[key]) for key in expected) for way in ways]
    assert max(errors) < 1e-4, errors
    actions = [partial(original.run, feeds), *(partial(way.run, feeds) for way in ways)]
    quick = timing.in_turns(actions[:3], rounds=ROUNDS, seconds=SECONDS)
    slow = timing.in_turns([actions[0], actions[3]], rounds=5, seconds=SECONDS / 4)[1:]
    return {
        way: [spread.median * 1e3, ratio.ratio, ratio.low, ratio.high, ratio.rounds, error]
        for way, (spread, ratio), error in zip(("ort", *WAYS), quick + slow, [0.0, *errors], strict=True)
    }


def _said(what: str, done: int, total: int) -> None:
    print(f"{done}/{total} {what}", file=sys.stderr, flush=True)


def page(found: dict[str, Any]) -> str:
    """The tables of what was measured."""
    rows = [
        "# Tuned kernels on a CPU",
        "",
        "Made by `python -m burnish.tools.research.tvm_tuning`. Kernels are tuned on one thread of one core. "
        "*Tuned* is the whole model on TVM, *hybrid* what `optimize "
        "--target llvm` writes: the regions that were measured to be faster, the rest on ONNX Runtime. Times are "
        "medians of rounds in turns (A B C C B A) in one process, arrays in and arrays out; ratios are over ONNX "
        "Runtime alone with all its optimizations, below 1 is faster, with the 95 % interval of their median. Trials "
        "count every candidate, failed ones too.",
    ]
    rows += ["", "## On one thread", ""]
    rows += ["| what | ONNX Runtime ms | hybrid ms | / ONNX Runtime | tuned ms | / ONNX Runtime | untuned ms |"]
    rows += ["| --- | ---: | ---: | --- | ---: | --- | ---: |"]
    for name, one in found.items():
        times = one["times"]
        cells = [f"{times['ort'][0]:.3f}"]
        cells += [f"{times[way][0]:.3f} | {_ratio(times[way])}" for way in ("hybrid", "tuned")]
        rows.append(f"| {TITLES[name]} | {' | '.join(cells)} | {times['untuned'][0]:.2f} |")
    rows += ["", _law(found)]
    rows += ["", "## Where the hybrid runs", ""]
    rows += [f"- {TITLES[name]}: {_where(one['regions'])}" for name, one in found.items()]
    rows += ["", "## What tuning took", "", "| what | budget | minutes | trials | kernels | with a schedule | error |"]
    rows += ["| --- | --- | ---: | ---: | ---: | ---: | ---: |"]
    for name, one in found.items():
        error = one["times"]["tuned"][5]
        rows.append(
            f"| {TITLES[name]} | {one['budget']} | {one['minutes']:.1f} | {one['trials']} | {one['kernels']} "
            f"| {one['scheduled']} | {error:.0e} |"
        )
    rows += [
        "",
        "## A second time",
        "",
        "The whole command, `optimize --tune BUDGET --tuning-db DIR`, with all records: ",
    ]
    rows[-1] += (
        "passes, proof, choice of regions, compiling, comparing and timing. *First*: regions are measured. *Again*: "
    )
    rows[-1] += "the choice is that of the first, and numbers are compared as ever."
    rows += ["", "| what | trials | first, s | of the processor | again, s | of the processor |"]
    rows += ["| --- | ---: | ---: | ---: | ---: | ---: |"]
    for name, one in found.items():
        trials, *runs = one["again"]
        seconds = " | ".join(f"{wall:.1f} | {worked:.1f}" for wall, worked in runs)
        rows.append(f"| {TITLES[name]} | {trials} | {seconds} |")
    rows += ["", "## Where the time of the tuned models goes", ""]
    for name, one in found.items():
        most = ", ".join(f"`{kernel}` {seconds * 1e3:.3f} ms ({calls} x)" for kernel, calls, seconds in one["slow"])
        rows.append(f"- {TITLES[name]}: {most}")
    rows += ["", "## How far to trust it", "", CONDITIONS]
    stated = sorted({f"{one['date']}: {one['versions']}" for one in found.values()})
    return "\n".join([*rows, "", *stated, ""])


def _ratio(cell: list[float]) -> str:
    return "{:.2f} ({:.2f} to {:.2f})".format(*cell[1:4])


def _law(found: dict[str, Any]) -> str:
    """What became of the law that the hybrid is never slower."""
    hybrids = {name: one["times"]["hybrid"] for name, one in found.items()}
    worst = max(hybrids, key=lambda name: hybrids[name][1])
    whole = [name for name in hybrids if all(kind == "ort" for kind, _, _ in found[name]["regions"])]
    wins = [
        f"{TITLES[name]} by {1 - cell[1]:.0%}" for name, cell in hybrids.items() if cell[3] < 1 and name not in whole
    ]
    over = [TITLES[name] for name, cell in hybrids.items() if cell[2] > LAW]
    said = f"The hybrid takes at most {hybrids[worst][1]:.3f} times as long ({TITLES[worst]}). "
    return (
        said
        + f"Faster: {', '.join(wins) or 'none'}."
        + (f" {len(whole)} of {len(found)} are whole sessions of ONNX Runtime." if whole else "")
        + (f" Slower by more than 3 %: {', '.join(over)}." if over else "")
    )


def _where(regions: list[list[Any]]) -> str:
    counts = {kind: sum(nodes for one, nodes, _ in regions if one == kind) for kind in ("tvm", "ort")}
    return f"{counts['tvm']} nodes compiled, {counts['ort']} on ONNX Runtime, in {len(regions)} parts"


def main(arguments: list[str]) -> None:
    """Measure what is named, and write the page."""
    store = PAGE.with_suffix(".json")
    found: dict[str, Any] = json.loads(store.read_text()) if store.exists() else {}
    for pair in arguments[1:]:
        what, _, budget = pair.partition("=")
        name = what.removeprefix("again:")
        if name == what:
            found[name] = measure(Path(arguments[0]), name, budget)
        else:
            found[name]["again"] = measure_again(Path(arguments[0]), name, budget)
        found = {key: found[key] for key in TITLES if key in found}
        store.write_text(json.dumps(found, indent=1) + "\n")
    PAGE.write_text(page(found))


if __name__ == "__main__":
    main(sys.argv[1:])
