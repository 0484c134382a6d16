"""Whether exported decoders compute with caches what they compute at once, and how fast they decode.

`python -m burnish.tools.research.decoding parity|perplexity|speed [FOLDER]` measures, on the models of `zoo.py` in
FOLDER (.zoo), keeps the numbers in `docs/results/decoding.json` and writes `docs/results/decoding.md`. A speed whose
numbers are there is not measured again.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np

from burnish.backends.decoding import loop
from burnish.backends.decoding.decoder import Decoder
from burnish.backends.decoding.engine import Engine, RunnerEngine
from burnish.backends.decoding.parity import parity, perplexity
from burnish.backends.ort import session, timing
from burnish.backends.ort.writing import OrtEngine
from burnish.frontends import onnx_file
from burnish.ir.errors import InputError
from burnish.passes import catalog
from burnish.passes.base import Outcome
from burnish.passes.pipeline import Pipeline
from burnish.passes.recipes import NORMAL_FORM
from burnish.tools.decoders import open_decoder
from burnish.tools.research import zoo_handmade, zoo_tasks

RESULTS = Path(__file__).resolve().parents[2] / "docs" / "results"
NUMBERS = RESULTS / "decoding.json"
FAMILIES = ("llama-", "llama-kv-", "gemma-kv-", "qwen-", "genai-", "phi-", "gpt2-")
SHAPE = {"WIDTH": 576, "HEADS": 9, "KV_HEADS": 3, "HEAD": 64, "INNER": 1536, "VOCABULARY": 500, "POSITIONS": 8192}
"""SmolLM2-135M without its table and head."""

_HEAD = """# Decoding, measured

Made by `python -m burnish.tools.research.decoding`; numbers in [decoding.json](decoding.json). What is measured is what
[burnish generate](../commands/generate.md) runs.
"""
_PARITY = """## Step by step is at once

Every export of a decoder in the zoo (random weights, four exporters and what onnxsim, onnxslim and ONNX Runtime make
of them) that takes caches, and every other one that `add-kv-cache` gives some. The largest difference of a score,
relative to the largest score, over texts of 12 and of 60 tokens fed in two pieces and token by token, alone and in a
batch of two with 3 and 23 slots of padding, against the text at once and alone. `packing` is where the tokens of a
shorter row lie; GPT-2 counts its positions by slots, padding included, which is found out. Refused: {refused}.

| model | packing | rows of any lengths | difference |
| --- | --- | --- | --- |
"""
_PERPLEXITY = """## SmolLM2-135M (A3)

Perplexity of held-out texts of 256 tokens, at once and in pieces with the caches of what came before; pieces of 1 are
decoding.

| texts | tokens fed at once | perplexity |
| --- | --- | --- |
"""
_SPEED = """## What a step takes

One token for each row behind a context, on one thread of a machine with much other work, timed in turns: `plain` hands
arrays to the session and takes new ones, `bound` binds arrays that are used again, and writes keys and values of
GroupQueryAttention into the buffer that holds the old ones. The decoder with GroupQueryAttention has the layers of
SmolLM2, random weights and 500 words.

| model | rows | context | caches, MB | plain, ms | bound, ms | plain / bound | 95 % interval |
| --- | --- | --- | --- | --- | --- | --- | --- |
"""
_BATCH = """
## Batches

SmolLM2, {tokens} tokens behind prompts of 20 to 60 tokens, greedy, one thread, one run each,
with much other work on the machine:

| rows | prompt, tokens/s | answers, tokens/s |
| --- | --- | --- |
"""


def _read() -> dict[str, Any]:
    return json.loads(NUMBERS.read_text()) if NUMBERS.exists() else {}


def _keep(part: str, found: Any) -> None:
    NUMBERS.write_text(json.dumps(_read() | {part: found}, indent=1) + "\n")


def _all_parity(zoo: Path) -> None:
    rows, refused = {}, []
    for path in sorted(zoo.glob("*.onnx")):
        if not path.name.startswith(FAMILIES):
            continue
        opened = _opened(path)
        if opened is None:
            refused.append(path.stem)
            continue
        name, decoder = opened
        found = [parity(decoder), parity(decoder, length=60, pads=23)]
        worst = max(one.relative for one in found)
        rows[name] = {"packing": decoder.ports.packing, "mixes": decoder.mixes, "relative": worst}
        print(name, worst, flush=True)
        decoder.close()
    _keep("parity", {"rows": rows, "refused": refused})


def _opened(path: Path) -> tuple[str, Decoder] | None:
    """A name and a decoder, with caches added where there are none; None where that cannot be."""
    with suppress(InputError):
        return path.stem, open_decoder(path)
    with suppress(InputError):
        model = Pipeline(NORMAL_FORM).rewrite(onnx_file.read(path)).model
        (one,) = catalog.parse("add-kv-cache")
        one.rewrite(model, Outcome("add-kv-cache"))
        return f"{path.stem}, add-kv-cache", open_decoder(model)
    return None


def _all_perplexity(zoo: Path) -> None:
    decoder = open_decoder(zoo / "a3-smollm2-kv.onnx")
    task = zoo_tasks.load("a3-smollm2-kv", zoo)
    texts = [label.astype(np.int64) for label in task.labels]
    rows = []
    for count, piece in ((8, None), (8, 64), (8, 16), (2, None), (2, 1)):
        found = perplexity(decoder, texts[:count], piece=piece)
        rows.append({"texts": count, "piece": piece, "perplexity": found})
        print(rows[-1], flush=True)
    _keep("perplexity", rows)


def _speed(zoo: Path) -> None:
    rows: list[dict[str, Any]] = _read().get("speed", [])
    known = {(one["model"], one["rows"], one["context"]) for one in rows}
    with tempfile.TemporaryDirectory() as folder:
        grouped = Path(folder) / "grouped.onnx"
        with mock.patch.dict(vars(zoo_handmade), SHAPE):
            zoo_handmade.Builder(layers=30).write(grouped)
        for name, path in (("SmolLM2-135M", zoo / "a3-smollm2-kv.onnx"), ("GroupQueryAttention", grouped)):
            decoder = open_decoder(path)
            runner = session.executor()(onnx_file.read(path))
            engines: list[Engine] = [RunnerEngine(runner), OrtEngine(runner)]
            for batch, context in ((1, 64), (1, 1024), (4, 1024)):
                if (name, batch, context) not in known:
                    rows.append({"model": name} | _step(decoder, engines, batch, context))
                    print(rows[-1], flush=True)
                    _keep("speed", rows)
            decoder.close()
            runner.close()
    _keep("batches", _batches(zoo))


def _step(decoder: Decoder, engines: list[Engine], batch: int, context: int) -> dict[str, Any]:
    ids = np.random.default_rng(0).integers(1, 500, (batch, context))
    steps: list[Callable[[], object]] = []
    for engine in engines:
        state, _ = loop.prefill(Decoder(decoder.ports, engine), ids.tolist())
        steps.append(partial(state.feed, ids[:, :1]))
        held = state.cache_bytes
    bound, plain = steps[1], steps[0]
    found = timing.paired(bound, plain, rounds=16, seconds=20.0)
    row = {"rows": batch, "context": context, "bytes": held, "plain": found.median_b, "bound": found.median_a}
    return row | {"ratio": found.ratio, "low": found.low, "high": found.high}


def _batches(zoo: Path, tokens: int = 24) -> list[dict[str, Any]]:
    decoder = open_decoder(zoo / "a3-smollm2-kv.onnx")
    task = zoo_tasks.load("a3-smollm2-kv", zoo)
    rows = []
    for batch in (1, 2, 4, 8):
        lengths = np.linspace(20, 60, batch).astype(int) if batch > 1 else [40]
        asks = [loop.Ask(tuple(map(int, task.labels[row][:n])), tokens) for row, n in enumerate(lengths)]
        _, took = loop.generate(decoder, asks)
        speeds = took.prompt_tokens / took.prefill_seconds, took.decode_tokens / took.decode_seconds
        rows.append({"rows": batch, "prefill": speeds[0], "decode": speeds[1], "tokens": tokens})
        print(rows[-1], flush=True)
    return rows


def _lines(numbers: dict[str, Any]) -> Iterator[str]:
    yield _HEAD
    if "parity" in numbers:
        found = numbers["parity"]
        families = sorted({name.partition("-")[0] for name in found["refused"]})
        said = f"{len(found['refused'])} of {', '.join(families)}" if families else "none"
        yield _PARITY.format(refused=said).rstrip()
        for name, one in found["rows"].items():
            yield f"| {name} | {one['packing']} | {'yes' if one['mixes'] else 'no'} | {one['relative']:.1e} |"
    if "perplexity" in numbers:
        yield f"\n{_PERPLEXITY.rstrip()}"
        for one in numbers["perplexity"]:
            yield f"| {one['texts']} | {one['piece'] or 'all'} | {one['perplexity']:.4f} |"
    if "speed" in numbers:
        yield f"\n{_SPEED.rstrip()}"
        for one in numbers["speed"]:
            times = f"{one['plain'] * 1e3:.0f} | {one['bound'] * 1e3:.0f} | {one['ratio']:.2f}"
            spread = f"{one['low']:.2f} to {one['high']:.2f}"
            size = f"{one['rows']} | {one['context']} | {one['bytes'] / 1e6:.1f}"
            yield f"| {one['model']} | {size} | {times} | {spread} |"
    if "batches" in numbers:
        yield _BATCH.format(tokens=numbers["batches"][0]["tokens"]).rstrip()
        for one in numbers["batches"]:
            yield f"| {one['rows']} | {one['prefill']:.0f} | {one['decode']:.1f} |"


def main() -> None:
    """Measure one part and write the page."""
    part, zoo = sys.argv[1], Path(sys.argv[2] if len(sys.argv) > 2 else ".zoo")
    {"parity": _all_parity, "perplexity": _all_perplexity, "speed": _speed}[part](zoo)
    (RESULTS / "decoding.md").write_text("\n".join(_lines(_read())) + "\n")


if __name__ == "__main__":
    main()
