"""Measure the exact passes beside other tools, on every model of the zoo: `python -m burnish.tools.research.exact`.

Writes `docs/results/exact.json` (everything), `exact.md` (the tables) and `exact.svg` (the picture of the README).
Latency and session creation are taken in turns over all files of a model, in one process; a ratio is the median of the
rounds' ratios. CPU seconds and peak memory are those of each tool's whole process.
"""

from __future__ import annotations

import argparse
import json
import time
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as oir

from burnish.backends.ort import session
from burnish.frontends import onnx_file, synthesis
from burnish.ir.errors import BurnishError
from burnish.ir.samples import Sample
from burnish.ir.walk import walk
from burnish.passes import verify
from burnish.tools.research import rivals, zoo

RESULTS = Path(__file__).resolve().parents[2] / "docs" / "results"
FAMILIES = {
    "attention": ("Attention", "MultiHeadAttention", "GroupQueryAttention"),
    "norm": (
        "LayerNormalization",
        "RMSNormalization",
        "SimplifiedLayerNormalization",
        "SkipLayerNormalization",
        "SkipSimplifiedLayerNormalization",
    ),
    "activation": ("Gelu", "FastGelu", "BiasGelu", "QuickGelu", "Swish", "HardSwish", "Mish"),
    "rotary": ("RotaryEmbedding",),
}
ROUNDS = 15
SESSION_ROUNDS = 7
STRETCH = 0.03


def measure(name: str, folder: Path, tools: tuple[str, ...] = rivals.TOOLS) -> dict[str, Any]:
    """Everything about one model: what each tool made of it, what that computes, and how fast it is."""
    source = zoo.path(name)
    made = [one for tool in tools if (one := rivals.run(tool, name, source, folder)) is not None]
    files = {"original": source, **{one.tool: one.file for one in made if one.file is not None}}
    original = onnx_file.read(source)
    samples = synthesis.synthesise(original)
    runner = session.from_path(source)
    expected = verify.Expected(runner, samples)
    runner.close()
    noise = session.from_path(source, level="off")
    row: dict[str, Any] = {"model": name, "samples": len(expected.kept), "refused": len(expected.refused)}
    row["noise"] = max((c.error for c in verify.compare(expected, noise).outputs), default=0.0)
    noise.close()
    row["tools"] = {"original": _counts(source)}
    for one in made:
        entry = {"cpu": one.cpu, "memory": one.memory, "failed": one.message}
        if one.file is not None:
            entry |= _counts(one.file) | _check(one.file, expected)
        row["tools"][one.tool] = entry
    loadable = {tool: file for tool, file in files.items() if not row["tools"][tool].get("failed")}
    typical = _typical(name, [sample for sample, _ in expected.kept])
    for threads in (1, 2):
        _add(row, f"latency_{threads}", _latency(loadable, typical, threads))
    _add(row, "creation", _creation(loadable))
    return row


def _add(row: dict[str, Any], key: str, times: dict[str, list[float]]) -> None:
    ours = np.asarray(times["burnish"]) if "burnish" in times else None
    for tool, values in times.items():
        row["tools"][tool][key] = float(np.median(values))
        if ours is not None:
            row["tools"][tool][f"{key}_ratio"] = float(np.median(np.asarray(values) / ours))


def _counts(file: Path) -> dict[str, Any]:
    model = oir.load(file)
    ops = Counter(node.op_type for node in walk(model))
    data = file.with_name(file.name + ".data")
    size = file.stat().st_size + (data.stat().st_size if data.exists() else 0)
    return {
        "nodes": sum(ops.values()) - ops["Constant"],
        "bytes": size,
        **{family: sum(ops[op] for op in members) for family, members in FAMILIES.items()},
    }


def _check(file: Path, expected: verify.Expected) -> dict[str, Any]:
    try:
        runner = session.from_path(file)
    except BurnishError as error:
        return {"failed": str(error.cause)[:160]}
    found = verify.compare(expected, runner)
    runner.close()
    worst = max(found.outputs, key=lambda check: check.error)
    return {"error": worst.error, "worst_sample": worst.sample}


def _typical(name: str, samples: list[Sample]) -> dict[str, np.ndarray]:
    """One ordinary input: a sentence of 128 tokens, a decoding step behind 128, one picture."""
    family = name.split("-")[0]
    rng = np.random.default_rng(0)
    if family in ("bert", "a2"):
        names = samples[0].feeds
        feeds: dict[str, np.ndarray] = {key: np.zeros((1, 128), np.int64) for key in names}
        ids = next(key for key in names if "ids" in key and "type" not in key)
        feeds[ids] = rng.integers(5, 900, (1, 128))
        feeds |= {key: np.ones((1, 128), np.int64) for key in names if "mask" in key}
        return feeds
    if family in ("llama", "a3"):
        feeds = {}
        cached = any("past" in key for key in samples[0].feeds)
        new, past = (1, 128) if cached else (32, 0)
        for key, array in samples[0].feeds.items():
            if "past" in key:
                feeds[key] = rng.standard_normal((1, array.shape[1], past, array.shape[3]), np.float32)
            elif "mask" in key:
                feeds[key] = np.ones((1, past + new), np.int64)
            elif "position" in key:
                feeds[key] = np.arange(past, past + new)[None]
            else:
                feeds[key] = rng.integers(5, 900, (1, new))
        return feeds
    if name.startswith("a"):
        try:
            return dict(zoo.task(name).samples[0])
        except KeyError:
            pass
    return samples[0].feeds


def _in_turns(actions: dict[str, Callable[[], object]], rounds: int, stretch: float) -> dict[str, list[float]]:
    calls = {}
    for tool, action in actions.items():
        action()
        start = time.perf_counter()
        action()
        calls[tool] = max(1, round(stretch / max(time.perf_counter() - start, 1e-6)))
    times: dict[str, list[float]] = {tool: [] for tool in actions}
    order = list(actions)
    for number in range(rounds):
        for tool in order if number % 2 else reversed(order):
            start = time.perf_counter()
            for _ in range(calls[tool]):
                actions[tool]()
            times[tool].append((time.perf_counter() - start) / calls[tool] * 1e3)
    return times


def _latency(files: dict[str, Path], feeds: dict[str, np.ndarray], threads: int) -> dict[str, list[float]]:
    """With one thread all sessions live at once; with more, one at a time, since idle sessions' threads spin."""
    if threads == 1:
        runners = {tool: session.from_path(file, threads=1) for tool, file in files.items()}
        try:
            return _in_turns({tool: partial(runner.run, feeds) for tool, runner in runners.items()}, ROUNDS, STRETCH)
        finally:
            for runner in runners.values():
                runner.close()
    times: dict[str, list[float]] = {tool: [] for tool in files}
    for number in range(SESSION_ROUNDS):
        for tool in files if number % 2 else reversed(files):
            runner = session.from_path(files[tool], threads=threads)
            times[tool] += [float(np.median(_in_turns({"": partial(runner.run, feeds)}, 5, STRETCH / 2)[""]))]
            runner.close()
    return times


def _creation(files: dict[str, Path]) -> dict[str, list[float]]:
    return _in_turns({tool: partial(_create, file) for tool, file in files.items()}, ROUNDS, 0.0)


def _create(file: Path) -> None:
    session.from_path(file).close()


def main() -> None:
    """Measure the models named on the command line (all by default), keep the rest of the results, write the pages."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("models", nargs="*", default=list(zoo.MEASURED))
    parser.add_argument("--work", type=Path, default=zoo.ROOT / "rivals")
    parser.add_argument("--tools", nargs="*", default=list(rivals.TOOLS))
    parser.add_argument("--pages-only", action="store_true")
    given = parser.parse_args()
    kept = RESULTS / "exact.json"
    results: dict[str, Any] = json.loads(kept.read_text()) if kept.exists() else {}
    for name in [] if given.pages_only else given.models:
        print(name, flush=True)
        results[name] = measure(name, given.work, tuple(given.tools))
        kept.write_text(json.dumps(results, indent=1, sort_keys=True) + "\n")
    from burnish.tools.research import exact_pages

    exact_pages.write(results, RESULTS)


if __name__ == "__main__":
    main()
