"""What rotations and scales do to a model with few bits: `docs/results/quant-rotation.md`, and its numbers in JSON.

`python -m burnish.tools.research.quant_rotation` measures what the JSON does not have yet and writes the page; every
number is kept as soon as it is known, so a run that was killed goes on where it was. `... page` only writes the page.
Nothing here runs on 4-bit kernels: bits are simulated in floating point (`burnish.passes.simulated`).
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as oir

from burnish.backends.ort.session import executor
from burnish.backends.reference.runner import ReferenceRunner
from burnish.frontends import onnx_file
from burnish.ir.edit import name_nodes
from burnish.ir.samples import Sample
from burnish.passes import catalog, learned, lossy, rotation, simulated, turning, verify
from burnish.passes.base import Outcome
from burnish.passes.lossy import LossyPass
from burnish.passes.pipeline import Pipeline, constant_bytes
from burnish.passes.quant.simulate_bits import SimulateBits
from burnish.passes.recipes import NORMAL_FORM
from burnish.passes.simulated import Bits
from burnish.tools.lossy_context import context_for
from burnish.tools.research import quant_rotation_learn, zoo, zoo_tasks
from burnish.tools.research.quant_rotation_learn import LEARNED, MODEL, SEEDS
from burnish.tools.research.quant_weights import smollm

FOLDER = Path(__file__).resolve().parents[2] / "docs" / "results"
NUMBERS, PAGE = FOLDER / "quant-rotation.json", FOLDER / "quant-rotation.md"

WINDOWS = 8
"""Texts of the perplexity task, of 256 tokens each."""

REPLAYED = 12
"""Tokens on which outputs are compared in float64."""

WAYS: dict[str, str] = {
    "nothing": "",
    "QuaRot, seed 0": "rotate-residual",
    "QuaRot, seed 1": "rotate-residual{seed=1}",
    "QuaRot, seed 2": "rotate-residual{seed=2}",
    "QuaRot and balanced, seed 0": "rotate-residual,scale-pairs",
    "axes of the weights first, seed 0": "rotate-residual{init=klt}",
    "axes of the weights first, seed 1": "rotate-residual{init=klt;seed=1}",
}
"""Passes before few bits."""

GPTQ = tuple(way for way in WAYS if way.startswith("QuaRot, seed"))
"""Ways whose weights are rounded by GPTQ, too."""

PARTS = {"weights": (4, 0, 0), "activations": (0, 4, 0), "cache": (0, 0, 4), "activations and cache": (0, 4, 4)}
"""Bits of weights, activations and cache behind QuaRot of seed 0."""

LAYERS = ("", "rotate-residual", "rotate-residual,scale-pairs")
BLOCKS = {32: "32", 128: "128", 2048: "all inputs"}
"""Passes before weights of 4 bits, and how many inputs share a scale."""

NORM = 40
"""Of 61 norms of the stream, before which its numbers are looked at."""

KINDS = {"nothing": "as it is", "hadamard": "behind the matrix", "klt": "behind the axes and the matrix"}

EXACT = {
    "rotated": "rotate-residual",
    "rotated and balanced": "rotate-residual,scale-pairs",
    "rotated, also when it runs": "rotate-residual{online=true}",
}


@cache
def original() -> oir.Model:
    """The language model in normal form."""
    return Pipeline(NORMAL_FORM).rewrite(onnx_file.read(zoo.path(MODEL))).model


def made(spec: str) -> oir.Model:
    """The model behind exact passes."""
    if not spec:
        return original().clone()
    return Pipeline(catalog.parse(spec)).rewrite(original()).model


def perplexity(model: oir.Model) -> float:
    """On the first windows of the task."""
    task = zoo_tasks.load(MODEL, zoo.ROOT)
    runner = executor(threads=1, lean=True)(model)
    outputs = [runner.run(sample) for sample in task.samples[:WINDOWS]]
    runner.close()
    return zoo_tasks.perplexity_of(task.labels[:WINDOWS])(outputs)


def simulated_perplexity(model: oir.Model, bits: Bits, *, hadamard: bool = True) -> float:
    """With few bits, weights rounded by their own squared error."""
    few = model.clone()
    simulated.simulate(few, bits, hadamard=hadamard)
    return perplexity(few)


def gptq_perplexity(model: oir.Model) -> dict[str, float]:
    """With 4 bits for weights, activations and cache, and for weights alone, rounded by GPTQ on 32 texts of 256 tokens.

    `clipped` has grids for activations and cache that span 0.9 and 0.95 of what they do otherwise (QuaRot's paper),
    `narrow` 0.85 and 0.95.
    """
    name_nodes(model)
    one = SimulateBits(clip=1.0, cache_clip=1.0)
    (edit,) = one.propose(model, context_for(model, smollm().calibration), Outcome(one.pass_name()))
    ways = {
        "perplexity": one,
        "weights": replace(one, activations=0, cache=0),
        "clipped": replace(one, clip=0.9, cache_clip=0.95),
        "narrow": replace(one, clip=0.85, cache_clip=0.95),
    }
    edits = {name: replace(edit, spec=catalog.spec(way)) for name, way in ways.items()}
    return {name: perplexity(lossy.apply(model, [edits[name]], [way])[0]) for name, way in ways.items()}


def _edited(model: oir.Model, spec: str, samples: list[Sample]) -> oir.Model:
    (one,) = catalog.parse(spec)
    assert isinstance(one, LossyPass)
    name_nodes(model)
    outcome = Outcome(one.pass_name())
    edits = one.propose(model, context_for(model, samples), outcome) if one.decided else one.asked(model, outcome)
    return lossy.apply(model, edits, [one])[0]


def weights_only(spec: str, block: int, rounding: str) -> dict[str, float]:
    """The perplexity with weights of 4 bits behind passes, heads and tables aside, and what all constants take."""
    bed = smollm()
    model = Pipeline([*catalog.parse(spec), *NORMAL_FORM]).rewrite(bed.model).model if spec else bed.model
    few = _edited(model, f"quantize-weights{{bits=4;block={block};rounding={rounding};embeddings=no}}", bed.calibration)
    runner = executor(threads=1)(few)
    outputs = [runner.run(sample.feeds) for sample in bed.evaluation]
    runner.close()
    return {"perplexity": bed.metric(outputs), "bytes": constant_bytes(few)}


def difference(model: oir.Model) -> dict[str, float]:
    """The largest difference of logits to the original's, relative to the largest logit, in float32 and in float64."""
    task = zoo_tasks.load(MODEL, zoo.ROOT)
    feeds = {name: array[:, :REPLAYED] for name, array in task.samples[0].items()}
    replay = verify.replay(ReferenceRunner(original()), ReferenceRunner(model), Sample("text", feeds))
    rows = []
    for one in (original(), model):
        runner = executor(threads=1, lean=True)(one)
        rows.append(next(iter(runner.run(task.samples[0]).values())).astype(np.float64))
        runner.close()
    single = float(np.abs(rows[0] - rows[1]).max() / np.abs(rows[0]).max())
    return {"float32": single, "float64": float(replay)}


def _exactness(spec: str) -> dict[str, float]:
    return difference(made(spec))


def learned_model(seed: int) -> oir.Model:
    """The model behind what was learned."""
    model = original().clone()
    learned.merge(model, quant_rotation_learn.load(quant_rotation_learn.file_of(seed))[0])
    return model


def learned_rotations(seed: int) -> dict[str, Any]:
    """How it was learned, what merging it does to the logits, and the perplexity with few bits but for weights."""
    record = quant_rotation_learn.load(quant_rotation_learn.file_of(seed))[1]
    model = learned_model(seed)
    few = simulated_perplexity(model, replace(LEARNED.bits, weights=0))
    return record | {"losses": record["losses"][::10], "exact": difference(model), "activations and cache": few}


def steps() -> dict[str, float]:
    """How large a step the 4-bit grid of the first token has before norm `NORM`, and what one channel has of it."""
    model = original().clone()
    stream = learned.stream_of(model)
    value = stream.norms[NORM].input
    model.graph.outputs.append(value)
    runner = executor(threads=1, lean=True)(model)
    row = runner.run(zoo_tasks.load(MODEL, zoo.ROOT).samples[0])[str(value.name)][0, 0].astype(np.float64)
    runner.close()
    turns = {
        "nothing": np.eye(stream.width),
        "hadamard": rotation.random_hadamard(stream.width, 0),
        "klt": rotation.flattening(turning.covariance(stream), 0),
    }
    made = {kind: row @ turn for kind, turn in turns.items()}
    found = {kind: float((x.max() - min(x.min(), 0)) / 15 / np.sqrt((x**2).mean())) for kind, x in made.items()}
    return found | {"share": float((row**2).max() / (row**2).sum())}


class Numbers:
    """What is known so far, kept in a file."""

    def __init__(self, file: Path) -> None:
        self.file = file
        self.known: dict[str, Any] = json.loads(file.read_text()) if file.exists() else {}

    def get(self, name: str, measure: Callable[[], Any]) -> Any:
        """The number called so, measured now if it is not known."""
        if name not in self.known:
            self.known[name] = measure()
            print(name, self.known[name], flush=True)
            unfinished = self.file.with_suffix(".partial")
            unfinished.write_text(json.dumps(self.known, indent=1, sort_keys=True) + "\n")
            os.replace(unfinished, self.file)
        return self.known[name]


def measure(numbers: Numbers) -> None:
    """Everything that the page shows."""
    numbers.get("float32", lambda: perplexity(original()))
    numbers.get("steps", steps)
    for label, spec in EXACT.items():
        numbers.get(f"exact | {label}", partial(_exactness, spec))
    for spec in LAYERS:
        for block in BLOCKS:
            for rounding in ("nearest", "gptq"):
                numbers.get(f"weights | {spec} | {block} | {rounding}", partial(weights_only, spec, block, rounding))
    for way, spec in WAYS.items():
        numbers.get(
            f"W4A4KV4 | {way}",
            lambda spec=spec: simulated_perplexity(made(spec), Bits(), hadamard=bool(spec)),  # type: ignore[misc]
        )
    for part, bits in PARTS.items():
        numbers.get(f"part | {part}", lambda bits=bits: simulated_perplexity(made("rotate-residual"), Bits(*bits)))  # type: ignore[misc]
    for way in GPTQ:
        numbers.get(f"GPTQ | {way}", lambda way=way: gptq_perplexity(made(WAYS[way])))  # type: ignore[misc]
        numbers.get(
            f"activations and cache | {way}",
            lambda way=way: simulated_perplexity(made(WAYS[way]), Bits(weights=0)),  # type: ignore[misc]
        )
        numbers.get(
            f"narrow activations and cache | {way}",
            lambda way=way: simulated_perplexity(made(WAYS[way]), replace(LEARNED.bits, weights=0)),  # type: ignore[misc]
        )
    for seed in SEEDS:
        if quant_rotation_learn.file_of(seed).exists():
            numbers.get(f"learned | {seed}", partial(learned_rotations, seed))
            numbers.get(f"GPTQ | learned, seed {seed}", lambda seed=seed: gptq_perplexity(learned_model(seed)))  # type: ignore[misc]


def main() -> None:
    """Measure what is missing and write the page."""
    numbers = Numbers(NUMBERS)
    if sys.argv[1:] != ["page"]:
        measure(numbers)
    from burnish.tools.research.quant_rotation_page import page

    PAGE.write_text(page(numbers.known))


if __name__ == "__main__":
    main()
