"""Measure FPTQ: `OMP_NUM_THREADS=1 python -m burnish.tools.research.quant_fptq a2|a3|vit [ROW...]`.

Rows that begin with `simulated` round in floating point what no kernel computes: weights of 4 bits in blocks of 128 and
activations of 8 bits with fixed scales, or one for each token. The others are what `quantize-fptq` writes, run by ONNX
Runtime, with the kernels that it took. Nothing was calibrated on what is measured. Rows that are named are made, else
all. Writes `docs/results/quant-fptq.json` after each row and `quant-fptq.md`.
"""

from __future__ import annotations

import gc
import json
import sys
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnx_ir as oir

from burnish.backends.ort.assigned import assigned
from burnish.backends.ort.session import executor
from burnish.ir import weights
from burnish.ir.edit import name_nodes
from burnish.ir.samples import Sample
from burnish.ir.views.linear import find_linear, linears
from burnish.passes import calibration, catalog, equalization, lossy, qdq, ranges
from burnish.passes.base import Outcome
from burnish.passes.equalization import Group, Sources
from burnish.passes.grids import Grid
from burnish.passes.kernels_of_integers import Blocks
from burnish.passes.lossy import Context, LossyPass
from burnish.passes.pipeline import constant_bytes
from burnish.passes.simulated import TokenRounding
from burnish.tools.lossy_context import context_for
from burnish.tools.research.quant_weights import Bed, minilm, smollm

RESULTS = Path(__file__).resolve().parents[2] / "docs" / "results"
NUMBERS = RESULTS / "quant-fptq.json"
V0, V1 = 15.0, 150.0

_S = "simulated "
_NAMES = {
    "a2": ("all-MiniLM-L6 (A2)", "R@1", "60 texts, calibrated on 96 others"),
    "a3": ("SmolLM2-135M (A3)", "perplexity", "lower is better; 8 texts of 256 tokens, calibrated on 4 others"),
    "vit": ("the digits ViT", "accuracy", "250 held-out digits, calibrated on 250 others"),
}
_WAYS = {
    "static": "fixed scale",
    "token": "per token",
    "equalized": "equalized",
    "folded": "of them without a product",
    "kept": "by a product",
    "without": "without a product",
}
_RATIOS = (
    (
        "All equalized, fixed scale, only activations rounded",
        "error",
        _S + "A8, fixed, all equalized",
        _S + "A8, fixed",
    ),
    (
        "The same without zero points",
        "error",
        _S + "A8, fixed, no zero point, all equalized",
        _S + "A8, fixed, no zero point",
    ),
    ("FPTQ by thresholds, simulated", "error", _S + "FPTQ, thresholds", _S + "W4A8, per token"),
    ("MatMulNBits, none equalized", "metric", "int4, none equalized", _S + "W4A16"),
    ("MatMulNBits, by error", "metric", "int4, by error", _S + "W4A16"),
    ("MatMulNBits, by error", "error", "int4, by error", "int4, none equalized"),
    ("MatMulNBits, none equalized, gptq", "metric", "int4, none equalized, gptq", _S + "W4A16, gptq"),
    ("MatMulNBits, by error, gptq", "metric", "int4, by error, gptq", _S + "W4A16, gptq"),
    (
        "MatMulNBits, blocks of 32, none equalized, gptq",
        "metric",
        "int4, blocks of 32, none equalized, gptq",
        _S + "W4A16, blocks of 32, gptq",
    ),
    (
        "MatMulNBits, blocks of 32, by error, gptq",
        "metric",
        "int4, blocks of 32, by error, gptq",
        _S + "W4A16, blocks of 32, gptq",
    ),
    ("8-bit weights, by error", "error", "int8, by error", "int8, none equalized"),
)
_HEAD = """# Weights of 4 bits and activations of 8, measured

Made by `python -m burnish.tools.research.quant_fptq`; numbers in [quant-fptq.json](quant-fptq.json).
[quantize-fptq](../ideas/quantization.md) run by ONNX Runtime 1.32 on a CPU, with the kernels that it took, and beside
it what FPTQ's own rounding would do, *simulated* in floating point, since no kernel computes it: weights of 4 bits in
blocks of 128, activations of 8 bits with one fixed scale (of the least and largest number on the calibration samples),
or one for each token. `error` is the relative Frobenius error of all outputs against float32. `divided` counts values,
each of which one or more layers read. Tables and tied heads stay in float32.
Products in float32 are those of attention, of which neither side is constant, and the tied head of A3.
"""

Way = Literal["float", "static", "equalized", "token"]
"""How the inputs of layers are rounded: not, with a fixed scale, so after equalizing, with one for each token."""

Route = Callable[[float], Way]
"""The way for a value, by its largest magnitude."""


def thresholds(largest: float) -> Way:
    """The routing of the paper."""
    return "static" if largest <= V0 else "equalized" if largest < V1 else "token"


def simulated(bed: Bed, context: Context, route: Route, bits: int, symmetric: bool) -> tuple[oir.Model, dict[str, Any]]:
    """A copy that computes in floating point what rounded numbers would; `bits` of weights is 4, or 0 for none."""
    model = bed.model.clone()
    found, _ = equalization.groups(model)
    seen = {group: one for group, one in equalization.observed(model, found, context) if not isinstance(one, str)}
    ways: dict[Group, Way] = {group: route(float(one.largest.max())) for group, one in seen.items()}
    sources = Sources(model)
    folded = 0
    for group, way in ways.items():
        if way == "equalized":
            source = sources.of(group)
            folded += not isinstance(source, str)
            scale = equalization.logarithmic(seen[group].largest)
            equalization.equalize(model, group, scale, None if isinstance(source, str) else source)
    nodes = {group: [layer.node for layer in group.layers.values()] for group in ways}
    inputs = {group: nodes[group][0].inputs[0] for group in ways}
    fixed = {inputs[group]: nodes[group] for group, way in ways.items() if way in ("static", "equalized")}
    grid = Grid(8, signed=symmetric, symmetric=symmetric)
    values = [value for value in fixed if value is not None]
    known = calibration.observed(model, values, [], context, grid, ("minmax",), 100.0, 1 << 30)
    for value, readers in fixed.items():
        assert value is not None
        ends = known.known["minmax"][str(value.name)]
        qdq.put_pair(model, value, ranges.scales(float(ends[0]), float(ends[1]), grid), readers)
    rounding = TokenRounding(model)
    for group, way in ways.items():
        value = inputs[group]
        if way == "token" and value is not None:
            rounding.round(value, 8, 1.0, readers=nodes[group])
    for group in ways if bits else ():
        for node in nodes[group]:
            layer = find_linear(node)
            assert layer is not None
            layer.write(model, Blocks(128).weight(layer.weight()), layer.bias())
    routed = dict(Counter(ways.values())) | {"folded": folded}
    return model, {"routed": routed}


def made(bed: Bed, context: Context, **options: Any) -> tuple[oir.Model, dict[str, Any]]:
    """What `quantize-fptq` makes, the kernels that ONNX Runtime takes, and how many values were divided."""
    one = catalog.make("quantize-fptq", options)
    assert isinstance(one, LossyPass)
    edits = one.propose(bed.model, context, Outcome("quantize-fptq"))
    model = lossy.apply(bed.model, edits, [one])[0]
    name_nodes(model)
    ways = {"folded": "without", "kept": "kept"}
    divided = {(key.partition(" ")[0], id(array)) for edit in edits for key, array in edit.payload.items()}
    routed = Counter(ways[kind] for kind, _ in divided if kind in ways)
    return model, {"kernels": dict(Counter(assigned(model).values())), "routed": dict(routed)}


def unrounded(bed: Bed, context: Context, **options: Any) -> tuple[oir.Model, dict[str, Any]]:
    """A copy with the weights that `quantize-fptq` stores, in float32, so that activations are not rounded.

    No value may be divided: the options have to say so.
    """
    stored = {layer.node.name: layer.weight() for layer in linears(made(bed, context, **options)[0])}
    model = bed.model.clone()
    for layer in linears(model):
        weight = stored[layer.node.name]
        if not np.array_equal(weight, layer.weight()):
            layer.write(model, weight, layer.bias())
    return model, {}


Make = Callable[[Bed, Context], tuple[oir.Model, dict[str, Any]]]


def _simulated(route: Route, bits: int = 4, *, symmetric: bool = False) -> Make:
    return lambda bed, context: simulated(bed, context, route, bits, symmetric)


def _made(**options: Any) -> Make:
    return lambda bed, context: made(bed, context, **options)


_NONE: dict[str, Any] = {"route": "thresholds", "v0": 1e30, "v1": 1e30}
"""No value is divided."""

ROWS: dict[str, Make] = {
    "float32": lambda bed, context: (bed.model, {}),
    "simulated A8, fixed": _simulated(lambda _: "static", 0),
    "simulated A8, per token": _simulated(lambda _: "token", 0),
    "simulated A8, fixed, all equalized": _simulated(lambda _: "equalized", 0),
    "simulated A8, fixed, no zero point": _simulated(lambda _: "static", 0, symmetric=True),
    "simulated A8, fixed, no zero point, all equalized": _simulated(lambda _: "equalized", 0, symmetric=True),
    "all equalized, nothing rounded": lambda bed, context: _equalized(bed, context),
    "simulated W4A16": _simulated(lambda _: "float"),
    "simulated W4A16, gptq": lambda bed, context: unrounded(bed, context, rounding="gptq", **_NONE),
    "simulated W4A16, blocks of 32, gptq": lambda bed, context: unrounded(
        bed, context, block=32, rounding="gptq", **_NONE
    ),
    "simulated W4A8, fixed": _simulated(lambda _: "static"),
    "simulated W4A8, per token": _simulated(lambda _: "token"),
    "simulated W4A8, fixed, all equalized": _simulated(lambda _: "equalized"),
    "simulated FPTQ, thresholds": _simulated(thresholds),
    "int4, by thresholds": _made(route="thresholds"),
    "int4, by error": _made(),
    "int4, none equalized": _made(**_NONE),
    "int4, all equalized": _made(route="thresholds", v0=0.0, v1=1e30),
    "int4, blocks of 32, by error": _made(block=32),
    "int4, none equalized, gptq": _made(rounding="gptq", **_NONE),
    "int4, by error, gptq": _made(rounding="gptq"),
    "int4, blocks of 32, none equalized, gptq": _made(block=32, rounding="gptq", **_NONE),
    "int4, blocks of 32, by error, gptq": _made(block=32, rounding="gptq"),
    "int8, by thresholds": _made(route="thresholds", lowering="int8"),
    "int8, by error": _made(lowering="int8"),
    "int8, none equalized": _made(lowering="int8", **_NONE),
}


def _equalized(bed: Bed, context: Context) -> tuple[oir.Model, dict[str, Any]]:
    model = bed.model.clone()
    sources, folded = Sources(model), 0
    found = list(equalization.observed(model, equalization.groups(model)[0], context))
    for group, seen in found:
        assert not isinstance(seen, str)
        source = sources.of(group)
        folded += not isinstance(source, str)
        scale = equalization.logarithmic(seen.largest)
        equalization.equalize(model, group, scale, None if isinstance(source, str) else source)
    return model, {"routed": {"equalized": len(found), "folded": folded}}


def vit() -> Bed:
    """The digits ViT, calibrated on the training digits that are not held out."""
    from burnish.frontends import onnx_file
    from burnish.passes.pipeline import Pipeline
    from burnish.passes.recipes import NORMAL_FORM

    demo = Path(__file__).resolve().parents[1] / "demo"
    held = np.load(demo / "digits.npz")
    keys = list(held)
    model = Pipeline(NORMAL_FORM).rewrite(onnx_file.read(demo / "digits_vit.onnx")).model
    name_nodes(model)
    (port,) = [str(value.name) for value in model.graph.inputs]
    labels = next(held[key] for key in keys if held[key].ndim == 1)
    images = next(held[key] for key in keys if held[key].ndim > 1)
    half = len(images) // 2
    samples = [Sample(str(start), {port: images[start : start + 16]}) for start in range(0, half, 16)]

    def accuracy(outputs: Any) -> float:
        guesses = np.concatenate([next(iter(one.values())).argmax(-1) for one in outputs])
        return float((guesses == labels[half:]).mean())

    tests = [Sample("held out", {port: images[half:]})]
    return Bed(model, samples, tests, accuracy)


def _a3() -> Bed:
    bed = smollm()
    return replace(bed, calibration=bed.calibration[:4])


BEDS: dict[str, Callable[[], Bed]] = {"a2": minilm, "a3": _a3, "vit": vit}


def measure(name: str, wanted: list[str]) -> None:
    """Make the rows of a model, and write what is known after each."""
    bed = BEDS[name]()
    context = context_for(bed.model, bed.calibration)
    runner = executor()(bed.model)
    reference = [runner.run(sample.feeds) for sample in bed.evaluation]
    runner.close()
    for row in wanted or ROWS:
        start = time.process_time()
        model, more = ROWS[row](bed, context)
        seconds = time.process_time() - start
        runner = executor()(model)
        outputs = [runner.run(sample.feeds) for sample in bed.evaluation]
        runner.close()
        pairs = [(one[k], was[k]) for one, was in zip(outputs, reference, strict=True) for k in was]
        apart = sum(float(((one - was) ** 2).sum()) for one, was in pairs)
        size = sum(float((was.astype(np.float64) ** 2).sum()) for _, was in pairs)
        found = {
            "metric": bed.metric(outputs),
            "error": (apart / size) ** 0.5,
            "bytes": constant_bytes(model),
            "seconds": seconds,
        }
        _note(name, row, found | more)
        print(row, found | more, flush=True)
        if model is not bed.model:
            weights.release(model)
        del model, outputs
        gc.collect()
    write()


def _known() -> dict[str, dict[str, dict[str, Any]]]:
    return json.loads(NUMBERS.read_text()) if NUMBERS.exists() else {}


def _note(name: str, row: str, found: Mapping[str, Any]) -> None:
    known = _known()
    known.setdefault(name, {})[row] = dict(found)
    NUMBERS.write_text(json.dumps(known, indent=1, sort_keys=True) + "\n")
    write()


def write() -> None:
    """Write the page."""
    parts = [_HEAD]
    for name, rows in _known().items():
        title, metric, told = _NAMES[name]
        parts.append(f"## {title}\n\n{told[0].upper()}{told[1:]}.\n")
        parts.append(f"| | {metric} | error | MB | divided | kernels |\n| --- | --- | --- | --- | --- | --- |")
        for row in ROWS:
            if row in rows:
                parts.append(_line(row, rows[row]))
        parts += ["", *_ratios(rows), ""]
    (RESULTS / "quant-fptq.md").write_text("\n".join(parts))


def _ratios(rows: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """What is asked of the method, as ratios of rows that are there."""
    found = []
    for what, kind, above, below in _RATIOS:
        if above in rows and below in rows:
            number = rows[above][kind] / rows[below][kind]
            found.append(f"- {what}: {kind if kind == 'error' else 'metric'} {number:.3f} times that of *{below}*.")
    return found


def _line(row: str, found: Mapping[str, Any]) -> str:
    ways = found.get("routed", {})
    own = {name: count for name, count in ways.items() if name != "float" and count}
    routed = ", ".join(f"{count} {_WAYS[name]}" for name, count in sorted(own.items()))
    kernels = ", ".join(f"{count} {name}" for name, count in sorted(found.get("kernels", {}).items()))
    size = "" if row.startswith(("simulated", "all")) else f"{found['bytes'] / 1e6:.1f}"
    return f"| {row} | {found['metric']:.3f} | {_shown(found['error'])} | {size} | {routed} | {kernels} |"


def _shown(error: float) -> str:
    return f"{error:.4f}" if error > 1e-4 or not error else f"{error:.1e}"


if __name__ == "__main__":
    measure(sys.argv[1], sys.argv[2:])
