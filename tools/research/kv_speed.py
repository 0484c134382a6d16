"""How fast decoders answer behind a long context when layers share keys and values: the last part of `kv.md`.

`python -m burnish.tools.research.kv speed` measures here what `kv.json` does not have yet.
"""

from __future__ import annotations

import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import onnx_ir as oir

from burnish.backends.decoding import loop
from burnish.backends.decoding.decoder import Decoder
from burnish.backends.decoding.engine import Array, Engine
from burnish.backends.decoding.state import State
from burnish.backends.ort import timing
from burnish.backends.ort.profiling import Profile, profile
from burnish.frontends import onnx_file
from burnish.ir.edit import name_nodes
from burnish.passes import catalog, kv_layout
from burnish.passes.kv_layers import KeyLayers
from burnish.passes.kv_search import Pairs
from burnish.passes.kv_sharing import roots, share
from burnish.passes.pipeline import Pipeline
from burnish.passes.recipes import NORMAL_FORM
from burnish.tools.decoders import open_decoder
from burnish.tools.research import zoo, zoo_handmade
from burnish.tools.research.decoding import SHAPE
from burnish.tools.research.depth import Numbers

ROWS, CONTEXTS = 4, (1024, 2048)
SPELLINGS = ("arithmetic", "Attention", "GroupQueryAttention")
LAYERS = 30

HEAD = """
## Answers behind a long context

One token for each of {rows} rows, in ONNX Runtime on one thread, with and without sharing in turns, by the time that
the thread had a processor. {count} layers are those that the search by loss chose; with CLA2 every second layer reads
the one before it. `arithmetic` is SmolLM2 as it was exported, whose caches grow by Concat and whose heads of keys are
repeated; `Attention` the same with the standard's operator; `GroupQueryAttention` has its layers, random weights and
500 words, so nearly no head, and writes into its caches. *caches* are the arrays that `generate` held then. *prefill*
is the time of the context of one row, one run each; *against none* is how many times as fast.

Sharing {count} of {layers} layers makes answers {least:.2f} to {most:.2f} times as fast; KVSharer's paper has 1.3 times
at 30 %. Every layer still looks at all keys: only projections and what is appended go.

| attention | context | layers that share | caches, MB | tokens/s | against none | prefill against none |
| --- | --- | --- | --- | --- | --- | --- |
"""
PARTS = """
Where the time of a step goes, in percent of the step without sharing (shares by ONNX Runtime's profile; *weights* are
products with constants, *repeat and append* is Concat, Expand and what else moves keys and values):

| attention | context | layers that share | weights | attention | repeat and append | rest | all |
| --- | --- | --- | --- | --- | --- | --- | --- |
"""
MOVES = {"Concat", "Expand", "Reshape", "Transpose", "Unsqueeze", "Slice", "Tile", "Gather"}
LOOKS = {"Softmax", "Attention", "GroupQueryAttention", "MultiHeadAttention", "MatMul", "FusedMatMul", "Where"}
KINDS = ("weights", "attention", "moves", "rest")


class _Heard:
    """An engine that keeps the inputs of its last call."""

    def __init__(self, engine: Engine) -> None:
        self.engine, self.writes = engine, engine.writes
        self.feeds: dict[str, Array] = {}

    def call(self, feeds: Mapping[str, Array], into: Mapping[str, Array]) -> dict[str, Array]:
        self.feeds = dict(feeds)
        return self.engine.call(feeds, into)

    def close(self) -> None:
        self.engine.close()


def _model(spelling: str) -> oir.Model:
    """The decoder in a spelling, in normal form."""
    if spelling != "GroupQueryAttention":
        passes = "raise-opset{to=23},fuse-attention{slower=true}" if spelling == "Attention" else ""
        pipeline = Pipeline([*NORMAL_FORM, *(catalog.parse(passes) if passes else ())])
        return pipeline.rewrite(onnx_file.read(zoo.path("a3-smollm2-kv"))).model
    with tempfile.TemporaryDirectory() as folder, mock.patch.dict(vars(zoo_handmade), SHAPE):
        zoo_handmade.Builder(layers=LAYERS).write(Path(folder) / "grouped.onnx")
        return Pipeline(NORMAL_FORM).rewrite(onnx_file.read(Path(folder) / "grouped.onnx")).model


def measure(numbers: Numbers, chosen: Pairs) -> None:
    """Each spelling behind each context, without sharing against both ways of sharing."""
    cla = roots(dict(enumerate(kv_layout.layout("CLA2", LAYERS, [None] * LAYERS))))
    for spelling in SPELLINGS:
        for context in CONTEXTS:
            for name, pairs in ((str(len(chosen)), chosen), ("CLA2", cla)):
                if name == "CLA2" and context < max(CONTEXTS):
                    continue
                numbers.get(f"speed | {spelling} | {context} | {name}", partial(_compared, spelling, context, pairs))


def _compared(spelling: str, context: int, pairs: Pairs) -> dict[str, Any]:
    """A step without and with sharing, in turns."""
    plain = _model(spelling)
    shared = plain.clone()
    share(shared, KeyLayers(shared), pairs)
    found: dict[str, Any] = {}
    steps, ids = [], np.random.default_rng(0).integers(1, 500, (ROWS, 1))
    with ExitStack() as stack:
        for name, model in (("plain", plain), ("shared", shared)):
            name_nodes(model)
            opened = open_decoder(model)
            stack.callback(opened.engine.close)
            heard = _Heard(opened.engine)
            state, one = _behind(Decoder(opened.ports, heard), context)
            state.feed(ids)
            found[name] = one | {"parts": _parts(profile(model, heard.feeds, seconds=8.0))}
            steps.append(partial(state.feed, ids))
        pair = timing.paired(steps[1], steps[0], rounds=16, seconds=40.0, alone=True)
    found["plain"]["seconds"], found["shared"]["seconds"] = pair.median_b, pair.median_a
    return found | {"ratio": pair.ratio, "low": pair.low, "high": pair.high}


def _behind(decoder: Decoder, context: int) -> tuple[State, dict[str, float]]:
    """Rows that remember a context, what their caches take, and the time of the context for one row."""
    ids = np.random.default_rng(1).integers(1, 500, (1, context))
    start = time.thread_time()
    row, _ = loop.prefill(decoder, ids.tolist())
    prefill = time.thread_time() - start
    state = row.select([0] * ROWS)
    return state, {"bytes": state.cache_bytes, "prefill": prefill}


def _parts(found: Profile) -> dict[str, float]:
    """Seconds of a step by what they are for."""
    constants = set(found.graph.initializers)
    seconds: defaultdict[str, float] = defaultdict(float)
    for kernel in found.kernels:
        node = kernel.node
        weight = node.inputs[1] if "MatMul" in node.op_type else None
        if weight is not None and weight.name in constants:
            kind = "weights"
        elif node.op_type in LOOKS:
            kind = "attention"
        else:
            kind = "moves" if node.op_type in MOVES else "rest"
        seconds[kind] += kernel.seconds
    return {kind: seconds[kind] for kind in KINDS}


def page(numbers: Mapping[str, Any], count: int) -> Iterator[str]:
    """The part of the page."""
    known = {tuple(name.split(" | ")[1:]): one for name, one in numbers.items() if name.startswith("speed")}
    if not known:
        return
    ratios = [one["ratio"] for (_, _, way), one in known.items() if way == str(count)]
    yield HEAD.format(rows=ROWS, count=count, layers=LAYERS, least=min(ratios), most=max(ratios))
    for (spelling, context, way), one in known.items():
        cells = []
        for name, label in (("plain", "none"), ("shared", way)):
            against = ("1", "1")
            if name == "shared":
                against = (
                    f"{one['ratio']:.2f} ({one['low']:.2f} to {one['high']:.2f})",
                    f"{one['plain']['prefill'] / one['shared']['prefill']:.2f}",
                )
            row = one[name]
            sizes = f"{row['bytes'] / 1e6:.1f} | {ROWS / row['seconds']:.1f}"
            cells.append(f"| {spelling} | {context} | {label} | {sizes} | {' | '.join(against)} |\n")
        yield "".join(cells)
    yield PARTS
    for (spelling, context, way), one in known.items():
        for name, label, time_ in (("plain", "none", 1.0), ("shared", way, 1 / one["ratio"])):
            whole = sum(one[name]["parts"].values()) / time_
            parts = [one[name]["parts"][kind] / whole * 100 for kind in KINDS]
            yield f"| {spelling} | {context} | {label} | {' | '.join(f'{x:.0f}' for x in (*parts, sum(parts)))} |\n"
